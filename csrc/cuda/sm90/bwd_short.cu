/* bwd_short.cu - the backward of short sequences for Hopper: all rows and keys of a head in shared memory at once. Compiled once
 * per short bwd row of kernels.def.
 *
 * One launch and no scratch memory: a block has one head of one sequence, makes delta of its rows itself, and dQ, which waits for
 * no other key tiles, in the type of q. What a block overlaps with are the other blocks of its multiprocessor. A warpgroup has 64
 * keys, whose scores it holds transposed (bwd_fragments.cuh), and 64 rows of dQ:
 *     delta; S, P of all rows; dV; dP, dS of all rows; when all have read V and dO, dS in their place; dK; dQ of all dS
 * P and dS of all rows before dV and dK of any, so that their sums are not in registers beside scores: 128 are all that there
 * are.
 */
#include "../common/launch.cuh"
#include "../common/mask_tensor.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"
#include "../common/ptx_sync.cuh"
#include "../common/ptx_tma.cuh"
#include "../common/softmax.cuh"
#include "../common/swizzle.cuh"
#include "../any/bwd_workspace.h"
#include "../kernel_table.h"
#include "../tensor_map.h"
#include "bwd_short.h"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)

#ifndef FGQA_NO_CODE

#include "../common/ptx_ldmatrix.cuh"
#include "bwd_wgmma.cuh"
#include "warpgroup.cuh"

typedef FGQA_DTYPE T;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, BLOCK_K = FGQA_BLOCK_K, CHUNKS = D / CHUNK;
static constexpr int SM_BYTES = 228 * 1024;
static constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;
static_assert(D == DV && (D == 64 || D == 128) && BLOCK_Q == 16384 / D && BLOCK_K == BLOCK_Q && FGQA_STAGES == 1 && FGQA_WARPS == BLOCK_Q / 16, "kernels.def: sizes that there are");

struct short_params {
    CUtensorMap q_map, k_map, v_map, dout_map;                   /* dims (column, head, row, batch); box 64 columns x a block's rows */
    fgqa_params common;
    float scale_log2;
    int32_t hides, foreign;                                      /* some rows may not see all keys; rows and keys beyond a sequence hold anything */
    int32_t vector_dq, vector_dk, vector_dv;
};

/* SIZE: most rows, and most keys. dS takes the place of V and dO, of all four what attend_carefully() computes with. */
template <int SIZE> struct short_tile {
    T q[CHUNKS][SIZE * CHUNK], k[CHUNKS][SIZE * CHUNK];
    union {
        struct { T v[CHUNKS][SIZE * CHUNK], dout[CHUNKS][SIZE * CHUNK]; };
        T ds[SIZE / 64][SIZE * 64];                              /* [64 rows][key][row] */
    };
    float lse2[SIZE], delta[SIZE];                               /* in the order of bwd_stats_slot() */
    fgqa_range rows[SIZE];                                       /* that see each key */
    uint64_t dout_full, scores_full, v_full;                     /* scores: of Q and K */
    struct { uint32_t rows[SIZE / 32], keys[SIZE / 32]; } poisoned, reached;      /* by take_poison_out(), a bit each */
    int32_t some_reached;
};

#include "bwd_fragments.cuh"

template <int SIZE> static constexpr int FIT = SM_BYTES / (int)(sizeof(short_tile<SIZE>) + 1024);
template <int SIZE> static constexpr int RUN = SIZE == 64 ? (D == 64 ? 5 : 3) : SIZE == 128 && D == 64 ? 2 : 1;      /* by registers */
template <int SIZE> static constexpr int BLOCKS = FIT<SIZE> < RUN<SIZE> ? FIT<SIZE> : RUN<SIZE>;

/* ---- what is not finite ---- */

/* poison_test() of eight elements. */
static __device__ __forceinline__ uint32_t test_eight(const uint4 &x, uint32_t sum) { return poison_test(x.w, poison_test(x.z, poison_test(x.y, poison_test(x.x, sum, T()), T()), T()), T()); }
static __device__ __forceinline__ bool has_poison(uint32_t sum) { return (sum & 0x7FFF7FFF) != 0; }

