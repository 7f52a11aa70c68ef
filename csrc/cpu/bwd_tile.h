/* bwd_tile.h - what the passes of the backward share: a panel's rows packed both ways, and its tiles P^T and dS^T.
 *
 *     S^T = K Q^T        P^T = 2^(S^T - lse)        dP^T = V dO^T        delta = rowsum(dO*O) - dLSE
 *     dS^T = P^T * (dP^T - delta)                   derivative by the score
 *     dS^T * (1 - tanh^2)                           derivative by scale*(q.k), with softcap
 *
 * Dropout zeroes and rescales P for dV, and dP for dS; delta already sums over what was kept.
 */
#ifndef FGQA_BWD_TILE_H
#define FGQA_BWD_TILE_H
#include "../core/workspace.h"
#include "row_stats.h"
#if FGQA_PAIRS
#include "amx.h"
#endif

typedef struct {
    tile_panel panel;
    row_stats lse;                      /* top is the whole LSE and log_sum 0, unless `exact` */
    int exact;                          /* some row's LSE was too large to hold its sum: both halves were computed anew */
    int few;                            /* a handful of rows: q_t and dout_t are [lane][ROUND_UP(d or dv, VL)] (bwd_block.h) */
    uint32_t special;                   /* rows of Q or dO that are not finite, a bit each; set by amx_bwd.h alone */
    _Alignas(64) real delta[PANEL];
    real *q_t, *dout_t;                 /* [d][w] and [dv][w]; q carries the sign of scale */
} bwd_panel;

/* Scratch of one tile: SCORE_KEYS x PANEL each, add KEYS x PANEL, rows VL x KEYS. k_low [KEYS][ld_low] and q_low [d][w], unless
 * NULL: their product is a part of the scores. */
typedef struct { real *s, *dp, *tanh, *add, *rows; ireal *keep; const real *k_low, *q_low; int32_t ld_low; } bwd_tiles;

FGQA_SHARED void bwd_panel_carve(bwd_panel *panel, fgqa_arena *arena, const fgqa_problem *p)
{
    real *const q_t = fgqa_arena_take(arena, (size_t)ROUND_UP(p->d, VL) * PANEL, sizeof(real));
    real *const dout_t = fgqa_arena_take(arena, (size_t)ROUND_UP(p->dv, VL) * PANEL, sizeof(real));
    if (panel) {
        panel->q_t = q_t;
        panel->dout_t = dout_t;
    }
}

FGQA_SHARED bwd_tiles bwd_tiles_carve(fgqa_arena *arena, const fgqa_problem *p)
{
    const int has_add = p->view[FGQA_ARG_mask].data != NULL || p->view[FGQA_ARG_bias].data != NULL;
    bwd_tiles tiles = {NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0};
    tiles.s = fgqa_arena_take(arena, SCORE_KEYS * PANEL, sizeof(real));
    tiles.dp = fgqa_arena_take(arena, SCORE_KEYS * PANEL, sizeof(real));
    tiles.tanh = p->softcap > 0 ? fgqa_arena_take(arena, SCORE_KEYS * PANEL, sizeof(real)) : NULL;
    tiles.add = has_add ? fgqa_arena_take(arena, KEYS * PANEL, sizeof(real)) : NULL;
    tiles.rows = has_add ? fgqa_arena_take(arena, VL * KEYS, sizeof(real)) : NULL;
    tiles.keep = p->dropout_threshold ? fgqa_arena_take(arena, SCORE_KEYS * PANEL, sizeof(ireal)) : NULL;
    return tiles;
}

/* Reals between rows of a B operand that is walked downwards: an odd number of cache lines, so that the rows of a strip
 * spread over all sets of the first-level cache. A multiple of VL. */
SIMD int32_t bwd_row_stride(int32_t cols)
{
    const int32_t line = 64 / (int32_t)sizeof(real), stride = ROUND_UP(cols, line);
    return stride / line % 2 ? stride : stride + line;
}

/* An LSE beyond this may be off by more than 1/128: 2^-6 / epsilon. */
#define LARGEST_LSE ((real)(FGQA_REAL_F64 ? 0x1p46 : 0x1p17))

/* Where a panel's rows go: q[lane][ldq], dout[lane][ldo]. */
typedef struct { real *q, *dout; int32_t ldq, ldo; } bwd_rows;

/* Replaces each LSE too large to hold its sum by the two halves of it, where these keys are all that it was made of. Where
 * it is that of more keys (a part of a split), it says more than these keys can. */
