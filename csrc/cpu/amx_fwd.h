/* amx_fwd.h - forward's products on the tile unit: the part of fwd.c that differs in the row "amx".
 *
 *     S^T = K Q^T         Q packed once a panel
 *     P^T = 2^(S^T - m)   written as bfloat16, pairs of keys interleaved
 *     O^T += V^T P^T
 *
 * K and V^T are packed once for all panels of the task, AMX_SPAN keys at a time, as whole tiles in the order of use. Two phases
 * of a panel and these keys, each of which leaves its operands in the first-level cache: first scores of AMX_DEPTH keys after
 * those of others, beside the weights of those; then values of all of them. Scores and values in turn, product by product, need
 * more than that cache holds and take a third longer.
 *
 * float16, and float32 where precision="bf16x3" asks for it, are split into two parts (amx.h): K, Q, V and P; float16 without
 * loss, and its scores are those of float32 arithmetic, as their LSE is float32. What is infinite or NaN must not meet the other
 * operand's low part, whose sign is its own: scores of such rows of K and Q are computed apart, and such rows of V are added
 * apart even where all lanes see them.
 *
 * m follows the largest score of AMX_DEPTH keys after others, and only when that has grown by more than AMX_LAZY: weights up to
 * 2^AMX_LAZY lose nothing in bfloat16, and O is rarely rescaled. Weights that are bfloat16 already are then rounded
 * once more; they are those of keys with much smaller ones.
 */
#ifndef FGQA_AMX_FWD_H
#define FGQA_AMX_FWD_H
#include "amx_keys.h"

#define AMX_LAZY ((real)8)
#define SMALLEST_SCALE 0x1p-126f
#define BLOCK_KEYS AMX_SPAN      /* of fwd.c's loop */

/* ---- weights ---- */

/* Weights of keys 0 .. keys-1 times a factor each lane; `s` (NULL: not kept): as reals, too. */
static void amx_weights_rescale(int32_t nv, ptrdiff_t low, bf16 *p, real *s, int32_t keys, const real *factor)
{
    for (int32_t j = 0; j < keys; j++) {
        for (int32_t v = 0; v < nv; v++) {
            const vreal f = v_load(factor + v * VL);
            real *const real_at = s + (j * nv + v) * VL;
            if (s) { v_store(real_at, v_load(real_at) * f); }
            if (j % 2) { continue; }
            bf16 *const at = p + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE;
            vreal even = v_zero(), odd = v_zero();
            for (ptrdiff_t part = low; part >= 0; part -= low ? low : 1) {
                const __m512i pairs = _mm512_load_si512(at + part);
                even += (vreal)_mm512_slli_epi32(pairs, 16);
                odd += (vreal)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000));
            }
            amx_store_pairs(at, low, even * f, odd * f);
        }
    }
}

/* Weights begin, of any number of keys: factor is what m takes from what was before them. */
SIMD void amx_weights_begin(const int nv, amx_beside *w, real *factor)
{
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        w->sum[v] = v_zero();
        v_store(factor + v * VL, v_set1(1));
    }
}

/* The next AMX_DEPTH keys: m with them, and with it factor and the weights there are. Returns whether it has grown. */
SIMD int amx_weights_top(const int nv, const int keep, const ptrdiff_t low, amx_beside *w, real scale, real *m, real *factor)
{
    vreal top[NV];
    int grown = 0;
    UNROLL(2)
    for (int v = 0; v < nv; v++) { top[v] = v_set1(-REAL_INF); }
    for (int32_t j = 0; j < AMX_DEPTH; j++) {
        UNROLL(2)
        for (int v = 0; v < nv; v++) { top[v] = v_max(v_load(w->s + (j * nv + v) * VL), top[v]); }
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        top[v] *= v_set1(scale);
        grown |= m_any(m_lt(v_load(m + v * VL) + v_set1(AMX_LAZY), top[v]));
    }
    if (__builtin_expect(grown, 0)) {
        _Alignas(64) real step[PANEL];
        UNROLL(2)
        for (int v = 0; v < nv; v++) {
            const vreal old = v_load(m + v * VL);
            const vmask grows = m_lt(old + v_set1(AMX_LAZY), top[v]);
            const vreal f = v_select(grows, v_exp2(old - top[v]), v_set1(1));
            w->sum[v] *= f;
            v_store(m + v * VL, v_select(grows, top[v], old));
            v_store(factor + v * VL, v_load(factor + v * VL) * f);
            v_store(step + v * VL, f);
        }
        if (w->key) { amx_weights_rescale(nv, low, w->p, keep ? w->s - w->key * nv * VL : NULL, w->key, step); }
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        top[v] = v_load(m + v * VL);
        w->shift[v] = v_select(m_eq(top[v], v_set1(-REAL_INF)), v_zero(), top[v]);   /* nothing seen yet: 2^(-inf - 0) = 0 */
    }
    w->scale = scale;
    tile_scale_huge(nv, w->s, AMX_DEPTH, &w->scale, top);
    w->end = w->key + AMX_DEPTH;
    return grown;
}