/* Whether an element of a tensor's tile is inf or NaN, as far as this thread looks. */
template <int SIZE> static __device__ __forceinline__ bool is_poisoned(const T (&x)[CHUNKS][SIZE * CHUNK])
{
    uint32_t sum = 0;
#pragma unroll
    for (int n = (int)threadIdx.x; n < (int)sizeof(x) / 16; n += 2 * SIZE) { sum = test_eight(((const uint4 *)x)[n], sum); }
    return has_poison(sum);
}

/* Eight elements of which one is inf or NaN become 0, and their row is noted. */
template <int SIZE> static __device__ __forceinline__ void clean(T (&x)[CHUNKS][SIZE * CHUNK], uint32_t (&poisoned)[SIZE / 32])
{
#pragma unroll 1
    for (int n = (int)threadIdx.x; n < (int)sizeof(x) / 16; n += 2 * SIZE) {
        uint4 &eight = ((uint4 *)x)[n];
        if (!has_poison(test_eight(eight, 0))) { continue; }
        eight = make_uint4(0, 0, 0, 0);
        atomicOr(&poisoned[n / 8 % SIZE / 32], 1u << n / 8 % 32);
    }
}

static __device__ __forceinline__ bool has(const uint32_t *bits, int n) { return bits[n / 32] >> n % 32 & 1; }

/* Weights and dS are 0 where a row does not see a key, but 0 * NaN is NaN: products find no inf and NaN in Q, dO and K, so
 * that what none of it reaches has the bits that it would have with any finite values there. What is left in V, LSE and delta
 * is in pairs that are seen. reached: rows and keys of pairs that are seen and of which one is poisoned. */
template <int SIZE> static __device__ __noinline__ void take_poison_out(short_tile<SIZE> &sm)
{
    const int thread = (int)threadIdx.x;
    if (thread < SIZE / 32) { sm.poisoned.rows[thread] = sm.poisoned.keys[thread] = 0; }
    __syncthreads();
    clean<SIZE>(sm.q, sm.poisoned.rows);
    clean<SIZE>(sm.dout, sm.poisoned.rows);
    clean<SIZE>(sm.k, sm.poisoned.keys);
    fence_proxy_async();
    __syncthreads();
    if (thread >= SIZE) { return; }
    const auto is_reached = [&](int row, int key) {
        const fgqa_range seen = sm.rows[key];
        return seen.begin <= row && row < seen.end && (has(sm.poisoned.rows, row) || has(sm.poisoned.keys, key));
    };
    bool row = false, key = false;
    for (int n = 0; n < SIZE; n++) {
        row |= is_reached(thread, n);
        key |= is_reached(n, thread);
    }
    const uint32_t rows = __ballot_sync(ALL_LANES, row), keys = __ballot_sync(ALL_LANES, key);
    if (thread % 32 == 0) {
        sm.reached.rows[thread / 32] = rows;
        sm.reached.keys[thread / 32] = keys;
        if (rows) { sm.some_reached = true; }
    }
}

static __device__ __forceinline__ float row_dot(const char *a, const char *b, int32_t count)
{
    float sum = 0.0f;
    for (int32_t n = 0; n < count; n++) { sum = fmaf(to_float(((const T *)a)[n]), to_float(((const T *)b)[n]), sum); }
    return sum;
}

/* Rows of which attend_carefully() holds all weights at once. */
template <int SIZE> static constexpr int CAREFUL_FIT = offsetof(short_tile<SIZE>, lse2) / (SIZE * sizeof(float));
template <int SIZE> static constexpr int CAREFUL_ROWS = CAREFUL_FIT<SIZE> < SIZE ? CAREFUL_FIT<SIZE> : SIZE;

