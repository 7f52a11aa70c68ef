/* weights.cu - attention weights without the score matrix, in float32 arithmetic for every dtype.
 *
 *     rows     weights [b, hq, n, sk] of chosen query rows: one kernel leaves their scores in the result, a second one turns
 *              each row of it into its own softmax
 *     keysum   weights summed over the query rows, [b, hq, sk]: one kernel leaves every row's largest score and log2 of its sum in
 *              the workspace; in a second one a block owns a tile of keys of one head and adds its weights, rows in their order
 *
 * All walk over tiles of 64 rows x 64 keys, whose products are made from shared memory 32 elements of a row at a time; a thread
 * has 4 rows x 4 keys. Except in the sums, rows are packed: a KV head's keys are loaded once for all heads of its group. A sink
 * counts in the denominator; rows behind the end of their sequence have weights 0.
 */
#include "weights.h"

#include "../common/launch.cuh"
#include "../common/mask_tile.cuh"

static constexpr int ROWS = FGQA_WEIGHTS_ROWS, KEYS = FGQA_WEIGHTS_KEYS, STEP = FGQA_WEIGHTS_STEP, THREADS = FGQA_WEIGHTS_THREADS;
static constexpr int PER_THREAD = 4, LANES = KEYS / PER_THREAD;      /* threads side by side along the keys: half a warp */

static_assert(ROWS * KEYS == THREADS * PER_THREAD * PER_THREAD, "a thread has 4 x 4 scores");

/* Transposed: element, then row or key. The odd multiple of 16 bytes keeps rows apart in the banks. */
struct tile_memory {
    float q[STEP][ROWS + 4], k[STEP][KEYS + 4];
    score_row row[ROWS];
    const void *q_row[ROWS];        /* NULL: padding */
};

/* What a KV head's blocks share. */
struct sequence_part { fgqa_sequence sequence; int32_t rows, b, kv_head; };

static __device__ __forceinline__ sequence_part part_make(const fgqa_problem &p, int64_t pair, int32_t heads)
{
    sequence_part part;
    part.b = (int32_t)(pair / heads);
    part.kv_head = (int32_t)(pair % heads);
    part.sequence = fgqa_device_sequence(p, part.b, &part.rows);
    return part;
}

/* Row `at` of the tile is query row i of head h, or, with i < 0, nothing. */
template <typename T> static __device__ __forceinline__ void describe_row(tile_memory &m, const fgqa_params &params, const sequence_part &part, int at, int32_t h, int32_t i)
{
    const fgqa_mask &mask = part.sequence.mask;
    const bool real = i >= 0 && i < mask.sq;
    m.row[at] = score_row_make(params, mask, part.b, h, real ? i : mask.sq);
    m.q_row[at] = real ? fgqa_row_address(params.problem.view[FGQA_ARG_q], sizeof(T), part.b, h, part.sequence.q_row + i) : NULL;
}

/* All keys that some row of the tile sees; the same for every thread. Rows have been described before a barrier. */
static __device__ __forceinline__ fgqa_range keys_of_tile(const tile_memory &m)
{
    fgqa_range keys = {INT32_MAX, 0};
    for (int at = 0; at < ROWS; at++) {
        if (m.row[at].begin >= m.row[at].end) { continue; }
        keys.begin = min(keys.begin, m.row[at].begin);
        keys.end = max(keys.end, m.row[at].end);
    }
    return keys;
}

/* Scores of keys j0 ... of the tile's rows, natural units, -inf where not seen: of rows 4*(thread / 16) ..., keys
 * 4*(thread % 16) ... . Ends behind a barrier: the memory of products may be written again. */
