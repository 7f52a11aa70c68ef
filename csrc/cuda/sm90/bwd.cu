/* bwd.cu - attention backward for Hopper: TMA, wgmma, warp-specialised, persistent. Compiled once per bwd row of kernels.def
 * whose arch is 90.
 *
 *     S = Q K^T   P = 2^(S - LSE)   dP = dO V^T   dS = P (dP - delta)
 *     dV = P^T dO   dK = scale dS^T Q   dQ = scale dS K              interval masks of semantics.h; with a soft cap bwd_softcap.cuh,
 *                                                                    with ALiBi bwd_alibi.cuh, with a bias bwd_bias.cuh
 *
 * A task is a key tile of a KV head (bwd_tasks.cuh): dK and dV stay in registers while the block walks the query tiles of all
 * heads of the group, and are stored once. dQ of a query tile is summed in float32 in memory: in a fixed order of the key tiles
 * (bwd_key_tile_at(), bwd_shift.h), so that the bits never change, or (fgqa_bwd_order.any_order) as they come; bwd_finish.cuh
 * converts it while later tasks run. Head dim 256: a second kernel makes dQ (bwd_queries.cuh).
 *
 *   warpgroup 0, warp 0   producer:  TMA loads of Q, dO, K, V and the statistics of rows
 *                warp 1   scheduler: takes tasks; in between, converts query tiles of dQ to which all key tiles have been added
 *           warps 2, 3   writers:   add dQ tiles, each those of one buffer: an addition and its turn take longer than a step
 *   warpgroups 1, 2       consumers: all scores transposed (bwd_consumer.cuh), 64 keys each (bwd_pair.cuh) or, head dim 256, the same
 *                                   64 keys (bwd_wide.cuh)
 *
 * Shared memory: 128-byte-swizzled tiles in chunks of 64 columns, q[stage][chunk][row][64], k[chunk][128 keys][64]; ds
 * [stage][half][key][64 rows]; dq[buffer] in the order of the consumers' accumulators.
 *
 * mbarrier              arrivals (count)                            waited for by              meaning
 * task_full             scheduler (1)                               all others                 tasks[count % 2] is there
 * task_free             producer, writers, consumer warps (11, 9)   scheduler                  the task before is ending
 * q_full, dout_full[s]  producer + bytes (1)                        consumers                  tile and its lse2, delta are there
 * q_empty, dout_empty   one thread of each consumer (2)             producer                   tile was used by both
 * k_full, v_full        producer + bytes (1)                        consumers
 * kv_empty              consumer warps (8)                          producer                   K and V were used by all
 * dq_full[s]            consumer warps (8)                          writer                     dQ is staged
 * dq_empty[s]           writer (1)                                  consumers                  staged dQ was read
 * ds_full[s]            consumer warps (8)                          consumers                  dS of both is stored; d 64: one buffer
 * ds_empty[s]           consumer warps (8)                          consumers                  dQ of both was made of it
 * named BOTH            256                                         consumers                  both are here
 * bias_full[slot]       producer + bytes (1)                        consumers                  with a bias: its tile is there
 * bias_empty[slot]      consumer warps (8), float32: its own (4)    producer                   it was used by all, dbias was read
 * weights_full[s]       warps of consumer 0 (4)                     consumer 1, d 256          P is stored
 * weights_empty[s]      warps of consumer 1 (4)                     consumer 0, d 256          P was read
 */
#include "../any/bwd_plan.h"
#include "../any/score_units.h"
#include "../common/byte_bits.cuh"
#include "../common/dropout.cuh"
#include "../common/launch.cuh"
#include "../common/mask_tensor.cuh"
#include "../common/params.cuh"
#include "../common/ptx_bulk.cuh"
#include "../common/ptx_global.cuh"
#include "../common/ptx_tma.cuh"
#include "../common/softcap.cuh"
#include "../common/softmax.cuh"
#include "../kernel_table.h"
#include "../tensor_map.h"
#include "fwd_terms.cuh"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)

#ifndef FGQA_NO_CODE

