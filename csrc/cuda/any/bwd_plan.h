/* bwd_plan.h - how a backward pass is cut into tasks. */
#ifndef FGQA_BWD_PLAN_H
#define FGQA_BWD_PLAN_H
#include "../kernel_table.h"
#include "bwd_workspace.h"

enum { FGQA_BWD_MAX_SPLITS = 4 };

static inline int32_t fgqa_bwd_stats_kind(const fgqa_cuda_row *row)
{
    return row->general ? FGQA_BWD_GENERAL : row->arch == 90 ? FGQA_BWD_TILED : FGQA_BWD_PLAIN;
}

/* A task is a key tile of a KV head. Too few for the multiprocessors (MQA, short batches): the query rows of each are shared
 * out to up to four blocks, whose dK and dV are float32 parts added in order. Tasks of equal length need four rounds to come
 * out even, those of a masked problem, longest first, two. With batch_invariant nothing is split. */
static inline void fgqa_bwd_tile(const fgqa_cuda_row *row, const fgqa_problem *p, fgqa_plan *plan, int32_t multiprocessors)
{
    const int64_t tasks = (int64_t)p->b * p->hk * (((int64_t)p->sk + row->block_k - 1) / row->block_k);
    const int64_t steps = (((int64_t)p->sq + row->block_q - 1) / row->block_q) * p->g;
    const int masked = p->left != FGQA_UNBOUNDED || p->right != FGQA_UNBOUNDED || p->chunk > 0;
    const int64_t enough = (int64_t)multiprocessors * (masked ? 2 : 4) * 7 / 8;
    fgqa_bwd_workspace w;
    plan->splits = 1;
    while (!p->batch_invariant && plan->splits < FGQA_BWD_MAX_SPLITS && tasks * plan->splits < enough && steps >= 8 * plan->splits) { plan->splits *= 2; }
    plan->tasks = p->b > 0 && p->hq > 0 && (p->sq > 0 || p->sk > 0) ? (tasks > 0 ? tasks * plan->splits : 1) : 0;
    plan->workspace_bytes = fgqa_bwd_workspace_take(p, row->block_q, row->block_k, row->d, row->dv, plan->splits, fgqa_bwd_stats_kind(row), NULL, &w);
}

#endif
