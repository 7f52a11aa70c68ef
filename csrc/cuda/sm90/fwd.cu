/* fwd.cu - attention forward for Hopper: TMA, wgmma, warp-specialised, persistent. Compiled once per fwd row of kernels.def
 * whose arch is 90.
 *
 *     S = Q K^T,  P = softmax of scale S, or of its soft cap, under the interval mask of semantics.h,  O = P V,  LSE
 *
 * A block owns one tile at a time, BLOCK_Q query rows of one head, or of a few that share a KV head (fwd_tiles.cuh), and walks
 * the keys that those rows see, or a part of them (any/fwd_split.h), in blocks of BLOCK_K, last block first. Keys and values may
 * lie in a KV cache, contiguous or in pages. Of a copy of a float8 cache, scales of heads go to the softmax's scale and to O / l.
 * Short rows have kernels without roles, too, for few keys (fwd_whole.cuh).
 *
 *   warpgroup 0, warp 0   scheduler: takes tiles, TMA loads of Q (EVEN: first K, too); tiles that see nothing are done there
 *                warp 1   producer:  TMA loads of K, V; of pages, a lane knows where one lies
 *                warp 2   collector: lists the tiles that have to be done again, frees their places
 *                warp 3   masker:    which keys each row of a tile sees
 *   warpgroups 1, ..      consumers: 64 rows each; O, S, P in registers, from which O is stored
 *
 * Shared memory: rings of Q, K and V; 128-byte-swizzled TMA layout, cut in chunks of 64 columns:
 * q[stage][warpgroup][chunk][64 rows][64], k and v[stage][chunk][BLOCK_K rows][64].
 *
 * mbarrier        arrivals (count)                             waited for by             meaning
 * tile_full[t]    scheduler (1)                                producer, masker          tiles[t] is there
 * q_full[s][part] scheduler + Q bytes, masker (2)              consumers                 Q, tiles[t], rows, blocks are there
 * q_empty[s][..]  each consumer warp                           scheduler, masker         all products with Q are done
 * o_full[t]       each consumer warp                           collector                 O is stored, or no tile
 * tile_empty[t]   collector (1)                                scheduler                 the place is free
 * k_full, v_full  producer, or scheduler, + bytes (1)          consumers                 block is there
 * k_empty, ..     one thread of each consumer warpgroup        producer                  block was used by all
 * named TURN + n  warpgroup n - 1 arrives, n syncs (256)       consumers                 Q K^T of the one before is done
 * Q's buffer is free before O of its tile is there, so there are two places t more than Q buffers s: tile n is announced when O
 * of tile n - T_STAGES, in whose place it comes, is stored, but before the Q buffer it needs is free. So its keys, its masks and
 * what a claim costs are not waited for.
 */
#include "../common/cache_slot.cuh"
#include "../common/launch.cuh"
#include "../common/params.cuh"
#include "../common/ptx_cluster.cuh"
#include "../common/ptx_tma.cuh"
#include "../common/softcap.cuh"
#include "../common/softmax.cuh"
#include "../common/split.cuh"
#include "../any/dec_counters.h"
#include "../any/fwd_combine.h"
#include "../any/score_units.h"
#include "../kernel_table.h"
#include "../stream_slot.h"
#include "../tensor_map.h"
#include "dec_work.h"
#include "early.cuh"
#include "fwd_pack.h"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)
#define FGQA_DROPOUT (FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_dropout)
#define FGQA_MERGES (FGQA_HAS_MERGE(FGQA_D, FGQA_BLOCK_Q) && !FGQA_DROPOUT)
#define FGQA_PAIRS (FGQA_HAS_PAIRS(FGQA_D) && !FGQA_DROPOUT)
#define FGQA_EVEN FGQA_HAS_EVEN(FGQA_D, FGQA_BLOCK_Q)

#ifndef FGQA_NO_CODE

#include "../sm80/cache_tile.cuh"
#include "careful.cuh"
#include "fwd_dropout.cuh"
#include "fwd_score.cuh"
#include "fwd_term_tiles.cuh"
#include "fwd_terms.cuh"
#include "fwd_tiles.cuh"
#include "warpgroup.cuh"
#include <type_traits>

typedef FGQA_DTYPE T;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, BLOCK_K = FGQA_BLOCK_K, STAGES = FGQA_STAGES;
static constexpr int WG_COUNT = BLOCK_Q / WG_ROWS, THREADS = 32 * FGQA_WARPS;
static constexpr int K_CHUNKS = (D + CHUNK - 1) / CHUNK, V_CHUNKS = (DV + CHUNK - 1) / CHUNK, Q_CHUNKS = K_CHUNKS > V_CHUNKS ? K_CHUNKS : V_CHUNKS;
static_assert(WG_COUNT * WG_ROWS == BLOCK_Q && THREADS == 128 * (1 + WG_COUNT), "kernels.def: 64 rows a consumer warpgroup, four warps more");
static_assert(D % 16 == 0 && DV % 16 == 0 && BLOCK_K % 16 == 0, "kernels.def: the tensor core takes steps of 16");

