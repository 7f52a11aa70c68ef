/* bwd_pair.cuh - part of bwd.cu, head dims 64 and 128: two consumers with 64 keys each, and the writers that add what they make
 * of dQ to memory.
 */
#pragma once

static __device__ __forceinline__ void init_more_barriers(shared &sm)
{
    for (int s = 0; s < 2; s++) {
        mbarrier_init(smem_address(&sm.dq_full[s]), CONSUMERS / 32);
        mbarrier_init(smem_address(&sm.dq_empty[s]), 1);
    }
    for (int s = 0; s < D / 64; s++) {
        mbarrier_init(smem_address(&sm.ds_full[s]), CONSUMERS / 32);
        mbarrier_init(smem_address(&sm.ds_empty[s]), CONSUMERS / 32);
    }
}

/* With a bias there is one buffer of dQ, which has the barriers of two: it is free when the step before's was read. */
template <score_kind KIND> static __device__ __forceinline__ float (&dq_buffer(shared &sm, const ring2 &r))[BLOCK_Q * D] { return sm.dq[HAS_BIAS<KIND> ? 0 : r.stage]; }

template <score_kind KIND> static __device__ __forceinline__ void wait_for_dq_buffer(shared &sm, const ring2 &r)
{
    if constexpr (HAS_BIAS<KIND>) {
        const ring2 last = r.before();
        mbarrier_wait(smem_address(&sm.dq_empty[last.stage]), last.parity);
    } else {
        mbarrier_wait(smem_address(&sm.dq_empty[r.stage]), r.parity ^ 1);
    }
}

/* ---- writers: a thread for each of the two buffers ---- */

/* The sums to which a step of a task adds its dQ; what the word of its query tile says, of the bits that count what was added
 * to them, when it is the task's turn; one more of them. */
struct dq_place { float *sums; int32_t turn, bits, one; };

template <bool MASKED> static __device__ __forceinline__ dq_place place_of_step(const bwd_params &p, const task &t, const walk<MASKED> &at, int32_t step, int64_t tile)
{
    float *const sums = p.w.dq + tile * (BLOCK_Q * D);
    if (p.shift.tiles == 0) { return {sums, turn_at<MASKED>(p, t, at.tile), FGQA_BWD_FRESH - 1, 1}; }
    const fgqa_bwd_at shifted = fgqa_bwd_at_step(t.begin, t.steps, step);
    const int32_t turn = fgqa_bwd_shifted_turn(&p.shift, t.n, shifted, MASKED ? end_of_keys(t, at.tile) : p.shift.tiles), bits = FGQA_BWD_LATE - 1;
    if (!shifted.late) { return {sums, turn, bits, 1}; }
    return {late_sums(p, t.b, t.kv_head, t.part, shifted.place), turn, bits * FGQA_BWD_LATE, FGQA_BWD_LATE};
}

/* Adds staged dQ tiles to those in memory. In order: a word a query tile says whose turn it is, the first one stores. Blocks only
 * wait for blocks whose tickets came before theirs, which are running: no deadlock whatever the card does. */
template <bool MASKED, score_kind KIND> static __device__ void write_dq(const bwd_params &p, shared &sm, uint32_t buffer)
{
    const fgqa_problem &problem = p.common.problem;
    /* the next block adds to a tile soon; at head dim 64 the builds that kept them were not faster beyond 1,024 keys */
    const uint64_t policy = D == 128 ? createpolicy_evict_last() : createpolicy_evict_normal();
    ring2 r;
    for (uint32_t count = 0;; count++) {
        mbarrier_wait(smem_address(&sm.task_full), count & 1);
        const task &t = sm.tasks[count & 1];
        if (t.done) { return; }
        const int64_t first_tile = t.q_tile;
        const int32_t steps = t.steps;
        walk<MASKED> at(t);
        mbarrier_arrive(smem_address(&sm.task_free));
        for (int32_t step = 0; step < steps; step++, at.next(t, p.w.splits, problem.g), r.advance()) {
            if (r.stage != buffer) { continue; }
            const int64_t tile = first_tile + at.head * p.w.head_tiles + at.tile;
            const dq_place to = place_of_step<MASKED>(p, t, at, step, tile);
            int32_t *const turn = p.w.turn + tile;
            const uint32_t staged = smem_address(dq_buffer<KIND>(sm, r));
            bool first = false;
            if (p.ordered) {                                     /* mostly it has come before the tile has */
                int32_t state;
                while (((state = load_acquire_s32(turn)) & to.bits) != to.turn) { __nanosleep(20); }
                first = to.one == 1 ? state & FGQA_BWD_FRESH : to.turn == 0;
                fence_proxy_async_global();
            }
            mbarrier_wait(smem_address(&sm.dq_full[r.stage]), r.parity);
            if (first) { bulk_store(to.sums, staged, sizeof(sm.dq[0]), policy); } else { bulk_add_f32(to.sums, staged, sizeof(sm.dq[0]), policy); }
            tma_store_commit();
            tma_store_wait_read();
            mbarrier_arrive(smem_address(&sm.dq_empty[r.stage]));
            bulk_wait();
            fence_proxy_async_global();
            red_release_add_s32(turn, first && to.one == 1 ? 1 - FGQA_BWD_FRESH : to.one);
        }
    }
}

