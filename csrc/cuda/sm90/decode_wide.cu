/* decode_wide.cu - attention of 9 to 128 packed query rows of a KV head over many keys, for Hopper, on wgmma: as decode.cu, with
 * fewer instructions a key, since the tensor core reads K, Q, V and P from shared memory. Compiled once per `decodewide` row of
 * kernels.def.
 *
 * Consumers are two warpgroups, of N rows each, in one of two ways:
 *   STREAMS 2   up to 64 rows, the same for both; granule n of a segment, 64 keys, belongs to stream (= warpgroup) n % 2, which has
 *               its own ring and its own m, l, o
 *   STREAMS 1   up to 128 rows, half of them each; both read every granule of one ring
 * The other warps: dec_block.cuh, with most barriers. Of a granule:
 *
 *   S^T[64 keys x N rows] = K Q^T           A = K, B = Q, both K-major
 *   P = 2^(c (S - m)), 16 bit, to shared memory, row by row
 *   O^T[D columns x N rows] += V^T P^T      A = V, 64 columns contiguous: transposed; B = P
 *
 *   barrier                    arrivals                                  waited for by
 *   named MERGE                consumers                                 Q in place; end of a segment
 *   named COMBINE, + 1         warps that merge records                  dec_combine.cuh
 *   named VOTE + group         the warpgroup                             "a score exceeds m"; and the P before is not read any more
 *   named READY + group        the warpgroup                             P and cleared V are visible; warp_part is complete
 *   named TEAM + stream        the stream's warpgroups                   where both clear one tile of V
 *   cluster, twice             consumers of two blocks                   both are past their tiles; halves of their sums are exchanged
 *
 * A tile is D / 64 chunks of 64 columns, of 64 rows of 128 bytes, with the swizzle of TMA. Variant decodewidef8: one chunk of 128
 * columns of float8, and A comes from registers (dec_wide_float8.cuh).
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
static constexpr bool FLOAT8 = FGQA_SUFFIX(FGQA_VARIANT_, FGQA_VARIANT) == FGQA_VARIANT_decodewidef8;
static constexpr int D = FGQA_D, DV = FGQA_DV, BLOCK_Q = FGQA_BLOCK_Q, GRANULE = FGQA_BLOCK_K;

#include "../sm80/gemm.cuh"
#include "dec_block.cuh"
#include "dec_join.cuh"
#include "dec_launch.cuh"
#include "dec_score.cuh"
#include "dec_wide_float8.cuh"

static constexpr int CONSUMER_THREADS = 32 * CONSUMERS, CHUNKS = D / 64;
static constexpr int MERGE = 1, VOTE = 4, READY = 6, TEAM = 10;
static_assert(GRANULE == 64 && BLOCK_Q == 128, "kernels.def: granules of 64 keys, 128 rows");

typedef std::conditional<FLOAT8, f16, T>::type product;

/* FOLDS: chunks may be added up in registers; a kernel of its own, for the registers that takes. JOINS: clusters have a pair
 * each. */
template <int N_, int STREAMS_, bool FOLDS_ = false, bool JOINS_ = false> struct wide_shared {
    static constexpr int N = N_, STREAMS = STREAMS_, GROUPS = 2 / STREAMS, ROWS = N * GROUPS;       /* warpgroups of a stream */
    static constexpr bool FOLDS = FOLDS_, JOINS = JOINS_, PIECE_LANES = false, HALVES = N >= 32 && !FLOAT8 && !FOLDS && !JOINS, Q_KEPT = ROWS <= 32;
    static constexpr int READERS = 4 * GROUPS, STAGES = (N <= 32 ? FGQA_STAGES : FGQA_STAGES - 1) * GROUPS;
    alignas(1024) char ring[STREAMS][STAGES][2][TILE_BYTES];
    alignas(1024) char q[CHUNKS][ROWS][128];
    union alignas(1024) group_memory {
        char pt[N][128];                                /* 64 keys a row */
        float away[N / 4 * CHUNKS][128];                /* at a segment's end, sums that go to the other stream: [row][thread of the group][ITEM] */
    } of_group[2];
    float warp_part[2][4][N];                           /* a warp's maxima of a tile; its sums at the end of a segment */
    float row_max[2][N];                                /* at the end of a segment */
    float row_scale[ROWS];
    char *row_out[ROWS];                                /* where the results go */
    fgqa_range rows[ROWS];                              /* slots each row sees */
    float unit[ROWS];                                   /* of each row's scores, over float8 */
    chain_row chain[ROWS];
    uint64_t full[STREAMS][STAGES][2], empty[STREAMS][STAGES][2];
    int32_t pages[2 * STREAMS][PAGES_AHEAD * PIECES];
    dec_schedule schedule;
};