template <typename T> static __device__ __forceinline__ void tile_scores(float (&s)[PER_THREAD][PER_THREAD], tile_memory &m, const fgqa_params &params, const sequence_part &part, int32_t kv_head, int32_t j0)
{
    const fgqa_problem &p = params.problem;
    const int thread = threadIdx.x, row0 = thread / LANES * PER_THREAD, key0 = thread % LANES * PER_THREAD;
#pragma unroll
    for (int r = 0; r < PER_THREAD; r++) {
#pragma unroll
        for (int c = 0; c < PER_THREAD; c++) { s[r][c] = 0.0f; }
    }
    for (int32_t column0 = 0; column0 < p.d; column0 += STEP) {
        for (int n = thread; n < ROWS * STEP; n += THREADS) {
            const int at = n / STEP, column = n % STEP;
            const T *q = (const T *)m.q_row[at];
            m.q[column][at] = q && column0 + column < p.d ? to_float(q[column0 + column]) : 0.0f;
        }
        for (int n = thread; n < KEYS * STEP; n += THREADS) {
            const int at = n / STEP, column = n % STEP;
            const bool real = j0 + at < part.sequence.mask.sk && column0 + column < p.d;
            const T *k = (const T *)fgqa_row_address(p.view[FGQA_ARG_k], sizeof(T), part.b, kv_head, part.sequence.k_row + j0 + at);
            m.k[column][at] = real ? to_float(k[column0 + column]) : 0.0f;
        }
        __syncthreads();
#pragma unroll 8
        for (int column = 0; column < STEP; column++) {
            const float4 q4 = *(const float4 *)&m.q[column][row0], k4 = *(const float4 *)&m.k[column][key0];
            const float q[] = {q4.x, q4.y, q4.z, q4.w}, k[] = {k4.x, k4.y, k4.z, k4.w};
#pragma unroll
            for (int r = 0; r < PER_THREAD; r++) {
#pragma unroll
                for (int c = 0; c < PER_THREAD; c++) { s[r][c] = fmaf(q[r], k[c], s[r][c]); }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < PER_THREAD; r++) {
#pragma unroll
        for (int c = 0; c < PER_THREAD; c++) {
            s[r][c] = score_chain(params, part.sequence.mask.diag, m.row[row0 + r], j0 + key0 + c, s[r][c]);
        }
    }
}

/* sum of 2^x over scores, shifted by the largest: two numbers that one could not hold beside an enormous score */
struct running_sum { float top, sum; };

template <bool SINK = false> static __device__ __forceinline__ void add_score(running_sum *to, float x)
{
    if (x == -INFINITY) { return; }
    const float larger = fmaxf(to->top, x), exponent = SINK ? FGQA_SINK_EXPONENT(x, larger) : x - larger;
    to->sum = to->sum * ex2((to->top - larger) * (float)FGQA_LOG2E) + ex2(exponent * (float)FGQA_LOG2E);
    to->top = larger;
}

/* Of two threads' sums; an empty one has top -inf. */
static __device__ __forceinline__ running_sum joined(running_sum a, running_sum b)
{
    const float larger = fmaxf(a.top, b.top);
    const float of_a = a.top == -INFINITY ? a.sum : a.sum * ex2((a.top - larger) * (float)FGQA_LOG2E);
    const float of_b = b.top == -INFINITY ? b.sum : b.sum * ex2((b.top - larger) * (float)FGQA_LOG2E);
    return {larger, of_a + of_b};
}

template <int WIDTH> static __device__ __forceinline__ running_sum joined_lanes(running_sum x)
{
#pragma unroll
    for (int step = WIDTH / 2; step > 0; step /= 2) {
        x = joined(x, {__shfl_xor_sync(0xFFFFFFFFu, x.top, step), __shfl_xor_sync(0xFFFFFFFFu, x.sum, step)});
    }
    return x;
}

static __device__ __forceinline__ void add_sink(running_sum *to, const fgqa_problem &p, int32_t h)
{
    const fgqa_view &sink = p.view[FGQA_ARG_sink];
    if (sink.data) { add_score<true>(to, load_float(sink.data, h * sink.stride_h, sink.dtype)); }
}

static __device__ __forceinline__ float weight_of(float x, float top, float log_sum)
{
    return x == -INFINITY ? 0.0f : ex2((x - top) * (float)FGQA_LOG2E - log_sum);
}

static __device__ __forceinline__ float *weights_at(const fgqa_problem &p, int64_t b, int64_t h, int64_t n)
{
    return (float *)fgqa_row_address(p.view[FGQA_ARG_weights], sizeof(float), b, h, n);
}

/* ---- rows ---- */

/* A block: 64 packed chosen rows (n * g + head of the group) of a KV head, and a tile of keys. */
template <typename T> static __global__ void __launch_bounds__(THREADS)
row_scores_kernel(const __grid_constant__ fgqa_params params, int64_t tasks, int64_t row_tiles, int64_t key_tiles)
{
    __shared__ tile_memory m;
    const fgqa_problem &p = params.problem;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const sequence_part part = part_make(p, task / key_tiles / row_tiles, p.hk);
        const int64_t r0 = task / key_tiles % row_tiles * ROWS, packed = (int64_t)p.n_rows * p.g;
        const int32_t j0 = (int32_t)(task % key_tiles) * KEYS;
        __syncthreads();
        if (threadIdx.x < ROWS) {
            const int64_t r = r0 + threadIdx.x, i = r < packed ? p.rows[fgqa_packed_row_q(r, p.g)] : -1;
            describe_row<T>(m, params, part, threadIdx.x, fgqa_packed_row_head(r, part.kv_head, p.g), i < 0 || i >= part.sequence.mask.sq ? -1 : (int32_t)i);
        }
        __syncthreads();
        const fgqa_range keys = keys_of_tile(m);
        float s[PER_THREAD][PER_THREAD];
        if (keys.begin < j0 + KEYS && j0 < keys.end) {
            tile_scores<T>(s, m, params, part, part.kv_head, j0);
        } else {
#pragma unroll
            for (int n = 0; n < PER_THREAD * PER_THREAD; n++) { s[n / PER_THREAD][n % PER_THREAD] = -INFINITY; }
        }
#pragma unroll
        for (int r = 0; r < PER_THREAD; r++) {
            const int64_t row = r0 + threadIdx.x / LANES * PER_THREAD + r;
            if (row >= packed) { continue; }
            float *to = weights_at(p, part.b, fgqa_packed_row_head(row, part.kv_head, p.g), fgqa_packed_row_q(row, p.g));
#pragma unroll
            for (int c = 0; c < PER_THREAD; c++) {
                const int32_t j = j0 + threadIdx.x % LANES * PER_THREAD + c;
                if (j < p.sk) { to[j] = s[r][c]; }
            }
        }
    }
}

/* A block: one row of the result. */
static __global__ void __launch_bounds__(THREADS)
row_softmax_kernel(const __grid_constant__ fgqa_params params, int64_t rows)
{
    __shared__ running_sum of_warp[THREADS / 32];
    const fgqa_problem &p = params.problem;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const int32_t h = (int32_t)(row / p.n_rows % p.hq);
        float *x = weights_at(p, row / p.n_rows / p.hq, h, row % p.n_rows);
        running_sum mine = {-INFINITY, 0.0f};
        for (int32_t j = threadIdx.x; j < p.sk; j += THREADS) { add_score(&mine, x[j]); }
        mine = joined_lanes<32>(mine);
        __syncthreads();
        if (threadIdx.x % 32 == 0) { of_warp[threadIdx.x / 32] = mine; }
        __syncthreads();
        running_sum all = {-INFINITY, 0.0f};
#pragma unroll
        for (int warp = 0; warp < THREADS / 32; warp++) { all = joined(all, of_warp[warp]); }
        add_sink(&all, p, h);
        const float log_sum = log2f(all.sum);
        for (int32_t j = threadIdx.x; j < p.sk; j += THREADS) { x[j] = weight_of(x[j], all.top, log_sum); }
    }
}

