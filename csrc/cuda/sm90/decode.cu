/* decode.cu - attention of up to 8 packed query rows of a KV head over many keys, for Hopper: a memory stream with arithmetic on
 * the side. Compiled once per `decode` row of kernels.def. More rows: decode_wide.cu; who works on what: dec_work.h.
 *
 * Granule n of a segment belongs to stream n % STREAMS, which has its own ring of tiles and READERS consumer warps, each for 16
 * of a granule's keys and with its own m, l, o: no barrier inside a segment; at its end the warps' sums are added up. The other
 * warps: dec_block.cuh, with most barriers. Also:
 *
 *   barrier                    arrivals                                  waited for by
 *   named MERGE                consumers                                 end of a segment
 *   named COMBINE, + 1         warps that merge records                  dec_combine.cuh
 *   cluster, twice             consumers of blocks that join parts       all are past their tiles; sums are where they belong
 *
 * A tile is GRANULE keys in chunks of 64 columns, 128 bytes a row, with the swizzle of TMA: piece c of row r at c ^ (r & 7).
 * Where pages are smaller, the chunks of each 16 keys follow each other instead.
 * The products are turned so that query rows are the short side of the mma:
 *
 *   S^T[16 keys x 8 rows] = K Q^T        O^T[16 columns x 8 rows] += V^T P^T
 *
 * Register e of both: key or column lane / 4 + 8 (e / 2), row 2 (lane % 4) + e % 2.
 *
 * Variant decodef8: K and V are float8 in the ring, a chunk is 128 columns, and the products are float16 ones (dec_float8.cuh,
 * with the order of columns).
 */
#include "../common/launch.cuh"
#include "../common/params.cuh"
#include "../kernel_table.h"
#include "dec_work.h"

#include <type_traits>

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)

#ifndef FGQA_NO_CODE

#include "../common/numeric.cuh"
#include "../common/ptx_ldmatrix.cuh"

typedef FGQA_DTYPE T;
static constexpr bool FLOAT8 = FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_decodef8;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, GRANULE = FGQA_BLOCK_K;

#include "../sm80/gemm.cuh"
#include "dec_block.cuh"
#include "dec_float8.cuh"
#include "dec_join.cuh"
#include "dec_launch.cuh"
#include "dec_score.cuh"

static constexpr int K_STEPS = D / 16;
static constexpr int JOINED_ITEMS = BLOCK_Q * ITEMS_OF_ROW;
static constexpr int MERGE_PITCH = D + 4, MERGE = 1;        /* + m, l; and the 8 rows of a fragment fall on different banks */
static_assert(GRANULE % 16 == 0 && CONSUMERS % (GRANULE / 16) == 0 && BLOCK_Q == 8, "kernels.def: one mma per warp and 16 columns, 8 rows");

struct shared {
    static constexpr int READERS = GRANULE / 16, STREAMS = CONSUMERS / READERS, STAGES = FGQA_STAGES;
    static constexpr bool DEEP_PIECES = true, PIECE_LANES = !FLOAT8, JOINS = false, HALVES = false, Q_KEPT = true;
    alignas(1024) char ring[STREAMS][STAGES][2][TILE_BYTES];
    alignas(16) float merge[CONSUMERS][BLOCK_Q][MERGE_PITCH];   /* o, m, l, 2 unused */
    uint64_t full[STREAMS][STAGES][2], empty[STREAMS][STAGES][2];
    int32_t pages[2 * STREAMS][PAGES_AHEAD * PIECES];
    dec_schedule schedule;
};
static_assert(sizeof(shared) <= 227 * 1024, "kernels.def: the stages fit into shared memory");

/* Of blocks that have a part of a pair each, which their cluster joins. */
struct joining_shared : shared { static constexpr bool JOINS = true; };

/* A fragments of 16 keys x 16 columns, or of 16 columns x 16 keys, number k along a row of the tile, in order; `lane` is the
 * shared address of this lane's row for ldmatrix at k = 0, chunks are `chunk` bytes apart. */
