/* fwd.cu - attention forward on mma.sync, for every card from Ampere on. Compiled once per fwd row of kernels.def.
 *
 *     S = Q K^T,  P = softmax of S by the score chain and mask of semantics.h,  O = P V,  LSE
 *
 * A block owns BLOCK_Q packed rows (query row x head of the group) of one KV head of one sequence, so that a K/V tile is
 * fetched once for all heads of the group, and walks the keys those rows can see in tiles of BLOCK_K, last tile first.
 * Each warp keeps whole rows in registers: S, and O as it grows. Tiles arrive by cp.async:
 *
 *     STAGES 2   K and V of the next tile are fetched into the other buffer while this one is used; one barrier a tile
 *     STAGES 1   V is fetched under S = Q K^T and the next K under the softmax and O += P V; two barriers a tile, less memory
 *
 * Weights of unseen keys are exactly 0, but 0 * NaN is NaN: when O comes out non-finite, the block walks its keys once more,
 * carefully (gemm.cuh), which keeps unseen values out. So it does where scores are too large for the short form of the
 * exponent. That costs the common case one test at the end.
 *
 * Variant `plain`: interval masks, lengths, sink, aligned rows. Variant `general`: every option, decided at run time. Variant
 * `cache`: those, and keys and values in the slots of a KV cache (cache_tile.cuh).
 */
#include "../common/launch.cuh"
#include "../common/mask_tile.cuh"
#include "../common/params.cuh"
#include "../common/softmax.cuh"
#include "../common/split.cuh"
#include "../common/tile_io.cuh"
#include "../any/fwd_combine.h"
#include "../kernel_table.h"
#include "cache_tile.cuh"
#include "gemm.cuh"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)
typedef FGQA_DTYPE T;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, BLOCK_K = FGQA_BLOCK_K, STAGES = FGQA_STAGES;
static constexpr int THREADS = 32 * FGQA_WARPS, WARP_ROWS = BLOCK_Q / FGQA_WARPS, NB = BLOCK_K / 8, OB = DV / 8;
static constexpr bool CACHE = FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_cache;
static constexpr bool GENERAL = CACHE || FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_general;
static_assert(WARP_ROWS % 16 == 0 && WARP_ROWS * FGQA_WARPS == BLOCK_Q, "kernels.def: block_q is a multiple of 16 rows a warp");
static_assert(DV <= D, "kernels.def: the K tile has room for a V tile");
static_assert(STAGES == 1 || (STAGES == 2 && !CACHE), "kernels.def: one or two stages; of a cache, one");

/* What a variant knows of a row, and does to the scores of two rows; plain: the interval mask alone. */
template <bool> struct variant {
    typedef fgqa_range row;
    static __device__ __forceinline__ void describe(row *r, const fgqa_params &, const fgqa_mask &mask, int32_t, int32_t, int32_t i) { *r = row_range(mask, i); }
    static __device__ __forceinline__ void scores(const fgqa_params &, int32_t, float (&s)[NB][4], const row (&rows)[2], int32_t j0, int lane)
    {
        mask_tile<NB>(s, rows, j0, lane);
    }
    static __device__ __forceinline__ void dropout(const fgqa_params &, float (&)[NB][4], const row (&)[2], int32_t, int) {}
};

template <> struct variant<true> {
    typedef score_row row;
    static __device__ __forceinline__ void describe(row *r, const fgqa_params &params, const fgqa_mask &mask, int32_t b, int32_t h, int32_t i)
    {
        *r = score_row_make(params, mask, b, h, i);
    }
    static __device__ __forceinline__ void scores(const fgqa_params &params, int32_t diag, float (&s)[NB][4], const row (&rows)[2], int32_t j0, int lane)
    {
        score_tile<NB>(params, diag, s, rows, j0, lane);
    }
    static __device__ __forceinline__ void dropout(const fgqa_params &params, float (&s)[NB][4], const row (&rows)[2], int32_t j0, int lane)
    {
        if (params.problem.dropout_threshold != 0) { dropout_tile<NB>(dropout_key_make(params.problem), s, rows, j0, lane); }
    }
};

/* What a block works on: one KV head of one sequence, and of it some packed rows. In shared memory, where reading it again
 * is cheaper than keeping it in registers beside the accumulators. */