/* Register 4 n + e of an accumulator: key or column 16 warp + lane / 4 + 8 (e / 2), row 8 n + 2 (lane % 4) + e % 2, which is
 * number 2 n + e % 2 of the lane's rows. */
template <int N> struct state {
    float o[CHUNKS][N / 2];
    float m[N / 4];             /* equal in all warps of the group */
    float l[N / 4];             /* over this thread's keys only */
};

static __device__ __forceinline__ int row_of(int number, int lane) { return 8 * (number / 2) + 2 * (lane % 4) + number % 2; }

/* Of registers 4 n + 2 half + {0, 1} of o[chunk]. */
static __device__ __forceinline__ int out_column(int chunk, int half, int warp, int lane)
{
    return FLOAT8 ? 32 * warp + 16 * chunk + 2 * (lane / 4) + half : 64 * chunk + 16 * warp + lane / 4 + 8 * half;
}

/* Q of a pair in 16-byte pieces, zero where there is none, to shared memory. Behind the K/V stream of all SMs a load takes 4
 * to 5 us: few rows are fetched a segment ahead, into registers; many, for which there are none, into L2. */
template <int ROWS> struct q_pieces {
    static constexpr bool KEPT = ROWS <= 32;        /* Q_KEPT above */
    static constexpr int PIECES_OF_ROW = D / 8, COUNT = (ROWS * PIECES_OF_ROW + CONSUMER_THREADS - 1) / CONSUMER_THREADS;
    uint4 piece[KEPT ? COUNT : 1];

    static __device__ __forceinline__ const uint4 *from(const dec_params &p, int32_t b, const pair_rows &rows, int n)
    {
        const fgqa_problem &problem = p.common.problem;
        const int item = (int)thread_index() + n * CONSUMER_THREADS, local = item / PIECES_OF_ROW, column = item % PIECES_OF_ROW * 8;
        if (local >= rows.valid || column >= problem.d) { return NULL; }
        return (const uint4 *)(fgqa_row_address(problem.view[FGQA_ARG_q], sizeof(T), b, rows.kv_head * problem.g + rows.rows.h(local), rows.rows.i(local))
                               + 2 * column);
    }
    template <class Shared> static __device__ __forceinline__ uint4 *to(Shared &mem, int n)
    {
        const int item = (int)thread_index() + n * CONSUMER_THREADS, local = item / PIECES_OF_ROW, at = item % PIECES_OF_ROW;
        return (uint4 *)&mem.q[at / 8][local][16 * ((at % 8) ^ (local % 8))];
    }

    __device__ __forceinline__ void fetch(const dec_params &p, int32_t b, const pair_rows &rows, bool first)
    {
        if (KEPT) {
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                const uint4 *x = from(p, b, rows, n);
                piece[KEPT ? n : 0] = x ? *x : make_uint4(0, 0, 0, 0);
            }
        } else if (!first) {
#pragma unroll 1
            for (int n = 0; n < COUNT; n++) {
                if (const uint4 *x = from(p, b, rows, n)) { prefetch_l2(x); }
            }
        }
    }
    /* Both of the pair that was fetched last. */
    template <class Shared> __device__ __forceinline__ void begin_place(Shared &mem, const dec_params &p, int32_t b, const pair_rows &rows) const
    {
        if (!KEPT) {
#pragma unroll 1
            for (int n = 0; n < COUNT; n++) {   /* an address takes less time than the instructions of four would take to arrive */
                const uint4 *x = from(p, b, rows, n);
                cp_async_16(smem_address(to(mem, n)), x ? (const void *)x : p.common.problem.view[FGQA_ARG_q].data, x ? 16 : 0);
            }
            cp_async_commit();
        }
    }
    template <class Shared> __device__ __forceinline__ void end_place(Shared &mem, const float8_scales &scales) const
    {
        if (FLOAT8) {
            if (!KEPT) { cp_async_wait<0>(); }
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                const int item = (int)thread_index() + n * CONSUMER_THREADS, local = item / PIECES_OF_ROW, at = item % PIECES_OF_ROW;
                const float power = float8_place_q(mem.q[0][local], sizeof(mem.q[0]), local, at, KEPT ? piece[KEPT ? n : 0] : *to(mem, n));
                if (at == 0) { mem.unit[local] = power * scales.k; }
            }
        } else if (KEPT) {
#pragma unroll
            for (int n = 0; n < COUNT; n++) {
                if ((int)thread_index() + n * CONSUMER_THREADS < ROWS * PIECES_OF_ROW) { *to(mem, n) = piece[KEPT ? n : 0]; }
            }
        } else {
            cp_async_wait<0>();
        }
        fence_proxy_async();
    }
};

