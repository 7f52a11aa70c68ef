/* bwd_any_bias.cuh - part of bwd.cu: a bias tensor beside whatever else happens to scores.
 *
 *     x = scale S, or its soft cap, + bias - slope |diag(i) - j|    P = 2^(log2(e) (x - base) - lse2)
 *
 * bases: bwd_bias.cuh. Head dims 64 and 128: by TMA as there. Head dim 256, where tiles find no room beside those of Q, K, V and
 * dO: of q's dtype or float32, wherever its elements lie; lanes read those of their own scores from global memory, while products
 * are made. There a bias of -inf hides keys, where that is not arithmetic, as a mask tensor does.
 */
#pragma once

/* S -> x - base, and, with a soft cap, t. bases: of the 64 rows; NULL: 0. */
template <int WORDS>
static __device__ __forceinline__ void biased_scores(float (&x)[32], float (&s)[32], const uint32_t (&bias)[WORDS], const bwd_params &p,
                                                     const alibi_lane &alibi, const float *bases)
{
    if (p.in_caps > 0.0f) { cap_scores(s, p.in_caps); }
#pragma unroll
    for (int n = 0; n < 16; n++) {
        const float2 pair = bias_pair(bias, n);
        x[2 * n] = fmaf(s[2 * n], p.score_scale, pair.x);
        x[2 * n + 1] = fmaf(s[2 * n + 1], p.score_scale, pair.y);
    }
    if (p.common.problem.view[FGQA_ARG_alibi_slopes].data) {
#pragma unroll
        for (int n = 0; n < 32; n++) { x[n] = fmaf(-alibi.slope, fabsf(alibi.first + (float)(8 * (n / 4 - n / 2 % 2) + n % 2)), x[n]); }
    }
    if (bases) { lower_scores(x, bases); }
}

/* S -> pairs of P and of P (1 - t^2), which without a soft cap is P. */
template <int WORDS>
static __device__ __forceinline__ void biased_weights(uint32_t (&weights)[16], uint32_t (&sloped)[16], float (&s)[32], const uint32_t (&bias)[WORDS], const float4 (&lse2)[4],
                                                      const bwd_params &p, const alibi_lane &alibi, const float *bases)
{
    const bool capped = p.in_caps > 0.0f;
    float x[32];
    biased_scores(x, s, bias, p, alibi, bases);
#pragma unroll
    for (int n = 0; n < 32; n++) { x[n] = ex2(fmaf(x[n], (float)FGQA_LOG2E, -of_row(lse2, n / 4, n % 2))); }
#pragma unroll
    for (int n = 0; n < 16; n++) { sloped[n] = weights[n] = pack2(x[2 * n], x[2 * n + 1], T()); }
    if (capped) {
#pragma unroll
        for (int n = 0; n < 16; n++) { sloped[n] = pack2(x[2 * n] * FGQA_SOFTCAP_GRAD(s[2 * n], 1.0f), x[2 * n + 1] * FGQA_SOFTCAP_GRAD(s[2 * n + 1], 1.0f), T()); }
    }
}

#if FGQA_D == 256

/* Of the transposed scores of keys from j on and of 64 rows from row0 on: word 4 n + 2 half + e is that of register 4 n + 2
 * half + e. What does not exist has the element of the last row or key: nobody asks what comes of it. */
static __device__ __forceinline__ void load_bias_of_keys(uint32_t (&words)[32], const fgqa_problem &problem, int32_t b, int32_t head, int32_t row0,
                                                         int32_t j)
{
    const fgqa_view &bias = problem.view[FGQA_ARG_bias];
    const int32_t first = row0 + (int32_t)(thread_index() % 4) * 2, last = problem.sk - 1;
    const bool wide = bias.dtype == FGQA_F32;
    const int64_t bytes = wide ? 4 : 2, step = bias.stride_s * bytes;
    const char *const row = fgqa_row_address(bias, bytes, b, head, 0);
    const char *const from[2] = {row + min(j, last) * bias.stride_d * bytes, row + min(j + 8, last) * bias.stride_d * bytes};
#pragma unroll
    for (int n = 0; n < 16; n++) {
        const int64_t at = min(first + n / 2 * 8 + n % 2, problem.sq - 1) * step;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t &word = words[n / 2 * 4 + 2 * half + n % 2];
            if (wide) { word = load_b32(from[half] + at); } else { word = load_b16(from[half] + at); }
        }
    }
}

/* What a step will read -> L2. */
static __device__ __forceinline__ void prefetch_bias_of_keys(const fgqa_problem &problem, const task &t, int32_t head, int32_t row0, int thread)
{
    const fgqa_view &bias = problem.view[FGQA_ARG_bias];
    const int64_t bytes = bias.dtype == FGQA_F32 ? 4 : 2;
    const int32_t key = t.n * BLOCK_K + thread / 64 * 32;        /* a line of 128 bytes, or two */
    if (bias.stride_d == 1 && (bytes == 4 || thread < 64) && key < problem.sk) {
        prefetch_l2(fgqa_row_address(bias, bytes, t.b, head, min(row0 + thread % 64, problem.sq - 1)) + key * bytes);
    }
}

/* Raw words of q's dtype -> float32. */
static __device__ __forceinline__ void widen_words(uint32_t (&words)[32])
{
#pragma unroll
    for (int n = 0; n < 32; n++) { words[n] = __float_as_uint(unpack2(words[n], T()).x); }
}

