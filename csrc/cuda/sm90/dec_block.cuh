/* dec_block.cuh - how the work of a decode kernel's block is shared out among its warps; the same in decode.cu and
 * decode_wide.cu.
 *
 *   consumers   CONSUMERS warps, READERS of them a stream; what they do is the kernel's
 *   producer    lane (stream, K or V) keeps that half of the stream's ring full
 *   helper      makes the schedule and the shares of the merge; then rehearses: it goes through the end of a segment and the merge
 *               with its hands off memory, so that their instructions are at hand when all wait for them. Once the stream has
 *               passed through L2 they come from DRAM, about a microsecond for every 128 bytes.
 *
 *   barrier                    arrivals                                  waited for by
 *   full[stream][stage][KV]    producer lane (1) + bytes                 the stream's consumers
 *   empty[stream][stage][KV]   the stream's consumer warps (READERS)     producer lane
 *   named START                all                                       consumers: mbarriers are there; with lengths on the device the schedule, too
 *   named BARRIERS             first consumer warp                       producer: mbarriers are there, if it has not made them itself (p.plain)
 *   named SHARES               helper and consumers                      the same: the shares are there (dec_combine.cuh)
 *   named REHEARSAL            helper                                    helper, where consumers wait for each other
 *
 * Every warp waits for the launches before this one before it looks at memory (programmatic launch: this one may begin ahead of
 * their end), and the launch behind this one may begin when all blocks have done so. Before that, some ask for what they will
 * copy first to be brought to L2.
 *
 * `Shared` is the block's shared memory: STREAMS, STAGES, READERS, PIECE_LANES, JOINS, HALVES and Q_KEPT; ring, full, empty,
 * pages, schedule. JOINS: blocks have a part of their cluster's pair each (dec_join.cuh), which needs no schedule: the helper
 * ends at once. HALVES: or, where the params say so, half of it (dec_wide_end.cuh). Q_KEPT: q comes through registers; with more
 * rows it had better not wait behind keys.
 */
#pragma once
#include "dec_combine.cuh"
#include "dec_produce.cuh"
#include "early.cuh"

static constexpr int START = 8, BARRIERS = 12;

/* Bytes under way to an SM: about as many as keep the memory busy. Whatever else is loaded waits for all of them, instructions
 * too. */
static constexpr int IN_FLIGHT = 64 << 10;
static_assert(FGQA_WARPS == CONSUMERS + 2, "kernels.def: consumers, a producer and a helper");

/* By one lane: the instruction takes one address, and lanes would take turns. */
template <class Shared> static __device__ __forceinline__ void init_barriers(Shared &mem)
{
#pragma unroll
    for (int n = 0; n < Shared::STREAMS * Shared::STAGES * 2; n++) {
        mbarrier_init(smem_address(&mem.full[0][0][0] + n), 1);
        mbarrier_init(smem_address(&mem.empty[0][0][0] + n), Shared::READERS);
    }
    fence_mbarrier_init();
}

/* What a block reads. PLAIN: all sequences have one length, and there are no pages; that much less code lies before the first
 * copy. LENGTHS: no pages; only with JOINS, in the other kernels the code of consumers, too, gets slower by it (LOG.md).
 * PIECES_APART: pages that do not hold whole granules, where pieces of a tile have lanes of their own. */
enum source_kind { PLAIN, LENGTHS, ANY_SOURCE, PIECES_APART };

