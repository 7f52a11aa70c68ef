/* fwd_combine.cu - merges the parts of a forward pass that was split over keys (common/split.cuh).
 *
 *     M = max over parts of top,  w = 2^((top - M) log2(e) + log_sum),  out = sum w o / (sum w + e^(sink - M)),
 *     LSE = M + ln(that sum)
 *
 * One warp a row; parts are added in their order. A part that saw no key has top -inf and weight 0, and its o is not read. All
 * wait for this kernel: what it takes are the trips to L2, one for the ends of all parts and one for every AT_ONCE of their o.
 */
#include "../common/launch.cuh"
#include "../common/split.cuh"
#include "fwd_combine.h"

static constexpr int ROWS = 4, AT_ONCE = 4;
static constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

/* From element `index` of a row on, a multiple of WIDTH. vector: rows start on 16 bytes. */
template <int WIDTH> static __device__ __forceinline__ void store_elements(char *row, int index, const float (&x)[WIDTH], fgqa_dtype dtype, bool vector)
{
    if constexpr (WIDTH == 4) {
        if (vector && dtype == FGQA_F32) {
            *(float4 *)(row + 4 * index) = make_float4(x[0], x[1], x[2], x[3]);
            return;
        }
        if (vector) {
            *(uint2 *)(row + 2 * index) = dtype == FGQA_F16 ? make_uint2(pack2(x[0], x[1], f16()), pack2(x[2], x[3], f16()))
                                                            : make_uint2(pack2(x[0], x[1], bf16()), pack2(x[2], x[3], bf16()));
            return;
        }
    }
#pragma unroll
    for (int e = 0; e < WIDTH; e++) { store_result(row, index + e, x[e], dtype); }
}

/* A lane has CHUNKS times WIDTH elements side by side; dv is a multiple of WIDTH. */
template <int WIDTH, int CHUNKS> static __global__ void __launch_bounds__(32 * ROWS)
fgqa_fwd_combine_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_split split)
{
    constexpr int ENDS = FGQA_MAX_SPLITS / 32;
    const fgqa_problem &p = params.problem;
    const int lane = threadIdx.x % 32, splits = (int)split.splits;
    const uint32_t pair = blockIdx.x / split.blocks;
    const int32_t b = split.first_b + (int32_t)(pair / (uint32_t)p.hk), kv_head = (int32_t)(pair % (uint32_t)p.hk);
    int32_t row_count;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &row_count);
    const int64_t packed = (int64_t)row_count * p.g;
    for (int64_t r = (int64_t)(blockIdx.x % split.blocks) * ROWS + threadIdx.x / 32; r < packed; r += (int64_t)split.blocks * ROWS) {
        const packed_rows at = packed_rows_at(r, p.g);
        const int32_t i = at.i0, h = kv_head * p.g + at.h0;
        const int64_t row = split_row(p, b, h, sequence.q_row, i);
        const float sink = sink_logit(p, b, h, i >= sequence.mask.sq);
        float2 ends[ENDS];              /* of parts lane, lane + 32, ...; in place of the second number their weight, then */
        joined_row joined = {-INFINITY, sink != sink};
#pragma unroll
        for (int n = 0; n < ENDS; n++) {
            const int part = 32 * n + lane;
            ends[n] = make_float2(-INFINITY, 0.0f);
            if (part < splits) { ends[n] = ((const float2 *)split.lse)[part * split.rows + row]; }
        }
#pragma unroll
        for (int n = 0; n < ENDS; n++) {
            joined.top = fmaxf(joined.top, ends[n].x);
            joined.nan |= ends[n].x != ends[n].x || ends[n].y != ends[n].y;
        }
#pragma unroll
        for (int step = 1; step < 32; step *= 2) { joined.top = fmaxf(joined.top, __shfl_xor_sync(ALL_LANES, joined.top, step)); }
        joined.top = fmaxf(sink, joined.top);
        joined.nan = __any_sync(ALL_LANES, joined.nan);
        float sum = joined.sink_weight(sink), o[CHUNKS][WIDTH] = {};
#pragma unroll
        for (int n = 0; n < ENDS; n++) {
            if (32 * n >= splits) { break; }
            const uint32_t seen = __ballot_sync(ALL_LANES, ends[n].x != -INFINITY);
            const float weight = joined.weight(ends[n]);
            const float *from = split.o + (32 * n * split.rows + row) * p.dv + WIDTH * lane;
#pragma unroll 1
            for (int first = 0; first < 32 && seen >> first; first += AT_ONCE) {
                float x[AT_ONCE][CHUNKS][WIDTH] = {};
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
                        if (!(seen >> first + k & 1) || WIDTH * (32 * c + lane) >= p.dv) { continue; }
                        if constexpr (WIDTH == 4) {
                            *(float4 *)x[k][c] = *(const float4 *)(from + 32 * WIDTH * c);
                        } else {
                            x[k][c][0] = from[32 * WIDTH * c];
                        }
                    }
                    from += split.rows * p.dv;
                }
#pragma unroll
                for (int k = 0; k < AT_ONCE; k++) {
                    const float w = __shfl_sync(ALL_LANES, weight, first + k);
                    if (!(seen >> first + k & 1)) { continue; }
                    sum += w;
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
                        for (int e = 0; e < WIDTH; e++) { o[c][e] = fmaf(w, x[k][c][e], o[c][e]); }
                    }
                }
            }
        }
        const float scale = joined.scale(sum);
        char *out = fgqa_row_address(p.view[FGQA_ARG_out], p.dtype == FGQA_F32 ? 4 : 2, b, h, sequence.q_row + i);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int index = WIDTH * (32 * c + lane);
            if (index >= p.dv) { continue; }
#pragma unroll
            for (int e = 0; e < WIDTH; e++) { o[c][e] *= scale; }
            store_elements<WIDTH>(out, index, o[c], p.dtype, params.vector_out);
        }
        if (lane == 0) { store_lse(p, b, h, sequence.q_row + i, joined.lse(sum)); }
    }
}

extern "C" int fgqa_fwd_combine(const fgqa_problem *problem, void *workspace, uint32_t splits, const fgqa_exec *exec)
{
    const fgqa_params params = fgqa_params_make(problem);
    static_assert(FGQA_MAX_HEAD_DIM == 256, "chunks for whole rows");
    const auto kernel = problem->dv % 4 ? fgqa_fwd_combine_kernel<1, 8> : problem->dv > 128 ? fgqa_fwd_combine_kernel<4, 2> : fgqa_fwd_combine_kernel<4, 1>;
    fgqa_split split;
    fgqa_split_workspace(problem, splits, workspace, &split);
    const int64_t rows = (int64_t)problem->sq * problem->g, most = INT32_MAX / problem->hk;
    const int64_t blocks = (rows + ROWS - 1) / ROWS;
    split.blocks = (uint32_t)(blocks < most ? blocks : most);
    const int64_t at_once = most / split.blocks;
    for (int64_t b = 0; b < problem->b; b += at_once) {
        const int64_t count = problem->b - b < at_once ? problem->b - b : at_once;
        split.first_b = (int32_t)b;
        const cudaError_t error = launch_kernel(kernel, (uint32_t)(count * problem->hk * split.blocks), 32 * ROWS, 0, exec->stream, params, split);
        if (error != cudaSuccess) { return error; }
    }
    return cudaSuccess;
}
