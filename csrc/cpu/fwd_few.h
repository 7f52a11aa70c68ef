/* fwd_few.h - forward's tiles of a handful of packed rows, whose products are decode.h's: what lies between those.
 *
 * Scores, additive masks and weights are [row][KEYS]: what becomes of them runs along the keys of a row in full vectors,
 * where the lanes of tile.h would be mostly idle.
 */
#ifndef FGQA_FWD_FEW_H
#define FGQA_FWD_FEW_H
#include "few_tile.h"
#include "fwd_scratch.h"

/* The largest lane of each x[r], r < rows, and their sums: few_fold()'s. */
SIMD void few_lanes_max(const int rows, vreal *x, real *most)
{
    const vreal folded = few_fold(x, rows, 1);
    UNROLL(8)
    for (int r = 0; r < rows; r++) { most[r] = folded[r * (VL / rows)]; }
}

SIMD void few_lanes_sum(const int rows, vreal *x, real *sum)
{
    const vreal folded = few_fold(x, rows, 0);
    UNROLL(8)
    for (int r = 0; r < rows; r++) { sum[r] = folded[r * (VL / rows)]; }
}

/* softmax_strip() for these rows, a constant, as the products round them up. m, l and factor are a vector each. */
SIMD void few_softmax_strip(const int rows, real *s, int32_t n, real scale, real *m, real *l, real *factor)
{
    _Alignas(64) real top[VL], shift[VL], sum[VL];
    vreal x[FEW_ROWS];
    v_store(top, v_set1(-REAL_INF));
    v_store(sum, v_zero());
    const int32_t whole = n / VL * VL;
    const vmask there = m_lt_int(few_lane_numbers(), v_set1_int(n - whole));
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        x[r] = v_set1(-REAL_INF);
        if (whole < n) { v_store(s + r * KEYS + whole, v_select(there, v_load(s + r * KEYS + whole), x[r])); }
    }
    for (int32_t j = 0; j < n; j += VL) {
        UNROLL(8)
        for (int r = 0; r < rows; r++) { x[r] = v_max(v_load(s + r * KEYS + j), x[r]); }
    }
    few_lanes_max(rows, x, top);
    const vreal old = v_load(m), now = v_max(v_load(top) * v_set1(scale), old);
    const vreal from = v_select(m_eq(now, v_set1(-REAL_INF)), v_zero(), now);   /* nothing seen yet: 2^(-inf - 0) = 0 */
    const vreal grown = v_exp2(old - from);
    v_store(shift, from);
    v_store(m, now);
    v_store(factor, grown);
    tile_scale_huge(1, s, rows * KEYS / VL, &scale, &now);
    UNROLL(8)
    for (int r = 0; r < rows; r++) { x[r] = v_zero(); }
    for (int32_t j = 0; j < n; j += VL) {
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const vreal p = v_exp2(v_load(s + r * KEYS + j) * v_set1(scale) - v_set1(shift[r]));
            x[r] += p;
            v_store(s + r * KEYS + j, p);
        }
    }
    few_lanes_sum(rows, x, sum);
    v_store(l, v_load(l) * grown + v_load(sum));
}

static void few_softmax(real *s, int32_t rows, int32_t n, real scale, real *m, real *l, real *factor)
{
    FEW_BY_ROWS(few_softmax_strip, rows, s, n, scale, m, l, factor);
}

/* Zeroes the weights that dropout drops. `keep`: a tile. */
static void few_dropout(real *s, ireal *keep, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t n)
{
    tile_dropout(keep, t, panel, j0, j0 + n);
    for (int32_t r = 0; r < panel->rows; r++) {
        for (int32_t j = 0; j < n; j++) { s[r * KEYS + j] = keep[j * panel->w + r] ? s[r * KEYS + j] : 0; }
    }
}

/* Scratch of a tile: [FEW_ROWS][KEYS] each, factor a vector, keep a tile of tile.h. */
typedef struct { real *s, *add, *factor; ireal *keep; } few_tile;

/* Weights of keys [j0, j1), and m, l and factor as these change them; *used_add is tile->add, or NULL where nothing is added. q
 * is [row][ROUND_UP(d, VL)]. TILE_UNSEEN: nothing was changed. */
