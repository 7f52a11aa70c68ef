/* decode_wide.cu - attention of 9 to 64 packed query rows of a KV head over many keys, for Hopper, on wgmma: as decode.cu, with
 * fewer instructions a key, since the tensor core reads K, Q, V and P from shared memory. Compiled once per `decodewide` row of
 * kernels.def, for N = 16, 32 and 64 rows.
 *
 * A block is two consumer warpgroups and one producer warp. Granule n of a segment, 64 keys, belongs to stream (= warpgroup)
 * n % STREAMS, which has its own ring and its own m, l, o. Of a granule:
 *
 *   S^T[64 keys x N rows] = K Q^T           A = K, B = Q, both K-major
 *   P = 2^(c (S - m)), 16 bit, to shared memory, row by row
 *   O^T[D columns x N rows] += V^T P^T      A = V, 64 columns contiguous: transposed; B = P
 *
 *   barrier                    arrivals                                  waited for by
 *   full[stream][stage][KV]    producer lane (1) + bytes                 the warpgroup
 *   empty[stream][stage][KV]   the warpgroup's warps (4)                 producer lane
 *   named MERGE                consumers                                 Q in place; end of a segment
 *   named COMBINE, + 1         warps that merge records                  dec_combine.cuh
 *   named VOTE + stream        the warpgroup                             "a score exceeds m"; and the P before is not read any more
 *   named READY + stream       the warpgroup                             P and cleared V are visible; warp_part is complete
 *
 * A tile is D / 64 chunks of 64 columns, of 64 rows of 128 bytes, with the swizzle of TMA.
 */
#include "../common/launch.cuh"
#include "../common/params.cuh"
#include "../kernel_table.h"
#include "dec_work.h"

#define FGQA_ROW FGQA_ROW_CAT(FGQA_PASS, FGQA_ARCH, FGQA_DTYPE, FGQA_D, FGQA_DV, FGQA_VARIANT)

#ifndef FGQA_NO_CODE

#include "../common/numeric.cuh"
#include "../common/ptx_ldmatrix.cuh"

typedef FGQA_DTYPE T;
static constexpr bool FLOAT8 = FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_decodewidef8;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, GRANULE = FGQA_BLOCK_K;

#include "../sm80/gemm.cuh"
#include "dec_combine.cuh"
#include "dec_launch.cuh"
#include "dec_produce.cuh"

static constexpr int STREAMS = 2, CONSUMERS = 4 * STREAMS, CONSUMER_THREADS = 32 * CONSUMERS, THREADS = 32 * FGQA_WARPS;
static constexpr int MERGE_PITCH = D + 4, MERGE = 1, VOTE = 4, READY = 6;
static constexpr float LAZY = 8.0f;     /* o and l are rescaled only when a score exceeds m by that, in powers of two */
static_assert(GRANULE == 64 && BLOCK_Q == 64 && FGQA_WARPS == CONSUMERS + 1, "kernels.def: granules of 64 keys, 64 rows, two warpgroups and a producer");

template <int N> struct wide_shared {
    static constexpr int STAGES = N <= 32 ? FGQA_STAGES : FGQA_STAGES - 1;
    alignas(1024) char ring[STREAMS][STAGES][2][TILE_BYTES];
    alignas(1024) char q[CHUNKS][N][128];
    alignas(1024) char pt[STREAMS][N][128];             /* 64 keys a row */
    alignas(16) float merge[N][MERGE_PITCH];            /* o, m of stream 1, unused, m and l of the sum */
    float warp_part[STREAMS][4][N];                     /* a warp's maxima of a tile; its sums at the end of a segment */
    fgqa_range rows[N];                                 /* slots each row sees */
    uint64_t full[STREAMS][STAGES][2], empty[STREAMS][STAGES][2];
    int32_t pages[2 * STREAMS][PAGES_AHEAD * PIECES];
    dec_schedule schedule;
};

