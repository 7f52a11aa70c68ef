/* bwd_rows.cuh - what the kernels before a main backward kernel do to rows, half a warp a row. */
#pragma once
#include <float.h>

#include "../common/mask_tensor.cuh"
#include "../common/mask_tile.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "bwd_workspace.h"

static constexpr int THREADS = 256, HALF = 16, AT_ONCE = THREADS / HALF;

/* Eight elements from `column` on, as float32; zero from d on. */
template <typename T> static __device__ __forceinline__ void load_eight(float (&x)[8], const char *row, int column, int d, bool vector)
{
    const T *from = (const T *)row + column;
    if (vector && column + 8 <= d) {
        alignas(16) T raw[8];
#pragma unroll
        for (int n = 0; n < (int)sizeof(T) / 2; n++) { ((uint4 *)raw)[n] = ((const uint4 *)from)[n]; }
#pragma unroll
        for (int n = 0; n < 8; n++) { x[n] = to_float(raw[n]); }
    } else {
#pragma unroll
        for (int n = 0; n < 8; n++) { x[n] = column + n < d ? to_float(from[n]) : 0.0f; }
    }
}

/* Whether this lane's share of a row is inf or NaN somewhere. */
template <typename T> static __device__ __forceinline__ bool row_poisoned(const char *row, int d, int part, bool vector)
{
    float sum = 0.0f;
    for (int column = 8 * part; column < d; column += 8 * HALF) {
        float x[8];
        load_eight<T>(x, row, column, d, vector);
#pragma unroll
        for (int n = 0; n < 8; n++) { sum = fmaf(x[n], 0.0f, sum); }
    }
    return sum != 0.0f;
}

template <typename T> static __device__ __forceinline__ void zero_row(char *row, int d, int part)
{
    for (int column = part; column < d; column += HALF) { from_float((T *)row + column, 0.0f); }
}

/* Rows [first, total) of a packed gradient. */
template <typename T> static __device__ void zero_tail(const fgqa_view &view, int32_t heads, int64_t first, int64_t total, int d)
{
    const int64_t half = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / HALF, halves = (int64_t)gridDim.x * THREADS / HALF;
    for (int64_t n = half; n < (total - first) * heads; n += halves) {
        zero_row<T>(fgqa_row_address(view, sizeof(T), 0, n % heads, first + n / heads), d, threadIdx.x % HALF);
    }
}

/* Of packed gradients, rows that belong to no sequence. */
template <typename T> static __device__ __forceinline__ void zero_tails(const fgqa_problem &p)
{
    const int64_t used_q = max((int64_t)0, min(p.total_q, (int64_t)p.cu_seqlens_q[p.b])), used_k = max((int64_t)0, min(p.total_k, (int64_t)p.cu_seqlens_kv[p.b]));
    zero_tail<T>(p.view[FGQA_ARG_dq], p.hq, used_q, p.total_q, p.d);
    zero_tail<T>(p.view[FGQA_ARG_dk], p.hk, used_k, p.total_k, p.d);
    zero_tail<T>(p.view[FGQA_ARG_dv], p.hk, used_k, p.total_k, p.dv);
}

/* ---- rows whose LSE is large ---- */

static __device__ __forceinline__ bool is_large(float lse, float most) { return fabsf(lse) > most && fabsf(lse) < INFINITY; }

static __device__ __forceinline__ float half_warp_sum(float x)
{
#pragma unroll
    for (int step = HALF / 2; step > 0; step /= 2) { x += __shfl_xor_sync(0xFFFFu << (threadIdx.x & 16), x, step); }
    return x;
}

/* A row's largest score and log2 of the sum of its weights, the sink among them. */
struct row_sum { float top, log_sum; };

/* From the scores of its keys, score(j, q.k), from which `base` has been taken. Weights are 2^(unit score). */
template <typename T, typename SCORE>
static __device__ __forceinline__ row_sum sum_row(const fgqa_params &params, const fgqa_sequence &sequence, int32_t b, int32_t h, int32_t i, fgqa_range seen, float unit,
                                                  float base, const SCORE &score)
{
    const fgqa_problem &p = params.problem;
    const int part = threadIdx.x % HALF;
    const T *q = (const T *)fgqa_row_address(p.view[FGQA_ARG_q], sizeof(T), b, h, sequence.q_row + i);
    const fgqa_view &sink = p.view[FGQA_ARG_sink];
    float top = -INFINITY, sum = 0.0f;
    for (int32_t j = seen.begin + part; j < seen.end; j += HALF) {
        const T *k = (const T *)fgqa_row_address(p.view[FGQA_ARG_k], sizeof(T), b, fgqa_kv_head(h, p.g), sequence.k_row + j);
        float qk = 0.0f;
        for (int column = 0; column < p.d; column++) { qk = fmaf(to_float(q[column]), to_float(k[column]), qk); }
        const float x = score(j, qk);
        if (x == -INFINITY) { continue; }
        const float larger = fmaxf(top, x);
        sum = sum * ex2((top - larger) * unit) + ex2((x - larger) * unit);
        top = larger;
    }
    if (sink.data && part == 0) {
        const float logit = load_float(sink.data, h * sink.stride_h, sink.dtype) * ((float)FGQA_LOG2E / unit) - base, larger = fmaxf(top, logit);
        if (larger > -INFINITY) {
            sum = sum * ex2((top - larger) * unit) + ex2(FGQA_SINK_EXPONENT(logit, larger) * unit);
            top = larger;
        }
    }
    float most = top;
#pragma unroll
    for (int step = HALF / 2; step > 0; step /= 2) { most = fmaxf(most, __shfl_xor_sync(0xFFFFu << (threadIdx.x & 16), most, step)); }
    sum = half_warp_sum(top == -INFINITY ? 0.0f : sum * ex2((top - most) * unit));
    return {most, log2f(sum)};
}

/* Whether the keys of an own sum are all that a given one was made of, but for so many epsilons: that of more keys (a part of
 * a split) says more than these can. */
static __device__ __forceinline__ bool all_of(float given, float own, float epsilons) { return fabsf(own - given) <= epsilons * FLT_EPSILON * fabsf(given); }