static tile_kind few_weights(const few_tile *tile, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, const few_source *k,
                             const real *q, real *m, real *l, const real **used_add)
{
    const fgqa_problem *const p = t->p;
    const int32_t n = j1 - j0;
    real scale;
    const tile_kind kind = few_tile_scores(tile->s, tile->add, t, panel, j0, j1, k, q, used_add, &scale);
    if (kind == TILE_UNSEEN) { return kind; }
    few_softmax(tile->s, panel->rows, n, scale, m, l, tile->factor);
    if (p->dropout_threshold) { few_dropout(tile->s, tile->keep, t, panel, j0, n); }
    return kind;
}

/* tile_add_bad_row() for these rows, of key j, `at` of the tile; o is [row][ld]. */
static void few_add_bad_row(const tile_panel *panel, const real *add, int32_t j, int32_t at, const real *weight, const real *x, int32_t cols, real *o,
                            int32_t ld)
{
    for (int32_t r = 0; r < panel->rows; r++) {
        const int sees = panel->begin[r] <= j && j < panel->end[r] && !(add && add[r * KEYS + at] == -REAL_INF);
        for (int32_t c = 0; c < cols && sees; c++) { o[r * ld + c] += weight[r * KEYS + at] * x[c]; }
    }
}

/* Panel n, of few rows, attends to keys [j0, j1) of a block. Whether unseen rows of V that are not finite have spoiled o is
 * found by looking at o: V itself is read once. */
static void attend_few(fwd_scratch *scratch, const tile_sequence *t, int32_t n, key_block *block, int32_t j0, int32_t j1)
{
    const fgqa_problem *const p = t->p;
    const tile_panel *const panel = &scratch->panel[n];
    const int32_t keys = j1 - j0, first = j0 - block->j0, ld = columns(p->dv), used = panel->rows * ld;
    const real *const q = scratch->q + (size_t)n * PANEL * (size_t)columns(p->d);
    real *const o = scratch->o + (size_t)n * PANEL * (size_t)ld, *const m = scratch->m + n * PANEL, *const l = scratch->l + n * PANEL;
    const few_tile tile = {scratch->s, scratch->add, scratch->factor, scratch->keep};
    const tile_block k = block->k_list ? block->k : block_from(&block->k, first);
    const few_source k_rows = {k.data, k.stride, block->k_list ? block->k_list + first : NULL, block->k_list ? block->form : FEW_BLOCK};
    const real *add;
    const tile_kind kind = few_weights(&tile, t, panel, j0, j1, &k_rows, q, m, l, &add);
    if (kind == TILE_UNSEEN) { return; }
    if (kind == TILE_PARTIAL) { memcpy(scratch->rows, o, (size_t)used * sizeof(real)); }
    const tile_block v = block->v_list ? block->v : block_from(&block->v, first);
    const few_source v_rows = {v.data, v.stride, block->v_list ? block->v_list + first : NULL, block->v_list ? block->form : FEW_BLOCK};
    const int at_once = few_keys(panel->rows, p->dv, v_rows.form);
    few_accumulate(panel->rows, keys, p->dv, at_once, tile.s, KEYS, &v_rows, o, ld, tile.factor);
    if (kind != TILE_PARTIAL || row_is_finite(o, used)) { return; }

    search_values(scratch, t, block);
    const tile_block clean = block_from(block->bad.count ? &block->clean : &block->v, first);
    const few_source clean_rows = {clean.data, clean.stride, NULL, FEW_BLOCK};
    memcpy(o, scratch->rows, (size_t)used * sizeof(real));
    few_accumulate(panel->rows, keys, p->dv, at_once, tile.s, KEYS, &clean_rows, o, ld, tile.factor);
    for (int32_t i = 0; i < block->bad.count; i++) {
        const int32_t j = block->j0 + block->bad.row[i];
        if (j < j0 || j >= j1) { continue; }
        few_add_bad_row(panel, add, j, j - j0, tile.s, block->v.data + block->bad.row[i] * block->v.stride, p->dv, o, ld);
    }
}

#endif