struct fragments {
    uint32_t chunk;
    __device__ __forceinline__ uint32_t at(uint32_t lane, int k) { return (lane ^ (uint32_t)((k & 3) << 5)) + (k >> 2 ? chunk : 0); }
    __device__ __forceinline__ void keys(uint32_t (&a)[4], uint32_t lane, int k) { ldmatrix_x4(a, at(lane, k)); }
    __device__ __forceinline__ void values(uint32_t (&a)[4], uint32_t lane, int k) { ldmatrix_x4_trans(a, at(lane, k)); }
};

/* One warp's result of a segment, for its 8 rows. */
struct state {
    float o[K_STEPS][4];        /* fragments of 16 columns */
    float m[2];                 /* of the lane's two rows */
    float l[2];                 /* over this lane's keys only */
};

typedef std::conditional<FLOAT8, f16, T>::type product;
typedef std::conditional<FLOAT8, float8_fragments, fragments>::type reader;

/* Of step k, `half` of it: the first of two columns that register `half` of an operand's lane holds, and, of O^T, the only one
 * that a row has, in registers 2 half + {0, 1}. */
static __device__ __forceinline__ int pair_column(int k, int half, int lane)
{
    return 16 * k + (FLOAT8 ? 4 * (lane % 4) + 2 * half : 8 * half + 2 * (lane % 4));
}
static __device__ __forceinline__ int out_column(int k, int half, int lane) { return 16 * k + (FLOAT8 ? 2 * (lane / 4) + half : 8 * half + lane / 4); }

/* Q of a pair, of each thread 16 bytes, zero where there is none. Fetched a segment ahead: the stream of all SMs is before a
 * load. */
struct q_piece {
    static constexpr int OF_ROW = D / 8, PITCH = 2 * D + 16;        /* rows of a fragment fall on different banks */
    uint4 piece;

    __device__ __forceinline__ void fetch(const dec_params &p, int32_t b, const pair_rows &rows)
    {
        const fgqa_problem &problem = p.common.problem;
        const int local = (int)thread_index() / OF_ROW, column = (int)thread_index() % OF_ROW * 8;
        piece = make_uint4(0, 0, 0, 0);
        if (local < rows.valid && column < problem.d) {
            piece = *(const uint4 *)(fgqa_row_address(problem.view[FGQA_ARG_q], sizeof(T), b, rows.kv_head * problem.g + rows.rows.h(local), rows.rows.i(local))
                                     + 2 * column);
        }
    }
    /* -> B fragments of Q^T, through `room`. */
    __device__ __forceinline__ void place(const dec_actor &actor, char *room, uint32_t (&q)[K_STEPS][2]) const
    {
        const int lane = (int)thread_index() % 32;
        if (actor.thread < BLOCK_Q * OF_ROW && !actor.rehearsal) { *(uint4 *)(room + actor.thread / OF_ROW * PITCH + actor.thread % OF_ROW * 16) = piece; }
        actor.sync();
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
#pragma unroll
            for (int half = 0; half < 2; half++) { q[k][half] = actor.read(*(const uint32_t *)(room + lane / 4 * PITCH + 2 * pair_column(k, half, lane))); }
        }
        actor.sync();                           /* the room is free again */
    }
};

/* s = K Q^T of 16 keys, as two chains of dependent mma. k_lane: this lane's row for ldmatrix at step 0. */
static __device__ __forceinline__ void scores(reader tile, uint32_t k_lane, const uint32_t (&q)[K_STEPS][2], float (&s)[4])
{
    float sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) {
        uint32_t a[4];
        tile.keys(a, k_lane, k);
        mma_step(sum[k & 1], a, q[k][0], q[k][1], product());
    }
#pragma unroll
    for (int e = 0; e < 4; e++) { s[e] = sum[0][e] + sum[1][e]; }
}