FGQA_SHARED void bwd_own_lse(bwd_panel *bp, const tile_sequence *t, const tile_sequence *kv, const stats_scratch *scratch)
{
    row_stats own;
    row_stats_of(&own, t, kv, &bp->panel, bp->q_t, scratch);
    for (int32_t lane = 0; lane < bp->panel.w; lane++) {
        const real given = bp->lse.top[lane], size = given < 0 ? -given : given;
        const real apart = own.top[lane] + own.log_sum[lane] - given;
        const real rounding = 4 * size * (real)(FGQA_REAL_F64 ? 0x1p-52 : 0x1p-23);
        if (size > LARGEST_LSE && size < REAL_INF && apart <= rounding && -apart <= rounding) {
            bp->lse.top[lane] = own.top[lane];
            bp->lse.log_sum[lane] = own.log_sum[lane];
        }
    }
}

/* The LSE of packed rows r0 .. as it was given; what else depends on it is cleared. */
FGQA_SHARED void bwd_panel_lse(bwd_panel *bp, const tile_sequence *t, int64_t r0)
{
    bp->exact = bp->few = 0;
    for (int32_t lane = 0; lane < bp->panel.w; lane++) {
        const real lse = lane < bp->panel.rows ? tile_lse_load(t, &t->p->view[FGQA_ARG_lse], r0 + lane) : -REAL_INF;
        const real size = lse < 0 ? -lse : lse;
        bp->exact |= size > LARGEST_LSE && size < REAL_INF;
        bp->lse.top[lane] = lse == -REAL_INF ? REAL_INF : lse * (real)FGQA_LOG2E;
        bp->lse.log_sum[lane] = 0;
        bp->delta[lane] = 0;
    }
}

/* Rows [lane][ld] as the scores of a panel take them, a handful as they are. */
SIMD void bwd_panel_operand(const bwd_panel *bp, real *to, const real *rows, int32_t ld, int32_t cols)
{
    const int32_t columns = ROUND_UP(cols, VL), lanes = bp->few ? few_lanes(bp->panel.rows) : 0;
    for (int32_t lane = 0; lane < lanes; lane++) { row_copy(to + lane * columns, rows + (ptrdiff_t)lane * ld, columns); }
    if (!bp->few) { tile_transpose_rows(to, rows, ld, bp->panel.w, cols); }
}

/* Packed rows [r0, r1) as panel: q and dout as rows and transposed; lse. Not delta. `kv` says where K lies. `few`: a handful of
 * rows may be taken as such, unless what becomes of their scores is known to tile.h alone. */
FGQA_SHARED void bwd_panel_load(bwd_panel *bp, const tile_sequence *t, const tile_sequence *kv, int64_t r0, int64_t r1,
                                const bwd_rows *to, const stats_scratch *scratch, int few)
{
    const fgqa_problem *p = t->p;
    tile_panel_init(&bp->panel, t, r0, r1);
    bwd_panel_lse(bp, t, r0);
    bp->few = few && bp->panel.rows <= FEW_ROWS && !bp->exact && !(p->softcap > 0) && !p->dropout_threshold;
    tile_pack_rows(to->q, to->ldq, t, &bp->panel, &p->view[FGQA_ARG_q], p->d, t->q_sign);
    bwd_panel_operand(bp, bp->q_t, to->q, to->ldq, p->d);
    tile_pack_rows(to->dout, to->ldo, t, &bp->panel, &p->view[FGQA_ARG_dout], p->dv, 1);
    bwd_panel_operand(bp, bp->dout_t, to->dout, to->ldo, p->dv);
    if (bp->exact) { bwd_own_lse(bp, t, kv, scratch); }
}

/* What a tile's scores are turned into; the flags are constants where it pays. `split`: to the digits of
 * float32, which tiles take as two bfloat16 numbers each. */
typedef struct { int partial, capped, dropped, exact, split; } bwd_flags;
typedef struct { vreal weight, ds; } bwd_score;

#if FGQA_PAIRS
SIMD vreal bwd_exp2(vreal x, int split) { return split ? amx_exp2(x) : amx_exp2_short(x); }   /* rounded to bfloat16 for every use, or not */
#else
SIMD vreal bwd_exp2(vreal x, int split)
{
    (void)split;
    return v_exp2(x);
}
#endif