static uint32_t grid_of(int64_t tasks) { return (uint32_t)(tasks < 1 << 30 ? tasks : 1 << 30); }

static int64_t tiles_of(int64_t count, int64_t tile) { return (count + tile - 1) / tile; }

extern "C" int fgqa_weights_rows(const fgqa_plan *, const fgqa_problem *problem, void *, const fgqa_exec *exec)
{
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t row_tiles = tiles_of((int64_t)problem->n_rows * problem->g, ROWS), key_tiles = tiles_of(problem->sk, KEYS);
    const int64_t tasks = (int64_t)problem->b * problem->hk * row_tiles * key_tiles, rows = (int64_t)problem->b * problem->hq * problem->n_rows;
    const auto kernel = problem->dtype == FGQA_BF16 ? row_scores_kernel<bf16> : problem->dtype == FGQA_F16 ? row_scores_kernel<f16> : row_scores_kernel<f32>;
    const cudaError_t error = launch_kernel(kernel, grid_of(tasks), THREADS, 0, exec->stream, params, tasks, row_tiles, key_tiles);
    return error != cudaSuccess ? error : launch_kernel(row_softmax_kernel, grid_of(rows), THREADS, 0, exec->stream, params, rows);
}

/* ---- keysum ---- */

/* stats[h * total_q + (row of the whole batch)]: the largest score, log2 of the sum beside it */
static __device__ __forceinline__ int64_t stats_at(const fgqa_problem &p, const sequence_part &part, int32_t h, int32_t i)
{
    return h * p.total_q + (p.varlen ? part.sequence.q_row : (int64_t)part.b * p.sq) + i;
}

