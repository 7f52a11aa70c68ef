/* bwd_walk.cuh - part of bwd.cu: which task a block takes, which query tiles it walks in what order, and their way into shared
 * memory.
 */
#pragma once

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
    row_stats stats[ROW_BUFFERS][BLOCK_Q];
    score_row rows[GENERAL ? ROW_BUFFERS : 1][GENERAL ? BLOCK_Q : 1];
    fgqa_range seen[GENERAL ? 1 : ROW_BUFFERS][GENERAL ? 1 : BLOCK_Q];
    struct task task;
    walk_step steps[4];                       /* ring */
};

/* Scalars of a launch. Tasks come in bands of `band` sections (KV head of a sequence x part): inside a band, key tile by key
 * tile. */
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
    next.base[AT_STATS] = (char *)((row_stats *)w.stats + bwd_q_row(p, next.b, head, next.sequence.q_row, 0));
    next.per_head[AT_STATS] = (int64_t)sizeof(row_stats) * (p.varlen ? p.total_q : p.sq);
    next.per_tile[AT_STATS] = (int64_t)sizeof(row_stats) * BLOCK_Q;
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
        const uint32_t to = smem_address(&mem.stats[at][row]);
        const char *from = step.at[AT_STATS] + row * sizeof(row_stats);
        if (GENERAL) { cp_async_16(to, from, row < valid ? 16 : 0); } else { cp_async_8(to, from, row < valid); }
        if (GENERAL) {
            mem.rows[at][row] = score_row_make(params, t.sequence.mask, t.b, t.kv_head * p.g + step.h, i0 + row);
        } else if (!t.all) {
            mem.seen[at][row] = row_range(t.sequence.mask, i0 + row);
        }
    }
}
