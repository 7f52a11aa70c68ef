/* bwd_poison.cu - with a soft cap, after the kernels for Hopper: gradients where q or k are infinite.
 *
 * An infinite score becomes the cap, so that its weight is finite, and dS = P (1 - t^2) (dP - delta) is 0. That 0 meets what is
 * infinite:
 *     dQ of rows that see an infinite key, dK of keys that an infinite row sees: NaN in the columns that are not finite
 *     dV: the usual sums
 * The main kernel takes keys that are inf or NaN as unseen. An infinite q leaves NaN in its column of dK of all keys that its
 * products meet, seen or not. Both are noted, 16 keys at a time (bwd_poisoned_keys()), and here these keys' gradients are made
 * from the equations: by a block a key tile, a key at a time, whose rows its warps share out. Where nothing was noted it reads a
 * few words.
 */
#include "../common/dropout.cuh"
#include "../common/launch.cuh"
#include "../common/softcap.cuh"
#include "bwd_rows.cuh"
#include "score_units.h"

static constexpr int WARPS = THREADS / 32, COLUMNS = 8, MOST_COLUMNS = 32 * COLUMNS;      /* of a lane; of a row */
static_assert(MOST_COLUMNS == THREADS, "in the end a thread has a column");
static constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;

struct key_tile {
    fgqa_sequence sequence;
    int32_t b, kv_head, tile, keys;       /* keys of the sequence that have a gradient, padding included */
};

/* Whether the mask tensor and the bias let a row see a key. */
static __device__ __forceinline__ bool row_sees(const fgqa_problem &p, int32_t b, int32_t h, int32_t i, int32_t j)
{
    const fgqa_view &bias = p.view[FGQA_ARG_bias];
    return mask_shows(p, b, h, i, j) && !(bias.data && load_float(bias.data, b * bias.stride_b + h * bias.stride_h + i * bias.stride_s + j * bias.stride_d, bias.dtype) == -INFINITY);
}

/* Float32 units of scores, as the main kernel's. */
struct units { float in_caps, scale_log2; };

static __device__ __forceinline__ bool find_tile(const fgqa_problem &p, const fgqa_bwd_workspace &w, key_tile *t)
{
    const int32_t pair = (int32_t)(blockIdx.x / w.kv_head_tiles);
    int32_t rows;
    t->tile = (int32_t)(blockIdx.x % w.kv_head_tiles);
    t->b = p.varlen ? bwd_packed_sequence<true>(p, w.block_k, t->tile) : pair / p.hk;
    t->kv_head = pair % p.hk;
    t->sequence = fgqa_device_sequence(p, t->b, &rows);
    if (p.varlen) { t->tile -= (int32_t)(t->sequence.k_row / w.block_k) + t->b; }
    t->keys = p.varlen ? t->sequence.mask.sk : p.sk;
    return t->tile >= 0 && (int64_t)t->tile * w.block_k < t->keys;
}

static __device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int step = 16; step > 0; step /= 2) { x += __shfl_xor_sync(ALL_LANES, x, step); }
    return x;
}

static __device__ __forceinline__ bool finite_row(const float (&x)[COLUMNS])
{
    bool finite = true;
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) { finite &= (bool)isfinite(x[n]); }
    return __all_sync(ALL_LANES, finite);
}

/* lse2 of a row; delta is block_q floats behind. */
static __device__ __forceinline__ const float *stats_of(const fgqa_problem &p, const fgqa_bwd_workspace &w, const key_tile &t, int32_t h, int32_t i)
{
    return bwd_tiled_stats(w, bwd_q_tile(p, w, t.b, h, t.sequence.q_row, i / w.block_q), i);
}