struct head_task : cache_task<CACHE> {
    int32_t b, kv_head;
    fgqa_sequence sequence;
    const char *k, *v;          /* row 0 of the sequence; CACHE: its head in page 0, or in its only page */
    int64_t packed;             /* packed rows of the sequence */
};

struct row_block {
    int64_t first;              /* packed row */
    packed_rows rows;
    int32_t valid;              /* rows of the tile that exist */
    fgqa_range tiles;           /* key tiles to walk */
};

struct shared {
    static constexpr int WIDE = D > DV ? D : DV;
    alignas(128) char q[BLOCK_Q * WIDE * sizeof(T)];         /* Q; at the end O on its way out */
    alignas(128) char k[STAGES][BLOCK_K * D * sizeof(T)];
    alignas(128) char v[STAGES][BLOCK_K * DV * sizeof(T)];
    variant<GENERAL>::row rows[BLOCK_Q];
    head_task task;
    row_block block;
    struct { fgqa_range seen, full; } warp[FGQA_WARPS];      /* keys that some row, and that every row of the warp sees */
};

static __device__ __forceinline__ int first_row_of_warp() { return (int)thread_index() / 32 * WARP_ROWS; }

static __device__ __forceinline__ void load_k(shared &mem, const fgqa_params &params, int stage, int32_t tile)
{
    const head_task &task = mem.task;
    if constexpr (CACHE) {
        load_slots<T, BLOCK_K, D, THREADS>(smem_address(mem.k[stage]), params.problem.cache, params.problem.view[FGQA_ARG_k], task, task.k, tile * BLOCK_K,
                                           task.sequence, params.problem.d, params.vector_k);
        return;
    }
    const int64_t row_bytes = params.problem.view[FGQA_ARG_k].stride_s * (int64_t)sizeof(T);
    load_tile<T, BLOCK_K, D, THREADS>(smem_address(mem.k[stage]), task.k + (int64_t)tile * BLOCK_K * row_bytes, row_bytes,
                                      task.sequence.mask.sk - tile * BLOCK_K, params.problem.d, !GENERAL || params.vector_k);
}

static __device__ __forceinline__ void load_v(shared &mem, const fgqa_params &params, int stage, int32_t tile)
{
    const head_task &task = mem.task;
    if constexpr (CACHE) {
        load_slots<T, BLOCK_K, DV, THREADS>(smem_address(mem.v[stage]), params.problem.cache, params.problem.view[FGQA_ARG_v], task, task.v, tile * BLOCK_K,
                                           task.sequence, params.problem.dv, params.vector_v);
        return;
    }
    const int64_t row_bytes = params.problem.view[FGQA_ARG_v].stride_s * (int64_t)sizeof(T);
    load_tile<T, BLOCK_K, DV, THREADS>(smem_address(mem.v[stage]), task.v + (int64_t)tile * BLOCK_K * row_bytes, row_bytes,
                                       task.sequence.mask.sk - tile * BLOCK_K, params.problem.dv, !GENERAL || params.vector_v);
}

/* Of a float8 cache, what this thread has loaded of a tile that has arrived, into elements of T. */
static __device__ __forceinline__ void widen_k(shared &mem, const fgqa_params &params, int32_t j0)
{
    widen_slots<T, BLOCK_K, D, THREADS>(smem_address(mem.k[0]), params.problem.view[FGQA_ARG_k], mem.task.sequence.mask.sk - j0, params.problem.d, params.vector_k);
}

static __device__ __forceinline__ void widen_v(shared &mem, const fgqa_params &params, int32_t j0)
{
    widen_slots<T, BLOCK_K, DV, THREADS>(smem_address(mem.v[0]), params.problem.view[FGQA_ARG_v], mem.task.sequence.mask.sk - j0, params.problem.dv, params.vector_v);
}

/* Exponents in base 2 of scores relative to `base`: in one instruction, which rounds that of the largest score and is useless
 * where it is enormous, or exactly. CAREFUL takes the second form only there, for its bits must be those of the first walk. */
