/* swizzle.cuh - shared-memory address of (row, 16-byte piece) in a tile of ROW_BYTES a row.
 *
 * The piece index is XORed with bits of the row, so that the eight rows an ldmatrix phase reads (same piece) and the eight
 * pieces a row is written by fall into distinct groups of four banks. Rows of a multiple of 128 bytes start in the same bank:
 * three row bits. Other rows (multiples of 64 bytes) alternate between the two halves of the banks: two row bits from bit 1.
 */
#pragma once
#include <stdint.h>

template <int ROW_BYTES> static __device__ __forceinline__ uint32_t swizzle_bits(uint32_t row)
{
    static_assert(ROW_BYTES % 64 == 0, "rows of a tile are multiples of 64 bytes");
    return ROW_BYTES % 128 == 0 ? row & 7 : (row >> 1) & 3;
}

/* Byte offset from the start of the tile. */
template <int ROW_BYTES> static __device__ __forceinline__ uint32_t swizzle(uint32_t row, uint32_t piece)
{
    return row * ROW_BYTES + ((piece ^ swizzle_bits<ROW_BYTES>(row)) << 4);
}

/* The same for a lane whose row is fixed and whose piece is first ^ step, first < 2, step even and known at compile time:
 * all but the row part. lane_bits = swizzle_bits(row) ^ first. Four (two) distinct values, the rest is an immediate. */
template <int ROW_BYTES> static __device__ __forceinline__ uint32_t swizzle_step(uint32_t lane_bits, int step)
{
    constexpr int GROUP = ROW_BYTES % 128 == 0 ? 7 : 3;
    return (uint32_t)(step & ~GROUP) * 16 + ((lane_bits ^ (uint32_t)(step & GROUP)) << 4);
}
