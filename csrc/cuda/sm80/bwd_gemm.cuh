/* bwd_gemm.cuh - one product for all five of the backward pass: a warp's tile C (16 MB x 8 NB) += A B, operands in swizzled
 * shared-memory tiles. An operand lies in its tile either along the rows (its k index runs along a row) or across them.
 *
 *     S = Q K^T, dP = dO V^T     A along, B along
 *     dQ = dS K                  A along, B across
 *     dV = P^T dO, dK = dS^T Q   A across, B across
 */
#pragma once
#include "../common/fragments.cuh"
#include "../common/numeric.cuh"
#include "../common/ptx_ldmatrix.cuh"
#include "../common/swizzle.cuh"

enum { ALONG, ACROSS };

/* Registers of block `block` (16 rows of A, or 16 columns of B) at k step `step`. `line0`: the operand's first row (A) or
 * column (B), a multiple of the warp's extent in it. IS_A only orders the four 8x8 matrices. */
template <typename T, int ROW_BYTES, int HOW, bool IS_A> struct gemm_operand {
    static constexpr int PIECE = 16 / (int)sizeof(T), KSTEP = 32 / (int)sizeof(T);
    uint32_t base, bits;
    __device__ __forceinline__ gemm_operand(uint32_t tile, int line0, int lane)
    {
        const bool inner = IS_A == (HOW == ALONG);
        const int row = inner ? lane % 16 : lane % 8 + 8 * (lane / 16), first = inner ? lane / 16 : lane / 8 % 2;
        const int row0 = HOW == ALONG ? line0 : 0, piece0 = HOW == ALONG ? 0 : line0 / PIECE;
        base = tile + (row0 + row) * ROW_BYTES + (piece0 & ~7) * 16;
        bits = swizzle_bits<ROW_BYTES>(row) ^ first ^ (piece0 & 7);
    }
    __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const
    {
        if (HOW == ALONG) {
            ldmatrix_x4(r, base + block * 16 * ROW_BYTES + swizzle_step<ROW_BYTES>(bits, 2 * step));
        } else {
            ldmatrix_x4_trans(r, base + step * KSTEP * ROW_BYTES + swizzle_step<ROW_BYTES>(bits, 2 * block));
        }
    }
};

/* float32 across rows: ldmatrix cannot transpose 32-bit elements. */
template <int ROW_BYTES, bool IS_A> struct gemm_operand<f32, ROW_BYTES, ACROSS, IS_A> {
    uint32_t tile;
    int column, k;
    __device__ __forceinline__ gemm_operand(uint32_t tile, int line0, int lane) : tile(tile), column(line0 + lane / 4), k(lane % 4) {}
    __device__ __forceinline__ void load(uint32_t (&r)[4], int block, int step) const
    {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const int row = 8 * step + k + 4 * (IS_A ? n / 2 : n % 2), c = 16 * block + column + 8 * (IS_A ? n % 2 : n / 2);
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r[n]) : "r"(tile + swizzle<ROW_BYTES>(row, c / 4) + 4 * (c % 4)) : "memory");
        }
    }
};

/* C += A B over K elements of k; fragments are fetched one step ahead of the mma that use them. */
template <typename T, int K, int MB, int NB, typename A, typename B>
static __device__ __forceinline__ void warp_gemm(float (&c)[MB][NB][4], const A &a, const B &b)
{
    constexpr int STEPS = K * (int)sizeof(T) / 32, PAIRS = NB / 2;
    static_assert(NB % 2 == 0, "one load fetches two n8 blocks of B");
    constexpr int LOADS = STEPS * PAIRS, DEEP = 3;         /* B is fetched DEEP - 1 loads ahead, A one step */
    uint32_t ra[2][MB][4], rb[DEEP][4];
#pragma unroll
    for (int mb = 0; mb < MB; mb++) { a.load(ra[0][mb], mb, 0); }
#pragma unroll
    for (int n = 0; n < DEEP - 1 && n < LOADS; n++) { b.load(rb[n], n % PAIRS, n / PAIRS); }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            const int now = step * PAIRS + pair, next = now + DEEP - 1;
            if (next < LOADS) { b.load(rb[next % DEEP], next % PAIRS, next / PAIRS); }
            if (pair == 0 && step + 1 < STEPS) {
#pragma unroll
                for (int mb = 0; mb < MB; mb++) { a.load(ra[(step + 1) % 2][mb], mb, step + 1); }
            }
#pragma unroll
            for (int mb = 0; mb < MB; mb++) {
                mma_step(c[mb][2 * pair], ra[step % 2][mb], rb[now % DEEP][0], rb[now % DEEP][1], T());
                mma_step(c[mb][2 * pair + 1], ra[step % 2][mb], rb[now % DEEP][2], rb[now % DEEP][3], T());
            }
        }
    }
}

template <typename T> static __device__ __forceinline__ uint32_t finite_or_zero(uint32_t x, T)
{
    constexpr uint32_t EXPONENT = __is_same(T, bf16) ? 0x7F80u : 0x7C00u;
    if ((x & EXPONENT) == EXPONENT) { x &= 0xFFFF0000u; }
    if ((x >> 16 & EXPONENT) == EXPONENT) { x &= 0x0000FFFFu; }
    return x;
}

static __device__ __forceinline__ uint32_t finite_or_zero(uint32_t x, f32) { return (x & 0x7F800000u) == 0x7F800000u ? 0 : x; }

/* The same with non-finite elements of B taken as 0: weights of unseen keys are exactly 0, but 0 * NaN is NaN. A row that
 * does see such an element has NaN weights already, or what add_poison() adds. */
template <typename T, int K, int MB, int NB, typename A, typename B>
static __device__ __forceinline__ void warp_gemm_finite(float (&c)[MB][NB][4], const A &a, const B &b)
{
#pragma unroll 1
    for (int step = 0; step < K * (int)sizeof(T) / 32; step++) {
        uint32_t ra[MB][4];
#pragma unroll
        for (int mb = 0; mb < MB; mb++) { a.load(ra[mb], mb, step); }
#pragma unroll
        for (int pair = 0; pair < NB / 2; pair++) {
            uint32_t rb[4];
            b.load(rb, pair, step);
#pragma unroll
            for (int n = 0; n < 4; n++) { rb[n] = finite_or_zero(rb[n], T()); }
#pragma unroll
            for (int mb = 0; mb < MB; mb++) {
                mma_step(c[mb][2 * pair], ra[mb], rb[0], rb[1], T());
                mma_step(c[mb][2 * pair + 1], ra[mb], rb[2], rb[3], T());
            }
        }
    }
}