/* l = l*factor + sum p. */
SIMD void amx_weights_end(const int nv, const amx_beside *w, real *l, const real *factor)
{
    UNROLL(2)
    for (int v = 0; v < nv; v++) { v_store(l + v * VL, v_load(l + v * VL) * v_load(factor + v * VL) + w->sum[v]); }
}

/* p = 2^(s*scale - m) of n keys, a multiple of AMX_DEPTH, with m as it is after them; l = l*factor + sum p. Returns whether
 * some factor is not 1. `keep`: s becomes p as well. */
SIMD int amx_softmax_strip(const int nv, const int keep, const ptrdiff_t low, real *s, int32_t n, real scale, real *m, real *l, real *factor, bf16 *p)
{
    amx_beside w = {.s = s, .p = p};
    int grown = 0;
    amx_weights_begin(nv, &w, factor);
    while (w.key < n) {
        grown |= amx_weights_top(nv, keep, low, &w, scale, m, factor);
        while (w.key < w.end) { amx_weights_pair(nv, keep, low, &w); }
    }
    amx_weights_end(nv, &w, l, factor);
    return grown;
}

static int amx_softmax(int nv, int keep, ptrdiff_t low, real *s, int32_t n, real scale, real *m, real *l, real *factor, bf16 *p)
{
    if (nv == 1) { return amx_softmax_strip(1, 1, low, s, n, scale, m, l, factor, p); }
    if (keep) { return amx_softmax_strip(2, 1, low, s, n, scale, m, l, factor, p); }
    return low ? amx_softmax_strip(2, 0, AMX_SPAN * PANEL, s, n, scale, m, l, factor, p) : amx_softmax_strip(2, 0, 0, s, n, scale, m, l, factor, p);
}

/* Weights as floats, [n keys][w], to B. */
static void amx_pack_weights(bf16 *p, ptrdiff_t low, const real *s, int32_t n, int32_t nv)
{
    const int32_t w = nv * VL;
    for (int32_t j = 0; j < n; j += 2) {
        for (int32_t v = 0; v < nv; v++) {
            const real *const at = s + j * w + v * VL;
            amx_store_pairs(p + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE, low, v_load(at), v_load(at + w));
        }
    }
}

/* A panel and where its results grow. */
typedef struct {
    const tile_panel *panel;
    const bf16 *q;
    ptrdiff_t q_low;
    int q_special, *o_empty;  /* q is not finite; o has not been written yet */
    real *o, *m, *l;
} amx_rows;

/* Scratch of tiles: s has AMX_DEPTH keys more than KEYS, a ring twice AMX_DEPTH. */
typedef struct { real *s, *ring, *factor, *add, *rows; ireal *keep; } amx_scratch;

/* Number c of a packed row. */
SIMD real amx_packed(const amx_rows *to, int32_t lane, int32_t c)
{
    const bf16 *const at = to->q + (c / AMX_DEPTH * to->panel->nv + lane / AMX_SIDE) * AMX_TILE
                           + c % AMX_DEPTH / 2 * AMX_DEPTH + lane % AMX_SIDE * 2 + c % 2;
    return float_from_bf16(at[0]) + float_from_bf16(at[to->q_low]);
}