/* What is left of an SM's memory goes to a second Q buffer first, which lets tiles overlap, then to a third V buffer. */
static constexpr bool SHORT = FGQA_IS_SHORT(BLOCK_Q);            /* no caches, no parts of keys */
static constexpr int BLOCKS = !SHORT ? 1 : DV > 64 ? 2 : 3;      /* that an SM holds at once */
static constexpr int SM_BYTES = 228 * 1024 / BLOCKS - 1024, SMALL_BYTES = 768 + 2 * BLOCK_Q * 8, Q_BYTES = WG_COUNT * Q_CHUNKS * WG_ROWS * CHUNK * 2;
static constexpr int K_BYTES = K_CHUNKS * BLOCK_K * CHUNK * 2, V_BYTES = V_CHUNKS * BLOCK_K * CHUNK * 2;
static constexpr int LEAST = Q_BYTES + STAGES * (K_BYTES + V_BYTES) + SMALL_BYTES;
static constexpr int Q_STAGES = LEAST + Q_BYTES <= SM_BYTES ? 2 : 1;
static constexpr int V_STAGES = LEAST + (Q_STAGES - 1) * Q_BYTES + V_BYTES <= SM_BYTES ? STAGES + 1 : STAGES;

static constexpr int T_STAGES = Q_STAGES + 2;                    /* of tiles[] */
static constexpr int LEFT = SM_BYTES - LEAST - (Q_STAGES - 1) * Q_BYTES - (V_STAGES - STAGES) * V_BYTES;
static constexpr int R_STAGES = (T_STAGES - 2) * BLOCK_Q * 8 <= LEFT ? T_STAGES : Q_STAGES;      /* of rows[] */
static constexpr bool CROSS_TILE = Q_STAGES == 2;                /* first Q K^T of the next tile runs before the last P V of this one */
/* Where there is one Q, each warpgroup's part comes as soon as the one before is handed back: who is ahead does not wait for
 * others. */
static constexpr int Q_PARTS = Q_STAGES == 1 ? WG_COUNT : 1, PART_WGS = WG_COUNT / Q_PARTS;
static constexpr bool TAKE_TURNS = WG_COUNT > 2;                 /* at products: three warpgroups get into each other's way, two do not */
/* of a thread: the 64 K registers of an SM, shared out when it starts, move to the consumers */
static constexpr int PRODUCER_REGS = WG_COUNT == 2 || BLOCKS == 2 ? 56 : BLOCKS == 3 ? 40 : 32;
static constexpr int CONSUMER_REGS = WG_COUNT == 2 ? 224 : WG_COUNT == 3 ? 160 : WG_COUNT == 4 ? 112 : BLOCKS == 2 ? 200 : 120;
static constexpr uint32_t ALL_LANES = 0xFFFFFFFFu;
static constexpr bool DROPOUT = FGQA_DROPOUT;
/* What happens to scores besides the scale and the interval mask: a kernel of its own each. ALL: any of it, as the call says.
 * MERGED: none of it; a block has one tile, the parts of whose keys blocks merge themselves (fwd_merge.cuh). PAIRED: nor
 * there; two blocks bring keys for both (fwd_pair.cuh). EVEN: nor there, nor what packed sequences, lengths on the device,
 * caches and parts of keys take, so that a launch waits for fewer instructions; its first K is asked for by the scheduler. */
enum chain { PLAIN, CAPPED, ALIBI, TERMS, TILED, SCALED, ALL, TILED_ALL, MERGED, PAIRED, EVEN };
/* A bias and a mask tensor: TILED and TILED_ALL, which is ALL else, through shared memory by TMA, the others, wherever
 * elements lie, straight into the lanes. */
template <chain CHAIN> static constexpr bool DIRECT_TERMS = CHAIN == TERMS || CHAIN == ALL;
template <chain CHAIN> static constexpr bool BY_TMA = CHAIN == TILED || CHAIN == TILED_ALL;
template <chain CHAIN> static constexpr bool WITH_TERMS = DIRECT_TERMS<CHAIN> || BY_TMA<CHAIN>;
template <chain CHAIN> static constexpr bool ANY_MIX = CHAIN == ALL || CHAIN == TILED_ALL;
/* Chunks of a bias and a mask take the place of the third V buffer where nothing else is left. */
static constexpr int TERMS_BYTES = WG_COUNT * TERM_SLOTS * TERM_CHUNK;
static constexpr bool TERMS_IN_V = V_STAGES > STAGES && V_BYTES >= TERMS_BYTES;
/* Or the second and third of rows[]. */
static constexpr bool TERMS_IN_ROWS = D == 256;
template <chain CHAIN> static constexpr int ROW_PLACES = BY_TMA<CHAIN> && TERMS_IN_ROWS ? Q_STAGES : R_STAGES;
template <chain CHAIN> static constexpr int V_RING = BY_TMA<CHAIN> && TERMS_IN_V ? STAGES : V_STAGES;
enum { TURN = 1, TOGETHER = TURN + WG_COUNT };                   /* named barriers TURN + n, TOGETHER + n of warpgroup n; 0 is __syncthreads */