/* A lane of the producer, and the half of a ring that it keeps full, or one piece of each of its tiles. */
template <source_kind KIND, class Shared> struct producer_lane {
    static constexpr int PARTS = KIND == PIECES_APART ? PIECES : 1, LANES = 2 * Shared::STREAMS * PARTS;
    static_assert(LANES <= 32, "a lane for each piece");
    int part, kv, stream;
    tile_source source;
    uint32_t ring, full, empty;

    __device__ __forceinline__ producer_lane(const dec_params &p, Shared &mem, int lane, bool evict_normal)
        : part(lane % PARTS), kv(lane / PARTS % 2), stream(lane / PARTS / 2 % Shared::STREAMS)
    {
        source.map = kv ? &p.v_map : &p.k_map;
        source.boxes = kv ? p.v_boxes : p.k_boxes;
        source.pitch = KIND <= LENGTHS ? CHUNK_BYTES : p.chunk_pitch;
        source.policy = evict_normal ? createpolicy_evict_normal() : createpolicy_evict_first();
        ring = smem_address(mem.ring[stream][0][kv]) + (PARTS > 1 ? part * p.piece_pitch : 0);
        full = smem_address(&mem.full[stream][0][kv]);
        empty = smem_address(&mem.empty[stream][0][kv]);
    }
};

template <source_kind KIND, class Shared>
static __device__ __forceinline__ void produce(const dec_params &p, Shared &mem, int lane, const dec_segment &first, bool evict_normal)
{
    typedef producer_lane<KIND, Shared> lane_type;
    constexpr int TILES = 2 * Shared::STREAMS * TILE_BYTES, COPIES = TILES < IN_FLIGHT ? IN_FLIGHT / TILES : 1;      /* of a half */
    constexpr bool APART = KIND == PIECES_APART, IN_TURN = KIND == ANY_SOURCE && !Shared::PIECE_LANES, NO_TABLE = KIND <= LENGTHS;
    constexpr int COUNT = IN_TURN ? PIECES : 1;         /* of pieces, by a lane */
    static_assert(2 * COPIES <= Shared::STAGES, "kernels.def: the ring holds what is under way");
    const int usual = KIND == ANY_SOURCE && p.table ? 2 * COPIES : COPIES;          /* pages are waited for in between */
    const int window = Shared::JOINS && p.fills_ring ? Shared::STAGES : usual;
    const lane_type own(p, mem, lane, evict_normal);
    int stage = 0;
    /* the first copy by itself: the shortest way to it */
    const bool begins = NO_TABLE && lane < lane_type::LANES && first.valid() && first.g0 + own.stream < first.g1;
    if (KIND == PLAIN) {
        if (begins && (Shared::JOINS || (Shared::HALVES && (Shared::Q_KEPT || p.halves)))) {
            prefetch_boxes(own.source, (first.span.first + first.g0 + own.stream) * GRANULE, p.by_row_blocks(first.h), first.b);
        }
        launches_before_wait();
    } else if (KIND == LENGTHS) {
        barrier_sync(BARRIERS, 64);             /* there by now */
    }
    if (begins) {
        mbarrier_arrive_expect_tx(own.full, TILE_BYTES);
        load_boxes(own.source, own.ring, own.full, (first.span.first + first.g0 + own.stream) * GRANULE, p.by_row_blocks(first.h), first.b);
        stage = 1;
    }
    __syncwarp();
    granule_walk<Shared::STREAMS, KIND == PLAIN> walk(p, first, own.stream, lane < lane_type::LANES);
    if (stage == 1) { walk.advance(p); }
    typename std::conditional<NO_TABLE, no_queue<Shared::STREAMS, KIND == PLAIN>, page_queue<Shared::STREAMS, COUNT>>::type
        pages(p, walk, smem_address(mem.pages[0]) + lane % lane_type::LANES * COUNT * PAGES_AHEAD * 4, own.part * PIECE);
    int32_t slot, kv_head, page[COUNT];
    const auto locate = [&]() {
        slot = walk.slot() + own.part * PIECE;
        kv_head = p.by_row_blocks(walk.segment.h);
        pages.take(p, walk, page);
    };
    if (APART && walk.valid()) { locate(); }    /* the next copies, before there is room for them */
    if (!NO_TABLE) { barrier_sync(BARRIERS, 64); }
    uint32_t parity = 1;                        /* the first pass over the ring finds it empty */
    while (__any_sync(0xFFFFFFFFu, walk.valid())) {
        const int behind = stage >= window ? stage - window : stage + Shared::STAGES - window;
        bool ready = walk.valid() && own.part == 0 && mbarrier_test(own.full + 16 * behind, parity ^ (stage >= window))
                     && mbarrier_test(own.empty + 16 * stage, parity);
        if (APART) {                            /* lanes take turns in a test: one for all pieces of a tile */
            __syncwarp();
            ready = __shfl_sync(0xFFFFFFFFu, ready, lane - own.part);
        }
        if (ready) {
            const uint32_t bar = own.full + 16 * stage, tile = own.ring + 2 * TILE_BYTES * stage;
            if (!APART) { locate(); }
            if (own.part == 0) { mbarrier_arrive_expect_tx(bar, TILE_BYTES); }
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                if (n > 0 && !p.pieces) { continue; }
                load_boxes(own.source, tile + n * (IN_TURN ? p.piece_pitch : 0), bar, NO_TABLE ? slot : in_page(p, slot + n * PIECE), kv_head, page[n]);
            }
            if (++stage == Shared::STAGES) {
                stage = 0;
                parity ^= 1;
            }
            walk.advance(p);
            if (APART && walk.valid()) { locate(); }
        }
        __syncwarp();
    }
}

