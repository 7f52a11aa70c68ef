/* bwd_reduce.cu - dK and dV as the sum of the parts that different blocks made of them, in the order of the parts
 * (dk, dv of bwd_workspace.h). */
#include "../common/launch.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "bwd_workspace.h"

static constexpr int THREADS = 256;

/* parts: [splits][k_rows][width]. One thread an element; rows are ((b * hk) + kv_head) * sk + j, or kv_head * total_k + row. */
template <typename T> static __device__ void reduce(const fgqa_problem &p, const fgqa_bwd_workspace &w, const float *parts, int width, int d, const fgqa_view &view)
{
    const int64_t stride = (int64_t)gridDim.x * THREADS, rows_a_head = p.varlen ? p.total_k : p.sk;
    for (int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x; n < w.k_rows * d; n += stride) {
        const int64_t row = n / d, column = n % d, pair = row / rows_a_head, j = row % rows_a_head;
        if (p.varlen && j >= p.cu_seqlens_kv[p.b]) { continue; }
        float sum = 0.0f;
        for (int part = 0; part < w.splits; part++) { sum += parts[(part * w.k_rows + row) * width + column]; }
        from_float((T *)fgqa_row_address(view, sizeof(T), p.varlen ? 0 : pair / p.hk, p.varlen ? pair : pair % p.hk, j) + column, sum);
    }
}

template <typename T> __global__ void __launch_bounds__(THREADS)
bwd_reduce_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, int dk_width, int dv_width)
{
    const fgqa_problem &p = params.problem;
    reduce<T>(p, w, w.dk, dk_width, p.d, p.view[FGQA_ARG_dk]);
    reduce<T>(p, w, w.dv, dv_width, p.dv, p.view[FGQA_ARG_dv]);
}

extern "C" int fgqa_bwd_reduce(const fgqa_problem *problem, const fgqa_bwd_workspace *w, int32_t dk_width, int32_t dv_width, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t blocks = (w->k_rows * problem->d + THREADS - 1) / THREADS;
    const uint32_t grid = (uint32_t)(blocks < 1 ? 1 : blocks < 16384 ? blocks : 16384);
    const auto kernel = problem->dtype == FGQA_BF16 ? bwd_reduce_kernel<bf16> : problem->dtype == FGQA_F16 ? bwd_reduce_kernel<f16> : bwd_reduce_kernel<f32>;
    return launch_kernel(kernel, grid, THREADS, 0, stream, params, *w, dk_width, dv_width);
}
