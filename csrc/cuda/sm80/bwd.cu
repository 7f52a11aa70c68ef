/* bwd.cu - attention backward on mma.sync, for every card from Ampere on. Compiled once per bwd row of kernels.def.
 *
 *     S = Q K^T   P = 2^(S - LSE)   dP = dO V^T   dS = P (dP - delta)
 *     dV = P^T dO   dK = dS^T Q   dQ = dS K                     (scale, soft cap and dropout: bwd_score.cuh)
 *
 * A task is one key tile of one KV head of one sequence, with all query heads of the group (or a share of them): the block
 * keeps K and V in shared memory and dK and dV in registers, walks the query tiles that see the keys, last tile first, all
 * heads of a tile before the next tile, and stores dK and dV once.
 *
 * dQ of a query tile is the sum of what its key tiles give, added in their order, so that the bits never change: the block of
 * the first key tile stores its part (in the order of its accumulators, which only blocks of this kernel read), those between
 * wait for their turn and add, the last one adds what is there to its own and writes dQ itself. A counter a query tile says
 * whose turn it is. Tasks are handed out by a ticket, lower key tiles first, so a block only ever waits for blocks that are
 * already running: no deadlock whatever the card does. Blocks of one KV head walk the tiles one turn behind each other.
 *
 *     STAGES 1, 2   barrier: tile arrived, P and dS free | fetch the next tile | S, P, dP, dS | barrier | dQ, dV, dK
 *     STAGES 3      barrier | fetch tile t + 2 | half of the warps: S .. dS of tile t + 1, then dQ, dV, dK of tile t; the other
 *                   half, which shares the schedulers with them: the other way round. P and dS have two buffers.
 *
 * Each product is spread over the warps in its own way (constants below). A barrier is also what makes the additions to dQ
 * complete: after the next one one warp, a different one each step, passes the turn on.
 */
#include "../common/params.cuh"
#include "../common/ptx_global.cuh"
#include "../common/tile_io.cuh"
#include "../any/bwd_workspace.h"
#include "../kernel_table.h"
#include "bwd_gemm.cuh"
#include "bwd_score.cuh"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)
typedef FGQA_DTYPE T;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, BLOCK_K = FGQA_BLOCK_K, STAGES = FGQA_STAGES;
static constexpr int WARPS = FGQA_WARPS, THREADS = 32 * WARPS;
#define FGQA_BWD_GENERAL (FGQA_SUFFIX(FGQA_BWD_IS_, FGQA_VARIANT))
#define FGQA_BWD_IS_plain 0
#define FGQA_BWD_IS_general 1
static constexpr bool GENERAL = FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_general;
static_assert(STAGES >= 1 && STAGES <= 3, "kernels.def: one to three stages");
static constexpr int BUFFERS = STAGES == 3 ? 2 : 1, ROW_BUFFERS = STAGES == 1 ? 1 : 2;     /* of P and dS; of what scores need of a row */
static_assert(BLOCK_Q <= THREADS, "kernels.def: one thread fetches one row's statistics");

/* How `warps` warps share a product of rows x cols: the squarest parts read the least. */
static constexpr int warps_down(int rows, int cols, int warps)
{
    int best = 0, least = 1 << 30;
    for (int down = 1; down <= warps; down *= 2) {
        const int across = warps / down;
        if (rows % (16 * down) == 0 && cols % (16 * across) == 0 && rows / down + cols / across < least) {
            best = down;
            least = rows / down + cols / across;
        }
    }
    return best;
}
template <int ROWS, int COLS, int W> struct share {
    static constexpr int DOWN = warps_down(ROWS, COLS, W), ACROSS_ = W / (DOWN ? DOWN : 1);
    static_assert(DOWN > 0, "kernels.def: tile too small for this many warps");
    static constexpr int R = ROWS / DOWN, C = COLS / ACROSS_, MB = R / 16, NB = C / 8;
    static __device__ __forceinline__ int row(int warp) { return warp / ACROSS_ * R; }
    static __device__ __forceinline__ int col(int warp) { return warp % ACROSS_ * C; }
};
static constexpr int SCORE_WARPS = WARPS < BLOCK_Q / 16 * (BLOCK_K / 16) ? WARPS : BLOCK_Q / 16 * (BLOCK_K / 16);
typedef share<BLOCK_Q, BLOCK_K, SCORE_WARPS> of_s;
typedef share<BLOCK_K, D, WARPS> of_dk;
typedef share<BLOCK_K, DV, WARPS> of_dv;
typedef share<BLOCK_Q, D, WARPS> of_dq;

static constexpr int Q_BYTES = D * sizeof(T), V_BYTES = DV * sizeof(T), P_BYTES = BLOCK_K * sizeof(T);   /* of a row */

/* Where the data of a query tile of one head lies: base + head of the group * per_head + tile * per_tile, in bytes. */
enum { AT_Q, AT_DOUT, AT_STATS, AT_SUM, AT_TURN, AT_DQ, PLACES };

