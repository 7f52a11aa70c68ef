/* amx.h - bfloat16 matrices for the tile unit: packing and the one product. Part of the row "amx" and, with products by vectors
 * over the same operands (amx_dot.h), of "avx512bf16".
 *
 *     C[m][n] = sum over k of A[m][k]*B[k][n]      (or C + that), float32
 *
 * in steps of AMX_DEPTH terms, 16 x 16 results a tile, 2 x 2 tiles at a time.
 *
 *     A      tiles of 16 rows of 32 terms, rows any number of bytes apart: a matrix as it lies in memory
 *     B      1 KB a tile: pair of terms after pair, each 16 columns of 2:      b[k/2][n][k%2]
 *
 * Numbers with more digits than bfloat16 has are the sum of two, high and low. Of their product low*low may be left out, which
 * is about 2^-16 of |A||B|.
 *
 * Rows in memory become B by pairing the terms of a row (a transpose of 32-bit pairs), or by pairing rows (an interleave);
 * columns become A by pairing rows and transposing the pairs.
 */
#ifndef FGQA_AMX_H
#define FGQA_AMX_H
#include "amx_weights.h"
#if !FGQA_TILES
#include "amx_dot.h"
#endif

/* ---- the product ---- */

/* Where an operand's tiles lie, in elements: those of one step after another `step` apart, the next row or column
 * of tiles `tile`, of A the next two `pair`.
 * The low parts lie `low` behind the high ones; 0: there are none, of either operand. `low_low` of A: multiply these, too. */
typedef struct { const bf16 *data; ptrdiff_t step, tile, pair, ld, low; int low_low; } amx_operand;

/* What vectors do beside a product, after some of its steps; a constant, which is inlined. */
typedef void amx_share(void *work, int steps);

#if FGQA_TILES
/* One step's product of one part of each operand. What is not `new` is in its tiles already.
 * A is the longer operand, of which the first-level cache keeps nothing until it is needed again: it leaves that to B. */
SIMD void amx_step(const int mt, const int nt, const int new_a, const int new_b, const bf16 *a, ptrdiff_t a_tile, ptrdiff_t a_row, const bf16 *b,
                   ptrdiff_t b_tile)
{
    const ptrdiff_t b_row = 64;
    if (new_a) { amx_load_stream(4, a, a_row); }
    if (new_b) { amx_load(6, b, b_row); }
    amx_dot(0, 4, 6);
    if (nt > 1) {
        if (new_b) { amx_load(7, b + b_tile, b_row); }
        amx_dot(1, 4, 7);
    }
    if (mt > 1) {
        if (new_a) { amx_load_stream(5, a + a_tile, a_row); }
        amx_dot(2, 5, 6);
        if (nt > 1) { amx_dot(3, 5, 7); }
    }
}

/* mt x nt tiles of C, both 1 or 2 and constant; after the product of every step and pair of parts `share` (or NULL) of `work`. */
SIMD void amx_block(const int mt, const int nt, const int add, int steps, const amx_operand *a, const bf16 *a0, const amx_operand *b, const bf16 *b0,
                    float *c, ptrdiff_t ldc, amx_share *const share, void *work)
{
    const ptrdiff_t row = ldc * (ptrdiff_t)sizeof(float), a_row = a->ld * (ptrdiff_t)sizeof(bf16);
    float *const c1 = c + AMX_SIDE * ldc;
    if (add) {
        amx_load(0, c, row);
        if (nt > 1) { amx_load(1, c + AMX_SIDE, row); }
        if (mt > 1) { amx_load(2, c1, row); }
        if (mt > 1 && nt > 1) { amx_load(3, c1 + AMX_SIDE, row); }
    } else {
        amx_zero(0);
        if (nt > 1) { amx_zero(1); }
        if (mt > 1) { amx_zero(2); }
        if (mt > 1 && nt > 1) { amx_zero(3); }
    }
    const int split = a->low != 0;
    for (int k = 0; k < steps && !split; k++, a0 += a->step, b0 += b->step) {
        amx_step(mt, nt, 1, 1, a0, a->tile, a_row, b0, b->tile);
        if (share) { share(work, 1); }
    }
    for (int k = 0; k < steps && split; k++, a0 += a->step, b0 += b->step) {   /* (low*low,) low*high, high*high, high*low: A's parts are read once */
        amx_step(mt, nt, 1, 1, a0 + a->low, a->tile, a_row, a->low_low ? b0 + b->low : b0, b->tile);
        if (share) { share(work, 1); }
        if (a->low_low) {
            amx_step(mt, nt, 0, 1, a0, a->tile, a_row, b0, b->tile);
            if (share) { share(work, 1); }
        }
        amx_step(mt, nt, 1, 0, a0, a->tile, a_row, b0, b->tile);
        if (share) { share(work, 1); }
        amx_step(mt, nt, 0, 1, a0, a->tile, a_row, b0 + b->low, b->tile);
        if (share) { share(work, 1); }
    }
    amx_store(0, c, row);
    if (nt > 1) { amx_store(1, c + AMX_SIDE, row); }
    if (mt > 1) { amx_store(2, c1, row); }
    if (mt > 1 && nt > 1) { amx_store(3, c1 + AMX_SIDE, row); }
}

