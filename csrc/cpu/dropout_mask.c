/* dropout_mask.c - the dropout mask of the contract, written out: what flashgqa.dropout_mask returns. */
#include "../core/philox.h"
#include "cpu.h"
#include "threads.h"

typedef struct {
    uint8_t *keep;                  /* bool [b*hq, sq, sk] */
    int64_t rows, rows_per_task;    /* rows = b*hq*sq */
    int32_t sq, sk;
    uint32_t threshold;
    uint64_t seed, offset;
} mask_job;

static void mask_row(const mask_job *job, int64_t row)
{
    uint8_t *keep = job->keep + row * job->sk;
    for (int32_t j = 0; j < job->sk; j += 8) {
        const fgqa_philox_block bits = fgqa_dropout_bits(job->seed, job->offset, (uint32_t)j / 8, (uint32_t)(row % job->sq),
                                                         (uint32_t)(row / job->sq));
        for (int32_t n = 0; n < 8 && j + n < job->sk; n++) {
            keep[j + n] = (uint8_t)fgqa_dropout_keeps(fgqa_dropout_half(&bits, n), job->threshold);
        }
    }
}

static void mask_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const mask_job *job = context;
    const int64_t begin = task * job->rows_per_task, rest = job->rows - begin;
    const int64_t end = begin + (rest < job->rows_per_task ? rest : job->rows_per_task);
    if (fgqa_poll(worker)) { return; }
    for (int64_t row = begin; row < end; row++) { mask_row(job, row); }
}

fgqa_status fgqa_cpu_dropout_mask(uint8_t *keep, int32_t b, int32_t hq, int32_t sq, int32_t sk, uint32_t threshold,
                                  uint64_t seed, uint64_t offset, const fgqa_exec *exec)
{
    const int64_t rows = (int64_t)b * hq * sq;
    const int64_t rows_per_task = 100000 / ((int64_t)sk + 1) + 1;   /* about 0.2 ms at 2 ns a key */
    const int64_t tasks = sk > 0 ? (rows + rows_per_task - 1) / rows_per_task : 0;
    mask_job job = {keep, rows, rows_per_task, sq, sk, threshold, seed, offset};
    const int32_t threads = tasks < INT32_MAX ? (int32_t)tasks : INT32_MAX;
    return fgqa_parallel(mask_task, &job, tasks, threads > 0 ? threads : 1, 0, exec);
}