/* ---- consumers ---- */

/* Own keys in shared memory, as operands: K and V by rows, K by columns (head dim 128: the own 64). */
struct key_tile { uint64_t k_rows, v_rows, k_columns; };

/* A branch around ordinary stores, with wgmmas in flight, would make ptxas serialise them. */
static __device__ __forceinline__ void store_if(bool yes, uint32_t to, float x, float y, float z, float w)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t@p st.shared.v4.f32 [%1], {%2, %3, %4, %5};\n\t}" ::"r"((int)yes), "r"(to), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

/* dQ, 64 x 64, without its scale, for the writer; or nothing. */
template <score_kind KIND> static __device__ __forceinline__ void store_dq(shared &sm, const ring2 &r, const float (&dq)[32], bool exists, int consumer)
{
    const uint32_t staged = smem_address(dq_buffer<KIND>(sm, r)) + consumer * 16384 + ((int)thread_index() & 127) * 16;
#pragma unroll
    for (int n = 0; n < 8; n++) { store_if(exists, staged + 2048 * n, dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]); }
}

static __device__ __forceinline__ void announce_dq(shared &sm, const ring2 &r, bool exists, int lane)
{
    fence_proxy_async();
    __syncwarp();
    if (exists && lane == 0) { mbarrier_arrive(smem_address(&sm.dq_full[r.stage])); }
}

#if FGQA_D == 128
#include "bwd_step128.cuh"
#else
#include "bwd_step64.cuh"
#endif

/* dQ of the last step of a task. */
template <score_kind KIND> static __device__ __forceinline__ void last_dq(shared &sm, int consumer, int lane, const key_tile &keys, const ring2 &r)
{
    const uint32_t buffer = D == 64 ? 0 : r.stage, parity = D == 64 ? r.stage : r.parity;      /* one dS or two */
    float dq[32];
    mbarrier_wait(smem_address(&sm.ds_full[buffer]), parity);
    wgmma_fence();
    query_products(dq, smem_address(sm.ds[buffer][D == 64 ? consumer : 0]), keys.k_columns);
    wait_for_dq_buffer<KIND>(sm, r);
    wgmma_wait<0>();
    if (lane == 0) { mbarrier_arrive(smem_address(&sm.ds_empty[buffer])); }
    store_dq<KIND>(sm, r, dq, true, consumer);
    announce_dq(sm, r, true, lane);
}

template <bool MASKED, score_kind KIND> static __device__ void consume(const bwd_params &p, shared &sm, int consumer)
{
    const int thread = (int)threadIdx.x & 127, lane = thread & 31, key = consumer * 64 + thread / 32 * 16 + lane / 4;      /* and key + 8 */
    const float scale = p.common.scale;
    const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k) + consumer * 64 * 128, 0, 1024), v_rows = k_rows + sizeof(sm.k) / 16;
    const key_tile keys = {k_rows, v_rows, wgmma_desc_sw128(smem_address(sm.k[D == 128 ? consumer : 0]), BLOCK_K * 128, 1024)};
    ring2 r;
    for (uint32_t state = 0;; state = ~state & 1) {            /* parity of the task, and what it met */
        mbarrier_wait(smem_address(&sm.task_full), state & 1);
        const task &t = sm.tasks[state & 1];
        if (t.done) { return; }
        const int32_t steps = t.steps;
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.task_free)); }
        begin_keys<MASKED, KIND>(p, sm, t, state, consumer * 128 + thread, key);
        float dk[D / 2], dv[DV / 2];
#pragma unroll
        for (int n = 0; n < D / 2; n++) { dk[n] = dv[n] = 0.0f; }

        take_steps<MASKED, KIND>(p, sm, t, consumer, thread, keys, r, steps, state, dk, dv);
        if (steps > 0) { last_dq<KIND>(sm, consumer, lane, keys, r.before()); }
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.kv_empty)); }

        const int32_t j0 = t.n * BLOCK_K;
        const int last = (int)thread_index() & 127, last_lane = last % 32, last_key = consumer * 64 + last / 32 * 16 + last_lane / 4;
        if (MASKED && state & CARE_POISON) { add_poison<KIND>(p, t, last_key, last_lane, dv); }
        const bool capped = WITH_CAP<KIND> || (BIAS_IN_MIX<KIND> && p.in_caps > 0.0f);
        if (capped) {
            note_poison(p, t, state & KEYS_POISONED, last_key / FGQA_BWD_KEYS_A_WORD, last_lane, dk);
        } else if (MASKED && state & KEYS_POISONED) {
            overwrite_poisoned<KIND>(p, sm, t, last_key, dk, dv);
        }
        const float dv_scale = DROPS<KIND> ? p.common.dropout_scale : 1.0f;
        if (p.w.splits > 1) {
            write_part(p, t, p.w.dk, dk, scale, j0 + last_key, last_lane);
            write_part(p, t, p.w.dv, dv, dv_scale, j0 + last_key, last_lane);
        } else {
            write_keys(dv, dv_scale, p, t, j0 + last_key, FGQA_ARG_dv, p.common.problem.dv, p.vector_dv, last_lane);
            write_keys(dk, scale, p, t, j0 + last_key, FGQA_ARG_dk, p.common.problem.d, p.vector_dk, last_lane);
        }
    }
}