template <int N> static __device__ __forceinline__ void produce(const dec_params &p, wide_shared<N> &mem, int lane)
{
    constexpr int STAGES = wide_shared<N>::STAGES;
    const int stream = lane / 2 % STREAMS, kv = lane % 2;
    const tile_source source = {kv ? &p.v_map : &p.k_map, kv ? p.v_boxes : p.k_boxes, createpolicy_evict_first()};
    const bool pieces = has_pieces(p.common.problem.cache);
    const uint32_t ring = smem_address(mem.ring[stream][0][kv]);
    const uint32_t full = smem_address(&mem.full[stream][0][kv]), empty = smem_address(&mem.empty[stream][0][kv]);
    granule_walk<STREAMS> walk(p, mem.schedule, stream, lane < 2 * STREAMS);
    page_queue<STREAMS> pages(p, mem.schedule, walk, smem_address(mem.pages[lane % (2 * STREAMS)]));
    int stage = 0;
    uint32_t parity = 1;                        /* the first pass over the ring finds it empty */
    while (__any_sync(0xFFFFFFFFu, walk.valid())) {
        if (walk.valid() && mbarrier_test(empty + 16 * stage, parity)) {
            const uint32_t bar = full + 16 * stage, tile = ring + 2 * TILE_BYTES * stage;
            const int32_t slot = walk.slot(), kv_head = p.by_row_blocks(walk.segment.h);
            int32_t page[PIECES];
            pages.take(p, mem.schedule, walk, page);
            mbarrier_arrive_expect_tx(bar, TILE_BYTES);
            if (pieces) {
#pragma unroll
                for (int n = 0; n < PIECES; n++) {
                    load_boxes(source, tile + n * PIECE * 128, CHUNK_BYTES, bar, in_page(p, slot + n * PIECE), kv_head, page[n]);
                }
            } else {
                load_boxes(source, tile, CHUNK_BYTES, bar, in_page(p, slot), kv_head, page[0]);
            }
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1;
            }
            walk.advance(p, mem.schedule);
        }
        __syncwarp();
    }
}

/* Register 4 n + e of an accumulator: key or column 16 warp + lane / 4 + 8 (e / 2), row 8 n + 2 (lane % 4) + e % 2, which is
 * number 2 n + e % 2 of the lane's rows. */
template <int N> struct state {
    float o[CHUNKS][N / 2];
    float m[N / 4];             /* equal in all warps of the stream */
    float l[N / 4];             /* over this thread's keys only */
};

static __device__ __forceinline__ int row_of(int number, int lane) { return 8 * (number / 2) + 2 * (lane % 4) + number % 2; }

/* Q of a pair in this thread's 16-byte pieces, zero where there is none; then to shared memory. Fetched a segment ahead: behind
 * the K/V stream of all SMs a load takes 4 to 5 us. */
template <int N> struct q_pieces {
    static constexpr int ROW = D / 8, COUNT = (N * ROW + CONSUMER_THREADS - 1) / CONSUMER_THREADS;
    uint4 piece[COUNT];

    __device__ __forceinline__ void fetch(const dec_params &p, int32_t b, const pair_rows &rows)
    {
        const fgqa_problem &problem = p.common.problem;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const int item = (int)thread_index() + n * CONSUMER_THREADS, local = item / ROW, column = item % ROW * 8;
            piece[n] = make_uint4(0, 0, 0, 0);
            if (local < rows.valid && column < problem.d) {
                piece[n] = *(const uint4 *)(fgqa_row_address(problem.view[FGQA_ARG_q], sizeof(T), b, rows.kv_head * problem.g + rows.rows.h(local),
                                                             rows.rows.i(local)) + 2 * column);
            }
        }
    }
    __device__ __forceinline__ void place(wide_shared<N> &mem) const
    {
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const int item = (int)thread_index() + n * CONSUMER_THREADS, local = item / ROW, at = item % ROW;
            if (local < N) { *(uint4 *)&mem.q[at / 8][local][16 * ((at % 8) ^ (local % 8))] = piece[n]; }
        }
        fence_proxy_async();
    }
};

