/* fwd_term_tiles.cuh - a bias and a mask tensor that TMA can address (fwd_terms.cuh): they come through shared memory.
 *
 * In chunks: 128 bytes of each row of a warpgroup, swizzled as K is. A warpgroup has a ring of its own, which the producer fills
 * a block ahead. Of a block's chunks the mask is the first, which becomes bits under Q K^T; those of the bias follow.
 */
#pragma once
#include "../common/ptx_ldmatrix.cuh"
#include "../common/ptx_sync.cuh"
#include "../common/ptx_tma.cuh"
#include "../tensor_map.h"
#include "fwd_terms.cuh"
#include "fwd_tiles.cuh"

static constexpr int TERM_CHUNK = WG_ROWS * 128, TERM_SLOTS = FGQA_D == 64 ? 3 : 2;      /* of a warpgroup: what finds room */
static constexpr int TERM_BARRIERS = 2 * TERM_SLOTS;

/* A tensor of a number for each row and key, for all rows. What is shared by heads, rows or sequences is brought once: its
 * extent is 1 and its coordinate 0. */
struct term_source {
    CUtensorMap map;                    /* dims (key, head, row, batch) */
    int32_t some;                       /* there is one */
    int32_t bytes;                      /* of an element */
    int32_t box_bytes;
    int32_t by_head, by_row, by_batch;  /* all bits, or none where they share */
    int32_t shift, keep;                /* row r of a warpgroup is row r >> shift & keep of its chunk */
};

struct term_tiles {
    term_source bias, mask;
    int32_t chunks;                     /* of a block */
    int32_t batch_first;                /* order of tiles: fwd_tiles.cuh */
};

static inline int describe_term(term_source *x, const fgqa_problem *p, fgqa_arg arg, int32_t pack)
{
    const fgqa_view &view = p->view[arg];
    const int32_t bytes = arg == FGQA_ARG_mask ? 1 : view.dtype == FGQA_F32 ? 4 : 2;
    const fgqa_map_box box = {128 / bytes, view.stride_h ? 1 << pack : 1, view.stride_s ? WG_ROWS >> pack : 1};
    x->some = view.data != NULL;
    x->bytes = bytes;
    x->box_bytes = 128 * box.heads * box.rows;
    x->by_head = view.stride_h ? -1 : 0;
    x->by_row = view.stride_s ? -1 : 0;
    x->by_batch = view.stride_b ? -1 : 0;
    x->shift = x->by_head ? 0 : pack;
    x->keep = box.heads * box.rows - 1;
    return x->some ? fgqa_term_map(&x->map, p, arg, box) : cudaSuccess;
}

/* TMA can address what there is of them. */
static inline int term_tiles_fit(const fgqa_problem *p)
{
    int fit = 1;
    for (fgqa_arg arg : {FGQA_ARG_bias, FGQA_ARG_mask}) { fit &= !p->view[arg].data || !fgqa_term_map_refuse(p, arg); }
    return fit;
}

static inline int term_tiles_make(term_tiles *terms, const fgqa_problem *p, int32_t pack)
{
    const fgqa_view &bias = p->view[FGQA_ARG_bias];
    int error = describe_term(&terms->bias, p, FGQA_ARG_bias, pack);
    if (error == cudaSuccess) { error = describe_term(&terms->mask, p, FGQA_ARG_mask, pack); }
    terms->chunks = terms->mask.some + (terms->bias.some ? terms->bias.bytes * FGQA_BLOCK_K / 128 : 0);
    terms->batch_first = bias.data && bias.stride_b == 0 && p->b > 1;      /* what sequences share comes from memory once */
    return error;
}

#if defined(__CUDACC__)

/* Volatile: they stay in front of what takes their slot. */
PTX_FN float2 load_pair(uint32_t at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
PTX_FN uint4 load_vector(uint32_t at)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
    return x;
}

/* A warp's first row in its warpgroup. */
static __device__ __forceinline__ uint32_t first_of_warp() { return thread_index() / 32 % 4 * 16; }

/* Where a warpgroup's chunks are, and which comes next. */
struct term_ring {
    uint32_t area, full;                /* shared addresses of the slots, and of their barriers: full, then empty */
    uint32_t stage, parity;
    __device__ __forceinline__ uint32_t slot() const { return area + stage * TERM_CHUNK; }
    __device__ __forceinline__ uint32_t is_full() const { return full + stage * 8; }
    __device__ __forceinline__ uint32_t is_empty() const { return is_full() + TERM_SLOTS * 8; }
    __device__ __forceinline__ void advance()
    {
        if (++stage == TERM_SLOTS) { stage = 0; parity ^= 1; }
    }
};

/* A warpgroup's ring, of which `chunks` are done. area, barriers: those of warpgroup 0. */
static __device__ __forceinline__ term_ring ring_of(uint32_t area, uint32_t barriers, int wg, uint32_t chunks)
{
    return {area + wg * TERM_SLOTS * TERM_CHUNK, barriers + wg * TERM_BARRIERS * 8, chunks % TERM_SLOTS, chunks / TERM_SLOTS % 2};
}

/* The producer's: chunks [begin, end) of block j, which are the next of `ring`, to a warpgroup whose first packed row is
 * `packed`. */
