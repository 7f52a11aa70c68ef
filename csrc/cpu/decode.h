/* decode.h - the two products for a handful of packed rows, with vectors along the head dim.
 *
 * With at most FEW_ROWS rows (a decode step: the heads of a group) lanes of packed rows would be mostly idle and every
 * scalar of K and V would take a broadcast of its own. Here a row of K or V is read once, in full vectors, for all rows:
 * few instructions per byte leave the core's window to loads in flight, which is what a memory-bound pass is made of.
 *
 *     few_scores()       s[row][key]  = q[row] . k[key]
 *     few_accumulate()   o[row][:]    = o[row][:]*factor[row] + sum over keys of p[row][key] * v[key][:],  few_keys() at a time
 *
 * q and o are rows of columns rounded up to VL. Rows of K and V that are bfloat16 or
 * float16 become floats in registers: a copy as floats would be written and read again. Nothing outside the d or dv elements of a
 * row is read. A row's bits do not depend on its place among rows, nor on how keys are stored: every sum runs over the
 * same vectors and folds their lanes by halves.
 */
#ifndef FGQA_DECODE_H
#define FGQA_DECODE_H
#include "simd.h"

/* FEW_ROWS: beyond, a vector of packed rows does more per instruction; on aarch64, where each scalar of A takes a load, not yet
 * one but two. FEW_SUMS: accumulators, half of the registers; FEW_DOTS: of scores. */
#if defined(__aarch64__)
#define FEW_ROWS VL
#define FEW_SUMS 16
#define FEW_DOTS FEW_SUMS
#else
#define FEW_ROWS (VL / 2)
#define FEW_SUMS (VBYTES == 64 ? 16 : 8)
#define FEW_DOTS (FEW_SUMS < VL ? FEW_SUMS : VL)
#endif
/* Rows of K and V are prefetched about this many bytes of them ahead, in lists no more than there are in a
 * block; beyond the last row that does no harm. */
#define FEW_AHEAD 8192
#define LIST_AHEAD 64       /* rows behind those of a block whose addresses its list has, too */

/* Rows of K or V: `stride` apart from `data` on, or where `list` says (pages of a cache; what is not real), as this is stored. */
typedef enum { FEW_BLOCK, FEW_LIST, FEW_LIST_BF16, FEW_LIST_F16 } few_form;
typedef struct { const real *data; ptrdiff_t stride; const void *const *list; few_form form; } few_source;   /* list: few_ahead() longer */
#define FEW_HAS_BF16 (!FGQA_REAL_F64)
#define FEW_HAS_F16 (SIMD_HALF && !FGQA_REAL_F64)

SIMD ptrdiff_t few_bytes(const few_form form) { return form == FEW_LIST_BF16 || form == FEW_LIST_F16 ? 2 : (ptrdiff_t)sizeof(real); }

SIMD const void *few_row(const few_source *from, const few_form form, int j) { return form != FEW_BLOCK ? from->list[j] : from->data + j * from->stride; }

/* Columns c .. c+VL-1 of a row. */
SIMD vreal few_load(const void *row, const few_form form, int c)
{
    (void)form;
#if FEW_HAS_BF16
    if (form == FEW_LIST_BF16) { return v_load_bf16((const uint16_t *)row + c); }
#endif
#if FEW_HAS_F16
    if (form == FEW_LIST_F16) { return v_load_f16((const uint16_t *)row + c); }
#endif
    return v_load((const real *)row + c);
}

/* The first n < VL of them, then zeros. */
SIMD vreal few_load_part(const void *row, const few_form form, int c, int n)
{
    uint16_t part[VL] = {0};
    if (few_bytes(form) == (ptrdiff_t)sizeof(real)) { return v_load_part((const real *)row + c, n); }
    memcpy(part, (const uint16_t *)row + c, (size_t)n * sizeof *part);
    return few_load(part, form, 0);
}

/* Rows rounded up to a power of two: what the products below compute. */
SIMD int few_lanes(int rows) { return rows <= 2 ? rows : rows <= 4 ? 4 : 8; }

SIMD int few_min(int a, int b) { return a < b ? a : b; }

SIMD int few_max(int a, int b) { return a > b ? a : b; }