/* Of N / 4 numbers of each lane those over lanes of equal lane % 4, added up or otherwise joined. Number lane / 4 + 8 n comes
 * to be x[n], of 4 numbers lane / 4 % 4. */
template <int COUNT, class Join> static __device__ __forceinline__ void join_by_rows(float (&x)[COUNT], int lane, const Join &join)
{
    constexpr int BITS = COUNT >= 8 ? 3 : 2;
#pragma unroll
    for (int bit = BITS - 1; bit >= 0; bit--) {         /* numbers with and without the bit change places with those of the other lane */
        const bool upper = lane >> (2 + bit) & 1;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            if (n >> bit & 1 || n % 8 >= 2 << bit) { continue; }
            const float keep = upper ? x[n | 1 << bit] : x[n], give = upper ? x[n] : x[n | 1 << bit];
            x[n] = join(keep, __shfl_xor_sync(0xFFFFFFFFu, give, 4 << bit));
        }
    }
    if (BITS == 2) { x[0] = join(x[0], __shfl_xor_sync(0xFFFFFFFFu, x[0], 16)); }
#pragma unroll
    for (int n = 1; n < COUNT / 8; n++) { x[n] = x[8 * n]; }
}

/* New reference maximum over the tile, and o and l relative to it. Rare after the first tiles; at the first one, for which all
 * wait, there is nothing yet to be relative. */
template <class Shared, int N> static __device__ __forceinline__ void raise_max(const dec_params &p, Shared &mem, int group, bool first, const float (&s)[N / 2], state<N> &st)
{
    constexpr int COUNT = N / 4, KEPT = COUNT >= 8 ? COUNT / 8 : 1;
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4;
    float top[COUNT];
#pragma unroll
    for (int j = 0; j < COUNT; j++) { top[j] = fmaxf(s[4 * (j / 2) + j % 2], s[4 * (j / 2) + j % 2 + 2]); }
    join_by_rows(top, lane, [](float a, float b) { return fmaxf(a, b); });
    if (lane < 4 * COUNT) {
#pragma unroll
        for (int n = 0; n < KEPT; n++) { mem.warp_part[group][warp][row_of(lane / 4 + 8 * n, lane)] = top[n]; }
    }
    bar_sync((uint32_t)(READY + group), 128);
    const auto raised = [&](int j) {
        float2 m = make_float2(st.m[j], st.m[j + 1]);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            const float2 part = *(const float2 *)&mem.warp_part[group][w][row_of(j, lane)];
            m = make_float2(fmaxf(m.x, part.x), fmaxf(m.y, part.y));
        }
        return m;
    };
    if (first) {
#pragma unroll
        for (int j = 0; j < COUNT; j += 2) {
            const float2 m = raised(j);
            st.m[j] = m.x;
            st.m[j + 1] = m.y;
        }
        return;
    }
