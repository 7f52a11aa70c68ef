/* fwd_panel.h - what forward (fwd.c) does to a panel between and after its products: weights of a tile in floats; out and lse. */
#ifndef FGQA_FWD_PANEL_H
#define FGQA_FWD_PANEL_H
#include <math.h>
#include "tile.h"

/* p = 2^(s*scale - m) in place with the new running maximum m; l = l*factor + sum p, factor = 2^(m_old - m). */
SIMD void softmax_strip(const int nv, real *s, int32_t n, real scale, real *m, real *l, real *factor)
{
    const int w = nv * VL;
    vreal top[NV], shift[NV], sum[NV];
    UNROLL(3)
    for (int v = 0; v < nv; v++) { top[v] = v_set1(-REAL_INF); }
    for (int32_t j = 0; j < n; j++) {
        UNROLL(3)
        for (int v = 0; v < nv; v++) { top[v] = v_max(v_load(s + j * w + v * VL), top[v]); }
    }
    UNROLL(3)
    for (int v = 0; v < nv; v++) {
        const vreal old = v_load(m + v * VL), now = v_max(top[v] * v_set1(scale), old);
        top[v] = now;
        shift[v] = v_select(m_eq(now, v_set1(-REAL_INF)), v_zero(), now);   /* nothing seen yet: 2^(-inf - 0) = 0 */
        v_store(m + v * VL, now);
        v_store(factor + v * VL, v_exp2(old - shift[v]));
        sum[v] = v_zero();
    }
    tile_scale_huge(nv, s, n, &scale, top);
    for (int32_t j = 0; j < n; j++) {
        UNROLL(3)
        for (int v = 0; v < nv; v++) {
            const vreal p = v_exp2(v_load(s + j * w + v * VL) * v_set1(scale) - shift[v]);
            sum[v] += p;
            v_store(s + j * w + v * VL, p);
        }
    }
    UNROLL(3)
    for (int v = 0; v < nv; v++) { v_store(l + v * VL, v_load(l + v * VL) * v_load(factor + v * VL) + sum[v]); }
}

static void softmax_tile(int nv, real *s, int32_t n, real scale, real *m, real *l, real *factor)
{
    if (nv == 1) {
        softmax_strip(1, s, n, scale, m, l, factor);
    } else if (nv == 2) {
        softmax_strip(2, s, n, scale, m, l, factor);
    } else {
        softmax_strip(NV, s, n, scale, m, l, factor);
    }
}

/* out and lse of a panel from its o (NULL: `rows` are that already, as [lane][columns]), m, l.
 * Sink: one more logit in the denominator. */
static void finish_panel(const tile_sequence *t, const tile_panel *panel, const real *o, const real *m, const real *l, real *rows)
{
    const fgqa_problem *p = t->p;
    const fgqa_view *out = &p->view[FGQA_ARG_out], *lse = &p->view[FGQA_ARG_lse];
    const int32_t ld = ROUND_UP(p->dv, VL);
    _Alignas(64) real factor[PANEL] = {0};
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        const int64_t r = panel->r0 + lane;
        double top = m[lane], sum = l[lane], weight = 1;
        if (p->view[FGQA_ARG_sink].data) {
            const double sink = (double)tile_head_value(t, FGQA_ARG_sink, r) * FGQA_LOG2E;
            const double both = sink > top ? sink : top;
            if (both > -INFINITY || sink != sink) {
                weight = exp2(top - both);
                sum = sum * weight + exp2(FGQA_SINK_EXPONENT(sink, both));
                top = both;
            }
        }
        if (lse->data) { tile_lse_store(t, lse, r, (real)(sum == 0 ? -INFINITY : top * FGQA_LN2 + log(sum))); }
        factor[lane] = (real)(sum == 0 ? 0 : weight * fgqa_dropout_scale(p->dropout_threshold) / sum);
    }
    if (p->dv == 0) { return; }
#if FGQA_PAIRS
    if (o && amx_store_panel(t, panel, o, factor)) { return; }
#endif
    if (o) { tile_transpose_panel(rows, ld, o, panel->w, p->dv); }
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        real *row = rows + (ptrdiff_t)lane * ld;
        for (int32_t c = 0; c < p->dv; c++) { row[c] *= factor[lane]; }
        row_store(tile_packed_row(t, out, panel->r0 + lane), out->dtype, out->stride_d, row, p->dv);
    }
}

/* Query rows behind the end of their sequence, packed rows [r0, r1). */
static void clear_rows(const tile_sequence *t, int64_t r0, int64_t r1, real *zero)
{
    const fgqa_view *out = &t->p->view[FGQA_ARG_out], *lse = &t->p->view[FGQA_ARG_lse];
    memset(zero, 0, (size_t)t->p->dv * sizeof(real));
    for (int64_t r = r0; r < r1; r++) {
        if (t->p->dv) { row_store(tile_packed_row(t, out, r), out->dtype, out->stride_d, zero, t->p->dv); }
        if (lse->data) { tile_lse_store(t, lse, r, -REAL_INF); }
    }
}

#endif
