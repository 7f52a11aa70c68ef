/* dec_combine.cuh - partial results of one row: records, their merge, and the final write.
 *
 *     m = max_j m_j,  l = sum_j l_j 2^(c (m_j - m)),  o = sum_j o_j 2^(c (m_j - m)) / l
 *
 * An item is ITEM outputs of one row that a thread has side by side; eight of them, 128 bytes, are what a warp reads at a time.
 * What comes here comes once a launch and has all wait for it: its time is that of its instructions, one after the other.
 *
 * The order of a sum is that of the parts: same split, same bits. Who merges a pair of several blocks:
 *
 *     in place    the blocks themselves. Each counts itself on the pair's counter when its record is written, waits until all
 *                 have, and does its share of the items. All blocks are resident: the launch is cooperative. The last one to
 *                 count leaves 0 behind. Who has two such pairs counts on both before it waits for one.
 *     at once     the block that has all chunks of a pair, with batch_invariant; in registers, without records, where they are few
 *                 and the kernel can (p.folds).
 *     in pairs    two blocks of a cluster that have half of a pair each, without records (dec_wide_end.cuh).
 *     in clusters the blocks of a cluster that has a pair, of short caches, without records (dec_join.cuh).
 *     afterwards  a second kernel, where there is no counter.
 */
#pragma once
#include "../common/ptx_global.cuh"
#include "../common/ptx_sync.cuh"
#include "../common/softmax.cuh"
#include "../common/split.cuh"
#include "dec_ptx.cuh"
#include "dec_split.cuh"

static constexpr int ITEM = BLOCK_Q > 8 ? DV / 32 : 4, ITEMS_OF_ROW = DV / ITEM, CONSUMERS = 8, THREADS = 32 * FGQA_WARPS, COMBINE_BARRIER = 2 /* and 3 */, SHARES = 9, REHEARSAL = 15;
static_assert(D == DV && D % 64 == 0, "kernels.def: one tile form for K and V, of 64-column chunks");

struct dec_partial { float m, l, o[ITEM]; };

static __device__ __forceinline__ dec_partial empty_partial()
{
    const dec_partial none = {-INFINITY, 0.0f, {}};
    return none;
}

/* The kernel's: row of an item, and column of its output e. */
static __device__ __forceinline__ int item_row(int item);
static __device__ __forceinline__ int item_column(int item, int e);

/* Over the 4 planes of a warp, lanes of equal lane % 8. */
static __device__ __forceinline__ void merge_planes(dec_partial &a, float scale_log2)
{
    float m = a.m;
#pragma unroll
    for (int d = 8; d < 32; d *= 2) { m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, d)); }
    const float weight = ex2((a.m - finite_max(m)) * scale_log2);
    a.m = m;
    a.l *= weight;
#pragma unroll
    for (int e = 0; e < ITEM; e++) { a.o[e] *= weight; }
#pragma unroll
    for (int d = 8; d < 32; d *= 2) {
        a.l += __shfl_xor_sync(0xFFFFFFFFu, a.l, d);
#pragma unroll
        for (int e = 0; e < ITEM; e++) { a.o[e] += __shfl_xor_sync(0xFFFFFFFFu, a.o[e], d); }
    }
}

/* sum += a part, in one rounding order wherever it is done: chunks of a pair may be added up in registers or from records. */
static __device__ __forceinline__ float2 fold_weights(float &m, float part_m, float scale_log2)
{
    const float own = m;
    m = fmaxf(m, part_m);
    return make_float2(ex2((own - finite_max(m)) * scale_log2), ex2((part_m - finite_max(m)) * scale_log2));
}
static __device__ __forceinline__ float fold(float sum, float part, float2 weights) { return __fmaf_rn(part, weights.y, __fmul_rn(sum, weights.x)); }

/* sum += N partials at once; m = -inf where there is none. */
template <int N> static __device__ __forceinline__ void merge_batch(dec_partial &sum, const dec_partial (&part)[N], float scale_log2)
{
    float m = sum.m;
#pragma unroll
    for (int n = 0; n < N; n++) { m = fmaxf(m, part[n].m); }
    const float base = finite_max(m);
    float weight = ex2((sum.m - base) * scale_log2);
    sum.m = m;
    sum.l *= weight;
#pragma unroll
    for (int e = 0; e < ITEM; e++) { sum.o[e] *= weight; }
#pragma unroll
    for (int n = 0; n < N; n++) {
        weight = ex2((part[n].m - base) * scale_log2);
        sum.l += part[n].l * weight;
#pragma unroll
        for (int e = 0; e < ITEM; e++) { sum.o[e] += part[n].o[e] * weight; }
    }
}

/* Where the result of a row goes. */
struct row_end {
    char *out;
    float sink, *lse;               /* NULL: somebody else's, or not wanted */