#pragma unroll
    for (int j = 0; j < COUNT; j += 2) {
        const float2 m = raised(j);
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int r = 2 * j + e;
            const float own = e ? m.y : m.x, alpha = own == -INFINITY ? 1.0f : ex2((st.m[j + e] - own) * p.scale_log2);
            st.m[j + e] = own;
            st.l[j + e] *= alpha;
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                st.o[chunk][r] *= alpha;
                st.o[chunk][r + 2] *= alpha;
            }
        }
    }
}

/* inf and NaN of values that some rows see go to those alone, and out of the tile. `some`: keys that not all rows see, as
 * rows of the tile outside [full.begin, full.end). The stream. */
template <class Shared, int N> static __device__ __forceinline__ void take_poison(Shared &mem, int group, uint32_t v_tile, int32_t first, fgqa_range full, state<N> &st)
{
    constexpr uint32_t EXPONENT = __is_same(T, bf16) ? 0x7F80 : 0x7C00, ITEMS = GRANULE * CHUNKS * 8;
    constexpr uint32_t TEAM_THREADS = 128 * Shared::GROUPS;
    const uint32_t thread = thread_index() % TEAM_THREADS, team = (uint32_t)(TEAM + group / Shared::GROUPS);
    const int lane = (int)(thread % 32), warp = (int)(thread / 32 % 4), row0 = Shared::GROUPS == 2 ? group * N : 0;
    bool any = false;
    for (uint32_t item = thread; item < ITEMS; item += TEAM_THREADS) {
        const int32_t key = (int32_t)(item / 8 % GRANULE);
        if (key >= full.begin && key < full.end) { continue; }
        uint32_t x[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(v_tile + 16 * item) : "memory");
#pragma unroll
        for (int n = 0; n < 4; n++) { any |= (x[n] & EXPONENT) == EXPONENT || (x[n] >> 16 & EXPONENT) == EXPONENT; }
    }
    if (!bar_any(team, TEAM_THREADS, any)) { return; }
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
                const float value = __is_same(T, bf16) ? __uint_as_float((uint32_t)bits << 16) : to_float(f16{bits});
#pragma unroll
                for (int j = 0; j < N / 4; j++) {
                    const fgqa_range row = mem.rows[row0 + row_of(j, lane)];
                    if (row.begin <= first + key && first + key < row.end) { st.o[chunk][4 * (j / 2) + j % 2 + 2 * half] += value; }
                }
            }
        }
    }
    bar_sync(team, TEAM_THREADS);
    for (uint32_t item = thread; item < ITEMS; item += TEAM_THREADS) {
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
template <class Shared, int N> static __device__ __forceinline__ void attend_tile(const dec_params &p, Shared &mem, int group, bool first, uint32_t k_tile, uint32_t k_bar,
                                                                                  uint32_t empty_bar, uint32_t parity, const tile_mask &mask, state<N> &st)
{
    constexpr int TEAM_THREADS = 128 * Shared::GROUPS;
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4, row0 = Shared::GROUPS == 2 ? group * N : 0;
    const uint32_t v_tile = k_tile + TILE_BYTES, pt = smem_address(mem.of_group[group].pt);
    const bool is_full = mask.full.begin <= 0 && mask.full.end >= GRANULE;
    float s[N / 2];

    mbarrier_wait(k_bar, parity);
    const uint64_t k_desc = wgmma_desc_sw128(k_tile, 16, 1024), q_desc = wgmma_desc_sw128(smem_address(mem.q) + row0 * 128, 16, 1024);
    if (FLOAT8) {
        float8_scores(s, k_tile, q_desc, sizeof(mem.q[0]));
    } else {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++) {      /* 16 columns: 32 bytes along a row; descriptors count 16 bytes */
            wgmma_turned<0>(s, k_desc + (k / 4 * CHUNK_BYTES + k % 4 * 32) / 16, q_desc + (k / 4 * Shared::ROWS * 128 + k % 4 * 32) / 16, k > 0);
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
    if (lane == 0) { mbarrier_arrive(empty_bar); }
    if (FLOAT8) {
#pragma unroll
        for (int r = 0; r < N / 2; r++) { s[r] *= mem.unit[row0 + row_of(r / 4 * 2 + r % 2, lane)]; }
    }

    if (N <= 32 && p.cap_ratio != 0.0f) {
        cap_scores(s, p.cap_ratio);
    } else if (p.chain) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const chain_row row = mem.chain[row0 + row_of(j, lane)];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float &x = s[4 * (j / 2) + j % 2 + 2 * half];
                x = chain_score(p, row, mask.first + 16 * warp + lane / 4 + 8 * half, x);
            }
            if (N > 32) { asm volatile("" ::: "memory"); }      /* one row at a time: registers are few */
        }
    }

    bool grows = false;
    const float lazy = LAZY / p.scale_log2;
    if (!is_full) {
#pragma unroll
        for (int j = 0; j < N / 4; j++) {
            const fgqa_range row = mem.rows[row0 + row_of(j, lane)];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int32_t slot = mask.first + 16 * warp + lane / 4 + 8 * half;
                if (slot < row.begin || slot >= row.end) { s[4 * (j / 2) + j % 2 + 2 * half] = -INFINITY; }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < N / 2; r++) { grows |= s[r] > st.m[r / 4 * 2 + r % 2] + lazy; }
    if (bar_any((uint32_t)(VOTE + group), 128, grows)) { raise_max(p, mem, group, first, s, st); }
#pragma unroll
    for (int r = 0; r < N / 2; r++) {
        const int j = r / 4 * 2 + r % 2;
        s[r] = ex2((s[r] - finite_max(st.m[j])) * p.scale_log2);
        st.l[j] += s[r];
    }
#pragma unroll
    for (int u = 0; u < N / 16; u++) {          /* matrices (rows 16 u + 0-7 | 8-15) x (keys 0-7 | 8-15), key half first */
        const int row = 16 * u + 8 * (lane / 16) + lane % 8, piece = 2 * warp + lane / 8 % 2;
        stmatrix_x4_trans(pt + row * 128 + 16 * (piece ^ (lane % 8)), pack2(s[8 * u], s[8 * u + 1], product()),
                          pack2(s[8 * u + 2], s[8 * u + 3], product()), pack2(s[8 * u + 4], s[8 * u + 5], product()),
                          pack2(s[8 * u + 6], s[8 * u + 7], product()));
    }

    mbarrier_wait(k_bar + 8, parity);
    if (!is_full) {                             /* unseen keys have p = 0, but 0 * NaN is NaN */
        for (uint32_t item = thread_index() % TEAM_THREADS; item < TILE_BYTES / 16; item += TEAM_THREADS) {
            const int32_t key = (int32_t)(item / 8 % GRANULE);
            if (key < mask.seen.begin || key >= mask.seen.end) {
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(v_tile + 16 * item), "r"(0) : "memory");
            }
        }
        if (mask.rows_differ) {
            if constexpr (FLOAT8) {
                float8_take_nan<TEAM_THREADS>(st.o, mem.rows + row0, v_tile, mask.first, mask.full, (uint32_t)(TEAM + group / Shared::GROUPS));
            } else {
                take_poison(mem, group, v_tile, mask.first, mask.full, st);
            }
        }
    }
    fence_proxy_async();
    if (is_full || Shared::GROUPS == 1) {
        bar_sync((uint32_t)(READY + group), 128);
    } else {
        bar_sync(TEAM, TEAM_THREADS);
    }
    const uint64_t v_desc = wgmma_desc_sw128(v_tile, CHUNK_BYTES, 1024), p_desc = wgmma_desc_sw128(pt, 16, 1024);
    if constexpr (FLOAT8) {
        float8_sums(st.o, v_tile, p_desc);
    } else {
        wgmma_fence();
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
            for (int k = 0; k < GRANULE / 16; k++) {    /* 16 keys: 16 rows of V, 32 bytes of P */
                wgmma_turned<1>(st.o[chunk], v_desc + (chunk * CHUNK_BYTES + k * 2048) / 16, p_desc + k * 32 / 16, 1);
            }
        }
    }
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) { wgmma_pin(st.o[chunk]); }
    if (lane == 0) { mbarrier_arrive(empty_bar + 8); }
}