struct fwd_params {
    CUtensorMap q_map, k_map, v_map;                             /* dims (d, head, row, batch or page); box 64 columns x heads x rows */
    fgqa_params common;
    fgqa_split split;
    tile_list list;
    int32_t box_rows;                                            /* of K and V: what one copy brings, of one page */
    int32_t slot;                                                /* of the work counters; -1: fixed shares */
    float inv_unit;                                              /* of scores with ALiBi */
    uint32_t *counters;                                          /* MERGED: one a tile (any/dec_counters.h) */
    uint32_t early_items;                                        /* of the list, whose claims do not wait: schedule() */
    float in_caps;                                               /* scale / softcap; 0: none */
    score_terms terms;
    term_tiles term_boxes;
    known_keys known;                                            /* MERGED */
    whole_call whole;                                            /* of short rows */
};

/* Of a tile's blocks: those that all rows of a warpgroup see whole, having had a key before, or at the beginning of the tile;
 * one past the last that it walks, which is at least one. */
struct wg_blocks { fgqa_range full; int32_t end; };

struct shared {
    T q[Q_STAGES][WG_COUNT][Q_CHUNKS][WG_ROWS * CHUNK];
    T k[STAGES][K_CHUNKS][BLOCK_K * CHUNK];
    T v[V_STAGES][V_CHUNKS][BLOCK_K * CHUNK];
    wg_blocks blocks[R_STAGES][WG_COUNT];
    tile tiles[T_STAGES];
    int32_t poisoned[T_STAGES];                                  /* some element of O is not finite: the tile is done again */
    tile_place again;                                            /* the last such tile, which names the one before; batch -1: none */
    uint64_t tile_full[T_STAGES], o_full[T_STAGES], tile_empty[T_STAGES], q_full[Q_STAGES][Q_PARTS], q_empty[Q_STAGES][Q_PARTS];
    uint64_t k_full[STAGES], k_empty[STAGES], v_full[V_STAGES], v_empty[V_STAGES];
    uint32_t claim;                                              /* PAIRED: of the second block's next tile (advance_pair()) */
    fgqa_range rows[R_STAGES][BLOCK_Q];                          /* keys seen */
};
static_assert(sizeof(shared) <= SM_BYTES, "kernels.def: the tiles do not fit into shared memory");

/* Behind it, with BY_TMA: barriers of each warpgroup's chunks, and the chunks, if not in a V buffer. */
static constexpr int TERMS_BEGIN = (int)sizeof(shared) - (R_STAGES - ROW_PLACES<TILED>) * BLOCK_Q * (int)sizeof(fgqa_range);
static constexpr int TERMS_END = (int)(TERMS_BEGIN + WG_COUNT * TERM_BARRIERS * sizeof(uint64_t)), TERMS_AT = (TERMS_END + 1023) / 1024 * 1024;
static constexpr int TERMS_MEMORY = TERMS_IN_V ? TERMS_END : TERMS_AT + TERMS_BYTES;
#if FGQA_HAS_TILED(FGQA_D, FGQA_BLOCK_K)
static_assert(TERMS_MEMORY <= SM_BYTES, "chunks of a bias do not fit into shared memory");
#endif

/* One word a stream (stream_slot.h): 0 before and after every launch. */
static __device__ uint32_t work_counters[FGQA_STREAM_SLOTS];

/* Position in a ring of STAGES buffers: stage, and parity of the phase a consumer waits for. */
template <int N> struct ring {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance()
    {
        if (N == 1) { parity ^= 1; return; }
        if (++stage == N) { stage = 0; parity ^= 1; }
    }
    __device__ __forceinline__ ring next() const { ring r = *this; r.advance(); return r; }
};

/* ---- scheduler: a warp, of which one thread acts ---- */

/* Row i of a part's O and LSE. */
static __device__ __forceinline__ int64_t row_of_part(const fwd_params &p, const tile &t, int32_t head, int32_t i)
{
    return t.part * p.split.rows + split_row(p.common.problem, t.batch, head, t.q_row, i);
}

/* Tiles to be done again are a list: the place of each next one is kept where the O of a tile will be. */
template <chain CHAIN> static __device__ __forceinline__ tile_place *place_in_o(const fwd_params &p, const tile &t)
{
    const int32_t i = t.row0 >> p.list.pack;
    if (parts_of<BLOCK_Q, CHAIN == EVEN>(p.list) > 1) {
        return (tile_place *)(p.split.o + row_of_part(p, t, t.head, i) * p.common.problem.dv);
    }
    return (tile_place *)fgqa_row_address(p.common.problem.view[FGQA_ARG_out], sizeof(T), t.batch, t.head, t.q_row + i);
}

