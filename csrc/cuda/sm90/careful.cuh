/* careful.cuh - inf and NaN in V that not every row sees.
 *
 * Weights of unseen keys are exactly 0, but 0 * NaN is NaN. A tile whose O is not finite is therefore done once more, with the
 * same operations in the same order, after its non-finite elements have been taken out of V in shared memory (clean_v): rows
 * that do not see them get the bits they would have got with any finite value there. What the other rows see comes on top
 * (overlay_poison), by a walk over V in global memory with mma.sync. Rare, so nothing is spent on speed. A tile whose scores are
 * too large for the short form of the exponent is done again, too (is_enormous()).
 */
#pragma once
#include "../common/cache_slot.cuh"
#include "../common/ptx_sync.cuh"
#include "../common/ptx_tma.cuh"
#include "../sm80/gemm.cuh"

/* Non-finite elements become 0. Threads of a warpgroup, 128; a barrier among them. Other warpgroups may do the same at once:
 * all write the same values, and only where they are about to do it or have done it themselves. */
template <typename T> static __device__ __forceinline__ void clean_v(uint32_t v, int bytes, uint32_t barrier)
{
    for (uint32_t at = 4 * (thread_index() % 128); at < (uint32_t)bytes; at += 4 * 128) {
        uint32_t x, clean, code;
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(v + at) : "memory");
        split_poison(x, &clean, &code, T());
        if (code) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(v + at), "r"(clean) : "memory"); }
    }
    fence_proxy_async();
    bar_sync(barrier, 128);
}

struct poison_rows {
    const char *v;                      /* slot 0 of the head: in page 0 of a cache, else of the sequence */
    int64_t v_bytes, page_bytes;        /* from one key to the next, from one page to the next */
    const fgqa_cache *cache;
    const int32_t *table;               /* pages of the sequence; NULL: not paged */
    int32_t slot0;                      /* where key 0 is */
    fgqa_range seen[2];                 /* by this lane's two rows */
    int32_t begin, end;                 /* keys that some row of the warp sees: nothing else is read */
    int32_t dv;                         /* a multiple of 8 */

    /* NULL: on a page that does not exist, whose values are 0 */
    __device__ __forceinline__ const char *key(int32_t j) const
    {
        const int32_t slot = slot0 + j;
        if (!table) { return v + slot * v_bytes; }
        const slot_place place = place_of_slot(*cache, table, (uint32_t)slot);
        return place.page < 0 ? NULL : v + place.page * page_bytes + place.slot * v_bytes;
    }
};

/* Adds to the 16 rows of a warp the inf and NaN that they see. shows(r, j): whether row r sees key j of those of the interval
 * mask. */
template <typename T, int DV, typename Shows>
static __device__ __forceinline__ void overlay_poison(float (&o)[DV / 2], const poison_rows &rows, int lane, Shows shows)
{
    const int pair = 2 * (lane % 4);
#pragma unroll 1
    for (int32_t j0 = rows.begin; j0 < rows.end; j0 += 16) {
        const char *key[2][2];          /* B operand: this lane's keys */
        uint32_t sees[4];               /* A operand: 1 where a row sees a key */
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int32_t j = j0 + pair + 8 * (n / 2) + n % 2;
            key[n / 2][n % 2] = j < rows.end ? rows.key(j) : NULL;
        }
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int32_t j = j0 + pair + 8 * (r / 2);
            const fgqa_range seen = rows.seen[r % 2];
            float one[2];
#pragma unroll
            for (int e = 0; e < 2; e++) { one[e] = seen.begin <= j + e && j + e < seen.end && shows(r % 2, j + e) ? 1.0f : 0.0f; }
            sees[r] = pack2(one[0], one[1], T());
        }
#pragma unroll
        for (int n = 0; n < DV / 8; n++) {
            uint32_t clean, code[2] = {0, 0};
#pragma unroll
            for (int r = 0; r < 2; r++) {
                uint32_t half[2] = {0, 0};
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if (key[r][e] && 8 * n < rows.dv) { half[e] = *(const uint16_t *)(key[r][e] + 2 * (8 * n + lane / 4)); }
                }
                split_poison(half[0] | half[1] << 16, &clean, &code[r], T());
            }
            if (__any_sync(0xFFFFFFFFu, (code[0] | code[1]) != 0)) {
                float some[4] = {o[4 * n], o[4 * n + 1], o[4 * n + 2], o[4 * n + 3]}, count[4] = {};
                mma_step(count, sees, code[0], code[1], T());
                add_poison(some, count);
#pragma unroll
                for (int e = 0; e < 4; e++) { o[4 * n + e] = some[e]; }
            }
        }
    }
}
