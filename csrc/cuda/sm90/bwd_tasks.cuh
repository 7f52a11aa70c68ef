/* bwd_tasks.cuh - part of bwd.cu: which task a block takes, and the warps that feed the consumers and take dQ from them. */
#pragma once

/* One key tile of one KV head of one sequence, with all query heads of the group or, when they are split, every splits-th of
 * its (query tile, head) pairs. The walk goes through all heads of a tile, then to the tile before (DOWN) or behind it (UP); or
 * through all tiles of a head first (BY_HEAD): under a window, blocks of neighbouring key tiles meet few tiles together, so that
 * those of one head have to stay in the L2 cache until the last of the blocks wants them. */
enum { DOWN, UP, BY_HEAD };
struct task {
    int32_t b, kv_head, part, n;              /* part of the pairs; key tile */
    int32_t q_row, k_row;                     /* rows of packed tensors at which the sequence begins */
    int32_t key_rows;                         /* keys of the sequence that have a gradient to write, padding included */
    int32_t tile, head, steps;                /* the first pair, head counted in the group; how many pairs */
    int32_t way, first_tile, end_tile;        /* of the walk; tiles that see the key tile */
    int32_t begin, last_head;                 /* the place at which a walk DOWN begins; head of its place 0, below 0 in the tile before */
    bwd_turn turn;
    int32_t done;                             /* no task left */
    int32_t full_begin, full_end;             /* tiles between these rows see every key whole */
    int64_t q_tile;                           /* in the workspace: of tile 0 of the group's first head */
    fgqa_mask mask;
};

/* With ALiBi: of a query tile of one head, the slope, times log2(e) but where BIAS_IN_MIX; diag(i) - j of its first row and
 * the key tile's first key. */
struct alibi_tile { float slope; int32_t first; };

struct shared {
    T k[CHUNKS][BLOCK_K * CHUNK], v[CHUNKS][BLOCK_K * CHUNK];
    T q[2][CHUNKS][BLOCK_Q * CHUNK], dout[2][CHUNKS][BLOCK_Q * CHUNK];
#if FGQA_D == 256
    T weights[2][BLOCK_K * BLOCK_Q];                             /* P^T in the order of the consumers' registers */
    uint2 bits[2][128];                                          /* of a stage, which belong to them: shown, kept (lane_bits) */
#else
    T ds[D / 64][BLOCK_Q / 64][BLOCK_K * 64];
    float dq[2][BLOCK_Q * D];
#endif
    float lse2[2][BLOCK_Q], delta[2][BLOCK_Q];                   /* of a stage, in the order of bwd_stats_slot() */
    fgqa_range rows[2 * 64];                                     /* that see each key of each consumer */
    task tasks[2];
#if FGQA_D != 256
    dq_tile finishing;                                        /* the scheduler's */
#endif
    int4 about[2];                                               /* of a stage: its first row, CARE_ bits; those of the next step */
    uint32_t poisoned_keys[BLOCK_K / 32], any_poisoned;
    uint64_t task_full, task_free, k_full, v_full, kv_empty;
    uint64_t q_full[2], q_empty[2], dout_full[2], dout_empty[2];
#if FGQA_D == 256
    uint64_t weights_full[2], weights_empty[2];
#else
    uint64_t dq_full[2], dq_empty[2], ds_full[D / 64], ds_empty[D / 64];
#endif
    alibi_tile alibi[2];                                         /* of a stage */
    int2 heads[2];                                               /* of a stage: query head of its tile, and of that of the next step */
    dropout_key dropout;
    uint64_t bias_full[2], bias_empty[2];                        /* bwd_bias.cuh */
    int32_t q_tile[2];                                           /* of a stage, with a bias: in the workspace */
    int32_t capped;                                              /* there is a soft cap */
    int4 bias_at[2];                                             /* of a stage: key, row, head, batch */
};
static_assert(sizeof(shared) <= SM_BYTES, "the tiles do not fit into shared memory");

template <bool MASKED> struct walk {
    int32_t tile, head;
    __device__ __forceinline__ walk(const task &t) : tile(t.tile), head(t.head) {}
    __device__ __forceinline__ void next(const task &t, int32_t splits, int32_t group)
    {
        if (MASKED && t.way == BY_HEAD) {
            if (tile-- == t.first_tile) {
                tile = t.end_tile - 1;
                head--;
            }
            return;
        }
        head += MASKED && t.way == UP ? splits : -splits;
        while (head < 0) { head += group; tile--; }
        while (MASKED && head >= group) { head -= group; tile++; }
        if (t.begin > 0 && tile < t.first_tile) {                /* what it left out at first */
            tile = t.end_tile - 1;
            head = t.last_head;
            while (head < 0) { head += group; tile--; }
        }
    }
};

