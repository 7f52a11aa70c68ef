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

static inline int fgqa_bwd_causal(const fgqa_problem *p) { return p->left == FGQA_UNBOUNDED && p->right != FGQA_UNBOUNDED && p->chunk == 0; }

/* Length of the chains of the folded order (bwd_key_tile_at()), or 0 where key tiles are taken one after the other. There, blocks
 * of a causal pass that take neighbours are two query tiles of all heads apart, and what one has read has left the L2 cache before
 * the next one wants it. Members of a chain share it, but wait for each other's turns at dQ, the more the longer the chain; without
 * a group that costs more than it brings. Chains of all sections (parts of KV heads of sequences) must occupy the multiprocessors.
 * All pairs of a front and a back tile take equally long: the last round of blocks must not be nearly empty. Packed sequences
 * of all lengths follow each other and have no rounds; without dQ in memory there are no turns, and what is read stays in the cache.
 * Groups of few heads with many keys share enough as they are. */
static inline int32_t fgqa_bwd_chain(const fgqa_problem *p, int32_t block_k, int32_t splits, int32_t multiprocessors)
{
    const int64_t half = (((int64_t)p->sk + block_k - 1) / block_k + 1) / 2, sections = (int64_t)p->b * p->hk * splits;
    const int64_t pairs = sections * half, rounds = (pairs + multiprocessors - 1) / multiprocessors;
    const int small_group = p->deterministic && p->g < 8 * splits && p->sk > 2048;       /* measured: LOG.md */
    const int few_blocks = !p->batch_invariant && 5 * pairs < 3 * rounds * multiprocessors;
    if (!fgqa_bwd_causal(p) || small_group || few_blocks || p->varlen || fgqa_bwd_two_passes(FGQA_BWD_TILED, p->d) || half < 1 || sections < 1 || p->g < 2 * splits) { return 0; }
    int64_t chain = 64;
    if (p->deterministic && !p->batch_invariant) {
        const int64_t shortest = p->d <= 64 ? 8 : p->d <= 128 ? 16 : 64, enough = multiprocessors / sections;      /* measured: LOG.md */
        chain = enough > shortest ? enough : shortest;
    }
    return (int32_t)(half < chain ? half : chain);
}

#endif
