/* gemm.h - the micro-kernel behind every product of the forward and the backward pass.
 *
 *     C[m][lane] = store( sum_k A(m, k) * B[k][lane] )
 *
 * B and C are panels in scratch memory: rows of nv vectors (1 <= nv <= NV), ldb and ldc reals apart. A is scalars, each
 * broadcast to all lanes, so it may lie in the caller's own memory: gemm_row() takes A(m, k) = a[m*lda + k],
 * gemm_col() takes A(m, k) = a[k*lda + m]; nothing outside m x k is read.
 *
 * A lies in the second-level cache: the next tile's part of it is prefetched while this one is summed up, and so is C.
 *
 * The sum over k starts from zero and runs in order of k for every lane alone: its bits do not depend on m, nv or
 * neighbours.
 *
 *     row         registers   MR x NV   accumulators + B + A
 *     avx512      32          8 x 3     24 + 3 + 1
 *     avx2        16          4 x 3     12 + 3 + 1
 *     neon        32          8 x 3     24 + 3 + 1 (columns of A: + 2, of doubles + 4)
 *     portable    16          4 x 2      8 + 2 + 1 (+ products: no fused multiply-add)
 */
#ifndef FGQA_GEMM_H
#define FGQA_GEMM_H
#include "simd.h"

#if FGQA_PAIRS
#define MR 8
#define NV 2      /* panels of 32 lanes: two tiles */
#elif VBYTES == 64 || defined(__aarch64__)
#define MR 8
#define NV 3
#elif VBYTES == 32
#define MR 4
#define NV 3
#else
#define MR 4
#define NV 2
#endif

/* Where a multiply-add takes one lane of a register: columns of A come as vectors, whose lanes need no registers of their own. */
#if defined(__aarch64__)
#define GEMM_LANES 1
#else
#define GEMM_LANES 0
#endif

typedef enum {
    GEMM_SET,      /* C = sum */
    GEMM_ADD,      /* C = C + sum */
    GEMM_SCALE     /* C = C*factor[lane] + sum: the online softmax's rescaling rides on the store */
} gemm_store;

#define LINE (64 / (int)sizeof(real))   /* reals of a cache line */

/* One MR x NV tile; mr, nv, store and by_row are constants at every call, so that the accumulators are registers. */
SIMD void gemm_tile(const int mr, const int nv, const int by_row, const gemm_store store, int k, const real *a, ptrdiff_t lda,
                    const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, const real *factor, const real *ahead, ptrdiff_t ld_ahead)
{
    const int lanes = GEMM_LANES && !by_row && mr % VL == 0;
    vreal sum[MR][NV];
    UNROLL(8)
    for (int m = 0; m < mr; m++) {
        UNROLL(3)
        for (int v = 0; v < nv; v++) { sum[m][v] = v_zero(); }
    }
    if (store != GEMM_SET) {
        UNROLL(8)
        for (int m = 0; m < mr; m++) {
            UNROLL(3)
            for (int v = 0; v < nv; v++) { __builtin_prefetch(c + m * ldc + v * VL, 1); }
        }
    }
    for (int n = 0; n < k; n++) {
        vreal row[NV], column[MR / VL + 1];
        if (ahead && n % LINE == 0) {
            UNROLL(8)
            for (int m = 0; m < mr; m++) { __builtin_prefetch(ahead + m * ld_ahead + n, 0, 2); }
        }
        UNROLL(3)
        for (int v = 0; v < nv; v++) { row[v] = v_load(b + v * VL); }
        UNROLL(4)
        for (int m = 0; lanes && m < mr; m += VL) { column[m / VL] = v_load(a + m); }
        UNROLL(8)
        for (int m = 0; m < mr; m++) {
            const vreal x = v_set1(lanes ? column[m / VL][m % VL] : by_row ? a[m * lda] : a[m]);
            UNROLL(3)
            for (int v = 0; v < nv; v++) { sum[m][v] = x * row[v] + sum[m][v]; }
        }
        if (mr == MR && by_row && n % LINE == 0) {
            UNROLL(8)
            for (int m = 0; m < mr; m++) { __builtin_prefetch(a + (m + MR) * lda); }
        } else if (mr == MR && !by_row) {
            __builtin_prefetch(a + MR);
        }
        a += by_row ? 1 : lda;
        b += ldb;
    }
    UNROLL(8)
    for (int m = 0; m < mr; m++) {
        UNROLL(3)
        for (int v = 0; v < nv; v++) {
            real *to = c + m * ldc + v * VL;
            if (store == GEMM_SET) {
                v_store(to, sum[m][v]);
            } else if (store == GEMM_ADD) {
                v_store(to, v_load(to) + sum[m][v]);
            } else {
                v_store(to, v_load(to) * v_load(factor + v * VL) + sum[m][v]);
            }
        }
    }
}

