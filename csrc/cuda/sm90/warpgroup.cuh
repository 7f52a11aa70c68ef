/* warpgroup.cuh - what one consumer warpgroup does to its 64 rows, all in registers.
 *
 * S, O and P are laid out as ptx_wgmma.cuh says: register 4 n + e of a lane is row lane / 4 + 8 (e / 2), column
 * 8 n + 2 (lane % 4) + e % 2. Index r = e / 2 names a lane's two rows.
 * Operands in shared memory: chunks of rows x 64 columns (128 bytes), 128-byte swizzle, 1024-byte aligned.
 */
#pragma once
#include "../common/numeric.cuh"
#include "../common/ptx_sync.cuh"
#include "../common/ptx_wgmma.cuh"

static constexpr int WG_ROWS = 64, CHUNK = 64;

/* A barrier that warps reach from different places in the code. bar_sync() would do on the card, whose barrier counts warps, and PTX
 * asks of its .aligned no more than that the threads of one warp are together; but compute-sanitizer wants them all at one instruction
 * then, and ends the kernel. PTX ISA, "barrier". */
PTX_FN void barrier_sync(uint32_t id, uint32_t threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* S[64 x BLOCK_K] = Q[64 x D] K^T */
template <int D, int BLOCK_K> static __device__ __forceinline__ void qk_wgmma(float (&s)[BLOCK_K / 2], uint32_t q, uint32_t k)
{
    const uint64_t dq = wgmma_desc_sw128(q, 0, 1024), dk = wgmma_desc_sw128(k, 0, 1024);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int c = i / 4, within = 32 * (i % 4);              /* bytes of 16 columns inside a chunk */
        wgmma_ss(s, dq + (c * WG_ROWS * 128 + within) / 16, dk + (c * BLOCK_K * 128 + within) / 16, i > 0);
    }
}

/* O[64 x DV] (+)= P[64 x BLOCK_K] V. Arrives on named barrier `turn` (-1: none) before k16 step HANDOFF: early enough that
 * the next warpgroup's first wgmma is queued when the last one here ends. */
template <int DV, int BLOCK_K, int HANDOFF>
static __device__ __forceinline__ void pv_wgmma(float (&o)[DV / 2], const uint32_t (&pr)[BLOCK_K / 4], uint32_t v, int accumulate, int turn)
{
    const uint64_t dv = wgmma_desc_sw128(v, BLOCK_K * 128, 1024);
#pragma unroll
    for (int i = 0; i < BLOCK_K / 16; i++) {
        if (i == HANDOFF && turn >= 0) { bar_arrive(turn, 256); }
        wgmma_rs_bt(o, pr + 4 * i, dv + i * 2048 / 16, i > 0 || accumulate);
    }
    if (HANDOFF >= BLOCK_K / 16 && turn >= 0) { bar_arrive(turn, 256); }
}

/* Scores outside [begin[r], end[r]), counted from this lane's first column of the tile, become -inf. The compares have
 * immediate operands: one instruction a score and side. */
template <int N> static __device__ __forceinline__ void hide_from(float (&s)[N], const int (&end)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (8 * (i / 4) + i % 2 >= end[(i / 2) % 2]) { s[i] = -INFINITY; }
    }
}

template <int N> static __device__ __forceinline__ void hide_before(float (&s)[N], const int (&begin)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (8 * (i / 4) + i % 2 < begin[(i / 2) % 2]) { s[i] = -INFINITY; }
    }
}

/* Running state of a lane's two rows R = 0, 1: m, row maximum (unscaled, same in the 4 lanes of a row); l, row sum (this
 * lane's columns only). A row without any key so far has m = -inf.
 * row_max: m; alpha, the factor for everything summed so far; base = scale_log2 * m. */
template <int R, bool MASKED, bool FIRST, int N>
static __device__ __forceinline__ void row_max(const float (&s)[N], float (&m)[2], float (&alpha)[2], float (&base)[2], float scale_log2)
{
    float even = s[2 * R], odd = s[2 * R + 1];
#pragma unroll
    for (int i = 4; i < N; i += 4) { even = fmaxf(even, s[i + 2 * R]); odd = fmaxf(odd, s[i + 2 * R + 1]); }
    float top = fmaxf(even, odd);
    if (!FIRST) { top = fmaxf(top, m[R]); }
    top = row_reduce_max(top);
    const float finite = MASKED ? finite_max(top) : top;
    alpha[R] = FIRST ? 0.0f : ex2((m[R] - finite) * scale_log2);
    base[R] = finite * scale_log2;
    m[R] = top;
}

/* row_exp: S <- exp2(scale_log2 * (S - m)), l. In one instruction a score, which rounds the exponent of the largest one and is
 * useless where that is enormous; there the careful pass computes it exactly. */
template <int R, bool FIRST, bool CAREFUL, int N>
static __device__ __forceinline__ void row_exp(float (&s)[N], const float (&m)[2], float (&l)[2], const float (&alpha)[2], const float (&base)[2],
                                               float scale_log2)
{
    const bool exact = CAREFUL && !(fabsf(base[R]) < 0x1p27f);
    const float top = CAREFUL ? finite_max(m[R]) : 0.0f;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 2 * R; i < N; i += 4) {
        even += s[i] = ex2(exact ? (s[i] - top) * scale_log2 : fmaf(s[i], scale_log2, -base[R]));
        odd += s[i + 1] = ex2(exact ? (s[i + 1] - top) * scale_log2 : fmaf(s[i + 1], scale_log2, -base[R]));
    }
    l[R] = FIRST ? even + odd : fmaf(l[R], alpha[R], even + odd);
}

/* The accumulator layout of S is the A-operand layout of P: pairs of neighbours, in order. */
template <typename T, int N> static __device__ __forceinline__ void pack_weights(uint32_t (&pr)[N / 2], const float (&s)[N])
{
#pragma unroll
    for (int i = 0; i < N / 2; i++) { pr[i] = pack2(s[2 * i], s[2 * i + 1], T()); }
}

template <int N> static __device__ __forceinline__ void rescale_rows(float (&o)[N], const float (&alpha)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++) { o[i] *= alpha[(i / 2) % 2]; }
}

/* Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. PTX ISA, "stmatrix". */
PTX_FN void stmatrix_x4(uint32_t addr, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

/* 0 as long as all elements are finite, NaN otherwise: 0 * x is 0 for every finite x. `pairs` of T. */
PTX_FN uint32_t poison_test(uint32_t pairs, uint32_t sum, bf16)
{
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pairs), "r"(0));
    return sum;
}

PTX_FN uint32_t poison_test(uint32_t pairs, uint32_t sum, f16)
{
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(sum) : "r"(pairs), "r"(0));
    return sum;
}