/* A tile whose rows see nothing of the keys, or of their part of them: nobody reads O of such a part. Whole warp. */
template <chain CHAIN> static __device__ __forceinline__ void write_unseen(const fwd_params &p, const tile &t)
{
    constexpr int32_t LANES = DV <= 64 ? 8 : DV <= 128 ? 16 : 32, ROWS = 32 / LANES;      /* lanes of a row, rows at once */
    const fgqa_problem &problem = p.common.problem;
    const int32_t lane = (int32_t)(thread_index() % 32), i0 = t.row0 >> p.list.pack, count = t.valid >> p.list.pack;
#pragma unroll 1
    for (int32_t head = t.head; head < t.head + (1 << p.list.pack); head++) {
        float lse = -INFINITY;
        uint32_t x = 0;
        if (parts_of<BLOCK_Q, CHAIN == EVEN>(p.list) > 1) {
            const int64_t row = row_of_part(p, t, head, i0);
#pragma unroll 1
            for (int32_t i = lane; i < count; i += 32) { ((float2 *)p.split.lse)[row + i] = make_float2(-INFINITY, -INFINITY); }
            continue;
        }
        if (problem.view[FGQA_ARG_sink].data) {
            const float zero = 0.0f * softmax_finish(-INFINITY, 0.0f, sink_logit(problem, t.batch, head, false), &lse);      /* NaN if the sink is */
            x = pack2(zero, zero, T());
        }
        if (lane % LANES * 8 < problem.dv) {
            const fgqa_view &out = problem.view[FGQA_ARG_out];
            char *to = fgqa_row_address(out, sizeof(T), t.batch, head, t.q_row + i0 + lane / LANES) + 16 * (lane % LANES);
#pragma unroll 4
            for (int32_t i = lane / LANES; i < count; i += ROWS) {
                const uint32_t y = i0 + i < t.sq ? x : 0;
                *(uint4 *)to = make_uint4(y, y, y, y);
                to += ROWS * out.stride_s * (int64_t)sizeof(T);
            }
        }
        __syncwarp();
#pragma unroll 1
        for (int32_t i = lane; i < count; i += 32) { store_lse(problem, t.batch, head, t.q_row + i0 + i, i0 + i < t.sq ? lse : -INFINITY); }
    }
}

/* Number in the list of the block's first tile. MERGED: parts, units and sequences, or parts and tiles, are dimensions of the
 * grid. */