template <int BLOCK_K>
static __device__ __forceinline__ void load_chunks(const term_tiles &terms, const tile &t, int32_t pack, int32_t packed, term_ring ring, int32_t begin,
                                                   int32_t end, int32_t j)
{
#pragma unroll 1
    for (int32_t n = begin; n < end; n++, ring.advance()) {
        const bool of_mask = n < terms.mask.some;
        const term_source &from = of_mask ? terms.mask : terms.bias;
        const int32_t key = j * BLOCK_K + (of_mask ? 0 : (n - terms.mask.some) * (128 / terms.bias.bytes));
        const int32_t head = t.head + (packed & (1 << pack) - 1) & from.by_head, row = packed >> pack & from.by_row, batch = t.batch & from.by_batch;
        mbarrier_wait(ring.is_empty(), ring.parity ^ 1);
        if (elect_one()) {
            mbarrier_arrive_expect_tx(ring.is_full(), (uint32_t)from.box_bytes);
            tma_load_4d(ring.slot(), &from.map, ring.is_full(), createpolicy_evict_normal(), key, head, row, batch);
            if (j > t.block_begin) { tma_prefetch_4d(&from.map, key - BLOCK_K, head, row, batch); }
        }
    }
}

/* Of block j's chunks the first that there are slots for, or the rest, which find them when consumers are at the block: the
 * next K is on its way by then. Warpgroups are served as they come. chunks: that each has had so far. */
template <int BLOCK_K, int WARPGROUPS>
static __device__ __forceinline__ void load_block(const term_tiles &terms, const tile &t, int32_t pack, const term_ring &of_first, uint32_t &chunks, int32_t j,
                                                  bool rest)
{
    const int32_t count = terms.chunks, first = rest ? TERM_SLOTS : 0, last = rest ? count : min(count, TERM_SLOTS);
    if (first >= last) { return; }
#pragma unroll 1
    for (uint32_t left = (1 << WARPGROUPS) - 1; left != 0;) {
#pragma unroll 1
        for (int wg = 0; wg < WARPGROUPS; wg++) {
            const term_ring ring = ring_of(of_first.area, of_first.full, wg, chunks);
            if (!(left >> wg & 1) || !__all_sync(0xFFFFFFFFu, mbarrier_test(ring.is_empty(), ring.parity ^ 1))) { continue; }
            load_chunks<BLOCK_K>(terms, t, pack, t.row0 + wg * WG_ROWS, ring, first, last, j);
            left ^= 1 << wg;
        }
    }
    chunks += last - first;
}

template <bool CAREFUL> static __device__ __forceinline__ void add_pair(float *s, float2 bias, float scale)
{
    s[0] = with_bias<CAREFUL>(s[0], scale, bias.x);
    s[1] = with_bias<CAREFUL>(s[1], scale, bias.y);
}

/* 64 keys of 16-bit elements: a matrix of ldmatrix is what lanes have of 8 columns. */
template <bool CAREFUL, typename T, int N>
static __device__ __forceinline__ void add_chunk(float (&s)[N], const term_source &bias, uint32_t slot, float scale, int n0)
{
    const uint32_t lane = thread_index() % 32, row = first_of_warp() + lane % 16 >> bias.shift & bias.keep;
    const uint32_t at = slot + row * 128 + (lane / 16 * 16 ^ row % 8 * 16);
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        uint32_t x[4];
        ldmatrix_x4(x, at ^ 16 * n);
#pragma unroll
        for (int i = 0; i < 4; i++) { add_pair<CAREFUL>(s + 4 * (n0 + n) + 2 * i, unpack2(x[i], T()), scale); }
    }
}

/* 32 keys of float32 */
template <bool CAREFUL, int N>
static __device__ __forceinline__ void add_wide_chunk(float (&s)[N], const term_source &bias, uint32_t slot, float scale, int n0)
{
    const uint32_t lane = thread_index() % 32, first = first_of_warp();
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t row = first + lane / 4 + 8 * r >> bias.shift & bias.keep, at = slot + row * 128 + (lane % 4 * 8 ^ row % 8 * 16);
#pragma unroll
        for (int n = 0; n < 4; n++) { add_pair<CAREFUL>(s + 4 * (n0 + n) + 2 * r, load_pair(at ^ 32 * n), scale); }
    }
}

/* block_terms.seen, from a mask's chunk, of whose 128 keys the first BLOCK_K are the block's. */
template <int BLOCK_K> static __device__ __forceinline__ void read_mask(uint32_t (&seen)[2], const term_source &mask, uint32_t slot)
{
    const uint32_t lane = thread_index() % 32, first = first_of_warp(), quarter = lane % 4;
    constexpr uint32_t OWN = BLOCK_K / 4, VECTORS = OWN / 16;    /* columns that a lane reads for all four of its row */
    uint4 x[2][VECTORS];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const uint32_t row = first + lane / 4 + 8 * r >> mask.shift & mask.keep, at = slot + row * 128 + (quarter * OWN ^ row % 8 * 16);
#pragma unroll
        for (int n = 0; n < (int)VECTORS; n++) { x[r][n] = load_vector(at ^ 16 * n); }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) { seen[r] = bits_of_columns(x[r], (int32_t)quarter); }
}

#endif