/* New reference maximum over the tile, and o and l relative to it. Rare after the first tiles. */
template <int N> static __device__ __forceinline__ void raise_max(const dec_params &p, wide_shared<N> &mem, int stream, const float (&s)[N / 2], state<N> &st)
{
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int r = 4 * (j / 2) + j % 2;
        float m = fmaxf(s[r], s[r + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) { m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, d)); }
        if (lane < 4) { mem.warp_part[stream][warp][row_of(j, lane)] = m; }
    }
    bar_sync((uint32_t)(READY + stream), 128);
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int r = 4 * (j / 2) + j % 2;
        float m = st.m[j];
#pragma unroll
        for (int w = 0; w < 4; w++) { m = fmaxf(m, mem.warp_part[stream][w][row_of(j, lane)]); }
        const float alpha = m == -INFINITY ? 1.0f : ex2((st.m[j] - m) * p.scale_log2);
        st.m[j] = m;
        st.l[j] *= alpha;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            st.o[chunk][r] *= alpha;
            st.o[chunk][r + 2] *= alpha;
        }
    }
}

/* inf and NaN of values that some rows see go to those alone, and out of the tile. `some`: keys that not all rows see, as
 * rows of the tile outside [full.begin, full.end). The warpgroup. */
template <int N> static __device__ __forceinline__ void take_poison(wide_shared<N> &mem, int stream, uint32_t v_tile, int32_t first, fgqa_range full, state<N> &st)
{
    constexpr uint32_t EXPONENT = __is_same(T, bf16) ? 0x7F80 : 0x7C00, ITEMS = GRANULE * CHUNKS * 8;
    const uint32_t thread = thread_index() % 128;
    const int lane = (int)(thread % 32), warp = (int)(thread / 32);
    bool any = false;
    for (uint32_t item = thread; item < ITEMS; item += 128) {
        const int32_t key = (int32_t)(item / 8 % GRANULE);
        if (key >= full.begin && key < full.end) { continue; }
        uint32_t x[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(v_tile + 16 * item) : "memory");
#pragma unroll
        for (int n = 0; n < 4; n++) { any |= (x[n] & EXPONENT) == EXPONENT || (x[n] >> 16 & EXPONENT) == EXPONENT; }
    }
    if (!bar_any((uint32_t)(READY + stream), 128, any)) { return; }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = 16 * warp + lane / 4 + 8 * half;
#pragma unroll 1
            for (int32_t key = 0; key < GRANULE; key++) {
                if (key >= full.begin && key < full.end) { continue; }
                uint16_t bits;
                asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(v_tile + chunk * CHUNK_BYTES + key * 128 + 16 * ((column / 8) ^ (key % 8)) + 2 * (column % 8)) : "memory");
                if ((bits & EXPONENT) != EXPONENT) { continue; }
                const float value = __is_same(T, bf16) ? __uint_as_float((uint32_t)bits << 16) : __half2float(__ushort_as_half(bits));
#pragma unroll
                for (int j = 0; j < N / 4; j++) {
                    const fgqa_range row = mem.rows[row_of(j, lane)];
                    if (row.begin <= first + key && first + key < row.end) { st.o[chunk][4 * (j / 2) + j % 2 + 2 * half] += value; }
                }
            }
        }
    }
    bar_sync((uint32_t)(READY + stream), 128);
    for (uint32_t item = thread; item < ITEMS; item += 128) {
        const int32_t key = (int32_t)(item / 8 % GRANULE);
        if (key >= full.begin && key < full.end) { continue; }
#pragma unroll
        for (int n = 0; n < 8; n++) {
            uint16_t bits;
            asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(v_tile + 16 * item + 2 * n) : "memory");
            if ((bits & EXPONENT) == EXPONENT) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(v_tile + 16 * item + 2 * n), "h"((uint16_t)0) : "memory"); }
        }
    }
}

