/* bwd_dsink.cu - gradient of the sink logits: the sink is one more key with value 0. After the main kernel, from
 * the statistics of rows in whatever form its row has them.
 *
 *     dsink[h] = - sum over b, i of P(sink) delta          (P as in bwd_workspace.h; delta has dLSE in it)
 *
 * One block a head: every thread sums its rows in order, then the threads in a fixed tree.
 */
#include "../common/launch.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "bwd_workspace.h"

static constexpr int THREADS = 512;

static __device__ __noinline__ bool out_is_zero(const fgqa_problem &p, int32_t b, int32_t h, int64_t row)
{
    const fgqa_view &out = p.view[FGQA_ARG_out];
    int32_t c = 0;
    while (c < p.dv && load_float(out.data, b * out.stride_b + h * out.stride_h + row * out.stride_s + c * out.stride_d, out.dtype) == 0.0f) { c++; }
    return c == p.dv;
}

/* Where all of O is 0, as in a row that sees no key, dO does not matter, not even NaN. */
static __device__ __forceinline__ float sink_delta(const fgqa_problem &p, int32_t b, int32_t h, int64_t row, float delta)
{
    if (!isnan(delta) || !out_is_zero(p, b, h, row)) { return delta; }
    const fgqa_view &dlse = p.view[FGQA_ARG_dlse];
    return dlse.data ? -*(const float *)fgqa_row_address(dlse, sizeof(float), b, h, row) : 0.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS)
fgqa_bwd_dsink_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w)
{
    __shared__ float sums[THREADS];
    const fgqa_problem &p = params.problem;
    const fgqa_view &sink = p.view[FGQA_ARG_sink], &dsink = p.view[FGQA_ARG_dsink];
    const int32_t h = (int32_t)blockIdx.x;
    const float logit = load_float(sink.data, h * sink.stride_h, sink.dtype);
    float sum = 0.0f;
    for (int32_t b = 0; b < p.b; b++) {
        int32_t rows;
        const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
        for (int32_t i = threadIdx.x; i < sequence.mask.sq; i += THREADS) {
            const int64_t row = bwd_q_row(p, b, h, sequence.q_row, i);
            if (w.stats_kind == FGQA_BWD_GENERAL) {
                const general_stats stats = ((const general_stats *)w.stats)[row];
                sum -= ex2(fmaf(FGQA_SINK_EXPONENT(logit, stats.top), (float)FGQA_LOG2E, -stats.log_sum)) * sink_delta(p, b, h, sequence.q_row + i, stats.delta);
            } else {
                plain_stats stats;
                if (w.stats_kind == FGQA_BWD_TILED) {
                    const float *tiled = bwd_tiled_stats(w, bwd_q_tile(p, w, b, h, sequence.q_row, i / w.block_q), i);
                    stats.lse2 = tiled[0];
                    stats.delta = tiled[w.block_q];
                } else {
                    stats = ((const plain_stats *)w.stats)[row];
                }
                const float logit2 = logit * (float)FGQA_LOG2E;      /* FGQA_SINK_EXPONENT(logit2, lse2) in one rounding */
                sum -= ex2(logit2 == stats.lse2 ? 0.0f : fmaf(logit, (float)FGQA_LOG2E, -stats.lse2)) * sink_delta(p, b, h, sequence.q_row + i, stats.delta);
            }
        }
    }
    sums[threadIdx.x] = sum;
    for (int step = THREADS / 2; step > 0; step /= 2) {
        __syncthreads();
        if (threadIdx.x < step) { sums[threadIdx.x] += sums[threadIdx.x + step]; }
    }
    if (threadIdx.x == 0) { store_float(dsink.data, h * dsink.stride_h, sums[0], dsink.dtype); }
}

extern "C" int fgqa_bwd_dsink(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    if (problem->hq == 0) { return cudaSuccess; }
    return launch_kernel(fgqa_bwd_dsink_kernel, (uint32_t)problem->hq, THREADS, 0, stream, params, *w);
}