/* Vectors of columns that are accumulated at once. */
SIMD int few_width(int rows) { return few_min(FEW_SUMS / rows, 8); }

/* Keys whose columns are accumulated in registers before o is touched: where wide rows take several passes few
 * enough that all but the first find V, stored in this form, in L1, beside what they prefetch, else many enough
 * that loading and storing o does not count. */
SIMD int few_keys(int rows, int dv, const few_form form)
{
    return dv <= few_width(few_lanes(rows)) * VL ? 32 : few_max(8, few_min(32, FEW_AHEAD / (dv * (int)few_bytes(form))));
}

/* Vectors of a row for each prefetch: those of a cache line, where they are short. */
SIMD int few_line(const few_form form) { return VBYTES == 16 ? 64 / (VL * (int)few_bytes(form)) : 1; }

/* Rows ahead, of a block of n. */
SIMD int few_ahead(const few_form form, int n, int columns)
{
    const int rows = few_max(8, columns > 0 ? FEW_AHEAD / (columns * (int)few_bytes(form)) + 1 : 0);
    return form == FEW_BLOCK ? rows : few_min(rows, few_min(n, LIST_AHEAD));
}

/* Products go over rows and columns in orders of their own. Lines of rows that lie side by side are prefetched in the one in
 * which they lie: memory is faster so. Of listed rows each is prefetched where row j, `rows` before it, is read. */
typedef struct { const real *at; ptrdiff_t skip; int left, pieces; } few_cursor;   /* `pieces` of a row, skip: to the next row */

SIMD few_cursor few_cursor_begin(const few_source *from, int row, int pieces, int columns)
{
    const few_cursor next = {from->form == FEW_BLOCK ? from->data + row * from->stride : NULL, from->stride - columns, pieces, pieces};
    return next;
}

SIMD void few_prefetch_next(few_cursor *next, const int vectors)
{
    UNROLL(8)
    for (int n = 0; n < vectors * VBYTES; n += 64) { __builtin_prefetch((const char *)next->at + n); }
    next->at += vectors * VL;
    if (--next->left == 0) {
        next->at += next->skip;
        next->left = next->pieces;
    }
}

SIMD void few_prefetch(const few_source *from, const few_form form, int j, int c, int rows)
{
    if (form != FEW_BLOCK) {
        __builtin_prefetch((const char *)from->list[j + rows] + c * few_bytes(form));
    } else {
        __builtin_prefetch(from->data + (j + rows) * from->stride + c);
    }
}

/* The sum over the lanes of each x[i], i < n, or the largest of them, is lane i*VL/n of
 * the result; n a power of two, at most VL. */
SIMD vreal few_fold(vreal *x, const int n, const int largest)
{
    UNROLL(4)
    for (int left = n; left > 1; left /= 2) {
        UNROLL(8)
        for (int i = 0; i < left / 2; i++) {
            const vreal low = SIMD_SHUFFLE(x[i], x[i + left / 2], INTERLEAVE_LOW), high = SIMD_SHUFFLE(x[i], x[i + left / 2], INTERLEAVE_HIGH);
            x[i] = largest ? v_max(low, high) : low + high;
        }
    }
    vreal all = x[0];
    UNROLL(4)
    for (int lanes = VL; lanes > n; lanes /= 2) {
        const vreal low = SIMD_SHUFFLE(all, all, INTERLEAVE_LOW), high = SIMD_SHUFFLE(all, all, INTERLEAVE_HIGH);
        all = largest ? v_max(low, high) : low + high;
    }
    return all;
}

/* s of keys j0.., `keys` of them, for `rows` rows, keys*rows at most VL, from the lanes of sum[row*keys + key]. */
SIMD void few_put(const int rows, const int keys, int j0, vreal *sum, real *s, ptrdiff_t lds)
{
    const int step = VL / (keys * rows);
    _Alignas(64) real lane[VL];
    v_store(lane, few_fold(sum, keys * rows, 0));
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(4)
        for (int j = 0; j < keys; j++) { s[r * lds + j0 + j] = lane[(r * keys + j) * step]; }
    }
}