/* Takes from `shown` what a bias of -inf hides. */
static __device__ __forceinline__ void hide_by_words(lane_bits &shown, const uint32_t (&words)[32], bool wide)
{
#pragma unroll
    for (int n = 0; n < 32; n++) {
        if (words[n] == (wide ? WIDE_HIDDEN : HIDDEN & 0xFFFFu)) { shown.bits &= ~(1u << (16 * (n % 2) + lane_bits::at(n / 4, n / 2 % 2))); }
    }
}

/* What a lane's two rows in bwd_queries.cuh add to scores. first: diag(i) of the first one, counted from the lane's first column. */
struct biased_rows { float lse2[2], base[2], slope, first; };

/* S, or with a soft cap t, -> P, or P (1 - t^2). x: the first words of the bias. MORE: there is a soft cap or ALiBi. WORDS: of
 * a pair of elements. */
template <bool MORE, int WORDS>
static __device__ __forceinline__ void biased_weights_of_rows(float (&s)[32], block_terms &x, const term_rows &at, const score_terms &terms, const bwd_params &p,
                                                              const biased_rows &rows, int32_t j0)
{
    constexpr int COUNT = TERM_WORDS / 2 / WORDS;
    const int32_t sk = p.common.problem.sk;
    const bool capped = p.in_caps > 0.0f;
#pragma unroll
    for (int n0 = 0; n0 < BLOCK_K / 8; n0 += COUNT) {
        if (n0 > 0) { load_bias<WORDS, COUNT, BLOCK_K>(x, at, terms, j0, n0, sk); }
        if (WORDS == 1 && has_vectors(terms, j0 + BLOCK_K, sk)) { share_vectors<COUNT>(x); }
#pragma unroll
        for (int n = 0; n < 2 * COUNT; n++) {
            const int r = n % 2;
            const uint32_t *const from = x.bias + WORDS * n;
            const float2 bias = WORDS == 2 ? make_float2(__uint_as_float(from[0]), __uint_as_float(from[WORDS - 1])) : unpack2(from[0], T());
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float &own = s[4 * (n0 + n / 2) + 2 * r + e];
                float score = fmaf(own, p.score_scale, e ? bias.y : bias.x);
                if (MORE) { score = fmaf(-rows.slope, fabsf(rows.first - (float)j0 + (float)(8 * r - 8 * (n0 + n / 2) - e)), score); }
                const float weight = ex2(fmaf(score - rows.base[r], (float)FGQA_LOG2E, -rows.lse2[r]));
                own = MORE && capped ? weight * FGQA_SOFTCAP_GRAD(own, 1.0f) : weight;
            }
        }
    }
}

/* Keys from j0 on that a bias of -inf hides from a lane's rows, i and the one 8 further, as block_terms.seen has those that
 * are seen. */
static __device__ __noinline__ uint2 hidden_by_bias(const bwd_params &p, int32_t b, int32_t h, int32_t i, int32_t j0)
{
    const fgqa_view &bias = p.common.problem.view[FGQA_ARG_bias];
    uint32_t hidden[2] = {};
    for (int n = 0; n < 32; n++) {
        const int32_t row = min(i + n / 2 % 2 * 8, p.common.problem.sq - 1), j = min(j0 + n / 4 * 8 + n % 2 + (int32_t)(thread_index() % 4) * 2, p.common.problem.sk - 1);
        const float x = load_float(bias.data, b * bias.stride_b + h * bias.stride_h + row * bias.stride_s + j * bias.stride_d, bias.dtype);
        if (x == -INFINITY) { hidden[n / 2 % 2] |= 1u << (n / 4 * 2 + n % 2); }
    }
    return make_uint2(hidden[0], hidden[1]);
}

/* dS of a lane's rows, i and the one 8 further, to dbias, which nobody shares. */
static __device__ __forceinline__ void store_dbias_of_rows(const bwd_params &p, const float (&s)[32], int32_t b, int32_t h, int32_t i, int32_t j0)
{
    const fgqa_view &view = p.common.problem.view[FGQA_ARG_dbias];
    const bool wide = view.dtype == FGQA_F32;
    const int32_t quarter = (int32_t)(thread_index() % 4), sk = p.common.problem.sk;
    char *const to = fgqa_row_address(view, wide ? 4 : 2, b, h, i);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        char *const row = to + 8 * r * view.stride_s * (wide ? 4 : 2);
        const int32_t end = i + 8 * r < p.common.problem.sq ? sk : 0;
        if (wide) {
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const int32_t column = j0 + 8 * n + 2 * quarter;
                const float2 pair = {s[4 * n + 2 * r] * p.dbias_scale, s[4 * n + 2 * r + 1] * p.dbias_scale};
                float *const at = (float *)row + column;
                if (p.vector_dbias && column + 1 < end) {
                    *(float2 *)at = pair;
                } else {
                    if (column < end) { at[0] = pair.x; }
                    if (column + 1 < end) { at[1] = pair.y; }
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const int32_t column = j0 + 32 * n + 8 * quarter;
                uint32_t x[4];
#pragma unroll
                for (int m = 0; m < 4; m++) { x[m] = pack2(s[16 * n + 4 * m + 2 * r] * p.dbias_scale, s[16 * n + 4 * m + 2 * r + 1] * p.dbias_scale, T()); }
                transpose_quad(x);
                if (column + 8 <= end) {
                    store_eight(row + column * 2, x, p.vector_dbias);
                } else {
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        if (column + e < end) { ((uint16_t *)row)[column + e] = (uint16_t)(x[e / 2] >> 16 * (e % 2)); }
                    }
                }
            }
        }
    }
}
#endif