template <bool CAREFUL> struct exponent {
    float base, scale_log2, shift;
    bool exact;
    __device__ __forceinline__ exponent(float base, float scale_log2)
        : base(base), scale_log2(scale_log2), shift(-base * scale_log2), exact(GENERAL || (CAREFUL && !(fabsf(base * scale_log2) < 0x1p27f))) {}
    __device__ __forceinline__ float of(float x) const
    {
        return GENERAL || (CAREFUL && exact) ? (x - base) * scale_log2 : fmaf(x, scale_log2, shift);
    }
};

/* Scores of one tile -> weights, and what that does to the rows' state. `m` in the units of s; c = scale_log2. */
template <bool CAREFUL, int MB>
static __device__ __forceinline__ void softmax_tile(float (&s)[MB][NB][4], float (&o)[MB][OB][4], float (&m)[MB][2], float (&l)[MB][2], float scale_log2)
{
    float alpha[MB][2];
    bool rescale = false;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float top = m[mb][half];
#pragma unroll
            for (int n = 0; n < NB; n++) { top = fmaxf(top, fmaxf(s[mb][n][2 * half], s[mb][n][2 * half + 1])); }
            top = row_reduce_max(top);
            const float base = finite_max(top);
            alpha[mb][half] = ex2((m[mb][half] - base) * scale_log2);
            rescale |= alpha[mb][half] != 1.0f;
            m[mb][half] = top;
            const exponent<CAREFUL> power(base, scale_log2);
            float sum = 0.0f;
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &x = s[mb][n][2 * half + e];
                    x = ex2(power.of(x));
                    sum += x;
                }
            }
            l[mb][half] = l[mb][half] * alpha[mb][half] + sum;
        }
    }
    if (__any_sync(0xFFFFFFFFu, rescale)) {
#pragma unroll
        for (int mb = 0; mb < MB; mb++) {
#pragma unroll
            for (int n = 0; n < OB; n++) {
#pragma unroll
                for (int r = 0; r < 4; r++) { o[mb][n][r] *= alpha[mb][r / 2]; }
            }
        }
    }
}

/* What the rows of one m16 block, of which this lane holds two, do to the scores of the tile from key j0. */
template <int MB>
static __device__ __forceinline__ void mask_scores(const shared &mem, const fgqa_params &params, float (&s)[MB][NB][4], int32_t j0, int first_row, int lane)
{
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
        const int row = first_row + 16 * mb + lane / 4;
        const variant<GENERAL>::row rows[2] = {mem.rows[row], mem.rows[row + 8]};
        scale_scores(s[mb], mem.task);
        variant<GENERAL>::scores(params, mem.task.sequence.mask.diag, s[mb], rows, j0, lane);
    }
}

template <int MB>
static __device__ __forceinline__ void drop_weights(const shared &mem, const fgqa_params &params, float (&s)[MB][NB][4], int32_t j0, int first_row, int lane)
{
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
        const int row = first_row + 16 * mb + lane / 4;
        const variant<GENERAL>::row rows[2] = {mem.rows[row], mem.rows[row + 8]};
        variant<GENERAL>::dropout(params, s[mb], rows, j0, lane);
    }
}

/* Bit 4 n + r: the row sees the key of that register. */
static __device__ __forceinline__ uint32_t visible_bits(const float (&s)[NB][4])
{
    uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
        for (int r = 0; r < 4; r++) { bits |= s[n][r] != -INFINITY ? 1u << (4 * n + r) : 0; }
    }
    return bits;
}

/* Block index -> KV head and sequence. One thread. */
static __device__ __forceinline__ void begin_task(shared &mem, const fgqa_params &params, int32_t b, int32_t kv_head)
{
    const fgqa_problem &p = params.problem;
    head_task task;
    task.b = b;
    task.kv_head = kv_head;
    int32_t row_count;
    task.sequence = fgqa_device_sequence(p, task.b, &row_count);
    task.packed = (int64_t)row_count * p.g;
    if constexpr (CACHE) {
        begin_cache(&task, p, b, kv_head);
        task.k = cache_head(p, FGQA_ARG_k, task, kv_head);
        task.v = cache_head(p, FGQA_ARG_v, task, kv_head);
    } else {
        task.k = fgqa_row_address(p.view[FGQA_ARG_k], sizeof(T), task.b, task.kv_head, task.sequence.k_row);
        task.v = fgqa_row_address(p.view[FGQA_ARG_v], sizeof(T), task.b, task.kv_head, task.sequence.k_row);
    }
    mem.task = task;
}

