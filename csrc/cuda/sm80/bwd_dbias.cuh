/* bwd_dbias.cuh - gradient of the bias, part of bwd.cu: the general variants' second kernel.
 *
 *     dbias = sum of P (dP' - delta) over the dimensions in which the bias is broadcast
 *
 * A block owns one BLOCK_Q x BLOCK_K tile of dbias (of one row or column of tiles where sq or sk is broadcast) and computes
 * the scores of all tiles that add to it once more, in a fixed order; its sums stay in registers. No atomics, no workspace.
 */
#pragma once

/* Tiles of dbias in each dimension, and how many tiles of scores add to one of them in that dimension. */
struct dbias_extent { int32_t out[4], in[4]; };

/* ds += this tile's share. Nothing happens where no score of the tile is visible. */
static __device__ __forceinline__ void dbias_step(shared &mem, const fgqa_params &params, const fgqa_bwd_workspace &w, int32_t b, int32_t head, int32_t i, int32_t n,
                                                  float (&sum)[of_s::MB][of_s::NB][4], int warp)
{
    const fgqa_problem &p = params.problem;
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
    const int32_t i0 = i * BLOCK_Q, i1 = min(sequence.mask.sq, i0 + BLOCK_Q);
    if (i0 >= sequence.mask.sq) { return; }
    const fgqa_range order = bwd_key_tiles(sequence.mask, BLOCK_K, i0, i1);
    if (n < order.begin || n >= order.end) { return; }
    __syncthreads();                                       /* the tile before is used up */
    if (threadIdx.x == 0) {
        mem.task.b = b;
        mem.task.kv_head = fgqa_kv_head(head, p.g);
        mem.task.n = n;
        mem.task.sequence = sequence;
        mem.steps[0].i = i;
        mem.steps[0].h = head % p.g;
        mem.steps[0].at[AT_Q] = fgqa_row_address(p.view[FGQA_ARG_q], sizeof(T), b, head, sequence.q_row + i0);
        mem.steps[0].at[AT_DOUT] = fgqa_row_address(p.view[FGQA_ARG_dout], sizeof(T), b, head, sequence.q_row + i0);
        mem.steps[0].at[AT_STATS] = (char *)((row_stats *)w.stats + bwd_q_row(p, b, head, sequence.q_row, i0));
    }
    __syncthreads();
    load_keys(mem, params);
    load_queries(mem, params, 0, 0, mem.steps[0]);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    if (warp < SCORE_WARPS) {
        float ds[of_s::MB][of_s::NB][4] = {};
        scores_general<true>(mem, params, 0, 0, 0, warp, ds);
#pragma unroll
        for (int mb = 0; mb < of_s::MB; mb++) {
#pragma unroll
            for (int nb = 0; nb < of_s::NB; nb++) {
#pragma unroll
                for (int r = 0; r < 4; r++) { sum[mb][nb][r] += ds[mb][nb][r]; }
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
FGQA_SUFFIX(FGQA_ROW, _dbias_kernel)(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, const __grid_constant__ dbias_extent extent)
{
    extern __shared__ __align__(128) char memory[];
    shared &mem = *(shared *)memory;
    const fgqa_problem &p = params.problem;
    const fgqa_view &dbias = p.view[FGQA_ARG_dbias];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const bool one_row = extent.in[2] > 1 || p.bias_shape[2] == 1, one_column = extent.in[3] > 1 || p.bias_shape[3] == 1;
    float *tile = (float *)memory;                         /* [BLOCK_Q][BLOCK_K], at the end */
    static_assert(sizeof(shared) >= sizeof(float) * BLOCK_Q * BLOCK_K, "the sums fit where the tiles were");

    const int64_t outs = (int64_t)extent.out[0] * extent.out[1] * extent.out[2] * extent.out[3];
    for (int64_t out = blockIdx.x; out < outs; out += gridDim.x) {
        const int32_t jt = (int32_t)(out % extent.out[3]), it = (int32_t)(out / extent.out[3] % extent.out[2]);
        const int32_t head = (int32_t)(out / extent.out[3] / extent.out[2] % extent.out[1]), b = (int32_t)(out / extent.out[3] / extent.out[2] / extent.out[1]);
        float sum[of_s::MB][of_s::NB][4] = {};
        for (int32_t db = 0; db < extent.in[0]; db++) {
            for (int32_t dh = 0; dh < extent.in[1]; dh++) {
                for (int32_t di = 0; di < extent.in[2]; di++) {
                    for (int32_t dj = 0; dj < extent.in[3]; dj++) { dbias_step(mem, params, w, b + db, head + dh, it + di, jt + dj, sum, warp); }
                }
            }
        }
        __syncthreads();
        if (warp < SCORE_WARPS) {
#pragma unroll
            for (int mb = 0; mb < of_s::MB; mb++) {
#pragma unroll
                for (int nb = 0; nb < of_s::NB; nb++) {
#pragma unroll
                    for (int r = 0; r < 4; r++) {
                        tile[(of_s::row(warp) + 16 * mb + fragment_row(lane, r)) * BLOCK_K + of_s::col(warp) + 8 * nb + fragment_column(lane, r)] = sum[mb][nb][r];
                    }
                }
            }
        }
        __syncthreads();
        const int rows = one_row ? 1 : min(BLOCK_Q, p.bias_shape[2] - it * BLOCK_Q), columns = one_column ? 1 : min(BLOCK_K, p.bias_shape[3] - jt * BLOCK_K);
        for (int n = threadIdx.x; n < rows * columns; n += THREADS) {
            const int r = n / columns, c = n % columns;
            float x = 0.0f;
            for (int rr = r; rr < (one_row ? BLOCK_Q : r + 1); rr++) {
                for (int cc = c; cc < (one_column ? BLOCK_K : c + 1); cc++) { x += tile[rr * BLOCK_K + cc]; }
            }
            store_float(dbias.data, b * dbias.stride_b + head * dbias.stride_h + (it * BLOCK_Q + r) * dbias.stride_s + (jt * BLOCK_K + c) * dbias.stride_d, x, dbias.dtype);
        }
    }
}

static int dbias_launch(const fgqa_params &params, const fgqa_bwd_workspace &w, cudaStream_t stream)
{
    const fgqa_problem &p = params.problem;
    const int32_t full[4] = {p.b, p.hq, (int32_t)(((int64_t)p.sq + BLOCK_Q - 1) / BLOCK_Q), (int32_t)(((int64_t)p.sk + BLOCK_K - 1) / BLOCK_K)};
    dbias_extent extent;
    int64_t outs = 1;
    for (int n = 0; n < 4; n++) {
        extent.out[n] = p.bias_shape[n] == 1 ? 1 : full[n];
        extent.in[n] = p.bias_shape[n] == 1 ? full[n] : 1;
        outs *= extent.out[n];
    }
    if (outs == 0) { return cudaSuccess; }
    static launch_state state;
    const cudaError_t error = allow_shared_memory((const void *)FGQA_SUFFIX(FGQA_ROW, _dbias_kernel), sizeof(shared), p.device.index, &state);
    if (error != cudaSuccess) { return error; }
    return launch_kernel(FGQA_SUFFIX(FGQA_ROW, _dbias_kernel), (uint32_t)(outs < 1 << 30 ? outs : 1 << 30), THREADS, sizeof(shared), stream, params, w, extent);
}
