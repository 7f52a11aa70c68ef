/* fwd_tiles.cuh - the list of tiles a persistent forward kernel works through, and who takes which.
 *
 * A tile is BLOCK_Q packed rows of one unit, 2^pack query heads of a group (fwd_pack.h); packed row r is row r >> pack of head
 * r % 2^pack. With splits > 1 its keys are shared out to so many items of the list, which are next to each other. Item
 * n / splits of the list -> tile, the same on every block:
 *   padded   sections of `section` (batch, unit) pairs; inside one the last row blocks of all its units come first: under a
 *            causal mask the heaviest first, and the K and V of a section stay in L2. Pairs of a sequence are next to each other,
 *            or, where sequences share a bias, those of a unit
 *   packed   row blocks of all sequences, the last of each first, units innermost; how many there are only the device knows
 * Blocks start with item blockIdx.x. Others are claimed from a counter, which the block that takes the last claim sets back to
 * 0: every tile is followed by one claim, so the last one is known. Without a counter a block takes one item of each round, in
 * alternating order.
 */
#pragma once
#include "../common/params.cuh"
#include "../common/split.cuh"
#include "fwd_pack.h"
#include "warpgroup.cuh"

struct tile_list {
    uint32_t row_blocks, pairs, section, items;   /* padded only; pairs = b * units, items = row_blocks * pairs * splits */
    uint32_t last;                                /* padded only: the last section, which holds all pairs that are left */
    uint32_t units, splits;                       /* units of a sequence; parts of a tile's keys */
    int32_t pack;
    fgqa_sequence every;                          /* EVEN: what each sequence is */
};

/* In shared memory. block_end = 0: there are no more tiles; valid is 0 then, nothing else is written,
 * but where a tile that saw nothing was (chain MERGED). */
struct tile {
    int32_t block_begin, block_end;     /* blocks of keys to walk; none if the rows see nothing of this part of the keys */
    int32_t row0, valid;                /* first packed row; how many rows exist */
    int32_t head, batch;                /* first head of the unit */
    int32_t part;                       /* of the keys */
    int32_t q_row, k_row;               /* row 0 of the sequence in the tensors; of a cache, the slot of key 0 */
    int32_t sq, sk, diag;               /* of its mask */
    int64_t out, lse;                   /* of its first row, in bytes from the tensors' beginning */
};

/* Parts of a tile's keys; 1 where the row of kernels.def, or its kernel, never shares them out. */
template <int BLOCK_Q, bool EVEN> static __device__ __forceinline__ uint32_t parts_of(const tile_list &list)
{
    return FGQA_IS_SHORT(BLOCK_Q) || EVEN ? 1 : list.splits;
}

/* Where the host knows all of a block's only tile (fwd_begin.cuh): blocks of keys, which parts share as split_range() says;
 * lengths. */
struct known_keys {
    int32_t first, share, longer;       /* share 0: it does not */
    int32_t sk, diag;
    __device__ __forceinline__ fgqa_range of_part(int32_t part) const
    {
        const int32_t begin = first + part * share + min(part, longer);
        const fgqa_range r = {begin, begin + share + (part < longer)};
        return r;
    }
};

/* Where all keys of a sequence are in shared memory at once (fwd_whole.cuh): its mask; units of a KV head. */
struct whole_call { int32_t sk, diag, masked, units; };

/* Which rows of which unit: what the list itself says of a tile. */
struct tile_place { int32_t batch, head, row0, part; };

/* How many rows the first tile of a unit has less than others: in tiles of three warpgroups those of warpgroups that find no
 * rows, which would walk all keys under a causal mask if the last tile lacked them. Whole warpgroups, so that diagonals stay
 * where blocks end. */
template <int BLOCK_Q> static __device__ __forceinline__ uint32_t less_at_first(uint32_t rows, uint32_t blocks)
{
    return BLOCK_Q > 2 * WG_ROWS ? (blocks * BLOCK_Q - rows) / WG_ROWS * WG_ROWS : 0;
}

template <int BLOCK_Q> static __device__ __forceinline__ int32_t first_row_of(uint32_t n, uint32_t rows, uint32_t blocks)
{
    return max((int32_t)(n * BLOCK_Q - less_at_first<BLOCK_Q>(rows, blocks)), 0);
}

/* Where a block stands in a packed list: sequences before `base`, of 32 at a time, have `before` row blocks. */
struct packed_cursor { int32_t base; uint32_t before; };