/* A block: 64 packed rows of a KV head. A packed sequence may be longer than max_q said: its last block goes on. */
template <typename T> static __global__ void __launch_bounds__(THREADS)
row_stats_kernel(const __grid_constant__ fgqa_params params, float2 *stats, int64_t tasks, int64_t row_tiles)
{
    __shared__ tile_memory m;
    const fgqa_problem &p = params.problem;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const sequence_part part = part_make(p, task / row_tiles, p.hk);
        const int64_t packed = (int64_t)part.sequence.mask.sq * p.g, tile = task % row_tiles;
        const int64_t end = tile == row_tiles - 1 ? packed : min(packed, (tile + 1) * ROWS);
        for (int64_t r0 = tile * ROWS; r0 < end; r0 += ROWS) {
            __syncthreads();
            if (threadIdx.x < ROWS) {
                const int64_t r = r0 + threadIdx.x;
                describe_row<T>(m, params, part, threadIdx.x, fgqa_packed_row_head(r, part.kv_head, p.g), r < end ? fgqa_packed_row_q(r, p.g) : -1);
            }
            __syncthreads();
            const fgqa_range keys = keys_of_tile(m);
            running_sum sums[PER_THREAD];
#pragma unroll
            for (int r = 0; r < PER_THREAD; r++) { sums[r] = {-INFINITY, 0.0f}; }
            for (int32_t j0 = keys.begin / KEYS * KEYS; j0 < keys.end; j0 += KEYS) {
                float s[PER_THREAD][PER_THREAD];
                tile_scores<T>(s, m, params, part, part.kv_head, j0);
#pragma unroll
                for (int n = 0; n < PER_THREAD * PER_THREAD; n++) { add_score(&sums[n / PER_THREAD], s[n / PER_THREAD][n % PER_THREAD]); }
            }
#pragma unroll
            for (int r = 0; r < PER_THREAD; r++) {
                const int64_t row = r0 + threadIdx.x / LANES * PER_THREAD + r;
                running_sum all = joined_lanes<LANES>(sums[r]);
                if (threadIdx.x % LANES != 0 || row >= end) { continue; }
                const int32_t h = fgqa_packed_row_head(row, part.kv_head, p.g);
                add_sink(&all, p, h);
                stats[stats_at(p, part, h, fgqa_packed_row_q(row, p.g))] = {all.top, log2f(all.sum)};
            }
        }
    }
}

