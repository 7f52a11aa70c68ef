/* amx_dot.h - the product of amx.h by VDPBF16PS, for processors without a tile unit.
 *
 *     sum[m][n] += a[m][2k]*b[2k][n] + a[m][2k+1]*b[2k+1][n]      a pair of terms is broadcast, a vector holds a tile's columns
 *
 * Operands lie as for tiles, in one part (amx.h), and subnormal numbers count as 0, as there. Sums start from zero and meet C at
 * the end. Rows and columns in registers: DOT_ROWS x two tiles, 16 sums, enough for the instruction's latency; or 16 x one.
 *
 * The rows of A that follow lie in the second-level cache and are prefetched, and so is C.
 */
#ifndef FGQA_AMX_DOT_H
#define FGQA_AMX_DOT_H
#include "amx_weights.h"

#define DOT_ROWS 8

/* mr rows x nt tiles of C; both constants. */
SIMD void dot_rows(const int mr, const int nt, const int add, int steps, const bf16 *a, ptrdiff_t lda, ptrdiff_t step_a, const bf16 *b,
                   ptrdiff_t tile_b, ptrdiff_t step_b, float *c, ptrdiff_t ldc)
{
    __m512 sum[AMX_SIDE][2];
    UNROLL(16)
    for (int m = 0; m < mr; m++) {
        UNROLL(2)
        for (int n = 0; n < nt; n++) { sum[m][n] = _mm512_setzero_ps(); }
    }
    if (add) {
        UNROLL(16)
        for (int m = 0; m < mr; m++) {
            UNROLL(2)
            for (int n = 0; n < nt; n++) { __builtin_prefetch(c + m * ldc + n * AMX_SIDE, 1); }
        }
    }
    for (int k = 0; k < steps; k++) {
        UNROLL(16)
        for (int m = 0; m < mr; m++) { __builtin_prefetch(a + (m + mr) * lda); }
        UNROLL(2)
        for (int pair = 0; pair < AMX_DEPTH / 2; pair++) {
            __m512bh row[2];
            UNROLL(2)
            for (int n = 0; n < nt; n++) { row[n] = (__m512bh)_mm512_load_si512(b + n * tile_b + pair * AMX_DEPTH); }
            UNROLL(16)
            for (int m = 0; m < mr; m++) {
                int32_t x;
                memcpy(&x, a + m * lda + 2 * pair, sizeof x);
                UNROLL(2)
                for (int n = 0; n < nt; n++) { sum[m][n] = _mm512_dpbf16_ps(sum[m][n], (__m512bh)_mm512_set1_epi32(x), row[n]); }
            }
        }
        a += step_a;
        b += step_b;
    }
    UNROLL(16)
    for (int m = 0; m < mr; m++) {
        UNROLL(2)
        for (int n = 0; n < nt; n++) {
            float *const to = c + m * ldc + n * AMX_SIDE;
            _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[m][n]) : sum[m][n]);
        }
    }
}

/* AMX_SIDE rows. */
#define DOT_DEFINE(name, mr, nt, add)                                                                                          \
    FGQA_SHARED __attribute__((noinline)) void name(int steps, const bf16 *a, ptrdiff_t lda, ptrdiff_t step_a, const bf16 *b,  \
                                                    ptrdiff_t tile_b, ptrdiff_t step_b, float *c, ptrdiff_t ldc)               \
    {                                                                                                                          \
        for (int m = 0; m < AMX_SIDE; m += mr) {                                                                               \
            dot_rows(mr, nt, add, steps, a + m * lda, lda, step_a, b, tile_b, step_b, c + m * ldc, ldc);                       \
        }                                                                                                                      \
    }

DOT_DEFINE(dot_two_set, DOT_ROWS, 2, 0)
DOT_DEFINE(dot_two_add, DOT_ROWS, 2, 1)
DOT_DEFINE(dot_one_set, AMX_SIDE, 1, 0)
DOT_DEFINE(dot_one_add, AMX_SIDE, 1, 1)

#endif
