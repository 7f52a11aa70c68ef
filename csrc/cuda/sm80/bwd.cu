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
 * bwd_walk.cuh is the walk, bwd_store.cuh what leaves the block, bwd_score.cuh the scores of general variants, bwd_gemm.cuh the
 * products.
 *
 * Each product is spread over the warps in its own way (constants below). A barrier is also what makes the additions to dQ
 * complete: after the next one one warp, a different one each step, passes the turn on.
 */
#include "../common/launch.cuh"
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
template <bool> struct stats_of { typedef plain_stats type; };
template <> struct stats_of<true> { typedef general_stats type; };
typedef stats_of<GENERAL>::type row_stats;

#include "bwd_walk.cuh"

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

typedef gemm_operand<T, Q_BYTES, ALONG, true> q_along;
typedef gemm_operand<T, Q_BYTES, ALONG, false> k_along;
typedef gemm_operand<T, V_BYTES, ALONG, true> dout_along;
typedef gemm_operand<T, V_BYTES, ALONG, false> v_along;
typedef gemm_operand<T, P_BYTES, ALONG, true> ds_along;
typedef gemm_operand<T, P_BYTES, ACROSS, true> p_across;
typedef gemm_operand<T, Q_BYTES, ACROSS, false> qk_across;
typedef gemm_operand<T, V_BYTES, ACROSS, false> dout_across;

#if FGQA_BWD_GENERAL
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
#endif

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
    const plain_stats *stats = mem.stats[at] + row0 + lane / 4;
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float lse2 = stats[16 * mb + 8 * (r / 2)].lse2;
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
            const float delta = stats[16 * mb + 8 * half].delta;
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
#include "bwd_store.cuh"

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

/* One element of a tile. */
template <int ROW_BYTES> static __device__ __forceinline__ float tile_element(const char *tile, int row, int column)
{
    constexpr int PIECE = 16 / (int)sizeof(T);
    return to_float(*(const T *)(tile + swizzle<ROW_BYTES>(row, column / PIECE) + column % PIECE * (int)sizeof(T)));
}

/* sum += factor x of the elements x of a tile of `count` rows that are inf or NaN, where the weight of query row and key is
 * not 0. Of dV the factor is the weight. Of dK and dQ (OF_ROWS: its rows are query rows, those of the tile keys) it is 0: dS
 * of a score that is as large as the soft cap, or of no importance, where the weight is NaN. */
template <typename SHARE, int ROW_BYTES, bool OF_WEIGHTS, bool OF_ROWS>
static __device__ __forceinline__ void add_poison(const char *tile, int count, const char *weights, int warp, int lane, float (&sum)[SHARE::MB][SHARE::NB][4])
{
#pragma unroll 1
    for (int n = 0; n < count; n++) {
#pragma unroll
        for (int c = 0; c < 2 * SHARE::NB; c++) {
            const float x = tile_element<ROW_BYTES>(tile, n, SHARE::col(warp) + 8 * (c / 2) + fragment_column(lane, c % 2));
            if (isfinite(x)) { continue; }
#pragma unroll
            for (int m = 0; m < 2 * SHARE::MB; m++) {
                const int row = SHARE::row(warp) + 8 * m + lane / 4;
                const float weight = tile_element<P_BYTES>(weights, OF_ROWS ? row : n, OF_ROWS ? n : row);
                if (weight != 0.0f) { sum[m / 2][c / 2][2 * (m % 2) + c % 2] += (OF_WEIGHTS ? weight : 0.0f) * x; }
            }
        }
    }
}

/* dV and dK of a dirty query tile, whose rows with inf or NaN must not reach keys that they do not see through 0 * NaN: they
 * are taken as 0 in Q, as dS is NaN where such a row is seen, or 0 under a soft cap. A function of its own, with its sums in
 * memory: the usual way must not share its registers with this one. */