#include "dec_wide_end.cuh"

/* Whether the block has work. */
template <class Shared> static __device__ __forceinline__ bool consume(const dec_params &p, Shared &mem, const dec_actor &actor)
{
    constexpr int N = Shared::N, STREAMS = Shared::STREAMS;
    const int group = actor.thread / 128, stream = group / Shared::GROUPS;
    dec_segment segment;
    pair_rows rows = {}, rows_next;
    q_pieces<Shared::ROWS> q;
    float slope_next = 0.0f;
    float8_scales scales, scales_next = {1.0f, 1.0f};
    const auto fetch = [&](const dec_segment &first) {
        rows = pair_rows_of(p, first.h);
        q.fetch(p, first.b, rows, true);
        if (!actor.rehearsal) { q.begin_place(mem, p, first.b, rows); }
        slope_next = slope_of(p, first.b, rows, actor.thread);
        if (FLOAT8) { scales_next.fetch(p, first.b, rows.kv_head); }
    };
    dec_sequence own_sequence;
    if (Shared::JOINS) {
        segment = begin_part(p, own_sequence, fetch);
    } else if (!begin_block(p, mem, actor, segment, fetch)) {
        return false;
    }
    rows_next = rows;
    int stage = 0;
    uint32_t parity = 0;
    bool folds = false;
    chunk_sum<N / STREAMS / 4> sum;
    for (int segments = 0; segment.valid(); segments++) {
        scales = scales_next;
        if (segments > 0) { q.begin_place(mem, p, segment.b, rows); }
        dec_segment next = segment;
        next.next(p, &mem.schedule);
        const dec_sequence sequence = Shared::JOINS ? own_sequence : sequence_of(p, mem.schedule, segment.b);
        const fgqa_mask rule = mask_of(p, sequence);
        const pair_slots slots = pair_slots_of(p, rule, sequence, rows);
        if (!actor.rehearsal) {
            if (actor.thread < Shared::ROWS) {
                mem.rows[actor.thread] = slots_of_row(p, rule, sequence, rows, actor.thread);
                const chain_row chain = {diagonal_of(rule, sequence, rows, actor.thread), slope_next};
                mem.chain[actor.thread] = chain;
            }
            q.end_place(mem, scales);
        }
        actor.sync();
        if (next.valid()) {
            rows_next = pair_rows_of(p, next.h);
            q.fetch(p, next.b, rows_next, false);
            slope_next = slope_of(p, next.b, rows_next, actor.thread);
            if (FLOAT8) { scales_next.fetch(p, next.b, rows_next.kv_head); }
        }
        row_end joined;                         /* made while the first keys are on their way */
        if (Shared::JOINS) { joined = joined_end<N * ITEMS_OF_ROW>(p, segment.b, rows, sequence.sq, own_item(p)); }
        state<N> st = {};
#pragma unroll
        for (int j = 0; j < N / 4; j++) { st.m[j] = -INFINITY; }
        for (int32_t g = segment.g0 + stream; g < segment.g1 && !actor.rehearsal; g += STREAMS) {
            const int32_t first = (segment.span.first + g) * GRANULE;
            const tile_mask mask = {first, {slots.seen.begin - first, slots.seen.end - first}, {slots.full.begin - first, slots.full.end - first},
                                    p.common.problem.sq > 1};
            attend_tile(p, mem, group, g < segment.g0 + STREAMS, smem_address(mem.ring[stream][stage][0]), smem_address(&mem.full[stream][stage][0]),
                        smem_address(&mem.empty[stream][stage][0]), parity, mask, st);
            if (++stage == Shared::STAGES) {
                stage = 0;
                parity ^= 1;
            }
        }
        chunk_end chunk = WHOLE;
        if (Shared::FOLDS && p.folds) {
            if (segment.g0 == 0) {
                folds = segment.folds(p);
                sum.clear();
            }
            if (folds) { chunk = segment.g1 == segment.span.count || actor.rehearsal ? LAST : GOES_ON; }
        }
        const int64_t record = segment.whole() || chunk == LAST ? -1 : p.layout.chunk ? (int64_t)begin_of_block(p, mem.schedule) + segments : 2 * (int64_t)blockIdx.x + (segments > 0);
        if (FLOAT8) {
#pragma unroll
            for (int n = 0; n < CHUNKS * N / 2; n++) { st.o[n / (N / 2)][n % (N / 2)] *= scales.v; }
        }
        finish_segment(p, mem, actor, st, segment.b, rows, sequence.sq, group, record, chunk, sum, joined);
        if (Shared::JOINS) { return true; }
        combine_chunks(p, actor, segment, sequence.sq, record, segments, (dec_partial *)mem.of_group);
        if (actor.rehearsal) { return true; }
        segment = next;
        rows = rows_next;
    }
    return true;
}

