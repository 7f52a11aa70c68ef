/* bwd_consumer.cuh - part of bwd.cu: what a consumer warpgroup does to its 64 keys.
 *
 * Scores are transposed, keys x rows: register 4 n + e of a lane is key 16 warp + lane / 4 + 8 (e / 2), row 8 n + 2 (lane % 4) +
 * e % 2. dK and dV: the same keys x columns.
 */
#pragma once

/* ---- what is not finite ---- */

/* 0 where the pair is not finite. */
static __device__ __forceinline__ bool clean_piece(uint32_t address)
{
    uint32_t x[4], bad = 0;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint32_t kept = finite_or_zero(x[n], T());
        bad |= kept ^ x[n];
        x[n] = kept;
    }
    if (bad) { asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory"); }
    return bad != 0;
}

/* Weights and dS are 0 where a row does not see a key, but 0 * NaN is NaN: elements that are not finite become 0 before
 * products see them, by both consumers. Keys then count as unseen: rows that see one have a NaN LSE, and its own gradients are
 * overwritten in the end. Queries: the row's weights become NaN by its LSE; where dO is not finite delta is not. With a soft
 * cap infinite scores have finite weights: bwd_poison.cu. */
static __device__ __noinline__ void clean_keys(shared &sm, int thread)
{
    if (thread < BLOCK_K / 32) { sm.poisoned_keys[thread] = 0; }
    barrier_sync(BOTH, CONSUMERS);
    for (int n = thread; n < (int)sizeof(sm.k) / 16; n += CONSUMERS) {
        const int key = n / 8 % BLOCK_K;
        if (clean_piece(smem_address(sm.k) + 16 * n)) { atomicOr(&sm.poisoned_keys[key / 32], 1u << key % 32); }
    }
    fence_proxy_async();
    barrier_sync(BOTH, CONSUMERS);
}

template <score_kind KIND> static __device__ __forceinline__ void clean_rows(shared &sm, uint32_t stage, int thread)
{
#pragma unroll 1
    for (int n = thread; n < (int)sizeof(sm.q[0]) / 16; n += CONSUMERS) {
        clean_piece(smem_address(sm.dout[stage]) + 16 * n);
        if ((WITH_CAP<KIND> || (BIAS_IN_MIX<KIND> && sm.capped)) && isfinite(sm.lse2[stage][bwd_stats_slot(n / 8 % BLOCK_Q)])) { continue; }
        if (clean_piece(smem_address(sm.q[stage]) + 16 * n)) { sm.lse2[stage][bwd_stats_slot(n / 8 % BLOCK_Q)] = NAN; }
    }
    fence_proxy_async();
    barrier_sync(BOTH, CONSUMERS);
}

/* Whether K or V has an inf or NaN. */
static __device__ __forceinline__ bool keys_poisoned(shared &sm, const T (&keys)[CHUNKS][BLOCK_K * CHUNK], int thread)
{
    uint32_t sum = 0;
#pragma unroll
    for (int n = thread; n < (int)sizeof(keys) / 16; n += CONSUMERS) {
        const uint4 x = ((const uint4 *)keys)[n];
        sum = poison_test(x.x, sum, T());
        sum = poison_test(x.y, sum, T());
        sum = poison_test(x.z, sum, T());
        sum = poison_test(x.w, sum, T());
    }
    if (thread == 0) { sm.any_poisoned = 0; }
    barrier_sync(BOTH, CONSUMERS);
    if (sum & 0x7FFF7FFF) { sm.any_poisoned = 1; }
    barrier_sync(BOTH, CONSUMERS);
    return sm.any_poisoned != 0;
}

static __device__ __forceinline__ bool is_poisoned(const shared &sm, int key) { return sm.poisoned_keys[key / 32] >> key % 32 & 1; }

/* Rows that see key `key` of the tile. */
static __device__ __forceinline__ fgqa_range rows_of_key(const bwd_params &p, const task &t, int key)
{
    const int32_t j = t.n * BLOCK_K + key;
    const fgqa_range none = {0, 0};
    return j < t.mask.sk ? bwd_key_rows(p.common.problem, p.w, t.b, t.k_row)[j] : none;
}

/* dV += what is not finite in dO, for the keys that its rows see: after a walk that met such tiles. */
template <score_kind KIND> static __device__ __forceinline__ void add_poison(const bwd_params &p, const task &t, int key, int lane, float (&dv)[DV / 2])
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_range seen[2] = {rows_of_key(p, t, key), rows_of_key(p, t, key + 8)};
    const fgqa_view &view = problem.view[FGQA_ARG_dout];
    walk<true> at(t);