static __device__ __noinline__ void add_carefully(const shared &mem, int stage, int buffer, int warp, float (&dv)[of_dv::MB][of_dv::NB][4], float (&dk)[of_dk::MB][of_dk::NB][4])
{
    const int lane = lane_here();
    warp_gemm_finite<T, BLOCK_Q, of_dv::MB, of_dv::NB>(dv, p_across(smem_address(mem.p[buffer]), of_dv::row(warp), lane),
                                                       dout_across(smem_address(mem.dout[stage]), of_dv::col(warp), lane));
    add_poison<of_dv, V_BYTES, true, false>(mem.dout[stage], BLOCK_Q, mem.p[buffer], warp, lane, dv);
    warp_gemm_finite<T, BLOCK_Q, of_dk::MB, of_dk::NB>(dk, p_across(smem_address(mem.ds[buffer]), of_dk::row(warp), lane),
                                                       qk_across(smem_address(mem.q[stage]), of_dk::col(warp), lane));
    if (GENERAL) { add_poison<of_dk, Q_BYTES, false, false>(mem.q[stage], BLOCK_Q, mem.p[buffer], warp, lane, dk); }
}

template <int MB, int NB> static __device__ __forceinline__ void copy_sums(float (&to)[MB][NB][4], const float (&from)[MB][NB][4])
{
#pragma unroll
    for (int n = 0; n < 4 * MB * NB; n++) { to[n / 4 / NB][n / 4 % NB][n % 4] = from[n / 4 / NB][n / 4 % NB][n % 4]; }
}

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
            if (GENERAL) { add_poison<of_dq, Q_BYTES, false, true>(mem.k, BLOCK_K, mem.p[buffer], warp, lane, dq); }
        } else {
            warp_gemm<T, BLOCK_K, of_dq::MB, of_dq::NB>(dq, a, b);
        }
        add_dq(mem, params, dq, step, turn_seen, pair, warp, lane);
    }
    const int lane = lane_here();
    if (turn_seen & FGQA_BWD_DIRTY) {
        float sum_dv[of_dv::MB][of_dv::NB][4], sum_dk[of_dk::MB][of_dk::NB][4];
        copy_sums(sum_dv, dv);
        copy_sums(sum_dk, dk);
        add_carefully(mem, stage, buffer, warp, sum_dv, sum_dk);
        copy_sums(dv, sum_dv);
        copy_sums(dk, sum_dk);
        return;
    }
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
    return fgqa_bwd_workspace_take(problem, BLOCK_Q, BLOCK_K, D, DV, splits, GENERAL, base, w);
}

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    const cudaStream_t stream = (cudaStream_t)exec->stream;
    const fgqa_params params = fgqa_params_make(problem);
    fgqa_bwd_workspace w;
    fgqa_bwd_workspace_take(problem, BLOCK_Q, BLOCK_K, D, DV, plan->splits, GENERAL, workspace, &w);
    static launch_state state;
    static int multiprocessors[MAX_DEVICES];
    int &sms = multiprocessors[problem->device.index];
    cudaError_t error = allow_shared_memory((const void *)FGQA_SUFFIX(FGQA_ROW, _kernel), sizeof(shared), problem->device.index, &state);
    if (error == cudaSuccess && sms == 0) { error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, problem->device.index); }
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
        error = launch_kernel(FGQA_SUFFIX(FGQA_ROW, _kernel), (uint32_t)(tasks < most ? tasks : most), THREADS, sizeof(shared), stream, params, w, launch);
    }
    if (error == cudaSuccess && w.splits > 1) { error = (cudaError_t)fgqa_bwd_reduce(problem, &w, D, DV, stream); }
    if (error == cudaSuccess && problem->view[FGQA_ARG_dsink].data) { error = (cudaError_t)fgqa_bwd_dsink(problem, &w, stream); }
#if FGQA_BWD_GENERAL
    if (error == cudaSuccess && problem->view[FGQA_ARG_dbias].data) { error = (cudaError_t)dbias_launch(params, w, stream); }
#endif
    return error;
}