template <class Shared> static __global__ void __launch_bounds__(THREADS, 1) decode_wide_kernel(const __grid_constant__ dec_params p)
{
    extern __shared__ __align__(1024) char memory[];
    Shared &mem = *(Shared *)memory;
    if (!open_block(p, mem)) { return; }
    const dec_actor actor = actor_of((int)thread_index(), MERGE);
    if (!consume(p, mem, actor) || Shared::JOINS) { return; }
    if (p.counters) { combine_in_place(p, mem.schedule, (dec_partial *)mem.of_group, actor.rehearsal); }
}

template <class Shared> static cudaError_t run(dec_params *p, int32_t device, void *stream)
{
    static launch_state state;
    constexpr int32_t BYTES = sizeof(Shared);
    static_assert(BYTES <= 227 * 1024, "kernels.def: the stages fit into shared memory");
    const void *kernel = (const void *)decode_wide_kernel<Shared>;
    const cudaError_t error = allow_shared_memory(kernel, BYTES, device, &state);
    return error != cudaSuccess ? error : launch_decode(kernel, p, BYTES, stream);
}

/* Up to 32 rows; parts of a pair may be joined. */
template <int N> static cudaError_t run_few(dec_params *p, int32_t device, void *stream)
{
    if constexpr (!FLOAT8) {
        typedef wide_shared<N, 2, false, true> joining;
        static launch_state state, joining_state;
        static cluster_room room;
        const void *kernel = (const void *)decode_wide_kernel<joining>;
        cudaError_t error = allow_shared_memory((const void *)decode_wide_kernel<wide_shared<N, 2>>, sizeof(joining), device, &state);      /* loads it, too */
        if (error == cudaSuccess) { error = allow_clusters(kernel, sizeof(joining), device, &joining_state); }
        if (error != cudaSuccess) { return error; }
        if (!p->halves && join_pays(p, kernel, sizeof(joining), &room)) { return launch_blocks(kernel, p, sizeof(joining), CLUSTERS, stream); }
    }
    return run<wide_shared<N, 2>>(p, device, stream);
}

extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void)
{
    const size_t bytes[] = {sizeof(wide_shared<16, 2>), sizeof(wide_shared<32, 2>), sizeof(wide_shared<64, 2>), sizeof(wide_shared<64, 1>)};
    size_t most = 0;
    for (size_t n : bytes) { most = n > most ? n : most; }
    return (int32_t)most;
}

extern "C" int FGQA_ROW(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    dec_params p;
    const int error = make_params(&p, plan, problem, workspace, exec, false, !FLOAT8);
    if (error != cudaSuccess) { return error; }
    if (p.folds) { return p.layout.rows <= 16 ? run<wide_shared<16, 2, true>>(&p, problem->device.index, exec->stream) : run<wide_shared<32, 2, true>>(&p, problem->device.index, exec->stream); }
    if (p.layout.rows <= 16) { return run_few<16>(&p, problem->device.index, exec->stream); }
    if (p.layout.rows <= 32) { return run_few<32>(&p, problem->device.index, exec->stream); }
    if (p.layout.rows <= 64) { return run<wide_shared<64, 2>>(&p, problem->device.index, exec->stream); }
    return run<wide_shared<64, 1>>(&p, problem->device.index, exec->stream);
}

#else

/* A build without machine code for sm_90a: refused before it is launched (launch.c). */
extern "C" int32_t FGQA_SUFFIX(FGQA_ROW, _smem)(void) { return -1; }
extern "C" int FGQA_ROW(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *) { return cudaErrorNoKernelImageForDevice; }

#endif