#include "../common/ptx_ldmatrix.cuh"
#include "bwd_wgmma.cuh"
#include "warpgroup.cuh"

typedef FGQA_DTYPE T;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, BLOCK_K = FGQA_BLOCK_K, THREADS = 32 * FGQA_WARPS, CONSUMERS = 256;
static_assert(D == DV && (D == 64 || D == 128 || D == 256) && BLOCK_Q == (D == 64 ? 128 : 64) && BLOCK_K == (D == 256 ? 64 : 128) && FGQA_STAGES == 2 && FGQA_WARPS == 12,
              "kernels.def: sizes that there are");
static constexpr int CHUNKS = D / CHUNK;
static constexpr int SM_BYTES = 227 * 1024, PRODUCER_REGS = 40, CONSUMER_REGS = 232;
static constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;
/* What happens to scores besides the scale and the interval mask: a kernel of its own each. .. AND_MORE: a bias and a mask
 * tensor, or a bias whose gradient is stored, or both. ALIBI_AND_BITS: slopes, a mask tensor and dropout, of which each may be
 * missing; CAPPED_AND_BITS beside a soft cap, WIDE_BIAS_AND_BITS beside a float32 bias and without slopes. BIAS_AND_ALL: a
 * bias, of head dim 256 any, of others of q's dtype, beside a soft cap, slopes, a mask tensor and dropout, of which each may
 * be missing; WIDE_BIAS_AND_ALL of float32. */
enum score_kind { PLAIN, CAPPED, ALIBI, CAPPED_ALIBI, MASK_TENSOR, DROPOUT, MASK_AND_DROPOUT, BIASED, BIAS_AND_MORE, BIAS_AND_DROPOUT, BIAS_AND_DROPOUT_AND_MORE,
                  ALIBI_AND_BITS, CAPPED_AND_BITS, WIDE_BIASED, WIDE_BIAS_AND_BITS, BIAS_AND_ALL, WIDE_BIAS_AND_ALL };
template <score_kind KIND> static constexpr bool BIAS_IN_MIX = KIND == BIAS_AND_ALL || KIND == WIDE_BIAS_AND_ALL;
template <score_kind KIND> static constexpr bool ANY_BITS = KIND == ALIBI_AND_BITS || KIND == CAPPED_AND_BITS || KIND == WIDE_BIAS_AND_BITS || BIAS_IN_MIX<KIND>;
template <score_kind KIND> static constexpr bool WIDE_BIAS = KIND == WIDE_BIASED || KIND == WIDE_BIAS_AND_BITS || KIND == WIDE_BIAS_AND_ALL;
template <score_kind KIND> static constexpr bool STORES_DBIAS = KIND == BIAS_AND_MORE || KIND == BIAS_AND_DROPOUT_AND_MORE;       /* in the place of the bias, until TMA has stored it */
template <score_kind KIND> static constexpr bool HAS_MASK = KIND == MASK_TENSOR || KIND == MASK_AND_DROPOUT || ANY_BITS<KIND> || STORES_DBIAS<KIND>;
template <score_kind KIND> static constexpr bool DROPS = KIND == DROPOUT || KIND == MASK_AND_DROPOUT || KIND == BIAS_AND_DROPOUT || KIND == BIAS_AND_DROPOUT_AND_MORE || ANY_BITS<KIND>;
template <score_kind KIND> static constexpr bool HAS_BITS = HAS_MASK<KIND> || DROPS<KIND>;
template <score_kind KIND> static constexpr bool WITH_CAP = KIND == CAPPED || KIND == CAPPED_ALIBI || KIND == CAPPED_AND_BITS;
template <score_kind KIND> static constexpr bool SLOPED = WITH_CAP<KIND> || BIAS_IN_MIX<KIND>;      /* what dS is made of is not P */
template <score_kind KIND> static constexpr bool WITH_ALIBI = KIND == ALIBI || KIND == CAPPED_ALIBI || KIND == ALIBI_AND_BITS || KIND == CAPPED_AND_BITS || BIAS_IN_MIX<KIND>;
template <score_kind KIND> static constexpr bool HAS_BIAS = KIND == BIASED || KIND == BIAS_AND_DROPOUT || STORES_DBIAS<KIND> || WIDE_BIAS<KIND> || KIND == BIAS_AND_ALL;
template <score_kind KIND> static constexpr bool BIAS_BY_TMA = HAS_BIAS<KIND> && D != 256;
enum { BOTH = 1 };                                                   /* named barriers: 0 is __syncthreads */
/* A tile has rows that hold anything; inf or NaN in rows that count; rows that do not see all keys. Keys or, with a bias,
 * values are inf or NaN. With a bias: rows whose scores count from a base. */
