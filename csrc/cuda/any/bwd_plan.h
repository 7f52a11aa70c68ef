/* bwd_plan.h - how a backward pass is cut into tasks, and in which order they are taken: ../bwd_plan.c. */
#ifndef FGQA_BWD_PLAN_H
#define FGQA_BWD_PLAN_H
#include "../kernel_table.h"
#include "bwd_shift.h"

enum { FGQA_BWD_MAX_SPLITS = 4, FGQA_BWD_LONG = 64 };           /* FGQA_BWD_LONG: key tiles */

/* Backward rows for Hopper that have kernels with a bias tensor that TMA can address, without or beside a mask tensor and
 * dropout, and its gradient: sm90/bwd_bias.cuh. Others take any bias beside anything, but make no gradient of it:
 * sm90/bwd_any_bias.cuh. */
#define FGQA_BWD_HAS_BIAS(d) ((d) <= 128)

static inline int fgqa_bwd_causal(const fgqa_problem *p) { return p->left == FGQA_UNBOUNDED && p->right != FGQA_UNBOUNDED && p->chunk == 0; }

/* In which order blocks take key tiles (find_task() of sm90/bwd_tasks.cuh): length of a chain, or 0; sections in work at once
 * and how many key tiles of one follow each other; whether key tiles add to dQ as they come; walks that begin apart. */
typedef struct { int32_t chain, band, run, any_order; fgqa_bwd_shift shift; } fgqa_bwd_order;

/* Whether blocks walk through all query tiles of a head before those of the next one: BY_HEAD of sm90/bwd_tasks.cuh. */
static inline int fgqa_bwd_by_head(const fgqa_problem *p, int32_t splits) { return splits == 1 && (p->left != FGQA_UNBOUNDED || p->chunk > 0); }

#ifdef __cplusplus
extern "C" {
#endif
/* Splits, tasks and workspace of a row's backward pass. */
void fgqa_bwd_tile(const fgqa_cuda_row *row, const fgqa_problem *p, fgqa_plan *plan, int32_t multiprocessors);
/* row_d: the row's head dim, to which a problem may come with a smaller one. */
fgqa_bwd_order fgqa_bwd_order_of(const fgqa_problem *p, int32_t row_d, int32_t block_q, int32_t block_k, int32_t splits, int32_t multiprocessors);
#ifdef __cplusplus
}
#endif
#endif
