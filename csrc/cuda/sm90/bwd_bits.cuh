/* bwd_bits.cuh - part of bwd.cu, a boolean mask tensor, and dropout. Each is a bit a score.
 *
 *     Z = kept / (1 - p)   dV = (P Z)^T dO   dS = P (Z dP - delta)          P and dS are 0 where the mask hides
 *
 * dS is made without 1 / (1 - p), of (1 - p) delta; dV, dK and dQ get it at the end.
 *
 * The lanes of a warp that differ in lane / 4 have the same 16 rows of a half and different keys. A lane makes the bits of eight
 * neighbouring keys, in four of those rows: what a Philox block decides, and what eight bytes of a mask are. In three exchanges
 * the eight lanes get those of their own keys. No shared memory, no barrier.
 */
#pragma once

/* Bit 16 e + 4 (n % 4) + 2 half + n / 4: of row 8 n + 2 (lane % 4) + e of a half, key lane / 4 + 8 half of a warp. */
struct lane_bits {
    uint32_t bits;
    static __device__ constexpr int at(int n, int half) { return 4 * (n % 4) + 2 * half + n / 4; }
    /* For register pair n of a key: all bits of each half. */
    template <int N, int HALF> __device__ __forceinline__ uint32_t pair() const
    {
        constexpr int AT = at(N, HALF), BYTE = AT / 8;
        const uint32_t x = bits << (7 - AT % 8);
        uint32_t pair;
        asm("prmt.b32 %0, %1, %1, %2;" : "=r"(pair) : "r"(x), "n"((8 + BYTE) * 0x11 + (10 + BYTE) * 0x1100));
        return pair;
    }
};

/* Pairs of scores without the bit become 0, whatever they are. */
template <int N = 0> static __device__ __forceinline__ void keep(uint32_t (&to)[16], const uint32_t (&pairs)[16], const lane_bits &bits)
{
    if constexpr (N < 8) {
        to[2 * N] = pairs[2 * N] & bits.pair<N, 0>();
        to[2 * N + 1] = pairs[2 * N + 1] & bits.pair<N, 1>();
        keep<N + 1>(to, pairs, bits);
    }
}

/* Bits whose number has bit SHIFT change places with those of the lane LANES away whose number has not. */
template <int LANES, int SHIFT> static __device__ __forceinline__ uint32_t exchange_bits(uint32_t x)
{
    constexpr uint32_t LOW = SHIFT == 16 ? 0x0000FFFFu : SHIFT == 2 ? 0x33333333u : 0x55555555u;
    static_assert(SHIFT == 16 || SHIFT == 2 || SHIFT == 1, "a mask for each");
    const bool high = thread_index() & LANES;
    const uint32_t own = high ? ~LOW : LOW, other = __shfl_xor_sync(ALL_LANES, __funnelshift_l(x, x, high ? SHIFT : 32 - SHIFT), LANES);
    return x & own | other & ~own;
}

/* Whose bits a lane makes: four rows, 8 apart from the first one on; one of its warp's two blocks of eight keys. */
struct bit_place { int32_t row, block; };

/* ---- mask tensors ---- */

/* Eight bytes of each of the four rows. */
struct mask_bytes { uint32_t x[4][2]; };

/* Behind the exchanges, bit 4 of the number of a bit is bit 4 of the number of the lane that made it, bits 1 and 0 are bits 3
 * and 2. */
static __device__ __forceinline__ bit_place place_of_mask()
{
    const int32_t lane = (int32_t)(thread_index() % 32);
    return {32 * (lane >> 2 & 1) + lane % 4 * 2 + (lane >> 4), lane >> 3 & 1};
}

/* For the 64 rows from `row0` on of a query head. Rows that do not exist have the bytes of the last one: nobody asks what
 * comes of it. */
static __device__ __forceinline__ mask_bytes load_mask_bytes(const bwd_params &p, int32_t b, int32_t key_tile, int32_t head, int32_t row0,
                                                             int consumer, int thread)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_view &mask = problem.view[FGQA_ARG_mask];
    const bit_place place = place_of_mask();
    const int32_t key = key_tile * BLOCK_K + consumer * 64 + thread / 32 * 16, first = key + 8 * place.block, count = problem.sk - first;
    const char *const from = fgqa_row_address(mask, 1, b, head, 0) + first * mask.stride_d;
    mask_bytes bytes = {};
    if (p.mask_vectors && key + 16 <= problem.sk) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const char *const at = from + min(row0 + place.row + 8 * n, problem.sq - 1) * mask.stride_s;
            asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(bytes.x[n][0]), "=r"(bytes.x[n][1]) : "l"(at));
        }
        return bytes;
    }
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const char *const at = from + min(row0 + place.row + 8 * n, problem.sq - 1) * mask.stride_s;
        uint32_t x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            x[k] = 0;
            if (k < count) { asm volatile("ld.global.u8 %0, [%1];" : "=r"(x[k]) : "l"(at + k * mask.stride_d)); }
        }
