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

/* A barrier that warps reach from different places in the code. bar_sync() would do on the card, whose barrier counts warps,
 * and PTX asks of its .aligned no more than that the threads of one warp are together; but compute-sanitizer wants them all at
 * one instruction then, and ends the kernel. PTX ISA, "barrier". */
PTX_FN void barrier_sync(uint32_t id, uint32_t threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* The low half of the descriptors of a block of K or V: what a ring's stage changes. Carried from step to step it is there
 * when the first product can begin. */
PTX_FN uint32_t desc_low(uint32_t address, uint32_t lbo) { return (uint32_t)wgmma_desc_sw128(address, lbo, 1024); }
PTX_FN uint64_t desc_of(uint32_t low) { return wgmma_desc_sw128(0, 0, 1024) | low; }

/* S[64 x BLOCK_K] = Q[64 x D] K^T. Descriptors. */
template <int D, int BLOCK_K> static __device__ __forceinline__ void qk_wgmma(float (&s)[BLOCK_K / 2], uint64_t dq, uint64_t dk)
{
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int c = i / 4, within = 32 * (i % 4);              /* bytes of 16 columns inside a chunk */
        wgmma_ss(s, dq + (c * WG_ROWS * 128 + within) / 16, dk + (c * BLOCK_K * 128 + within) / 16, i > 0);
    }
}

/* O[64 x DV] (+)= P[64 x BLOCK_K] V */
template <int DV, int BLOCK_K>
static __device__ __forceinline__ void pv_wgmma(float (&o)[DV / 2], const uint32_t (&pr)[BLOCK_K / 4], uint64_t dv, int accumulate)
{
#pragma unroll
    for (int i = 0; i < BLOCK_K / 16; i++) { wgmma_rs_bt(o, pr + 4 * i, dv + i * 2048 / 16, i > 0 || accumulate); }
}

/* A lane has 2 columns of 8: bit k is its column 8 (k / 2) + k % 2. Those in front of `end`, counted from its first. */
static __device__ __forceinline__ uint32_t columns_before(int32_t end)
{
    const int32_t within = min(max(end, 0), 128);
    uint32_t bits;
    asm("bmsk.clamp.b32 %0, 0, %1;" : "=r"(bits) : "r"(within / 8 * 2 + min(within % 8, 2)));
    return bits;
}

/* Scores of other columns become -inf. Bits go to predicates several at a time: less than two instructions a score for both
 * sides. */
template <int N> static __device__ __forceinline__ void hide_others(float (&s)[N], const uint32_t (&seen)[2])
{
    static_assert(N <= 64, "a bit for each column that a lane has of a row");
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (!(seen[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) { s[i] = -INFINITY; }
    }
}

/* Running state of a lane's two rows r = 0, 1, as the sums so far have it: weights are 2^(scale_log2 s - base). base is that
 * of the largest score of the row's first block and stays while weights are moderate: then there is no maximum to look for and
 * nothing to multiply O with. m: the score that base comes from, -inf as long as the row has no key, base being 0 then. l: row
 * sum, this lane's columns only. All but l are the same in the 4 lanes of a row. */
struct softmax_rows { float m[2], base[2], l[2]; };

/* The largest of a row's scores. */
template <int N> static __device__ __forceinline__ float row_top(const float (&s)[N], int r)
{
    float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
    for (int i = 4; i < N; i += 4) { even = fmaxf(even, s[i + 2 * r]); odd = fmaxf(odd, s[i + 2 * r + 1]); }
    return row_reduce_max(fmaxf(even, odd));
}

static __device__ __forceinline__ void set_base(softmax_rows &rows, int r, float top, float scale_log2)
{
    rows.m[r] = top;
    rows.base[r] = finite_max(top) * scale_log2;
}

/* A score m of which one instruction would round the exponents uselessly: the careful pass computes them exactly, and there
 * such rows keep to their largest score so far. */
static __device__ __forceinline__ bool is_enormous(float m, float scale_log2) { return !(fabsf(finite_max(m) * scale_log2) < 0x1p27f); }

/* S <- 2^(scale_log2 S - base) in row r. Their sum over this lane's columns. */
template <bool CAREFUL, int N>
static __device__ __forceinline__ float exponentials(float (&s)[N], const softmax_rows &rows, int r, float scale_log2)
{
    const bool exact = CAREFUL && is_enormous(rows.m[r], scale_log2);
    const float top = CAREFUL ? finite_max(rows.m[r]) : 0.0f;
    float even = 0.0f, odd = 0.0f;
#pragma unroll
    for (int i = 2 * r; i < N; i += 4) {
        s[i] = ex2(exact ? (s[i] - top) * scale_log2 : fmaf(s[i], scale_log2, -rows.base[r]));
        s[i + 1] = ex2(exact ? (s[i + 1] - top) * scale_log2 : fmaf(s[i + 1], scale_log2, -rows.base[r]));
        even = i == 2 * r ? s[i] : even + s[i];
        odd = i == 2 * r ? s[i + 1] : odd + s[i + 1];
    }
    return even + odd;
}

template <int N> static __device__ __forceinline__ void scale_rows(float (&x)[N], const float (&factor)[2])
{
#pragma unroll
    for (int i = 0; i < N; i++) { x[i] *= factor[i / 2 % 2]; }
}

/* Sums of a block above this: some weight is not moderate. float16 has room up to 65,504. */
static constexpr float MODERATE = 256.0f;
static constexpr float ALMOST_OVERFLOW = 120.0f;                 /* of an exponent */

/* Rows whose weights are not: the base becomes that of the largest score of this block. Each row for itself: the bits of
 * others do not change. Weights next to overflow become NaN, and with them O; the careful pass sees to it that there are none. */
template <int N, int M>
static __device__ __forceinline__ void moderate_weights(float (&s)[N], float (&o)[M], softmax_rows &rows, float (&sum)[2])
{
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float top = row_top(s, r);
        const bool moderate = !(row_reduce_max(sum[r]) > MODERATE);
        factor[r] = moderate ? 1.0f : top < 2.0f * 0x1p120f ? __fdividef(1.0f, top) : NAN;
        rows.base[r] += moderate ? 0.0f : __log2f(top);
        rows.l[r] *= factor[r];
        sum[r] *= factor[r];
    }
    scale_rows(s, factor);
    scale_rows(o, factor);
}

/* The accumulator layout of S is the A-operand layout of P: pairs of neighbours, in order. */
template <typename T, int N> static __device__ __forceinline__ void pack_weights(uint32_t (&pr)[N / 2], const float (&s)[N])
{
#pragma unroll
    for (int i = 0; i < N / 2; i++) { pr[i] = pack2(s[2 * i], s[2 * i + 1], T()); }
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
