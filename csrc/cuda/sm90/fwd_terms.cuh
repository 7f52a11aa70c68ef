/* fwd_terms.cuh - what a bias and a mask tensor make of a block's scores, for fwd.cu. With a bias S counts in natural units: the
 * instruction that adds it multiplies q.k with the scale, too, and no bias overflows.
 *
 *     s <- scale s + bias(i, j);  -inf where mask(i, j) is false
 *
 * Here elements come from global memory straight into the lane that holds their scores, and are asked for while Q K^T is
 * computed: wherever they lie, and beside whatever else. Those that TMA can address, alone, have a faster way:
 * fwd_term_tiles.cuh.
 */
#pragma once
#include <float.h>

#include "../common/byte_bits.cuh"
#include "../common/params.cuh"

/* What they are, for all rows. */
struct score_terms {
    int32_t some_bias, some_mask;
    int32_t wide_bias;                  /* float32 elements, not T */
    int32_t bias_pairs, bias_vectors, mask_vectors;              /* neighbours are aligned: two, or 16 bytes (of T), are read at once */
    int64_t bias_step, mask_step;       /* bytes from one key to the next */
};

/* Elements of key 0 in a lane's two rows. */
struct term_rows { const char *bias[2], *mask[2]; };

/* Of a block: what has been read of its bias; bit k: the mask lets the row see the lane's column 8 (k / 2) + k % 2. */
static constexpr int TERM_WORDS = FGQA_D == 128 || (FGQA_D == 256 && FGQA_BLOCK_Q == 64) ? 16 : 8;         /* as many as registers are left beside the accumulators */
struct block_terms { uint32_t bias[TERM_WORDS], seen[2]; };

static inline score_terms score_terms_of(const fgqa_problem *p)
{
    const fgqa_view &bias = p->view[FGQA_ARG_bias], &mask = p->view[FGQA_ARG_mask];
    const int64_t bytes = bias.dtype == FGQA_F32 ? 4 : 2;
    score_terms t = {bias.data != NULL, mask.data != NULL, bias.dtype == FGQA_F32, 0, 0, 0, bias.stride_d * bytes, mask.stride_d};
    t.bias_pairs = bias.data && bias.stride_d == 1 && (uintptr_t)bias.data % (2 * bytes) == 0 && (bias.stride_b | bias.stride_h | bias.stride_s) % 2 == 0;
    t.bias_vectors = t.bias_pairs && bytes == 2 && (uintptr_t)bias.data % 16 == 0 && (bias.stride_b | bias.stride_h | bias.stride_s) % 8 == 0;
    t.mask_vectors = mask.data && mask.stride_d == 1 && (uintptr_t)mask.data % 16 == 0 && (mask.stride_b | mask.stride_h | mask.stride_s) % 16 == 0;
    return t;
}

#if defined(__CUDACC__)

/* Volatile: they stay in front of the wait for Q K^T. */
PTX_FN uint32_t load_b16(const char *at) { uint16_t x; asm volatile("ld.global.b16 %0, [%1];" : "=h"(x) : "l"(at)); return x; }
PTX_FN uint32_t load_b32(const char *at) { uint32_t x; asm volatile("ld.global.b32 %0, [%1];" : "=r"(x) : "l"(at)); return x; }
PTX_FN void load_2b32(uint32_t *x, const char *at) { asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(at)); }
PTX_FN uint4 load_4b32(const char *at)
{
    uint4 x;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
    return x;
}

PTX_FN void prefetch_l2(const char *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

/* Rows of a tile that do not exist have those of the last one: nobody asks what comes of it. */
static __device__ __forceinline__ term_rows find_term_rows(const fgqa_problem &p, const score_terms &terms, int32_t b, const int32_t (&head)[2],
                                                           const int32_t (&row)[2])
{
    term_rows rows;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t i = min(row[r], p.sq - 1);
        rows.bias[r] = fgqa_row_address(p.view[FGQA_ARG_bias], terms.wide_bias ? 4 : 2, b, head[r], i);
        rows.mask[r] = fgqa_row_address(p.view[FGQA_ARG_mask], 1, b, head[r], i);
    }
    return rows;
}