/* Position in a ring of two buffers: index, and parity of the phase a reader waits for. */
struct ring2 {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance()
    {
        stage ^= 1;
        parity ^= stage == 0;
    }
    /* The position behind which this one is. */
    __device__ __forceinline__ ring2 before() const { return {stage ^ 1, parity ^ (stage == 0)}; }
};

#if FGQA_BWD_HAS_BIAS(FGQA_D)
/* Where other kernels have their second buffer for dQ there are two slots for tiles of a bias: of both consumers in a step,
 * or, head dim 64, in half of one. A float32 one leaves each consumer one slot. */
template <score_kind KIND> static __device__ __forceinline__ uint32_t bias_slot(uint32_t half, uint32_t stage, int consumer) { return WIDE_BIAS<KIND> ? (uint32_t)consumer : D == 64 ? half : stage; }

/* Of the phase in which a slot is full, for those who wait. */
template <score_kind KIND> static __device__ __forceinline__ uint32_t bias_parity(uint32_t half, const ring2 &r)
{
    if (WIDE_BIAS<KIND>) { return D == 64 ? half : r.stage; }
    return D == 64 ? r.stage : r.parity;
}

/* Of a slot and a consumer: 64 rows x 64 keys, of float32 twice 32 keys. */
template <score_kind KIND> static __device__ __forceinline__ uint32_t bias_tile(const shared &sm, uint32_t slot, int consumer)
{
    return smem_address(sm.dq[1]) + slot * 16384 + (WIDE_BIAS<KIND> ? 0 : consumer * 8192);
}
#endif

/* ---- scheduler: a warp ---- */

/* Tickets in bands of `band` sections (KV head of a sequence x part): inside a band, `run` key tiles of one section, of the
 * next one, .., then the `run` behind those of the first. Blocks of one section share what they read only while they are few
 * query tiles apart, and multiprocessors are not equally fast: short bands or runs bring blocks together which become free
 * together. On the other hand they wait for each other's turns at dQ before their first step, where different sections do not.
 * In the folded order a chain of each section is in work at once. The sections of a packed sequence are bands of their own.
 * The place of the key tile in the order is left in t->n. */
static __device__ __forceinline__ bool find_task(const bwd_params &p, uint32_t ticket, uint32_t key_tiles, task *t)
{
    const fgqa_problem &problem = p.common.problem;
    const uint32_t splits = (uint32_t)p.w.splits;
    uint32_t sections = p.sections, in_sections = ticket;                /* the ticket among those of the sections */
    if (problem.varlen) {
        if (ticket >= p.w.first_task[problem.b]) { return false; }
        int32_t at = 0, above = problem.b;
        while (above - at > 1) {
            const int32_t middle = at + (above - at) / 2;
            if (p.w.first_task[middle] <= ticket) { at = middle; } else { above = middle; }
        }
        t->b = p.w.sequences[at];
        sections = (uint32_t)problem.hk * splits;
        in_sections -= p.w.first_task[at];
        key_tiles = (p.w.first_task[at + 1] - p.w.first_task[at]) / sections;
    } else if (ticket >= sections * key_tiles) {
        return false;
    }
    const uint32_t in_band = p.band * key_tiles, first = in_sections / in_band * p.band, rest = in_sections % in_band;
    const uint32_t width = min(p.band, sections - first), before = rest / (p.run * width) * p.run, run = min(p.run, key_tiles - before);
    const uint32_t in_runs = rest - before * width, section = first + in_runs / run;
    if (!problem.varlen) { t->b = (int32_t)(section / splits / (uint32_t)problem.hk); }
    t->n = (int32_t)(before + in_runs % run);
    t->part = (int32_t)(section % splits);
    t->kv_head = (int32_t)(section / splits % (uint32_t)problem.hk);
    return true;
}