/* A block: 64 keys of a query head. */
template <typename T> static __global__ void __launch_bounds__(THREADS)
key_sums_kernel(const __grid_constant__ fgqa_params params, const float2 *stats, int64_t tasks, int64_t key_tiles)
{
    __shared__ tile_memory m;
    __shared__ float2 row_stats[ROWS];
    __shared__ float of_rows[ROWS / PER_THREAD][KEYS];
    const fgqa_problem &p = params.problem;
    for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
        const sequence_part part = part_make(p, task / key_tiles, p.hq);      /* every query head alone */
        const fgqa_mask &mask = part.sequence.mask;
        const int32_t h = part.kv_head, j0 = (int32_t)(task % key_tiles) * KEYS;
        fgqa_range rows = {0, 0};
        if (j0 < mask.sk) { rows = fgqa_q_range(&mask, j0, min(j0 + KEYS, mask.sk)); }
        float sum[PER_THREAD] = {};
        for (int32_t i0 = rows.begin / ROWS * ROWS; i0 < rows.end; i0 += ROWS) {
            __syncthreads();
            if (threadIdx.x < ROWS) {
                const int32_t i = i0 + threadIdx.x;
                describe_row<T>(m, params, part, threadIdx.x, h, i < rows.end ? i : -1);
                if (i < rows.end) { row_stats[threadIdx.x] = stats[stats_at(p, part, h, i)]; }
            }
            __syncthreads();
            float s[PER_THREAD][PER_THREAD];
            tile_scores<T>(s, m, params, part, fgqa_kv_head(h, p.g), j0);
#pragma unroll
            for (int r = 0; r < PER_THREAD; r++) {
                const float2 of_row = row_stats[threadIdx.x / LANES * PER_THREAD + r];
#pragma unroll
                for (int c = 0; c < PER_THREAD; c++) { sum[c] += weight_of(s[r][c], of_row.x, of_row.y); }
            }
        }
        __syncthreads();
#pragma unroll
        for (int c = 0; c < PER_THREAD; c++) { of_rows[threadIdx.x / LANES][threadIdx.x % LANES * PER_THREAD + c] = sum[c]; }
        __syncthreads();
        const int32_t j = j0 + threadIdx.x;
        if (threadIdx.x < KEYS && j < p.sk) {
            float whole = 0.0f;
            for (int n = 0; n < ROWS / PER_THREAD; n++) { whole += of_rows[n][threadIdx.x]; }
            weights_at(p, part.b, h, 0)[j] = whole;
        }
    }
}

extern "C" int fgqa_weights_keysum(const fgqa_plan *, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    const fgqa_params params = fgqa_params_make(problem);
    const int64_t row_tiles = tiles_of((int64_t)problem->sq * problem->g, ROWS), key_tiles = tiles_of(problem->sk, KEYS);
    const int64_t stats_tasks = (int64_t)problem->b * problem->hk * row_tiles, tasks = (int64_t)problem->b * problem->hq * key_tiles;
    float2 *stats = (float2 *)workspace;
    const auto of_rows = problem->dtype == FGQA_BF16 ? row_stats_kernel<bf16> : problem->dtype == FGQA_F16 ? row_stats_kernel<f16> : row_stats_kernel<f32>;
    const auto of_keys = problem->dtype == FGQA_BF16 ? key_sums_kernel<bf16> : problem->dtype == FGQA_F16 ? key_sums_kernel<f16> : key_sums_kernel<f32>;
    if (stats_tasks > 0) {
        const cudaError_t error = launch_kernel(of_rows, grid_of(stats_tasks), THREADS, 0, exec->stream, params, stats, stats_tasks, row_tiles);
        if (error != cudaSuccess) { return error; }
    }
    return launch_kernel(of_keys, grid_of(tasks), THREADS, 0, exec->stream, params, (const float2 *)stats, tasks, key_tiles);
}

/* ---- planning ---- */

extern "C" void fgqa_weights_tile(const fgqa_problem *problem, fgqa_plan *plan)
{
    const int64_t key_tiles = tiles_of(problem->sk, KEYS);
    plan->block_q = ROWS;
    plan->block_k = KEYS;
    if (problem->pass == FGQA_PASS_ROWS) {
        plan->tasks = (int64_t)problem->b * problem->hk * tiles_of((int64_t)problem->n_rows * problem->g, ROWS) * key_tiles;
        return;
    }
    plan->tasks = (int64_t)problem->b * problem->hq * key_tiles;
    plan->workspace_bytes = (size_t)problem->hq * (size_t)problem->total_q * sizeof(float2);
}

extern "C" int32_t fgqa_weights_smem(void) { return (int32_t)(sizeof(tile_memory) + ROWS * sizeof(float2) + ROWS / PER_THREAD * KEYS * sizeof(float)); }