struct task {
    int32_t b, kv_head, part, n;              /* part of the query rows; key tile */
    fgqa_sequence sequence;
    fgqa_range tiles;                         /* query tiles to walk */
    int32_t key_rows;                         /* keys of the sequence that have a gradient to write, padding included */
    bool all, done;                           /* every row of the walk sees every key of the tile; no task left */
    char *base[PLACES];
    int64_t per_head[PLACES], per_tile[PLACES];
};

/* One step of the walk; in shared memory, where reading it again is cheaper than registers beside the accumulators. */
struct walk_step {
    int32_t i, h;                             /* query tile, -1: none; head of the group */
    int32_t rank;                             /* key tiles that add to dQ of the tile before this one */
    bool last, full;                          /* none adds after this one; every row sees every key */
    char *at[PLACES];
};

struct shared {
    alignas(128) char k[BLOCK_K * Q_BYTES];
    alignas(128) char v[BLOCK_K * V_BYTES];
    alignas(128) char q[STAGES][BLOCK_Q * Q_BYTES];
    alignas(128) char dout[STAGES][BLOCK_Q * V_BYTES];
    alignas(128) char p[BUFFERS][BLOCK_Q * P_BYTES];
    alignas(128) char ds[BUFFERS][BLOCK_Q * P_BYTES];
    float2 stats[ROW_BUFFERS][BLOCK_Q];       /* lse2, delta */
    score_row rows[GENERAL ? ROW_BUFFERS : 1][GENERAL ? BLOCK_Q : 1];
    fgqa_range seen[GENERAL ? 1 : ROW_BUFFERS][GENERAL ? 1 : BLOCK_Q];
    struct task task;
    walk_step steps[4];                       /* ring */
};

/* Scalars of a launch. Tasks come in bands of `band` sections (KV head of a sequence x part): inside a band, key tile by key tile. */
struct launch {
    int64_t sections, band;
    int32_t pair_dq, pair_dk, pair_dv;        /* two neighbouring elements may be stored as one word */
};

/* By one warp: the step at query tile i, head h; `before` is the one before it, or NULL. */
static __device__ __forceinline__ void describe_step(const task &t, walk_step &step, const walk_step *before, int32_t i, int32_t h, int lane)
{
    const fgqa_mask &mask = t.sequence.mask;
    const bool exists = i >= t.tiles.begin;
    int32_t rank = 0;
    bool last = false, full = false;
    if (exists && before && before->i == i) {
        rank = before->rank;
        last = before->last;
        full = before->full;
    } else if (exists) {                                   /* of the tile's first row (even lanes) and last row */
        const int32_t j0 = t.n * BLOCK_K, row = min(mask.sq, i * BLOCK_Q + (lane % 2 ? BLOCK_Q : 1)) - 1;
        const int32_t begin = fgqa_kv_begin(&mask, row), end = fgqa_kv_end(&mask, row);
        rank = t.n - __shfl_sync(0xFFFFFFFFu, begin, 0) / BLOCK_K;
        last = j0 + BLOCK_K >= __shfl_sync(0xFFFFFFFFu, end, 1);
        full = __shfl_sync(0xFFFFFFFFu, begin, 1) <= j0 && j0 + BLOCK_K <= __shfl_sync(0xFFFFFFFFu, end, 0);
    }
    __syncwarp();
    if (exists && lane < PLACES) { step.at[lane] = t.base[lane] + h * t.per_head[lane] + i * t.per_tile[lane]; }
    if (lane == 0) {
        step.i = exists ? i : -1;
        step.h = h;
        step.rank = rank;
        step.last = last;
        step.full = full;
    }
    __syncwarp();
}

/* By one warp: the step after `before`: heads and then tiles downwards, in strides of the number of parts. */
static __device__ __forceinline__ void describe_next(const task &t, walk_step &step, const walk_step &before, int32_t splits, int32_t group, int lane)
{
    int32_t i = before.i, h = before.h - splits;
    while (i >= 0 && h < 0) { h += group; i--; }
    describe_step(t, step, &before, i, h, lane);
}

/* First row from `lo` on whose begin (or end) of the keys it sees is at least `bound`, or mask.sq: 32 rows are tried at a time. */
template <bool BEGIN> static __device__ __forceinline__ int32_t first_row(const fgqa_mask &mask, int32_t lo, int32_t bound, int lane)
{
    int32_t hi = mask.sq;
    while (lo < hi) {
        const int32_t stride = (hi - lo + 31) / 32;
        const int64_t row = lo + (int64_t)lane * stride;
        const bool there = row >= hi || (BEGIN ? fgqa_kv_begin(&mask, (int32_t)row) : fgqa_kv_end(&mask, (int32_t)row)) >= bound;
        const uint32_t votes = __ballot_sync(0xFFFFFFFFu, there);
        const int first = votes ? __ffs((int)votes) - 1 : 32;
        if (first == 0) { return lo; }
        hi = (int32_t)min((int64_t)hi, lo + (int64_t)first * stride);
        lo += (first - 1) * stride + 1;
    }
    return lo;
}

