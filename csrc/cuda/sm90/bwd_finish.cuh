/* bwd_finish.cuh - part of bwd.cu: dQ from float32 sums in the order of accumulators, without its scale, to its rows, after the main
 * kernel. */
#pragma once

static constexpr int FINISH_THREADS = 256, OF_CONSUMER = BLOCK_Q * D / 8;      /* float4s of a tile that one consumer made */

/* One query tile of one head. Tiles to which no key tile adds were written by bwd_delta.cu. */
static __device__ __forceinline__ void finish_tile(const bwd_params &p, uint32_t (&tile)[BLOCK_Q][D / 2 + 4], const fgqa_sequence &sequence, int32_t b, int32_t h, int32_t n, bool vector)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_mask &mask = sequence.mask;
    const int32_t i0 = n * BLOCK_Q, end = min(mask.sq, i0 + BLOCK_Q);
    const fgqa_range key_tiles = bwd_key_tiles(mask, BLOCK_K, i0, end);
    if (key_tiles.begin == key_tiles.end) { return; }
    const float4 *sums = (const float4 *)(p.w.dq + bwd_q_tile(problem, p.w, b, h, sequence.q_row, n) * (BLOCK_Q * D));
#pragma unroll 8
    for (int m = 0; m < BLOCK_Q * D / 4 / FINISH_THREADS; m++) {
        const int at = threadIdx.x + FINISH_THREADS * m, consumer = at / OF_CONSUMER, group = at / 128 % (OF_CONSUMER / 128), thread = at % 128;
        const float4 x = sums[at];
        /* a consumer has half of the rows or, from head dim 128 on, of the columns */
        const int row = (D == 64 ? consumer * 64 : 0) + thread / 32 * 16 + thread % 32 / 4, pair = (D == 64 ? 0 : consumer * (D / 4)) + group * 4 + thread % 4;
        tile[row][pair] = pack2(x.x * p.common.scale, x.y * p.common.scale, T());
        tile[row + 8][pair] = pack2(x.z * p.common.scale, x.w * p.common.scale, T());
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < BLOCK_Q * D / 8 / FINISH_THREADS; m++) {
        const int row = threadIdx.x / (D / 8) + FINISH_THREADS / (D / 8) * m, piece = threadIdx.x % (D / 8);
        if (i0 + row >= end || 8 * piece >= problem.d) { continue; }
        const uint4 x = *(const uint4 *)&tile[row][4 * piece];
        char *const at = fgqa_row_address(problem.view[FGQA_ARG_dq], sizeof(T), b, h, sequence.q_row + i0 + row) + 16 * piece;
        if (vector) { *(uint4 *)at = x; continue; }
        const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 8; e++) { ((uint16_t *)at)[e] = (uint16_t)(word[e / 2] >> 16 * (e % 2)); }
    }
}

static __global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const __grid_constant__ bwd_params p, uint32_t tiles_a_head, bool vector)
{
    __shared__ __align__(16) uint32_t tile[BLOCK_Q][D / 2 + 4];
    const fgqa_problem &problem = p.common.problem;
    const uint32_t pair = blockIdx.x / tiles_a_head;
    const int32_t h = (int32_t)(pair % (uint32_t)problem.hq);
    int32_t b = (int32_t)(pair / (uint32_t)problem.hq), n = (int32_t)(blockIdx.x % tiles_a_head), rows;
    if (problem.varlen) { b = bwd_packed_sequence(problem, BLOCK_Q, n); }
    const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
    if (problem.varlen) { n -= (int32_t)sequence.q_row / BLOCK_Q + b; }
    if (n >= 0 && n * BLOCK_Q < sequence.mask.sq) { finish_tile(p, tile, sequence, b, h, n, vector); }
}

static int finish(const bwd_params &p, int32_t, int32_t, cudaStream_t stream)
{
    const fgqa_problem &problem = p.common.problem;
    const uint32_t tiles_a_head = (uint32_t)p.w.head_tiles, blocks = (uint32_t)problem.hq * tiles_a_head * (problem.varlen ? 1u : (uint32_t)problem.b);
    if (blocks == 0 || problem.b == 0) { return cudaSuccess; }
    const bool vector = fgqa_view_is_vector(&problem, FGQA_ARG_dq) != 0;
    return launch_kernel(finish_kernel, blocks, FINISH_THREADS, 0, stream, p, tiles_a_head, vector);
}
