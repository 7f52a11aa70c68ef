/* amx.h - bfloat16 matrices for the tile unit: packing and the one product. Part of the row "amx" alone.
 *
 *     C[m][n] = sum over k of A[m][k]*B[k][n]      (or C + that), float32
 *
 * in steps of AMX_DEPTH terms, 16 x 16 results a tile, 2 x 2 tiles at a time.
 *
 *     A      tiles of 16 rows of 32 terms, rows any number of bytes apart: a matrix as it lies in memory
 *     B      1 KB a tile: pair of terms after pair, each 16 columns of 2:      b[k/2][n][k%2]
 *
 * Rows in memory become B by pairing the terms of a row (a transpose of 32-bit pairs), or by pairing rows (an interleave);
 * columns become A by pairing rows and transposing the pairs.
 */
#ifndef FGQA_AMX_H
#define FGQA_AMX_H
#include "amx_tile.h"
#include "simd.h"

#define AMX_DEPTH 32                 /* terms of a step */
#define AMX_SIDE 16                  /* rows and columns of a tile of C */
#define AMX_TILE 512                 /* bfloat16 numbers in a tile of A or B */
#define AMX_PAD(n) (((n) + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH)

typedef uint16_t bf16;

/* ---- the product ---- */

/* Where an operand's tiles lie, in elements: those of one step after another `step` apart, the next row or column of tiles `tile`. */
typedef struct { const bf16 *data; ptrdiff_t step, tile, ld; } amx_operand;
typedef struct { float *data; ptrdiff_t ld; } amx_result;

/* mt x nt tiles of C, both 1 or 2 and constant. */
SIMD void amx_block(const int mt, const int nt, const int add, int steps, const amx_operand *a, const bf16 *a0, const amx_operand *b, const bf16 *b0,
                    float *c, ptrdiff_t ldc)
{
    const ptrdiff_t row = ldc * (ptrdiff_t)sizeof(float), a_row = a->ld * (ptrdiff_t)sizeof(bf16), b_row = 64;
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
    for (int k = 0; k < steps; k++) {
        amx_load(4, a0, a_row);
        amx_load(6, b0, b_row);
        amx_dot(0, 4, 6);
        if (nt > 1) {
            amx_load(7, b0 + b->tile, b_row);
            amx_dot(1, 4, 7);
        }
        if (mt > 1) {
            amx_load(5, a0 + a->tile, a_row);
            amx_dot(2, 5, 6);
            if (nt > 1) { amx_dot(3, 5, 7); }
        }
        a0 += a->step;
        b0 += b->step;
    }
    amx_store(0, c, row);
    if (nt > 1) { amx_store(1, c + AMX_SIDE, row); }
    if (mt > 1) { amx_store(2, c1, row); }
    if (mt > 1 && nt > 1) { amx_store(3, c1 + AMX_SIDE, row); }
}

/* m x n tiles of C. Columns outside: the rows of A are the longer operand and stay in the first-level cache. */
SIMD void amx_product(const int add, int m, int n, int steps, const amx_operand *a, const amx_operand *b, float *c, ptrdiff_t ldc)
{
    for (int j = 0; j < n; j += 2) {
        const bf16 *const b0 = b->data + j * b->tile;
        for (int i = 0; i < m; i += 2) {
            const bf16 *const a0 = a->data + i * a->tile;
            float *const to = c + i * AMX_SIDE * ldc + j * AMX_SIDE;
            if (i + 1 < m && j + 1 < n) {
                amx_block(2, 2, add, steps, a, a0, b, b0, to, ldc);
            } else if (i + 1 < m) {
                amx_block(2, 1, add, steps, a, a0, b, b0, to, ldc);
            } else if (j + 1 < n) {
                amx_block(1, 2, add, steps, a, a0, b, b0, to, ldc);
            } else {
                amx_block(1, 1, add, steps, a, a0, b, b0, to, ldc);
            }
        }
    }
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

/* Rows x[k][m] to A whose rows are the columns and terms the rows: 32 rows; tile of 16 columns after tile, `tile` numbers apart. */
SIMD void amx_pack_columns(bf16 *to, ptrdiff_t tile, const bf16 *from, ptrdiff_t ld, int tiles)
{
    _Alignas(64) bf16 pairs[AMX_TILE];
    for (int m = 0; m < tiles; m++, to += tile) {
        amx_pack_pairs(pairs, from + m * AMX_SIDE, ld, 1);
        amx_transpose_pairs(to, AMX_DEPTH, pairs, AMX_DEPTH);
    }
}

/* 2^x as v_exp2() gives it, in a task, where subnormal results are flushed. */
SIMD vreal amx_exp2(vreal x)
{
    const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    return (vreal)_mm512_scalef_ps((__m512)exp2_polynomial((vreal)f), (__m512)x);
}

/* The same to 8.6e-5 (minimax, p(0) = 1): for what is rounded to bfloat16 and not added up. */
SIMD vreal amx_exp2_short(vreal x)
{
    const vreal f = (vreal)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    const vreal p = ((v_set1(0.07706724107265472f) * f + v_set1(0.22764497995376587f)) * f + v_set1(0.6951166391372681f)) * f + v_set1(1);
    return (vreal)_mm512_scalef_ps((__m512)p, (__m512)x);
}

/* Two vectors as bfloat16 numbers a0 b0 a1 b1 ... */
SIMD __m512i amx_narrow_pairs(vreal a, vreal b)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, amx_narrow((__m512)a, (__m512)b));
}

#endif