/* Vectors are read if the block from which on `end` is the first key does not end behind the last one. */
static __device__ __forceinline__ bool has_vectors(const score_terms &terms, int32_t end, int32_t sk) { return terms.bias_vectors && end <= sk; }

/* Pairs that four lanes have read as vectors -> those of their own columns: a 4 x 4 transpose. */
template <int COUNT> static __device__ __forceinline__ void share_vectors(block_terms &x)
{
    const uint32_t quarter = thread_index() % 4;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        const bool upper = quarter & step;
#pragma unroll
        for (int i = 0; i < 2 * COUNT; i++) {                    /* word i / 2 of row i % 2 */
            if (i / 2 & step) { continue; }
            uint32_t &low = x.bias[i], &high = x.bias[i + 2 * step];
            const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, upper ? low : high, step);
            low = upper ? other : low;
            high = upper ? high : other;
        }
    }
}

/* COUNT pairs of a lane's columns in each row, from 8 n0 on, of a block from key j0 on. Keys from sk on are not read. WORDS of
 * a pair: 2 of float32. */
template <int WORDS, int COUNT, int BLOCK_K>
static __device__ __forceinline__ void load_bias(block_terms &x, const term_rows &rows, const score_terms &terms, int32_t j0, int n0, int32_t sk)
{
    const int32_t first = j0 + 8 * n0 + (int32_t)(thread_index() % 4) * 2;
    const bool whole = terms.bias_pairs && j0 + BLOCK_K <= sk;
    if (WORDS == 1 && has_vectors(terms, j0 + BLOCK_K, sk)) {
        static_assert(WORDS == 2 || COUNT % 4 == 0, "a vector has pairs of four columns 8 n");
#pragma unroll
        for (int n = 0; n < COUNT; n += 4) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const uint4 v = load_4b32(rows.bias[r] + (int64_t)(j0 + 8 * (n0 + n)) * 2 + 16 * (thread_index() % 4));
                x.bias[2 * n + r] = v.x;
                x.bias[2 * n + 2 + r] = v.y;
                x.bias[2 * n + 4 + r] = v.z;
                x.bias[2 * n + 6 + r] = v.w;
            }
        }
        return;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const char *at = rows.bias[r] + first * terms.bias_step;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            uint32_t *const to = x.bias + WORDS * (2 * n + r);
            if (whole) {
                if (WORDS == 2) { load_2b32(to, at + 32 * n); } else { *to = load_b32(at + 16 * n); }
            } else {
                const char *const next = at + terms.bias_step;
                const uint32_t low = first + 8 * n >= sk ? 0 : WORDS == 2 ? load_b32(at) : load_b16(at);
                const uint32_t high = first + 8 * n + 1 >= sk ? 0 : WORDS == 2 ? load_b32(next) : load_b16(next);
                if (WORDS == 2) { to[0] = low; to[1] = high; } else { to[0] = low | high << 16; }
                at += 8 * terms.bias_step;
            }
        }
    }
}

/* A finite score never becomes -inf, and a bias of -inf hides whatever score: the careful pass sees to both. */
template <bool CAREFUL> static __device__ __forceinline__ float with_bias(float s, float scale, float bias)
{
    if (CAREFUL && bias == -INFINITY) { return -INFINITY; }
    const float x = fmaf(s, scale, bias);
    return CAREFUL && x < -FLT_MAX ? -FLT_MAX : x;
}