/* Which slots count in a tile that not all rows see in full; `first` is its first slot. */
struct tile_mask {
    int32_t first;
    fgqa_range seen;            /* by some row */
    fgqa_range rows[2];         /* by this lane's */
};

/* Scores -> weights, as B fragments of P^T. MASKED: `sees` gets 1 where the row sees the key, in the same form. */
template <bool MASKED>
static __device__ __forceinline__ void softmax(const dec_params &p, const tile_mask &mask, float (&s)[4], state &st, uint32_t (&pt)[2], uint32_t (&sees)[2])
{
    const int key = (int)thread_index() % 32 / 4;
    bool grows = false, visible[4];
    const float lazy = LAZY / p.scale_log2;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        if (MASKED) {
            const int32_t slot = mask.first + key + 8 * (e / 2);
            visible[e] = mask.rows[e & 1].begin <= slot && slot < mask.rows[e & 1].end;
            if (!visible[e]) { s[e] = -INFINITY; }
        }
        grows |= s[e] > st.m[e & 1] + lazy;
    }
    if (__any_sync(0xFFFFFFFFu, grows)) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float m = fmaxf(fmaxf(s[c], s[c + 2]), st.m[c]);
#pragma unroll
            for (int d = 4; d < 32; d *= 2) { m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, d)); }
            const float alpha = m == -INFINITY ? 1.0f : ex2((st.m[c] - m) * p.scale_log2);
            st.m[c] = m;
            st.l[c] *= alpha;
#pragma unroll
            for (int k = 0; k < K_STEPS; k++) {
                st.o[k][c] *= alpha;
                st.o[k][c + 2] *= alpha;
            }
        }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
        s[e] = ex2((s[e] - finite_max(st.m[e & 1])) * p.scale_log2);
        st.l[e & 1] += s[e];
    }
    pt[0] = movmatrix_trans(pack2(s[0], s[1], product()));
    pt[1] = movmatrix_trans(pack2(s[2], s[3], product()));
    if (MASKED) {
        sees[0] = movmatrix_trans(pack2(visible[0] ? 1.0f : 0.0f, visible[1] ? 1.0f : 0.0f, product()));
        sees[1] = movmatrix_trans(pack2(visible[2] ? 1.0f : 0.0f, visible[3] ? 1.0f : 0.0f, product()));
    }
}

/* o += V^T P^T. Unseen keys have p = 0, but 0 * NaN is NaN: what no row sees is cleared, and inf and NaN of what some rows see go
 * to those alone. Register r holds keys 8 (r / 2) + 2 (lane % 4) + {0, 1}. */
template <bool MASKED>
static __device__ __forceinline__ void accumulate(reader tile, uint32_t v_lane, const tile_mask &mask, const uint32_t (&pt)[2], const uint32_t (&sees)[2], state &st)
{
    uint32_t keep[2] = {~0u, ~0u};
    if (MASKED) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int32_t slot = mask.first + 8 * r + 2 * ((int)thread_index() % 4);
            keep[r] = (mask.seen.begin <= slot && slot < mask.seen.end ? 0xFFFFu : 0u)
                    | (mask.seen.begin <= slot + 1 && slot + 1 < mask.seen.end ? 0xFFFF0000u : 0u);
        }
    }
#pragma unroll
    for (int k = 0; k < K_STEPS; k++) {
        uint32_t a[4], code[4];
        tile.values(a, v_lane, k);
        if (MASKED) {
#pragma unroll
            for (int r = 0; r < 4; r++) { split_poison(a[r] & keep[r / 2], &a[r], &code[r], product()); }
        }
        mma_step(st.o[k], a, pt[0], pt[1], product());
        if (MASKED && __any_sync(0xFFFFFFFFu, (code[0] | code[1] | code[2] | code[3]) != 0)) {
            float count[4] = {};
            mma_step(count, code, sees[0], sees[1], product());
            add_poison(st.o[k], count);
        }
    }
}