/* Consumers: mbarriers are there and, with lengths on the device, the schedule. Whether the block has work. */
template <class Shared> static __device__ __forceinline__ bool await_start(const dec_params &p, const Shared &mem)
{
    barrier_sync(START, THREADS);
    return (int32_t)blockIdx.x < (p.uniform ? p.split.blocks : mem.schedule.split.blocks);
}

/* Consumers and helper: calls `fetch` with the first segment, if there is one, as early as can be. Behind the stream of all
 * SMs a load takes 4 to 5 us. Lengths on the device: the segment is not known before the schedule is. Whether the block has
 * work. */
template <class Shared, class Fetch> static __device__ __forceinline__ bool begin_block(const dec_params &p, Shared &mem, const dec_actor &actor, dec_segment &segment,
                                                                                        const Fetch &fetch)
{
    bool works = actor.rehearsal || p.uniform || await_start(p, mem);
    bool evict_normal;
    segment = p.uniform ? first_segment_early<true>(p, &evict_normal) : first_segment(p, mem.schedule);
    if (works && segment.valid()) { fetch(segment); }
    if (!actor.rehearsal) {
        if (p.uniform) { works = await_start(p, mem); }
    }
    return works;
}

/* A line of q, a thread. */
static __device__ __forceinline__ void ask_for_q(const dec_params &p, int32_t b, const pair_rows &rows)
{
    constexpr int COLUMNS = 64, LINES = D / COLUMNS;
    const fgqa_problem &problem = p.common.problem;
    const int local = (int)thread_index() / LINES, column = (int)thread_index() % LINES * COLUMNS;
    if (local < rows.valid && column < problem.d) {
        prefetch_l2(fgqa_row_address(problem.view[FGQA_ARG_q], sizeof(T), b, rows.kv_head * problem.g + rows.rows.h(local), rows.rows.i(local)) + 2 * column);
    }
}

/* Consumers of a block that has a part of its cluster's pair. */
template <class Fetch> static __device__ __forceinline__ dec_segment begin_part(const dec_params &p, dec_sequence &sequence, const Fetch &fetch)
{
    const dec_place at = place_of_pair(p, (int32_t)cluster_number());
    dec_segment segment;
    segment.b = at.b;
    segment.h = at.h;
    ask_for_q(p, at.b, pair_rows_of(p, at.h));
    launches_before_wait();
    fetch(segment);
    sequence = p.uniform ? p.sequence : dec_sequence_at(p, at.b);
    barrier_sync(START, THREADS);
    return part_of_pair(p, at, sequence);
}