enum { CARE_PADDING = 2, CARE_POISON = 4, PARTIAL = 8, KEYS_POISONED = 16, VALUES_POISONED = 32, CARE_BASES = 64 };

struct bwd_params {
    CUtensorMap q_map, k_map, v_map, dout_map;                   /* dims (column, head, row, batch); box 64 columns x a tile's rows */
    fgqa_params common;
    fgqa_bwd_workspace w;
    fgqa_bwd_shift shift;
    float *late_dq;                                              /* bwd_shift.h */
    float scale_log2;                                            /* of scores, with a soft cap in units of it */
    uint32_t sections, band, run;                                /* find_task() */
    int32_t by_head, ordered, foreign_rows;                      /* tiles may reach into padding or the next sequence */
    struct { uint32_t tiles, band, span, low, late; } finish;    /* numbered_tile() */
    int32_t vector_dq, vector_dk, vector_dv;                            /* rows start on 16 bytes */
    float in_caps;                                               /* scale / softcap */
    int32_t mask_vectors;                                        /* eight elements of a row start on 8 bytes */
    float inv_dropout_scale;
    CUtensorMap bias_map, dbias_map;                             /* dims (key, head, row, batch); box 64 keys (float32: 32) x 64 rows */
    int32_t some_dbias, vector_dbias;                            /* rows, up to head dim 128, or pairs or eights of elements are aligned */
    float score_scale;                                           /* of scores, or with a soft cap the cap, beside a bias; without dropout's, which dK and dQ have */
    float dbias_scale;                                           /* dropout's */
};

/* A pair of elements with 0 for those that are inf or NaN. */
template <typename E> static __device__ __forceinline__ uint32_t finite_or_zero(uint32_t x, E)
{
    constexpr uint32_t EXPONENT = __is_same(E, bf16) ? 0x7F80u : 0x7C00u;
    if ((x & EXPONENT) == EXPONENT) { x &= 0xFFFF0000u; }
    if ((x >> 16 & EXPONENT) == EXPONENT) { x &= 0x0000FFFFu; }
    return x;
}

#include "bwd_fragments.cuh"
#if FGQA_D != 256
#include "bwd_finish.cuh"
#endif
#include "bwd_tasks.cuh"
#include "bwd_bias.cuh"
#include "bwd_bits.cuh"
#include "bwd_consumer.cuh"
#include "bwd_alibi.cuh"
#include "bwd_softcap.cuh"
#include "bwd_any_bias.cuh"
#if FGQA_D == 256
#include "bwd_wide.cuh"
#include "fwd_dropout.cuh"
#include "bwd_queries.cuh"
#else
#include "bwd_pair.cuh"
#endif
#include "bwd_dbias.cuh"
#if FGQA_D == 256
#include "bwd_dbias_wide.cuh"
#endif

