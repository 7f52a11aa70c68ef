/* gemm.cuh - the two products of the forward pass for one warp: 16 MB rows, operands in swizzled shared-memory tiles.
 *
 * s[mb][n][4], o[mb][n][4]: accumulators (common/fragments.cuh). Fragments are fetched one step ahead of the mma that use them.
 */
#pragma once
#include "../common/fragments.cuh"
#include "../common/numeric.cuh"
#include "../common/ptx_ldmatrix.cuh"
#include "../common/swizzle.cuh"

/* S = Q K^T. q: this warp's first row of the Q tile; k: the K tile of 8 NB rows; both D elements wide. */
template <typename T, int D, int MB, int NB>
static __device__ __forceinline__ void qk_gemm(float (&s)[MB][NB][4], uint32_t q, uint32_t k, int lane)
{
    constexpr int ROW_BYTES = D * (int)sizeof(T), STEPS = ROW_BYTES / 32, PAIRS = NB / 2;
    static_assert(NB % 2 == 0, "one ldmatrix fetches two n8 blocks of K");
    const int q_row = lane % 16, k_row = lane % 8 + 8 * (lane / 16);
    const uint32_t q_bits = swizzle_bits<ROW_BYTES>(q_row) ^ (lane / 16), k_bits = swizzle_bits<ROW_BYTES>(k_row) ^ (lane / 8 % 2);
    q += q_row * ROW_BYTES;
    k += k_row * ROW_BYTES;
    uint32_t a[2][MB][4], b[2][4];
#pragma unroll
    for (int mb = 0; mb < MB; mb++) { ldmatrix_x4(a[0][mb], q + mb * 16 * ROW_BYTES + swizzle_step<ROW_BYTES>(q_bits, 0)); }
    ldmatrix_x4(b[0], k + swizzle_step<ROW_BYTES>(k_bits, 0));
#pragma unroll
    for (int mb = 0; mb < MB; mb++) {
#pragma unroll
        for (int n = 0; n < NB; n++) {
#pragma unroll
            for (int r = 0; r < 4; r++) { s[mb][n][r] = 0.0f; }
        }
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            const int now = step * PAIRS + pair, next_step = (now + 1) / PAIRS, next_pair = (now + 1) % PAIRS;
            if (next_step < STEPS) {
                ldmatrix_x4(b[(now + 1) % 2], k + next_pair * 16 * ROW_BYTES + swizzle_step<ROW_BYTES>(k_bits, 2 * next_step));
            }
            if (pair == PAIRS - 1 && step + 1 < STEPS) {
#pragma unroll
                for (int mb = 0; mb < MB; mb++) {
                    ldmatrix_x4(a[(step + 1) % 2][mb], q + mb * 16 * ROW_BYTES + swizzle_step<ROW_BYTES>(q_bits, 2 * (step + 1)));
                }
            }
#pragma unroll
            for (int mb = 0; mb < MB; mb++) {
                mma_step(s[mb][2 * pair], a[step % 2][mb], b[now % 2][0], b[now % 2][1], T());
                mma_step(s[mb][2 * pair + 1], a[step % 2][mb], b[now % 2][2], b[now % 2][3], T());
            }
        }
    }
}

/* Weights of key step `step` as an A operand: k16 of 16-bit elements, or k8 of float32 ones in the order of fragments.cuh. */
template <int NB, typename T> static __device__ __forceinline__ void pack_p(uint32_t (&a)[4], const float (&p)[NB][4], int step, T)
{
    const float(&left)[4] = p[2 * step], (&right)[4] = p[2 * step + 1];
    a[0] = pack2(left[0], left[1], T());
    a[1] = pack2(left[2], left[3], T());
    a[2] = pack2(right[0], right[1], T());
    a[3] = pack2(right[2], right[3], T());
}

template <int NB> static __device__ __forceinline__ void pack_p(uint32_t (&a)[4], const float (&p)[NB][4], int step, f32)
{
    a[0] = __float_as_uint(p[step][0]);
    a[1] = __float_as_uint(p[step][2]);
    a[2] = __float_as_uint(p[step][1]);
    a[3] = __float_as_uint(p[step][3]);
}

/* What of V one lane holds for key step `step` and the pair of n8 blocks `pair`: B operands {b[0], b[1]} and {b[2], b[3]}. */
template <typename T, int DV> struct v_operand {
    static constexpr int ROW_BYTES = DV * 2, KEYS = 16;
    uint32_t row, bits;
    __device__ __forceinline__ v_operand(uint32_t v, int lane)
        : row(v + lane % 16 * ROW_BYTES), bits(swizzle_bits<ROW_BYTES>(lane % 16) ^ (lane / 16)) {}
    __device__ __forceinline__ void load(uint32_t (&b)[4], int step, int pair) const
    {
        ldmatrix_x4_trans(b, row + step * KEYS * ROW_BYTES + swizzle_step<ROW_BYTES>(bits, 2 * pair));
    }
};

/* float32: lane (g, t) holds keys 2t and 2t + 1 of column g; ldmatrix cannot transpose 32-bit elements. */
template <int DV> struct v_operand<f32, DV> {
    static constexpr int ROW_BYTES = DV * 4, KEYS = 8;
    uint32_t base;
    int key, column;
    __device__ __forceinline__ v_operand(uint32_t v, int lane) : base(v), key(2 * (lane % 4)), column(lane / 4) {}
    __device__ __forceinline__ void load(uint32_t (&b)[4], int step, int pair) const
    {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int row = step * KEYS + key + r % 2, piece = 4 * pair + 2 * (r / 2) + column / 4;
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(b[r]) : "r"(base + swizzle<ROW_BYTES>(row, piece) + 4 * (column % 4)) : "memory");
        }
    }
};