#pragma unroll
        for (int k = 0; k < 8; k++) { bytes.x[n][k / 4] |= x[k] << 8 * (k % 4); }
    }
    return bytes;
}

static __device__ __forceinline__ mask_bytes load_mask_bytes(const bwd_params &p, const task &t, int32_t head, int32_t row0, int consumer, int thread)
{
    return load_mask_bytes(p, t.b, t.n, head, row0, consumer, thread);
}

static __device__ __forceinline__ lane_bits bits_of_mask(const mask_bytes &bytes)
{
    uint32_t bits = 0;
#pragma unroll
    for (int n = 7; n >= 0; n--) { bits = bits_of_bytes(bytes.x[n % 4][n / 4], bits); }
    return {exchange_bits<4, 1>(exchange_bits<8, 2>(exchange_bits<16, 16>(bits)))};
}

/* Those of the first tile of a task. */
template <score_kind KIND> static __device__ __forceinline__ lane_bits first_bits_of_mask(const bwd_params &p, const shared &sm, const task &t, uint32_t stage, int32_t row0, int consumer, int thread)
{
    if ((STORES_DBIAS<KIND> || ANY_BITS<KIND>) && !p.common.problem.view[FGQA_ARG_mask].data) { return {0xFFFFFFFFu}; }
    return bits_of_mask(load_mask_bytes(p, t, sm.heads[stage].x, row0, consumer, thread));
}

/* Whether it hides something from the warp. */
template <score_kind KIND> static __device__ __forceinline__ bool mask_hides(const lane_bits &shown) { return HAS_MASK<KIND> && __any_sync(ALL_LANES, ~shown.bits != 0); }

/* Whether the tile from row `next` on, of another head perhaps, has the bits of that from `row0` on: heads of a group often
 * share a mask. No mask has no strides. */
static __device__ __forceinline__ bool same_mask(const bwd_params &p, int32_t row0, int32_t next)
{
    const fgqa_view &mask = p.common.problem.view[FGQA_ARG_mask];
    return mask.stride_h == 0 && (mask.stride_s == 0 || row0 == next);
}

/* ---- dropout ---- */

/* As of a mask, but that keys 2 n and 2 n + 1 of a block have bits 16 apart. */
static __device__ __forceinline__ bit_place place_of_blocks()
{
    const int32_t lane = (int32_t)(thread_index() % 32);
    return {32 * (lane >> 3 & 1) + lane % 4 * 2 + (lane >> 2 & 1), lane >> 4};
}

/* What decides about a lane's blocks in 64 rows of a query head. It comes from shared memory, whose loads would wait for
 * products that have been issued: before them. */
struct drawing {
    dropout_key key;
    uint32_t block, row, batch_head;
};

static __device__ __forceinline__ drawing prepare_drawing(const dropout_key &shared_key, int32_t key_tile, uint32_t batch_head, int32_t row0, int consumer, int thread)
{
    const bit_place place = place_of_blocks();
    drawing d = {shared_key, (uint32_t)(key_tile * (BLOCK_K / 8) + consumer * 8 + thread / 32 * 2 + place.block), (uint32_t)(row0 + place.row), batch_head};
    asm volatile("" : "+l"(d.key.seed), "+l"(d.key.offset), "+r"(d.key.threshold), "+r"(d.block), "+r"(d.row), "+r"(d.batch_head));
    return d;
}

/* For the 64 rows from `row0` on. */
template <score_kind KIND> static __device__ __forceinline__ drawing prepare_drawing(const bwd_params &p, const shared &sm, const task &t, int32_t head, int32_t row0, int consumer, int thread)
{
    if constexpr (!DROPS<KIND>) { return {}; }
    return prepare_drawing(sm.dropout, t.n, (uint32_t)t.b * (uint32_t)p.common.problem.hq + (uint32_t)head, row0, consumer, thread);
}

/* What the lane's blocks keep: bits 4 n + w and 16 + 4 n + w for the halves of word w of that of row n. */
static __device__ __forceinline__ uint32_t draw_blocks(const drawing &d)
{
    uint32_t kept = 0;
#pragma unroll
    for (int n = 3; n >= 0; n--) {
        const fgqa_philox_block bits = fgqa_dropout_bits(d.key.seed, d.key.offset, d.block, d.row + 8 * n, d.batch_head);
#pragma unroll
        for (int w = 3; w >= 0; w--) { kept = 2 * kept + dropout_keeps_halves(bits.x[w], d.key.threshold); }
    }
    asm volatile("" : "+r"(kept));                               /* here, under the products that have been issued */
    return kept;
}

