/* fwd_tiles.cuh - the list of tiles a persistent forward kernel works through, and who takes which.
 *
 * A tile is BLOCK_Q query rows of one head. Item n of the list -> tile, the same on every block:
 *   padded   sections of `section` (batch, head) pairs; inside one the last row blocks of all its heads come first: under a
 *            causal mask the heaviest first, and the K and V of a section stay in L2
 *   packed   row blocks of all sequences, the last of each first, heads innermost; how many there are only the device knows
 * Blocks start with item blockIdx.x. Others are claimed from a counter, which the block that takes the last claim sets back to
 * 0: every tile is followed by one claim, so the last one is known. Without a counter a block takes one item of each round, in
 * alternating order.
 */
#pragma once
#include "../common/params.cuh"

struct tile_list {
    uint32_t row_blocks, pairs, section, items;   /* padded only; pairs = b * hq, items = row_blocks * pairs */
    int32_t hq;
};

/* In shared memory. block_end = 0: there are no more tiles */
struct tile {
    int32_t block_begin, block_end;     /* blocks of keys to walk; at least one, all masked if the rows see nothing */
    int32_t row0, valid;                /* first row; how many rows exist */
    int32_t head, batch;
    int32_t q_row, k_row;               /* row 0 of the sequence in the tensors */
    int32_t sq, sk, diag;               /* of its mask */
};

/* Which rows of which head: what the list itself says of a tile. */
struct tile_place { int32_t batch, head, row0; };

/* Where a block stands in a packed list: sequences before `base`, of 32 at a time, have `before` row blocks. */
struct packed_cursor { int32_t base; uint32_t before; };

/* Row block `item` / hq of a packed list; whole warp. False: past the end, and *items is how many items there are. */
template <int BLOCK_Q>
static __device__ bool find_packed(const fgqa_problem &p, uint32_t item, packed_cursor *at, tile_place *place, uint32_t *items)
{
    const uint32_t wanted = item / (uint32_t)p.hq;
    const int lane = thread_index() % 32;
    for (; at->base < p.b; at->base += 32) {
        int64_t begin;
        const int32_t b = at->base + lane;
        const uint32_t blocks = b < p.b ? ((uint32_t)fgqa_device_length(p.cu_seqlens_q, b, p.total_q, &begin) + BLOCK_Q - 1) / BLOCK_Q : 0;
        uint32_t until = blocks;        /* inclusive sum */
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const uint32_t x = __shfl_up_sync(0xFFFFFFFFu, until, step);
            if (lane >= step) { until += x; }
        }
        const uint32_t found = __ballot_sync(0xFFFFFFFFu, at->before + until > wanted);
        if (found) {
            const int from = __ffs(found) - 1;
            place->batch = at->base + from;
            place->head = (int32_t)(item % (uint32_t)p.hq);
            place->row0 = (int32_t)(at->before + __shfl_sync(0xFFFFFFFFu, until, from) - 1 - wanted) * BLOCK_Q;
            return true;
        }
        at->before += __shfl_sync(0xFFFFFFFFu, until, 31);
    }
    *items = at->before * (uint32_t)p.hq;
    return false;
}

template <int BLOCK_Q> static __device__ __forceinline__ void find_padded(const tile_list &list, uint32_t item, tile_place *place)
{
    const uint32_t section = item / (list.section * list.row_blocks);
    const uint32_t rest = item - section * list.section * list.row_blocks;
    const uint32_t width = min(list.section, list.pairs - section * list.section);
    const uint32_t pair = section * list.section + rest % width;
    place->row0 = (int32_t)(list.row_blocks - 1 - rest / width) * BLOCK_Q;
    place->head = (int32_t)(pair % (uint32_t)list.hq);
    place->batch = (int32_t)(pair / (uint32_t)list.hq);
}

template <int BLOCK_Q, int BLOCK_K> static __device__ __forceinline__ void describe_tile(const fgqa_problem &p, const tile_place &place, tile *t)
{
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(p, place.batch, &rows);
    const fgqa_mask &mask = sequence.mask;
    fgqa_range keys = {0, 0};
    t->row0 = place.row0;
    t->head = place.head;
    t->batch = place.batch;
    t->q_row = (int32_t)sequence.q_row;
    t->k_row = (int32_t)sequence.k_row;
    t->sq = mask.sq;
    t->sk = mask.sk;
    t->diag = mask.diag;
    t->valid = min(BLOCK_Q, rows - place.row0);
    if (place.row0 < mask.sq) { keys = fgqa_kv_range(&mask, place.row0, min(place.row0 + BLOCK_Q, mask.sq)); }
    const int32_t first = keys.begin / BLOCK_K;
    t->block_begin = first;
    t->block_end = max(first + 1, (keys.end + BLOCK_K - 1) / BLOCK_K);
}

/* The tiles of one block, in turn. Whole warp. */
template <int BLOCK_Q> struct tile_walk {
    uint32_t item, round;
    packed_cursor at;

    __device__ __forceinline__ tile_walk() : item(blockIdx.x), round(0) { at.base = 0; at.before = 0; }

    /* False: there are no more tiles. */
    __device__ bool current(const fgqa_problem &p, const tile_list &list, uint32_t *counter, tile_place *place)
    {
        uint32_t items = list.items;
        bool some;
        if (p.varlen) {
            some = find_packed<BLOCK_Q>(p, item, &at, place, &items);
        } else {
            some = item < items;
            if (some) { find_padded<BLOCK_Q>(list, item, place); }
        }
        if (!some && counter && round > 0 && item == items + gridDim.x - 1) { *counter = 0; }      /* the last claim of the launch */
        return some;
    }

    __device__ void advance(uint32_t *counter)
    {
        round++;
        if (counter) {
            uint32_t claim = 0;
            if (thread_index() % 32 == 0) { claim = atomicAdd(counter, 1); }
            item = gridDim.x + __shfl_sync(0xFFFFFFFFu, claim, 0);
        } else {
            item = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        }
    }
};