/* m x n tiles of C. Columns outside. */
SIMD void amx_product_beside(const int add, int m, int n, int steps, const amx_operand *a, const amx_operand *b, float *c, ptrdiff_t ldc,
                             amx_share *const share, void *work)
{
    for (int j = 0; j < n; j += 2) {
        const bf16 *const b0 = b->data + j * b->tile;
        for (int i = 0; i < m; i += 2) {
            const bf16 *const a0 = a->data + i / 2 * a->pair;
            float *const to = c + i * AMX_SIDE * ldc + j * AMX_SIDE;
            if (i + 1 < m && j + 1 < n) {
                amx_block(2, 2, add, steps, a, a0, b, b0, to, ldc, share, work);
            } else if (i + 1 < m) {
                amx_block(2, 1, add, steps, a, a0, b, b0, to, ldc, share, work);
            } else if (j + 1 < n) {
                amx_block(1, 2, add, steps, a, a0, b, b0, to, ldc, share, work);
            } else {
                amx_block(1, 1, add, steps, a, a0, b, b0, to, ldc, share, work);
            }
        }
    }
}

#else
/* m x n tiles of C, two columns of tiles at a time. */
SIMD void amx_product_beside(const int add, int m, int n, int steps, const amx_operand *a, const amx_operand *b, float *c, ptrdiff_t ldc,
                             amx_share *const share, void *work)
{
    for (int j = 0; j < n; j += 2) {
        const bf16 *const b0 = b->data + j * b->tile;
        for (int i = 0; i < m; i++) {
            const bf16 *const a0 = a->data + i / 2 * a->pair + i % 2 * a->tile;
            float *const to = c + i * AMX_SIDE * ldc + j * AMX_SIDE;
            if (j + 1 < n) {
                (add ? dot_two_add : dot_two_set)(steps, a0, a->ld, a->step, b0, b->tile, b->step, to, ldc);
            } else {
                (add ? dot_one_add : dot_one_set)(steps, a0, a->ld, a->step, b0, b->tile, b->step, to, ldc);
            }
            if (share && (i % 2 || i + 1 == m)) { share(work, steps); }
        }
    }
}
#endif

SIMD void amx_product(const int add, int m, int n, int steps, const amx_operand *a, const amx_operand *b, float *c, ptrdiff_t ldc)
{
    amx_product_beside(add, m, n, steps, a, b, c, ldc, NULL, NULL);
}

/* ---- packing ---- */

/* n bfloat16 numbers, `stride` apart, and zeros up to AMX_PAD(n). */
SIMD void amx_row(bf16 *to, const void *from, int64_t stride, int32_t n)
{
    const bf16 *x = from;
    int32_t i = 0;
    if (stride != 1) {
        memset(to, 0, (size_t)AMX_PAD(n) * sizeof(bf16));
        for (; i < n; i++) { to[i] = x[i * stride]; }
        return;
    }
    for (; i + 32 <= n; i += 32) { _mm512_storeu_si512(to + i, _mm512_loadu_si512(x + i)); }
    if (i < n) { _mm512_storeu_si512(to + i, _mm512_maskz_loadu_epi16(((__mmask32)1 << (n - i)) - 1, x + i)); }
}

/* x = high + low, both bfloat16, as floats; low is 0 where x is not finite. Finite numbers
 * too large to be rounded up are cut off. */
