/* bwd_softcap.cuh - part of bwd.cu: weights where scores have a soft cap, x = cap tanh(ratio q.k), ratio = scale / cap.
 *
 *     t = tanh(ratio S)   P = 2^(cap log2(e) t - LSE)   dS = P (1 - t^2) (dP - delta)
 *
 * P (1 - t^2) takes the place that P has in dS without a cap, rounded likewise.
 */
#pragma once

/* S of 64 keys x 64 rows -> pairs of P, for dV, and of P (1 - t^2), for dS. */
template <score_kind KIND>
static __device__ __forceinline__ void capped_weights(uint32_t (&weights)[16], uint32_t (&sloped)[16], float (&s)[32], const float4 (&lse2)[4],
                                                      const bwd_params &p, const alibi_lane &alibi)
{
    cap_scores(s, p.in_caps);
#pragma unroll
    for (int n = 0; n < 16; n++) {
        const float x = s[2 * n], y = s[2 * n + 1];
        const float weight_x = ex2(exponent<KIND>(x, of_row(lse2, n / 2, 0), p.scale_log2, alibi, n / 2, n % 2 * 2));
        const float weight_y = ex2(exponent<KIND>(y, of_row(lse2, n / 2, 1), p.scale_log2, alibi, n / 2, n % 2 * 2 + 1));
        weights[n] = pack2(weight_x, weight_y, T());
        sloped[n] = pack2(weight_x * FGQA_SOFTCAP_GRAD(x, 1.0f), weight_y * FGQA_SOFTCAP_GRAD(y, 1.0f), T());
    }
}