    /* What the row's sums are to be multiplied with. */
    __device__ __forceinline__ float finish(const dec_params &p, float m, float l) const
    {
        float x;
        if (lse) {
            softmax_finish(m * p.unit, l, sink, &x);
            *lse = x;
        }
        return softmax_finish(m * p.unit, l, sink, &x);
    }
};

/* Row `local` of a pair, if it exists. owner: of its LSE. */
static __device__ __forceinline__ row_end row_end_of(const dec_params &p, int32_t b, const pair_rows &rows, int32_t sq, int32_t local, bool owner)
{
    const fgqa_problem &problem = p.common.problem;
    row_end end = {NULL, -INFINITY, NULL};
    if (local < rows.valid) {
        const int32_t i = rows.rows.i(local), h = rows.kv_head * problem.g + rows.rows.h(local);
        end.out = fgqa_row_address(problem.view[FGQA_ARG_out], sizeof(T), b, h, i);
        end.sink = sink_logit(problem, b, h, i >= sq);
        if (owner && problem.view[FGQA_ARG_lse].data) { end.lse = (float *)fgqa_row_address(problem.view[FGQA_ARG_lse], sizeof(float), b, h, i); }
    }
    return end;
}

/* One item as the result. */
static __device__ __forceinline__ void store_output(const dec_params &p, const row_end &end, int item, const dec_partial &a)
{
    constexpr int RUN = BLOCK_Q == 8 ? 4 : FLOAT8 ? 2 : 1;      /* outputs that are neighbours */
    const float scale = end.finish(p, a.m, a.l);
#pragma unroll
    for (int e = 0; e < ITEM; e += RUN) {
        const int column = item_column(item, e);
        if (column >= p.common.problem.dv) { continue; }
        if constexpr (RUN == 4) {
            *(uint2 *)(end.out + 2 * column) = make_uint2(pack2(a.o[e] * scale, a.o[e + 1] * scale, T()), pack2(a.o[e + 2] * scale, a.o[e + 3] * scale, T()));
        } else if constexpr (RUN == 2) {
            *(uint32_t *)(end.out + 2 * column) = pack2(a.o[e] * scale, a.o[e + 1] * scale, T());
        } else {
            *(uint16_t *)(end.out + 2 * column) = (uint16_t)pack2(a.o[e] * scale, 0.0f, T());
        }
    }
}

/* A record: items, then m and l of each row. */
static __device__ __forceinline__ int32_t record_floats(const dec_params &p) { return p.layout.tile_rows * (DV + 2); }
static __device__ __forceinline__ float *record_of(const dec_params &p, int64_t record) { return p.layout.record + record * record_floats(p); }
static __device__ __forceinline__ float2 *sums_of_record(const dec_params &p, float *record) { return (float2 *)(record + p.layout.tile_rows * DV); }

/* Of another block's record, once it is released; `part` stays as it is where there is none. */
static __device__ __forceinline__ void load_part(dec_partial &part, const float *o, const float *ml, bool there)
{
    if constexpr (ITEM == 4) {
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %7, 0;\n\t@p ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%6];\n\t"
                     "@p ld.relaxed.gpu.global.v2.f32 {%4, %5}, [%8];\n\t}"
                     : "+f"(part.o[0]), "+f"(part.o[1]), "+f"(part.o[2]), "+f"(part.o[3]), "+f"(part.m), "+f"(part.l)
                     : "l"(o), "r"((uint32_t)there), "l"(ml) : "memory");
    } else {
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t@p ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%4];\n\t"
                     "@p ld.relaxed.gpu.global.v2.f32 {%2, %3}, [%6];\n\t}"
                     : "+f"(part.o[0]), "+f"(part.o[1]), "+f"(part.m), "+f"(part.l) : "l"(o), "r"((uint32_t)there), "l"(ml) : "memory");
    }
}

/* By `warps` warps (a power of two) of which this is number `warp`. A lane has an item of a group of eight, item lane % 8.
 *   few parts:  a lane takes all of them, FEW_PARTS records in flight; a warp has 4 groups in hand.
 *   many parts: a lane takes parts plane, plane + planes, ...; planes merge inside the warp, then across the `spread` warps of
 *               the group through `scratch` ([warps][8] in shared memory) and the named barrier `barrier`. Of chunks the order of
 *               the sum depends on their number alone.
 * `wait` is called before the first record is read. rehearsal: one warp does it all but read and write memory. */