/* What a thread needs of a tile that not all rows see in full; rows of the tile, from its slot `first` on. */
struct tile_mask { int32_t first; fgqa_range seen, full; bool rows_differ; };

/* One tile. K's barriers; V's tile and barriers follow. */
template <int N> static __device__ __forceinline__ void attend_tile(const dec_params &p, wide_shared<N> &mem, int stream, uint32_t k_tile, uint32_t k_bar,
                                                                    uint32_t empty_bar, uint32_t parity, const tile_mask &mask, state<N> &st)
{
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4;
    const uint32_t v_tile = k_tile + TILE_BYTES, pt = smem_address(mem.pt[stream]);
    const bool is_full = mask.full.begin <= 0 && mask.full.end >= GRANULE;
    float s[N / 2];

    mbarrier_wait(k_bar, parity);
    const uint64_t k_desc = wgmma_desc_sw128(k_tile, 16, 1024), q_desc = wgmma_desc_sw128(smem_address(mem.q), 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {          /* 16 columns: 32 bytes along a row; descriptors count 16 bytes */
        wgmma_turned<0>(s, k_desc + (k / 4 * CHUNK_BYTES + k % 4 * 32) / 16, q_desc + (k / 4 * N * 128 + k % 4 * 32) / 16, k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
    if (lane == 0) { mbarrier_arrive(empty_bar); }

    bool grows = false;
    const float lazy = LAZY / p.scale_log2;
    if (!is_full) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const fgqa_range row = mem.rows[row_of(j, lane)];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int32_t slot = mask.first + 16 * warp + lane / 4 + 8 * half;
                if (slot < row.begin || slot >= row.end) { s[4 * (j / 2) + j % 2 + 2 * half] = -INFINITY; }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < N / 2; r++) { grows |= s[r] > st.m[r / 4 * 2 + r % 2] + lazy; }
    if (bar_any((uint32_t)(VOTE + stream), 128, grows)) { raise_max(p, mem, stream, s, st); }
#pragma unroll
    for (int r = 0; r < N / 2; r++) {
        const int j = r / 4 * 2 + r % 2;
        s[r] = ex2((s[r] - finite_max(st.m[j])) * p.scale_log2);
        st.l[j] += s[r];
    }
#pragma unroll
    for (int u = 0; u < N / 16; u++) {          /* matrices (rows 16 u + 0-7 | 8-15) x (keys 0-7 | 8-15), key half first */
        const int row = 16 * u + 8 * (lane / 16) + lane % 8, piece = 2 * warp + lane / 8 % 2;
        stmatrix_x4_trans(pt + row * 128 + 16 * (piece ^ (lane % 8)), pack2(s[8 * u], s[8 * u + 1], T()), pack2(s[8 * u + 2], s[8 * u + 3], T()),
                          pack2(s[8 * u + 4], s[8 * u + 5], T()), pack2(s[8 * u + 6], s[8 * u + 7], T()));
    }

    mbarrier_wait(k_bar + 8, parity);
    if (!is_full) {                             /* unseen keys have p = 0, but 0 * NaN is NaN */
        for (uint32_t item = thread_index() % 128; item < GRANULE * CHUNKS * 8; item += 128) {
            const int32_t key = (int32_t)(item / 8 % GRANULE);
            if (key < mask.seen.begin || key >= mask.seen.end) {
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(v_tile + 16 * item), "r"(0) : "memory");
            }
        }
        if (mask.rows_differ) { take_poison(mem, stream, v_tile, mask.first, mask.full, st); }
    }
    fence_proxy_async();
    bar_sync((uint32_t)(READY + stream), 128);
    const uint64_t v_desc = wgmma_desc_sw128(v_tile, CHUNK_BYTES, 1024), p_desc = wgmma_desc_sw128(pt, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
        for (int k = 0; k < GRANULE / 16; k++) {        /* 16 keys: 16 rows of V, 32 bytes of P */
            wgmma_turned<1>(st.o[chunk], v_desc + (chunk * CHUNK_BYTES + k * 2048) / 16, p_desc + k * 32 / 16, 1);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) { wgmma_pin(st.o[chunk]); }
    if (lane == 0) { mbarrier_arrive(empty_bar + 8); }
}

/* Consumers: sum of the two streams; a whole pair goes to the result, a part to its record. */
template <int N> static __device__ __forceinline__ void finish_segment(const dec_params &p, wide_shared<N> &mem, const state<N> &st, int32_t b, const pair_rows &rows,
                                                                       int32_t sq, int stream, int64_t record)
{
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const int row = row_of(j, lane), r = 4 * (j / 2) + j % 2;
        float l = st.l[j];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) { l += __shfl_xor_sync(0xFFFFFFFFu, l, d); }
        if (lane < 4) { mem.warp_part[stream][warp][row] = l; }
        if (stream == 1) {
            if (warp == 0 && lane < 4) { mem.merge[row][D] = st.m[j]; }
#pragma unroll
            for (int n = 0; n < 2 * CHUNKS; n++) { mem.merge[row][64 * (n / 2) + 16 * warp + lane / 4 + 8 * (n % 2)] = st.o[n / 2][r + 2 * (n % 2)]; }
        }
    }
    bar_sync(MERGE, CONSUMER_THREADS);
    if (stream == 0) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const int row = row_of(j, lane), r = 4 * (j / 2) + j % 2;
            const float m1 = mem.merge[row][D], m = fmaxf(st.m[j], m1), base = finite_max(m);
            const float w0 = ex2((st.m[j] - base) * p.scale_log2), w1 = ex2((m1 - base) * p.scale_log2);
            float l = 0.0f;
#pragma unroll
            for (int w = 0; w < 4; w++) { l += w0 * mem.warp_part[0][w][row] + w1 * mem.warp_part[1][w][row]; }
#pragma unroll
            for (int n = 0; n < 2 * CHUNKS; n++) {
                float &o = mem.merge[row][64 * (n / 2) + 16 * warp + lane / 4 + 8 * (n % 2)];
                o = w0 * st.o[n / 2][r + 2 * (n % 2)] + w1 * o;
            }
            if (warp == 0 && lane < 4) { *(float2 *)&mem.merge[row][D + 2] = make_float2(m, l); }
        }
    }
    bar_sync(MERGE, CONSUMER_THREADS);
    for (int item = (int)thread_index(); item < rows.valid * (D / 4); item += CONSUMER_THREADS) {
        const int local = item / (D / 4), column = 4 * (item % (D / 4));
        const float4 o = *(const float4 *)&mem.merge[local][column];
        const float2 ml = *(const float2 *)&mem.merge[local][D + 2];
        const dec_partial sum = {ml.x, ml.y, {o.x, o.y, o.z, o.w}};
        store_segment(p, b, rows, sq, local, column, record, sum);
    }
    bar_sync(MERGE, CONSUMER_THREADS);          /* merge, q and rows are free again; every record of the segment is written */
}