/* Scores of keys [j0, j1) with rows of K or Q that are not finite, where these have two parts. */
static void amx_scores_apart(const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, const amx_keys *keys, int32_t j0, int32_t j1, real *s)
{
    const int32_t d = t->p->d, w = to->panel->w;
    uint32_t lanes = 0;
    for (int32_t lane = 0; lane < to->panel->rows; lane++) {
        real nothing = 0;
        for (int32_t c = 0; c < d; c++) { nothing += amx_packed(to, lane, c) * 0; }
        lanes |= (uint32_t)(nothing != nothing) << lane;
    }
    for (int32_t j = j0, bad = 0; j < j1; j++) {
        while (bad < keys->bad_keys.count && keys->origin + keys->bad_keys.row[bad] < j) { bad++; }
        const int all = bad < keys->bad_keys.count && keys->origin + keys->bad_keys.row[bad] == j;
        if (!all && !lanes) { continue; }
        const tile_block row = tile_block_load(t, &t->p->view[FGQA_ARG_k], j, j + 1, d, scratch->rows);
        for (int32_t lane = 0; lane < to->panel->rows; lane++) {
            if (!all && !(lanes >> lane & 1)) { continue; }
            real sum = 0;
            for (int32_t c = 0; c < d; c++) { sum += amx_packed(to, lane, c) * row.data[c]; }
            s[(ptrdiff_t)(j - j0) * w + lane] = sum;
        }
    }
}

/* ---- one tile: scores, weights, values ---- */

/* n keys of a block from j0 on and the rows of a panel. */
typedef struct {
    amx_rows to;
    amx_keys *keys;
    int32_t j0, n, first, before, all;   /* the first key's number in the block and in its step; keys of the steps */
    int plain, others;        /* plain: weights are 2^(s*scale - m) of all lanes and KEYS keys; others: keys of the steps that are not the tile's */
    tile_kind kind;
    const real *add;
} amx_tile;

/* Keys [j0, j1) of a block; returns whether there is something to see. */
static int amx_tile_begin(amx_tile *tile, const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, amx_keys *keys, int32_t j0, int32_t j1,
                          int32_t block_end)
{
    const tile_panel *panel = to->panel;
    tile->kind = tile_scores_begin(t, panel, j0, j1, scratch->add, scratch->rows, &tile->add);
    if (tile->kind == TILE_UNSEEN) { return 0; }
    tile->to = *to;
    tile->keys = keys;
    tile->j0 = j0;
    tile->n = j1 - j0;
    tile->first = j0 - keys->origin;
    tile->before = tile->first % AMX_DEPTH;
    tile->all = AMX_PAD(tile->before + tile->n);
    tile->others = tile->before || (tile->all != tile->before + tile->n && j1 < block_end);
    tile->plain = tile->kind == TILE_FULL && tile->n == KEYS && panel->nv == NV && !t->needs_transform && !t->p->dropout_threshold
                  && t->score_scale >= SMALLEST_SCALE && !to->q_special && !keys->bad_keys.count && !(keys->v_low && amx_bad_values(keys, t));
    return 1;
}

/* Scores of n keys from number `first` of the block on, a multiple of AMX_DEPTH. */
SIMD void amx_scores(const amx_rows *to, const tile_sequence *t, const amx_keys *keys, int32_t first, int32_t n, real *s, amx_beside *beside, const ptrdiff_t low)
{
    const ptrdiff_t ld = AMX_PAD(t->p->d), nv = to->panel->nv;
    const amx_operand k = {keys->k + first * ld, 2 * AMX_TILE, AMX_TILE, AMX_DEPTH * ld, AMX_DEPTH, keys->k_low, t->p->dtype == FGQA_F16};
    const amx_operand q = {to->q, nv * AMX_TILE, AMX_TILE, 0, 0, to->q_low, 0};
    amx_product_beside(0, amx_tiles(n), (int)nv, (int)ld / AMX_DEPTH, &k, &q, s, nv * VL, beside, low);
}

/* O = O*factor + V^T P of n keys from number `first` of the block on, multiples of AMX_DEPTH. */
static void amx_values(const amx_rows *to, const tile_sequence *t, const amx_keys *keys, const bf16 *v_t, int32_t first, int32_t n, const real *factor, int grown)
{
    const ptrdiff_t nv = to->panel->nv, w = nv * VL;
    const int add = !*to->o_empty;
    for (int32_t c = 0; add && grown && c < t->p->dv; c++) {
        for (ptrdiff_t v = 0; v < w; v += VL) { v_store(to->o + c * w + v, v_load(to->o + c * w + v) * v_load(factor + v)); }
    }
    const amx_operand values = {v_t + AMX_PAIR(first), 2 * AMX_TILE, AMX_TILE, AMX_PAIR(AMX_SPAN), AMX_DEPTH, keys->v_t_low, 0};
    const amx_operand weights = {keys->p, nv * AMX_TILE, AMX_TILE, 0, 0, keys->p_low, 0};
    if (add) {
        amx_product(1, amx_tiles(t->p->dv), (int)nv, n / AMX_DEPTH, &values, &weights, to->o, w);
    } else {
        amx_product(0, amx_tiles(t->p->dv), (int)nv, n / AMX_DEPTH, &values, &weights, to->o, w);
    }
    *to->o_empty = 0;
}

