/* merge.cu - partial results over disjoint keys become one:
 *
 *     lse = log sum_n exp(lse_n),   out = sum_n out_n * exp(lse_n - lse)
 *
 * One warp a row; lane n weighs part n, and parts are added in their order. A part that saw nothing (lse -inf) has weight 0 and
 * is not read.
 */
#include "merge.h"

#include "../common/launch.cuh"
#include "../common/numeric.cuh"

static constexpr int ROWS = 8;
static constexpr uint32_t ALL = 0xFFFFFFFFu;

static __global__ void __launch_bounds__(32 * ROWS) merge_kernel(const __grid_constant__ fgqa_merge_parts parts)
{
    const int lane = threadIdx.x % 32;
    const int64_t rows = parts.b * parts.h * parts.s;
    for (int64_t row = (int64_t)blockIdx.x * ROWS + threadIdx.x / 32; row < rows; row += (int64_t)gridDim.x * ROWS) {
        const int64_t s = row % parts.s, h = row / parts.s % parts.h, b = row / parts.s / parts.h;
        float lse = -INFINITY;
        if (lane < parts.n) {
            const fgqa_view &view = parts.lses[lane];
            lse = ((const float *)view.data)[b * view.stride_b + h * view.stride_h + s * view.stride_s];
        }
        float top = lse;
#pragma unroll
        for (int step = 16; step > 0; step /= 2) { top = fmaxf(top, __shfl_xor_sync(ALL, top, step)); }
        if (__any_sync(ALL, lse != lse)) { top = NAN; }
        const float weight = top == -INFINITY ? 0.0f : expf(FGQA_SINK_EXPONENT(lse, top));
        float total = 0.0f;
        for (int n = 0; n < parts.n; n++) { total += __shfl_sync(ALL, weight, n); }
        for (int column = lane; column - lane < parts.dv; column += 32) {
            float sum = 0.0f;
            for (int n = 0; n < parts.n; n++) {
                const float share = __shfl_sync(ALL, weight, n);
                const fgqa_view &view = parts.outs[n];
                if (share != 0.0f && column < parts.dv) {
                    const int64_t at = b * view.stride_b + h * view.stride_h + s * view.stride_s + column * view.stride_d;
                    sum = fmaf(share, load_float(view.data, at, view.dtype), sum);
                }
            }
            if (column < parts.dv) {
                const fgqa_view &view = parts.out;
                const int64_t at = b * view.stride_b + h * view.stride_h + s * view.stride_s + column * view.stride_d;
                store_result(view.data, at, total == 0.0f ? 0.0f : sum / total, view.dtype);
            }
        }
        if (lane == 0) {
            const fgqa_view &view = parts.lse;
            ((float *)view.data)[b * view.stride_b + h * view.stride_h + s * view.stride_s] = total == 0.0f ? -INFINITY : top + logf(total);
        }
    }
}

extern "C" int fgqa_merge_launch(const fgqa_merge_parts *parts, void *stream)
{
    const int64_t blocks = (parts->b * parts->h * parts->s + ROWS - 1) / ROWS;
    if (blocks == 0) { return cudaSuccess; }
    return launch_kernel(merge_kernel, (uint32_t)(blocks < 1 << 20 ? blocks : 1 << 20), 32 * ROWS, 0, stream, *parts);
}