/* O += P V. v: the V tile, DV elements wide. */
template <typename T, int DV, int MB, int NB>
static __device__ __forceinline__ void pv_gemm(float (&o)[MB][DV / 8][4], const float (&p)[MB][NB][4], uint32_t v, int lane)
{
    constexpr int STEPS = 8 * NB / v_operand<T, DV>::KEYS, PAIRS = DV / 16;
    const v_operand<T, DV> operand(v, lane);
    uint32_t b[2][4];
    operand.load(b[0], 0, 0);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint32_t a[MB][4];
#pragma unroll
        for (int mb = 0; mb < MB; mb++) { pack_p(a[mb], p[mb], step, T()); }
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            const int now = step * PAIRS + pair;
            if (now + 1 < STEPS * PAIRS) { operand.load(b[(now + 1) % 2], (now + 1) / PAIRS, (now + 1) % PAIRS); }
#pragma unroll
            for (int mb = 0; mb < MB; mb++) {
                mma_step(o[mb][2 * pair], a[mb], b[now % 2][0], b[now % 2][1], T());
                mma_step(o[mb][2 * pair + 1], a[mb], b[now % 2][2], b[now % 2][3], T());
            }
        }
    }
}

/* ---- values a row does not see must not reach it even if they are inf or NaN: 0 * NaN is NaN ----
 *
 * split_poison_tile() takes the non-finite elements out of V, and poison_gemm() gives them to the rows that see them. */

/* +inf, -inf and NaN as 1, 128 and 16384: a tile has at most 64 keys, so that a sum of codes tells the three counts apart. */
static __device__ __forceinline__ uint32_t poison_code(bool is_nan, bool negative) { return is_nan ? 16384 : negative ? 128 : 1; }

template <typename T> static __device__ __forceinline__ void split_poison(uint32_t x, uint32_t *clean, uint32_t *code, T)
{
    constexpr uint32_t EXPONENT = __is_same(T, bf16) ? 0x7F80 : 0x7C00, MANTISSA = __is_same(T, bf16) ? 0x007F : 0x03FF;
    *clean = x;
    *code = 0;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t bits = x >> 16 * half & 0xFFFF;
        if ((bits & EXPONENT) == EXPONENT) {
            const float value = (float)poison_code((bits & MANTISSA) != 0, bits >> 15);
            *clean &= half ? 0x0000FFFFu : 0xFFFF0000u;
            *code |= pack2(half ? 0.0f : value, half ? value : 0.0f, T());
        }
    }
}

static __device__ __forceinline__ void split_poison(uint32_t x, uint32_t *clean, uint32_t *code, f32)
{
    const bool finite = (x & 0x7F800000u) != 0x7F800000u;
    *clean = finite ? x : 0;
    *code = finite ? 0 : __float_as_uint((float)poison_code((x & 0x007FFFFFu) != 0, x >> 31));
}

/* Non-finite elements of a tile of `bytes` become 0 in `tile` and codes in `codes`. Whether there were any; a barrier. */
template <typename T> static __device__ __forceinline__ bool split_poison_tile(char *tile, char *codes, int bytes, int threads)
{
    bool any = false;
    for (int n = thread_index(); n < bytes / 4; n += threads) {
        uint32_t clean, code;
        split_poison(((const uint32_t *)tile)[n], &clean, &code, T());
        ((uint32_t *)tile)[n] = clean;
        ((uint32_t *)codes)[n] = code;
        any |= code != 0;
    }
    return __syncthreads_or(any);
}

/* What the summed codes of an accumulator's elements stand for. */
static __device__ __forceinline__ void add_poison(float (&o)[4], const float (&count)[4])
{
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const uint32_t sum = (uint32_t)count[r];
        if (sum >= 16384) { o[r] = NAN; }
        if (sum & 127) { o[r] += INFINITY; }
        if (sum & (127 << 7)) { o[r] -= INFINITY; }
    }
}

/* Adds to O the inf and NaN whose codes are in the tile `codes`, over the keys whose bit 4 n + r is set in `seen`. */
template <typename T, int DV, int NB>
static __device__ __forceinline__ void poison_gemm(float (&o)[DV / 8][4], uint32_t seen, uint32_t codes, int lane)
{
    constexpr int STEPS = 8 * NB / v_operand<T, DV>::KEYS;
    static_assert(NB <= 8, "one bit a register, and at most 64 keys of one code");
    const v_operand<T, DV> operand(codes, lane);
    float sees[NB][4];
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
        for (int r = 0; r < 4; r++) { sees[n][r] = seen >> (4 * n + r) & 1 ? 1.0f : 0.0f; }
    }
#pragma unroll
    for (int n = 0; n < DV / 8; n++) {
        float count[4] = {};
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            uint32_t a[4], b[4];
            pack_p(a, sees, step, T());
            operand.load(b, step, n / 2);
            mma_step(count, a, b[2 * (n % 2)], b[2 * (n % 2) + 1], T());
        }
        add_poison(o[n], count);
    }
}
