/* merge.c - partial attention results over disjoint keys become one:
 *     lse = log sum_n exp(lse_n),   out = sum_n out_n * exp(lse_n - lse)
 * Parts are added in their order, in float64, so the bits do not depend on the number of threads.
 */
#include <math.h>
#define FGQA_ISA portable
#define FGQA_REAL_F64 1
#include "cpu.h"
#include "rows.h"
#include "threads.h"

typedef struct {
    int32_t n;
    const fgqa_view *outs, *lses, *out, *lse;
    const int64_t *shape;                       /* b, h, s, dv */
    int64_t rows_per_task;
} merge_job;

static void *row_at(const fgqa_view *view, const int64_t *shape, int64_t row)
{
    const int64_t s = row % shape[2], h = row / shape[2] % shape[1], b = row / shape[2] / shape[1];
    return (char *)view->data + (b * view->stride_b + h * view->stride_h + s * view->stride_s) * (int64_t)fgqa_dtype_bytes(view->dtype);
}

static double lse_at(const fgqa_view *view, const int64_t *shape, int64_t row)
{
    double x;
    row_load(&x, row_at(view, shape, row), view->dtype, 1, 1);
    return x;
}

/* A part that saw nothing (lse -inf) has weight 0 and is not read: what it holds cannot leak. */
static void merge_row(const merge_job *job, int64_t row, double *sum, double *part)
{
    const int64_t *shape = job->shape;
    const int32_t dv = (int32_t)shape[3];
    double top = -INFINITY, total = 0;
    for (int32_t n = 0; n < job->n; n++) {
        const double x = lse_at(&job->lses[n], shape, row);
        if (x > top || x != x) { top = x; }
        if (top != top) { break; }
    }
    for (int32_t c = 0; c < dv; c++) { sum[c] = 0; }
    for (int32_t n = 0; n < job->n && top != -INFINITY; n++) {
        const double x = lse_at(&job->lses[n], shape, row), weight = exp(FGQA_SINK_EXPONENT(x, top));
        if (weight == 0) { continue; }
        total += weight;
        row_load(part, row_at(&job->outs[n], shape, row), job->outs[n].dtype, job->outs[n].stride_d, dv);
        for (int32_t c = 0; c < dv; c++) { sum[c] += weight * part[c]; }
    }
    for (int32_t c = 0; c < dv && total != 0; c++) { sum[c] /= total; }
    row_store(row_at(job->out, shape, row), job->out->dtype, job->out->stride_d, sum, dv);
    if (job->lse->data) {
        const double lse = total == 0 ? -INFINITY : top + log(total);
        row_store(row_at(job->lse, shape, row), job->lse->dtype, 1, &lse, 1);
    }
}

static void merge_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const merge_job *job = context;
    const int64_t rows = job->shape[0] * job->shape[1] * job->shape[2], begin = task * job->rows_per_task;
    const int64_t end = begin + job->rows_per_task < rows ? begin + job->rows_per_task : rows;
    double *sum = worker->scratch, *part = sum + job->shape[3];
    if (fgqa_poll(worker)) { return; }
    for (int64_t row = begin; row < end; row++) { merge_row(job, row, sum, part); }
}

fgqa_status fgqa_cpu_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse,
                           const int64_t shape[4], const fgqa_exec *exec)
{
    const int64_t rows = shape[0] * shape[1] * shape[2];
    const int64_t row_cost = (int64_t)n * (shape[3] + 32) + 1;              /* about a nanosecond each */
    const int64_t rows_per_task = 20000 / row_cost + 1, tasks = (rows + rows_per_task - 1) / rows_per_task;
    merge_job job = {n, outs, lses, out, lse, shape, rows_per_task};
    const int32_t threads = tasks < 3 ? 1 : tasks < INT32_MAX ? (int32_t)tasks : INT32_MAX;
    return fgqa_parallel(merge_task, &job, tasks, threads, (size_t)(2 * shape[3] + 1) * sizeof(double), exec);
}