/* One warp fills a task and its first two steps from the next ticket. */
static __device__ __forceinline__ void take_task(task &t, walk_step *steps, const fgqa_params &params, const fgqa_bwd_workspace &w, const launch &launch, int lane)
{
    const fgqa_problem &p = params.problem;
    task next;
    const int64_t key_tiles = w.control->key_tiles;
    int64_t ticket = 0;
    if (lane == 0) { ticket = (int64_t)atomicAdd((unsigned long long *)&w.control->ticket, 1ull); }
    ticket = __shfl_sync(0xFFFFFFFFu, ticket, 0);
    next.done = ticket >= launch.sections * key_tiles;
    if (next.done) {
        if (lane == 0) { t.done = true; }
        return;
    }
    const int64_t first = ticket / (launch.band * key_tiles) * launch.band, rest = ticket % (launch.band * key_tiles);
    const int64_t width = min(launch.band, launch.sections - first);
    const int64_t section = first + rest % width;
    next.n = (int32_t)(rest / width);
    next.part = (int32_t)(section % w.splits);
    next.kv_head = (int32_t)(section / w.splits % p.hk);
    next.b = (int32_t)(section / w.splits / p.hk);
    int32_t rows;
    next.sequence = fgqa_device_sequence(p, next.b, &rows);
    const fgqa_mask &mask = next.sequence.mask;
    next.key_rows = p.varlen ? mask.sk : p.sk;
    /* query tiles to walk: from the first row that sees past j0 to the last tile whose first row does not start past the keys */
    const int32_t j0 = next.n * BLOCK_K, j1 = min(mask.sk, j0 + BLOCK_K);
    const int32_t begin = j0 < mask.sk ? first_row<false>(mask, 0, j0 + 1, lane) : mask.sq;
    const int32_t end = begin < mask.sq ? first_row<true>(mask, 0, j1, lane) : 0;
    next.tiles.begin = begin / BLOCK_Q;
    next.tiles.end = max(next.tiles.begin, (int32_t)(((int64_t)end + BLOCK_Q - 1) / BLOCK_Q));
    next.all = j0 + BLOCK_K <= mask.sk && next.tiles.begin < next.tiles.end
            && fgqa_tile_is_full(&mask, next.tiles.begin * BLOCK_Q, min(mask.sq, next.tiles.end * BLOCK_Q), j0, j0 + BLOCK_K);
    const int32_t head = next.kv_head * p.g;
    const fgqa_view *views[3] = {&p.view[FGQA_ARG_q], &p.view[FGQA_ARG_dout], &p.view[FGQA_ARG_dq]};
    const int places[3] = {AT_Q, AT_DOUT, AT_DQ};
#pragma unroll
    for (int n = 0; n < 3; n++) {
        next.base[places[n]] = fgqa_row_address(*views[n], sizeof(T), next.b, head, next.sequence.q_row);
        next.per_head[places[n]] = views[n]->stride_h * (int64_t)sizeof(T);
        next.per_tile[places[n]] = views[n]->stride_s * (int64_t)sizeof(T) * BLOCK_Q;
    }
    next.base[AT_STATS] = (char *)(w.stats + 2 * bwd_q_row(p, next.b, head, next.sequence.q_row, 0));
    next.per_head[AT_STATS] = 2 * (int64_t)sizeof(float) * (p.varlen ? p.total_q : p.sq);
    next.per_tile[AT_STATS] = 2 * (int64_t)sizeof(float) * BLOCK_Q;
    const int64_t tile = bwd_q_tile(p, w, next.b, head, next.sequence.q_row, 0);
    next.base[AT_SUM] = (char *)(w.dq + tile * (BLOCK_Q * D));
    next.per_tile[AT_SUM] = (int64_t)sizeof(float) * BLOCK_Q * D;
    next.per_head[AT_SUM] = w.head_tiles * next.per_tile[AT_SUM];
    next.base[AT_TURN] = (char *)(w.turn + tile);
    next.per_tile[AT_TURN] = sizeof(int32_t);
    next.per_head[AT_TURN] = w.head_tiles * (int64_t)sizeof(int32_t);
    if (lane == 0) { t = next; }
    __syncwarp();
    /* this part's last (query tile, head): the highest index below tiles.end * g that is `part` modulo splits */
    const int64_t last = (int64_t)next.tiles.end * p.g - 1;
    const int64_t mine = last - ((last - next.part) % w.splits + w.splits) % w.splits;
    describe_step(t, steps[0], NULL, mine < 0 ? -1 : (int32_t)(mine / p.g), mine < 0 ? 0 : (int32_t)(mine % p.g), lane);
    describe_next(t, steps[1], steps[0], w.splits, p.g, lane);
}

