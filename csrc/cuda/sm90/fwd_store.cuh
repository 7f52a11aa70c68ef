/* fwd_store.cuh - where rows of O go, and what inf and NaN in V add to them, for fwd_consumer.cuh. */
#pragma once

/* Of a row of O a lane stores 8 bytes every 32, after a swap of pairs with its neighbour: the first element of its own. A
 * sector of memory is written at once; 16 bytes take twice the shuffles and are as fast, 4 bytes half the speed of the stores. */
static __device__ __forceinline__ int32_t first_column() { return (int32_t)(thread_index() % 2 * 8 + thread_index() % 4 / 2 * 4); }

/* Where a tile whose first row begins the tensors would go: a lane's first columns of O in its two rows; the LSE of row lane %
 * 4, NULL without one. */
struct row_places { char *o[2], *lse; };

static __device__ __forceinline__ row_places place_rows(const fwd_params &p, uint32_t thread)
{
    const fgqa_view &out = p.common.problem.view[FGQA_ARG_out], &lse = p.common.problem.view[FGQA_ARG_lse];
    row_places to = {};
    asm volatile("" : "+r"(thread));                             /* where they are not kept nobody else keeps them, either */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t local = row_in_tile(thread) + 8 * r, head = local & (1 << p.list.pack) - 1, row = local >> p.list.pack;
        to.o[r] = fgqa_row_address(out, sizeof(T), 0, head, row) + sizeof(T) * first_column();
        if (thread % 4 == r && lse.data) { to.lse = fgqa_row_address(lse, sizeof(float), 0, head, row); }
    }
    return to;
}

/* O as 16-bit elements -> global memory. Of a lane's two rows, from its first column on: address, number of columns there are.
 * Nonzero if an element is not finite. */
static __device__ __forceinline__ uint32_t store_o(char *const (&to)[2], const int32_t (&columns)[2], const float (&o)[DV / 2], const float (&factor)[2])
{
    const bool odd = thread_index() % 2;
    uint32_t poison[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < DV / 8; n += 2) {                        /* groups of 8 columns: pairs 2 n of even lanes, 2 n + 1 of odd ones */
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float *const a = o + 4 * n + 2 * r;
            const uint32_t x[2] = {pack2(a[0] * factor[r], a[1] * factor[r], T()), pack2(a[4] * factor[r], a[5] * factor[r], T())};
            const uint32_t other = __shfl_xor_sync(ALL_LANES, odd ? x[0] : x[1], 1);
#pragma unroll
            for (int i = 0; i < 2; i++) { poison[2 * r + i] = poison_test(x[i], poison[2 * r + i], T()); }
            if (8 * n < columns[r]) { *(uint2 *)(to[r] + 16 * n) = odd ? make_uint2(other, x[1]) : make_uint2(x[0], other); }
        }
    }
    return (poison[0] | poison[1] | poison[2] | poison[3]) & 0x7FFF7FFFu;
}

/* What this warp's rows see of inf and NaN in V, on top of an O without. seen: keys of the tile's rows. */
template <chain CHAIN>
static __device__ __forceinline__ void add_seen_poison(const fwd_params &p, uint32_t thread, const fgqa_range *seen, const tile &t, float (&o)[DV / 2])
{
    const uint32_t lane = thread % 32;
    const fgqa_problem &problem = p.common.problem;
    poison_rows rows;
    const fgqa_view &v = problem.view[FGQA_ARG_v];
    rows.cache = &problem.cache;
    rows.table = !SHORT && CHAIN != EVEN && problem.cache.table ? problem.cache.table + t.batch * problem.cache.table_stride : NULL;
    rows.v = fgqa_row_address(v, sizeof(T), rows.table ? 0 : t.batch, fgqa_kv_head(t.head, problem.g), 0);
    rows.v_bytes = v.stride_s * (int64_t)sizeof(T);
    rows.page_bytes = v.stride_b * (int64_t)sizeof(T);
    rows.slot0 = t.k_row;
    rows.dv = problem.dv;
    rows.begin = INT32_MAX;
    rows.end = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.seen[r] = seen[row_in_tile(thread) + 8 * r];
        if (rows.seen[r].begin < rows.seen[r].end) {
            rows.begin = min(rows.begin, rows.seen[r].begin);
            rows.end = max(rows.end, rows.seen[r].end);
        }
    }
    rows.begin = __reduce_min_sync(ALL_LANES, rows.begin);
    rows.end = __reduce_max_sync(ALL_LANES, rows.end);
    overlay_poison<T, DV>(o, rows, lane, [&](int r, int32_t j) {
        const int32_t packed = t.row0 + row_in_tile(thread) + 8 * r;
        return !WITH_TERMS<CHAIN> || terms_show(problem, t.batch, head_of(p, t.head, packed), packed >> p.list.pack, j);
    });
}
