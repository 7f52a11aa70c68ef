/* few_tile.h - tiles of a handful of packed rows, in both passes: scores are [row][KEYS], as decode.h's products have them, and
 * what becomes of them runs along the keys of a row in full vectors, where the lanes of tile.h would be mostly idle.
 */
#ifndef FGQA_FEW_TILE_H
#define FGQA_FEW_TILE_H
#include "decode.h"
#include "tile.h"

/* tile_additive() for these rows. */
FGQA_SHARED tile_kind few_additive(real *add, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t n)
{
    tile_verdict verdict = tile_verdict_begin();
    for (int32_t r = 0; r < panel->rows; r++) { tile_additive_lane(add + r * KEYS, t, panel->r0 + r, r == 0, j0, n, &verdict); }
    return tile_verdict_kind(&verdict);
}

SIMD vint few_lane_numbers(void)
{
    vint lane;
    for (int i = 0; i < VL; i++) { lane[i] = i; }
    return lane;
}

/* tile_transform() for these rows. */
FGQA_SHARED void few_transform(real *s, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t n, const real *add)
{
    const vint lane = few_lane_numbers();
    const tile_chain chain = tile_chain_of(t);
    for (int32_t r = 0; r < panel->rows; r++) {
        const vint begin = v_set1_int(panel->begin[r]), end = v_set1_int(panel->end[r]), diag = v_set1_int(panel->diag[r]);
        const vreal slope = v_set1(panel->slope[r]);
        for (int32_t j = 0; j < n; j += VL) {
            const vint key = v_set1_int(j0 + j) + lane;
            real *const at = s + r * KEYS + j;
            v_store(at, tile_score(chain, v_load(at), add ? add + r * KEYS + j : NULL, key, begin, end, diag, slope, NULL));
        }
    }
}

/* Scores [row][KEYS] of keys [j0, j1), ready for 2^(s*scale - m) with the scale that is returned in *scale; *used_add is `add`,
 * or NULL where nothing is added. q is [row][ROUND_UP(d, VL)]. TILE_UNSEEN: nothing was written. */
SIMD tile_kind few_tile_scores(real *s, real *add, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, const few_source *k, const real *q,
                               const real **used_add, real *scale)
{
    const int32_t n = j1 - j0;
    tile_kind kind = t->has_add ? few_additive(add, t, panel, j0, n) : TILE_FULL;
    *used_add = kind == TILE_PARTIAL ? add : NULL;
    if (kind == TILE_UNSEEN) { return kind; }
    if (!fgqa_tile_is_full(&t->seq.mask, panel->i0, panel->i1, j0, j1)) { kind = TILE_PARTIAL; }
    few_scores(panel->rows, n, t->p->d, k, q, ROUND_UP(t->p->d, VL), s, KEYS);
    const int transformed = kind == TILE_PARTIAL || t->needs_transform || !(t->score_scale >= SMALLEST_SCALE);
    if (transformed) { few_transform(s, t, panel, j0, n, *used_add); }
    *scale = transformed ? 1 : t->score_scale;
    return kind;
}

#endif