template <bool MASKED> static __device__ void schedule(const bwd_params &p, shared &sm)
{
    const fgqa_problem &problem = p.common.problem;
    const int lane = (int)thread_index() % 32;
    const uint32_t key_tiles = (uint32_t)p.w.control->key_tiles;
#if FGQA_D != 256
    bool finishing = p.finish.tiles > 0 && !problem.varlen;
    int32_t unit = UNITS;                                        /* of sm.finishing: what is done */
#endif
    for (uint32_t count = 0;; count++) {
        task t;
#if FGQA_D != 256
        while (finishing && !__all_sync(ALL_LANES, mbarrier_test(smem_address(&sm.task_free), ~count & 1))) { finishing = finish_some(p, sm.finishing, unit); }
#endif
        mbarrier_wait(smem_address(&sm.task_free), ~count & 1);
        for (;;) {
            uint32_t ticket = 0;
            if (lane == 0) { ticket = (uint32_t)atomicAdd((unsigned long long *)&p.w.control->ticket, 1ull); }
            ticket = __shfl_sync(ALL_LANES, ticket, 0);
            t.done = !find_task(p, ticket, key_tiles, &t);
            if (t.done) { break; }
            int32_t rows;
            const fgqa_sequence sequence = fgqa_device_sequence(problem, t.b, &rows);
            t.mask = sequence.mask;
            const int32_t tiles = bwd_key_tiles_of(p.w, t.mask);
            t.n = p.w.chain > 0 ? bwd_key_tile_at(p.w.chain, tiles, t.n) : fgqa_bwd_shifted_at(&p.shift, t.n);
            t.way = p.by_head ? BY_HEAD : p.w.chain > 0 && !bwd_in_front(t.n, tiles) ? UP : DOWN;
            t.turn = bwd_turn_of(p.w.chain, tiles, t.n);
            t.begin = fgqa_bwd_begin(&p.shift, t.n);
            t.q_row = (int32_t)sequence.q_row;
            t.k_row = (int32_t)sequence.k_row;
            t.q_tile = bwd_q_tile(problem, p.w, t.b, t.kv_head * problem.g, sequence.q_row, 0);
            t.key_rows = problem.varlen ? t.mask.sk : problem.sk;
            if (t.n * BLOCK_K < t.key_rows) { break; }           /* sequences are shorter than the longest */
        }
        task &out = sm.tasks[count & 1];
        if (!t.done) {
            const int32_t j0 = t.n * BLOCK_K, j1 = min(t.mask.sk, j0 + BLOCK_K);
            fgqa_range seen = {0, j0 < j1 ? t.mask.sq : 0};      /* by these rows */
            t.full_begin = t.full_end = 0;
            if (MASKED && j0 < j1) {
                const fgqa_range *key_rows = bwd_key_rows(problem, p.w, t.b, t.k_row);
                const fgqa_range first = key_rows[j0], last = key_rows[j1 - 1];
                seen.begin = first.begin;
                seen.end = last.end;
                if (j1 - j0 == BLOCK_K) {
                    t.full_begin = last.begin;
                    t.full_end = first.end;
                }
            }
            const int32_t first_tile = seen.begin / BLOCK_Q, end_tile = seen.begin < seen.end ? (seen.end + BLOCK_Q - 1) / BLOCK_Q : first_tile;
            t.first_tile = first_tile;
            t.end_tile = end_tile;
            const int32_t pairs = (end_tile - first_tile) * problem.g;
            /* pairs before the first one whose index from tile 0, head 0 on is `part` modulo splits, and behind the last one */
            const int32_t before = (t.part + p.w.splits - first_tile * problem.g % p.w.splits) % p.w.splits;
            const int32_t behind = (end_tile * problem.g - 1 - t.part + p.w.splits) % p.w.splits;
            t.steps = pairs > behind ? (pairs - behind - 1) / p.w.splits + 1 : 0;
            t.tile = t.way == UP ? first_tile : end_tile - 1;
            t.last_head = problem.g - 1 - behind;
            t.head = t.way == UP ? before : t.last_head - t.begin * p.w.splits;
            if (t.head < 0) {
                const int32_t tiles_before = (problem.g - 1 - t.head) / problem.g;
                t.head += tiles_before * problem.g;
                t.tile -= tiles_before;
            }
            while (t.head >= problem.g) { t.head -= problem.g; t.tile++; }
        }
        if (lane == 0) { out = t; }
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.task_full)); }
        if (t.done) { break; }
    }
#if FGQA_D != 256
    if (unit < UNITS) { finish_tile<1>(p, sm.finishing, unit); }
#endif
}

/* ---- producer: a thread ---- */

