/* term_copy.h - a bias or a mask tensor whose rows do not start on 16 bytes, copied to rows that do, which rows for Hopper read
 * by TMA or in vectors. Only the parts that are there: what heads, rows or sequences share is copied once.
 */
#ifndef FGQA_TERM_COPY_H
#define FGQA_TERM_COPY_H
#include "../../core/problem.h"
#include "../../core/workspace.h"

/* Of a bias, of a mask: bits. */
enum { FGQA_COPY_BIAS = 1, FGQA_COPY_MASK = 2, FGQA_COPY_ROW = 16, FGQA_COPY_BEGIN = 256 };

static inline fgqa_arg fgqa_copied_term(int which) { return which == FGQA_COPY_BIAS ? FGQA_ARG_bias : FGQA_ARG_mask; }

/* Bytes of an element: fgqa_dtype_bytes() for C and CUDA. */
static inline int64_t fgqa_term_bytes(const fgqa_view *v) { return v->dtype == FGQA_BOOL ? 1 : v->dtype == FGQA_F64 ? 8 : v->dtype == FGQA_F32 ? 4 : 2; }

/* Elements of a row side by side, and rows not on `alignment` bytes. */
static inline int fgqa_term_is_off(const fgqa_view *v, int64_t alignment)
{
    const int64_t strides = v->stride_b | v->stride_h | v->stride_s, bytes = fgqa_term_bytes(v);
    return v->data != NULL && v->stride_d == 1 && strides >= 0 && (strides * bytes % alignment != 0 || (uintptr_t)v->data % (uintptr_t)alignment != 0);
}

/* Extents of batch, heads and rows that a copy has, and bytes of a row. */
typedef struct { int64_t batch, heads, rows, row_bytes; } fgqa_term_extent;

static inline fgqa_term_extent fgqa_term_extent_of(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *v = &p->view[arg];
    const int64_t bytes = fgqa_term_bytes(v) * p->sk;
    const fgqa_term_extent x = {v->stride_b ? p->b : 1, v->stride_h ? p->hq : 1, v->stride_s ? p->sq : 1, (bytes + FGQA_COPY_ROW - 1) / FGQA_COPY_ROW * FGQA_COPY_ROW};
    return x;
}

static inline double fgqa_term_copy_bytes(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_term_extent x = fgqa_term_extent_of(p, arg);
    return (double)x.batch * (double)x.heads * (double)x.rows * (double)x.row_bytes;
}

/* `copy`: the problem over copies of `which`, whose memory is carved from `base` or, with base NULL, measured. Returns its size. */
static inline size_t fgqa_term_copy(const fgqa_problem *p, int which, void *base, fgqa_problem *copy)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    *copy = *p;
    for (int of = FGQA_COPY_BIAS; of <= FGQA_COPY_MASK; of *= 2) {
        if (!(which & of)) { continue; }
        const fgqa_arg arg = fgqa_copied_term(of);
        const fgqa_term_extent x = fgqa_term_extent_of(p, arg);
        const int64_t row = x.row_bytes / fgqa_term_bytes(&p->view[arg]), head = row * x.rows;
        fgqa_view *v = &copy->view[arg];
        v->data = fgqa_arena_take(&arena, (size_t)(x.batch * x.heads * x.rows), (size_t)x.row_bytes);
        v->stride_b = v->stride_b ? head * x.heads : 0;
        v->stride_h = v->stride_h ? head : 0;
        v->stride_s = v->stride_s ? row : 0;
    }
    return (arena.used + FGQA_COPY_BEGIN - 1) / FGQA_COPY_BEGIN * FGQA_COPY_BEGIN;
}

#ifdef __cplusplus
extern "C"
#endif
/* `copy` as from fgqa_term_copy() with memory. A cudaError_t. */
int fgqa_term_copy_launch(const fgqa_problem *problem, const fgqa_problem *copy, int which, void *stream);

#endif