/* The producer's first segment. Whole warp. */
template <class Shared, bool UNIFORM> static __device__ __forceinline__ dec_segment own_segment(const dec_params &p, bool *evict_normal)
{
    if (!Shared::JOINS) { return first_segment_early<UNIFORM>(p, evict_normal); }
    const dec_place at = place_of_pair(p, (int32_t)cluster_number());
    *evict_normal = p.evict_normal;
    return part_of_pair(p, at, UNIFORM || p.uniform ? p.sequence : dec_sequence_at(p, at.b));
}

/* Lengths on the device, no pages: keys that are read whatever the lengths are, the first granules of pairs, one a block,
 * while it is not known yet whose they are. None beyond an eighth of the padded length, in case sequences are short. By a
 * warp. */
template <class Shared> static __device__ __forceinline__ void ask_for_keys(const dec_params &p, int lane)
{
    const dec_lengths &l = p.lengths;
    if (lane >= 2 || p.table || !l.whole || l.left_pad) { return; }
    const int32_t pairs = l.b * p.layout.heads, granule = Shared::JOINS ? (int32_t)cluster_rank() : (int32_t)blockIdx.x / pairs;
    if (8 * granule >= p.units) { return; }
    const dec_place at = place_of_pair(p, Shared::JOINS ? (int32_t)cluster_number() : (int32_t)blockIdx.x - granule * pairs);
    const tile_source source = {lane ? &p.v_map : &p.k_map, lane ? p.v_boxes : p.k_boxes, 0, createpolicy_evict_first()};
    prefetch_boxes(source, granule * GRANULE, p.by_row_blocks(at.h), at.b);
}

/* The producer does its work here. Whether the warp is to go on: consumers, and the helper of a block with work. */
template <class Shared> static __device__ __forceinline__ bool open_block(const dec_params &p, Shared &mem)
{
    const int warp = (int)thread_index() / 32, lane = (int)thread_index() % 32;
    if (__builtin_expect(warp == CONSUMERS, 1)) {       /* its code comes first: all else waits for its copies */
        bool evict_normal;
        if (lane < 2) { prefetch_tensormap(lane ? &p.v_map : &p.k_map); }
        if (__builtin_expect(p.plain, 1)) {
            if (lane == 0) { init_barriers(mem); }
            __syncwarp();
            barrier_arrive(START, THREADS);
            const dec_segment first = own_segment<Shared, true>(p, &evict_normal);
            produce<PLAIN>(p, mem, lane, first, evict_normal);
        } else {
            barrier_arrive(START, THREADS);
            launches_before_wait();
            const dec_segment first = own_segment<Shared, false>(p, &evict_normal);
            if (Shared::PIECE_LANES && p.pieces) {
                if constexpr (Shared::PIECE_LANES) { produce<PIECES_APART>(p, mem, lane, first, evict_normal); }
            } else if (Shared::JOINS && !p.table) {
                if constexpr (Shared::JOINS) { produce<LENGTHS>(p, mem, lane, first, evict_normal); }
            } else {
                produce<ANY_SOURCE>(p, mem, lane, first, evict_normal);
            }
        }
        return false;
    }
    if (warp == 0 && !p.plain) {                /* while the producer looks at lengths */
        if (lane == 0) { init_barriers(mem); }
        __syncwarp();
        barrier_arrive(BARRIERS, 64);
    }
    if (warp == 1 && !p.plain) { ask_for_keys<Shared>(p, lane); }
    if (!Shared::JOINS || warp >= CONSUMERS) { launches_before_wait(); }        /* or begin_part() does */
    if (warp < CONSUMERS) { return true; }
    if (!Shared::JOINS || p.releases) { launch_behind_begin(); }
    if (p.uniform || Shared::JOINS) { barrier_arrive(START, THREADS); }
    if (Shared::JOINS) { return false; }
    make_schedule(p, mem.schedule, lane);
    if (!p.uniform) { barrier_sync(START, THREADS); }
    if ((int32_t)blockIdx.x >= mem.schedule.split.blocks) { return false; }
    if (p.counters) {
        if (lane < 2) { mem.schedule.share[lane] = share_of(p, mem.schedule, lane); }
        __syncwarp();
    }
    return true;
}
