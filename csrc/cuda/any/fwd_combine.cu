/* fwd_combine.cu - merges the parts of a forward pass that was split over keys (common/split.cuh).
 *
 *     M = max over parts of top,  w = 2^((top - M) log2(e) + log_sum),  out = sum w o / (sum w + e^(sink - M)),
 *     LSE = M + ln(that sum)
 *
 * One warp a row; parts are added in their order. A part that saw no key has top -inf and weight 0, and its o is not read.
 */
#include "../common/launch.cuh"
#include "../common/split.cuh"
#include "fwd_combine.h"

static constexpr int ROWS = 4;

static __device__ __forceinline__ void store_element(char *row, int64_t index, float x, fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F16: from_float((f16 *)row + index, x); break;
    case FGQA_BF16: from_float((bf16 *)row + index, x); break;
    default: from_float((f32 *)row + index, x); break;
    }
}

extern "C" __global__ void __launch_bounds__(32 * ROWS)
fgqa_fwd_combine_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_split split)
{
    const fgqa_problem &p = params.problem;
    const int lane = threadIdx.x % 32;
    const uint32_t pair = blockIdx.x / split.blocks;
    const int32_t b = split.first_b + (int32_t)(pair / (uint32_t)p.hk), kv_head = (int32_t)(pair % (uint32_t)p.hk);
    int32_t row_count;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &row_count);
    const int64_t packed = (int64_t)row_count * p.g;
    for (int64_t r = (int64_t)(blockIdx.x % split.blocks) * ROWS + threadIdx.x / 32; r < packed; r += (int64_t)split.blocks * ROWS) {
        const int32_t i = fgqa_packed_row_q(r, p.g), h = fgqa_packed_row_head(r, kv_head, p.g);
        const int64_t row = split_row(p, b, h, sequence.q_row, i);
        const float sink = sink_logit(p, b, h, i >= sequence.mask.sq);
        float top = sink;
        bool nan = sink != sink;
        for (uint32_t part = 0; part < split.splits; part++) {
            const float2 lse = ((const float2 *)split.lse)[part * split.rows + row];
            top = fmaxf(top, lse.x);
            nan |= lse.x != lse.x || lse.y != lse.y;
        }
        const float base = top == -INFINITY ? 0.0f : top;
        float sum = expf(sink - base), o[8] = {};
        for (uint32_t part = 0; part < split.splits; part++) {
            const float2 lse = ((const float2 *)split.lse)[part * split.rows + row];
            if (lse.x == -INFINITY) { continue; }
            const float weight = exp2f(fmaf(lse.x - base, (float)FGQA_LOG2E, lse.y));
            const float *from = split.o + (part * split.rows + row) * p.dv;
            sum += weight;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                if (32 * c + lane < p.dv) { o[c] = fmaf(weight, from[32 * c + lane], o[c]); }
            }
        }
        const float scale = nan ? NAN : sum == 0.0f ? 0.0f : 1.0f / sum;
        char *out = fgqa_row_address(p.view[FGQA_ARG_out], p.dtype == FGQA_F32 ? 4 : 2, b, h, sequence.q_row + i);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            if (32 * c + lane < p.dv) { store_element(out, 32 * c + lane, o[c] * scale, p.dtype); }
        }
        if (lane == 0) { store_lse(p, b, h, sequence.q_row + i, nan ? NAN : sum == 0.0f ? -INFINITY : base + logf(sum)); }
    }
}

extern "C" int fgqa_fwd_combine(const fgqa_problem *problem, void *workspace, uint32_t splits, const fgqa_exec *exec)
{
    const fgqa_params params = fgqa_params_make(problem);
    fgqa_split split;
    fgqa_split_workspace(problem, splits, workspace, &split);
    const int64_t rows = (int64_t)problem->sq * problem->g, most = INT32_MAX / problem->hk;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    split.blocks = (uint32_t)(blocks < most ? blocks : most);
    const int64_t at_once = most / split.blocks;
    for (int64_t b = 0; b < problem->b; b += at_once) {
        const int64_t count = problem->b - b < at_once ? problem->b - b : at_once;
        split.first_b = (int32_t)b;
        const cudaError_t error = launch_kernel(fgqa_fwd_combine_kernel, (uint32_t)(count * problem->hk * split.blocks), 32 * ROWS, 0, exec->stream, params, split);
        if (error != cudaSuccess) { return error; }
    }
    return cudaSuccess;
}