static __device__ __forceinline__ int item_row(int item) { return item / ITEMS_OF_ROW; }
static __device__ __forceinline__ int item_column(int item, int e) { return item % ITEMS_OF_ROW * ITEM + e; }

/* Consumer warps: sum of their states; a whole pair goes to the result, a part to its record. */
template <class Shared> static __device__ __forceinline__ void finish_segment(const dec_params &p, Shared &mem, const dec_actor &actor, const state &st, int32_t b, const pair_rows &rows,
                                                      int32_t sq, int warp, int64_t record, const row_end &joined)
{
    const int lane = (int)thread_index() % 32;
    if (Shared::JOINS) { cluster_arrive(); }
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float l = st.l[c], *row = mem.merge[warp][2 * (lane % 4) + c];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) { l += __shfl_xor_sync(0xFFFFFFFFu, l, d); }
        if (actor.rehearsal) { continue; }
        if (lane < 4) { *(float2 *)(row + D) = make_float2(st.m[c], l); }
#pragma unroll
        for (int k = 0; k < K_STEPS; k++) {
            row[out_column(k, 0, lane)] = st.o[k][c];
            row[out_column(k, 1, lane)] = st.o[k][c + 2];
        }
    }
    actor.sync();
    dec_partial own = empty_partial();
    for (int item = actor.thread; item < rows.valid * ITEMS_OF_ROW; item += 32 * CONSUMERS) {
        const int local = item_row(item), column = item_column(item, 0);
        const row_end end = record < 0 && !Shared::JOINS ? row_end_of(p, b, rows, sq, local, column == 0) : row_end();
        dec_partial sum = empty_partial();
        float2 ml[CONSUMERS];
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++) {
            ml[w] = actor.read(*(const float2 *)&mem.merge[w][local][D]);
            sum.m = fmaxf(sum.m, ml[w].x);
        }
        const float base = finite_max(sum.m);
#pragma unroll
        for (int w = 0; w < CONSUMERS; w++) {
            const float weight = ex2((ml[w].x - base) * p.scale_log2);
            const float4 o = actor.read(*(const float4 *)&mem.merge[w][local][column]);
            sum.l += weight * ml[w].y;
            sum.o[0] += weight * o.x;
            sum.o[1] += weight * o.y;
            sum.o[2] += weight * o.z;
            sum.o[3] += weight * o.w;
        }
        if (Shared::JOINS) {
            own = sum;
        } else if (record < 0) {
            if (!actor.rehearsal) { store_output(p, end, item, sum); }
        } else if (!actor.rehearsal) {
            float *const to = record_of(p, record);
            *(float4 *)(to + ITEM * item) = make_float4(sum.o[0], sum.o[1], sum.o[2], sum.o[3]);
            if (column == 0) { sums_of_record(p, to)[local] = make_float2(sum.m, sum.l); }
        }
    }
    if (Shared::JOINS) {
        const float o[1][ITEM] = {{own.o[0], own.o[1], own.o[2], own.o[3]}};
        const bool has_item = actor.thread < rows.valid * ITEMS_OF_ROW;
        join_parts<JOINED_ITEMS>(p, mem.ring, b, rows, sq, o, has_item && item_column(actor.thread, 0) == 0, item_row(actor.thread), make_float2(own.m, own.l), joined,
                                 [&](int) { return actor.thread; });
        return;
    }
    actor.sync();                               /* merge is free again; every record of the segment is written */
}

