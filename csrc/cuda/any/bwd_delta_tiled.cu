/* bwd_delta_tiled.cu - bwd_delta.cu for kernels with tiled statistics (Hopper): a block a query tile of a head, and as little as
 * possible between its start and its loads. Also which rows see each key, and whose turn it is to add to dQ.
 */
#include "../common/launch.cuh"
#include "bwd_rows.cuh"

static constexpr int AHEAD = 4, MOST_ROWS = 128, MOST_SORTED = 1024;      /* 16-byte loads of a thread and tensor at a time; rows of a tile; sequences */
static constexpr float LARGEST_LSE = 0x1p15f;      /* with ALiBi or a bias: beyond, LSE and what is added to scores, rounded in base 2, may be apart by more than 1/256 */

/* rowsum(dO O) of a tile's rows, LANES lanes a row. Rows start on 16 bytes: rows of kernels.def with tiled statistics take no
 * others. */
template <typename T, int LANES>
static __device__ __forceinline__ void sum_rows(float (&sums)[MOST_ROWS], const fgqa_problem &p, int32_t b, int32_t h, int64_t first, int32_t count)
{
    constexpr int AT_A_TIME = THREADS / LANES;
    const int part = (int)threadIdx.x % LANES;
    const fgqa_view &out = p.view[FGQA_ARG_out], &dout = p.view[FGQA_ARG_dout];
    for (int32_t begin = 0; begin < count; begin += AHEAD * AT_A_TIME) {
        const int32_t row = begin + (int32_t)threadIdx.x / LANES;
        float sum[AHEAD] = {};
        uint4 x[AHEAD] = {}, y[AHEAD] = {};
        const char *from = fgqa_row_address(out, sizeof(T), b, h, first + row) + 16 * part, *dfrom = fgqa_row_address(dout, sizeof(T), b, h, first + row) + 16 * part;
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
            if (8 * part < p.dv && row + n * AT_A_TIME < count) {
                x[n] = *(const uint4 *)(from + n * AT_A_TIME * out.stride_s * (int64_t)sizeof(T));
                y[n] = *(const uint4 *)(dfrom + n * AT_A_TIME * dout.stride_s * (int64_t)sizeof(T));
            }
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
#pragma unroll
            for (int m = 0; m < 8; m++) { sum[n] = fmaf(to_float(((const T *)&x[n])[m]), to_float(((const T *)&y[n])[m]), sum[n]); }
        }
#pragma unroll
        for (int n = 0; n < AHEAD; n++) {
#pragma unroll
            for (int step = LANES / 2; step > 0; step /= 2) { sum[n] += __shfl_xor_sync(0xFFFFFFFFu, sum[n], step, LANES); }
            if (part == 0 && row + n * AT_A_TIME < count) { sums[row + n * AT_A_TIME] = sum[n]; }
        }
    }
}

/* Whether some row of a tile has an inf or NaN in q, as far as this thread has seen. */
template <typename T> static __device__ __noinline__ bool queries_poisoned(const fgqa_params &params, int32_t b, int32_t h, int64_t first, int32_t count)
{
    bool dirty = false;
    for (int32_t row = (int32_t)threadIdx.x / HALF; row < count; row += AT_ONCE) {
        dirty |= row_poisoned<T>(fgqa_row_address(params.problem.view[FGQA_ARG_q], sizeof(T), b, h, first + row), params.problem.d, (int)threadIdx.x % HALF, params.vector_q);
    }
    return dirty;
}

template <typename T> static __device__ __noinline__ void zero_rows(const fgqa_problem &p, int32_t b, int32_t h, int64_t first, int32_t begin, int32_t end)
{
    for (int32_t row = begin + (int32_t)threadIdx.x / HALF; row < end; row += AT_ONCE) {
        zero_row<T>(fgqa_row_address(p.view[FGQA_ARG_dq], sizeof(T), b, h, first + row), p.d, (int)threadIdx.x % HALF);
    }
}

/* With ALiBi, lse2 of rows whose LSE is large: of the exponents that the main kernel computes, so that what leaves no digits
 * to q.k cancels. Where all of them leave float32, weights are 0. */