/* Adds to every element of a gradient of reached keys, of which a thread has each 2 SIZE-th, what rows i0 .. have in it. */
template <int SIZE>
static __device__ void add_rows(float (&sums)[D / 2], const fgqa_problem &problem, short_tile<SIZE> &sm, int32_t b, int32_t h, int32_t i0, fgqa_arg factor, int32_t d)
{
    const float *matrix = (const float *)sm.q;
    for (int32_t n = (int32_t)threadIdx.x, own = 0; n < problem.sk * d; n += 2 * SIZE, own++) {
        const int32_t j = n / d, column = n % d;
        if (!has(sm.reached.keys, j)) { continue; }
        for (int32_t i = max(i0, sm.rows[j].begin); i < min(i0 + CAREFUL_ROWS<SIZE>, sm.rows[j].end); i++) {
            sums[own] = fmaf(matrix[(i - i0) * SIZE + j], to_float(((const T *)fgqa_row_address(problem.view[factor], sizeof(T), b, h, i))[column]), sums[own]);
        }
    }
}

template <int SIZE>
static __device__ void write_sums(const float (&sums)[D / 2], const fgqa_view &view, const short_tile<SIZE> &sm, int32_t b, int32_t h, int32_t keys, int32_t d, float scale)
{
    for (int32_t n = (int32_t)threadIdx.x, own = 0; n < keys * d; n += 2 * SIZE, own++) {
        if (has(sm.reached.keys, n / d)) { from_float((T *)fgqa_row_address(view, sizeof(T), b, h, n / d) + n % d, sums[own] * scale); }
    }
}

/* Gradients of what is reached once more, over what products of tiles without inf and NaN have left there: by the equations,
 * of visible pairs alone. */
template <int SIZE> static __device__ __noinline__ void attend_carefully(const short_params &p, short_tile<SIZE> &sm, int32_t b, int32_t h)
{
    const fgqa_problem &problem = p.common.problem;
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
    const fgqa_mask &mask = sequence.mask;
    float *matrix = (float *)sm.q, dk[D / 2] = {}, dv[DV / 2] = {};
    for (int32_t i0 = 0; i0 < mask.sq; i0 += CAREFUL_ROWS<SIZE>) {
        const auto for_pairs = [&](const auto &make) {
            __syncthreads();
            for (int32_t n = (int32_t)threadIdx.x; n < min(mask.sq - i0, CAREFUL_ROWS<SIZE>) * mask.sk; n += 2 * SIZE) { make(i0 + n / mask.sk, n % mask.sk, matrix[n / mask.sk * SIZE + n % mask.sk]); }
            __syncthreads();
        };
        for_pairs([&](int32_t i, int32_t j, float &x) {
            const float s = row_dot(fgqa_row_address(problem.view[FGQA_ARG_q], sizeof(T), b, h, i), fgqa_row_address(problem.view[FGQA_ARG_k], sizeof(T), b, h, j), problem.d);
            x = ex2(fmaf(s, p.scale_log2, -sm.lse2[bwd_stats_slot(i)]));
        });
        add_rows<SIZE>(dv, problem, sm, b, h, i0, FGQA_ARG_dout, problem.dv);
        for_pairs([&](int32_t i, int32_t j, float &x) {
            const float dp = row_dot(fgqa_row_address(problem.view[FGQA_ARG_dout], sizeof(T), b, h, i), fgqa_row_address(problem.view[FGQA_ARG_v], sizeof(T), b, h, j), problem.dv);
            x *= dp - sm.delta[bwd_stats_slot(i)];
        });
        add_rows<SIZE>(dk, problem, sm, b, h, i0, FGQA_ARG_q, problem.d);
        for (int32_t n = (int32_t)threadIdx.x; n < min(mask.sq - i0, CAREFUL_ROWS<SIZE>) * problem.d; n += 2 * SIZE) {
            const int32_t i = i0 + n / problem.d, column = n % problem.d;
            if (!has(sm.reached.rows, i)) { continue; }
            float sum = 0.0f;
            for (int32_t j = 0; j < mask.sk; j++) {
                if (i < sm.rows[j].begin || i >= sm.rows[j].end) { continue; }
                sum = fmaf(matrix[(i - i0) * SIZE + j], to_float(((const T *)fgqa_row_address(problem.view[FGQA_ARG_k], sizeof(T), b, h, j))[column]), sum);
            }
            from_float((T *)fgqa_row_address(problem.view[FGQA_ARG_dq], sizeof(T), b, h, i) + column, sum * p.common.scale);
        }
    }
    write_sums<SIZE>(dv, problem.view[FGQA_ARG_dv], sm, b, h, problem.sk, problem.dv, 1.0f);
    write_sums<SIZE>(dk, problem.view[FGQA_ARG_dk], sm, b, h, problem.sk, problem.d, p.common.scale);
}