/* Whether the block has work. */
template <class Shared> static __device__ __forceinline__ bool consume(const dec_params &p, Shared &mem, const dec_actor &actor)
{
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32, stream = warp / shared::READERS, part = warp % shared::READERS;
    dec_segment segment;
    pair_rows rows = {}, rows_next;
    q_piece q_next;
    chain_row chain[2] = {};                    /* of the lane's two rows */
    float slope_next[2] = {};
    float8_scales scales, scales_next = {1.0f, 1.0f};
    const auto fetch = [&](const dec_segment &first) {
        rows = pair_rows_of(p, first.h);
        q_next.fetch(p, first.b, rows);
#pragma unroll
        for (int c = 0; c < 2; c++) { slope_next[c] = slope_of(p, first.b, rows, 2 * (lane % 4) + c); }
        if (FLOAT8) { scales_next.fetch(p, first.b, rows.kv_head); }
    };
    dec_sequence own_sequence;
    if (Shared::JOINS) {
        segment = begin_part(p, own_sequence, fetch);
    } else if (!begin_block(p, mem, actor, segment, fetch)) {
        return false;
    }
    rows_next = rows;

    /* Rows for ldmatrix. K: matrices (keys 0-7 | 8-15) x (columns 0-7 | 8-15), key half first. V, transposed: column half first. */
    const int low = lane & 7, mid = lane >> 3 & 1, high = lane >> 4;
    const uint32_t ring = smem_address(mem.ring[stream][0][0]);
    const uint32_t full = smem_address(&mem.full[stream][0][0]), empty = smem_address(&mem.empty[stream][0][0]);
    const uint32_t keys = ring + (uint32_t)(part * p.piece_pitch);
    const uint32_t k_lane = keys + (low + 8 * mid) * 128 + ((high ^ low) << 4);
    const uint32_t v_lane = keys + TILE_BYTES + (low + 8 * high) * 128 + ((mid ^ low) << 4);
    reader tile;
    tile.chunk = (uint32_t)p.chunk_pitch;

    int stage = 0;
    uint32_t parity = 0;
    for (int segments = 0; segment.valid(); segments++) {
        dec_segment next = segment;
        next.next(p, &mem.schedule);
        const dec_sequence sequence = Shared::JOINS ? own_sequence : sequence_of(p, mem.schedule, segment.b);
        const fgqa_mask rule = mask_of(p, sequence);
        const pair_slots slots = pair_slots_of(p, rule, sequence, rows);
        tile_mask mask = {0, slots.seen, {slots_of_row(p, rule, sequence, rows, 2 * (lane % 4)), slots_of_row(p, rule, sequence, rows, 2 * (lane % 4) + 1)}};
#pragma unroll
        for (int c = 0; c < 2; c++) {
            chain[c].slope = slope_next[c];
            chain[c].diagonal = diagonal_of(rule, sequence, rows, 2 * (lane % 4) + c);
        }
        uint32_t q[K_STEPS][2];
        q_next.place(actor, (char *)mem.merge, q);
        scales = scales_next;
        if (next.valid()) {
            rows_next = pair_rows_of(p, next.h);
            q_next.fetch(p, next.b, rows_next);
#pragma unroll
            for (int c = 0; c < 2; c++) { slope_next[c] = slope_of(p, next.b, rows_next, 2 * (lane % 4) + c); }
            if (FLOAT8) { scales_next.fetch(p, next.b, rows_next.kv_head); }
        }
        float unit[2] = {1.0f, 1.0f};           /* of the scores of the lane's two rows */
        if (FLOAT8) {
            const float power = float16_row<4>(q, T()) * scales.k;
#pragma unroll
            for (int c = 0; c < 2; c++) { unit[c] = __shfl_sync(0xFFFFFFFFu, power, 4 * (2 * (lane % 4) + c)); }
        }
        row_end joined;                         /* made while the first keys are on their way */
        if (Shared::JOINS) { joined = joined_end<JOINED_ITEMS>(p, segment.b, rows, sequence.sq, own_item(p)); }
        state st = {{}, {-INFINITY, -INFINITY}, {0.0f, 0.0f}};
        for (int32_t g = segment.g0 + stream; g < segment.g1 && !actor.rehearsal; g += shared::STREAMS) {
            const int offset = 2 * TILE_BYTES * stage;
            mask.first = (segment.span.first + g) * GRANULE + PIECE * part;
            const bool is_full = slots.full.begin <= mask.first && mask.first + PIECE <= slots.full.end;
            float s[4];
            uint32_t pt[2], sees[2];
            mbarrier_wait(full + 16 * stage, parity);
            scores(tile, k_lane + offset, q, s);
            __syncwarp();
            if (lane == 0) { mbarrier_arrive(empty + 16 * stage); }
            if (FLOAT8) {
#pragma unroll
                for (int e = 0; e < 4; e++) { s[e] *= unit[e & 1]; }
            }
            if (p.cap_ratio != 0.0f) {
                cap_scores(s, p.cap_ratio);
            } else if (p.chain) {
#pragma unroll
                for (int e = 0; e < 4; e++) { s[e] = chain_score(p, chain[e & 1], mask.first + lane / 4 + 8 * (e / 2), s[e]); }
            }
            if (is_full) {
                softmax<false>(p, mask, s, st, pt, sees);
            } else {
                softmax<true>(p, mask, s, st, pt, sees);
            }
            mbarrier_wait(full + 16 * stage + 8, parity);
            if (is_full) {
                accumulate<false>(tile, v_lane + offset, mask, pt, sees, st);
            } else {
                accumulate<true>(tile, v_lane + offset, mask, pt, sees, st);
            }
            __syncwarp();
            if (lane == 0) { mbarrier_arrive(empty + 16 * stage + 8); }
            if (++stage == shared::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        const int64_t record = segment.whole() ? -1 : p.layout.chunk ? (int64_t)begin_of_block(p, mem.schedule) + segments : 2 * (int64_t)blockIdx.x + (segments > 0);
        if (FLOAT8) {
#pragma unroll
            for (int n = 0; n < 4 * K_STEPS; n++) { st.o[n / 4][n % 4] *= scales.v; }
        }
        finish_segment(p, mem, actor, st, segment.b, rows, sequence.sq, warp, record, joined);
        if (Shared::JOINS) { return true; }
        combine_chunks(p, actor, segment, sequence.sq, record, segments, (dec_partial *)mem.merge);
        if (actor.rehearsal) { return true; }
        segment = next;
        rows = rows_next;
    }
    return true;
}

template <class Shared> static __device__ __forceinline__ void run_block(const dec_params &p)
{
    extern __shared__ __align__(1024) char memory[];
    Shared &mem = *(Shared *)memory;
    if (!open_block(p, mem)) { return; }
    const dec_actor actor = actor_of((int)thread_index(), MERGE);
    if (!consume(p, mem, actor) || Shared::JOINS) { return; }
    if (p.counters) { combine_in_place(p, mem.schedule, (dec_partial *)mem.merge, actor.rehearsal); }
}
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _kernel)(const __grid_constant__ dec_params p) { run_block<shared>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) FGQA_SUFFIX(FGQA_ROW, _joining_kernel)(const __grid_constant__ dec_params p) { run_block<joining_shared>(p); }

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return (int32_t)sizeof(shared); }

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    static launch_state state, joining_state;
    static cluster_room room;
    const void *kernel = (const void *)FGQA_SUFFIX(FGQA_ROW, _kernel), *joining = (const void *)FGQA_SUFFIX(FGQA_ROW, _joining_kernel);
    dec_params p;
    int error = allow_shared_memory(kernel, sizeof(shared), problem->device.index, &state);
    if (error == cudaSuccess) { error = allow_clusters(joining, sizeof(shared), problem->device.index, &joining_state); }
    if (error == cudaSuccess) { error = make_params(&p, plan, problem, workspace, exec, shared::DEEP_PIECES, false); }
    if (error != cudaSuccess) { return error; }
    return join_pays(&p, joining, sizeof(shared), &room) ? launch_blocks(joining, &p, sizeof(shared), CLUSTERS, exec->stream)
         : launch_decode(kernel, &p, sizeof(shared), exec->stream);
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
