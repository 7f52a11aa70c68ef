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
 *   named START                all                                       consumers, helper: mbarriers and the schedule are there
 *   named SHARES               helper and consumers                      the same: the shares are there (dec_combine.cuh)
 *   named REHEARSAL            helper                                    helper, where consumers wait for each other
 *
 * `Shared` is the block's shared memory: STREAMS, STAGES and READERS; ring, full, empty, pages, schedule.
 */
#pragma once
#include "dec_combine.cuh"
#include "dec_produce.cuh"

static constexpr int START = 8;
static_assert(FGQA_WARPS == CONSUMERS + 2, "kernels.def: consumers, a producer and a helper");

template <class Shared> static __device__ __forceinline__ void produce(const dec_params &p, Shared &mem, const dec_segment &first, int lane)
{
    const int stream = lane / 2 % Shared::STREAMS, kv = lane % 2;
    const tile_source source = {kv ? &p.v_map : &p.k_map, kv ? p.v_boxes : p.k_boxes, createpolicy_evict_first()};
    const uint32_t ring = smem_address(mem.ring[stream][0][kv]);
    const uint32_t full = smem_address(&mem.full[stream][0][kv]), empty = smem_address(&mem.empty[stream][0][kv]);
    granule_walk<Shared::STREAMS> walk(p, first, stream, lane < 2 * Shared::STREAMS);
    page_queue<Shared::STREAMS> pages(p, walk, smem_address(mem.pages[lane % (2 * Shared::STREAMS)]));
    int stage = 0;
    uint32_t parity = 1;                        /* the first pass over the ring finds it empty */
    while (__any_sync(0xFFFFFFFFu, walk.valid())) {
        if (walk.valid() && mbarrier_test(empty + 16 * stage, parity)) {
            const uint32_t bar = full + 16 * stage, tile = ring + 2 * TILE_BYTES * stage;
            const int32_t slot = walk.slot(), kv_head = p.by_row_blocks(walk.segment.h);
            int32_t page[PIECES];
            pages.take(p, walk, page);
            mbarrier_arrive_expect_tx(bar, TILE_BYTES);
#pragma unroll
            for (int n = 0; n < PIECES; n++) {
                if (n == 0 || p.pieces) { load_boxes(source, tile + n * PIECE * 128, bar, in_page(p, slot + n * PIECE), kv_head, page[n]); }
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

/* The producer does its work here. Whether the warp is to go on: consumers with work, and the helper. */
template <class Shared> static __device__ __forceinline__ bool open_block(const dec_params &p, Shared &mem)
{
    const int warp = (int)thread_index() / 32, lane = (int)thread_index() % 32;
    if (warp == CONSUMERS) {
        if (lane == 0) {
            prefetch_tensormap(&p.k_map);
            prefetch_tensormap(&p.v_map);
        }
        for (int n = lane; n < Shared::STREAMS * Shared::STAGES * 2; n += 32) {
            mbarrier_init(smem_address(&mem.full[0][0][0] + n), 1);
            mbarrier_init(smem_address(&mem.empty[0][0][0] + n), Shared::READERS);
        }
        fence_mbarrier_init();
        barrier_arrive(START, THREADS);
        produce(p, mem, first_segment_early(p), lane);
        return false;
    }
    if (warp > CONSUMERS) { make_schedule(p, mem.schedule, lane); }
    barrier_sync(START, THREADS);
    if ((int32_t)blockIdx.x >= mem.schedule.split.blocks) { return false; }
    if (warp > CONSUMERS && p.counters) {
        if (lane < 2) { mem.schedule.share[lane] = share_of(p, mem.schedule, lane); }
        __syncwarp();
    }
    return true;
}
