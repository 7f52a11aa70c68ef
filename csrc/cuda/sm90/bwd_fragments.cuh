/* bwd_fragments.cuh - what the backward kernels for Hopper of head dims 64 and 128 do with the elements that a lane holds.
 *
 * Scores are transposed, keys x rows: register 4 n + e of a lane is key 16 warp + lane / 4 + 8 (e / 2), row 8 n + 2 (lane % 4) +
 * e % 2. dK and dV: the same keys x columns; dQ: rows x columns.
 */
#pragma once

static constexpr int HALF = 64, STATS_OF_HALF = HALF / 4;       /* rows; their float4s of statistics */

/* Element 2 (n % 2) + e of the four that a lane has of rows 16 (n / 2) .. in bwd_stats_slot() order. */
static __device__ __forceinline__ float of_row(const float4 (&x)[4], int n, int e)
{
    const float4 &four = x[n / 2];
    return n % 2 ? e ? four.w : four.z : e ? four.y : four.x;
}

/* In quads of lanes: x[n] of lane c becomes x[c] of lane n. */
static __device__ __forceinline__ void transpose_quad(uint32_t (&x)[4])
{
    const uint32_t lane = thread_index();
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            if (n & bit) { continue; }
            const bool high = lane & bit;
            const uint32_t other = __shfl_xor_sync(ALL_LANES, high ? x[n] : x[n + bit], bit);
            if (high) { x[n] = other; } else { x[n + bit] = other; }
        }
    }
}

/* Eight elements of a row. vector: `to` is on 16 bytes. */
static __device__ __forceinline__ void store_eight(char *to, const uint32_t (&pairs)[4], bool vector)
{
    if (vector) { *(uint4 *)to = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]); return; }
#pragma unroll
    for (int e = 0; e < 8; e++) { ((uint16_t *)to)[e] = (uint16_t)(pairs[e / 2] >> 16 * (e % 2)); }
}

/* ---- interval masks ---- */

/* Bits x, x + 1, ... */
PTX_FN uint32_t bits_from(int x)
{
    uint32_t bits;
    asm("shl.b32 %0, %1, %2;" : "=r"(bits) : "r"(0xFFFFFFFFu), "r"(max(x, 0)));      /* shl shifts by 32 at most */
    return bits;
}

/* All bits of the lower half from the sign of byte `n` of `low`, of the upper one of byte `n` of `high`. */
template <int N> PTX_FN uint32_t spread_signs(uint32_t low, uint32_t high)
{
    uint32_t bits;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bits) : "r"(low), "r"(high), "n"((8 + N) * 0x11 + (12 + N) * 0x1100));
    return bits;
}

/* Which rows of a tile see a lane's two keys: bit 8 (n % 4) + e of word n / 4 for row 8 n + 2 (lane % 4) + e. */
struct tile_mask {
    uint32_t bits[2][2];                      /* key, word */

    /* rows: that see each key of the warpgroup */
    __device__ __forceinline__ tile_mask(const fgqa_range *rows, int32_t row0)
    {
        const int thread = (int)thread_index() & 127, own = row0 + thread % 4 * 2;
        rows += thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const fgqa_range seen = rows[8 * half];
#pragma unroll
            for (int word = 0; word < 2; word++) { bits[half][word] = bits_from(seen.begin - own - 32 * word) & ~bits_from(seen.end - own - 32 * word); }
        }
    }
    /* For the pair of rows of register pair n of a key. */
    template <int N> __device__ __forceinline__ uint32_t pair(int half) const { return spread_signs<N % 4>(bits[half][N / 4] << 7, bits[half][N / 4] << 6); }
};

/* Pairs of weights or dS of rows that do not see the key become 0, whatever they are. */
template <int N = 0> static __device__ __forceinline__ void hide(uint32_t (&pairs)[16], const tile_mask &mask)
{
    if constexpr (N < 8) {
        pairs[2 * N] &= mask.pair<N>(0);
        pairs[2 * N + 1] &= mask.pair<N>(1);
        hide<N + 1>(pairs, mask);
    }
}

/* ---- products and what becomes of them ---- */

static __device__ __forceinline__ void load_stats(float4 (&x)[4], const float *stats, int half, int lane)
{
    const float4 *of_lane = (const float4 *)stats + half * STATS_OF_HALF + (lane & 3);
#pragma unroll
    for (int n = 0; n < 4; n++) { x[n] = of_lane[4 * n]; }
}

/* Of the weights as dV sees them. */
static __device__ __forceinline__ void make_gradients(uint32_t (&gradients)[16], const uint32_t (&weights)[16], const float (&dp)[32], const float4 (&delta)[4])
{
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 weight = unpack2(weights[2 * n + half], T());
            gradients[2 * n + half] = pack2(weight.x * (dp[4 * n + 2 * half] - of_row(delta, n, 0)), weight.y * (dp[4 * n + 2 * half + 1] - of_row(delta, n, 1)), T());
        }
    }
}

/* dS of the own keys, 64 rows, to shared memory. */
static __device__ __forceinline__ void store_gradients(uint32_t ds, const uint32_t (&gradients)[16], int consumer)
{
    const int here = (int)thread_index() & 127;
    const uint32_t row = ds + (consumer * 64 + here / 32 * 16 + (here & 15)) * 128;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        stmatrix_x4(row + ((n * 32 + (here >> 4 & 1) * 16) ^ ((here & 7) << 4)), gradients[4 * n], gradients[4 * n + 1], gradients[4 * n + 2], gradients[4 * n + 3]);
    }
}

/* dQ, 64 x 64, of the dS of all keys; K by columns. */
template <int KEYS = BLOCK_K> static __device__ __forceinline__ void query_products(float (&dq)[32], uint32_t ds, uint64_t k_columns)
{
    const uint64_t ds_columns = wgmma_desc_sw128(ds, 0, 1024);
#pragma unroll
    for (int n = 0; n < KEYS / 16; n++) { wgmma64<1>(dq, ds_columns + n * 2048 / 16, k_columns + n * 2048 / 16, n == 0); }
    wgmma_commit();
}

/* Accumulators as pairs of T to a lane's two rows of d elements, the second 8 rows of `stride` behind the first, `count` rows
 * from that on exist. No shared memory: that of K and V can be loaded anew at once. */
static __device__ __forceinline__ void write_rows(const float (&acc)[D / 2], float factor, char *to, int64_t stride, int32_t count, int32_t d, bool vector, int lane)
{
#pragma unroll
    for (int n = 0; n < D / 32; n++) {        /* 32 columns, 8 a lane */
        const int column = 32 * n + lane % 4 * 8;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t x[4];
#pragma unroll
            for (int m = 0; m < 4; m++) { x[m] = pack2(acc[16 * n + 4 * m + 2 * half] * factor, acc[16 * n + 4 * m + 2 * half + 1] * factor, T()); }
            transpose_quad(x);
            if (8 * half < count && column < d) { store_eight(to + (8 * half * stride + column) * (int64_t)sizeof(T), x, vector); }
        }
    }
}