template <bool MASKED, score_kind KIND> __global__ void __launch_bounds__(THREADS, 1) bwd_kernel(const __grid_constant__ bwd_params p)
{
    extern __shared__ __align__(1024) char memory[];
    shared &sm = *(shared *)memory;
    const int warp = __shfl_sync(ALL_LANES, thread_index() / 32, 0), wg = warp / 4, lane = (int)thread_index() % 32;

    if (thread_index() == 0) {
        if (smem_address(memory) % 1024) { __trap(); }           /* the swizzle pattern repeats every 1024 bytes */
        prefetch_tensormap(&p.q_map);
        prefetch_tensormap(&p.k_map);
        prefetch_tensormap(&p.v_map);
        prefetch_tensormap(&p.dout_map);
        if (DROPS<KIND>) { sm.dropout = dropout_key_make(p.common.problem); }
        if (BIAS_BY_TMA<KIND>) { prefetch_tensormap(&p.bias_map); }
        if (BIAS_IN_MIX<KIND>) { sm.capped = p.in_caps > 0.0f; }
        mbarrier_init(smem_address(&sm.task_full), 1);
        mbarrier_init(smem_address(&sm.task_free), (D == 256 ? 1 : 3) + CONSUMERS / 32);
        mbarrier_init(smem_address(&sm.k_full), 1);
        mbarrier_init(smem_address(&sm.v_full), 1);
        mbarrier_init(smem_address(&sm.kv_empty), CONSUMERS / 32);
        for (int s = 0; s < 2; s++) {
            mbarrier_init(smem_address(&sm.q_full[s]), 1);
            mbarrier_init(smem_address(&sm.q_empty[s]), 2);
            mbarrier_init(smem_address(&sm.dout_full[s]), 1);
            mbarrier_init(smem_address(&sm.dout_empty[s]), 2);
        }
        init_more_barriers(sm);
        for (int s = 0; s < 2 && BIAS_BY_TMA<KIND>; s++) {
            mbarrier_init(smem_address(&sm.bias_full[s]), 1);
            mbarrier_init(smem_address(&sm.bias_empty[s]), CONSUMERS / 32 / (WIDE_BIAS<KIND> ? 2 : 1));
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (wg == 0) {
        setmaxnreg_dec<PRODUCER_REGS>();
        if (warp == 0 && lane == 0) { produce<MASKED, KIND>(p, sm); }
        if (warp == 1) { schedule<MASKED>(p, sm); }
#if FGQA_D != 256
        if (warp >= 2 && lane == 0) { write_dq<MASKED, KIND>(p, sm, (uint32_t)warp - 2); }
#endif
    } else {
        setmaxnreg_inc<CONSUMER_REGS>();
        consume<MASKED, KIND>(p, sm, wg - 1);
#if FGQA_D != 256
        dq_tile t;
        while (take_tile(p, &t)) { finish_tile<4>(p, t, 0); }
#endif
    }
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(shared); }

/* Whether no row may see some tile: tensors hide no tiles as such. */
static bool skips_tiles(const fgqa_problem *problem)
{
    fgqa_problem of_masks = *problem;
    of_masks.view[FGQA_ARG_bias].data = of_masks.view[FGQA_ARG_mask].data = NULL;
    return fgqa_bwd_hides(&of_masks, 1);
}

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    static launch_state plain_state, masked_state, capped_state, alibi_state, capped_alibi_state, alibi_and_bits_state, capped_and_bits_state, bits_states[4], bias_states[6], bias_and_all_states[2];
    const cudaStream_t stream = (cudaStream_t)exec->stream;
    const int32_t device = problem->device.index;
    int multiprocessors = 1;
    bwd_params p;
    const fgqa_map_box query = {CHUNK, 1, BLOCK_Q}, key = {CHUNK, 1, BLOCK_K};
    int error = fgqa_tensor_map(&p.q_map, problem, FGQA_ARG_q, query);
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.k_map, problem, FGQA_ARG_k, key); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.v_map, problem, FGQA_ARG_v, key); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.dout_map, problem, FGQA_ARG_dout, query); }
    if (error == cudaSuccess) { error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device); }
    if (error != cudaSuccess) { return error; }
    p.common = fgqa_params_make(problem);
    const fgqa_bwd_order order = fgqa_bwd_order_of(problem, D, BLOCK_Q, BLOCK_K, plan->splits, multiprocessors);
    p.shift = order.shift;
    (void)fgqa_bwd_shifted_take(problem, BLOCK_Q, BLOCK_K, D, DV, plan->splits, FGQA_BWD_TILED, p.shift, workspace, &p.w, &p.late_dq);
    p.w.chain = order.chain;
    const bool capped = problem->softcap > 0.0;
    p.scale_log2 = (capped ? p.common.softcap : p.common.scale) * (float)FGQA_LOG2E;
    p.score_scale = capped ? p.common.softcap : p.common.scale;
    p.in_caps = fgqa_in_caps(problem);
    p.ordered = !order.any_order;
    p.foreign_rows = problem->varlen || problem->q_lens;
    p.vector_dq = fgqa_view_is_vector(problem, FGQA_ARG_dq);
    p.vector_dk = fgqa_view_is_vector(problem, FGQA_ARG_dk);
    p.vector_dv = fgqa_view_is_vector(problem, FGQA_ARG_dv);
    const fgqa_view &mask = problem->view[FGQA_ARG_mask];
    p.mask_vectors = mask.stride_d == 1 && (uintptr_t)mask.data % 8 == 0 && (mask.stride_b | mask.stride_h | mask.stride_s) % 8 == 0;

    const int64_t key_tiles = problem->sk > 0 ? ((int64_t)problem->sk + BLOCK_K - 1) / BLOCK_K : 1;
    p.sections = (uint32_t)problem->b * (uint32_t)problem->hk * (uint32_t)p.w.splits;
    p.band = min((uint32_t)order.band, p.sections);
    p.run = (uint32_t)order.run;
    p.by_head = fgqa_bwd_by_head(problem, p.w.splits);
