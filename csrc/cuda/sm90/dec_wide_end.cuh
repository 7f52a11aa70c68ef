/* dec_wide_end.cuh - the end of a segment in decode_wide.cu: from registers of the warpgroups to the result or to a record. Part
 * of it: the state, the shared memory and the fragments are its own. All wait for this once a launch: what counts is how many
 * instructions a warp goes through, one after the other.
 *
 * Of STREAMS 2 both groups have the same rows: each makes the sums of one half of them and gives its own part of the other half
 * away. Item (group, j, thread): the thread's outputs of the row that is number j of its own.
 */
#pragma once

static __device__ __forceinline__ int item_row(int item) { return row_of(item / 128, item % 32); }
static __device__ __forceinline__ int item_column(int item, int e) { return out_column(e / 2, e % 2, item / 32 % 4, item % 32); }

/* Sums l of a warp's keys, and m, to shared memory. */
template <class Shared, int N> static __device__ __forceinline__ void share_sums(Shared &mem, const dec_actor &actor, const state<N> &st, int group)
{
    constexpr int COUNT = N / 4, KEPT = COUNT >= 8 ? COUNT / 8 : 1;
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4, number = lane / 4;
    float l[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) { l[j] = st.l[j]; }
    join_by_rows(l, lane, [](float a, float b) { return a + b; });
    if (actor.rehearsal || lane >= 4 * COUNT) { return; }
#pragma unroll
    for (int n = 0; n < KEPT; n++) { mem.warp_part[group][warp][row_of(number + 8 * n, lane)] = l[n]; }
    if (warp == 0 && lane < 4) {
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) { *(float2 *)&mem.row_max[group][row_of(j, lane)] = make_float2(st.m[j], st.m[j + 1]); }
    }
}

/* Thread `row` of as many as there are rows: m and l of that row, over both streams. */
template <class Shared> static __device__ __forceinline__ float2 sums_of_row(const dec_params &p, const Shared &mem, const dec_actor &actor, int row)
{
    constexpr int STREAMS = Shared::STREAMS, N = Shared::N;
    const int first = STREAMS == 2 ? 0 : row / N, at = STREAMS == 2 ? row : row % N;
    float m = actor.read(mem.row_max[first][at]), l = 0.0f;
    if (STREAMS == 2) { m = fmaxf(m, actor.read(mem.row_max[1][at])); }
#pragma unroll
    for (int s = 0; s < STREAMS; s++) {
        float own = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; w++) { own += actor.read(mem.warp_part[first + s][w][at]); }
        l += STREAMS == 2 ? own * ex2((actor.read(mem.row_max[first + s][at]) - finite_max(m)) * p.scale_log2) : own;
    }
    return make_float2(m, l);
}

/* The end of two blocks that have half of a pair's keys each: rank r gets the sums of half r of either group's rows from the
 * other block, in the place of its Q and chain, and makes the result of them. o: the group's rows over the own keys; row, end:
 * of the thread, if it makes the sums of one. Records took 3 us. */
template <class Shared, int COUNT> static __device__ __forceinline__ void join_halves(const dec_params &p, Shared &mem, const dec_actor &actor, const row_end &end, int row,
                                                                                      bool has_row, const float (&o)[COUNT][ITEM], const pair_rows &rows, int group)
{
    constexpr int KEPT = COUNT / 2, KEPT_ROWS = 4 * KEPT;
    typedef typename std::conditional<ITEM == 4, float4, float2>::type vector;
    static_assert(sizeof(mem.q) >= sizeof(vector) * 2 * KEPT * 128 && COUNT % 4 == 0, "pairs of rows, and room for half of a group's");
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4, at = actor.thread % 128;
    const uint32_t rank = blockIdx.x % 2;
    const int first_row = group * 4 * COUNT + (int)rank * KEPT_ROWS;     /* of those that the group makes the result of */
    const bool owns_row = (uint32_t)row / KEPT_ROWS % 2 == rank;
    float2 ml = make_float2(0.0f, 0.0f);
    if (has_row) { ml = sums_of_row(p, mem, actor, row); }
    if (!actor.rehearsal) {
        cluster_wait();                         /* the other is past its tiles: the place of its Q and chain is free */
        const uint32_t to = map_to_rank(smem_address(mem.q), 1 - rank);
#pragma unroll
        for (int n = 0; n < KEPT; n++) {
            vector x;
#pragma unroll
            for (int e = 0; e < ITEM; e++) { ((float *)&x)[e] = rank ? o[n][e] : o[n + KEPT][e]; }
            store_cluster(to + ((group * KEPT + n) * 128 + at) * (uint32_t)sizeof(vector), x);
        }
        if (has_row && !owns_row) { store_cluster(map_to_rank(smem_address(&mem.chain[row]), 1 - rank), ml); }
        cluster_arrive();
        cluster_wait();
    }
    if (has_row && owns_row) {
        const float2 other = actor.read(*(const float2 *)&mem.chain[row]);
        const float m = fmaxf(ml.x, other.x), own = ex2((ml.x - finite_max(m)) * p.scale_log2), others = ex2((other.x - finite_max(m)) * p.scale_log2);
        if (!actor.rehearsal) {
            const float scale = row < rows.valid ? end.finish(p, m, ml.y * own + other.y * others) : 0.0f;
            mem.row_scale[row] = scale * own;
            mem.unit[row] = scale * others;
            mem.row_out[row] = end.out;
        }
    }
    actor.sync();
    float kept[KEPT][ITEM];
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
        const int own_row = first_row + row_of(n, lane);
        const float scale = actor.read(mem.row_scale[own_row]), others = actor.read(mem.unit[own_row]);
        const vector x = actor.read(((const vector *)mem.q)[(group * KEPT + n) * 128 + at]);
#pragma unroll
        for (int e = 0; e < ITEM; e++) { kept[n][e] = scale * (rank ? o[n + KEPT][e] : o[n][e]) + others * ((const float *)&x)[e]; }
    }
