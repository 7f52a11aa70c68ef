/* mask_tile.cuh - csrc/core/semantics.h applied to the scores a lane holds: interval masks, the score chain, dropout.
 *
 * A tile of scores is s[N/8][4]: accumulators of m16 x n8 (fragments.cuh) side by side, 16 rows x N keys from key j0.
 * A lane holds two rows of it, r/2 = 0 and 1.
 */
#pragma once
#include <float.h>

#include "dropout.cuh"
#include "fragments.cuh"
#include "numeric.cuh"
#include "params.cuh"
#include "softcap.cuh"

/* What one query row of one head sees, and where its mask and bias lie. */
struct score_row {
    int32_t i;                  /* row of its sequence */
    int32_t begin, end;         /* keys seen by the interval mask; empty for padding rows */
    uint32_t batch_head;        /* batch * hq + head: the dropout counter */
    float slope;                /* ALiBi */
    const char *mask, *bias;    /* element (b, h, i, 0) */
};

static __device__ __forceinline__ fgqa_range row_range(const fgqa_mask &mask, int32_t i)
{
    fgqa_range r = {0, 0};
    if (i < mask.sq) { r.begin = fgqa_kv_begin(&mask, i); r.end = fgqa_kv_end(&mask, i); }
    return r;
}

/* i may be past the last row (tile padding): then nothing is seen and nothing is read. */
static __device__ __forceinline__ score_row score_row_make(const fgqa_params &params, const fgqa_mask &mask, int32_t b, int32_t h, int32_t i)
{
    const fgqa_problem &p = params.problem;
    const fgqa_range range = row_range(mask, i);
    score_row row = {i, range.begin, range.end, (uint32_t)b * (uint32_t)p.hq + (uint32_t)h, 0.0f, NULL, NULL};
    const fgqa_view &slopes = p.view[FGQA_ARG_alibi_slopes], &m = p.view[FGQA_ARG_mask], &bias = p.view[FGQA_ARG_bias];
    if (slopes.data) { row.slope = load_float(slopes.data, b * slopes.stride_b + h * slopes.stride_h, slopes.dtype); }
    if (m.data) { row.mask = fgqa_row_address(m, 1, b, h, i); }
    if (bias.data) { row.bias = fgqa_row_address(bias, bias.dtype == FGQA_F64 ? 8 : bias.dtype == FGQA_F32 ? 4 : 2, b, h, i); }
    return row;
}

/* cap * tanh(x / cap) */
static __device__ __forceinline__ float softcap_score(const fgqa_params &params, float x)
{
    return params.softcap * tanh_score(x * params.inv_softcap);
}

/* q.k of key j -> score in natural units, -inf where the row does not see the key. A finite score never becomes -inf: a row
 * whose keys all carry the lowest float as bias is uniform, as it is in the plain formula. NaN stays NaN. */
static __device__ __forceinline__ float score_chain(const fgqa_params &params, int32_t diag, const score_row &row, int32_t j, float qk)
{
    const fgqa_problem &p = params.problem;
    if (j < row.begin || j >= row.end) { return -INFINITY; }
    if (row.mask && !row.mask[j * p.view[FGQA_ARG_mask].stride_d]) { return -INFINITY; }
    float x = qk * params.scale;
    if (params.softcap > 0.0f) { x = softcap_score(params, x); }
    if (row.bias) {
        const float bias = load_float(row.bias, j * p.view[FGQA_ARG_bias].stride_d, p.view[FGQA_ARG_bias].dtype);
        if (bias == -INFINITY) { return -INFINITY; }
        x += bias;
    }
    if (p.view[FGQA_ARG_alibi_slopes].data) {
        x += FGQA_ALIBI(row.slope, fabsf((float)((int64_t)row.i + diag - j)));
    }
    return x < -FLT_MAX ? -FLT_MAX : x;
}

/* Interval mask only: scores keep their units. */
template <int NB>
static __device__ __forceinline__ void mask_tile(float (&s)[NB][4], const fgqa_range (&seen)[2], int32_t j0, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int32_t first = seen[half].begin - j0 - fragment_column(lane, 0);
        const uint32_t count = (uint32_t)(seen[half].end - seen[half].begin);
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                if ((uint32_t)(8 * n + e - first) >= count) { s[n][2 * half + e] = -INFINITY; }
            }
        }
    }
}

/* The whole chain; scores come out in natural units. */
template <int NB>
static __device__ __forceinline__ void score_tile(const fgqa_params &params, int32_t diag, float (&s)[NB][4], const score_row (&rows)[2], int32_t j0, int lane)
{
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            s[n][r] = score_chain(params, diag, rows[r / 2], j0 + 8 * n + fragment_column(lane, r), s[n][r]);
        }
    }
}

/* word w of block n for this lane's own position in the quad: 4x4 transpose among four lanes */
static __device__ __forceinline__ uint32_t quad_pick(const fgqa_philox_block &mine, int from, int lane)
{
    uint32_t word = 0;
#pragma unroll
    for (int w = 0; w < 4; w++) {
        const uint32_t x = __shfl_sync(0xFFFFFFFFu, mine.x[w], from, 4);
        if (w == lane % 4) { word = x; }
    }
    return word;
}

/* Zeroes dropped weights; survivors are scaled by params.dropout_scale at the end, with the row sum. One Philox block
 * decides the 8 keys of one row of an n8 accumulator, and a lane needs one of its four words: lane t of the four computes the
 * blocks n = t, t + 4, ..., and passes words around. j0 is a multiple of 8. */
template <int NB>
static __device__ __forceinline__ void dropout_tile(const dropout_key &key, float (&p)[NB][4], const score_row (&rows)[2], int32_t j0, int lane)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int n0 = 0; n0 < NB; n0 += 4) {
            const fgqa_philox_block mine = fgqa_dropout_bits(key.seed, key.offset, (uint32_t)j0 / 8 + n0 + lane % 4,
                                                             (uint32_t)rows[half].i, rows[half].batch_head);
#pragma unroll
            for (int n = n0; n < n0 + 4 && n < NB; n++) {
                const uint32_t word = quad_pick(mine, n - n0, lane);
                if (!fgqa_dropout_keeps(word & 0xFFFFu, key.threshold)) { p[n][2 * half] = 0.0f; }
                if (!fgqa_dropout_keeps(word >> 16, key.threshold)) { p[n][2 * half + 1] = 0.0f; }
            }
        }
    }
}