/* Row block `tile` / units of a packed list; whole warp. False: past the end, and *tiles is how many there are. */
template <int BLOCK_Q>
static __device__ bool find_packed(const fgqa_problem &p, const tile_list &list, uint32_t tile, packed_cursor *at, tile_place *place, uint32_t *tiles)
{
    const uint32_t wanted = tile / list.units;
    const int lane = thread_index() % 32;
    for (; at->base < p.b; at->base += 32) {
        int64_t begin;
        const int32_t b = at->base + lane;
        const uint32_t rows = b < p.b ? (uint32_t)fgqa_device_length(p.cu_seqlens_q, b, p.total_q, &begin) << list.pack : 0;
        const uint32_t blocks = (rows + BLOCK_Q - 1) / BLOCK_Q;
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
            place->head = (int32_t)(tile % list.units) << list.pack;
            const uint32_t n = at->before + __shfl_sync(0xFFFFFFFFu, until, from) - 1 - wanted;
            place->row0 = first_row_of<BLOCK_Q>(n, __shfl_sync(0xFFFFFFFFu, rows, from), __shfl_sync(0xFFFFFFFFu, blocks, from));
            return true;
        }
        at->before += __shfl_sync(0xFFFFFFFFu, until, 31);
    }
    *tiles = at->before * list.units;
    return false;
}

template <int BLOCK_Q>
static __device__ __forceinline__ void find_padded(const fgqa_problem &p, const tile_list &list, uint32_t tile, bool batch_first, tile_place *place)
{
    const uint32_t section = min(tile / (list.section * list.row_blocks), list.last);
    const uint32_t rest = tile - section * list.section * list.row_blocks;
    const uint32_t width = section == list.last ? list.pairs - section * list.section : list.section;
    const uint32_t pair = section * list.section + rest % width;
    place->row0 = first_row_of<BLOCK_Q>(list.row_blocks - 1 - rest / width, (uint32_t)p.sq << list.pack, list.row_blocks);
    if (batch_first) {
        place->head = (int32_t)(pair / (uint32_t)p.b) << list.pack;
        place->batch = (int32_t)(pair % (uint32_t)p.b);
        return;
    }
    place->head = (int32_t)(pair % list.units) << list.pack;
    place->batch = (int32_t)(pair / list.units);
}

/* EVEN: sequences are padded, of lengths that the host knows, their keys neither in parts nor in a cache. */
template <int BLOCK_Q, int BLOCK_K, bool EVEN>
static __device__ __forceinline__ void describe_tile(const fgqa_problem &p, const tile_list &list, const tile_place &place, tile *t)
{
    int32_t rows = p.sq;
    const fgqa_sequence sequence = EVEN ? list.every : fgqa_device_sequence(p, place.batch, &rows);
    const fgqa_mask &mask = sequence.mask;
    fgqa_range keys = {0, 0};
    t->row0 = place.row0;
    t->head = place.head;
    t->batch = place.batch;
    t->part = place.part;
    t->q_row = (int32_t)sequence.q_row;
    t->k_row = (int32_t)sequence.k_row;
    t->sq = mask.sq;
    t->sk = mask.sk;
    t->diag = mask.diag;
    const int32_t all = rows << list.pack, first = place.row0 > 0 ? 0 : (int32_t)less_at_first<BLOCK_Q>(all, (all + BLOCK_Q - 1) / BLOCK_Q);
    t->valid = min(BLOCK_Q - first, all - place.row0);
    const int32_t i0 = place.row0 >> list.pack, i1 = min(place.row0 + t->valid >> list.pack, mask.sq);
    if (i0 < mask.sq) { keys = fgqa_kv_range(&mask, i0, i1); }
    fgqa_range blocks = {keys.begin / BLOCK_K, (keys.end + BLOCK_K - 1) / BLOCK_K};
    if (keys.begin == keys.end) { blocks.end = blocks.begin; }
    if (parts_of<BLOCK_Q, EVEN>(list) > 1) { blocks = split_range(blocks, (uint32_t)place.part, list.splits); }
    t->block_begin = blocks.begin;
    t->block_end = blocks.end;
}

/* The tiles of one block, in turn. Whole warp. */
template <int BLOCK_Q, bool EVEN> struct tile_walk {
    uint32_t item, round;
    packed_cursor at;

    __device__ __forceinline__ explicit tile_walk(uint32_t first) : item(first), round(0) { at.base = 0; at.before = 0; }

    /* False: there are no more tiles. */
    __device__ bool current(const fgqa_problem &p, const tile_list &list, uint32_t *counter, bool paired, bool batch_first, tile_place *place)
    {
        uint32_t items = list.items;
        const uint32_t tile = item / parts_of<BLOCK_Q, EVEN>(list);
        bool some;
        place->part = (int32_t)(item - tile * parts_of<BLOCK_Q, EVEN>(list));
        if (!EVEN && p.varlen) {
            some = find_packed<BLOCK_Q>(p, list, tile, &at, place, &items);
            items *= parts_of<BLOCK_Q, EVEN>(list);
        } else {
            some = item < items;
            if (some) { find_padded<BLOCK_Q>(p, list, tile, batch_first, place); }
        }
        /* the last claim of the launch */
        if (!some && counter && round > 0 && item == items + gridDim.x - (paired ? 2 : 1)) { *counter = 0; }
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