static __device__ __forceinline__ void load_keys(shared &mem, const fgqa_params &params)
{
    const fgqa_problem &p = params.problem;
    const task &t = mem.task;
    const fgqa_view &k = p.view[FGQA_ARG_k], &v = p.view[FGQA_ARG_v];
    const int32_t j0 = t.n * BLOCK_K, valid = t.sequence.mask.sk - j0;
    load_tile<T, BLOCK_K, D, THREADS>(smem_address(mem.k), fgqa_row_address(k, sizeof(T), t.b, t.kv_head, t.sequence.k_row + j0),
                                      k.stride_s * (int64_t)sizeof(T), valid, p.d, !GENERAL || params.vector_k);
    load_tile<T, BLOCK_K, DV, THREADS>(smem_address(mem.v), fgqa_row_address(v, sizeof(T), t.b, t.kv_head, t.sequence.k_row + j0),
                                       v.stride_s * (int64_t)sizeof(T), valid, p.dv, !GENERAL || params.vector_v);
}

/* A step's Q, dO, statistics, and what each row sees. */
static __device__ __forceinline__ void load_queries(shared &mem, const fgqa_params &params, int stage, int at, const walk_step &step)
{
    const fgqa_problem &p = params.problem;
    const task &t = mem.task;
    const int32_t i0 = step.i * BLOCK_Q, valid = t.sequence.mask.sq - i0;
    load_tile<T, BLOCK_Q, D, THREADS>(smem_address(mem.q[stage]), step.at[AT_Q], p.view[FGQA_ARG_q].stride_s * (int64_t)sizeof(T), valid, p.d,
                                      !GENERAL || params.vector_q);
    load_tile<T, BLOCK_Q, DV, THREADS>(smem_address(mem.dout[stage]), step.at[AT_DOUT], p.view[FGQA_ARG_dout].stride_s * (int64_t)sizeof(T), valid, p.dv,
                                       !GENERAL || params.vector_dout);
    if (threadIdx.x < BLOCK_Q) {
        const int row = threadIdx.x;
        cp_async_8(smem_address(&mem.stats[at][row]), step.at[AT_STATS] + row * sizeof(float2), row < valid);
        if (GENERAL) {
            mem.rows[at][row] = score_row_make(params, t.sequence.mask, t.b, t.kv_head * p.g + step.h, i0 + row);
        } else if (!t.all) {
            mem.seen[at][row] = row_range(t.sequence.mask, i0 + row);
        }
    }
}

/* The lane, as a value of this moment: what is derived from it (a dozen addresses for each product) is then computed where it
 * is used instead of being kept in registers through the loop. */
static __device__ __forceinline__ int lane_here(void)
{
    int lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

/* Two neighbouring elements of a tile with rows of BLOCK_K. */
static __device__ __forceinline__ void store_pair(uint32_t address, float x, float y, f32)
{
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
template <typename E> static __device__ __forceinline__ void store_pair(uint32_t address, float x, float y, E)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(pack2(x, y, E())) : "memory");
}

/* A warp's part of P or dS into its tile. */
static __device__ __forceinline__ void store_scores(uint32_t tile, const float (&x)[of_s::MB][of_s::NB][4], int row0, int col0, int lane)
{
    constexpr int PIECE = 16 / (int)sizeof(T);
#pragma unroll
    for (int mb = 0; mb < of_s::MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = row0 + 16 * mb + 8 * half + lane / 4;
#pragma unroll
            for (int n = 0; n < of_s::NB; n++) {
                const int col = col0 + 8 * n + fragment_column(lane, 0);
                store_pair(tile + swizzle<P_BYTES>(row, col / PIECE) + col % PIECE * (int)sizeof(T), x[mb][n][2 * half], x[mb][n][2 * half + 1], T());
            }
        }
    }
}

/* The same for pairs of 16-bit elements. */
static __device__ __forceinline__ void store_packed(uint32_t tile, const uint32_t (&x)[of_s::MB][of_s::NB][2], int row0, int col0, int lane)
{
#pragma unroll
    for (int mb = 0; mb < of_s::MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < of_s::NB; n++) {
                const uint32_t to = tile + swizzle<P_BYTES>(row0 + 16 * mb + 8 * half + lane / 4, col0 / 8 + n) + lane % 4 * 4;
                asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(x[mb][n][half]) : "memory");
            }
        }
    }
}

static __device__ __forceinline__ float2 unpack2(uint32_t x, bf16) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)); }
static __device__ __forceinline__ float2 unpack2(uint32_t x, f16) { return __half22float2(*(const __half2 *)&x); }