/* A lane's columns of dK, without its scale, and of dV, from the rows of its warp. */
template <typename T>
static __device__ __forceinline__ void sum_rows(float (&dk)[COLUMNS], float (&dv)[COLUMNS], const fgqa_params &params, const fgqa_bwd_workspace &w, const key_tile &t,
                                                int32_t j, fgqa_range seen, const float (&k)[COLUMNS], const units &units)
{
    const fgqa_problem &p = params.problem;
    const int warp = (int)threadIdx.x / 32, column = (int)threadIdx.x % 32 * COLUMNS;
    const fgqa_view &slopes = p.view[FGQA_ARG_alibi_slopes], &bias = p.view[FGQA_ARG_bias];
    const dropout_key key = dropout_key_make(p);
    float v[COLUMNS];
    load_eight<T>(v, fgqa_row_address(p.view[FGQA_ARG_v], sizeof(T), t.b, t.kv_head, t.sequence.k_row + j), column, p.dv, params.vector_v);
    for (int32_t h = t.kv_head * p.g; h < (t.kv_head + 1) * p.g; h++) {
        const float slope = slopes.data ? load_float(slopes.data, t.b * slopes.stride_b + h * slopes.stride_h, slopes.dtype) : 0.0f;
        for (int32_t i = seen.begin + warp; i < seen.end; i += WARPS) {
            if (!row_sees(p, t.b, h, i, j)) { continue; }
            const float *stats = stats_of(p, w, t, h, i);
            const float lse2 = stats[0], delta = stats[w.block_q];
            bool kept = true;
            if (p.dropout_threshold != 0) {
                const fgqa_philox_block bits = fgqa_dropout_bits(key.seed, key.offset, (uint32_t)j / 8, (uint32_t)i, (uint32_t)t.b * (uint32_t)p.hq + (uint32_t)h);
                kept = fgqa_dropout_keeps(fgqa_dropout_half(&bits, j % 8), key.threshold);
            }
            float q[COLUMNS], dout[COLUMNS], qk = 0.0f, dp = 0.0f;
            load_eight<T>(q, fgqa_row_address(p.view[FGQA_ARG_q], sizeof(T), t.b, h, t.sequence.q_row + i), column, p.d, params.vector_q);
            load_eight<T>(dout, fgqa_row_address(p.view[FGQA_ARG_dout], sizeof(T), t.b, h, t.sequence.q_row + i), column, p.dv, params.vector_dout);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                qk = fmaf(q[n], k[n], qk);
                dp = fmaf(dout[n], v[n], dp);
            }
            const float capped = tanh_score(warp_sum(qk) * units.in_caps);
            const float distance = (float)(i + t.sequence.mask.diag - j);
            float weight;
            if (bias.data) {
                const float x = fmaf(capped, params.softcap, load_float(bias.data, t.b * bias.stride_b + h * bias.stride_h + i * bias.stride_s + j * bias.stride_d, bias.dtype));
                const int64_t q_tile = bwd_q_tile(p, w, t.b, h, t.sequence.q_row, i / w.block_q);
                const float base = w.based[q_tile] ? w.bases[q_tile * w.block_q + i % w.block_q] : 0.0f;
                weight = ex2(fmaf((slopes.data ? fmaf(-slope, fabsf(distance), x) : x) - base, (float)FGQA_LOG2E, -lse2));
            } else {
                weight = ex2(bwd_less_alibi(capped, units.scale_log2, slope * (float)FGQA_LOG2E, distance) - lse2);
            }
            dp = warp_sum(dp);
            const float ds = weight * FGQA_SOFTCAP_GRAD(capped, 1.0f) * ((kept ? dp * params.dropout_scale : 0.0f) - delta), of_dv = weight * params.dropout_scale;
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                dk[n] = fmaf(ds, q[n], dk[n]);
                if (kept) { dv[n] = fmaf(of_dv, dout[n], dv[n]); }
            }
        }
    }
}

static __device__ __forceinline__ fgqa_range rows_of_key(const fgqa_problem &p, const fgqa_bwd_workspace &w, const key_tile &t, int32_t j)
{
    const fgqa_range none = {0, 0};
    return j < t.sequence.mask.sk ? bwd_key_rows(p, w, t.b, t.sequence.k_row)[j] : none;
}

/* By a warp: whether key j is inf or NaN and seen, or its dK not finite. */
template <typename T> static __device__ __forceinline__ bool is_wanted(const fgqa_params &params, const fgqa_bwd_workspace &w, const key_tile &t, int32_t j)
{
    const fgqa_problem &p = params.problem;
    const int column = (int)threadIdx.x % 32 * COLUMNS;
    const fgqa_range seen = rows_of_key(p, w, t, j);
    float k[COLUMNS], dk[COLUMNS];
    load_eight<T>(k, fgqa_row_address(p.view[FGQA_ARG_k], sizeof(T), t.b, t.kv_head, t.sequence.k_row + j), column, p.d, params.vector_k);
    load_eight<T>(dk, fgqa_row_address(p.view[FGQA_ARG_dk], sizeof(T), t.b, t.kv_head, t.sequence.k_row + j), column, p.d, false);
    const bool finite_key = finite_row(k), finite_dk = finite_row(dk);
    return !finite_dk || (!finite_key && seen.begin < seen.end);
}