#if FGQA_D != 256
    p.finish = finish_order(p, problem, order, multiprocessors);
#endif
    const bool masked = p.w.key_rows != NULL, slopes = problem->view[FGQA_ARG_alibi_slopes].data, drops = problem->dropout_threshold != 0;
    const bool some_mask = mask.data, bits = some_mask || drops;
    auto kernel = capped ? bwd_kernel<true, CAPPED> : masked ? bwd_kernel<true, PLAIN> : bwd_kernel<false, PLAIN>;
    launch_state *state = capped ? &capped_state : masked ? &masked_state : &plain_state;
    p.inv_dropout_scale = p.dbias_scale = 1.0f;
    if (drops && problem->dropout_threshold < 65536) {           /* else dS has nothing to be scaled */
        p.inv_dropout_scale = 1.0f / p.common.dropout_scale;
        p.dbias_scale = p.common.dropout_scale;
        p.common.scale *= p.common.dropout_scale;                /* of dK and dQ: that of scores is scale_log2 */
    }
    const fgqa_view &dbias = problem->view[FGQA_ARG_dbias];
    const bool shared_bias = problem->bias_shape[0] != problem->b || problem->bias_shape[1] != problem->hq;
    bool sums_dbias = dbias.data && (shared_bias || capped);
    if (D == 256 && problem->view[FGQA_ARG_bias].data) {
        p.some_dbias = dbias.data && !sums_dbias;
        p.vector_dbias = (uintptr_t)dbias.data % 16 == 0 && problem->sk % 8 == 0;
        if (p.some_dbias && skips_tiles(problem)) {
            const int64_t elements = (int64_t)problem->b * problem->hq * problem->sq * problem->sk;
            error = cudaMemsetAsync(dbias.data, 0, (size_t)elements * (dbias.dtype == FGQA_F32 ? 4 : 2), stream);
            if (error != cudaSuccess) { return error; }
        }
        kernel = bwd_kernel<true, D == 256 ? BIAS_AND_ALL : PLAIN>;
        state = &bias_and_all_states[0];
    } else if (capped && bits) {
        kernel = bwd_kernel<true, CAPPED_AND_BITS>;
        state = &capped_and_bits_state;
    } else if (slopes && capped) {
        kernel = bwd_kernel<true, CAPPED_ALIBI>;
        state = &capped_alibi_state;
    } else if (D == 256 ? slopes || bits : slopes && bits) {
        kernel = bwd_kernel<true, ALIBI_AND_BITS>;
        state = &alibi_and_bits_state;
    }