typedef gemm_operand<T, Q_BYTES, ALONG, true> q_along;
typedef gemm_operand<T, Q_BYTES, ALONG, false> k_along;
typedef gemm_operand<T, V_BYTES, ALONG, true> dout_along;
typedef gemm_operand<T, V_BYTES, ALONG, false> v_along;
typedef gemm_operand<T, P_BYTES, ALONG, true> ds_along;
typedef gemm_operand<T, P_BYTES, ACROSS, true> p_across;
typedef gemm_operand<T, Q_BYTES, ACROSS, false> qk_across;
typedef gemm_operand<T, V_BYTES, ACROSS, false> dout_across;

/* Every option: dS of one tile, by the warps that share it, and P into its tile. BIAS: instead the gradient of the bias. */
template <bool BIAS>
static __device__ __forceinline__ void scores_general(shared &mem, const fgqa_params &params, int stage, int at, int buffer, int warp, float (&ds)[of_s::MB][of_s::NB][4])
{
    constexpr int MB = of_s::MB, NB = of_s::NB;
    const int lane = lane_here(), row0 = of_s::row(warp), col0 = of_s::col(warp);
    float s[MB][NB][4] = {}, weight[MB][NB][4];
    score_memory<MB, NB> memory;
    warp_gemm<T, D, MB, NB>(s, q_along(smem_address(mem.q[stage]), row0, lane), k_along(smem_address(mem.k), col0, lane));
    weights_general<MB, NB>(params, mem.task.sequence.mask.diag, mem.rows[at], mem.stats[at], row0, mem.task.n * BLOCK_K + col0, lane, s, weight, memory);
    if (!BIAS) { store_scores(smem_address(mem.p[buffer]), weight, row0, col0, lane); }
    warp_gemm<T, DV, MB, NB>(ds, dout_along(smem_address(mem.dout[stage]), row0, lane), v_along(smem_address(mem.v), col0, lane));
    gradients_general<BIAS ? 0 : 1, MB, NB>(params, mem.stats[at], row0, lane, ds, s, memory);
}

/* P and dS of one tile into theirs, by the warps that share it. */
static __device__ __forceinline__ void score_tiles(shared &mem, const fgqa_params &params, int stage, int at, int buffer, const walk_step &step, int warp)
{
    constexpr int MB = of_s::MB, NB = of_s::NB;
    const int lane = lane_here(), row0 = of_s::row(warp), col0 = of_s::col(warp);
    float ds[MB][NB][4] = {};
#if FGQA_BWD_GENERAL
    scores_general<false>(mem, params, stage, at, buffer, warp, ds);
#else
    const int32_t j0 = mem.task.n * BLOCK_K + col0;
    float s[MB][NB][4] = {};
    warp_gemm<T, D, MB, NB>(s, q_along(smem_address(mem.q[stage]), row0, lane), k_along(smem_address(mem.k), col0, lane));
    const float scale_log2 = params.scale * (float)FGQA_LOG2E;
    const float2 *stats = mem.stats[at] + row0 + lane / 4;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float lse2 = stats[16 * mb + 8 * (r / 2)].x;
#pragma unroll
            for (int n = 0; n < NB; n++) { s[mb][n][r] = ex2(fmaf(s[mb][n][r], scale_log2, -lse2)); }
        }
    }
    if (!step.full) { hide_tile(s, mem.seen[at] + row0, j0, lane); }
    uint32_t p[MB][NB][2];                             /* as dV will see it, and half the registers */
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int n = 0; n < NB; n++) {
            p[mb][n][0] = pack2(s[mb][n][0], s[mb][n][1], T());
            p[mb][n][1] = pack2(s[mb][n][2], s[mb][n][3], T());
        }
    }
    store_packed(smem_address(mem.p[buffer]), p, row0, col0, lane);
    warp_gemm<T, DV, MB, NB>(ds, dout_along(smem_address(mem.dout[stage]), row0, lane), v_along(smem_address(mem.v), col0, lane));
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float delta = stats[16 * mb + 8 * half].y;
#pragma unroll
            for (int n = 0; n < NB; n++) {
                const float2 weight = unpack2(p[mb][n][half], T());
                ds[mb][n][2 * half] = weight.x * (ds[mb][n][2 * half] - delta);
                ds[mb][n][2 * half + 1] = weight.y * (ds[mb][n][2 * half + 1] - delta);
            }
        }
    }
    if (!step.full) { hide_tile(ds, mem.seen[at] + row0, j0, lane); }
#endif
    store_scores(smem_address(mem.ds[buffer]), ds, row0, col0, lane);
}

/* Two neighbouring elements of a row of d elements. */
static __device__ __forceinline__ void write_pair(char *row, int column, int d, float x, float y, bool pair, f32)
{
    float *to = (float *)row + column;
    if ((!GENERAL || pair) && column + 1 < d) {
        *(float2 *)to = make_float2(x, y);
    } else {
        if (column < d) { to[0] = x; }
        if (column + 1 < d) { to[1] = y; }
    }
}
template <typename E> static __device__ __forceinline__ void write_pair(char *row, int column, int d, float x, float y, bool pair, E)
{
    E *to = (E *)row + column;
    if ((!GENERAL || pair) && column + 1 < d) {
        *(uint32_t *)to = pack2(x, y, E());
    } else {
        if (column < d) { from_float(to, x); }
        if (column + 1 < d) { from_float(to + 1, y); }
    }
}