/* Keys j0.. , `keys` at once, for `rows` rows; form, rows and keys are constants, keys*rows a power of two, at most FEW_DOTS. */
SIMD void few_dot(const int rows, const few_form form, const int keys, int j0, int d, const few_source *k, const real *q, ptrdiff_t ldq, real *s,
                  ptrdiff_t lds, int ahead)
{
    vreal sum[FEW_SUMS], key[4];
    const void *at[4];
    const int pieces = form == FEW_BLOCK ? d / (keys * VL) : 0, in_order = pieces * keys * VL;
    few_cursor next = few_cursor_begin(k, j0 + ahead, pieces, in_order);
    UNROLL(4)
    for (int j = 0; j < keys; j++) { at[j] = few_row(k, form, j0 + j); }
    UNROLL(16)
    for (int i = 0; i < keys * rows; i++) { sum[i] = v_zero(); }
    int c = 0;
    for (; c + VL <= d; c += VL) {
        if (c < in_order) { few_prefetch_next(&next, keys); }
        UNROLL(4)
        for (int j = 0; j < keys; j++) {
            key[j] = few_load(at[j], form, c);
            if (c >= in_order && c / VL % few_line(form) == 0) { few_prefetch(k, form, j0 + j, c, ahead); }
        }
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const vreal query = v_load(q + r * ldq + c);
            UNROLL(4)
            for (int j = 0; j < keys; j++) { sum[r * keys + j] += key[j] * query; }
        }
    }
    if (c < d) {
        UNROLL(4)
        for (int j = 0; j < keys; j++) { key[j] = few_load_part(at[j], form, c, d - c); }
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const vreal query = v_load(q + r * ldq + c);
            UNROLL(4)
            for (int j = 0; j < keys; j++) { sum[r * keys + j] += key[j] * query; }
        }
    }
    const int keys_put = keys < VL ? keys : VL, rows_put = keys * rows < VL ? rows : VL / keys_put;
    UNROLL(8)
    for (int r = 0; r < rows; r += rows_put) {
        UNROLL(4)
        for (int j = 0; j < keys; j += keys_put) { few_put(rows_put, keys_put, j0 + j, sum + r * keys + j, s + r * lds, lds); }
    }
}

SIMD void few_scores_strip(const int rows, const few_form form, int n, int d, const few_source *k, const real *q, ptrdiff_t ldq, real *s,
                           ptrdiff_t lds)
{
    const int keys = FEW_DOTS / rows < 4 ? FEW_DOTS / rows : 4, ahead = few_ahead(form, n, d);
    int j = 0;
    for (; j + keys <= n; j += keys) { few_dot(rows, form, keys, j, d, k, q, ldq, s, lds, ahead); }
    for (; j < n; j++) { few_dot(rows, form, 1, j, d, k, q, ldq, s, lds, ahead); }
}

/* nv vectors of columns, from c0 on, of `rows` rows, over n keys from j0 on. `part` > 0: nv is 1 and the vector has only that
 * many columns. `next`, or NULL: what passes prefetch together; else each does its own columns, `ahead` rows ahead. */
SIMD void few_axpy(const int rows, const few_form form, const int nv, int part, int j0, int n, int c0, int ahead, few_cursor *next, const real *p,
                   ptrdiff_t ldp, const few_source *v, real *o, ptrdiff_t ldo, const real *factor)
{
    vreal sum[FEW_SUMS];
    UNROLL(16)
    for (int i = 0; i < rows * nv; i++) { sum[i] = v_zero(); }
    for (int j = 0; j < n; j++) {
        vreal value[8];
        const void *const at = few_row(v, form, j0 + j);
        if (next) { few_prefetch_next(next, nv); }
        UNROLL(8)
        for (int c = 0; c < nv; c++) {
            value[c] = part ? few_load_part(at, form, c0, part) : few_load(at, form, c0 + c * VL);
            if (!next && c % few_line(form) == 0) { few_prefetch(v, form, j0 + j, c0 + c * VL, ahead); }
        }
        UNROLL(8)
        for (int r = 0; r < rows; r++) {
            const vreal weight = v_set1(p[r * ldp + j0 + j]);
            UNROLL(8)
            for (int c = 0; c < nv; c++) { sum[r * nv + c] += weight * value[c]; }
        }
    }
    UNROLL(8)
    for (int r = 0; r < rows; r++) {
        UNROLL(8)
        for (int c = 0; c < nv; c++) {
            real *to = o + r * ldo + c0 + c * VL;
            v_store(to, v_load(to) * v_set1(factor ? factor[r] : 1) + sum[r * nv + c]);
        }
    }
}