/* Rows of a tile from `first` on become 0: beyond a sequence memory may hold NaN. */
template <int SIZE> static __device__ __forceinline__ void clear_rows(T (&x)[CHUNKS][SIZE * CHUNK], int32_t first)
{
    for (int32_t n = 8 * first + (int32_t)threadIdx.x; n < 8 * SIZE; n += 2 * SIZE) {
        for (int c = 0; c < CHUNKS; c++) { ((uint4 *)x[c])[n] = make_uint4(0, 0, 0, 0); }
    }
}

/* ---- products ---- */

/* S or dP of 64 keys and 64 rows, from that key and row on. */
template <int SIZE> static __device__ __forceinline__ void score_products(float (&x)[32], uint64_t keys, uint64_t rows)
{
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        const int from = (n / 4 * SIZE * 128 + n % 4 * 32) / 16;
        wgmma64<0>(x, keys + from, rows + from, n == 0);
    }
    wgmma_commit();
}

/* Tiles of 64 rows whose P, then dS, a lane keeps in registers. Those of others are in their places in ds[], of which V and dO
 * have none. */
static constexpr int KEPT = 2;
static_assert(BLOCK_K <= 64 * KEPT || 64 * KEPT >= 2 * D, "V and dO reach into no other place in ds[]");

/* dV or dK of 64 keys: the sum over rows of P or dS times dO or Q. */
template <int SIZE> static __device__ __forceinline__ void key_products(float (&sum)[D / 2], const uint32_t (&pairs)[KEPT][16], const short_tile<SIZE> &sm, int wg, const T *rows)
{
    const uint64_t columns = wgmma_desc_sw128(smem_address(rows), SIZE * 128, 1024);
#pragma unroll
    for (int n = 0; n < SIZE / 16; n++) {
        if (n / 4 < KEPT) {
            wgmma_rs_bt(sum, pairs[n / 4] + n % 4 * 4, columns + n * 2048 / 16, n > 0);
        } else {
            wgmma64<0, 1>((float (&)[32])sum, wgmma_desc_sw128(smem_address(sm.ds[n / 4]) + wg * 64 * 128 + n % 4 * 32, 0, 1024), columns + n * 2048 / 16, false);
        }
    }
    wgmma_commit();
}

/* What store_gradients() has stored. */
static __device__ __forceinline__ void load_pairs(uint32_t (&pairs)[16], uint32_t from, int wg)
{
    const int here = (int)thread_index() & 127;
    const uint32_t row = from + (wg * 64 + here / 32 * 16 + (here & 15)) * 128;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        ldmatrix_x4((uint32_t (&)[4])pairs[4 * n], row + ((n * 32 + (here >> 4 & 1) * 16) ^ ((here & 7) << 4)));
    }
}

/* Stores of a warpgroup's threads are there for its products. */
static __device__ __forceinline__ void meet_warpgroup(int wg)
{
    fence_proxy_async();
    bar_sync(1 + wg, 128);
}

/* ---- the kernel ---- */