/* Packed row -> the rows from there on, and the tiles of keys of part `part`. One thread. */
static __device__ __forceinline__ void begin_rows(shared &mem, const fgqa_params &params, int64_t first, uint32_t part, uint32_t parts)
{
    const fgqa_mask &mask = mem.task.sequence.mask;
    row_block block;
    block.first = first;
    block.rows = packed_rows_at(first, params.problem.g);
    block.valid = (int32_t)max((int64_t)0, min((int64_t)BLOCK_Q, mem.task.packed - first));
    block.tiles.begin = block.tiles.end = 0;
    if (block.valid > 0 && block.rows.i0 < mask.sq) {
        const fgqa_range keys = fgqa_kv_range(&mask, block.rows.i0, min(block.rows.i(block.valid - 1), mask.sq - 1) + 1);
        if (keys.begin < keys.end) { block.tiles.begin = keys.begin / BLOCK_K; block.tiles.end = (keys.end - 1) / BLOCK_K + 1; }
    }
    if (parts > 1) { block.tiles = split_range(block.tiles, part, parts); }
    mem.block = block;
}

/* Fills mem.rows and mem.warp; rows past the last one see nothing. All threads. */
static __device__ __forceinline__ void describe_rows(shared &mem, const fgqa_params &params)
{
    const fgqa_mask &mask = mem.task.sequence.mask;
    const packed_rows rows = mem.block.rows;
    const int valid = mem.block.valid;
    for (int local = thread_index(); local < BLOCK_Q; local += THREADS) {
        const int32_t i = local < valid ? rows.i(local) : INT32_MAX, h = local < valid ? rows.h(local) : 0;
        variant<GENERAL>::describe(&mem.rows[local], params, mask, mem.task.b, mem.task.kv_head * params.problem.g + h, i);
    }
    if (thread_index() < FGQA_WARPS) {
        const int row = thread_index() * WARP_ROWS;
        fgqa_range seen = {0, 0}, full = {0, 0};
        if (row < valid) {
            const int32_t i = rows.i(row), last = rows.i(min(valid, row + WARP_ROWS) - 1);
            if (i < mask.sq) { seen = fgqa_kv_range(&mask, i, min(last, mask.sq - 1) + 1); }
            if (last < mask.sq) { full.begin = fgqa_kv_begin(&mask, last); full.end = fgqa_kv_end(&mask, i); }
        }
        mem.warp[thread_index()].seen = seen;
        mem.warp[thread_index()].full = full;
    }
}

/* Two neighbouring elements of the output tile. */
template <typename E> [[maybe_unused]] static __device__ __forceinline__ void store_pair(uint32_t tile, int row, int column, float x, float y, E)
{
    const uint32_t address = tile + swizzle<DV * 2>(row, column / 8) + column % 8 * 2;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(pack2(x, y, E())) : "memory");
}

[[maybe_unused]] static __device__ __forceinline__ void store_pair(uint32_t tile, int row, int column, float x, float y, f32)
{
    const uint32_t address = tile + swizzle<DV * 4>(row, column / 4) + column % 4 * 4;
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

/* Normalises O; LSE (or this part's share of both) -> global memory. */
template <int MB>
static __device__ __forceinline__ void finish_rows(const shared &mem, const fgqa_params &params, const fgqa_split &split, uint32_t part, float (&o)[MB][OB][4],
                                                   const float (&m)[MB][2], const float (&l)[MB][2], float scale_log2, int first_row)
{
    const fgqa_problem &p = params.problem;
    const head_task &task = mem.task;
    const int lane = thread_index() % 32;
    const packed_rows rows = mem.block.rows;
    const bool partial = split.splits > 1;
    const float value_scale = (GENERAL ? params.dropout_scale : 1.0f) * scale_of_values(task);
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int local = first_row + 16 * mb + 8 * half + lane / 4;
            const bool exists = local < mem.block.valid;
            const float sum = row_reduce_sum(l[mb][half]);
            const int32_t i = rows.i(local), h = task.kv_head * p.g + rows.h(local);
            const float sink = partial || !exists ? -INFINITY : sink_logit(p, task.b, h, i >= task.sequence.mask.sq);
            const float top = GENERAL ? m[mb][half] : m[mb][half] * scale_log2 * (float)FGQA_LN2;
            float lse;
            const float scale = softmax_finish(top, sum, sink, &lse) * value_scale;
#pragma unroll
            for (int n = 0; n < OB; n++) {
                o[mb][n][2 * half] *= scale;
                o[mb][n][2 * half + 1] *= scale;
            }
            if (exists && partial) {
                const int64_t row = part * split.rows + split_row(p, task.b, h, task.sequence.q_row, i);
                float *to = split.o + row * p.dv;
#pragma unroll
                for (int n = 0; n < OB; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int column = 8 * n + fragment_column(lane, e);
                        if (column < p.dv) { to[column] = o[mb][n][2 * half + e]; }
                    }
                }
                if (lane % 4 == 0) { ((float2 *)split.lse)[row] = make_float2(top, log2f(sum)); }
            } else if (exists && lane % 4 == 0) {
                store_lse(p, task.b, h, task.sequence.q_row + i, lse);
            }
        }
    }
}

