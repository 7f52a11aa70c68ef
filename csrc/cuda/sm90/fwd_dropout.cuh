/* fwd_dropout.cuh - which weights of a block are dropped, for fwd.cu: known before its scores are, as bits.
 *
 * Philox decides eight keys of a row at once. A quad's lanes share out the blocks of eight keys of their two rows: lane q
 * computes those of columns 32 m + 8 q on. Then lanes exchange the bits of the columns that they hold, in two shuffles.
 */
#pragma once
#include "../common/dropout.cuh"
#include "../common/ptx_sync.cuh"

/* Of a lane's two rows: the words of Philox's counter. */
struct drop_rows { uint32_t i[2], batch_head[2]; };

/* kept[c]: of the columns 32 m + 8 q + 2 t, + 1 that lane t of the quad holds, those with q = c in bytes 1 and 3, with q = c +
 * 2 in bytes 0 and 2; even columns in bytes 0 and 1. From bit 2 BLOCK_K / 32 - 1 of a byte down: first row, second row of m =
 * 0, 1, ... */
template <int BLOCK_K> static __device__ __forceinline__ void draw_kept(uint32_t (&kept)[2], const dropout_key &key, const drop_rows &rows, int32_t j0)
{
    static_assert(BLOCK_K % 32 == 0 && BLOCK_K <= 128, "a bit of a byte for each row of each block that a lane computes");
    const uint32_t quarter = thread_index() % 4;
    const bool upper = quarter & 2, odd = quarter & 1;
    uint32_t own[4] = {};                                        /* of word n of each block, which lane n needs */
#pragma unroll
    for (int n = 0; n < BLOCK_K / 16; n++) {
        const fgqa_philox_block x = fgqa_dropout_bits(key.seed, key.offset, (uint32_t)j0 / 8 + 4 * (n / 2) + quarter, rows.i[n % 2], rows.batch_head[n % 2]);
#pragma unroll
        for (int t = 0; t < 4; t++) { own[t] = 2 * own[t] + dropout_keeps_halves(x.x[t], key.threshold); }
    }
    const uint32_t low = 256 * own[0] + own[1], high = 256 * own[2] + own[3];
    const uint32_t mine = upper ? high : low, other = __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, 2);
    const uint32_t of_even = upper ? 0x7351 : 0x3715, of_odd = of_even - 0x1111;      /* bytes, those of the lower q first */
    const uint32_t here = __byte_perm(mine, other, odd ? of_odd : of_even);
    const uint32_t there = __shfl_xor_sync(0xFFFFFFFFu, __byte_perm(mine, other, odd ? of_even : of_odd), 1);
    kept[0] = odd ? there : here;
    kept[1] = odd ? here : there;
}

/* Bytes of 0xFF where a byte of x has its highest bit. PTX ISA, "prmt", with the sign of each byte. */
template <int SELECTOR> static __device__ __forceinline__ uint32_t signs_of_bytes(uint32_t x)
{
    uint32_t y;
    asm("prmt.b32 %0, %1, %1, %2;" : "=r"(y) : "r"(x), "n"(SELECTOR));
    return y;
}

/* Pairs of weights in the layout of P: those that are dropped become 0. */
template <int BLOCK_K> static __device__ __forceinline__ void drop_weights(uint32_t (&pr)[BLOCK_K / 4], const uint32_t (&kept)[2])
{
    constexpr int BITS = BLOCK_K / 16;
#pragma unroll
    for (int n = 0; n < BITS; n++) {                             /* row n % 2 of columns 32 (n / 2) on */
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const uint32_t x = kept[c] << (8 - BITS + n);
            pr[2 * (4 * (n / 2) + c) + n % 2] &= signs_of_bytes<0xBB99>(x);
            pr[2 * (4 * (n / 2) + c + 2) + n % 2] &= signs_of_bytes<0xAA88>(x);
        }
    }
}