/* rowsum(dO O) - dlse of all rows: O from where it lies, dO from shared memory. */
template <int SIZE> static __device__ __forceinline__ void make_delta(const short_params &p, short_tile<SIZE> &sm, const fgqa_sequence &sequence, int32_t b, int32_t h)
{
    constexpr int LANES = D / 8, TURNS = LANES / 2, AT_A_TIME = 2 * SIZE / LANES;
    const fgqa_problem &problem = p.common.problem;
    const fgqa_view &dlse = problem.view[FGQA_ARG_dlse];
    const int part = (int)threadIdx.x % LANES, first = (int)threadIdx.x / LANES;
    uint4 out[TURNS];
    float less[TURNS];                                           /* rows that do not exist have a delta of 0 */
#pragma unroll
    for (int n = 0; n < TURNS; n++) {
        const int row = first + n * AT_A_TIME;
        const bool exists = row < sequence.mask.sq;
        out[n] = make_uint4(0, 0, 0, 0);
        less[n] = 0.0f;
        if (exists && 8 * part < problem.dv) { out[n] = *(const uint4 *)(fgqa_row_address(problem.view[FGQA_ARG_out], sizeof(T), b, h, row) + 16 * part); }
        if (exists && part == 0 && dlse.data) { less[n] = *(const float *)fgqa_row_address(dlse, sizeof(float), b, h, row); }
    }
    mbarrier_wait(smem_address(&sm.dout_full), 0);
#pragma unroll
    for (int n = 0; n < TURNS; n++) {
        const int row = first + n * AT_A_TIME;
        uint4 dout = make_uint4(0, 0, 0, 0);
        if (row < sequence.mask.sq) { dout = *(const uint4 *)((const char *)sm.dout[part / 8] + row * 128 + ((part % 8) ^ (row % 8)) * 16); }
        float sum = 0.0f;
#pragma unroll
        for (int m = 0; m < 8; m++) { sum = fmaf(to_float(((const T *)&out[n])[m]), to_float(((const T *)&dout)[m]), sum); }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) { sum += __shfl_xor_sync(ALL_LANES, sum, step, LANES); }
        if (part == 0) { sm.delta[bwd_stats_slot(row)] = sum - less[n]; }
    }
}

template <int SIZE> static __global__ void __launch_bounds__(2 * SIZE, BLOCKS<SIZE>) short_kernel(const __grid_constant__ short_params p)
{
    extern __shared__ __align__(1024) char memory[];
    short_tile<SIZE> &sm = *(short_tile<SIZE> *)memory;
    const fgqa_problem &problem = p.common.problem;
    const int32_t thread = (int32_t)threadIdx.x, b = (int32_t)(blockIdx.x / (uint32_t)problem.hq), h = (int32_t)(blockIdx.x % (uint32_t)problem.hq);
    if (thread == 0) {
        const uint64_t once = createpolicy_evict_first();
        const uint32_t dout_full = smem_address(&sm.dout_full), scores_full = smem_address(&sm.scores_full), v_full = smem_address(&sm.v_full);
        mbarrier_init(dout_full, 1);
        mbarrier_init(scores_full, 1);
        mbarrier_init(v_full, 1);
        fence_mbarrier_init();
        sm.some_reached = false;
        mbarrier_arrive_expect_tx(dout_full, sizeof(sm.dout));
        for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(sm.dout[c]), &p.dout_map, dout_full, once, c * CHUNK, h, 0, b); }
        mbarrier_arrive_expect_tx(scores_full, sizeof(sm.q) + sizeof(sm.k));
        for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(sm.k[c]), &p.k_map, scores_full, once, c * CHUNK, h, 0, b); }
        for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(sm.q[c]), &p.q_map, scores_full, once, c * CHUNK, h, 0, b); }
        mbarrier_arrive_expect_tx(v_full, sizeof(sm.v));
        for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(sm.v[c]), &p.v_map, v_full, once, c * CHUNK, h, 0, b); }
    }
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
    const fgqa_mask &mask = sequence.mask;
    if (thread < SIZE) {
        float lse = -INFINITY;
        if (thread < mask.sq) { lse = *(const float *)fgqa_row_address(problem.view[FGQA_ARG_lse], sizeof(float), b, h, thread); }
        sm.lse2[bwd_stats_slot(thread)] = lse == -INFINITY ? INFINITY : lse * (float)FGQA_LOG2E;
        fgqa_range seen = {0, 0};
        const bool is_key = thread < mask.sk && mask_shows(problem, b, h, 0, thread);      /* all rows share the tensor */
        if (is_key) { seen = p.hides ? fgqa_q_range(&mask, thread, thread + 1) : fgqa_range{0, mask.sq}; }
        sm.rows[thread] = seen;
    }
    __syncthreads();                                             /* barriers are there */
    make_delta<SIZE>(p, sm, sequence, b, h);
    mbarrier_wait(smem_address(&sm.scores_full), 0);
    if (p.foreign) {
        clear_rows<SIZE>(sm.dout, mask.sq);
        clear_rows<SIZE>(sm.q, mask.sq);
        clear_rows<SIZE>(sm.k, mask.sk);
        fence_proxy_async();
    }
    __syncthreads();
    if (p.hides) {
        const bool poisoned = is_poisoned<SIZE>(sm.q) || is_poisoned<SIZE>(sm.k) || (thread < SIZE && !isfinite(sm.delta[thread]));
        if (__syncthreads_or(poisoned)) { take_poison_out<SIZE>(sm); }
    }

    constexpr int TILES = SIZE / 64;                             /* of 64 rows */
    constexpr bool AHEAD = TILES == 2;                           /* there are registers for dP of two; S of two there are for a while */
    constexpr int S_AHEAD = TILES <= 2 ? TILES : 2;
    const int wg = __shfl_sync(ALL_LANES, thread / 128, 0), lane = thread % 32, own = wg * 64 + thread % 128 / 32 * 16 + lane / 4;      /* key, and row of dQ; and 8 further */
    const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k) + wg * 64 * 128, 0, 1024), v_rows = wgmma_desc_sw128(smem_address(sm.v) + wg * 64 * 128, 0, 1024);
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q), 0, 1024), dout_rows = wgmma_desc_sw128(smem_address(sm.dout), 0, 1024);
    constexpr uint64_t NEXT = HALF * 128 / 16;
    const bool partial = p.hides || mask.sq < SIZE || mask.sk < SIZE;
    uint32_t pairs[KEPT][16];
    float4 stats[4];
    {
        float s[2][32];
        wgmma_fence();
        score_products<SIZE>(s[0], k_rows, q_rows);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float (&x)[32] = s[t % 2];
            const bool follows = t + 1 < S_AHEAD;
            wgmma_fence();
            if (follows) { score_products<SIZE>(s[(t + 1) % 2], k_rows, q_rows + (t + 1) * NEXT); }
            if (t >= S_AHEAD) { score_products<SIZE>(x, k_rows, q_rows + t * NEXT); }
            load_stats(stats, sm.lse2, t, lane);
            if (follows) { wgmma_wait<1>(); } else { wgmma_wait<0>(); }
            uint32_t weights[16];
#pragma unroll
            for (int n = 0; n < 8; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) { x[4 * n + e] = ex2(fmaf(x[4 * n + e], p.scale_log2, -of_row(stats, n, e % 2))); }
                weights[2 * n] = pack2(x[4 * n], x[4 * n + 1], T());
                weights[2 * n + 1] = pack2(x[4 * n + 2], x[4 * n + 3], T());
            }
            if (partial) { hide(weights, tile_mask(sm.rows + wg * 64, t * 64)); }
            if (t >= KEPT) { store_gradients(smem_address(sm.ds[t]), weights, wg); }