SIMD void few_accumulate_strip(const int rows, const few_form form, int n, int dv, int most, const real *p, ptrdiff_t ldp, const few_source *v,
                               real *o, ptrdiff_t ldo, const real *factor)
{
    const int nv = few_width(rows), ahead = few_ahead(form, n, dv), pieces = dv / (nv * VL);
    for (int j = 0; j < n; j += most) {
        const int keys = few_min(n - j, most);
        few_cursor next = few_cursor_begin(v, j + ahead, pieces, pieces * nv * VL);
        const real *scale = j == 0 ? factor : NULL;
        int c = 0;
        for (; c + nv * VL <= dv; c += nv * VL) {
            few_axpy(rows, form, nv, 0, j, keys, c, ahead, form == FEW_BLOCK ? &next : NULL, p, ldp, v, o, ldo, scale);
        }
        UNROLL(4)
        for (int half = nv / 2; half > 0; half /= 2) {
            for (; c + half * VL <= dv; c += half * VL) { few_axpy(rows, form, half, 0, j, keys, c, ahead, NULL, p, ldp, v, o, ldo, scale); }
        }
        if (c < dv) { few_axpy(rows, form, 1, dv - c, j, keys, c, ahead, NULL, p, ldp, v, o, ldo, scale); }
    }
}

/* The constants of the strips: rows rounded up to a power of two; lanes beyond the rows hold q = 0, p is what it is, and o has
 * room for FEW_ROWS rows. */
#define FEW_BY_ROWS(call, rows, ...)                          \
    do {                                                      \
        if (rows == 1) {                                      \
            call(1, __VA_ARGS__);                             \
        } else if (FEW_ROWS >= 2 && rows == 2) {              \
            call(FEW_ROWS >= 2 ? 2 : 1, __VA_ARGS__);         \
        } else if (FEW_ROWS >= 4 && rows <= 4) {              \
            call(FEW_ROWS >= 4 ? 4 : 1, __VA_ARGS__);         \
        } else {                                              \
            call(FEW_ROWS >= 8 ? 8 : 1, __VA_ARGS__);         \
        }                                                     \
    } while (0)

#define FEW_BY_FORM(call, form, rows, ...)                                          \
    do {                                                                            \
        if (FEW_HAS_BF16 && (form) == FEW_LIST_BF16) {                              \
            FEW_BY_ROWS(call, rows, FEW_HAS_BF16 ? FEW_LIST_BF16 : 0, __VA_ARGS__); \
        } else if (FEW_HAS_F16 && (form) == FEW_LIST_F16) {                         \
            FEW_BY_ROWS(call, rows, FEW_HAS_F16 ? FEW_LIST_F16 : 0, __VA_ARGS__);   \
        } else if ((form) == FEW_LIST) {                                            \
            FEW_BY_ROWS(call, rows, FEW_LIST, __VA_ARGS__);                         \
        } else {                                                                    \
            FEW_BY_ROWS(call, rows, FEW_BLOCK, __VA_ARGS__);                        \
        }                                                                           \
    } while (0)

FGQA_SHARED __attribute__((noinline)) void few_scores(int rows, int n, int d, const few_source *k, const real *q, ptrdiff_t ldq, real *s, ptrdiff_t lds)
{
    FEW_BY_FORM(few_scores_strip, k->form, rows, n, d, k, q, ldq, s, lds);
}

FGQA_SHARED __attribute__((noinline)) void few_accumulate(int rows, int n, int dv, int most, const real *p, ptrdiff_t ldp, const few_source *v,
                                                          real *o, ptrdiff_t ldo, const real *factor)
{
    FEW_BY_FORM(few_accumulate_strip, v->form, rows, n, dv, most, p, ldp, v, o, ldo, factor);
}

#endif
