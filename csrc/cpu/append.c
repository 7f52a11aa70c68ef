/* append.c - new keys and values into a KV cache: rotary embedding, division by the cache's scale, its dtype.
 *
 * Arithmetic is float64: there are few of them, and each is rounded once; what is not changed is copied bit by bit. A failed call
 * leaves the cache as it was, so what is overwritten is kept until the call has succeeded.
 */
#include <string.h>
#define FGQA_ISA portable
#define FGQA_REAL_F64 1
#include "cpu.h"
#include "rotary.h"
#include "threads.h"

#define ROWS_PER_TASK 32

typedef struct { const fgqa_problem *p; char *kept; int undo; } append_job;

static int64_t new_row_blocks(const fgqa_problem *p) { return (p->cache.new_max + ROWS_PER_TASK - 1) / ROWS_PER_TASK; }

static size_t row_bytes(const fgqa_problem *p, fgqa_arg arg)
{
    return (size_t)(arg == FGQA_ARG_k ? p->d : p->dv) * fgqa_dtype_bytes(p->view[arg].dtype);
}

size_t fgqa_cpu_append_bytes(const fgqa_problem *p)
{
    return (size_t)p->b * (size_t)p->hk * (size_t)p->cache.new_max * (row_bytes(p, FGQA_ARG_k) + row_bytes(p, FGQA_ARG_v));
}

static char *view_row(const fgqa_view *view, int64_t b, int64_t h, int64_t s)
{
    return (char *)view->data + (b * view->stride_b + h * view->stride_h + s * view->stride_s) * (int64_t)fgqa_dtype_bytes(view->dtype);
}

/* `n` elements from one row to another, bit by bit. */
static void copy_row(char *to, int64_t to_stride, const char *from, int64_t from_stride, int32_t n, size_t bytes)
{
    if (to_stride == 1 && from_stride == 1) {
        memcpy(to, from, (size_t)n * bytes);
        return;
    }
    for (int32_t c = 0; c < n; c++) { memcpy(to + c * to_stride * (int64_t)bytes, from + c * from_stride * (int64_t)bytes, bytes); }
}

/* Elements [0, cols) of a row in float64: rotated, scaled, rounded to the cache's dtype. */
static void convert_row(const append_job *job, const fgqa_view *to, char *row, const fgqa_view *from, const char *source, int32_t cols,
                        const rotary_angles *angles, double scale)
{
    real x[FGQA_MAX_HEAD_DIM];
    row_load(x, source, from->dtype, from->stride_d, cols);
    if (angles) { rotary_turn(x, angles, &job->p->cache.rotary); }
    for (int32_t c = 0; c < cols; c++) { x[c] /= scale; }
    row_store(row, to->dtype, to->stride_d, x, cols);
}

/* Row i of k_new or v_new of sequence n into its slot, or the slot back to what it was. angles NULL: not rotated. */
static void append_row(const append_job *job, fgqa_arg arg, int32_t n, int32_t h, int32_t i, const rotary_angles *angles)
{
    const fgqa_problem *p = job->p;
    const fgqa_cache *cache = &p->cache;
    const int is_key = arg == FGQA_ARG_k;
    const fgqa_view *to = &p->view[arg], *from = is_key ? &cache->k_new : &cache->v_new, *scale = is_key ? &cache->k_scale : &cache->v_scale;
    const int32_t cols = is_key ? p->d : p->dv, slot = fgqa_cache_before(cache, n) + i;
    const size_t bytes = fgqa_dtype_bytes(to->dtype), index = ((size_t)n * (size_t)p->hk + (size_t)h) * (size_t)cache->new_max + (size_t)i;
    char *kept = job->kept + index * (row_bytes(p, FGQA_ARG_k) + row_bytes(p, FGQA_ARG_v)) + (is_key ? 0 : row_bytes(p, FGQA_ARG_k));
    char *row = view_row(to, fgqa_cache_page(cache, n, slot), h, slot % cache->page_size);
    if (job->undo) {
        copy_row(row, to->stride_d, kept, 1, cols, bytes);
        return;
    }
    copy_row(kept, 1, row, to->stride_d, cols, bytes);
    const char *source = view_row(from, n, h, i);
    if (from->dtype != to->dtype) {
        const double divisor = scale->data ? *(const float *)(const void *)view_row(scale, n, h, 0) : 1;
        convert_row(job, to, row, from, source, cols, angles, divisor);
        return;
    }
    copy_row(row, to->stride_d, source, from->stride_d, cols, bytes);
    if (angles) { convert_row(job, to, row, from, source, 2 * cache->rotary.pairs, angles, 1); }
}

static void append_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const append_job *job = context;
    const fgqa_problem *p = job->p;
    const int64_t blocks = new_row_blocks(p);
    const int32_t n = (int32_t)(task / blocks), begin = (int32_t)(task % blocks) * ROWS_PER_TASK, rows = fgqa_cache_new(&p->cache, n);
    const int32_t end = rows - begin < ROWS_PER_TASK ? rows : begin + ROWS_PER_TASK;
    (void)worker;
    for (int32_t i = begin; i < end; i++) {
        rotary_angles angles;
        const int rotated = p->cache.rotary.pairs > 0;
        if (rotated) { rotary_load(&angles, &p->cache.rotary, fgqa_rotary_position(&p->cache, n, fgqa_cache_before(&p->cache, n) + (int64_t)i)); }
        for (int32_t h = 0; h < p->hk; h++) {
            append_row(job, FGQA_ARG_k, n, h, i, rotated ? &angles : NULL);
            append_row(job, FGQA_ARG_v, n, h, i, NULL);
        }
    }
}

/* A nanosecond an element; threads are worth waking beyond some 50 us. */
static fgqa_status run(const fgqa_problem *p, void *kept, int undo)
{
    append_job job = {p, kept, undo};
    const int64_t tasks = p->b * new_row_blocks(p);
    const double microseconds = 1e-3 * p->b * p->hk * p->cache.new_max * (p->d + p->dv);
    const int32_t threads = microseconds < 50 ? 1 : tasks < 64 ? (int32_t)tasks : 64;
    const fgqa_exec exec = {NULL, NULL, NULL};      /* not to be interrupted halfway */
    return fgqa_parallel(append_task, &job, tasks, threads, 0, &exec);
}

fgqa_status fgqa_cpu_append(const fgqa_problem *p, void *kept) { return run(p, kept, 0); }

fgqa_status fgqa_cpu_append_undo(const fgqa_problem *p, void *kept) { return run(p, kept, 1); }