template <chain CHAIN> static __device__ __forceinline__ uint32_t first_item()
{
    return CHAIN == MERGED ? (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x : blockIdx.x;
}

/* By one thread. q_row: row 0 of the sequence; batch: the tensor's, which has none where sequences are packed. */
static __device__ __forceinline__ void load_q(const fwd_params &p, T (&dst)[WG_COUNT][Q_CHUNKS][WG_ROWS * CHUNK], uint32_t full, uint64_t policy, int32_t head,
                                              const int32_t &q_row, int32_t row0, int32_t batch, int part = 0)
{
    mbarrier_arrive_expect_tx(full, PART_WGS * K_CHUNKS * WG_ROWS * CHUNK * sizeof(T));
    for (int wg = part * PART_WGS; wg < (part + 1) * PART_WGS; wg++) {
        for (int c = 0; c < K_CHUNKS; c++) {
            tma_load_4d(smem_address(dst[wg][c]), &p.q_map, full, policy, c * CHUNK, head, q_row + (row0 + wg * WG_ROWS >> p.list.pack), batch);
        }
    }
}

#include "fwd_pair.cuh"

#include "fwd_producer.cuh"

/* Loads Q a whole tile early. Long tiles are claimed only when a Q buffer is free, so that a block holds at most one beyond
 * the one in work (two cost 3% in the last wave at 4k keys, causal); short ones at once, to hide the atomic, up to
 * early_items: of a mask's the last four of a block wait (2 to 4% where it has a dozen). */
template <bool AGAIN, chain CHAIN> static __device__ __forceinline__ void schedule(const fwd_params &p, shared &sm, ring<Q_STAGES> &rq, ring<T_STAGES> &rt)
{
    const bool leader = thread_index() % 32 == 0;
    const uint64_t once = createpolicy_evict_first();
    const fgqa_problem &problem = p.common.problem;
    uint32_t *const counter = p.slot >= 0 ? &work_counters[p.slot] : NULL;
    tile_walk<BLOCK_Q, CHAIN == EVEN> walk(first_item<CHAIN>());
    tile_place place;
    bool first = CHAIN == EVEN && !AGAIN;                        /* its first keys, too: the producer's instructions come later */
    bool begun = CHAIN == MERGED && !AGAIN && p.known.share > 0; /* by begin_tile() */
    const auto advance = [&] {
        if constexpr (CHAIN == PAIRED) {
            if (counter) { return advance_pair(walk, &sm.claim, counter); }
        }
        if (CHAIN == MERGED) {
            walk.item = p.list.items;
        } else {
            walk.advance(counter);
        }
    };
    if (AGAIN) { place = sm.again; }
    for (bool more = true; more; rq.advance(), rt.advance()) {
        tile &t = sm.tiles[rt.stage];
        mbarrier_wait(smem_address(&sm.tile_empty[rt.stage]), rt.parity ^ 1);
        for (bool seen = begun; !seen;) {
            more = AGAIN ? place.batch >= 0 : walk.current(problem, p.list, counter, CHAIN == PAIRED, BY_TMA<CHAIN> && p.term_boxes.batch_first, &place);
            if (leader) {
                if (more) {
                    describe_tile<BLOCK_Q, BLOCK_K, CHAIN == EVEN>(problem, p.list, place, &t);
                } else {
                    t.block_end = 0;
                    if (CHAIN != MERGED || rt.stage > 0) { t.valid = 0; }        /* the block's only tile, which saw nothing, has a share of the merge */
                }
            }
            __syncwarp();
            seen = AGAIN || !more || t.block_begin < t.block_end;
            if (!seen) {
                write_unseen<CHAIN>(p, t);
                __syncwarp();
                advance();
            }
        }
        tile_place following = place;
        if (leader) { mbarrier_arrive(smem_address(&sm.tile_full[rt.stage])); }
        __syncwarp();
        if (AGAIN && more) { following = *place_in_o<CHAIN>(p, t); }      /* O comes after Q */
#pragma unroll 1
        for (int part = 0; part < Q_PARTS; part++) {
            const uint32_t q_full = smem_address(&sm.q_full[rq.stage][part]);
            mbarrier_wait(smem_address(&sm.q_empty[rq.stage][part]), rq.parity ^ 1);
            if (leader && more && !begun) {
                const int32_t batch = CHAIN != EVEN && problem.varlen ? 0 : place.batch;
                load_q(p, sm.q[rq.stage], q_full, once, place.head, t.q_row, place.row0, batch, part);
            } else if (leader && !begun) {
                mbarrier_arrive(q_full);
            }
        }
        begun = false;
        __syncwarp();
        if (first && more) {
            const kv_source from = find_rows<CHAIN>(p, t, t.block_end - 1, (int)(thread_index() % 32));
            const uint64_t keep = createpolicy_evict_last();
            load_kv<CHAIN, false>(p, &p.k_map, sm.k[0], &sm.k_full[0], &sm.k_empty[0], 0, keep, from, fgqa_kv_head(t.head, problem.g));
        }
        first = false;
        place = following;
        if (AGAIN || !more) { continue; }
        if (CHAIN != MERGED && Q_STAGES > 1 && walk.item >= p.early_items) { mbarrier_wait(smem_address(&sm.q_empty[rq.next().stage][0]), rq.next().parity ^ 1); }
        advance();
    }
}

/* ---- collector: a thread ---- */

template <chain CHAIN> static __device__ __forceinline__ void collect(const fwd_params &p, shared &sm, ring<T_STAGES> &rt)
{
    for (bool more = true; more; rt.advance()) {
        mbarrier_wait(smem_address(&sm.o_full[rt.stage]), rt.parity);
        const tile &t = sm.tiles[rt.stage];
        more = t.block_end != 0;
        if (more && sm.poisoned[rt.stage]) {
            sm.poisoned[rt.stage] = 0;
            *place_in_o<CHAIN>(p, t) = sm.again;
            sm.again = {t.batch, t.head, t.row0, t.part};
        }
        mbarrier_arrive(smem_address(&sm.tile_empty[rt.stage]));
    }
}

#include "fwd_masker.cuh"

/* After the last tile: whether none has to be done again. All threads. */
template <chain CHAIN> static __device__ __forceinline__ bool all_done(const shared &sm)
{
    __syncwarp();
    if (CHAIN == PAIRED) { meet_pair(); } else { barrier_sync(0, THREADS); }
    return sm.again.batch < 0;
}

#include "fwd_consumer.cuh"
#include "fwd_begin.cuh"
#include "fwd_whole.cuh"

template <chain CHAIN> static __device__ __forceinline__ void run_block(const fwd_params &p)
{
    extern __shared__ __align__(1024) char memory[];
    shared &sm = *(shared *)memory;
    const int warp = __shfl_sync(ALL_LANES, thread_index() / 32, 0), wg = warp / 4, lane = thread_index() % 32;

    const bool known = CHAIN == MERGED && p.known.share > 0;
    if constexpr (CHAIN == MERGED) {
        if (known && warp == 1) { begin_tile<CHAIN>(p, sm); }
        if (known && warp == 3) { tell_tile<CHAIN>(p, sm); }
    }
    if (thread_index() == 0) {
        if (smem_address(memory) % 1024) { __trap(); }           /* the swizzle pattern repeats every 1024 bytes */
        if (!known) { prefetch_tensormap(&p.q_map); }
        if (!known) { prefetch_tensormap(&p.k_map); }
        prefetch_tensormap(&p.v_map);
        for (int s = 0; s < Q_STAGES; s++) {
            for (int part = 0; part < Q_PARTS; part++) {
                if (!known) { mbarrier_init(smem_address(&sm.q_full[s][part]), 2); }
                mbarrier_init(smem_address(&sm.q_empty[s][part]), 4 * PART_WGS);
            }
        }
        for (int s = 0; s < T_STAGES; s++) {
            mbarrier_init(smem_address(&sm.tile_full[s]), 1);
            mbarrier_init(smem_address(&sm.o_full[s]), 4 * WG_COUNT);
            mbarrier_init(smem_address(&sm.tile_empty[s]), 1);
        }
        if (!known) { init_key_barriers<CHAIN>(sm, 0); }
        for (int n = 0; BY_TMA<CHAIN> && n < WG_COUNT * TERM_BARRIERS; n++) {
            mbarrier_init(smem_address(&sm) + TERMS_BEGIN + 8 * n, n % TERM_BARRIERS < TERM_SLOTS ? 1 : 4);
        }
        for (int s = 0; s < T_STAGES; s++) { sm.poisoned[s] = 0; }
        if (CHAIN == PAIRED) { sm.claim = 0; }
        sm.again.batch = -1;
        fence_mbarrier_init();
    }
    if (CHAIN == PAIRED) { meet_pair(); } else { __syncthreads(); }
    if (CHAIN == MERGED) {
        launches_before_wait();
        if (warp == 2) { launch_behind_begin(); }
    }

    /* Each role does its part of all tiles and then, after a barrier of all, of those that are done again. */
    if (wg == 0) {
        setmaxnreg_dec<PRODUCER_REGS>();
        ring<Q_STAGES> rq;
        ring<T_STAGES> rt;
        if (warp == 0) {
            schedule<false, CHAIN>(p, sm, rq, rt);
            if (all_done<CHAIN>(sm)) { return; }
            schedule<true, CHAIN>(p, sm, rq, rt);
        } else if (warp == 1) {
            ring<STAGES> rk;
            ring<V_RING<CHAIN>> rv;
            uint32_t chunks = 0;                                 /* of each warpgroup, so far */
            produce<false, CHAIN>(p, sm, rt, rk, rv, chunks, known ? BEGUN : CHAIN == EVEN);
            if (all_done<CHAIN>(sm)) { return; }
            produce<true, CHAIN>(p, sm, rt, rk, rv, chunks);
        } else if (warp == 2) {
            if (lane == 0) { collect<CHAIN>(p, sm, rt); }
            if (all_done<CHAIN>(sm)) { return; }
            if (lane == 0) { collect<CHAIN>(p, sm, rt); }
        } else {
            describe_rows<false, CHAIN>(p, sm, rq, rt);
            if (all_done<CHAIN>(sm)) { return; }
            describe_rows<true, CHAIN>(p, sm, rq, rt);
        }
    } else {
        setmaxnreg_inc<CONSUMER_REGS>();
        consumer_rings<CHAIN> rings;
        if (BY_TMA<CHAIN>) { rings.terms = find_chunks(sm, wg - 1); }
        consume<false, CHAIN>(p, sm, warp, rings);
        if constexpr (CHAIN == MERGED) {
            if (part_is_done<CHAIN>(sm)) {
                __syncwarp();
                barrier_arrive(0, THREADS);                      /* as all_done(), for which nobody waits here */
            } else {
                all_done<CHAIN>(sm);
                consume<true, CHAIN>(p, sm, warp, rings);
                bar_sync(TURN, 128 * WG_COUNT);
            }
            merge_parts<CHAIN>(p, sm);
        } else {
            if (all_done<CHAIN>(sm)) { return; }
            consume<true, CHAIN>(p, sm, warp, rings);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) FGQA_SUFFIX(FGQA_ROW, _kernel)(const __grid_constant__ fwd_params p) { run_block<PLAIN>(p); }
#if FGQA_HAS_TERMS(FGQA_D, FGQA_BLOCK_K)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _terms)(const __grid_constant__ fwd_params p) { run_block<TERMS>(p); }
#endif
#if FGQA_HAS_TILED(FGQA_D, FGQA_BLOCK_K)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _tiled)(const __grid_constant__ fwd_params p) { run_block<TILED>(p); }
#endif
#if FGQA_HAS_TILED_ALL(FGQA_D, FGQA_BLOCK_K, FGQA_DROPOUT)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _tiled_all)(const __grid_constant__ fwd_params p) { run_block<TILED_ALL>(p); }
#endif
#if FGQA_MERGES
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _merged)(const __grid_constant__ fwd_params p) { run_block<MERGED>(p); }
#endif
#if FGQA_PAIRS
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _paired)(const __grid_constant__ fwd_params p) { run_block<PAIRED>(p); }
#endif
#if FGQA_EVEN
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _even)(const __grid_constant__ fwd_params p)
{
    run_block<EVEN>(p);
}
#endif
#if FGQA_HAS_SOFTCAP(FGQA_BLOCK_Q)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _capped)(const __grid_constant__ fwd_params p) { run_block<CAPPED>(p); }
#endif
#if FGQA_HAS_ALIBI(FGQA_D, FGQA_BLOCK_Q)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _alibi)(const __grid_constant__ fwd_params p) { run_block<ALIBI>(p); }
#endif
#if FGQA_HAS_SCALES(FGQA_D, FGQA_BLOCK_Q) && !FGQA_DROPOUT
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _scaled)(const __grid_constant__ fwd_params p) { run_block<SCALED>(p); }
#endif
#if FGQA_HAS_ALL(FGQA_D, FGQA_BLOCK_K)
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _all)(const __grid_constant__ fwd_params p) { run_block<ALL>(p); }
#endif

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(shared); }