/* A tile of any kind, one phase after the other. */
static void amx_tile_attend(const amx_tile *tile, const amx_scratch *scratch, const tile_sequence *t)
{
    const fgqa_problem *p = t->p;
    const tile_panel *panel = tile->to.panel;
    amx_keys *const keys = tile->keys;
    const int32_t n = tile->n, w = panel->w, before = tile->before, all = tile->all, from = tile->first - before, j0 = tile->j0, j1 = j0 + n;
    real *const s = scratch->s, *const seen = s + before * w;
    amx_scores(&tile->to, t, keys, from, before + n, s, NULL, 0);
    if (tile->to.q_special || keys->bad_keys.count) { amx_scores_apart(scratch, t, &tile->to, keys, j0, j1, seen); }
    real scale = tile_scores_end(seen, t, panel, j0, j1, tile->kind, tile->add, NULL);
    if (!(scale >= SMALLEST_SCALE)) {          /* vectors of it are 0, and 0 * -inf is NaN */
        for (int32_t i = 0; i < n * w; i += VL) { v_store(seen + i, v_load(seen + i) * v_set1(scale)); }
        scale = 1;
    }
    for (int32_t i = 0; i < before * w; i += VL) { v_store(s + i, v_set1(-REAL_INF)); }
    for (int32_t i = (before + n) * w; i < all * w; i += VL) { v_store(s + i, v_set1(-REAL_INF)); }

    /* Keys of the first and last step that the panel does not reach count as unseen ones do. */
    const int dirty = (tile->kind == TILE_PARTIAL || tile->others || keys->v_low) && amx_bad_values(keys, t), dropped = p->dropout_threshold != 0;
    const int grown = amx_softmax(panel->nv, dirty || dropped, keys->p_low, s, all, scale, tile->to.m, tile->to.l, scratch->factor, keys->p);
    if (dropped) {
        tile_dropout(scratch->keep, t, panel, j0, j1);
        ireal *const weight = (ireal *)(void *)seen;
        for (int32_t i = 0; i < n * w; i += VL) { *(vint_any *)(weight + i) &= v_load_int(scratch->keep + i); }
        amx_pack_weights(keys->p, keys->p_low, s, all, panel->nv);
    }
    amx_values(&tile->to, t, keys, dirty ? keys->v_t_clean : keys->v_t, from, all, scratch->factor, grown);
    for (int32_t i = 0; dirty && i < keys->bad.count; i++) {
        const int32_t j = keys->origin + keys->bad.row[i];
        if (j < j0 || j >= j1) { continue; }
        const tile_block row = tile_block_load(t, &p->view[FGQA_ARG_v], j, j + 1, p->dv, scratch->rows);
        tile_add_bad_row(panel, tile->add ? tile->add + (ptrdiff_t)(j - j0) * w : NULL, j, seen + (ptrdiff_t)(j - j0) * w, row.data, p->dv, tile->to.o);
    }
}

/* out of a panel, O^T times a factor a lane, in vectors of two columns; returns 0 where that is not possible. */
static int amx_store_panel(const tile_sequence *t, const tile_panel *panel, const real *o, const real *factor)
{
    _Alignas(64) bf16 pairs[AMX_TILE], rows[AMX_TILE];
    const fgqa_view *const out = &t->p->view[FGQA_ARG_out];
    const int32_t dv = t->p->dv, w = panel->w;
    bf16 *to[PANEL];
    if (out->dtype != FGQA_BF16 || out->stride_d != 1 || dv % AMX_DEPTH) { return 0; }
    for (int32_t lane = 0; lane < panel->rows; lane++) { to[lane] = tile_packed_row(t, out, panel->r0 + lane); }
    for (int32_t first = 0; first < panel->rows; first += VL) {
        const int32_t n = panel->rows - first < VL ? panel->rows - first : VL;
        const vreal f = v_load(factor + first);
        for (int32_t c = 0; c < dv; c += AMX_DEPTH) {
            const real *const from = o + (ptrdiff_t)c * w + first;
            for (int32_t k = 0; k < AMX_DEPTH; k += 2) {
                _mm512_store_si512(pairs + k * AMX_SIDE, amx_narrow_pairs(v_load(from + k * w) * f, v_load(from + (k + 1) * w) * f));
            }
            amx_transpose_pairs(rows, AMX_DEPTH, pairs, AMX_DEPTH);
            for (int32_t lane = 0; lane < n; lane++) { _mm512_storeu_si512(to[first + lane] + c, _mm512_load_si512(rows + lane * AMX_DEPTH)); }
        }
    }
    return 1;
}