#pragma unroll 1
    for (int32_t step = 0; step < t.steps; step++, at.next(t, p.w.splits, problem.g)) {
        if (!(load_relaxed_s32(p.w.turn + t.q_tile + at.head * p.w.head_tiles + at.tile) & FGQA_BWD_DIRTY)) { continue; }
        const int32_t end = min(t.mask.sq, (at.tile + 1) * BLOCK_Q);
#pragma unroll 1
        for (int32_t i = at.tile * BLOCK_Q; i < end; i++) {
            const char *row = fgqa_row_address(view, sizeof(T), t.b, t.kv_head * problem.g + at.head, t.q_row + i);
            bool counted[2] = {true, true};
            if constexpr (HAS_BITS<KIND> || HAS_BIAS<KIND>) {
#pragma unroll
                for (int half = 0; half < 2; half++) { counted[half] = seen[half].begin <= i && i < seen[half].end && counts<KIND>(p, t, at.head, i, key + 8 * half); }
            }
#pragma unroll
            for (int n = 0; n < DV / 2; n += 4) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 2 * n + 2 * (lane % 4) + e;
                    const float x = column < problem.dv ? to_float(((const T *)row)[column]) : 0.0f;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (!isfinite(x) && seen[half].begin <= i && i < seen[half].end && counted[half]) { dv[n + 2 * half + e] += x; }
                    }
                }
            }
        }
    }
}

/* Gradients of keys that are inf or NaN themselves and that some row sees. */
template <score_kind KIND, typename... SUMS> static __device__ __forceinline__ void overwrite_poisoned(const bwd_params &p, const shared &sm, const task &t, int key, SUMS &...sums)
{
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const fgqa_range seen = rows_of_key(p, t, key + 8 * half);
        if (!is_poisoned(sm, key + 8 * half) || seen.begin >= seen.end) { continue; }
        if (HAS_BIAS<KIND> ? !bias_shows_some<WIDE_BIAS<KIND>>(p, t, seen, key + 8 * half) : HAS_BITS<KIND> && !mask_shows_some(p, t, seen, key + 8 * half)) { continue; }
#pragma unroll
        for (int n = 2 * half; n < D / 2; n += 4) { ((sums[n] = sums[n + 1] = NAN), ...); }
    }
    barrier_sync(BOTH, CONSUMERS);                         /* the bits are no longer read */
}

/* For dbias: dS of keys that are inf or NaN themselves is NaN in the rows that see them. dQ has it as 0 then, and dK of such a
 * key is overwritten in the end. */
template <score_kind KIND> static __device__ __forceinline__ void poison_dbias(const bwd_params &p, const shared &sm, const task &t, uint32_t stage, int32_t row0, int consumer, uint32_t (&gradients)[16])
{
    const int thread = (int)thread_index() & 127;
    const int32_t own = row0 + thread % 4 * 2, head = sm.bias_at[stage].z - t.kv_head * p.common.problem.g;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int key = consumer * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
        uint32_t seen = 0;
        if (is_poisoned(sm, key)) {
            const fgqa_range rows = rows_of_key(p, t, key);
#pragma unroll 1
            for (int n = 0; n < 16; n++) {
                const int32_t i = own + n / 2 * 8 + n % 2;
                if (rows.begin <= i && i < rows.end && counts<KIND, true>(p, t, head, i, key)) { seen |= 1u << n; }
            }
        }
#pragma unroll
        for (int n = 0; n < 8; n++) { gradients[2 * n + half] |= (seen >> 2 * n & 1) * 0x7FFFu | (seen >> (2 * n + 1) & 1) * 0x7FFF0000u; }
    }
}

/* The tile is no longer read: its slot is free, or gives its place to dS. */
template <score_kind KIND> static __device__ __forceinline__ void leave_bias(const bwd_params &p, shared &sm, const task &t, uint32_t half, uint32_t stage, int32_t row0, int consumer, uint32_t state,
                                                                             uint32_t (&gradients)[16])
{
#if FGQA_BWD_HAS_BIAS(FGQA_D)
    const uint32_t slot = bias_slot<KIND>(half, stage, consumer);
    if constexpr (STORES_DBIAS<KIND>) {
        if (state & KEYS_POISONED && p.some_dbias) { poison_dbias<KIND>(p, sm, t, stage, row0, consumer, gradients); }
        const int4 at = sm.bias_at[stage];
        const int4 own = make_int4(at.x + 64 * consumer, at.y + 64 * (int)half, at.z, at.w);
        store_dbias<KIND>(p, bias_tile<KIND>(sm, slot, consumer), &sm.bias_empty[slot], own, gradients, consumer);
    }
    if constexpr (WIDE_BIAS<KIND>) {
        if (hides_by_bias(state)) { free_bias(&sm.bias_empty[slot]); }
    } else if constexpr (!STORES_DBIAS<KIND>) {
        __syncwarp();
        if (thread_index() % 32 == 0) { mbarrier_arrive(smem_address(&sm.bias_empty[slot])); }
    }
#endif
}