static int32_t common_divisor(int32_t a, int32_t b) { return b == 0 ? a : common_divisor(b, a % b); }

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    static launch_state states[EVEN + 1];
    const cudaStream_t stream = (cudaStream_t)exec->stream;
    const bool capped = problem->softcap > 0.0, alibi = problem->view[FGQA_ARG_alibi_slopes].data;
    const bool terms = problem->view[FGQA_ARG_bias].data || problem->view[FGQA_ARG_mask].data;
    const bool alone = capped + alibi + terms < 2;
    const bool tiled = terms && (alone ? FGQA_HAS_TILED(FGQA_D, FGQA_BLOCK_K) : FGQA_HAS_TILED_ALL(FGQA_D, FGQA_BLOCK_K, FGQA_DROPOUT)) && term_tiles_fit(problem);
    const bool has_own = (alone && tiled) || (alone && (FGQA_HAS_ALIBI(FGQA_D, FGQA_BLOCK_Q) || !alibi) && (FGQA_HAS_TERMS(FGQA_D, FGQA_BLOCK_K) || !terms));
    const bool scaled = problem->cache.k_scale.data || problem->cache.v_scale.data;
    const bool even = FGQA_EVEN && plan->splits == 1 && fgqa_is_even(problem);
    const chain no_terms = capped ? CAPPED : alibi ? ALIBI : scaled ? SCALED : even ? EVEN : PLAIN;
    const chain of_scores = !has_own ? (tiled ? TILED_ALL : ALL) : terms ? (tiled ? TILED : TERMS) : no_terms;
    auto kernel = FGQA_SUFFIX(FGQA_ROW, _kernel);
