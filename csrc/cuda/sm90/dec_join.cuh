/* dec_join.cuh - the parts of a pair joined by the blocks of a cluster, through distributed shared memory: where caches are
 * short, what records take (dec_combine.cuh: written, counted, waited for, read) is as long as their keys do. Each block has one
 * part, which may be empty, sends the sums of every block's share of the items to it, and makes the results of its own.
 *
 * Of `parts` blocks that of rank r has items r, r + parts, ...: thread t of each the t-th of them, and then every 32
 * CONSUMERS-th.
 */
#pragma once
#include "dec_combine.cuh"

static constexpr int MOST_JOINED = 16, PORTABLE_JOINED = 8;     /* blocks of a cluster: where it has room, and wherever it runs */

/* Where the ring was: of each part its sums of the block's share of ITEMS items, one part behind the other, and of all rows m
 * and l. */
template <int ITEMS> struct join_inbox {
    float o[ITEMS + MOST_JOINED][ITEM];
    float2 ml[MOST_JOINED][BLOCK_Q];
};

static __device__ __forceinline__ int own_item(const dec_params &p) { return (int)cluster_rank() + (int)thread_index() * p.parts; }

/* Of the row of an item that the block makes the result of. */
template <int ITEMS> static __device__ __forceinline__ row_end joined_end(const dec_params &p, int32_t b, const pair_rows &rows, int32_t sq, int item)
{
    return row_end_of(p, b, rows, sq, item < ITEMS ? item_row(item) : BLOCK_Q, item < ITEMS && item_column(item, 0) == 0);
}

/* A consumer's own items are item(n) of n = 0, .. COUNT - 1, whose sums are o[n]; where has_row, ml is of row `row`; end: of
 * its own_item(). Before: cluster_arrive() of all consumers, behind the last tile. */
template <int ITEMS, int COUNT, class Item> static __device__ __forceinline__ void join_parts(const dec_params &p, void *room, int32_t b, const pair_rows &rows, int32_t sq,
                                                                                              const float (&o)[COUNT][ITEM], bool has_row, int row, float2 ml, row_end end,
                                                                                              const Item &item)
{
    typedef typename std::conditional<ITEM == 4, float4, float2>::type vector;
    join_inbox<ITEMS> &inbox = *(join_inbox<ITEMS> *)room;
    const int rank = (int)cluster_rank(), share = p.by_parts(ITEMS + p.parts - 1);
    cluster_wait();                             /* the others are past their tiles */
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
        const int at = item(n), place = p.by_parts(at);
        if (at < ITEMS && item_row(at) < rows.valid) {
            store_cluster(map_to_rank(smem_address(inbox.o[rank * share + place]), (uint32_t)(at - place * p.parts)), *(const vector *)o[n]);
        }
    }
    if (has_row) {
        for (int to = 0; to < p.parts; to++) { store_cluster(map_to_rank(smem_address(&inbox.ml[rank][row]), (uint32_t)to), ml); }
    }
    cluster_arrive();
    cluster_wait();
    int place = (int)thread_index();
#pragma unroll 1
    for (int own = own_item(p); own < ITEMS; place += 32 * CONSUMERS) {
        const int local = item_row(own);
        if (local < rows.valid) {
            dec_partial sum = empty_partial();
#pragma unroll 1
            for (int first = 0; first < p.parts; first += PORTABLE_JOINED) {
                dec_partial part[PORTABLE_JOINED];
#pragma unroll
                for (int n = 0; n < PORTABLE_JOINED; n++) {
                    part[n] = empty_partial();
                    if (first + n >= p.parts) { continue; }
                    const float2 sums = inbox.ml[first + n][local];
                    *(vector *)part[n].o = *(const vector *)inbox.o[(first + n) * share + place];
                    part[n].m = sums.x;
                    part[n].l = sums.y;
                }
                merge_batch(sum, part, p.scale_log2);
            }
            store_output(p, end, own, sum);
        }
        own += 32 * CONSUMERS * p.parts;
        if (own < ITEMS) { end = joined_end<ITEMS>(p, b, rows, sq, own); }
    }
}