template <class Wait> static __device__ __forceinline__ void combine_items(const dec_params &p, const dec_share &share, int warp, int warps, int barrier,
                                                                           dec_partial *scratch, bool rehearsal, const Wait &wait)
{
    const dec_parts &parts = share.parts;
    const pair_rows rows = pair_rows_of(p, share.h);
    const int lane = (int)thread_index() % 32, quad = lane % 8, groups = (BLOCK_Q > 8 ? (rows.valid + 7) / 8 * 8 : rows.valid) * ITEMS_OF_ROW / 8;
    const int mine = max((groups - share.first + share.step - 1) / share.step, 1);
    const int32_t count = parts.count;
    const bool few = count <= FEW_PARTS;
    int spread = 1;
    while (!few && 2 * spread * (parts.chunked ? 1 : mine) <= (parts.chunked ? CONSUMERS / 2 : warps) && 4 * spread < count) { spread *= 2; }
    const int planes = few ? 1 : 4 * spread, plane = few ? 0 : lane / 8 + 4 * (warp & (spread - 1));
    const int at = few ? 4 * warp + lane / 8 : warp / spread, at_once = few ? 4 * warps : warps / spread;
    const int32_t pitch = record_floats(p) * (parts.chunked ? 1 : 2);           /* from part to part, but for the first one's offset */
    float *const first = record_of(p, parts.chunked ? parts.first : 2 * (int64_t)parts.first);
    bool waits = true;
    for (int s0 = share.first; s0 < groups; s0 += at_once * share.step) {       /* the same trips in every lane */
        const int s = s0 + at * share.step, item = 8 * s + quad, local = s < groups ? item_row(item) : rows.valid;
        const bool exists = local < rows.valid;
        const row_end end = row_end_of(p, share.b, rows, share.sq, local, item_column(item, 0) == 0);
        const int32_t to_sums = p.layout.tile_rows * DV + 2 * local - ITEM * item;
        const float *from = first + (int64_t)plane * pitch + ITEM * item;
        dec_partial sum = empty_partial();
        if (waits) { wait(); }
        waits = false;
        for (int j0 = plane; j0 < count; j0 += FEW_PARTS * planes) {
            dec_partial part[FEW_PARTS];
#pragma unroll
            for (int n = 0; n < FEW_PARTS; n++) {
                const float *own = from + (n == 0 && j0 == 0 ? parts.offset * record_floats(p) : 0);
                part[n] = empty_partial();
                load_part(part[n], own, own + to_sums, exists && j0 + n * planes < count && !rehearsal);
                from += planes * pitch;
            }
            if (few && parts.chunked) {
#pragma unroll
                for (int n = 0; n < FEW_PARTS; n++) {
                    if (n >= count) { continue; }
                    const float2 weights = fold_weights(sum.m, part[n].m, p.scale_log2);
                    sum.l = fold(sum.l, part[n].l, weights);
#pragma unroll
                    for (int e = 0; e < ITEM; e++) { sum.o[e] = fold(sum.o[e], part[n].o[e], weights); }
                }
            } else {
                merge_batch(sum, part, p.scale_log2);
            }
        }
        if (!few) { merge_planes(sum, p.scale_log2); }
        bool writer = exists && (few || lane < 8);
        if (spread > 1 || rehearsal) {
            if (lane < 8 && !rehearsal) { scratch[warp * 8 + quad] = sum; }
            bar_sync((uint32_t)barrier, (uint32_t)warps * 32);
            writer = writer && (warp & (spread - 1)) == 0;
            sum = empty_partial();
            dec_partial other[CONSUMERS / 4];
#pragma unroll
            for (int n = 0; n < CONSUMERS / 4; n++) {
                const int w = lane / 8 + 4 * n;
                other[n] = empty_partial();
                if (w < spread && !rehearsal) { other[n] = scratch[(warp / spread * spread + w) * 8 + quad]; }
            }
            merge_batch(sum, other, p.scale_log2);
            merge_planes(sum, p.scale_log2);
            if (s0 + at_once * share.step < groups) { bar_sync((uint32_t)barrier, (uint32_t)warps * 32); }        /* scratch is free again */
        }
        if (writer && !rehearsal) { store_output(p, end, item, sum); }
    }
    if (waits) { wait(); }                      /* for the warps that have a share */
}

/* This block's share of the pair of its first (n = 0) or last (n = 1) unit; it takes part in no others. */
static __device__ __forceinline__ dec_share share_of(const dec_params &p, const dec_schedule &schedule, int n)
{
    const dec_place &at = n ? schedule.tail : schedule.head;
    const int32_t first = schedule.split.block_of(at.pair_unit), blocks = schedule.split.block_of(at.pair_unit + at.units - 1) - first + 1;
    const bool split_here = blocks > 1 && (n == 0 || at.pair_unit > schedule.begin);
    const dec_share share = {at.b, at.h, sequence_of(p, schedule, at.b).sq, (int32_t)blockIdx.x - first, split_here ? blocks : 0,
                             parts_of(p, schedule.split, at), first};
    return share;
}