#pragma unroll
            for (int n = 0; n < 16 && t < KEPT; n++) { pairs[t][n] = weights[n]; }
        }
    }
    if (TILES > KEPT) { meet_warpgroup(wg); }
    mbarrier_wait(smem_address(&sm.v_full), 0);
    const fgqa_view &dv_view = problem.view[FGQA_ARG_dv], &dk_view = problem.view[FGQA_ARG_dk], &dq_view = problem.view[FGQA_ARG_dq];
    float dv[DV / 2], dk[D / 2], dq[D / 2];
    wgmma_fence();
    key_products<SIZE>(dv, pairs, sm, wg, sm.dout[0]);
    wgmma_wait<0>();
    if (TILES > KEPT) { meet_warpgroup(wg); }
    {
        float dp[2][32];
        wgmma_fence();
        if (AHEAD) { score_products<SIZE>(dp[0], v_rows, dout_rows); }
        write_rows(dv, 1.0f, fgqa_row_address(dv_view, sizeof(T), b, h, own), dv_view.stride_s, problem.sk - own, problem.dv, p.vector_dv, lane);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            float (&x)[32] = dp[AHEAD ? t : 0];
            const int next = AHEAD ? t + 1 : t;
            wgmma_fence();
            if (next < TILES) { score_products<SIZE>(dp[AHEAD ? next : 0], v_rows, dout_rows + next * NEXT); }
            load_stats(stats, sm.delta, t, lane);
            uint32_t gradients[16];
            if (t >= KEPT) { load_pairs(gradients, smem_address(sm.ds[t]), wg); }
#pragma unroll
            for (int n = 0; n < 16 && t < KEPT; n++) { gradients[n] = pairs[t][n]; }
            if (AHEAD && next < TILES) { wgmma_wait<1>(); } else { wgmma_wait<0>(); }
            make_gradients(gradients, gradients, x, stats);
            if (partial) { hide(gradients, tile_mask(sm.rows + wg * 64, t * 64)); }
            if (t >= KEPT) { store_gradients(smem_address(sm.ds[t]), gradients, wg); }
#pragma unroll
            for (int n = 0; n < 16 && t < KEPT; n++) { pairs[t][n] = gradients[n]; }
        }
    }
    fence_proxy_async();
    __syncthreads();                                             /* V and dO were used by all */
