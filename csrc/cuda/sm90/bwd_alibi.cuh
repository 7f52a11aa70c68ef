/* bwd_alibi.cuh - part of bwd.cu: exponents of weights, with ALiBi or without. dS is the same: slopes have no gradient. With a
 * bias, scores are in natural units (bwd_bias.cuh).
 *
 *     P = 2^(scale log2(e) S - slope log2(e) |diag(i) - j| - lse2)      with a soft cap S is t of bwd_softcap.cuh, scale the cap
 *
 * In this order, so that numbers that leave no digits to S cancel: of a row whose LSE is that large, lse2 is made of the same
 * products (bwd_delta_tiled.cu). Any slopes: NaN, and an infinite one where it meets the diagonal, make weights NaN.
 */
#pragma once

/* Of a step and a lane: slope of the head, as of its tile; diag(i) - j of the lane's first row and key. */
struct alibi_lane { float slope, first; };

static __device__ __forceinline__ alibi_lane alibi_of_lane(const alibi_tile &tile, int consumer, int thread)
{
    return {tile.slope, (float)(tile.first + thread % 4 * 2 - (consumer * 64 + thread / 32 * 16 + thread % 32 / 4))};
}

template <score_kind KIND> static __device__ __forceinline__ alibi_lane alibi_of_lane(const shared &sm, uint32_t stage, int consumer, int thread)
{
    alibi_lane alibi = {};
    if constexpr (WITH_ALIBI<KIND>) { alibi = alibi_of_lane(sm.alibi[stage], consumer, thread); }
    return alibi;
}

/* Of register 4 n + e. Keys 8 further are as far as rows 8 before: of 32 distances 18 are different. */
template <score_kind KIND> static __device__ __forceinline__ float exponent(float s, float lse2, float scale_log2, const alibi_lane &alibi, int n, int e)
{
    if constexpr (WITH_ALIBI<KIND>) { return bwd_less_alibi(s, scale_log2, alibi.slope, alibi.first + (float)(8 * (n - e / 2) + e % 2)) - lse2; }
    return fmaf(s, HAS_BIAS<KIND> ? (float)FGQA_LOG2E : scale_log2, -lse2);
}

/* S of 64 keys x 64 rows -> pairs of P. */
template <score_kind KIND>
static __device__ __forceinline__ void make_weights(uint32_t (&weights)[16], float (&s)[32], const float4 (&lse2)[4], float scale_log2, const alibi_lane &alibi)
{
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int e = 0; e < 4; e++) { s[4 * n + e] = ex2(exponent<KIND>(s[4 * n + e], of_row(lse2, n, e % 2), scale_log2, alibi, n, e)); }
        weights[2 * n] = pack2(s[4 * n], s[4 * n + 1], T());
        weights[2 * n + 1] = pack2(s[4 * n + 2], s[4 * n + 3], T());
    }
}