/* O of the warp's rows -> its place in shared memory. */
template <int MB>
static __device__ __forceinline__ void stage_rows(uint32_t tile, const float (&o)[MB][OB][4], int first_row)
{
    const int lane = thread_index() % 32;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = first_row + 16 * mb + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < OB; n++) { store_pair(tile, row, 8 * n + fragment_column(lane, 0), o[mb][n][2 * half], o[mb][n][2 * half + 1], T()); }
        }
    }
}

/* All tiles of mem.block: Q, K, V -> O (not normalised) and the state of each row. */
template <bool CAREFUL, int MB>
static __device__ __forceinline__ void walk_tiles(shared &mem, const fgqa_params &params, float (&o)[MB][OB][4], float (&m)[MB][2], float (&l)[MB][2],
                                                  float scale_log2, int first_row)
{
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int n = 0; n < OB; n++) {
#pragma unroll
            for (int r = 0; r < 4; r++) { o[mb][n][r] = 0.0f; }
        }
        m[mb][0] = m[mb][1] = -INFINITY;
        l[mb][0] = l[mb][1] = 0.0f;
    }
    const int lane = thread_index() % 32;
    const int32_t first_tile = mem.block.tiles.begin;
    int32_t tile = mem.block.tiles.end - 1;
    if (tile < first_tile) {
        describe_rows(mem, params);
        return;
    }
    load_k(mem, params, tile % STAGES, tile);
    if (STAGES == 2) { load_v(mem, params, tile % STAGES, tile); }
    cp_async_commit();
    describe_rows(mem, params);                        /* while the tiles are on their way */
    const uint32_t q_rows = smem_address(mem.q) + first_row * D * sizeof(T);

    for (; tile >= first_tile; tile--) {
        const int stage = STAGES == 2 ? tile & 1 : 0;
        const int32_t j0 = tile * BLOCK_K;
        cp_async_wait<0>();
        if (CACHE) { widen_k(mem, params, j0); }
        __syncthreads();                               /* this tile has arrived, the previous one is used up */
        if (STAGES == 1) {
            load_v(mem, params, 0, tile);
            cp_async_commit();
        } else if (tile > first_tile) {
            load_k(mem, params, stage ^ 1, tile - 1);
            load_v(mem, params, stage ^ 1, tile - 1);
            cp_async_commit();
        }
        const fgqa_range seen = mem.warp[thread_index() / 32].seen, full = mem.warp[thread_index() / 32].full;
        const bool idle = j0 >= seen.end || j0 + BLOCK_K <= seen.begin;
        float s[MB][NB][4];
        uint32_t visible = 0;
        if (!idle) {
            qk_gemm<T, D, MB, NB>(s, q_rows, smem_address(mem.k[stage]), lane);
            if (GENERAL || CAREFUL || j0 < full.begin || j0 + BLOCK_K > full.end) {
                mask_scores(mem, params, s, j0, first_row, lane);
                if (CAREFUL) { visible = visible_bits(s[0]); }
            }
        }
        if (STAGES == 1) {
            cp_async_wait<0>();
            if (CACHE) { widen_v(mem, params, j0); }
            __syncthreads();                           /* V has arrived, K is used up */
            if (!CAREFUL && tile > first_tile) {
                load_k(mem, params, 0, tile - 1);
                cp_async_commit();
            }
        }
        bool poison = false;
        if (CAREFUL) {
            if (STAGES == 2) { __syncthreads(); }      /* K is used up: the codes take its place */
            poison = split_poison_tile<T>(mem.v[stage], mem.k[stage], sizeof(mem.v[0]), THREADS);
        }
        if (!idle) {
            softmax_tile<CAREFUL>(s, o, m, l, scale_log2);
            drop_weights(mem, params, s, j0, first_row, lane);
            pv_gemm<T, DV, MB, NB>(o, s, smem_address(mem.v[stage]), lane);
            if (CAREFUL && poison) { poison_gemm<T, DV, NB>(o[0], visible, smem_address(mem.k[stage]), lane); }
        }
        if (CAREFUL && STAGES == 1 && tile > first_tile) {
            __syncthreads();                           /* the codes are used up */
            load_k(mem, params, 0, tile - 1);
            cp_async_commit();
        }
    }
}

