/* bwd_reduce.cu - dK and dV as the sum of the parts that different blocks made of them, in the order of the parts
 * (dk, dv of bwd_workspace.h). */
#include "../common/launch.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "bwd_plan.h"

static constexpr int THREADS = 256, COLUMNS = 4;                 /* of a thread, of a row */

/* One row of four columns a thread; parts: [splits][k_rows][width], rows are ((b * hk) + kv_head) * sk + j, or kv_head *
 * total_k + row. */
template <typename T> static __device__ __forceinline__ void reduce(const fgqa_problem &p, const fgqa_bwd_workspace &w, const float *parts, int width, int d, const fgqa_view &view, bool vector)
{
    const int threads_a_row = width / COLUMNS, rows_at_once = THREADS / threads_a_row, column = (int)threadIdx.x % threads_a_row * COLUMNS;
    const int64_t rows_a_head = p.varlen ? p.total_k : p.sk;
    for (int64_t row = (int64_t)blockIdx.x * rows_at_once + (int)threadIdx.x / threads_a_row; row < w.k_rows; row += (int64_t)gridDim.x * rows_at_once) {
        const int64_t pair = row / rows_a_head, j = row - pair * rows_a_head;
        if (column >= d || (p.varlen && j >= p.cu_seqlens_kv[p.b])) { continue; }
        float4 part[FGQA_BWD_MAX_SPLITS];
#pragma unroll
        for (int n = 0; n < FGQA_BWD_MAX_SPLITS; n++) {
            if (n < w.splits) { part[n] = *(const float4 *)(parts + (n * w.k_rows + row) * width + column); }
        }
        float sum[COLUMNS] = {};
#pragma unroll
        for (int n = 0; n < FGQA_BWD_MAX_SPLITS; n++) {
            if (n < w.splits) {
                sum[0] += part[n].x;
                sum[1] += part[n].y;
                sum[2] += part[n].z;
                sum[3] += part[n].w;
            }
        }
        T *const to = (T *)fgqa_row_address(view, sizeof(T), p.varlen ? 0 : pair / p.hk, p.varlen ? pair : pair % p.hk, j) + column;
        alignas(16) T rounded[COLUMNS];
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) { from_float(rounded + n, sum[n]); }
        if (vector && column + COLUMNS <= d) {
            if (sizeof(T) == 2) { *(uint2 *)to = *(const uint2 *)rounded; } else { *(uint4 *)to = *(const uint4 *)rounded; }
            continue;
        }
#pragma unroll
        for (int n = 0; n < COLUMNS; n++) {
            if (column + n < d) { to[n] = rounded[n]; }
        }
    }
}

template <typename T> __global__ void __launch_bounds__(THREADS)
bwd_reduce_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, int dk_width, int dv_width, bool vector_dk, bool vector_dv)
{
    const fgqa_problem &p = params.problem;
    reduce<T>(p, w, w.dk, dk_width, p.d, p.view[FGQA_ARG_dk], vector_dk);
    reduce<T>(p, w, w.dv, dv_width, p.dv, p.view[FGQA_ARG_dv], vector_dv);
}

extern "C" int fgqa_bwd_reduce(const fgqa_problem *problem, const fgqa_bwd_workspace *w, int32_t dk_width, int32_t dv_width, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t rows_at_once = THREADS * COLUMNS / (dk_width > dv_width ? dk_width : dv_width), blocks = (w->k_rows + rows_at_once - 1) / rows_at_once;
    const uint32_t grid = (uint32_t)(blocks < 1 ? 1 : blocks < 16384 ? blocks : 16384);
    const auto kernel = problem->dtype == FGQA_BF16 ? bwd_reduce_kernel<bf16> : problem->dtype == FGQA_F16 ? bwd_reduce_kernel<f16> : bwd_reduce_kernel<f32>;
    const bool vector_dk = fgqa_view_is_vector(problem, FGQA_ARG_dk) != 0, vector_dv = fgqa_view_is_vector(problem, FGQA_ARG_dv) != 0;
    return launch_kernel(kernel, grid, THREADS, 0, stream, params, *w, dk_width, dv_width, vector_dk, vector_dv);
}