template <typename T> static __device__ __noinline__ void large_rows(const fgqa_params &params, const fgqa_bwd_workspace &w, int32_t b, int32_t h, int32_t tile)
{
    const fgqa_problem &p = params.problem;
    const fgqa_view &slopes = p.view[FGQA_ARG_alibi_slopes];
    const float slope_log2 = load_float(slopes.data, b * slopes.stride_b + h * slopes.stride_h, slopes.dtype) * (float)FGQA_LOG2E;
    const bool capped = params.softcap > 0.0f;
    const float in_caps = params.scale * params.inv_softcap, scale_log2 = (capped ? params.softcap : params.scale) * (float)FGQA_LOG2E;
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
    const int32_t i0 = tile * w.block_q, end = min(sequence.mask.sq, i0 + w.block_q);
    for (int32_t i = i0 + (int32_t)threadIdx.x / HALF; i < end; i += AT_ONCE) {
        const float lse = *(const float *)fgqa_row_address(p.view[FGQA_ARG_lse], sizeof(float), b, h, sequence.q_row + i);
        if (!is_large(lse, LARGEST_LSE)) { continue; }
        const row_sum own = sum_row<T>(params, sequence, b, h, i, row_range(sequence.mask, i), 1.0f, 0.0f, [&](int32_t j, float qk) {
            if (!mask_shows(p, b, h, i, j)) { return -INFINITY; }
            return bwd_less_alibi(capped ? tanh_score(qk * in_caps) : qk, scale_log2, slope_log2, (float)(i + sequence.mask.diag - j));
        });
        float *lse2 = bwd_tiled_stats(w, bwd_q_tile(p, w, b, h, sequence.q_row, tile), i);
        if (threadIdx.x % HALF == 0 && own.top == -INFINITY) { *lse2 = -FLT_MAX; }
        if (threadIdx.x % HALF == 0 && all_of(*lse2, own.top + own.log_sum, 8.0f)) { *lse2 = own.top + own.log_sum; }
    }
}

/* With a bias, of rows whose LSE is large the base, which is the most that the row's scores have added to them, and lse2 of
 * scores from which it has been taken: they hold what the LSE does not. */
template <typename T> static __device__ __noinline__ void base_rows(const fgqa_params &params, const fgqa_bwd_workspace &w, int32_t b, int32_t h, int32_t tile)
{
    const fgqa_problem &p = params.problem;
    const fgqa_view &bias = p.view[FGQA_ARG_bias];
    const fgqa_view &slopes = p.view[FGQA_ARG_alibi_slopes];
    const float slope = slopes.data ? load_float(slopes.data, b * slopes.stride_b + h * slopes.stride_h, slopes.dtype) : 0.0f;
    const bool capped = params.softcap > 0.0f;
    const float in_caps = params.scale * params.inv_softcap;
    const int part = (int)threadIdx.x % HALF;
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
    const int64_t q_tile = bwd_q_tile(p, w, b, h, sequence.q_row, tile);
    const int32_t i0 = tile * w.block_q;
    for (int32_t i = i0 + (int32_t)threadIdx.x / HALF; i < i0 + w.block_q; i += AT_ONCE) {
        const float lse = i < sequence.mask.sq ? *(const float *)fgqa_row_address(p.view[FGQA_ARG_lse], sizeof(float), b, h, sequence.q_row + i) : 0.0f;
        float base = 0.0f;
        if (is_large(lse, LARGEST_LSE)) {
            const fgqa_range seen = row_range(sequence.mask, i);
            const auto bias_of = [&](int32_t j) {
                if (!mask_shows(p, b, h, i, j)) { return -INFINITY; }
                return load_float(bias.data, b * bias.stride_b + h * bias.stride_h + i * bias.stride_s + j * bias.stride_d, bias.dtype);
            };
            const auto less_alibi = [&](float x, int32_t j) { return slopes.data ? fmaf(-slope, fabsf((float)(i + sequence.mask.diag - j)), x) : x; };
            float most = -INFINITY;
            for (int32_t j = seen.begin + part; j < seen.end; j += HALF) { most = fmaxf(most, less_alibi(bias_of(j), j)); }
#pragma unroll
            for (int step = HALF / 2; step > 0; step /= 2) { most = fmaxf(most, __shfl_xor_sync(0xFFFFu << (threadIdx.x & 16), most, step)); }
            if (fabsf(most) < INFINITY) {
                base = most;
                const row_sum own = sum_row<T>(params, sequence, b, h, i, seen, (float)FGQA_LOG2E, base, [&](int32_t j, float qk) {
                    const float x = bias_of(j);
                    if (x == -INFINITY) { return x; }
                    return less_alibi(capped ? fmaf(tanh_score(qk * in_caps), params.softcap, x) : fmaf(qk, params.scale, x), j) - base;
                });
                const float log_sum = own.log_sum * (float)FGQA_LN2;
                if (part == 0) {
                    *bwd_tiled_stats(w, q_tile, i) = all_of(lse, base + (own.top + log_sum), 8.0f) ? fmaf(own.top, (float)FGQA_LOG2E, own.log_sum)
                                                                                                    : (lse - base) * (float)FGQA_LOG2E;
                }
            }
        }
        if (part == 0) { w.bases[q_tile * w.block_q + i - i0] = base; }
    }
}