template <int N> static __device__ __forceinline__ void consume(const dec_params &p, wide_shared<N> &mem, int stream)
{
    dec_segment segment = first_segment(p, mem.schedule);
    pair_rows rows = pair_rows_of(p, segment.h), rows_next = rows;
    q_pieces<N> q;
    q.fetch(p, segment.b, rows);
    int stage = 0;
    uint32_t parity = 0;
    for (int segments = 0; segment.valid(); segments++) {
        dec_segment next = segment;
        next.next(p, mem.schedule);
        const dec_sequence sequence = sequence_of(p, mem.schedule, segment.b);
        const fgqa_mask rule = mask_of(p, sequence);
        const pair_slots slots = pair_slots_of(rule, sequence, rows);
        if (thread_index() < N) { mem.rows[thread_index()] = slots_of_row(rule, sequence, rows, (int32_t)thread_index()); }
        q.place(mem);
        bar_sync(MERGE, CONSUMER_THREADS);
        if (next.valid()) {
            rows_next = pair_rows_of(p, next.h);
            q.fetch(p, next.b, rows_next);
        }
        state<N> st = {};
#pragma unroll
        for (int j = 0; j < N / 4; j++) { st.m[j] = -INFINITY; }
        for (int32_t g = segment.g0 + stream; g < segment.g1; g += STREAMS) {
            const int32_t first = (segment.span.first + g) * GRANULE;
            const tile_mask mask = {first, {slots.seen.begin - first, slots.seen.end - first}, {slots.full.begin - first, slots.full.end - first},
                                    p.common.problem.sq > 1};
            attend_tile(p, mem, stream, smem_address(mem.ring[stream][stage][0]), smem_address(&mem.full[stream][stage][0]),
                        smem_address(&mem.empty[stream][stage][0]), parity, mask, st);
            if (++stage == wide_shared<N>::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        const int64_t record = segment.whole() ? -1 : p.layout.chunk ? (int64_t)mem.schedule.begin + segments : 2 * (int64_t)blockIdx.x + (segments > 0);
        finish_segment(p, mem, st, segment.b, rows, sequence.sq, stream, record);
        segment = next;
        rows = rows_next;
    }
}

template <int N> static __global__ void __launch_bounds__(THREADS, 1) decode_wide_kernel(const __grid_constant__ dec_params p)
{
    extern __shared__ __align__(1024) char memory[];
    wide_shared<N> &mem = *(wide_shared<N> *)memory;
    const int warp = (int)thread_index() / 32, lane = (int)thread_index() % 32;
    if (warp == CONSUMERS) {
        if (lane == 0) {
            prefetch_tensormap(&p.k_map);
            prefetch_tensormap(&p.v_map);
        }
        for (int n = lane; n < STREAMS * wide_shared<N>::STAGES * 2; n += 32) {
            mbarrier_init(smem_address(&mem.full[0][0][0] + n), 1);
            mbarrier_init(smem_address(&mem.empty[0][0][0] + n), 4);
        }
        fence_mbarrier_init();
        make_schedule(p, mem.schedule, lane);
    }
    __syncthreads();
    if ((int32_t)blockIdx.x >= mem.schedule.split.blocks) { return; }
    if (warp == CONSUMERS) {
        produce(p, mem, lane);
        return;
    }
    consume(p, mem, warp / 4);
    if (p.counters) { combine_in_place(p, mem.schedule, CONSUMERS, (dec_partial *)mem.merge); }
}

template <int N> static cudaError_t run(dec_params *p, int32_t device, void *stream)
{
    static launch_state state;
    constexpr int32_t BYTES = sizeof(wide_shared<N>);
    static_assert(BYTES <= 227 * 1024, "kernels.def: the stages fit into shared memory");
    const void *kernel = (const void *)decode_wide_kernel<N>;
    const cudaError_t error = allow_shared_memory(kernel, BYTES, device, &state);
    return error != cudaSuccess ? error : launch_decode(kernel, p, THREADS, BYTES, stream);
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void)
{
    return (int32_t)(sizeof(wide_shared<32>) > sizeof(wide_shared<64>) ? sizeof(wide_shared<32>) : sizeof(wide_shared<64>));
}

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    dec_params p;
    const int error = make_params(&p, plan, problem, workspace, exec);
    if (error != cudaSuccess) { return error; }
    if (p.layout.rows <= 16) { return run<16>(&p, problem->device.index, exec->stream); }
    if (p.layout.rows <= 32) { return run<32>(&p, problem->device.index, exec->stream); }
    return run<64>(&p, problem->device.index, exec->stream);
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