#if FGQA_D != 256
    if (slopes && !capped && !bits) {
        kernel = bwd_kernel<true, ALIBI>;
        state = &alibi_state;
    } else if (bits && !slopes && !capped) {
        kernel = drops ? some_mask ? bwd_kernel<true, MASK_AND_DROPOUT> : bwd_kernel<true, DROPOUT> : bwd_kernel<true, MASK_TENSOR>;
        state = &bits_states[2 * drops + some_mask];
    }
#endif
#if FGQA_BWD_HAS_BIAS(FGQA_D)
    if (problem->view[FGQA_ARG_bias].data) {
        const bool wide = problem->view[FGQA_ARG_bias].dtype == FGQA_F32;
        const fgqa_map_box box = {wide ? 32 : 64, 1, 64};
        const bool wanted = dbias.data != NULL;
        p.vector_dbias = problem->sk % 8 == 0;
        sums_dbias |= wanted && (wide || slopes || !p.vector_dbias);
        p.some_dbias = wanted && !sums_dbias;
        error = fgqa_tensor_map(&p.bias_map, problem, FGQA_ARG_bias, box);
        if (error == cudaSuccess && wanted && !wide && p.vector_dbias) {
            error = fgqa_tensor_map(&p.dbias_map, problem, FGQA_ARG_dbias, box);
        }
        if (error == cudaSuccess && p.some_dbias && skips_tiles(problem)) {
            const int64_t elements = (int64_t)problem->b * problem->hq * problem->sq * problem->sk;
            error = cudaMemsetAsync(dbias.data, 0, (size_t)elements * sizeof(T), stream);
        }
        if (error != cudaSuccess) { return error; }
        const bool more = some_mask || p.some_dbias;
        kernel = drops ? more ? bwd_kernel<true, BIAS_AND_DROPOUT_AND_MORE> : bwd_kernel<true, BIAS_AND_DROPOUT> : more ? bwd_kernel<true, BIAS_AND_MORE> : bwd_kernel<true, BIASED>;
        state = &bias_states[2 * drops + more];
        if (capped || slopes) {
            kernel = wide ? bwd_kernel<true, WIDE_BIAS_AND_ALL> : bwd_kernel<true, BIAS_AND_ALL>;
            state = &bias_and_all_states[wide];
        } else if (wide) {
            kernel = bits ? bwd_kernel<true, WIDE_BIAS_AND_BITS> : bwd_kernel<true, WIDE_BIASED>;
            state = &bias_states[4 + bits];
        }
    }
#endif
    const int64_t tasks = p.sections * key_tiles;
    /* More blocks than chains have members would take tickets out of step. */
    const int64_t members = (int64_t)p.band * p.w.chain, most = 10 * members >= 9 * multiprocessors ? min(members, (int64_t)multiprocessors) : multiprocessors;
    const uint32_t blocks = (uint32_t)min(tasks, most);
    error = allow_shared_memory((const void *)kernel, sizeof(shared), device, state);
    if (error == cudaSuccess) { error = fgqa_bwd_delta(problem, &p.w, stream); }
    if (error == cudaSuccess && !p.ordered) { error = cudaMemsetAsync(p.w.dq, 0, (size_t)p.w.q_tiles * (BLOCK_Q * D) * sizeof(float), stream); }
    if (error != cudaSuccess) { return error; }
    error = launch_kernel(kernel, blocks, THREADS, sizeof(shared), stream, p);
#if FGQA_D == 256
    if (error == cudaSuccess) { error = finish(p, device, multiprocessors, stream); }
#endif
    p.some_dbias |= sums_dbias;
    if (error == cudaSuccess && sums_dbias) { error = sum_dbias(p, device, multiprocessors, stream); }
    if (error == cudaSuccess && p.w.splits > 1) { error = fgqa_bwd_reduce(problem, &p.w, D, DV, stream); }
    if (error == cudaSuccess && capped) { error = fgqa_bwd_poison(problem, &p.w, stream); }
    if (error == cudaSuccess && problem->view[FGQA_ARG_dsink].data) { error = fgqa_bwd_dsink(problem, &p.w, stream); }
    return error;
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