template <bool CAREFUL, typename T, int WORDS, int COUNT, int N>
static __device__ __forceinline__ void add_bias(float (&s)[N], const block_terms &x, float scale, int n0)
{
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const uint32_t *const from = x.bias + WORDS * (2 * n + r);
            const float2 bias = WORDS == 2 ? make_float2(__uint_as_float(from[0]), __uint_as_float(from[WORDS - 1])) : unpack2(from[0], T());
            float *const to = s + 4 * (n0 + n) + 2 * r;
            to[0] = with_bias<CAREFUL>(to[0], scale, bias.x);
            to[1] = with_bias<CAREFUL>(to[1], scale, bias.y);
        }
    }
}

/* What four lanes have read of their row's mask, each 16 VECTORS columns -> bits of the own columns of lane `quarter` of them. */
template <int VECTORS> static __device__ __forceinline__ uint32_t bits_of_columns(const uint4 (&x)[VECTORS], int32_t quarter)
{
    static_assert(VECTORS == 1 || VECTORS == 2, "a bit each, a quarter of what a lane has read");
    constexpr uint32_t JOIN = VECTORS == 2 ? 0x01041040u : 0x10400000u;
    uint32_t read = 0, own = 0;
#pragma unroll
    for (int n = VECTORS - 1; n >= 0; n--) {
        read = bits_of_bytes(x[n].x, bits_of_bytes(x[n].y, bits_of_bytes(x[n].z, bits_of_bytes(x[n].w, read))));
    }
#pragma unroll
    for (int n = 3; n >= 0; n--) {                               /* of each byte two bits, which a product brings together at the top */
        const uint32_t pairs = __shfl_sync(0xFFFFFFFFu, read, n, 4) >> 2 * quarter & 0x03030303u;
        own = __funnelshift_l(pairs * JOIN, own, 4 * VECTORS);
    }
    return own;
}

/* block_terms.seen */
template <int BLOCK_K>
static __device__ __forceinline__ void load_mask(uint32_t (&seen)[2], const term_rows &rows, const score_terms &terms, int32_t j0, int32_t sk)
{
    constexpr int OWN = BLOCK_K / 4, VECTORS = OWN / 16;         /* columns that a lane reads for all four of its row */
    const int32_t quarter = (int32_t)(thread_index() % 4);
    if (terms.mask_vectors && j0 + BLOCK_K <= sk) {
        uint4 x[2][VECTORS];
#pragma unroll
        for (int r = 0; r < 2; r++) {
#pragma unroll
            for (int n = 0; n < VECTORS; n++) { x[r][n] = load_4b32(rows.mask[r] + j0 + OWN * quarter + 16 * n); }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) { seen[r] = bits_of_columns(x[r], quarter); }
        return;
    }
#pragma unroll 1
    for (int r = 0; r < 2; r++) {
        const char *at = (r ? rows.mask[1] : rows.mask[0]) + (j0 + 2 * quarter) * terms.mask_step;
        uint32_t bits = 0;
#pragma unroll 4
        for (int k = 0; k < BLOCK_K / 4; k++) {
            const int32_t column = 2 * quarter + 8 * (k / 2) + k % 2;
            uint32_t x = 0;
            if (j0 + column < sk) { asm volatile("ld.global.u8 %0, [%1];" : "=r"(x) : "l"(at)); }
            bits |= (x != 0 ? 1u : 0u) << k;
            at += (k % 2 ? 7 : 1) * terms.mask_step;
        }
        if (r) { seen[1] = bits; } else { seen[0] = bits; }
    }
}

/* What is read before the scores are there. */
template <int BLOCK_K>
static __device__ __forceinline__ void fetch_terms(block_terms &x, const term_rows &rows, const score_terms &terms, int32_t j0, int32_t sk)
{
    if (terms.some_bias) {
        if (terms.wide_bias) {
            load_bias<2, TERM_WORDS / 4, BLOCK_K>(x, rows, terms, j0, 0, sk);
        } else {
            load_bias<1, TERM_WORDS / 2, BLOCK_K>(x, rows, terms, j0, 0, sk);
        }
    }
    if (terms.some_mask) {
        load_mask<BLOCK_K>(x.seen, rows, terms, j0, sk);
    } else {
        x.seen[0] = x.seen[1] = 0xFFFFFFFFu;
    }
}