template <score_kind KIND> static __device__ __forceinline__ uint32_t draw_blocks(const bwd_params &p, const drawing &d)
{
    return ANY_BITS<KIND> && p.common.problem.dropout_threshold == 0 ? 0xFFFFFFFFu : draw_blocks(d);
}

static __device__ __forceinline__ lane_bits bits_of_blocks(uint32_t kept) { return {exchange_bits<8, 1>(exchange_bits<16, 2>(exchange_bits<4, 16>(kept)))}; }

/* dS without the dropout's scale, of weights before dropout. */
static __device__ __forceinline__ void dropout_gradients(uint32_t (&gradients)[16], const uint32_t (&weights)[16], const float (&dp)[32], const float4 (&delta)[4],
                                                         const lane_bits &kept, float inv_dropout_scale)
{
#pragma unroll
    for (int n = 0; n < 8; n++) {
        const float first = of_row(delta, n, 0) * inv_dropout_scale, second = of_row(delta, n, 1) * inv_dropout_scale;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 weight = unpack2(weights[2 * n + half], T());
            float x = weight.x * -first, y = weight.y * -second;
            if (kept.bits >> lane_bits::at(n, half) & 1) { x = fmaf(weight.x, dp[4 * n + 2 * half], x); }
            if (kept.bits >> (16 + lane_bits::at(n, half)) & 1) { y = fmaf(weight.y, dp[4 * n + 2 * half + 1], y); }
            gradients[2 * n + half] = pack2(x, y, T());
        }
    }
}

/* ---- what is not finite ---- */

/* Whether key `key` of the task's tile counts in row i of a query head of the group: for dV, or, NOT_DROPPED, dS. */
template <score_kind KIND, bool NOT_DROPPED = false> static __device__ __forceinline__ bool counts(const bwd_params &p, const task &t, int32_t head, int32_t i, int32_t key)
{
    const fgqa_problem &problem = p.common.problem;
    if (HAS_BIAS<KIND> && !bias_shows<WIDE_BIAS<KIND>>(p, t, head, i, key)) { return false; }
    head += t.kv_head * problem.g;
    key += t.n * BLOCK_K;
    if (DROPS<KIND> && !NOT_DROPPED) {
        const dropout_key drop = dropout_key_make(problem);
        const fgqa_philox_block bits = fgqa_dropout_bits(drop.seed, drop.offset, (uint32_t)key / 8, (uint32_t)i, (uint32_t)t.b * (uint32_t)problem.hq + (uint32_t)head);
        if (!fgqa_dropout_keeps(fgqa_dropout_half(&bits, key % 8), drop.threshold)) { return false; }
    }
    return mask_shows(problem, t.b, head, i, key);
}

/* Whether the mask tensor lets some of these rows see a key, in some head of the group. The four lanes that have the key share
 * the rows out. */
static __device__ __noinline__ bool mask_shows_some(const bwd_params &p, const task &t, fgqa_range rows, int32_t key)
{
    const fgqa_view &mask = p.common.problem.view[FGQA_ARG_mask];
    const int32_t lane = (int32_t)(thread_index() % 32), first = rows.begin + lane % 4;
    bool some = !mask.data;
    for (int32_t head = 0; !some && head < (mask.stride_h ? p.common.problem.g : 1); head++) {
        const char *at = fgqa_row_address(mask, 1, t.b, t.kv_head * p.common.problem.g + head, first) + (t.n * BLOCK_K + key) * mask.stride_d;
#pragma unroll 8
        for (int32_t i = first; i < rows.end; i += 4, at += 4 * mask.stride_s) { some |= *at != 0; }
    }
    return __ballot_sync(0xFu << (lane & ~3), some) != 0;
}

/* The same with a bias, and perhaps a mask. */
template <bool WIDE> static __device__ __noinline__ bool bias_shows_some(const bwd_params &p, const task &t, fgqa_range rows, int32_t key)
{
    const int32_t lane = (int32_t)(thread_index() % 32);
    bool some = false;
    for (int32_t head = 0; head < p.common.problem.g; head++) {
#pragma unroll 4
        for (int32_t i = rows.begin + lane % 4; i < rows.end && !some; i += 4) { some = counts<WIDE ? WIDE_BIASED : BIASED>(p, t, head, i, key); }
    }
    return __ballot_sync(0xFu << (lane & ~3), some) != 0;
}