SIMD vreal amx_high(vreal x)
{
    const __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), top = _mm512_set1_epi32(0x7F800000);
    const __mmask16 special = _mm512_cmpeq_epi32_mask(_mm512_and_si512(rounded, top), top) | _mm512_cmpeq_epi32_mask(_mm512_and_si512(bits, top), top);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
    const __m512i cut = _mm512_mask_or_epi32(bits, nan, bits, _mm512_set1_epi32(0x400000));
    return (vreal)_mm512_and_si512(_mm512_mask_blend_epi32(special, rounded, cut), _mm512_set1_epi32((int)0xFFFF0000));
}

SIMD vreal amx_low(vreal x, vreal high)
{
    const __m512i top = _mm512_set1_epi32(0x7F800000);
    const __mmask16 finite = _mm512_cmpneq_epi32_mask(_mm512_and_si512((__m512i)x, top), top);
    return (vreal)_mm512_maskz_sub_ps(finite, (__m512)x, (__m512)high);
}

/* n numbers at x as high parts and, `low` behind, low parts; zeros up to AMX_PAD(n). */
SIMD void amx_row_split(bf16 *to, ptrdiff_t low, const real *x, int32_t n)
{
    for (int32_t i = 0; i < AMX_PAD(n); i += 2 * VL) {
        vreal part[2], high[2];
        UNROLL(2)
        for (int v = 0; v < 2; v++) {
            const int32_t rest = n - i - v * VL;
            part[v] = rest >= VL ? v_load(x + i + v * VL) : rest > 0 ? v_load_part(x + i + v * VL, rest) : v_zero();
            high[v] = amx_high(part[v]);
        }
        _mm512_storeu_si512(to + i, amx_narrow((__m512)high[0], (__m512)high[1]));
        _mm512_storeu_si512(to + low + i, amx_narrow((__m512)amx_low(part[0], high[0]), (__m512)amx_low(part[1], high[1])));
    }
}

SIMD int amx_row_is_finite(const bf16 *x, int32_t padded)
{
    __mmask32 special = 0;
    const __m512i exponent = _mm512_set1_epi16(0x7F80);
    for (int32_t i = 0; i < padded; i += 32) {
        special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(x + i), exponent), exponent);
    }
    return special == 0;
}

/* 16 columns of pairs at x, rows ld numbers apart, to 16 rows of pairs. */
SIMD void amx_transpose_pairs(bf16 *to, ptrdiff_t to_ld, const bf16 *from, ptrdiff_t ld)
{
    v_transpose((real *)(void *)to, to_ld / 2, (const real *)(const void *)from, ld / 2);
}

/* Rows x[n][k] to B whose columns are the rows: step after step, `tiles` tiles of 16 rows each. */
SIMD void amx_pack_rows(bf16 *to, const bf16 *from, ptrdiff_t ld, int tiles, int steps)
{
    for (int k = 0; k < steps; k++) {
        for (int n = 0; n < tiles; n++, to += AMX_TILE) { amx_transpose_pairs(to, AMX_DEPTH, from + n * AMX_SIDE * ld + k * AMX_DEPTH, ld); }
    }
}

/* Numbers c .. c+15 of two rows, interleaved. */
SIMD __m512i amx_interleave(const bf16 *even, const bf16 *odd)
{
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)even));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)odd));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Rows x[k][n] to B whose terms are the rows: 32 rows, `tiles` tiles of 16 columns each. */
SIMD void amx_pack_pairs(bf16 *to, const bf16 *from, ptrdiff_t ld, int tiles)
{
    for (int n = 0; n < tiles; n++, to += AMX_TILE) {
        for (int k = 0; k < AMX_DEPTH; k += 2) {
            const bf16 *const row = from + k * ld + n * AMX_SIDE;
            _mm512_store_si512(to + k * AMX_SIDE, amx_interleave(row, row + ld));
        }
    }
}

/* Rows x[k][m] to A whose rows are the columns and terms the rows: 32 rows; two tiles of 16
 * columns after two, `pair` numbers apart. */
SIMD void amx_pack_columns(bf16 *to, ptrdiff_t pair, const bf16 *from, ptrdiff_t ld, int tiles)
{
    _Alignas(64) bf16 pairs[AMX_TILE];
    for (int m = 0; m < tiles; m++) {
        amx_pack_pairs(pairs, from + m * AMX_SIDE, ld, 1);
        amx_transpose_pairs(to + m / 2 * pair + m % 2 * AMX_TILE, AMX_DEPTH, pairs, AMX_DEPTH);
    }
}

#endif
