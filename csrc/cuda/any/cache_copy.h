/* cache_copy.h - the keys and values that a call sees of its KV cache, in contiguous memory and in q's dtype, for forward rows
 * that cannot read the cache as it is: float8 elements, pages of any size, left padding in front of pages. Scales of a cache are
 * not in it.
 */
#ifndef FGQA_CACHE_COPY_H
#define FGQA_CACHE_COPY_H
#include "../../core/problem.h"
#include "../../core/workspace.h"

/* Slots around those that are seen, of which nothing may be garbage: an inf or NaN there would have a tile done twice
 * (sm90/careful.cuh). Not less than a block of keys has. */
enum { FGQA_COPY_MARGIN = 128 };

/* `copy`: the problem over the copy, whose memory is carved from `base` or, with base NULL, measured. Returns its size. */
static inline size_t fgqa_cache_copy(const fgqa_problem *p, void *base, fgqa_problem *copy)
{
    static const fgqa_arg args[] = {FGQA_ARG_k, FGQA_ARG_v};
    const size_t rows = (size_t)p->b * (size_t)p->hk * (size_t)p->sk;
    fgqa_arena arena = fgqa_arena_begin(base);
    *copy = *p;
    for (int n = 0; n < 2; n++) {
        const int64_t columns = args[n] == FGQA_ARG_k ? p->d : p->dv, head = columns * p->sk;
        void *data = fgqa_arena_take(&arena, rows * (size_t)columns, fgqa_dtype_bytes(p->dtype));
        const fgqa_view view = {data, p->dtype, head * p->hk, head, columns, 1};
        copy->view[args[n]] = view;
    }
    copy->cache.table = NULL;
    copy->cache.page_size = p->cache.capacity;
    copy->cache.pages = p->b;
    return (arena.used + FGQA_ALIGNMENT - 1) / FGQA_ALIGNMENT * FGQA_ALIGNMENT;
}

#ifdef __cplusplus
extern "C"
#endif
/* Rows of the cache start on 16 bytes, head dims are multiples of 8, q has 16-bit elements. A cudaError_t. */
int fgqa_cache_copy_launch(const fgqa_problem *problem, const fgqa_problem *copy, void *stream);

#endif
