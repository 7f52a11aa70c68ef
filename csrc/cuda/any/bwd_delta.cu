/* bwd_delta.cu - before the main backward kernel: statistics of every query row, and an initialised workspace.
 *
 *     delta = rowsum(dO O) - dLSE      stats = {lse log2(e), delta}; {+inf, 0} for a row that sees nothing, so that P = dS = 0
 *
 * Also writes the gradients that no key tile will: dQ of padding rows and of query tiles without a visible score, and dQ, dK
 * and dV of rows of packed tensors that belong to no sequence. A half warp a row; a block takes 64 rows of one head at a time.
 */
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "bwd_workspace.h"

static constexpr int THREADS = 256, ROWS = 64, HALF = 16, AT_ONCE = THREADS / HALF;

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

template <typename T> __global__ void __launch_bounds__(THREADS)
bwd_delta_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, int64_t blocks_a_head)
{
    const fgqa_problem &p = params.problem;
    const int part = threadIdx.x % HALF;
    for (int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x; n < w.q_tiles; n += (int64_t)gridDim.x * THREADS) { w.turn[n] = 0; }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        int32_t longest = p.sk;
        if (p.varlen) {
            longest = 0;
            for (int32_t b = 0; b < p.b; b++) {
                int32_t rows;
                longest = max(longest, fgqa_device_sequence(p, b, &rows).mask.sk);
            }
        }
        w.control->ticket = 0;
        w.control->key_tiles = ((int64_t)longest + w.block_k - 1) / w.block_k;
    }
    if (p.varlen) {
        const int64_t used_q = max((int64_t)0, min(p.total_q, (int64_t)p.cu_seqlens_q[p.b])), used_k = max((int64_t)0, min(p.total_k, (int64_t)p.cu_seqlens_kv[p.b]));
        zero_tail<T>(p.view[FGQA_ARG_dq], p.hq, used_q, p.total_q, p.d);
        zero_tail<T>(p.view[FGQA_ARG_dk], p.hk, used_k, p.total_k, p.d);
        zero_tail<T>(p.view[FGQA_ARG_dv], p.hk, used_k, p.total_k, p.dv);
    }
    for (int64_t block = blockIdx.x; block < (int64_t)p.b * p.hq * blocks_a_head; block += gridDim.x) {
        const int32_t b = (int32_t)(block / blocks_a_head / p.hq), h = (int32_t)(block / blocks_a_head % p.hq);
        int32_t rows;
        const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
        const fgqa_mask &mask = sequence.mask;
        /* a packed sequence may be longer than max_q said: the last block goes on */
        const int64_t first = block % blocks_a_head * ROWS, end = block % blocks_a_head == blocks_a_head - 1 ? rows : min((int64_t)rows, first + ROWS);
        for (int64_t i = first + threadIdx.x / HALF; i < first + (end - first + AT_ONCE - 1) / AT_ONCE * AT_ONCE; i += AT_ONCE) {
            const bool real = i < end && i < mask.sq;
            const int64_t row = sequence.q_row + i;
            float delta = 0.0f, lse = -INFINITY;
            if (real) {
                const char *out = fgqa_row_address(p.view[FGQA_ARG_out], sizeof(T), b, h, row), *dout = fgqa_row_address(p.view[FGQA_ARG_dout], sizeof(T), b, h, row);
#pragma unroll 2
                for (int column = 8 * part; column < p.dv; column += 8 * HALF) {
                    float x[8], y[8];
                    load_eight<T>(x, out, column, p.dv, params.vector_out);
                    load_eight<T>(y, dout, column, p.dv, params.vector_dout);
#pragma unroll
                    for (int n = 0; n < 8; n++) { delta = fmaf(x[n], y[n], delta); }
                }
                lse = *(const float *)fgqa_row_address(p.view[FGQA_ARG_lse], sizeof(float), b, h, row);
            }
#pragma unroll
            for (int step = HALF / 2; step > 0; step /= 2) { delta += __shfl_xor_sync(0xFFFFFFFFu, delta, step); }
            if (i >= end) { continue; }
            if (part == 0) {
                if (p.view[FGQA_ARG_dlse].data && real) { delta -= *(const float *)fgqa_row_address(p.view[FGQA_ARG_dlse], sizeof(float), b, h, row); }
                const bool empty = lse == -INFINITY;
                ((float2 *)w.stats)[bwd_q_row(p, b, h, sequence.q_row, (int32_t)i)] = make_float2(empty ? INFINITY : lse * (float)FGQA_LOG2E, empty ? 0.0f : delta);
            }
            const int32_t i0 = (int32_t)(i / w.block_q * w.block_q);
            bool unreached = !real;
            if (real) {
                const fgqa_range order = bwd_key_tiles(mask, w.block_k, i0, min(mask.sq, i0 + w.block_q));
                unreached = order.begin == order.end;
            }
            if (unreached) { zero_row<T>(fgqa_row_address(p.view[FGQA_ARG_dq], sizeof(T), b, h, row), p.d, part); }
        }
    }
}

extern "C" int fgqa_bwd_delta(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t blocks_a_head = problem->sq > 0 ? ((int64_t)problem->sq + ROWS - 1) / ROWS : 1;
    const int64_t blocks = (int64_t)problem->b * problem->hq * blocks_a_head;
    const uint32_t grid = (uint32_t)(blocks < 1 ? 1 : blocks < 1 << 30 ? blocks : 1 << 30);
    if (problem->dtype == FGQA_BF16) {
        bwd_delta_kernel<bf16><<<grid, THREADS, 0, (cudaStream_t)stream>>>(params, *w, blocks_a_head);
    } else if (problem->dtype == FGQA_F16) {
        bwd_delta_kernel<f16><<<grid, THREADS, 0, (cudaStream_t)stream>>>(params, *w, blocks_a_head);
    } else {
        bwd_delta_kernel<f32><<<grid, THREADS, 0, (cudaStream_t)stream>>>(params, *w, blocks_a_head);
    }
    return cudaGetLastError();
}
