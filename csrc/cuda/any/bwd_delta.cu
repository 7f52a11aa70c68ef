/* bwd_delta.cu - before the main backward kernel: statistics of every query row, and an initialised workspace,
 * laid out as the main kernel's row wants it (stats_kind).
 *
 *     delta = rowsum(dO O) - dLSE      and the LSE, in two numbers where it is large (bwd_workspace.h)
 *
 * Also writes the gradients that no key tile will: dQ of padding rows and of query tiles without a visible score, and dQ, dK
 * and dV of rows of packed tensors that belong to no sequence. A half warp a row; a block takes whole query tiles of one head.
 */
#include "../common/launch.cuh"
#include "bwd_rows.cuh"
#include "bwd_workspace.h"

static constexpr int ROWS = 64;
static constexpr float LARGEST_LSE = 0x1p17f;      /* beyond, an LSE may be off by more than 1/128: 2^-6 / epsilon */

/* Its largest score and log2 of the sum of its weights, of a row whose LSE holds less. */
template <typename T> static __device__ __noinline__ void own_stats(general_stats *stats, const fgqa_params &params, const fgqa_sequence &sequence, int32_t b, int32_t h, int32_t i)
{
    const score_row row = score_row_make(params, sequence.mask, b, h, i);
    const row_sum own = sum_row<T>(params, sequence, b, h, i, {row.begin, row.end}, (float)FGQA_LOG2E, 0.0f, [&](int32_t j, float qk) { return score_chain(params, sequence.mask.diag, row, j, qk); });
    if (all_of(stats->top, own.top + own.log_sum * (float)FGQA_LN2, 4.0f)) {
        stats->top = own.top;
        stats->log_sum = own.log_sum;
    }
}

/* Query rows [i0, i1), one tile: its statistics and turn. */
template <typename T, bool GENERAL> static __device__ __forceinline__ void describe_tile(const fgqa_params &params, const fgqa_bwd_workspace &w, const fgqa_sequence &sequence,
                                                                           int32_t b, int32_t h, int32_t i0, int32_t i1)
{
    const fgqa_problem &p = params.problem;
    const fgqa_mask &mask = sequence.mask;
    const int part = threadIdx.x % HALF;
    bool dirty = false;
    fgqa_range order = {0, 0};
    if (i0 < mask.sq) { order = bwd_key_tiles(mask, w.block_k, i0, min(mask.sq, i1)); }
    const bool unreached = order.begin == order.end;
    const int64_t q_tile = bwd_q_tile(p, w, b, h, sequence.q_row, i0 / w.block_q);
    for (int32_t i = i0 + (int32_t)threadIdx.x / HALF; i < i1; i += AT_ONCE) {
        const bool real = i < mask.sq;
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
        /* q is read only where the LSE cannot answer for it */
        if (real && (GENERAL || p.view[FGQA_ARG_sink].data || !(fabsf(lse) < 1e37f))) {
            dirty |= row_poisoned<T>(fgqa_row_address(p.view[FGQA_ARG_q], sizeof(T), b, h, row), p.d, part, params.vector_q);
        }
        delta = half_warp_sum(delta);
        dirty |= !isfinite(delta);                         /* so it is wherever dO is not finite */
        if (real && p.view[FGQA_ARG_dlse].data) { delta -= *(const float *)fgqa_row_address(p.view[FGQA_ARG_dlse], sizeof(float), b, h, row); }
        const bool empty = lse == -INFINITY;
        const int64_t at = bwd_q_row(p, b, h, sequence.q_row, i);
        if (GENERAL) {
            general_stats stats = {empty ? INFINITY : lse, empty ? 0.0f : delta, 0.0f, 0.0f};
            if (is_large(lse, LARGEST_LSE)) { own_stats<T>(&stats, params, sequence, b, h, i); }
            if (part == 0) { ((general_stats *)w.stats)[at] = stats; }
        } else if (part == 0) {
            const plain_stats stats = {empty ? INFINITY : lse * (float)FGQA_LOG2E, empty ? 0.0f : delta};
            ((plain_stats *)w.stats)[at] = stats;
        }
        if (!real || unreached) { zero_row<T>(fgqa_row_address(p.view[FGQA_ARG_dq], sizeof(T), b, h, row), p.d, part); }
    }
    dirty = __syncthreads_or(dirty);
    if (threadIdx.x == 0) { w.turn[q_tile] = dirty ? FGQA_BWD_DIRTY : 0; }
}

template <typename T, bool GENERAL> __global__ void __launch_bounds__(THREADS, 2)
bwd_delta_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, int64_t blocks_a_head)
{
    const fgqa_problem &p = params.problem;
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
    if (p.varlen) { zero_tails<T>(p); }
    const int64_t rows_a_block = max(ROWS, w.block_q);
    for (int64_t block = blockIdx.x; block < (int64_t)p.b * p.hq * blocks_a_head; block += gridDim.x) {
        const int32_t b = (int32_t)(block / blocks_a_head / p.hq), h = (int32_t)(block / blocks_a_head % p.hq);
        int32_t rows;
        const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
        /* a packed sequence may be longer than max_q said: the last block goes on */
        const int64_t first = block % blocks_a_head * rows_a_block;
        const int64_t end = block % blocks_a_head == blocks_a_head - 1 ? rows : min((int64_t)rows, first + rows_a_block);
        for (int64_t i0 = first; i0 < end; i0 += w.block_q) { describe_tile<T, GENERAL>(params, w, sequence, b, h, (int32_t)i0, (int32_t)min(end, i0 + w.block_q)); }
    }
}

extern "C" int fgqa_bwd_delta(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream)
{
    if (w->stats_kind == FGQA_BWD_TILED) { return fgqa_bwd_delta_tiled(problem, w, stream); }
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t rows_a_block = ROWS > w->block_q ? ROWS : w->block_q;
    const int64_t blocks_a_head = problem->sq > 0 ? (problem->sq + rows_a_block - 1) / rows_a_block : 1;
    const int64_t blocks = (int64_t)problem->b * problem->hq * blocks_a_head;
    const uint32_t grid = (uint32_t)(blocks < 1 ? 1 : blocks < 1 << 30 ? blocks : 1 << 30);
    const bool general = w->stats_kind == FGQA_BWD_GENERAL;
    const auto kernel = problem->dtype == FGQA_BF16 ? (general ? bwd_delta_kernel<bf16, true> : bwd_delta_kernel<bf16, false>)
                      : problem->dtype == FGQA_F16 ? (general ? bwd_delta_kernel<f16, true> : bwd_delta_kernel<f16, false>)
                      : bwd_delta_kernel<f32, true>;
    return launch_kernel(kernel, grid, THREADS, 0, stream, params, *w, blocks_a_head);
}