#pragma unroll
    for (int n = 0; n < KEPT; n += 2) {
        const int local = first_row + 4 * n + lane / 4;
#pragma unroll
        for (int e = 0; e < ITEM; e++) {        /* two rows of a column; turned */
            const uint32_t pair = movmatrix_trans(pack2(kept[n][e], kept[n + 1][e], T()));
            const int column = 64 * (e / 2) + 16 * warp + 8 * (e % 2) + 2 * (lane % 4);
            if (local < rows.valid && column < p.common.problem.dv && !actor.rehearsal) { *(uint32_t *)(mem.row_out[local] + column * (int)sizeof(T)) = pair; }
        }
    }
}

/* Of a segment: not a chunk that is added up in registers, or one of those: not the last, the last. */
enum chunk_end { WHOLE, GOES_ON, LAST };

/* The sum of a pair's chunks so far: of each thread its outputs and, of the row it makes the sums of, m and l. */
template <int COUNT> struct chunk_sum {
    float m[COUNT], o[COUNT][ITEM];
    float2 ml;
    __device__ __forceinline__ void clear()
    {
        ml = make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            m[j] = -INFINITY;
#pragma unroll
            for (int e = 0; e < ITEM; e++) { o[j][e] = 0.0f; }
        }
    }
};

/* Consumers. A whole pair goes to the result, a part to its record, or half of it to where the other half is. */
template <class Shared, int N> static __device__ __forceinline__ void finish_segment(const dec_params &p, Shared &mem, const dec_actor &actor, const state<N> &st, int32_t b,
                                                                                     const pair_rows &rows, int32_t sq, int group, int64_t record, chunk_end chunk,
                                                                                     chunk_sum<N / Shared::STREAMS / 4> &sum, const row_end &joined)
{
    constexpr int STREAMS = Shared::STREAMS, OWN_ROWS = N / STREAMS, COUNT = OWN_ROWS / 4;
    constexpr bool FOLDS = Shared::FOLDS;
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4, at = actor.thread % 128, row0 = group * OWN_ROWS;
    typedef typename std::conditional<ITEM == 4, float4, float2>::type vector;
    const int row = STREAMS == 2 ? actor.thread : group * N + at;
    const bool has_row = (STREAMS == 2 ? actor.thread : at) < N;       /* of each row one thread makes the sums */
    row_end end;
    const bool halves = Shared::HALVES && p.halves;
    if (Shared::JOINS || (halves && !actor.rehearsal)) { cluster_arrive(); }
    if ((record < 0 || halves) && has_row && !Shared::JOINS) { end = row_end_of(p, b, rows, sq, row, true); }
    float o[COUNT][ITEM];
    share_sums(mem, actor, st, group);
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        vector away;
#pragma unroll
        for (int e = 0; e < ITEM; e++) {
            const int r = 4 * (j / 2) + j % 2 + 2 * (e % 2);
            const float low = st.o[e / 2][r], high = STREAMS == 2 ? st.o[e / 2][r + N / 4] : 0.0f;
            o[j][e] = STREAMS == 2 && group ? high : low;
            ((float *)&away)[e] = group ? low : high;
        }
        if (STREAMS == 2 && !actor.rehearsal) { ((vector *)mem.of_group[group].away)[j * 128 + at] = away; }
    }
    if (STREAMS == 2 || record < 0) {
        actor.sync();
    } else {                                            /* the group's own rows */
        bar_sync(actor.rehearsal ? REHEARSAL : (uint32_t)(READY + group), actor.rehearsal ? 32 : 128);
    }
    if (STREAMS == 2) {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            const int own = row0 + row_of(j, lane);
            const float m = actor.read(mem.row_max[group][own]), other = actor.read(mem.row_max[1 - group][own]), base = finite_max(fmaxf(m, other));
            const float weight = ex2((m - base) * p.scale_log2), other_weight = ex2((other - base) * p.scale_log2);
            const vector x = actor.read(((const vector *)mem.of_group[1 - group].away)[j * 128 + at]);
#pragma unroll
            for (int e = 0; e < ITEM; e++) { o[j][e] = weight * o[j][e] + other_weight * ((const float *)&x)[e]; }
            if (FOLDS && chunk != WHOLE) {
                const float2 weights = fold_weights(sum.m[j], fmaxf(m, other), p.scale_log2);
#pragma unroll
                for (int e = 0; e < ITEM; e++) { o[j][e] = sum.o[j][e] = fold(sum.o[j][e], o[j][e], weights); }
            }
        }
    }
    if (FOLDS && chunk != WHOLE) {
        if (has_row) {
            const float2 ml = sums_of_row(p, mem, actor, row), weights = fold_weights(sum.ml.x, ml.x, p.scale_log2);
            sum.ml.y = fold(sum.ml.y, ml.y, weights);
        }
        if (chunk == GOES_ON) {
            actor.sync();                               /* shared memory is free again */
            return;
        }
    }
    if constexpr (Shared::JOINS) {
        float2 ml = make_float2(0.0f, 0.0f);
        if (has_row) { ml = sums_of_row(p, mem, actor, row); }
        join_parts<2 * COUNT * 128>(p, mem.ring, b, rows, sq, o, has_row, row, ml, joined, [&](int n) { return (group * COUNT + n) * 128 + at; });
        return;
    }
    if constexpr (Shared::HALVES) {
        if (halves) {
            join_halves(p, mem, actor, end, row, has_row, o, rows, group);
            return;
        }
    }
    if (record >= 0) {
        float *const to = record_of(p, record);
        if (has_row) {
            const float2 ml = sums_of_row(p, mem, actor, row);
            if (!actor.rehearsal) { sums_of_record(p, to)[row] = ml; }
        }
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            vector x;
#pragma unroll
            for (int e = 0; e < ITEM; e++) { ((float *)&x)[e] = o[j][e]; }
            if (!actor.rehearsal) { *(vector *)(to + ITEM * ((group * COUNT + j) * 128 + at)) = x; }
        }
        actor.sync();                                   /* shared memory is free again; every record of the segment is written */
        return;
    }
    if (has_row && row < rows.valid) {
        const float2 ml = FOLDS && chunk != WHOLE ? sum.ml : sums_of_row(p, mem, actor, row);
        if (!actor.rehearsal) {
            mem.row_scale[row] = end.finish(p, ml.x, ml.y);
            mem.row_out[row] = end.out;
        }
    }
    actor.sync();
    const auto store = [&](int local, int column, uint32_t pair) {
        if (local >= rows.valid || column >= p.common.problem.dv || actor.rehearsal) { return; }
        *(uint32_t *)(mem.row_out[local] + column * (int)sizeof(T)) = pair;
    };
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const float scale = actor.read(mem.row_scale[row0 + row_of(j, lane)]);
#pragma unroll
        for (int e = 0; e < ITEM; e++) { o[j][e] *= scale; }
    }
#pragma unroll
    for (int j = 0; j < COUNT; j += FLOAT8 ? 1 : 2) {
#pragma unroll
        for (int e = 0; e < ITEM; e += FLOAT8 ? 2 : 1) {
            if (FLOAT8) {                               /* two columns of a row are in one lane */
                store(row0 + row_of(j, lane), out_column(e / 2, 0, warp, lane), pack2(o[j][e], o[j][e + 1], T()));
            } else {                                    /* two rows of a column; turned */
                store(row0 + 4 * j + lane / 4, 64 * (e / 2) + 16 * warp + 8 * (e % 2) + 2 * (lane % 4), movmatrix_trans(pack2(o[j][e], o[j + 1][e], T())));
            }
        }
    }
    actor.sync();                                       /* as above */
}
