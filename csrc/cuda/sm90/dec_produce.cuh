/* dec_produce.cuh - the lanes that keep the rings of a decode kernel full: which granule is next, on which page, and its copy. */
#pragma once
#include "../common/ptx_cp_async.cuh"
#include "../common/ptx_ldmatrix.cuh"
#include "../common/ptx_sync.cuh"
#include "dec_ptx.cuh"
#include "dec_split.cuh"

/* Page numbers are fetched that many granules ahead: a load behind the stream of all SMs takes microseconds. */
static constexpr int PAGES_AHEAD = 4;

/* Granules n = stream, stream + STREAMS, ... of each segment. */
template <int STREAMS, bool UNIFORM> struct granule_walk {
    dec_segment segment;
    int32_t g, stream;

    __device__ __forceinline__ granule_walk(const dec_params &p, const dec_segment &first, int stream, bool works)
        : segment(first), stream(stream)
    {
        if (!works) { segment.left = -1; }
        g = segment.g0 + stream;
        settle(p);
    }
    __device__ __forceinline__ bool valid() const { return segment.valid(); }
    __device__ __forceinline__ void settle(const dec_params &p)
    {
        while (segment.valid() && g >= segment.g1) {
            segment.next(p, NULL, UNIFORM);
            g = segment.g0 + stream;
        }
    }
    __device__ __forceinline__ void advance(const dec_params &p)
    {
        g += STREAMS;
        settle(p);
    }
    __device__ __forceinline__ int32_t slot() const { return (segment.span.first + g) * GRANULE; }
};

static __device__ __forceinline__ int32_t in_page(const dec_params &p, int32_t slot)
{
    return p.table ? slot - p.by_page_size(slot) * p.page_size : slot;
}

/* The pages of the next granules, of COUNT pieces of each from slot `offset` on, on their way to this lane's `queue`. */
template <int STREAMS, int COUNT> struct page_queue {
    typedef granule_walk<STREAMS, false> walk_type;
    walk_type ahead;
    uint32_t queue;
    int32_t offset;
    int at;

    __device__ __forceinline__ page_queue(const dec_params &p, const walk_type &walk, uint32_t queue, int32_t offset)
        : ahead(walk), queue(queue), offset(offset), at(0)
    {
        if (p.table) {
#pragma unroll 1
            for (int n = 0; n < PAGES_AHEAD; n++) { fetch(p); }
        }
    }
    __device__ __forceinline__ void fetch(const dec_params &p)
    {
        if (ahead.valid()) {
            const int32_t last = p.by_page_size(p.lengths.capacity - 1);
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                cp_async_4(queue + 4 * (COUNT * at + n), p.table + ahead.segment.b * p.table_stride
                                                                 + min(p.by_page_size(ahead.slot() + offset + n * PIECE), last));
            }
            ahead.advance(p);
        }
        cp_async_commit();
        at = at + 1 == PAGES_AHEAD ? 0 : at + 1;
    }
    /* The pages of the granule that `walk` is at, and then those of a later one are fetched. */
    __device__ __forceinline__ void take(const dec_params &p, const walk_type &walk, int32_t (&page)[COUNT])
    {
        if (p.table) {
            cp_async_wait<PAGES_AHEAD - 1>();
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                asm volatile("ld.shared.s32 %0, [%1];" : "=r"(page[n]) : "r"(queue + 4 * (COUNT * at + n)) : "memory");
            }
            fetch(p);
        } else {
#pragma unroll
            for (int n = 0; n < COUNT; n++) { page[n] = walk.segment.b; }
        }
    }
};

/* Without a table a sequence is a page. */
template <int STREAMS, bool UNIFORM> struct no_queue {
    __device__ __forceinline__ no_queue(const dec_params &, const granule_walk<STREAMS, UNIFORM> &, uint32_t, int32_t) {}
    __device__ __forceinline__ void take(const dec_params &, const granule_walk<STREAMS, UNIFORM> &walk, int32_t (&page)[1]) { page[0] = walk.segment.b; }
};

struct tile_source { const CUtensorMap *map; int32_t boxes, pitch; uint64_t policy; };

/* Rows from `row` of page `page` on -> the chunks of a tile. */
static __device__ __forceinline__ void load_boxes(const tile_source &source, uint32_t tile, uint32_t bar, int32_t row, int32_t kv_head, int32_t page)
{
#pragma unroll 1
    for (int chunk = 0; chunk < source.boxes; chunk++) {
        tma_load_5d(tile + (uint32_t)(chunk * source.pitch), source.map, bar, source.policy, 64 * chunk, row, 0, kv_head, page);
    }
}
static __device__ __forceinline__ void prefetch_boxes(const tile_source &source, int32_t row, int32_t kv_head, int32_t page)
{
#pragma unroll 1
    for (int chunk = 0; chunk < source.boxes; chunk++) { tma_prefetch_5d(source.map, source.policy, 64 * chunk, row, 0, kv_head, page); }
}