/* Whether any accumulator of the block is inf or NaN (0 * x is 0 for every finite x), or a row has lost its largest weight, of
 * about 1, because its scores are enormous. A barrier. */
template <int MB>
static __device__ __forceinline__ bool any_poison(const float (&o)[MB][OB][4], const float (&m)[MB][2], const float (&l)[MB][2])
{
    float sum[4] = {};
    bool lost = false;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
        if (!GENERAL) {
#pragma unroll
            for (int half = 0; half < 2; half++) { lost |= row_reduce_sum(l[mb][half]) < 0.5f && m[mb][half] > -INFINITY; }
        }
#pragma unroll
        for (int n = 0; n < OB; n++) {
#pragma unroll
            for (int r = 0; r < 4; r++) { sum[r] = fmaf(o[mb][n][r], 0.0f, sum[r]); }
        }
    }
    return __syncthreads_or(lost || sum[0] + sum[1] + sum[2] + sum[3] != 0.0f);
}

static __device__ __forceinline__ void load_q(shared &mem, const fgqa_params &params)
{
    const fgqa_problem &p = params.problem;
    if (mem.block.tiles.begin < mem.block.tiles.end) {
        load_packed_tile<T, BLOCK_Q, D, THREADS>(smem_address(mem.q),
            fgqa_row_address(p.view[FGQA_ARG_q], sizeof(T), mem.task.b, (int64_t)mem.task.kv_head * p.g, mem.task.sequence.q_row),
            p.view[FGQA_ARG_q], mem.block.rows, mem.block.valid, p.d, !GENERAL || params.vector_q);
    }
}

/* What is left of a block's work in rare cases: with `again` its rows once more, with unseen values kept out; then rows that
 * only exist because max_q was too small. Sixteen rows of a warp at a time. A function of its own, called last: the usual
 * walk must not share its registers with this one. */