SIMD void gemm_strip(const int nv, const int by_row, const gemm_store store, int m, int k, const real *a, ptrdiff_t lda,
                     const real *b, ptrdiff_t ldb, real *c, ptrdiff_t ldc, const real *factor, const real *ahead, ptrdiff_t ld_ahead)
{
    const ptrdiff_t step = by_row ? lda : 1, step_ahead = ahead ? ld_ahead : 0;
    for (; m >= MR; m -= MR, a += MR * step, c += MR * ldc, ahead += MR * step_ahead) {
        gemm_tile(MR, nv, by_row, store, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);
    }
#if MR > 4
    if (m >= 4) {
        gemm_tile(4, nv, by_row, store, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);
        m -= 4, a += 4 * step, c += 4 * ldc;
    }
#endif
    if (m >= 2) {
        gemm_tile(2, nv, by_row, store, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);
        m -= 2, a += 2 * step, c += 2 * ldc;
    }
    if (m == 1) { gemm_tile(1, nv, by_row, store, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead); }
}

#define GEMM_BY_NV(by_row, store, ahead, ld_ahead)                                                            \
    do {                                                                                                      \
        if (nv == 1) {                                                                                        \
            gemm_strip(1, by_row, store, m, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);              \
        } else if (nv == 2) {                                                                                 \
            gemm_strip(2, by_row, store, m, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);              \
        } else {                                                                                              \
            gemm_strip(NV, by_row, store, m, k, a, lda, b, ldb, c, ldc, factor, ahead, ld_ahead);             \
        }                                                                                                     \
    } while (0)

#define GEMM_DEFINE(name, by_row, store)                                                                              \
    FGQA_SHARED __attribute__((noinline)) void name(int m, int nv, int k, const real *a, ptrdiff_t lda, const real *b, \
                                                    ptrdiff_t ldb, real *c, ptrdiff_t ldc, const real *factor)        \
    {                                                                                                                 \
        GEMM_BY_NV(by_row, store, NULL, 0);                                                                           \
    }

GEMM_DEFINE(gemm_row_set, 1, GEMM_SET)
GEMM_DEFINE(gemm_row_add, 1, GEMM_ADD)
GEMM_DEFINE(gemm_col_add, 0, GEMM_ADD)
GEMM_DEFINE(gemm_col_scale, 0, GEMM_SCALE)

/* gemm_row_set() where A is read once only (decode: one panel), so that memory, not arithmetic, sets the pace: `ahead` (rows
 * ld_ahead apart, as many as m) is brought into L2 for the product that comes next. That one walks down the columns of its
 * operand, which the processor's own prefetchers follow badly; rows they follow by themselves. */
FGQA_SHARED __attribute__((noinline)) void gemm_row_set_ahead(int m, int nv, int k, const real *a, ptrdiff_t lda, const real *b, ptrdiff_t ldb,
                                                              real *c, ptrdiff_t ldc, const real *ahead, ptrdiff_t ld_ahead)
{
    const real *const factor = NULL;
    GEMM_BY_NV(1, GEMM_SET, ahead, ld_ahead);
}

#endif