#pragma unroll
    for (int t = 0; t < TILES && t < KEPT; t++) { store_gradients(smem_address(sm.ds[t]), pairs[t], wg); }
    fence_proxy_async();
    wgmma_fence();
    key_products<SIZE>(dk, pairs, sm, wg, sm.q[0]);
    __syncthreads();                                             /* dS of all is there */
    wgmma_wait<0>();
    wgmma_fence();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) { query_products<SIZE>((float (&)[32])dq[32 * c], smem_address(sm.ds[wg]), wgmma_desc_sw128(smem_address(sm.k[c]), 0, 1024)); }
    write_rows(dk, p.common.scale, fgqa_row_address(dk_view, sizeof(T), b, h, own), dk_view.stride_s, problem.sk - own, problem.d, p.vector_dk, lane);
    wgmma_wait<0>();
    write_rows(dq, p.common.scale, fgqa_row_address(dq_view, sizeof(T), b, h, own), dq_view.stride_s, problem.sq - own, problem.d, p.vector_dq, lane);
    if (p.hides && sm.some_reached) { attend_carefully<SIZE>(p, sm, b, h); }
}

/* ---- host ---- */

/* With the smallest tile that holds all rows and keys. */
template <int SIZE> static int launch(short_params &p, const fgqa_problem *problem, cudaStream_t stream)
{
    if constexpr (SIZE < BLOCK_K) {
        if (problem->sq > SIZE || problem->sk > SIZE) { return launch<2 * SIZE>(p, problem, stream); }
    }
    static launch_state state;
    const fgqa_map_box box = {CHUNK, 1, SIZE};
    int error = fgqa_tensor_map(&p.q_map, problem, FGQA_ARG_q, box);
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.k_map, problem, FGQA_ARG_k, box); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.v_map, problem, FGQA_ARG_v, box); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.dout_map, problem, FGQA_ARG_dout, box); }
    if (error == cudaSuccess) { error = allow_shared_memory((const void *)short_kernel<SIZE>, sizeof(short_tile<SIZE>), problem->device.index, &state); }
    if (error != cudaSuccess) { return error; }
    return launch_kernel(short_kernel<SIZE>, (uint32_t)problem->b * (uint32_t)problem->hq, 2 * SIZE, sizeof(short_tile<SIZE>), stream, p);
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(short_tile<BLOCK_K>); }

extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *problem, void *, const fgqa_exec *exec)
{
    short_params p;
    p.common = fgqa_params_make(problem);
    p.scale_log2 = p.common.scale * (float)FGQA_LOG2E;
    p.foreign = problem->q_lens || problem->kv_lens;
    p.hides = p.foreign || problem->view[FGQA_ARG_mask].data || problem->left != FGQA_UNBOUNDED || problem->right != FGQA_UNBOUNDED || problem->chunk > 0;
    p.vector_dq = fgqa_view_is_vector(problem, FGQA_ARG_dq);
    p.vector_dk = fgqa_view_is_vector(problem, FGQA_ARG_dk);
    p.vector_dv = fgqa_view_is_vector(problem, FGQA_ARG_dv);
    return launch<FGQA_BWD_LEAST_WHOLE>(p, problem, (cudaStream_t)exec->stream);
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
