/* dec_wide_float8.cuh - the products of decode_wide.cu over float8 caches: K and V go to float16 on their way into registers,
 * which wgmma takes for A as well (dec_float8.cuh). Register 2 h + e % 2 of an operand and of its sums:
 *
 *   K   key 16 warp + lane / 4 + 8 (e / 2), as for 16-bit elements; columns in the order of float8_fragments, which Q's rows in shared
 *       memory have, too
 *   V   column 32 warp + 16 chunk + 2 (lane / 4) + e / 2
 */
#pragma once
#include "../common/ptx_wgmma.cuh"
#include "dec_float8.cuh"

/* D[64 x N] (+)= A[64 x 16] B[16 x N], float16, A in registers, B from shared memory, K-major. accumulate 0 overwrites D. */
#define DEC_WGMMA_F16(n, registers, operands, a0, a1, a2, a3, b, p)                                                                \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p ", 0;\n\t"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.f16.f16 {" registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3    \
                 "}, %" #b ", p, 1, 1, 0;\n\t}"                                                                                    \
                 : operands : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc), "r"(accumulate))

PTX_FN void wgmma_f16(float (&d)[8], const uint32_t (&a)[4], uint64_t b_desc, int accumulate)
{
    DEC_WGMMA_F16(16, "%0,%1,%2,%3,%4,%5,%6,%7", PTX_ACC8(d, 0), 8, 9, 10, 11, 12, 13);
}
PTX_FN void wgmma_f16(float (&d)[16], const uint32_t (&a)[4], uint64_t b_desc, int accumulate)
{
    DEC_WGMMA_F16(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", PTX_ACC16(d, 0), 16, 17, 18, 19, 20, 21);
}
PTX_FN void wgmma_f16(float (&d)[32], const uint32_t (&a)[4], uint64_t b_desc, int accumulate)
{
    DEC_WGMMA_F16(64, PTX_R64, PTX_ACC32(d, 0), 32, 33, 34, 35, 36, 37);
}
#undef DEC_WGMMA_F16

/* S^T[64 keys x N rows] = K Q^T, begun: the caller commits. q_desc: 64-column chunks of Q that are q_chunk bytes apart. */
template <int R> static __device__ __forceinline__ void float8_scores(float (&s)[R], uint32_t k_tile, uint64_t q_desc, int q_chunk)
{
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4, low = lane & 7;
    const uint32_t row = k_tile + (uint32_t)((16 * warp + low + (lane & 8)) * 128 + ((lane >> 4 ^ low) << 4));
    constexpr int AT_ONCE = R > 16 ? 2 : D / 16;        /* as many as there are registers for */
#pragma unroll
    for (int k0 = 0; k0 < D / 16; k0 += AT_ONCE) {
        uint32_t a[AT_ONCE][4];
        float8_fragments tile;
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) { tile.keys(a[k], row, k0 + k); }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) { wgmma_f16(s, a[k], q_desc + (uint64_t)(((k0 + k) / 4 * q_chunk + (k0 + k) % 4 * 32) / 16), k0 + k > 0); }
        if (k0 + AT_ONCE < D / 16) {
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(s);
        }
    }
}

/* O^T[64 columns x N rows] += V^T P^T for both chunks, begun. p_desc: P, 64 keys a row. */
template <int R> static __device__ __forceinline__ void float8_sums(float (&o)[2][R], uint32_t v_tile, uint64_t p_desc)
{
    static_assert(D == 128 || !FLOAT8, "kernels.def: a warp has 32 columns of a row of 128");
    const int lane = (int)thread_index() % 32, warp = (int)thread_index() / 32 % 4, low = lane & 7;
    const uint32_t row = v_tile + (uint32_t)((low + (lane >> 4 << 3)) * 128 + ((2 * warp + (lane >> 3 & 1) ^ low) << 4));
    constexpr int AT_ONCE = R > 16 ? 2 : GRANULE / 16;
#pragma unroll
    for (int k0 = 0; k0 < GRANULE / 16; k0 += AT_ONCE) {
        uint32_t a[AT_ONCE][2][4];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            float8_fragments tile;
#pragma unroll
            for (int chunk = 0; chunk < 2; chunk++) { tile.values(a[k][chunk], row + (uint32_t)((k0 + k) * 16 * 128), chunk); }
        }
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
#pragma unroll
            for (int chunk = 0; chunk < 2; chunk++) { wgmma_f16(o[chunk], a[k][chunk], p_desc + (uint64_t)((k0 + k) * 32 / 16), 1); }
        }
        if (k0 + AT_ONCE < GRANULE / 16) {
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(o[0]);
            wgmma_pin(o[1]);
        }
    }
}