/* ---- plain tiles one after another ---- */

/* A run of a panel's plain tiles: n keys from the block `keys` on. Its first scores may be in the ring before it begins. */
typedef struct { amx_rows to; const amx_keys *keys; int32_t n; } amx_run;
typedef struct { amx_run at; int has_at; } amx_line;

/* The run at hand; the first scores of `next` (or NULL) beside its last weights. */
SIMD void amx_run_attend(const ptrdiff_t low, const amx_run *at, const amx_run *next, const amx_scratch *scratch, const tile_sequence *t)
{
    const int parts = low ? t->p->dtype == FGQA_F16 ? 4 : 3 : 1, products = AMX_PAD(t->p->d) / AMX_DEPTH * parts;
    amx_beside w = {.p = at->keys->p};
    int grown = 0;
    amx_weights_begin(NV, &w, scratch->factor);
    for (int32_t j = 0; j < at->n; j += AMX_DEPTH) {
        real *const ring[2] = {scratch->ring + j / AMX_DEPTH % 2 * AMX_DEPTH * PANEL, scratch->ring + (j / AMX_DEPTH + 1) % 2 * AMX_DEPTH * PANEL};
        const amx_run *const of = j + AMX_DEPTH < at->n ? at : next;
        w.s = ring[0];
        grown |= amx_weights_top(NV, 0, low, &w, t->score_scale, at->to.m, scratch->factor);
        w.share = (AMX_DEPTH / 2 + products - 1) / products * 2;
        if (of) { amx_scores(&of->to, t, of->keys, of == at ? j + AMX_DEPTH : 0, AMX_DEPTH, ring[1], &w, low); }
        w.share = AMX_DEPTH;
        amx_weights_share(low, &w);
    }
    amx_weights_end(NV, &w, at->to.l, scratch->factor);
    amx_values(&at->to, t, at->keys, at->keys->v_t, 0, at->n, scratch->factor, grown);
}

/* `next`: or NULL for the end of the line. */
static void amx_line_step(amx_line *line, const amx_run *next, const amx_scratch *scratch, const tile_sequence *t)
{
    if (!line->has_at && next) {
        amx_scores(&next->to, t, next->keys, 0, AMX_DEPTH, scratch->ring, NULL, 0);
    } else if (line->has_at) {
        if (line->at.keys->p_low) {
            amx_run_attend(AMX_SPAN * PANEL, &line->at, next, scratch, t);
        } else {
            amx_run_attend(0, &line->at, next, scratch, t);
        }
    }
    line->has_at = next != NULL;
    if (next) { line->at = *next; }
}

/* Rows of a panel attend to keys [j0, j1) of the blocks in `keys`; their results are complete after amx_line_step(NULL). */
static void amx_attend(amx_line *line, const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, amx_keys *keys, int32_t j0, int32_t j1, int32_t span_end)
{
    amx_run run = {*to, NULL, 0};
    const int32_t origin = j0 / AMX_SPAN * AMX_SPAN;
    for (int32_t n = (j0 - origin) / KEYS; n < AMX_BLOCKS && origin + n * KEYS < j1; n++) {
        const int32_t block = origin + n * KEYS, end = block + KEYS;
        amx_tile tile;
        if (!amx_tile_begin(&tile, scratch, t, to, &keys[n], j0 > block ? j0 : block, j1 < end ? j1 : end, span_end < end ? span_end : end)) { continue; }
        if (tile.plain && (!run.keys || run.keys + run.n / KEYS == &keys[n])) {
            run.keys = run.keys ? run.keys : &keys[n];
            run.n += KEYS;
            continue;
        }
        if (run.keys) { amx_line_step(line, &run, scratch, t); }
        amx_line_step(line, NULL, scratch, t);
        run.keys = NULL;
        run.n = 0;
        amx_tile_attend(&tile, scratch, t);
    }
    if (run.keys) { amx_line_step(line, &run, scratch, t); }
}

#endif