#if FGQA_HAS_TERMS(FGQA_D, FGQA_BLOCK_K)
    if (of_scores == TERMS) { kernel = FGQA_SUFFIX(FGQA_ROW, _terms); }
#endif
#if FGQA_HAS_TILED(FGQA_D, FGQA_BLOCK_K)
    if (of_scores == TILED) { kernel = FGQA_SUFFIX(FGQA_ROW, _tiled); }
#endif
#if FGQA_HAS_TILED_ALL(FGQA_D, FGQA_BLOCK_K, FGQA_DROPOUT)
    if (of_scores == TILED_ALL) { kernel = FGQA_SUFFIX(FGQA_ROW, _tiled_all); }
#endif
#if FGQA_EVEN
    if (of_scores == EVEN) { kernel = FGQA_SUFFIX(FGQA_ROW, _even); }
#endif
#if FGQA_HAS_SOFTCAP(FGQA_BLOCK_Q)
    if (of_scores == CAPPED) { kernel = FGQA_SUFFIX(FGQA_ROW, _capped); }
#endif
#if FGQA_HAS_ALIBI(FGQA_D, FGQA_BLOCK_Q)
    if (of_scores == ALIBI) { kernel = FGQA_SUFFIX(FGQA_ROW, _alibi); }
#endif
#if FGQA_HAS_SCALES(FGQA_D, FGQA_BLOCK_Q) && !FGQA_DROPOUT
    if (of_scores == SCALED) { kernel = FGQA_SUFFIX(FGQA_ROW, _scaled); }
#endif
#if FGQA_HAS_ALL(FGQA_D, FGQA_BLOCK_K)
    if (of_scores == ALL) { kernel = FGQA_SUFFIX(FGQA_ROW, _all); }