/* Of one vector of scores, `at` in the tiles, whose lanes have this LSE and delta. */
SIMD bwd_score bwd_score_grad(const bwd_tiles *tiles, ptrdiff_t at, vreal lse, vreal log_sum, vreal delta, real scale, real keep_scale,
                              const bwd_flags flags)
{
    const vreal s = v_load(tiles->s + at), x = s * v_set1(scale) - lse, p = bwd_exp2(flags.exact ? x - log_sum : x, flags.split);
    vreal kept = p, dp = v_load(tiles->dp + at);
    if (flags.dropped) {
        const vint keep = v_load_int(tiles->keep + at);
        kept = (vreal)((vint)(p * v_set1(keep_scale)) & keep);
        dp = (vreal)((vint)(dp * v_set1(keep_scale)) & keep);
    }
    vreal d = p * (dp - delta);
    if (flags.capped) {
        const vreal tanh = v_load(tiles->tanh + at);
        d *= FGQA_SOFTCAP_GRAD(tanh, v_set1(1));
    }
    if (flags.partial) {
        /* Not p = 0 and products with it: lse, dp and delta may hold a NaN that an unseen key must not meet. */
        const vmask unseen = m_eq(s, v_set1(-REAL_INF));
        kept = v_select(unseen, v_zero(), kept);
        d = v_select(unseen, v_zero(), d);
    }
    const bwd_score result = {kept, d};
    return result;
}

/* weight (NULL: not wanted) and ds, `ld` reals between keys. */
SIMD void bwd_weights(const bwd_panel *bp, const bwd_tiles *tiles, int32_t n, real scale, real keep_scale, const bwd_flags flags,
                      real *weight, real *ds, ptrdiff_t ld)
{
    const int32_t w = bp->panel.w;
    for (int32_t v = 0; v < bp->panel.nv; v++) {
        const vreal lse = v_load(bp->lse.top + v * VL), log_sum = v_load(bp->lse.log_sum + v * VL), delta = v_load(bp->delta + v * VL);
        for (int32_t j = 0; j < n; j++) {
            const bwd_score x = bwd_score_grad(tiles, (ptrdiff_t)j * w + v * VL, lse, log_sum, delta, scale, keep_scale, flags);
            if (weight) { v_store(weight + j * ld + v * VL, x.weight); }
            v_store(ds + j * ld + v * VL, x.ds);
        }
    }
}

/* P^T (as dV wants it) and dS^T of keys [j0, j1), inside panel->keys and one key block; `k`, `v` are rows j0.
 * TILE_UNSEEN: no lane sees a key, and nothing was written. */
FGQA_SHARED tile_kind bwd_tile(const bwd_tiles *tiles, const tile_sequence *t, const bwd_panel *bp, int32_t j0, int32_t j1,
                               const tile_block *k, const tile_block *v, int by_score, real *weight, real *ds, ptrdiff_t ld)
{
    const fgqa_problem *p = t->p;
    const real *used_add;
    real scale;
    const int32_t w = bp->panel.w, nv = bp->panel.nv;
    const tile_kind kind = tile_scores_begin(t, &bp->panel, j0, j1, tiles->add, tiles->rows, &used_add);
    if (kind == TILE_UNSEEN) { return kind; }
    gemm_row_set(j1 - j0, nv, p->d, k->data, k->stride, bp->q_t, w, tiles->s, w, NULL);
    if (tiles->k_low) { gemm_row_add(j1 - j0, nv, p->d, tiles->k_low, tiles->ld_low, tiles->q_low, w, tiles->s, w, NULL); }
    scale = tile_scores_end(tiles->s, t, &bp->panel, j0, j1, kind, used_add, tiles->tanh);
    if (bp->exact) { tile_scale(tiles->s, (j1 - j0) * w, &scale); }
    gemm_row_set(j1 - j0, nv, p->dv, v->data, v->stride, bp->dout_t, w, tiles->dp, w, NULL);
    /* Of sources with FGQA_PAIRS this makes dbias only, whose sums and elements may be float32. */
    const bwd_flags plain = {0, 0, 0, 0, FGQA_PAIRS};
    const bwd_flags flags = {kind == TILE_PARTIAL, p->softcap > 0 && !by_score, p->dropout_threshold != 0, bp->exact, FGQA_PAIRS};
    if (flags.dropped) { tile_dropout(tiles->keep, t, &bp->panel, j0, j1); }
    if (flags.partial || flags.capped || flags.dropped || flags.exact) {
        bwd_weights(bp, tiles, j1 - j0, scale, (real)fgqa_dropout_scale(p->dropout_threshold), flags, weight, ds, ld);
    } else {
        bwd_weights(bp, tiles, j1 - j0, scale, 1, plain, weight, ds, ld);
    }
    return kind;
}

#endif