/* This key tile's part of dQ of the step's query tile. `turn_seen`: the tile's counter as it was some time ago. A counter that
 * is seen to have come so far has the additions before it behind it at L2, where ours are made, too. */
static __device__ __forceinline__ void add_dq(const shared &mem, const fgqa_params &params, float (&dq)[of_dq::MB][of_dq::NB][4],
                                              const walk_step &step, int32_t turn_seen, bool pair, int warp, int lane)
{
    const fgqa_problem &p = params.problem;
    const task &t = mem.task;
    const int32_t rank = step.rank;
    float *sum = (float *)step.at[AT_SUM] + (warp * of_dq::MB * of_dq::NB * 32 + lane) * 4;
    while (turn_seen < rank) { turn_seen = load_relaxed_s32((const int32_t *)step.at[AT_TURN]); }
    if (!step.last && rank == 0) {
#pragma unroll
        for (int n = 0; n < of_dq::MB * of_dq::NB; n++) {
            const float(&x)[4] = dq[n / of_dq::NB][n % of_dq::NB];
            __stcg((float4 *)(sum + n * 128), make_float4(x[0], x[1], x[2], x[3]));
        }
        return;
    }
    if (!step.last) {
#pragma unroll
        for (int n = 0; n < of_dq::MB * of_dq::NB; n++) { red_add_f32x4(sum + n * 128, dq[n / of_dq::NB][n % of_dq::NB]); }
        return;
    }
    const int32_t row0 = step.i * BLOCK_Q + of_dq::row(warp) + lane / 4;
    const int64_t row_bytes = p.view[FGQA_ARG_dq].stride_s * (int64_t)sizeof(T);
    char *out = step.at[AT_DQ] + (of_dq::row(warp) + lane / 4) * row_bytes;
#pragma unroll
    for (int mb = 0; mb < of_dq::MB; mb++) {
        if (rank > 0) {
            float4 before[of_dq::NB];                      /* all on their way before the first is used */
#pragma unroll
            for (int n = 0; n < of_dq::NB; n++) { before[n] = load_relaxed_f32x4(sum + (mb * of_dq::NB + n) * 128); }
#pragma unroll
            for (int n = 0; n < of_dq::NB; n++) {
                dq[mb][n][0] += before[n].x;
                dq[mb][n][1] += before[n].y;
                dq[mb][n][2] += before[n].z;
                dq[mb][n][3] += before[n].w;
            }
        }
#pragma unroll
        for (int n = 0; n < of_dq::NB; n++) {
            const int column = of_dq::col(warp) + 8 * n + fragment_column(lane, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (row0 + 16 * mb + 8 * half < t.sequence.mask.sq) {
                    write_pair(out + (16 * mb + 8 * half) * row_bytes, column, p.d, params.scale * dq[mb][n][2 * half],
                               params.scale * dq[mb][n][2 * half + 1], pair, T());
                }
            }
        }
    }
}

/* A warp's part of dK or dV, times `scale`: to the result, or to this part's share of it in float32. */
template <typename S, int WIDTH>
static __device__ __forceinline__ void store_keys(const shared &mem, const fgqa_params &params, const fgqa_bwd_workspace &w, const float (&x)[S::MB][S::NB][4],
                                                  const fgqa_view &view, float *parts, int d, float scale, bool pair, int warp, int lane)
{
    const task &t = mem.task;
    const int32_t j0 = t.n * BLOCK_K + S::row(warp) + lane / 4;
#pragma unroll
    for (int mb = 0; mb < S::MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int32_t j = j0 + 16 * mb + 8 * half;
            if (j < t.key_rows) {
                char *row = fgqa_row_address(view, sizeof(T), t.b, t.kv_head, t.sequence.k_row + j);
                if (w.splits > 1) { row = (char *)(parts + (t.part * w.k_rows + bwd_k_row(params.problem, t.b, t.kv_head, t.sequence.k_row, j)) * WIDTH); }
#pragma unroll
                for (int n = 0; n < S::NB; n++) {
                    const int column = S::col(warp) + 8 * n + fragment_column(lane, 0);
                    const float a = scale * x[mb][n][2 * half], b = scale * x[mb][n][2 * half + 1];
                    if (w.splits > 1) { write_pair(row, column, WIDTH, a, b, true, f32()); } else { write_pair(row, column, d, a, b, pair, T()); }
                }
            }
        }
    }
}

