/* dec_float8.cuh - float8 e4m3 keys and values as operands of float16 products, for the decode kernels.
 *
 * Every e4m3 number is a float16 one, NaN included, so that the products see the cache's elements exactly; their scales, one a
 * head of the cache, go to the scores and to a segment's sums. q goes to float16 with a power of two of its row, which the scores
 * get back.
 *
 * A row of a tile is 128 columns, one byte each, with the swizzle of TMA; ldmatrix takes two neighbours for one 16-bit element.
 * An mma sums over columns (or keys) in any order that its operands share, and its rows are any that the reader of the sums
 * expects:
 *
 *   K   a lane has columns 16 k + 4 (lane % 4) + 0..3 of its keys, where the mma has 2 (lane % 4) + {0, 1} and 8 more
 *   V   row lane / 4 + 8 h of block k is column 16 k + 2 (lane / 4) + h
 */
#pragma once
#include "../common/numeric.cuh"
#include "../common/ptx_ldmatrix.cuh"
#include "../sm80/cache_tile.cuh"
#include "dec_split.cuh"

/* Four bytes as two pairs, in their order. */
PTX_FN void widen_float8(uint32_t bytes, uint32_t &low, uint32_t &high)
{
    asm("{\n\t.reg .b16 a, b;\n\tmov.b32 {a, b}, %2;\n\t"
        "cvt.rn.f16x2.e4m3x2 %0, a;\n\tcvt.rn.f16x2.e4m3x2 %1, b;\n\t}" : "=r"(low), "=r"(high) : "r"(bytes));
}

/* A fragments of 16 keys x 16 columns, or of 16 columns x 16 keys, number k along a row of the tile, in order; `lane` is the
 * shared address of this lane's row for ldmatrix at k = 0, as for 16-bit elements. */
struct float8_fragments {
    uint32_t chunk, bytes[4];       /* there is one chunk */

    __device__ __forceinline__ void keys(uint32_t (&a)[4], uint32_t lane, int k)
    {
        if (k % 2 == 0) { ldmatrix_x4(bytes, lane ^ (uint32_t)(k / 2 << 5)); }
        widen_float8(bytes[k % 2 * 2], a[0], a[2]);
        widen_float8(bytes[k % 2 * 2 + 1], a[1], a[3]);
    }
    __device__ __forceinline__ void values(uint32_t (&a)[4], uint32_t lane, int k)
    {
        if (k % 2 == 0) { ldmatrix_x4_trans(bytes, lane ^ (uint32_t)(k / 2 << 5)); }
        widen_float8(__byte_perm(bytes[k % 2], 0, 0x3120), a[0], a[1]);         /* byte 2 key + column -> 2 column + key */
        widen_float8(__byte_perm(bytes[k % 2 + 2], 0, 0x3120), a[2], a[3]);
    }
};

/* Of the sequence's KV head. Fetched a segment ahead, like q. */
struct float8_scales {
    float k, v;

    __device__ __forceinline__ void fetch(const dec_params &p, int32_t b, int32_t kv_head)
    {
        k = cache_scale(p.common.problem.cache.k_scale, b, kv_head);
        v = cache_scale(p.common.problem.cache.v_scale, b, kv_head);
    }
};

/* Pairs of one row of q, of which LANES neighbouring lanes have 2 N each, as float16 times a power of two; its inverse. The row's
 * largest number gets the exponent 14. Numbers below 2^-31 of that are rounded, to 2^-39 of it: no float32 sum would see them.
 * Float16 ones stay what they are. */
template <int LANES, int N> static __device__ __forceinline__ float float16_row(uint32_t (&)[N][2], f16) { return 1.0f; }

template <int LANES, int N> static __device__ __forceinline__ float float16_row(uint32_t (&pair)[N][2], bf16)
{
    constexpr uint32_t EXPONENT = 0x7F800000u;
    uint32_t largest = 0;
#pragma unroll
    for (int n = 0; n < 2 * N; n++) {
        const uint32_t low = pair[n / 2][n % 2] << 16 & EXPONENT, high = pair[n / 2][n % 2] & EXPONENT;
        largest = max(largest, max(low == EXPONENT ? 0 : low, high == EXPONENT ? 0 : high));
    }
#pragma unroll
    for (int d = 1; d < LANES; d *= 2) { largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, d)); }
    const uint32_t exponent = max(largest >> 23, 32u);      /* biased by 127; its inverse must be a number, too */
    const float up = __uint_as_float((127 + 127 + 14 - exponent) << 23);
#pragma unroll
    for (int n = 0; n < 2 * N; n++) {
        uint32_t &x = pair[n / 2][n % 2];
        x = pack2(__uint_as_float(x << 16) * up, __uint_as_float(x & 0xFFFF0000u) * up, f16());
    }
    return __uint_as_float((exponent - 14) << 23);
}