/* A 16-byte piece of row `local` of q, number `at` of 16, as float16 to its two places in that row of shared memory, whose
 * chunks of 64 columns are q_chunk bytes apart. It may come from there. Returns what the row's scores are to be multiplied
 * with. Sixteen neighbouring lanes have a row. */
static __device__ __forceinline__ float float8_place_q(char *row, int q_chunk, int local, int at, uint4 piece)
{
    uint32_t pair[2][2] = {{piece.x, piece.y}, {piece.z, piece.w}};
    const float power = float16_row<16>(pair, T());
    __syncwarp();                               /* all lanes have read theirs */
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int to = (at & ~1) + half;
        *(uint2 *)(row + to / 8 * q_chunk + 16 * ((to % 8) ^ (local % 8)) + 8 * (at & 1)) = make_uint2(pair[0][half], pair[1][half]);
    }
    return power;
}

/* Bytes of `x` that are NaN, as 0x80 each. */
static __device__ __forceinline__ uint32_t float8_nan(uint32_t x) { return ((x & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u; }

/* NaN of values that some rows see go to those alone, and out of the tile; keys [full.begin, full.end) all rows see. `rows`:
 * slots that each row of the warpgroup sees. Of TEAM_THREADS threads, with the named barrier `barrier`. */
template <int TEAM_THREADS, int R> static __device__ __forceinline__ void float8_take_nan(float (&o)[2][R], const fgqa_range *rows, uint32_t v_tile, int32_t first, fgqa_range full,
                                                                        uint32_t barrier)
{
    constexpr uint32_t ITEMS = GRANULE * 8;
    const uint32_t thread = thread_index() % TEAM_THREADS;
    const int lane = (int)(thread % 32), warp = (int)(thread / 32 % 4);
    uint32_t any = 0;
    for (uint32_t item = thread; item < ITEMS; item += TEAM_THREADS) {
        const int32_t key = (int32_t)(item / 8);
        if (key >= full.begin && key < full.end) { continue; }
        uint32_t x[4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(v_tile + 16 * item) : "memory");
#pragma unroll
        for (int n = 0; n < 4; n++) { any |= float8_nan(x[n]); }
    }
    if (!bar_any(barrier, TEAM_THREADS, any != 0)) { return; }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const int column = 32 * warp + 16 * (n / 2) + 2 * (lane / 4) + n % 2;
#pragma unroll 1
        for (int32_t key = 0; key < GRANULE; key++) {
            if (key >= full.begin && key < full.end) { continue; }
            uint32_t byte;
            asm volatile("ld.shared.u8 %0, [%1];" : "=r"(byte) : "r"(v_tile + (uint32_t)(key * 128 + 16 * ((column / 16) ^ (key % 8)) + column % 16)) : "memory");
            if ((byte & 0x7F) != 0x7F) { continue; }
#pragma unroll
            for (int r = 0; r < R / 2; r++) {
                const fgqa_range row = rows[8 * (r / 2) + 2 * (lane % 4) + r % 2];
                if (row.begin <= first + key && first + key < row.end) { o[n / 2][4 * (r / 2) + r % 2 + 2 * (n % 2)] = NAN; }
            }
        }
    }
    bar_sync(barrier, TEAM_THREADS);
    for (uint32_t item = thread; item < 4 * ITEMS; item += TEAM_THREADS) {
        const int32_t key = (int32_t)(item / 32);
        if (key >= full.begin && key < full.end) { continue; }
        uint32_t x;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(v_tile + 4 * item) : "memory");
        const uint32_t nan = float8_nan(x);
        if (nan) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(v_tile + 4 * item), "r"(x & ~((nan >> 7) * 0xFFu)) : "memory"); }
    }
}
