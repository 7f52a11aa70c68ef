/* fwd_merge.cuh - chain MERGED of fwd.cu, which includes this in its middle: a tile a block, all blocks of the launch resident;
 * those that have parts of one tile's keys wait for each other and merge them, each a share of the rows. Without it a launch of
 * any/fwd_combine.cu follows, whose start and trips to memory all would wait for. To its bits where a warp has all parts of a
 * row.
 */
#pragma once
#include "../common/ptx_cp_async.cuh"
#include "../common/ptx_global.cuh"

/* A barrier that warps reach at different places in the code, without a wait for the others. */
PTX_FN void barrier_arrive(uint32_t id, uint32_t threads) { asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* A lane's four columns of a row. */
static __device__ __forceinline__ void store_merged(const fgqa_problem &problem, uint64_t row, int lane, const float (&o)[4], float scale)
{
    if (4 * lane < problem.dv) { *(uint2 *)(row + 8 * lane) = make_uint2(pack2(o[0] * scale, o[1] * scale, T()), pack2(o[2] * scale, o[3] * scale, T())); }
}

/* How a block's share of a tile's rows is dealt out. A warp has up to ITEMS pairs of a row and a part at a time: rows with all
 * of their parts, or, of more parts, those of one row that a `team` of warps shares, which hand their sums to the first. */
struct merge_cut {
    static constexpr int WARPS = 4 * WG_COUNT, ITEMS = 16;
    int rows, team, share, at_once;                              /* of the block; warps of a row; parts of a warp; rows of a team */
    __device__ __forceinline__ merge_cut(int valid, int splits) : rows((min(valid, BLOCK_Q) + splits - 1) / splits), team(1)
    {
        while (team * ITEMS < splits) { team *= 2; }
        share = (splits + team - 1) / team;
        at_once = team > 1 ? 1 : ITEMS / splits;
    }
    __device__ __forceinline__ int of_trip() const { return WARPS / team * at_once; }       /* rows of the block */
};

/* Of a pair; where there is none, zeros. */
struct merge_item { uint64_t o, end, out, lse; float sink; int32_t state; };
enum { EXISTS = 1, FIRST = 2, LAST = 4 };                        /* of the warp's parts of the row */

/* In the place of the second Q, of which a block with one tile has none. */
struct merge_plan {
    static constexpr int TRIPS = 2;
    int32_t poisoned;                                            /* some element of O is not finite */
    merge_item item[TRIPS][merge_cut::WARPS][merge_cut::ITEMS];
};
static __device__ __forceinline__ merge_plan &plan_of(shared &sm) { return *(merge_plan *)sm.q[Q_STAGES - 1]; }

/* The masker, while keys are on their way: all that can be known of the merge, for which everybody waits. */
template <chain CHAIN> static __device__ __forceinline__ void plan_merge(const fwd_params &p, shared &sm)
{
    static_assert(CHAIN != MERGED || (Q_STAGES > 1 && sizeof(sm.q[0]) >= sizeof(merge_plan)), "a place for the plan");
    const fgqa_problem &problem = p.common.problem;
    const tile &t = sm.tiles[0];                                 /* the only one */
    const int lane = (int)(thread_index() % 32), splits = (int)p.list.splits;
    const merge_cut cut(t.valid, splits);
    const int own_row = lane / cut.share, own_part = lane - own_row * cut.share, begin = (int)blockIdx.x * cut.rows;
    merge_plan &plan = plan_of(sm);
    if (lane == 0) { plan.poisoned = 0; }
#pragma unroll 1
    for (int n = 0; n < merge_plan::TRIPS * merge_cut::WARPS; n++) {
        const int warp = n % merge_cut::WARPS, trip = n / merge_cut::WARPS, first = warp % cut.team * cut.share, parts = min(cut.share, splits - first);
        const int in_block = trip * cut.of_trip() + warp / cut.team * cut.at_once + own_row, local = begin + in_block;
        merge_item item = {};
        if (own_row < cut.at_once && in_block < cut.rows && local < min(t.valid, BLOCK_Q)) {
            const int packed = t.row0 + local, i = packed >> p.list.pack, h = head_of(p, t.head, packed);
            const int64_t row = split_row(problem, t.batch, h, t.q_row, i) + (first + own_part) * p.split.rows;
            if (own_part < parts || own_part == 0) {
                item.state = EXISTS | (own_part == 0 ? FIRST : 0) | (own_part == parts - 1 ? LAST : 0);
                item.o = (uint64_t)(p.split.o + row * problem.dv);
                item.end = own_part < parts ? (uint64_t)(p.split.lse + 2 * row) : 0;
                item.out = (uint64_t)fgqa_row_address(problem.view[FGQA_ARG_out], sizeof(T), t.batch, h, t.q_row + i);
                item.lse = problem.view[FGQA_ARG_lse].data ? (uint64_t)fgqa_row_address(problem.view[FGQA_ARG_lse], sizeof(float), t.batch, h, t.q_row + i) : 0;
                item.sink = sink_logit(problem, t.batch, h, i >= t.sq);
            }
        }
        if (lane < merge_cut::ITEMS) { plan.item[trip][warp][lane] = item; }
    }
    __syncwarp();
}

/* Consumers, when they have stored what their block's part gives: whether all of it is finite. */
template <chain CHAIN> static __device__ __forceinline__ bool part_is_done(shared &sm)
{
    bar_sync(TURN, 128 * WG_COUNT);
    return plan_of(sm).poisoned == 0;
}

/* Consumers, at the end of their block, of which all have stored their part. Lane n makes what is made once for pair n.
 * Everybody waits for this, and for its instructions: so loops, in little code, and O through shared memory in the place of K. */
template <chain CHAIN> static __device__ __forceinline__ void merge_parts(const fwd_params &p, shared &sm)
{
    constexpr int WARPS = merge_cut::WARPS, ITEMS = merge_cut::ITEMS, SUMS = 33;
    static_assert(CHAIN != MERGED || DV == 128, "a lane has four columns");
    static_assert(CHAIN != MERGED || (sizeof(sm.k) >= WARPS * ITEMS * 32 * sizeof(float4) && sizeof(sm.v) >= WARPS * SUMS * sizeof(float4)), "places");
    const fgqa_problem &problem = p.common.problem;
    const uint32_t thread = thread_index();
    const int lane = (int)(thread % 32), warp = (int)(thread / 32) - 4, splits = (int)p.list.splits;
    const merge_cut cut(sm.tiles[0].valid, splits);
    const int team = cut.team, share = cut.share, own_part = lane % share;
    float4 *const copies = (float4 *)sm.k + warp * ITEMS * 32 + lane, *const sums = (float4 *)sm.v + warp * SUMS;
    if (thread == 128) {
        uint32_t *const counter = p.counters + blockIdx.z * gridDim.y + blockIdx.y;
        if (atom_inc_acq_rel(counter, p.list.splits - 1) != p.list.splits - 1) {
            while (load_acquire_s32((const int32_t *)counter) != 0) {}
        }
    }
    const merge_item *plan = plan_of(sm).item[0][warp];
    bar_sync(TURN, 128 * WG_COUNT);
#pragma unroll 1
    for (int row0 = 0; row0 < cut.rows; row0 += cut.of_trip(), plan += WARPS * ITEMS) {     /* the same trips in every warp */
        merge_item own = {};
        if (lane < ITEMS) { own = plan[lane]; }
        const bool exists = own.state & EXISTS, has = own.end != 0;
        const float sink = exists ? own.sink : -INFINITY;
        const int items = __popc(__ballot_sync(ALL_LANES, has));                 /* pairs 0, 1, ... */
        float2 end = make_float2(-INFINITY, 0.0f);
        if (has) { end = load_relaxed_f32x2((const float *)own.end); }
        if (4 * lane < problem.dv) {
#pragma unroll 4
            for (int n = 0; n < items; n++) { cp_async_16(smem_address(copies + 32 * n), (const void *)(plan[n].o + 16 * lane), 16); }      /* of parts that saw no key, too, which are not used */
        }
        cp_async_commit();
        joined_row joined = {team > 1 ? -INFINITY : sink, team == 1 && sink != sink};
#pragma unroll 4
        for (int n = 0; n < share; n++) {
            const int of = min(lane - own_part + n, 31);
            const float top = __shfl_sync(ALL_LANES, end.x, of), log_sum = __shfl_sync(ALL_LANES, end.y, of);
            joined.top = fmaxf(joined.top, top);
            joined.nan |= top != top || log_sum != log_sum;
        }
        const float weight = joined.weight(end);
        float sum = team > 1 ? 0.0f : joined.sink_weight(sink);
#pragma unroll 4
        for (int n = 0; n < share; n++) { sum += __shfl_sync(ALL_LANES, weight, min(lane - own_part + n, 31)); }
        const float scale = team > 1 ? 1.0f : joined.scale(sum);
        const uint32_t seen = __ballot_sync(ALL_LANES, has && end.x != -INFINITY), last = __ballot_sync(ALL_LANES, has && own.state & LAST);
        float o[4] = {};
        cp_async_wait<0>();
#pragma unroll 4
        for (int n = 0; n < items; n++) {
            const float w = __shfl_sync(ALL_LANES, weight, n);
            const float4 x = copies[32 * n];
            if (seen >> n & 1) {
                o[0] = fmaf(w, x.x, o[0]);
                o[1] = fmaf(w, x.y, o[1]);
                o[2] = fmaf(w, x.z, o[2]);
                o[3] = fmaf(w, x.w, o[3]);
            }
            if (!(last >> n & 1) || team > 1) { continue; }
            store_merged(problem, plan[n].out, lane, o, __shfl_sync(ALL_LANES, scale, n));
            o[0] = o[1] = o[2] = o[3] = 0.0f;
        }
        if (team == 1) {
            if (has && own.state & FIRST && own.lse) { *(float *)own.lse = joined.lse(sum); }
            continue;
        }
        sums[lane] = make_float4(o[0], o[1], o[2], o[3]);
        if (lane == 0) { sums[32] = make_float4(joined.top, sum, joined.nan, 0.0f); }
        bar_sync(TURN, 128 * WG_COUNT);
        if (warp % team == 0 && __shfl_sync(ALL_LANES, exists, 0)) {
            joined_row all = {__shfl_sync(ALL_LANES, sink, 0), false};
            const float own_sink = all.top;
            all.nan = own_sink != own_sink;
#pragma unroll 1
            for (int n = 0; n < team; n++) {
                all.top = fmaxf(all.top, sums[SUMS * n + 32].x);
                all.nan |= sums[SUMS * n + 32].z != 0.0f;
            }
            sum = all.sink_weight(own_sink);
            o[0] = o[1] = o[2] = o[3] = 0.0f;
#pragma unroll 1
            for (int n = 0; n < team; n++) {
                const float4 x = sums[SUMS * n + lane], ends = sums[SUMS * n + 32];
                const float w = all.weight(make_float2(ends.x, 0.0f));
                sum = fmaf(w, ends.y, sum);
                o[0] = fmaf(w, x.x, o[0]);
                o[1] = fmaf(w, x.y, o[1]);
                o[2] = fmaf(w, x.z, o[2]);
                o[3] = fmaf(w, x.w, o[3]);
            }
            store_merged(problem, plan[0].out, lane, o, all.scale(sum));
            if (lane == 0 && own.lse) { *(float *)own.lse = all.lse(sum); }
        }
        bar_sync(TURN, 128 * WG_COUNT);                          /* sums have been read */
    }
}

/* ---- host ---- */

/* All blocks fit on the device, and bits do not depend on the batch where they must not: more parts are added up in another
 * order. */
static bool merges_in_place(const fgqa_problem *problem, const fgqa_plan *plan, int multiprocessors)
{
    return plan->splits > 1 && !problem->varlen && plan->tasks <= multiprocessors && (!problem->batch_invariant || plan->splits <= 16);
}

/* cudaErrorCooperativeLaunchTooLarge, too, where there are no counters. */
static cudaError_t launch_merged(void (*kernel)(fwd_params), fwd_params p, const fgqa_plan *plan, int32_t device, void *stream, launch_state *state)
{
    cudaLaunchAttribute attributes[2] = {};
    attributes[0].id = cudaLaunchAttributeCooperative;           /* all blocks are resident */
    attributes[0].val.cooperative = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    const bool one_row_block = p.list.row_blocks == 1;
    config.gridDim = dim3(p.list.splits, one_row_block ? p.list.units : p.list.row_blocks * p.list.pairs, one_row_block ? (uint32_t)p.common.problem.b : 1);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = sizeof(shared);
    config.stream = (cudaStream_t)stream;
    config.attrs = attributes;
    config.numAttrs = may_begin_early() ? 2 : 1;
    const cudaError_t error = allow_shared_memory((const void *)kernel, sizeof(shared), device, state);
    p.slot = -1;                                                 /* nobody takes a second tile */
    p.counters = fgqa_dec_counters(device, (int32_t)(plan->tasks / plan->splits), stream);
    return error != cudaSuccess ? error : p.counters ? cudaLaunchKernelEx(&config, kernel, p) : cudaErrorCooperativeLaunchTooLarge;
}