/* Consumers and helper go through the same code. */
struct dec_actor {
    bool rehearsal;
    int thread, threads;        /* of those that act together */
    int32_t barrier;            /* for all of them */
    __device__ __forceinline__ void sync() const { bar_sync((uint32_t)barrier, (uint32_t)threads); }
    template <class V> __device__ __forceinline__ V read(const V &shared) const
    {
        V x = {};
        if (!rehearsal) { x = shared; }
        return x;
    }
};

static __device__ __forceinline__ dec_actor actor_of(int thread, int32_t barrier)
{
    const bool rehearsal = thread >= 32 * CONSUMERS;
    const dec_actor actor = {rehearsal, rehearsal ? thread % 32 : thread, rehearsal ? 32 : 32 * CONSUMERS, rehearsal ? REHEARSAL : barrier};
    return actor;
}

/* The end of a block, by its consumer warps, after a barrier: all its records are written. */
static __device__ __forceinline__ void combine_in_place(const dec_params &p, const dec_schedule &schedule, dec_partial *scratch, bool rehearsal)
{
    const int warp = (int)thread_index() / 32;
    int second = 0, team = 1;
    dec_share share = {0, 0, 1, 0, 1 << 20, {9, 0, 0, 0}, 0};      /* the rehearsal's: one group, of many parts */
    const int32_t *counter = NULL;
    uint32_t last = 0, old = 0;
    if (!rehearsal) {
        barrier_sync(SHARES, 32 * CONSUMERS + 32);
        const bool head = schedule.share[0].step != 0, tail = schedule.share[1].step != 0;
        if (!head && !tail) { return; }
        if (thread_index() < 2 && (thread_index() ? tail : head)) {
            const dec_share &own = schedule.share[thread_index()];
            last = (uint32_t)own.step - 1;
            old = atom_inc_acq_rel(p.counters + own.first_block, last);
            counter = (const int32_t *)p.counters + own.first_block;
        }
        __syncwarp();                           /* both have counted before either waits */
        /* two of them: half of the warps each */
        second = head && tail ? warp >= CONSUMERS / 2 : tail;
        team = head && tail ? CONSUMERS / 2 : CONSUMERS;
        share = schedule.share[second];
    }
    const auto wait = [&]() {
        if (rehearsal) { return; }
        while (old != last && load_acquire_s32(counter) != 0) {}
        bar_sync(COMBINE_BARRIER, 32 * CONSUMERS);
    };
    combine_items(p, share, rehearsal ? 0 : warp % team, team, rehearsal ? REHEARSAL : COMBINE_BARRIER + second, scratch + second * 8 * (CONSUMERS / 2), rehearsal, wait);
    if (rehearsal) { barrier_sync(SHARES, 32 * CONSUMERS + 32); }
}

/* Consumers, after the segment that leaves `record`: if it ends a pair all of whose chunks are this block's, their sum. */
static __device__ __forceinline__ void combine_chunks(const dec_params &p, const dec_actor &actor, const dec_segment &segment, int32_t sq, int64_t record, int32_t segments,
                                                      dec_partial *scratch)
{
    const int32_t units = units_of(p, segment.span.count);
    if (actor.rehearsal || !p.layout.chunk || !p.counters || record < 0 || segment.g1 < segment.span.count || segments < units - 1) { return; }
    const dec_share share = {segment.b, segment.h, sq, 0, 1, {units, (int32_t)record - (units - 1), 0, 1}, 0};
    combine_items(p, share, actor.thread / 32, CONSUMERS, COMBINE_BARRIER, scratch, false, []() {});
    actor.sync();
}

/* The second kernel: `step` blocks of as many warps for each pair. */
extern "C" __global__ void __launch_bounds__(32 * CONSUMERS)
FGQA_SUFFIX(FGQA_ROW, _combine)(const __grid_constant__ dec_params p, int32_t step)
{
    __shared__ dec_partial scratch[CONSUMERS * 8];
    const int32_t pair = (int32_t)blockIdx.x / step, b = p.by_heads(pair), h = pair - b * p.layout.heads;
    work_split split = {1, 0, 0};
    dec_place at;
    if (p.uniform) {
        at = place_of_pair(p, pair);
        split = p.split;
    } else {
        const length_scan scan(p, (int)thread_index() % 32);
        at = scan.pair(b, h);
        if (!p.layout.chunk) {
            bool equal, same;
            const int32_t units = scan.total(&equal, &same);
            split = split_of(p, units, equal);
        }
    }
    const dec_parts parts = parts_of(p, split, at);
    if (parts.count == 1) { return; }
    const dec_share share = {b, h, dec_sequence_at(p, b).sq, (int32_t)blockIdx.x % step, step, parts, 0};
    combine_items(p, share, (int)thread_index() / 32, CONSUMERS, COMBINE_BARRIER, scratch, false, []() {});
}
