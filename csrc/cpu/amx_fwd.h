/* amx_fwd.h - forward's products on the tile unit: the part of fwd.c that differs in the rows "amx" and "avx512bf16".
 *
 *     S^T = K Q^T         Q packed once a panel
 *     P^T = 2^(S^T - m)   written as bfloat16, pairs of keys interleaved
 *     O^T += V^T P^T
 *
 * K and V^T are packed once for all panels of the task, a span at a time, as whole tiles in the order of use. Two phases
 * of a panel and these keys, each of which leaves its operands in the first-level cache: first scores of AMX_DEPTH keys after
 * those of others, beside weights; then values of all of them, beside the first weights of the next panel (amx_weights.h). Scores
 * and values in turn, product by product, need more than that cache holds and take a third longer.
 *
 * float16, and float32 where precision="bf16x3" asks for it, are split into two parts (amx.h): K, Q, V and P; float16 without
 * loss, and its scores are those of float32 arithmetic, as their LSE is float32. What is infinite or NaN must not meet the other
 * operand's low part, whose sign is its own: scores of such rows of K and Q are computed apart, and such rows of V are added
 * apart even where all lanes see them.
 */
#ifndef FGQA_AMX_FWD_H
#define FGQA_AMX_FWD_H
#include "amx_keys.h"

/* ---- weights ---- */

/* p = 2^(s*scale - m) of n keys, a multiple of AMX_DEPTH, with m as it is after them; l = l*factor + sum p. Returns whether
 * some factor is not 1. `keep`: s becomes p as well. */