static __device__ __forceinline__ void load_keys(const CUtensorMap *map, T (&to)[CHUNKS][BLOCK_K * CHUNK], uint64_t *full, uint64_t policy, int kv_head, int row, int batch)
{
    const uint32_t bar = smem_address(full);
    mbarrier_arrive_expect_tx(bar, sizeof(to));
    for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(to[c]), map, bar, policy, c * CHUNK, kv_head, row, batch); }
}

static __device__ __forceinline__ void load_rows(const CUtensorMap *map, T (&to)[CHUNKS][BLOCK_Q * CHUNK], float (&stats)[BLOCK_Q], const float *from, uint64_t *full,
                                                 uint64_t policy, int head, int row, int batch)
{
    const uint32_t bar = smem_address(full);
    mbarrier_arrive_expect_tx(bar, sizeof(to) + sizeof(stats));
    for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(to[c]), map, bar, policy, c * CHUNK, head, row, batch); }
    bulk_load(smem_address(stats), from, sizeof(stats), bar);
}

/* First row of a query tile, CARE_ bits. */
static __device__ __forceinline__ int2 about_tile(const bwd_params &p, const task &t, const walk<true> &at)
{
    const int32_t row0 = at.tile * BLOCK_Q;
    return make_int2(row0, (load_relaxed_s32(p.w.turn + t.q_tile + at.head * p.w.head_tiles + at.tile) & FGQA_BWD_DIRTY ? CARE_POISON : 0)
                         | (p.foreign_rows && row0 + BLOCK_Q > t.mask.sq ? CARE_PADDING : 0)
                         | (row0 < t.full_begin || row0 + BLOCK_Q > t.full_end ? PARTIAL : 0));
}

/* Those with a bias have CARE_BASES, too. */
template <score_kind KIND> static __device__ __forceinline__ int2 about_tile(const bwd_params &p, const task &t, const walk<true> &at)
{
    int2 about = about_tile(p, t, at);
    if (HAS_BIAS<KIND> && p.w.based[t.q_tile + at.head * p.w.head_tiles + at.tile]) { about.y |= CARE_BASES; }
    return about;
}

/* No slopes: 0. */
static __device__ __forceinline__ float slope_of_head(const bwd_params &p, int32_t b, int32_t head)
{
    const fgqa_view &slopes = p.common.problem.view[FGQA_ARG_alibi_slopes];
    return slopes.data ? load_float(slopes.data, b * slopes.stride_b + head * slopes.stride_h, slopes.dtype) : 0.0f;
}

template <score_kind KIND> static __device__ __forceinline__ alibi_tile alibi_of_tile(const bwd_params &p, const task &t, const walk<true> &at)
{
    const float slope = slope_of_head(p, t.b, t.kv_head * p.common.problem.g + at.head);
    return {BIAS_IN_MIX<KIND> ? slope : slope * (float)FGQA_LOG2E, at.tile * BLOCK_Q + t.mask.diag - t.n * BLOCK_K};
}

#if FGQA_BWD_HAS_BIAS(FGQA_D)
/* Tiles of a step. */
template <score_kind KIND> static __device__ __forceinline__ void load_bias(const bwd_params &p, shared &sm, const ring2 &r, uint64_t policy, int key, int row, int head, int batch)
{
#pragma unroll
    for (uint32_t half = 0; half < BLOCK_Q / 64; half++) {
        for (int of = 0; of < (WIDE_BIAS<KIND> ? 2 : 1); of++) {
            const uint32_t slot = bias_slot<KIND>(half, r.stage, of), parity = bias_parity<KIND>(half, r), bar = smem_address(&sm.bias_full[slot]);
            mbarrier_wait(smem_address(&sm.bias_empty[slot]), parity ^ 1);
            mbarrier_arrive_expect_tx(bar, 16384);
            for (int c = 0; c < 2; c++) {
                tma_load_4d(smem_address(sm.dq[1]) + slot * 16384 + c * 8192, &p.bias_map, bar, policy, key + (WIDE_BIAS<KIND> ? 64 * of + 32 * c : 64 * c), head, row + 64 * (int)half, batch);
            }
        }
    }
}
#endif

/* The next task is asked for when this many tiles of the present one are still to be loaded: a ticket and a description take
 * longer than the two steps that the ring holds. */
static constexpr int AHEAD = 3;