/* By the first block. Packed sequences, unless there are very many, are taken in the order of their query rows, of which a task's
 * length is made: the last tasks to be begun are short. Where offsets fall, which nobody checks here, sequences would share tiles
 * and wait for turns that never come: then there are no tasks, and no query tile is finished. */
static __device__ __noinline__ void prepare_tasks(const fgqa_problem &p, const fgqa_bwd_workspace &w)
{
    __shared__ int32_t rows_of[MOST_SORTED];
    __shared__ uint32_t sums[THREADS];
    const int32_t thread = (int32_t)threadIdx.x;
    int32_t rows;
    if (thread == 0) {
        w.control->ticket = w.control->finished = 0;
        w.control->key_tiles = ((int64_t)p.sk + w.block_k - 1) / w.block_k;
    }
    if (!p.varlen) { return; }
    bool falls = false;
    for (int32_t b = thread; b < p.b; b += THREADS) { falls |= p.cu_seqlens_q[b + 1] < p.cu_seqlens_q[b] || p.cu_seqlens_kv[b + 1] < p.cu_seqlens_kv[b]; }
    falls = __syncthreads_or(falls);
    if (falls && thread == 0) { w.control->finished = INT32_MAX; }
    const bool sorted = p.b <= MOST_SORTED;
    for (int32_t b = thread; sorted && b < p.b; b += THREADS) { rows_of[b] = fgqa_device_sequence(p, b, &rows).mask.sq; }
    __syncthreads();
    for (int32_t b = thread; b < p.b; b += THREADS) {
        int32_t rank = sorted ? 0 : b;
        for (int32_t other = 0; sorted && other < p.b; other++) { rank += rows_of[other] > rows_of[b] || (rows_of[other] == rows_of[b] && other < b); }
        w.sequences[rank] = b;
    }
    uint32_t before = 0;
    for (int32_t first = 0; first < p.b; first += THREADS) {
        const int32_t n = first + thread;
        __syncthreads();
        const uint32_t tiles = n < p.b && !falls ? (uint32_t)bwd_key_tiles_of(w, fgqa_device_sequence(p, w.sequences[n], &rows).mask) : 0, tasks = tiles * (uint32_t)(p.hk * w.splits);
        sums[thread] = tasks;
        for (int step = 1; step < THREADS; step *= 2) {
            __syncthreads();
            const uint32_t sum = sums[thread] + (thread >= step ? sums[thread - step] : 0);
            __syncthreads();
            sums[thread] = sum;
        }
        __syncthreads();
        if (n < p.b) { w.first_task[n] = before + sums[thread] - tasks; }
        before += sums[THREADS - 1];
    }
    if (thread == 0) { w.first_task[p.b] = before; }
}