/* The bias into the scores, from what has been read on. */
template <bool CAREFUL, typename T, int WORDS, int BLOCK_K>
static __device__ __forceinline__ void add_all_bias(float (&s)[BLOCK_K / 2], block_terms &x, const term_rows &rows, const score_terms &terms, float scale,
                                                    int32_t j0, int32_t sk)
{
    constexpr int COUNT = TERM_WORDS / 2 / WORDS;
#pragma unroll
    for (int n0 = 0; n0 < BLOCK_K / 8; n0 += COUNT) {
        if (n0 > 0) { load_bias<WORDS, COUNT, BLOCK_K>(x, rows, terms, j0, n0, sk); }
        if (WORDS == 1 && has_vectors(terms, j0 + BLOCK_K, sk)) { share_vectors<COUNT>(x); }
        add_bias<CAREFUL, T, WORDS, COUNT>(s, x, scale, n0);
    }
}

template <bool CAREFUL, typename T, int BLOCK_K>
static __device__ __forceinline__ void add_terms(float (&s)[BLOCK_K / 2], block_terms &x, const term_rows &rows, const score_terms &terms, float scale,
                                                 int32_t j0, int32_t sk)
{
    if (!terms.some_bias) { return; }
    if (terms.wide_bias) {
        add_all_bias<CAREFUL, T, 2, BLOCK_K>(s, x, rows, terms, scale, j0, sk);
    } else {
        add_all_bias<CAREFUL, T, 1, BLOCK_K>(s, x, rows, terms, scale, j0, sk);
    }
}

/* With a bias or without; `unit`: of the scores as they come. */
template <bool CAREFUL, typename T, int BLOCK_K>
static __device__ __forceinline__ void add_terms_in_natural_units(float (&s)[BLOCK_K / 2], block_terms &x, const term_rows &rows, const score_terms &terms,
                                                                  float unit, int32_t j0, int32_t sk)
{
    if (terms.some_bias) {
        add_terms<CAREFUL, T, BLOCK_K>(s, x, rows, terms, unit, j0, sk);
    } else {
#pragma unroll
        for (int n = 0; n < BLOCK_K / 2; n++) { s[n] = with_bias<CAREFUL>(s[n], unit, 0.0f); }
    }
}

/* What a block that other blocks follow will read -> L2, in lines of 128 bytes that a row's four lanes share out. */
template <int BLOCK_K> static __device__ __forceinline__ void prefetch_terms(const term_rows &rows, const score_terms &terms, int32_t j0)
{
    const uint32_t quarter = thread_index() % 4;
    if (terms.bias_pairs) {
        const char *const at = (quarter / 2 ? rows.bias[1] : rows.bias[0]) + j0 * terms.bias_step + quarter % 2 * 128;
        prefetch_l2(at);
        if (terms.wide_bias && BLOCK_K > 64) { prefetch_l2(at + 256); }
    }
    if (terms.mask_vectors && quarter < 2) { prefetch_l2((quarter ? rows.mask[1] : rows.mask[0]) + j0); }
}

/* Whether they let a row see a key. */
static __device__ __forceinline__ bool terms_show(const fgqa_problem &p, int32_t b, int32_t head, int32_t row, int32_t j)
{
    const fgqa_view &bias = p.view[FGQA_ARG_bias], &mask = p.view[FGQA_ARG_mask];
    const int32_t i = min(row, p.sq - 1);
    if (mask.data && !*(fgqa_row_address(mask, 1, b, head, i) + j * mask.stride_d)) { return false; }
    return !bias.data || load_float(bias.data, b * bias.stride_b + head * bias.stride_h + i * bias.stride_s + j * bias.stride_d, bias.dtype) != -INFINITY;
}

#endif