template <bool MASKED, score_kind KIND> static __device__ void produce(const bwd_params &p, shared &sm)
{
    const fgqa_problem &problem = p.common.problem;
    const uint64_t keep = createpolicy_evict_last(), once = createpolicy_evict_first();
    ring2 r;
    for (uint32_t count = 0;; count++) {
        mbarrier_wait(smem_address(&sm.task_full), count & 1);
        const task &t = sm.tasks[count & 1];
        if (t.done) { return; }
        const int batch = problem.varlen ? 0 : t.b, key = t.k_row + t.n * BLOCK_K;
        const int64_t first_tile = t.q_tile;
        walk<MASKED> at(t);
        int2 about = {0, 0};
        if constexpr (MASKED) {
            if (t.steps > 0) { about = about_tile<KIND>(p, t, at); }
        }
        alibi_tile alibi = {};
        if constexpr (WITH_ALIBI<KIND>) {
            if (t.steps > 0) { alibi = alibi_of_tile<KIND>(p, t, at); }
        }
        for (int32_t step = 0; step == 0 || step < t.steps; step++) {
            if (step == max(t.steps - AHEAD, 0)) { mbarrier_arrive(smem_address(&sm.task_free)); }
            const bool exists = t.steps > 0;
            const int head = t.kv_head * problem.g + at.head, row = t.q_row + at.tile * BLOCK_Q;
            const int64_t tile = first_tile + at.head * p.w.head_tiles + at.tile;
            if (exists) {
                at.next(t, p.w.splits, problem.g);
                int2 following = {0, 0};
                if constexpr (MASKED) {
                    if (step + 1 < t.steps) { following = about_tile<KIND>(p, t, at); }
                }
                const alibi_tile own_alibi = alibi;
                if constexpr (WITH_ALIBI<KIND>) {
                    if (step + 1 < t.steps) { alibi = alibi_of_tile<KIND>(p, t, at); }
                }
                mbarrier_wait(smem_address(&sm.q_empty[r.stage]), r.parity ^ 1);
                if (MASKED) { sm.about[r.stage] = make_int4(about.x, about.y, following.x, following.y); }
                about = following;
                if (WITH_ALIBI<KIND>) { sm.alibi[r.stage] = own_alibi; }
                if (HAS_BITS<KIND>) { sm.heads[r.stage] = make_int2(head, step + 1 < t.steps ? t.kv_head * problem.g + at.head : head); }
                if (HAS_BIAS<KIND>) {
                    sm.q_tile[r.stage] = (int32_t)tile;
                    sm.bias_at[r.stage] = make_int4(t.n * BLOCK_K, row - t.q_row, head, t.b);
                }
                load_rows(&p.q_map, sm.q[r.stage], sm.lse2[r.stage], (const float *)p.w.stats + tile * 2 * BLOCK_Q, &sm.q_full[r.stage], keep, head, row, batch);
            }
            if (step == 0) {
                mbarrier_wait(smem_address(&sm.kv_empty), ~count & 1);
                load_keys(&p.k_map, sm.k, &sm.k_full, once, t.kv_head, key, batch);
                load_keys(&p.v_map, sm.v, &sm.v_full, once, t.kv_head, key, batch);
            }
            if (exists) {
                mbarrier_wait(smem_address(&sm.dout_empty[r.stage]), r.parity ^ 1);
                load_rows(&p.dout_map, sm.dout[r.stage], sm.delta[r.stage], (const float *)p.w.stats + tile * 2 * BLOCK_Q + BLOCK_Q, &sm.dout_full[r.stage], keep, head, row, batch);
#if FGQA_BWD_HAS_BIAS(FGQA_D)
                if (HAS_BIAS<KIND>) { load_bias<KIND>(p, sm, r, createpolicy_evict_normal(), t.n * BLOCK_K, row - t.q_row, head, t.b); }
#endif
                r.advance();
            }
        }
    }
}

/* ---- writers ---- */

/* Key tiles that the query tile sees, under a mask that hides later ones. */
static __device__ __forceinline__ int32_t end_of_keys(const task &t, int32_t tile)
{
    return (fgqa_kv_end(&t.mask, min(t.mask.sq, (tile + 1) * BLOCK_Q) - 1) + BLOCK_K - 1) / BLOCK_K;
}

/* What the word of a query tile says when it is the task's turn, where walks are not shifted. A task's description stays until
 * its writers have begun the next. */
template <bool MASKED> static __device__ __forceinline__ int32_t turn_at(const bwd_params &p, const task &t, int32_t tile)
{
    if (!MASKED || p.w.chain == 0) { return t.n; }
    const int32_t end = end_of_keys(t, tile);
    return t.turn.base + max(0, end - t.turn.limit) + min(end, t.turn.cap);
}
