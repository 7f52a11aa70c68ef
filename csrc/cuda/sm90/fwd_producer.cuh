/* fwd_producer.cuh - the producer of fwd.cu, a warp: copies of K and V, each lane knows where box_rows rows of a block are;
 * with BY_TMA of a bias and a mask, too. */
#pragma once

/* No pages: one copy brings a block's columns. */
template <chain CHAIN> static constexpr bool ONE_COPY = SHORT || CHAIN == EVEN;

/* Where a lane's rows are: row of a sequence or page. Rows that do not exist arrive as zeros. */
struct kv_source { int32_t row, page; };

template <chain CHAIN> static __device__ __forceinline__ kv_source find_rows(const fwd_params &p, const tile &t, int j, int lane)
{
    const fgqa_cache &cache = p.common.problem.cache;
    const int32_t slot = t.k_row + j * BLOCK_K + (ONE_COPY<CHAIN> ? 0 : lane * p.box_rows);
    kv_source at = {slot, CHAIN != EVEN && p.common.problem.varlen ? 0 : t.batch};
    if (!ONE_COPY<CHAIN> && cache.table && lane * p.box_rows < BLOCK_K) {
        const int32_t within = min(slot, cache.capacity - 1);
        const slot_place place = place_of_slot(cache, cache.table + t.batch * cache.table_stride, (uint32_t)within);
        at.page = (int32_t)place.page;
        at.row = (int32_t)place.slot + slot - within;
    }
    return at;
}

/* FOR_BOTH: half of it here, for two blocks that load the same (fwd_pair.cuh). */
template <chain CHAIN, bool FOR_BOTH, int CHUNKS>
static __device__ __forceinline__ void load_kv(const fwd_params &p, const CUtensorMap *map, T (&dst)[CHUNKS][BLOCK_K * CHUNK], uint64_t *full, uint64_t *empty,
                                               uint32_t parity, uint64_t policy, const kv_source &from, int kv_head)
{
    const uint32_t bar = smem_address(full);
    auto box_rows = [&] { return ONE_COPY<CHAIN> ? BLOCK_K : p.box_rows; };
    mbarrier_wait(smem_address(empty), parity ^ 1);
    if (elect_one()) { mbarrier_arrive_expect_tx(bar, sizeof(dst)); }
#pragma unroll 4
    for (int n = 0; n * box_rows() < BLOCK_K; n++) {
        const int32_t row = ONE_COPY<CHAIN> ? from.row : __shfl_sync(ALL_LANES, from.row, n);
        const int32_t page = ONE_COPY<CHAIN> ? from.page : __shfl_sync(ALL_LANES, from.page, n);
        if (elect_one()) {
            for (int c = FOR_BOTH ? (int)cluster_rank() : 0; c < CHUNKS; c += FOR_BOTH ? 2 : 1) {
                const uint32_t to = smem_address(dst[c] + n * box_rows() * CHUNK);
                if (FOR_BOTH) {
                    tma_load_4d_for_both(to, map, bar, policy, c * CHUNK, kv_head, row, page);
                } else {
                    tma_load_4d(to, map, bar, policy, c * CHUNK, kv_head, row, page);
                }
            }
        }
    }
}

static __device__ __forceinline__ term_ring find_chunks(const shared &sm, int wg)
{
    return ring_of(TERMS_IN_V ? smem_address(sm.v[V_STAGES - 1]) : smem_address(&sm) + TERMS_AT, smem_address(&sm) + TERMS_BEGIN, wg, 0);
}

/* The copy before the next one of a ring is there. */
template <int N> static __device__ __forceinline__ void await_landed(const uint64_t (&full)[N], const ring<N> &r)
{
    mbarrier_wait(smem_address(&full[r.stage > 0 ? r.stage - 1 : N - 1]), r.stage > 0 ? r.parity : r.parity ^ 1);
}

/* begun: so many copies have been asked for, by fwd_begin.cuh or, with EVEN, by the scheduler. MERGED: of K and of V one at a
 * time is under way; for more the instructions of everybody else would wait, and the memory is as busy. */
template <bool AGAIN, chain CHAIN>
static __device__ __forceinline__ void produce(const fwd_params &p, shared &sm, ring<T_STAGES> &rt, ring<STAGES> &rk, ring<V_RING<CHAIN>> &rv, uint32_t &chunks,
                                               int begun = 0)
{
    /* MERGED: one tile reads these keys, and instructions had better stay in L2 */
    const uint64_t keep = CHAIN == MERGED ? createpolicy_evict_first() : createpolicy_evict_last();
    const int lane = thread_index() % 32;
    for (bool more = true; more; rt.advance()) {
        mbarrier_wait(smem_address(&sm.tile_full[rt.stage]), rt.parity);
        const tile &t = sm.tiles[rt.stage];
        const int begin = t.block_begin, end = t.block_end;
        more = end != 0;
        if (!more) { continue; }
        const int kv_head = fgqa_kv_head(t.head, p.common.problem.g);
        auto load_k = [&](const kv_source &from) {
            if ((CHAIN != MERGED && CHAIN != EVEN) || begun-- <= 0) {
                if (CHAIN == MERGED) { await_landed(sm.k_full, rk); }
                load_kv<CHAIN, CHAIN == PAIRED && !AGAIN>(p, &p.k_map, sm.k[rk.stage], &sm.k_full[rk.stage], &sm.k_empty[rk.stage], rk.parity, keep, from, kv_head);
            }
            rk.advance();
        };
        auto load_v = [&](const kv_source &from) {
            if (CHAIN != MERGED || begun-- <= 0) {
                if constexpr (CHAIN == MERGED) { await_landed(sm.v_full, rv); }
                load_kv<CHAIN, CHAIN == PAIRED && !AGAIN>(p, &p.v_map, sm.v[rv.stage], &sm.v_full[rv.stage], &sm.v_empty[rv.stage], rv.parity, keep, from, kv_head);
            }
            rv.advance();
        };
        auto load_terms = [&](int j, bool rest) {
            if constexpr (BY_TMA<CHAIN>) { load_block<BLOCK_K, WG_COUNT>(p.term_boxes, t, p.list.pack, find_chunks(sm, 0), chunks, j, rest); }
        };
        kv_source of_v = find_rows<CHAIN>(p, t, end - 1, lane), of_k = find_rows<CHAIN>(p, t, max(end - 2, begin), lane);
        load_k(of_v);
        load_terms(end - 1, false);
#pragma unroll 1
        for (int j = end - 2; j >= begin; j--) {                 /* the order in which consumers use them */
            const kv_source next = find_rows<CHAIN>(p, t, max(j - 1, begin), lane);      /* a page number takes long to come */
            load_k(of_k);
            load_terms(j + 1, true);
            load_v(of_v);
            load_terms(j, false);
            of_v = of_k;
            of_k = next;
        }
        /* before V, which may wait for the P V of the tile before, and that for these, if blocks are skipped between them */
        load_terms(begin, true);
        load_v(of_v);
    }
}