#endif
    int resident = 1;                                            /* blocks that the device holds at once */
    const int memory = tiled ? TERMS_MEMORY : (int)sizeof(shared);
    int error = allow_shared_memory((const void *)kernel, memory, problem->device.index, &states[of_scores]);
    if (error == cudaSuccess) { error = cudaDeviceGetAttribute(&resident, cudaDevAttrMultiProcessorCount, problem->device.index); }
    resident *= BLOCKS;
    fwd_params p;
    const int paged = problem->cache.table && problem->cache.page_size < problem->cache.capacity;
    const int32_t at_once = SHORT ? fgqa_whole_keys(problem) : 0;
    p.box_rows = at_once > 0 ? at_once : paged ? common_divisor(problem->cache.page_size, BLOCK_K) : BLOCK_K;
    p.list.pack = fgqa_hopper_pack(problem, BLOCK_Q);
    const fgqa_map_box query = {CHUNK, 1 << p.list.pack, WG_ROWS >> p.list.pack}, key = {CHUNK, 1, p.box_rows};
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.q_map, problem, FGQA_ARG_q, query); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.k_map, problem, FGQA_ARG_k, key); }
    if (error == cudaSuccess) { error = fgqa_tensor_map(&p.v_map, problem, FGQA_ARG_v, key); }
    if (error == cudaSuccess && tiled) { error = term_tiles_make(&p.term_boxes, problem, p.list.pack); }
    if (error != cudaSuccess) { return error; }
    p.common = fgqa_params_make(problem);
    p.inv_unit = !has_own ? 1.0f : (float)(1.0 / problem->scale);
    p.in_caps = fgqa_in_caps(problem);
    p.terms = score_terms_of(problem);
    p.slot = fgqa_stream_slot(stream);
    fgqa_split_workspace(problem, (uint32_t)plan->splits, workspace, &p.split);
    if (of_scores == EVEN) { p.list.every = fgqa_problem_sequence(problem, 0); }
    p.list.units = (uint32_t)(problem->hq >> p.list.pack);
    p.list.splits = (uint32_t)plan->splits;
    p.list.row_blocks = (uint32_t)((((int64_t)problem->sq << p.list.pack) + BLOCK_Q - 1) / BLOCK_Q);
    p.list.pairs = (uint32_t)problem->b * p.list.units;
    p.list.items = problem->varlen ? 0 : (uint32_t)plan->tasks;
    /* without a mask all tiles cost the same: the rows of a head in turn; else the K and V of 16 heads share L2 */
    const int masked = problem->right != FGQA_UNBOUNDED || problem->left != FGQA_UNBOUNDED || problem->chunk > 0;
    const int batch_first = tiled && p.term_boxes.batch_first;
    const bool paired = FGQA_PAIRS && of_scores == PLAIN && tiles_pair(problem, plan, p.list, resident);
    const uint32_t section = masked ? 16 * (uint32_t)(problem->g >> p.list.pack) : paired ? 2 : !batch_first ? 1 : problem->b < 8 ? (uint32_t)problem->b : 8;
    p.list.section = section < p.list.pairs ? section : p.list.pairs;
    /* the last section: three tiles or more for every block, so that light ones are left when the heavy ones are done */
    const int64_t sections = (p.list.pairs + p.list.section - 1) / p.list.section, tiles = (int64_t)p.list.section * p.list.row_blocks;
    const int64_t joined = masked ? (3 * resident + tiles - 1) / tiles : 1;
    p.list.last = (uint32_t)(sections > joined ? sections - joined : 0);
    const int64_t blocks = plan->tasks < resident ? plan->tasks : resident;
    const int wait_at_end = masked && !problem->varlen && plan->tasks > 5 * blocks;      /* of packed sequences nobody knows the end */
    p.early_items = problem->sk > 2048 ? 0 : wait_at_end ? (uint32_t)(plan->tasks - 4 * blocks) : UINT32_MAX;
#if FGQA_IS_SHORT(FGQA_BLOCK_Q)
    if (at_once > 0) { return launch_whole<FGQA_WHOLE_KEYS>(at_once, p, stream); }
#endif
#if FGQA_MERGES
    if (of_scores == PLAIN && merges_in_place(problem, plan, resident)) {
        p.known = known_keys_of(problem, p.list);
        error = launch_merged(FGQA_SUFFIX(FGQA_ROW, _merged), p, plan, problem->device.index, exec->stream, &states[MERGED]);
        if (error != cudaErrorCooperativeLaunchTooLarge) { return error; }
        cudaGetLastError();                                      /* no counters, or part of the device: a green context */
    }
#endif
#if FGQA_PAIRS
    if (paired) { return launch_paired(FGQA_SUFFIX(FGQA_ROW, _paired), p, (uint32_t)blocks, problem->device.index, stream, &states[PAIRED]); }
#endif
    error = launch_kernel(kernel, (uint32_t)blocks, THREADS, memory, stream, p);
    return error == cudaSuccess && plan->splits > 1 ? fgqa_fwd_combine(problem, workspace, (uint32_t)plan->splits, exec) : error;
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