/* Whether this thread's share of the K tile holds an inf or NaN. */
static __device__ __forceinline__ bool keys_poisoned(const shared &mem)
{
    bool found = false;
    for (int n = threadIdx.x; n < BLOCK_K * Q_BYTES / 16; n += THREADS) {
        const uint4 x = ((const uint4 *)mem.k)[n];
        found |= finite_or_zero(x.x, T()) != x.x || finite_or_zero(x.y, T()) != x.y || finite_or_zero(x.z, T()) != x.z || finite_or_zero(x.w, T()) != x.w;
    }
    return found;
}

/* After a barrier behind the additions to its tile. */
static __device__ __forceinline__ void pass_turn(const walk_step &step) { red_release_add_s32((int32_t *)step.at[AT_TURN], 1); }

/* What a step does once P and dS are there: its part of dQ, and dV and dK. */
static __device__ __forceinline__ void gradient_tiles(shared &mem, const fgqa_params &params, int stage, int buffer, const walk_step &step,
                                                      int32_t turn_seen, bool pair, bool poisoned, int warp, float (&dk)[of_dk::MB][of_dk::NB][4],
                                                      float (&dv)[of_dv::MB][of_dv::NB][4])
{
    {
        float dq[of_dq::MB][of_dq::NB][4] = {};
        const int lane = lane_here();
        const ds_along a(smem_address(mem.ds[buffer]), of_dq::row(warp), lane);
        const qk_across b(smem_address(mem.k), of_dq::col(warp), lane);
        if (poisoned) {
            warp_gemm_finite<T, BLOCK_K, of_dq::MB, of_dq::NB>(dq, a, b);
        } else {
            warp_gemm<T, BLOCK_K, of_dq::MB, of_dq::NB>(dq, a, b);
        }
        add_dq(mem, params, dq, step, turn_seen, pair, warp, lane);
    }
    const int lane = lane_here();
    warp_gemm<T, BLOCK_Q, of_dv::MB, of_dv::NB>(dv, p_across(smem_address(mem.p[buffer]), of_dv::row(warp), lane),
                                                dout_across(smem_address(mem.dout[stage]), of_dv::col(warp), lane));
    warp_gemm<T, BLOCK_Q, of_dk::MB, of_dk::NB>(dk, p_across(smem_address(mem.ds[buffer]), of_dk::row(warp), lane),
                                                qk_across(smem_address(mem.q[stage]), of_dk::col(warp), lane));
}

/* Where two blocks fit into an SM's shared memory, they must into its registers, too: each fills the other's waits. */
static constexpr int RESIDENT = !GENERAL && sizeof(shared) <= 113 * 1024 ? 2 : 1;

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
FGQA_SUFFIX(FGQA_ROW, _kernel)(const __grid_constant__ fgqa_params params, const __grid_constant__ fgqa_bwd_workspace w, const __grid_constant__ launch launch)
{
    extern __shared__ __align__(128) char memory[];
    shared &mem = *(shared *)memory;
    const fgqa_problem &p = params.problem;
    const task &t = mem.task;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
    constexpr int AHEAD = STAGES == 3 ? 1 : 0;             /* scores run one step ahead of the gradients */
    const bool tensors_hide = GENERAL && (p.view[FGQA_ARG_mask].data != nullptr || p.view[FGQA_ARG_bias].data != nullptr);

    for (;;) {
        __syncthreads();                                   /* the previous task is no longer read */
        if (warp == 0) { take_task(mem.task, mem.steps, params, w, launch, lane); }
        __syncthreads();
        if (t.done) { return; }
        float dk[of_dk::MB][of_dk::NB][4] = {}, dv[of_dv::MB][of_dv::NB][4] = {};
        if (mem.steps[0].i >= 0) {
            load_keys(mem, params);
            load_queries(mem, params, 0, 0, mem.steps[0]);
            cp_async_commit();
        }
        bool poisoned = false;
        int stage = 0;
        for (int count = 0;; count++) {                    /* step whose scores are next; its tile is in `stage` */
            cp_async_wait<0>();
            __syncthreads();                               /* the tile has arrived; what the step before the last used is free */
            const walk_step &step = mem.steps[count & 3], &ahead = mem.steps[(count + 1) & 3], &behind = mem.steps[(count - AHEAD) & 3];
            const bool scores = step.i >= 0, gradients = count >= AHEAD && behind.i >= 0;
            if (warp == count % WARPS && lane == 0 && count > AHEAD) { pass_turn(mem.steps[(count - 1 - AHEAD) & 3]); }
            if (!scores && !gradients) { break; }
            if (count == 0 && (!t.all || tensors_hide)) { poisoned = __syncthreads_or(keys_poisoned(mem)); }
            if (warp == count % WARPS) { describe_next(t, mem.steps[(count + 2) & 3], ahead, w.splits, p.g, lane); }
            const int next_stage = stage + 1 == STAGES ? 0 : stage + 1;
            if (STAGES > 1 && ahead.i >= 0) {
                load_queries(mem, params, next_stage, ~count & 1, ahead);
                cp_async_commit();
            }
            const int32_t turn_seen = gradients ? load_relaxed_s32((const int32_t *)behind.at[AT_TURN]) : 0;
            if (AHEAD == 0) {
                if (warp < SCORE_WARPS) { score_tiles(mem, params, stage, ROW_BUFFERS == 1 ? 0 : count & 1, 0, step, warp); }
                __syncthreads();                           /* P and dS are there */
                gradient_tiles(mem, params, stage, 0, step, turn_seen, launch.pair_dq, poisoned, warp, dk, dv);
                if (STAGES == 1) {
                    __syncthreads();                       /* Q and dO are used up */
                    if (ahead.i >= 0) {
                        load_queries(mem, params, 0, 0, ahead);
                        cp_async_commit();
                    }
                }
            } else {
                const int last_stage = stage == 0 ? STAGES - 1 : stage - 1;
#pragma unroll 1
                for (int half = 0; half < 2; half++) {
                    if ((warp / 4 + half) % 2 == 0) {
                        if (scores) { score_tiles(mem, params, stage, count & 1, count & 1, step, warp); }
                    } else if (gradients) {
                        gradient_tiles(mem, params, last_stage, ~count & 1, behind, turn_seen, launch.pair_dq, poisoned, warp, dk, dv);
                    }
                }
            }
            stage = next_stage;
        }
        store_keys<of_dk, D>(mem, params, w, dk, p.view[FGQA_ARG_dk], w.dk, p.d, params.scale, launch.pair_dk, warp, lane);
        store_keys<of_dv, DV>(mem, params, w, dv, p.view[FGQA_ARG_dv], w.dv, p.dv, GENERAL ? params.dropout_scale : 1.0f, launch.pair_dv, warp, lane);
    }
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(shared); }

