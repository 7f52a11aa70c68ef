/* bwd_rows.cuh - what the kernels before a main backward kernel do to rows, half a warp a row. */
#pragma once
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