static __device__ __noinline__ void finish_carefully(shared &mem, const fgqa_params &params, const fgqa_split &split, uint32_t part, float scale_log2, bool again)
{
    const fgqa_problem &p = params.problem;
    for (;; again = false) {
        if (!again) {
            __syncthreads();
            if (thread_index() == 0) { begin_rows(mem, params, mem.block.first + (int64_t)split.blocks * BLOCK_Q, part, split.splits); }
            __syncthreads();
            if (mem.block.valid == 0) { return; }
            load_q(mem, params);
        }
#pragma unroll 1
        for (int mb = 0; mb < WARP_ROWS / 16; mb++) {
            const int lane = thread_index() % 32, first_row = first_row_of_warp() + 16 * mb;
            float o[1][OB][4], m[1][2], l[1][2];
            walk_tiles<true>(mem, params, o, m, l, scale_log2, first_row);
            finish_rows(mem, params, split, part, o, m, l, scale_log2, first_row);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int local = first_row + 8 * half + lane / 4;
                if (split.splits > 1 || local >= mem.block.valid) { continue; }
                T *row = (T *)fgqa_row_address(p.view[FGQA_ARG_out], sizeof(T), mem.task.b, mem.task.kv_head * p.g + mem.block.rows.h(local),
                                               mem.task.sequence.q_row + mem.block.rows.i(local));
#pragma unroll
                for (int n = 0; n < OB; n++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int column = 8 * n + fragment_column(lane, e);
                        if (column < p.dv) { from_float(row + column, o[0][n][2 * half + e]); }
                    }
                }
            }
            __syncthreads();                           /* K and V are used up */
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS == 128 ? 2 : 1)
FGQA_SUFFIX(FGQA_ROW, _kernel)(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_split split)
{
    extern __shared__ __align__(128) char memory[];
    shared &mem = *(shared *)memory;
    const fgqa_problem &p = params.problem;

    /* block index -> part of the keys, row block (last first: under a causal mask the heaviest), KV head of a sequence */
    const uint32_t part = blockIdx.x % split.splits, rest = blockIdx.x / split.splits, pair = rest / split.blocks;
    if (thread_index() == 0) {
        begin_task(mem, params, split.first_b + (int32_t)(pair / (uint32_t)p.hk), (int32_t)(pair % (uint32_t)p.hk));
        begin_rows(mem, params, (int64_t)(split.blocks - 1 - rest % split.blocks) * BLOCK_Q, part, split.splits);
    }
    __syncthreads();
    if (mem.block.valid == 0) { return; }
    const float scale_log2 = GENERAL ? (float)FGQA_LOG2E : params.scale * (float)FGQA_LOG2E;
    load_q(mem, params);

    float o[WARP_ROWS / 16][OB][4], m[WARP_ROWS / 16][2], l[WARP_ROWS / 16][2];
    walk_tiles<false>(mem, params, o, m, l, scale_log2, first_row_of_warp());
    const bool again = any_poison(o, m, l);            /* also: every warp is done with Q, whose place O takes */
    if (!again) {
        finish_rows(mem, params, split, part, o, m, l, scale_log2, first_row_of_warp());
        if (split.splits == 1) {
            const uint32_t tile = smem_address(mem.q);
            stage_rows(tile, o, first_row_of_warp());
            __syncthreads();
            store_packed_tile<T, BLOCK_Q, DV, THREADS>(tile,
                fgqa_row_address(p.view[FGQA_ARG_out], sizeof(T), mem.task.b, (int64_t)mem.task.kv_head * p.g, mem.task.sequence.q_row),
                p.view[FGQA_ARG_out], mem.block.rows, mem.block.valid, p.dv, !GENERAL || params.vector_out);
        }
    }
    if (again || mem.block.first + (int64_t)split.blocks * BLOCK_Q < mem.task.packed) {
        finish_carefully(mem, params, split, part, scale_log2, again);
    }
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(shared); }

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    static launch_state state;
    const cudaError_t allowed = allow_shared_memory((const void *)FGQA_SUFFIX(FGQA_ROW, _kernel), sizeof(shared), problem->device.index, &state);
    if (allowed != cudaSuccess) { return allowed; }
    fgqa_params params = fgqa_params_make(problem);
    if (CACHE) { find_vector_access<T>(&params); }
    fgqa_split split;
    fgqa_split_workspace(problem, (uint32_t)plan->splits, workspace, &split);
    const int64_t rows = (int64_t)problem->sq * problem->g, most = INT32_MAX / split.splits / problem->hk;
    const int64_t blocks = (rows + BLOCK_Q - 1) / BLOCK_Q;
    split.blocks = (uint32_t)(blocks < most ? blocks : most);              /* finish_carefully() does the others */
    const int64_t at_once = most / split.blocks;
    for (int64_t b = 0; b < problem->b; b += at_once) {
        const int64_t count = problem->b - b < at_once ? problem->b - b : at_once;
        split.first_b = (int32_t)b;
        const cudaError_t error = launch_kernel(FGQA_SUFFIX(FGQA_ROW, _kernel), (uint32_t)(count * problem->hk * split.blocks * split.splits), THREADS,
                                                sizeof(shared), exec->stream, params, split);
        if (error != cudaSuccess) { return error; }
    }
    return split.splits > 1 ? fgqa_fwd_combine(problem, workspace, (uint32_t)split.splits, exec) : cudaSuccess;
}