SIMD int amx_softmax_strip(const int nv, const int keep, const ptrdiff_t low, real *s, int32_t n, real scale, real *m, real *l, real *factor, bf16 *p)
{
    amx_beside w = {.s = s, .p = p, .m = m, .factor = factor, .score_scale = scale};
    amx_weights_begin(nv, &w);
    while (w.key < n) {
        amx_strip_top(nv, keep, low, &w);
        amx_strip_keys(nv, keep, low, &w, AMX_DEPTH);
        UNROLL(2)
        for (int v = 0; v < nv; v++) { w.sum[v] += w.strip[v]; }
    }
    amx_weights_end(nv, &w, l);
    return w.grown;
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

/* Scratch of tiles: s has AMX_DEPTH keys more than KEYS; factor is of two panels. */
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

/* Weights beside a product, of one part or two. */
SIMD void amx_share_one(void *w, int steps) { amx_weights_share(0, w, steps); }
SIMD void amx_share_two(void *w, int steps) { amx_weights_share(AMX_SPAN * PANEL, w, steps); }
SIMD amx_share *amx_share_of(const amx_beside *beside, ptrdiff_t low) { return !beside ? NULL : low ? amx_share_two : amx_share_one; }

/* Scores of n keys from number `first` of the block on, a multiple of AMX_DEPTH. */
SIMD void amx_scores(const amx_rows *to, const tile_sequence *t, const amx_keys *keys, int32_t first, int32_t n, real *s, amx_beside *beside, const ptrdiff_t low)
{
    const ptrdiff_t ld = AMX_PAD(t->p->d), nv = to->panel->nv;
    const amx_operand k = {keys->k + first * ld, 2 * AMX_TILE, AMX_TILE, AMX_DEPTH * ld, AMX_DEPTH, keys->k_low, t->p->dtype == FGQA_F16};
    const amx_operand q = {to->q, nv * AMX_TILE, AMX_TILE, 0, 0, to->q_low, 0};
    amx_product_beside(0, amx_tiles(n), (int)nv, (int)ld / AMX_DEPTH, &k, &q, s, nv * VL, amx_share_of(beside, low), beside);
}

/* O = O*factor + V^T P of n keys from number `first` of the block on, multiples of AMX_DEPTH. */
SIMD void amx_values(const amx_rows *to, const tile_sequence *t, const amx_keys *keys, const bf16 *v_t, const bf16 *p, int32_t first, int32_t n,
                     const real *factor, int grown, amx_beside *beside, const ptrdiff_t low)
{
    const ptrdiff_t nv = to->panel->nv, w = nv * VL;
    const int add = !*to->o_empty;
    for (int32_t c = 0; add && grown && c < t->p->dv; c++) {
        for (ptrdiff_t v = 0; v < w; v += VL) { v_store(to->o + c * w + v, v_load(to->o + c * w + v) * v_load(factor + v)); }
    }
    const amx_operand values = {v_t + AMX_PAIR(first), 2 * AMX_TILE, AMX_TILE, keys->v_pair, AMX_DEPTH, keys->v_t_low, 0};
    const amx_operand weights = {p, nv * AMX_TILE, AMX_TILE, 0, 0, keys->p_low, 0};
    if (add) {
        amx_product_beside(1, amx_tiles(t->p->dv), (int)nv, n / AMX_DEPTH, &values, &weights, to->o, w, amx_share_of(beside, low), beside);
    } else {
        amx_product_beside(0, amx_tiles(t->p->dv), (int)nv, n / AMX_DEPTH, &values, &weights, to->o, w, amx_share_of(beside, low), beside);
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
    amx_values(&tile->to, t, keys, dirty ? keys->v_t_clean : keys->v_t, keys->p, from, all, scratch->factor, grown, NULL, 0);
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

/* A run of a panel's plain tiles: n keys, KEYS or more, from the block `keys` on. */
typedef struct { amx_rows to; const amx_keys *keys; int32_t n; } amx_run;

/* Between runs: scores of AMX_AHEAD + 1 strips of the one at hand are in the ring from
 * `slot` on, weights of AMX_AHEAD are made. */
typedef struct { amx_run at; amx_beside weights; int32_t slot; int has_at, side; } amx_line;

/* Products of a strip's scores, and of a run's values, one after the other. */
SIMD int32_t amx_score_steps(const fgqa_problem *p, ptrdiff_t low) { return AMX_PAD(p->d) / AMX_DEPTH * (low ? p->dtype == FGQA_F16 ? 4 : 3 : 1); }
SIMD int32_t amx_value_steps(const fgqa_problem *p, ptrdiff_t low, int32_t n) { return (amx_tiles(p->dv) + 1) / 2 * (n / AMX_DEPTH) * (low ? 3 : 1); }

SIMD void amx_run_score(const amx_run *of, int32_t strip, const tile_sequence *t, real *s, amx_beside *beside, const ptrdiff_t low)
{
    amx_scores(&of->to, t, of->keys, strip * AMX_DEPTH, AMX_DEPTH, s, beside, low);
}

/* The weights of a run begin; of two in turn each has its own p and factor. */
SIMD amx_beside amx_run_weights(const amx_run *of, int side, int32_t slot, const amx_scratch *scratch, const tile_sequence *t)
{
    amx_beside w = {.p = of->keys->p + side * (ptrdiff_t)amx_parts(t->p) * amx_span_keys(t->p) * PANEL, .m = of->to.m, .factor = scratch->factor + side * PANEL,
                    .ring = scratch->ring, .slot = slot, .end = AMX_AHEAD * AMX_DEPTH, .score_scale = t->score_scale};
    amx_weights_begin(NV, &w);
    return w;
}

/* The run at hand, and the beginning of `next` (or NULL) beside it. */
SIMD void amx_run_attend(const ptrdiff_t low, amx_line *line, const amx_run *next, const amx_scratch *scratch, const tile_sequence *t)
{
    const amx_run *const at = &line->at;
    const int32_t strips = at->n / AMX_DEPTH, all = strips + (next ? AMX_AHEAD + 1 : 0);
    amx_beside w = line->weights;
    amx_weights_share_among(&w, at->n, (all - AMX_AHEAD - 1) * amx_score_steps(t->p, low));
    for (int32_t j = AMX_AHEAD + 1; j < all; j++) {
        w.end = (j < strips ? j : strips) * AMX_DEPTH;
        amx_run_score(j < strips ? at : next, j < strips ? j : j - strips, t, scratch->ring + (line->slot + j) % AMX_RING * AMX_STRIP, &w, low);
    }
    amx_weights_until(low, &w, at->n);
    amx_weights_end(NV, &w, at->to.l);

    line->slot = (line->slot + strips) % AMX_RING;
    line->side ^= 1;
    if (next) {
        line->weights = amx_run_weights(next, line->side, line->slot, scratch, t);
        amx_beside beside = line->weights;
        amx_weights_share_among(&beside, beside.end, amx_value_steps(t->p, low, at->n));
        amx_values(&at->to, t, at->keys, at->keys->v_t, w.p, 0, at->n, w.factor, w.grown, &beside, low);
        amx_weights_until(low, &beside, beside.end);
        line->weights = beside;
    } else {
        amx_values(&at->to, t, at->keys, at->keys->v_t, w.p, 0, at->n, w.factor, w.grown, NULL, 0);
    }
}

SIMD void amx_line_begin(const ptrdiff_t low, amx_line *line, const amx_run *first, const amx_scratch *scratch, const tile_sequence *t)
{
    line->slot = line->side = 0;
    for (int32_t j = 0; j <= AMX_AHEAD; j++) { amx_run_score(first, j, t, scratch->ring + j * AMX_STRIP, NULL, 0); }
    line->weights = amx_run_weights(first, 0, 0, scratch, t);
    amx_weights_until(low, &line->weights, line->weights.end);
}

/* `next`: or NULL for the end of the line. */
static void amx_line_step(amx_line *line, const amx_run *next, const amx_scratch *scratch, const tile_sequence *t)
{
    const amx_keys *const keys = line->has_at ? line->at.keys : next ? next->keys : NULL;
    const int split = keys && keys->p_low;
    if (!line->has_at && next) {
        if (split) {
            amx_line_begin(AMX_SPAN * PANEL, line, next, scratch, t);
        } else {
            amx_line_begin(0, line, next, scratch, t);
        }
    } else if (line->has_at) {
        if (split) {
            amx_run_attend(AMX_SPAN * PANEL, line, next, scratch, t);
        } else {
            amx_run_attend(0, line, next, scratch, t);
        }
    }
    line->has_at = next != NULL;
    if (next) { line->at = *next; }
}

/* Rows of a panel attend to keys [j0, j1) of the blocks in `keys`, or to those before the first tile that is not plain; their
 * results are complete after amx_line_step(NULL). Returns the first key that is left. */
static int32_t amx_attend(amx_line *line, const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, amx_keys *keys, int32_t j0, int32_t j1,
                          int32_t span_end, int plain_only)
{
    amx_run run = {*to, NULL, 0};
    const int32_t span = amx_span_keys(t->p), origin = j0 / span * span;
    for (int32_t n = (j0 - origin) / KEYS; n < span / KEYS && origin + n * KEYS < j1; n++) {
        const int32_t block = origin + n * KEYS, end = block + KEYS;
        amx_tile tile;
        if (!amx_tile_begin(&tile, scratch, t, to, &keys[n], j0 > block ? j0 : block, j1 < end ? j1 : end, span_end < end ? span_end : end)) { continue; }
        if (tile.plain && (!run.keys || run.keys + run.n / KEYS == &keys[n])) {
            run.keys = run.keys ? run.keys : &keys[n];
            run.n += KEYS;
            continue;
        }
        if (run.keys) { amx_line_step(line, &run, scratch, t); }
        if (plain_only) { return j0 > block ? j0 : block; }
        amx_line_step(line, NULL, scratch, t);
        run.keys = NULL;
        run.n = 0;
        amx_tile_attend(&tile, scratch, t);
    }
    if (run.keys) { amx_line_step(line, &run, scratch, t); }
    return j1;
}

#endif