/* By all threads: the gradients of key j, and dQ of the rows that see it, if it is inf or NaN. */
template <typename T> static __device__ __forceinline__ void redo_key(const fgqa_params &params, const fgqa_bwd_workspace &w, const key_tile &t, int32_t j, const units &units)
{
    __shared__ float sums[WARPS][2][MOST_COLUMNS];
    const fgqa_problem &p = params.problem;
    const fgqa_sequence &sequence = t.sequence;
    const int thread = (int)threadIdx.x, warp = thread / 32, column = thread % 32 * COLUMNS;
    const fgqa_range seen = rows_of_key(p, w, t, j);
    T *const dk_row = (T *)fgqa_row_address(p.view[FGQA_ARG_dk], sizeof(T), t.b, t.kv_head, sequence.k_row + j);
    T *const dv_row = (T *)fgqa_row_address(p.view[FGQA_ARG_dv], sizeof(T), t.b, t.kv_head, sequence.k_row + j);
    float k[COLUMNS];
    load_eight<T>(k, fgqa_row_address(p.view[FGQA_ARG_k], sizeof(T), t.b, t.kv_head, sequence.k_row + j), column, p.d, params.vector_k);
    const bool finite_key = finite_row(k);

    /* Rows whose weights, or dS, are NaN whatever the key: of a finite key dK is right then. dQ of rows without weights is NaN
     * already. */
    bool lost = false, some_left = false;
    for (int32_t h = t.kv_head * p.g; h < (t.kv_head + 1) * p.g; h++) {
        for (int32_t i = seen.begin + thread; i < seen.end; i += THREADS) {
            if (!row_sees(p, t.b, h, i, j)) { continue; }
            const float *stats = stats_of(p, w, t, h, i);
            lost |= isnan(stats[0]) || (finite_key && !isfinite(stats[w.block_q]));
            some_left |= !isnan(stats[0]);
        }
    }
    lost = __syncthreads_or(lost);
    some_left = __syncthreads_or(some_left);
    for (int32_t h = t.kv_head * p.g; some_left && !finite_key && h < (t.kv_head + 1) * p.g; h++) {
        for (int32_t i = seen.begin + warp; i < seen.end; i += WARPS) {
            if (!row_sees(p, t.b, h, i, j)) { continue; }
            T *const dq_row = (T *)fgqa_row_address(p.view[FGQA_ARG_dq], sizeof(T), t.b, h, sequence.q_row + i);
#pragma unroll
            for (int n = 0; n < COLUMNS; n++) {
                if (!isfinite(k[n])) { from_float(dq_row + column + n, NAN); }
            }
        }
    }
    if (lost && finite_key) { return; }

    float dk[COLUMNS] = {}, dv[COLUMNS] = {};
    const bool drops = p.dropout_threshold != 0;           /* dV of keys that such rows drop */
    if (!lost || drops) { sum_rows<T>(dk, dv, params, w, t, j, seen, k, units); }
#pragma unroll
    for (int n = 0; n < COLUMNS; n++) {
        sums[warp][0][column + n] = lost ? NAN : dk[n];
        sums[warp][1][column + n] = lost && !drops ? NAN : dv[n];
    }
    __syncthreads();
    float sum_dk = 0.0f, sum_dv = 0.0f;
    for (int n = 0; n < WARPS; n++) {
        sum_dk += sums[n][0][thread];
        sum_dv += sums[n][1][thread];
    }
    if (thread < p.d && !(finite_key && isfinite(to_float(dk_row[thread])))) { from_float(dk_row + thread, sum_dk * params.scale); }
    if (thread < p.dv && !finite_key) { from_float(dv_row + thread, sum_dv); }
    __syncthreads();                                       /* the sums are no longer read */
}

template <typename T> __global__ void __launch_bounds__(THREADS)
bwd_poison_kernel(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, units units)
{
    const fgqa_problem &p = params.problem;
    __shared__ uint32_t wanted;                            /* of a word's keys, a bit each */
    const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
    key_tile t;
    if (!find_tile(p, w, &t)) { return; }
    const int64_t tile = bwd_k_tile(p, w, t.b, t.kv_head, t.sequence.k_row, t.tile);
    int32_t noted = 0;
    for (int32_t part = 0; lane < w.block_k / FGQA_BWD_KEYS_A_WORD && part < w.splits; part++) { noted |= bwd_poisoned_keys(p, w, part, tile)[lane]; }
    for (uint32_t words = __ballot_sync(ALL_LANES, noted != 0); words; words &= words - 1) {
        const int32_t first = t.tile * w.block_k + FGQA_BWD_KEYS_A_WORD * (__ffs((int)words) - 1);
        __syncthreads();                                   /* the bits of the word before have been read */
        if (threadIdx.x == 0) { wanted = 0; }
        __syncthreads();
        for (int n = warp; n < FGQA_BWD_KEYS_A_WORD && first + n < t.keys; n += WARPS) {
            if (is_wanted<T>(params, w, t, first + n) && lane == 0) { atomicOr(&wanted, 1u << n); }
        }
        __syncthreads();
#pragma unroll 1
        for (uint32_t bits = wanted; bits; bits &= bits - 1) { redo_key<T>(params, w, t, first + __ffs((int)bits) - 1, units); }
    }
}

extern "C" int fgqa_bwd_poison(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream)
{
    const fgqa_params params = fgqa_params_make(problem);
    const units units = {fgqa_in_caps(problem), params.softcap * (float)FGQA_LOG2E};
    const int64_t blocks = fgqa_bwd_k_tiles(problem, w);
    if (blocks == 0 || problem->b == 0) { return cudaSuccess; }
    const auto kernel = problem->dtype == FGQA_BF16 ? bwd_poison_kernel<bf16> : bwd_poison_kernel<f16>;
    return launch_kernel(kernel, (uint32_t)blocks, THREADS, 0, stream, params, *w, units);
}