#if FGQA_BWD_GENERAL
#include "bwd_dbias.cuh"
#endif

/* Whether two neighbouring elements of every row can be stored as one word. */
static int32_t pairs_aligned(const fgqa_view &view)
{
    const int64_t word = 2 * sizeof(T);
    return (uintptr_t)view.data % word == 0 && (view.stride_b | view.stride_h | view.stride_s) % 2 == 0;
}

extern "C" size_t FGQA_SUFFIX(FGQA_ROW, _workspace)(const fgqa_problem *problem, int32_t splits, void *base, fgqa_bwd_workspace *w)
{
    return fgqa_bwd_workspace_take(problem, BLOCK_Q, BLOCK_K, D, DV, splits, base, w);
}

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    const cudaStream_t stream = (cudaStream_t)exec->stream;
    const fgqa_params params = fgqa_params_make(problem);
    fgqa_bwd_workspace w;
    fgqa_bwd_workspace_take(problem, BLOCK_Q, BLOCK_K, D, DV, plan->splits, workspace, &w);
    int device, sms;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) { error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device); }
    if (error == cudaSuccess) {
        error = cudaFuncSetAttribute((const void *)FGQA_SUFFIX(FGQA_ROW, _kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, (int)sizeof(shared));
    }
    if (error == cudaSuccess) { error = (cudaError_t)fgqa_bwd_delta(problem, &w, stream); }
    if (error != cudaSuccess) { return error; }

    launch launch;
    const int64_t key_tiles = problem->sk > 0 ? ((int64_t)problem->sk + BLOCK_K - 1) / BLOCK_K : 1;
    launch.sections = (int64_t)problem->b * problem->hk * w.splits;
    /* Key tiles of one section follow each other at one turn's distance at best, so blocks that become free together must get
     * key tiles of different sections. It also hands out the long tasks of a causal mask first. */
    launch.band = (4 * sms + key_tiles - 1) / key_tiles;
    launch.pair_dq = pairs_aligned(problem->view[FGQA_ARG_dq]);
    launch.pair_dk = pairs_aligned(problem->view[FGQA_ARG_dk]);
    launch.pair_dv = pairs_aligned(problem->view[FGQA_ARG_dv]);
    const int64_t tasks = launch.sections * key_tiles, most = (int64_t)sms * (232448 / (int64_t)sizeof(shared) + 1);
    if (tasks > 0) {
        FGQA_SUFFIX(FGQA_ROW, _kernel)<<<(uint32_t)(tasks < most ? tasks : most), THREADS, sizeof(shared), stream>>>(params, w, launch);
        error = cudaGetLastError();
    }
    if (error == cudaSuccess && w.splits > 1) { error = (cudaError_t)fgqa_bwd_reduce(problem, &w, D, DV, stream); }
    if (error == cudaSuccess && problem->view[FGQA_ARG_dsink].data) { error = (cudaError_t)fgqa_bwd_dsink(problem, &w, stream); }
#if FGQA_BWD_GENERAL
    if (error == cudaSuccess && problem->view[FGQA_ARG_dbias].data) { error = (cudaError_t)dbias_launch(params, w, stream); }
#endif
    return error;
}