/* With a soft cap, of the 16 keys of a warp: whether their gradients, or dQ of rows that see them, may not be what they have
 * become. An infinite q leaves NaN in a column of every key's dK. */
static __device__ __forceinline__ void note_poison(const bwd_params &p, const task &t, bool keys_poisoned, int warp, int lane, const float (&dk)[D / 2])
{
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < D / 2; n++) { sum = fmaf(dk[n], 0.0f, sum); }
    const bool poisoned = __any_sync(ALL_LANES, keys_poisoned || sum != 0.0f);
    if (lane == 0) { bwd_poisoned_keys(p.common.problem, p.w, t.part, bwd_k_tile(p.common.problem, p.w, t.b, t.kv_head, t.k_row, t.n))[warp] = poisoned; }
}

/* ---- gradients of the keys ---- */

static __device__ __forceinline__ void write_keys(const float (&acc)[D / 2], float factor, const bwd_params &p, const task &t, int32_t key, fgqa_arg arg, int32_t d, bool vector, int lane)
{
    const fgqa_view &view = p.common.problem.view[arg];
    write_rows(acc, factor, fgqa_row_address(view, sizeof(T), t.b, t.kv_head, t.k_row + key), view.stride_s, t.key_rows - key, d, vector, lane);
}

/* One of several parts, in float32. */
static __device__ __forceinline__ void write_part(const bwd_params &p, const task &t, float *parts, const float (&acc)[D / 2], float factor, int32_t key, int lane)
{
    const int64_t row = t.part * p.w.k_rows + bwd_k_row(p.common.problem, t.b, t.kv_head, t.k_row, key);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (key + 8 * half >= t.key_rows) { continue; }
        float *to = parts + (row + 8 * half) * D + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < D / 8; n++) { *(float2 *)(to + 8 * n) = make_float2(acc[4 * n + 2 * half] * factor, acc[4 * n + 2 * half + 1] * factor); }
    }
}

/* ---- the consumer ---- */

/* Has the rows of a step cleaned if they need it; whether they did. */
template <score_kind KIND> static __device__ __forceinline__ bool clean_step(shared &sm, const ring2 &r, int32_t care, uint32_t &state, int thread)
{
    if (!(care & (CARE_PADDING | CARE_POISON))) { return false; }
    mbarrier_wait(smem_address(&sm.dout_full[r.stage]), r.parity);
    state |= care & CARE_POISON;
    clean_rows<KIND>(sm, r.stage, thread);
    return true;
}

/* Waits for a query tile. Whether some row of it does not see all keys. load_lse2() comes before the wait for dO, and once
 * more if rows had to be cleaned. */
template <bool MASKED, score_kind KIND, typename LOAD>
static __device__ __forceinline__ bool begin_step(shared &sm, const ring2 &r, uint32_t &state, int thread, int32_t &row0, const LOAD &load_lse2)
{
    int4 about = {};
    mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
    if (MASKED) { about = sm.about[r.stage]; }
    load_lse2();
    mbarrier_wait(smem_address(&sm.dout_full[r.stage]), r.parity);
    if (MASKED) {
        row0 = about.x;
        if (clean_step<KIND>(sm, r, about.y, state, thread)) { load_lse2(); }
    }
    return MASKED && (about.y | state) & (PARTIAL | KEYS_POISONED);
}

/* Waits for K and V, cleans K, and notes for this warp which rows see each of its lanes' keys: asked for while K is on its
 * way. V is awaited last, it comes behind K. */
template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void begin_keys(const bwd_params &p, shared &sm, const task &t, uint32_t &state, int thread, int key)
{
    const int lane = thread % 32, mine = key + lane % 4 * 8;
    const bool notes = MASKED && lane % 4 < 2;
    const fgqa_range none = {0, 0};
    fgqa_range rows = none;
    if (notes) { rows = rows_of_key(p, t, mine); }
    mbarrier_wait(smem_address(&sm.k_full), state & 1);
    if (MASKED) {
        if (keys_poisoned(sm, sm.k, thread)) {
            clean_keys(sm, thread);
            state |= KEYS_POISONED;
        }
        if (notes) { sm.rows[thread / 32 * 16 + lane / 4 + lane % 4 * 8] = state & KEYS_POISONED && is_poisoned(sm, mine) ? none : rows; }
        __syncwarp();
    }
    mbarrier_wait(smem_address(&sm.v_full), state & 1);
    if (HAS_BIAS<KIND> && keys_poisoned(sm, sm.v, thread)) { state |= VALUES_POISONED; }
}