template <typename T, int LANES> __global__ void __launch_bounds__(THREADS, 4)
bwd_delta_tiled_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, uint32_t head_tiles)
{
    __shared__ float sums[MOST_ROWS];
    const fgqa_problem &p = params.problem;
    const int thread = (int)threadIdx.x;
    if (p.b == 0 || p.hq == 0) {
        if (blockIdx.x == 0) { prepare_tasks(p, w); }
        if (p.varlen) { zero_tails<T>(p); }
        return;
    }
    const uint32_t pair = blockIdx.x / head_tiles;
    int32_t b = (int32_t)(pair / (uint32_t)p.hq), tile = (int32_t)(blockIdx.x % head_tiles), rows, tiles = (int32_t)head_tiles;
    const int32_t h = (int32_t)(pair % (uint32_t)p.hq);
    if (p.varlen) { b = bwd_packed_sequence(p, w.block_q, tile); }
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
    const fgqa_mask &mask = sequence.mask;
    if (p.varlen) {
        const int32_t first = (int32_t)(sequence.q_row / w.block_q) + b;
        const int64_t next = b + 1 < p.b ? max((int64_t)0, min(p.total_q, (int64_t)p.cu_seqlens_q[b + 1])) / w.block_q + b + 1 : head_tiles;
        tile -= first;
        tiles = max(1, (int32_t)next - first);
        zero_tails<T>(p);
    }
    const int32_t i0 = tile * w.block_q, count = tile < 0 ? 0 : max(0, min(rows, i0 + w.block_q) - i0), real = max(0, min(count, mask.sq - i0));
    const int64_t first_row = sequence.q_row + i0;
    const bool own = thread < w.block_q;
    float lse = -INFINITY, dlse = 0.0f;
    if (thread < real) {
        lse = *(const float *)fgqa_row_address(p.view[FGQA_ARG_lse], sizeof(float), b, h, first_row + thread);
        if (p.view[FGQA_ARG_dlse].data) { dlse = *(const float *)fgqa_row_address(p.view[FGQA_ARG_dlse], sizeof(float), b, h, first_row + thread); }
    }
    sum_rows<T, LANES>(sums, p, b, h, first_row, real);
    if (blockIdx.x == 0) { prepare_tasks(p, w); }
    if (w.key_rows && tile >= 0) {
        fgqa_range *key_rows = bwd_key_rows(p, w, b, sequence.k_row);
        for (int64_t j = ((int64_t)h * tiles + tile) * THREADS + thread; j < mask.sk; j += (int64_t)p.hq * tiles * THREADS) {
            key_rows[j] = fgqa_q_range(&mask, (int32_t)j, (int32_t)j + 1);
        }
    }
    if (count == 0) { return; }
    __syncthreads();
    const float sum = thread < real ? sums[thread] : 0.0f;
    bool dirty = !isfinite(sum);                           /* so it is wherever dO is not finite */
    const int64_t q_tile = bwd_q_tile(p, w, b, h, sequence.q_row, tile);
    if (own) {
        const bool empty = lse == -INFINITY;
        float *to = bwd_tiled_stats(w, q_tile, thread);
        to[0] = empty ? INFINITY : lse * (float)FGQA_LOG2E;
        to[w.block_q] = empty ? 0.0f : sum - dlse;
    }
    /* q is read only where the LSE cannot answer for it */
    if (__syncthreads_or(thread < real && (p.view[FGQA_ARG_sink].data || !(fabsf(lse) < 1e37f)))) { dirty |= queries_poisoned<T>(params, b, h, first_row, real); }
    dirty = __syncthreads_or(dirty);
    fgqa_range order = {0, 0};
    if (real > 0) { order = bwd_key_tiles(mask, w.block_k, i0, i0 + real); }
    if (thread == 0) { w.turn[q_tile] = (dirty ? FGQA_BWD_DIRTY : 0) | (w.chain ? 0 : order.begin) | FGQA_BWD_FRESH; }
    const int32_t written = order.begin == order.end ? 0 : real;           /* rows that the main kernel or the one behind it writes */
    if (written < count) { zero_rows<T>(p, b, h, first_row, written, count); }
    if (!p.view[FGQA_ARG_alibi_slopes].data && !w.bases) { return; }
    const bool large = __syncthreads_or(thread < real && is_large(lse, LARGEST_LSE));
    if (w.bases && thread == 0) { w.based[q_tile] = large; }
    if (large && w.bases) {
        base_rows<T>(params, w, b, h, tile);
    } else if (large) {
        large_rows<T>(params, w, b, h, tile);
    }
}

/* Lanes of a row: as many as it has pieces of 16 bytes. */
template <typename T> static void (*delta_kernel(int32_t dv))(fgqa_params, fgqa_bwd_workspace, uint32_t)
{
    return dv <= 64 ? bwd_delta_tiled_kernel<T, 8> : dv <= 128 ? bwd_delta_tiled_kernel<T, 16> : bwd_delta_tiled_kernel<T, 32>;
}

extern "C" int fgqa_bwd_delta_tiled(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    const uint32_t head_tiles = w->head_tiles > 0 ? (uint32_t)w->head_tiles : 1u, blocks = (uint32_t)problem->hq * head_tiles * (problem->varlen ? 1u : (uint32_t)problem->b);
    const auto kernel = problem->dtype == FGQA_BF16 ? delta_kernel<bf16>(problem->dv) : delta_kernel<f16>(problem->dv);
    return launch_kernel(kernel, blocks > 0 ? blocks : 1u, THREADS, 0, stream, params, *w, head_tiles);
}
