/* dec_block.cuh - how the work of a decode kernel's block is shared out among its warps; the same in decode.cu and decode_wide.cu.
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
 * `Shared` is the block's shared memory: STREAMS, STAGES and READERS; ring, full, empty, pages, schedule.
 */
#pragma once
#include "dec_combine.cuh"
#include "dec_produce.cuh"

static constexpr int START = 8, BARRIERS = 12;

/* Bytes under way to an SM: about as many as keep the memory busy. Whatever else is loaded waits for all of them, instructions too. */
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

/* A lane of the producer, and the half of a ring that it keeps full. PLAIN: all sequences have one length, and there are no pages. That
 * much less code lies before the first copy. */
template <bool PLAIN, class Shared> struct producer_lane {
    static constexpr int LANES = 2 * Shared::STREAMS;
    int kv, stream;
    tile_source source;
    uint32_t ring, full, empty;

    __device__ __forceinline__ producer_lane(const dec_params &p, Shared &mem, int lane, bool whole_pairs) : kv(lane % 2), stream(lane / 2 % Shared::STREAMS)
    {
        source.map = kv ? &p.v_map : &p.k_map;
        source.boxes = kv ? p.v_boxes : p.k_boxes;
        source.pitch = PLAIN ? CHUNK_BYTES : p.chunk_pitch;
        source.policy = whole_pairs ? createpolicy_evict_normal() : createpolicy_evict_first();        /* records stay in L2 */
        ring = smem_address(mem.ring[stream][0][kv]);
        full = smem_address(&mem.full[stream][0][kv]);
        empty = smem_address(&mem.empty[stream][0][kv]);
    }
};

template <bool PLAIN, class Shared> static __device__ __forceinline__ void produce(const dec_params &p, Shared &mem, int lane)
{
    typedef producer_lane<PLAIN, Shared> lane_type;
    constexpr int TILES = lane_type::LANES * TILE_BYTES, COPIES = TILES < IN_FLIGHT ? IN_FLIGHT / TILES : 1;      /* of a lane */
    static_assert(2 * COPIES <= Shared::STAGES, "kernels.def: the ring holds what is under way");
    const int window = !PLAIN && p.table ? 2 * COPIES : COPIES;         /* pages are waited for in between */
    bool whole_pairs;
    const dec_segment first = first_segment_early<PLAIN>(p, &whole_pairs);
    const lane_type own(p, mem, lane, whole_pairs);
    int stage = 0;
    if (PLAIN && lane < lane_type::LANES && first.valid() && first.g0 + own.stream < first.g1) {        /* the first copy by itself: the shortest way to it */
        mbarrier_arrive_expect_tx(own.full, TILE_BYTES);
        load_boxes(own.source, own.ring, own.full, (first.span.first + first.g0 + own.stream) * GRANULE, p.by_row_blocks(first.h), first.b);
        stage = 1;
    }
    __syncwarp();
    granule_walk<Shared::STREAMS, PLAIN> walk(p, first, own.stream, lane < lane_type::LANES);
    if (stage == 1) { walk.advance(p); }
    typename std::conditional<PLAIN, no_queue<Shared::STREAMS>, page_queue<Shared::STREAMS>>::type
        pages(p, walk, smem_address(mem.pages[lane % lane_type::LANES]));
    if (!PLAIN) { barrier_sync(BARRIERS, 64); }                 /* there by now */
    uint32_t parity = 1;                        /* the first pass over the ring finds it empty */
    while (__any_sync(0xFFFFFFFFu, walk.valid())) {
        const int behind = stage >= window ? stage - window : stage + Shared::STAGES - window;
        if (walk.valid() && mbarrier_test(own.full + 16 * behind, parity ^ (stage >= window)) && mbarrier_test(own.empty + 16 * stage, parity)) {
            const uint32_t bar = own.full + 16 * stage, tile = own.ring + 2 * TILE_BYTES * stage;
            const int32_t slot = walk.slot(), kv_head = p.by_row_blocks(walk.segment.h);
            int32_t page[PIECES];
            pages.take(p, walk, page);
            mbarrier_arrive_expect_tx(bar, TILE_BYTES);
#pragma unroll
            for (int n = 0; n < PIECES; n++) {
                if (n == 0 || (!PLAIN && p.pieces)) { load_boxes(own.source, tile + n * (PLAIN ? 0 : p.piece_pitch), bar, PLAIN ? slot : in_page(p, slot + n * PIECE), kv_head, page[n]); }
            }
            if (++stage == Shared::STAGES) {
                stage = 0;
                parity ^= 1;
            }
            walk.advance(p);
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

/* Consumers and helper: calls `fetch` with the first segment, if there is one, as early as can be. Behind the stream of all SMs a load
 * takes 4 to 5 us. Lengths on the device: the segment is not known before the schedule is. Whether the block has work. */
template <class Shared, class Fetch> static __device__ __forceinline__ bool begin_block(const dec_params &p, Shared &mem, const dec_actor &actor, dec_segment &segment,
                                                                                        const Fetch &fetch)
{
    bool works = actor.rehearsal || p.uniform || await_start(p, mem);
    bool whole_pairs;
    segment = p.uniform ? first_segment_early<true>(p, &whole_pairs) : first_segment(p, mem.schedule);
    if (works && segment.valid()) { fetch(segment); }
    if (!actor.rehearsal) {
        if (p.uniform) { works = await_start(p, mem); }
    }
    return works;
}

/* The producer does its work here. Whether the warp is to go on: consumers, and the helper of a block with work. */
template <class Shared> static __device__ __forceinline__ bool open_block(const dec_params &p, Shared &mem)
{
    const int warp = (int)thread_index() / 32, lane = (int)thread_index() % 32;
    if (__builtin_expect(warp == CONSUMERS, 1)) {       /* its code comes first: all else waits for its copies */
        if (lane < 2) { prefetch_tensormap(lane ? &p.v_map : &p.k_map); }
        if (__builtin_expect(p.plain, 1)) {
            if (lane == 0) { init_barriers(mem); }
            __syncwarp();
            barrier_arrive(START, THREADS);
            produce<true>(p, mem, lane);
        } else {
            barrier_arrive(START, THREADS);
            produce<false>(p, mem, lane);
        }
        return false;
    }
    if (warp == 0 && !p.plain) {                /* while the producer looks at lengths */
        if (lane == 0) { init_barriers(mem); }
        __syncwarp();
        barrier_arrive(BARRIERS, 64);
    }
    if (warp < CONSUMERS) { return true; }
    if (p.uniform) { barrier_arrive(START, THREADS); }
    make_schedule(p, mem.schedule, lane);
    if (!p.uniform) { barrier_sync(START, THREADS); }
    if ((int32_t)blockIdx.x >= mem.schedule.split.blocks) { return false; }
    if (p.counters) {
        if (lane < 2) { mem.schedule.share[lane] = share_of(p, mem.schedule, lane); }
        __syncwarp();
    }
    return true;
}
