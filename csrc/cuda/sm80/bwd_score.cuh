/* bwd_score.cuh - scores -> weights P and their gradients dS, for the part of a tile that one warp holds (fragments.cuh).
 *
 *     P = 2^((x - top) log2(e) - log_sum),   dS = P (dP' - delta) dx/ds,   dP' = dP, with dropout: kept ? dP dropout_scale : 0
 *
 * top, log_sum: any/bwd_workspace.h. Unseen scores get P = dS = 0 by selection, never
 * by arithmetic: dP of an unseen value may be NaN.
 */
#pragma once
#include "../any/bwd_workspace.h"
#include "../common/mask_tile.cuh"

/* Interval mask: x = 0 where the row does not see the key. seen: keys of the warp's rows. */
template <int MB, int NB>
static __device__ __forceinline__ void hide_tile(float (&x)[MB][NB][4], const fgqa_range *seen, int32_t j0, int lane)
{
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const fgqa_range range = seen[16 * mb + 8 * half + lane / 4];
            const int32_t first = range.begin - j0 - fragment_column(lane, 0);
            const uint32_t count = (uint32_t)max(0, range.end - range.begin);
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if ((uint32_t)(8 * n + e - first) >= count) { x[mb][n][2 * half + e] = 0.0f; }
                }
            }
        }
    }
}

/* Every option. What the second half (dS) needs of the first: bit 4 n + r of seen: the score counts; of kept: not dropped;
 * slope: derivative of the soft cap. */
template <int MB, int NB> struct score_memory {
    uint32_t seen[MB], kept[MB];
    float slope[MB][NB][4];
};

/* s: q.k -> P. `weight` is P after dropout (not yet scaled by dropout_scale). rows: of the tile, first: the warp's first. */
template <int MB, int NB>
static __device__ __forceinline__ void weights_general(const fgqa_params &params, int32_t diag, const score_row *rows, const general_stats *stats, int first,
                                                       int32_t j0, int lane, float (&s)[MB][NB][4], float (&weight)[MB][NB][4], score_memory<MB, NB> &memory)
{
    static_assert(NB <= 8, "one bit a register");
    const bool capped = params.softcap > 0.0f;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
        const int row = first + 16 * mb + lane / 4;
        const score_row two[2] = {rows[row], rows[row + 8]};
        const float top[2] = {stats[row].top, stats[row + 8].top}, log_sum[2] = {stats[row].log_sum, stats[row + 8].log_sum};
        memory.seen[mb] = 0;
        memory.kept[mb] = ~0u;
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                const float qk = s[mb][n][r];
                const float x = score_chain(params, diag, two[r / 2], j0 + 8 * n + fragment_column(lane, r), qk);
                const bool seen = x != -INFINITY;
                memory.slope[mb][n][r] = capped ? FGQA_SOFTCAP_GRAD(softcap_score(params, qk * params.scale), params.inv_softcap) : 1.0f;
                memory.seen[mb] |= seen ? 1u << (4 * n + r) : 0;
                s[mb][n][r] = seen ? ex2(fmaf(x - top[r / 2], (float)FGQA_LOG2E, -log_sum[r / 2])) : 0.0f;
                weight[mb][n][r] = s[mb][n][r];
            }
        }
        if (params.problem.dropout_threshold != 0) {
            float keep[NB][4];
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int r = 0; r < 4; r++) { keep[n][r] = 1.0f; }
            }
            dropout_tile<NB>(dropout_key_make(params.problem), keep, two, j0, lane);
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    if (keep[n][r] == 0.0f) {
                        weight[mb][n][r] = 0.0f;
                        memory.kept[mb] &= ~(1u << (4 * n + r));
                    }
                }
            }
        }
    }
}

/* dp: dO.v -> dS of the raw product q.k (without `scale`), or with CAPPED 0 the gradient of the score after the soft cap:
 * that of a bias. p: P before dropout. */
template <int CAPPED, int MB, int NB>
static __device__ __forceinline__ void gradients_general(const fgqa_params &params, const general_stats *stats, int first, int lane,
                                                         float (&dp)[MB][NB][4], const float (&p)[MB][NB][4], const score_memory<MB, NB> &memory)
{
    const bool drops = params.problem.dropout_threshold != 0;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
        const int row = first + 16 * mb + lane / 4;
        const float delta[2] = {stats[row].delta, stats[row + 8].delta};
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
                float x = dp[mb][n][r];
                if (drops) { x = memory.kept[mb] >> (4 * n + r) & 1 ? x * params.dropout_scale : 0.0f; }
                x = p[mb][n][r] * (x - delta[r / 2]);
                if (CAPPED) { x *= memory.slope[mb][n][r]; }
                dp[mb][n][r] = memory.seen[mb] >> (4 * n + r) & 1 ? x : 0.0f;
            }
        }
    }
}
