/* fwd_split.h - how a forward pass is cut into blocks, and the workspace of one that is split over keys.
 *
 * With too few row blocks to fill the device (decode, short sequences) the keys of each are shared out to `splits` blocks.
 * Each leaves, per packed row, its normalised output and its LSE in two numbers (float32): the largest score, and log2 of the
 * sum, which one number cannot hold beside an enormous score; fwd_combine.cu merges them, or the blocks themselves
 * (sm90/fwd_merge.cuh).
 */
#ifndef FGQA_FWD_SPLIT_H
#define FGQA_FWD_SPLIT_H
#include "../../core/plan.h"
#include "../../core/workspace.h"

enum { FGQA_MAX_SPLITS = 128, FGQA_MIN_TILES_PER_SPLIT = 4 };

typedef struct {
    int32_t first_b;            /* sequence this launch begins with */
    uint32_t blocks, splits;    /* row blocks of one KV head; parts of its keys */
    int64_t rows;               /* ((b * hq) + h) * sq + i, or h * total_q + (row of the packed tensor) */
    float *o, *lse;             /* [splits][rows][dv], [splits][rows][2]: top, log2 of the sum; NULL when splits is 1 */
} fgqa_split;

/* Carves, or with base NULL measures, the workspace. Returns its size. */
static inline size_t fgqa_split_workspace(const fgqa_problem *p, uint32_t splits, void *base, fgqa_split *split)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    split->splits = splits;
    split->rows = p->varlen ? (int64_t)p->hq * p->total_q : (int64_t)p->b * p->hq * p->sq;
    split->o = split->lse = NULL;
    if (splits > 1) {
        split->o = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)split->rows * (size_t)p->dv, sizeof(float));
        split->lse = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)split->rows * 2, sizeof(float));
    }
    return arena.used;
}

/* Rows and keys of a sequence; of packed ones, whose lengths are on the device, the mean. What is planned with them does not
 * depend on max_q and max_kv, which may be too small, so that results do not either. */
static inline int64_t fgqa_usual_rows(const fgqa_problem *p) { return p->varlen ? p->b > 0 ? (p->total_q + p->b - 1) / p->b : 0 : p->sq; }
static inline int64_t fgqa_usual_keys(const fgqa_problem *p) { return p->varlen ? p->b > 0 ? (p->total_k + p->b - 1) / p->b : 0 : p->sk; }

/* Most tiles of keys that one block of rows sees. */
static inline int64_t fgqa_fwd_tiles_of_block(const fgqa_problem *p, const fgqa_plan *plan)
{
    int64_t keys = fgqa_usual_keys(p);
    if (p->left != FGQA_UNBOUNDED && p->right != FGQA_UNBOUNDED) {
        const int64_t window = (int64_t)p->left + p->right + 1 + plan->block_q / p->g + 1;
        if (window < keys) { keys = window; }
    }
    return (keys + plan->block_k - 1) / plan->block_k;
}

/* Shares the keys of plan->tasks row blocks, usually about `tasks`, out. block_q and block_k are set; `slots` is how many
 * blocks the device holds at once. With batch_invariant, the split comes from the shape of one sequence alone, and those of
 * one row block are split; packed sequences are not split then. */
static inline void fgqa_fwd_share(const fgqa_problem *p, fgqa_plan *plan, int64_t tasks, int32_t slots, int one_row_block)
{
    const int64_t most = fgqa_fwd_tiles_of_block(p, plan) / FGQA_MIN_TILES_PER_SPLIT;
    int64_t splits = 1;
    fgqa_split split;
    if (p->batch_invariant) {
        splits = one_row_block && !p->varlen ? most / 4 : 1;
    } else if (tasks > 0 && tasks * 5 < (int64_t)slots * 4) {
        splits = slots / tasks;
    }
    if (splits > most) { splits = most; }
    if (splits > FGQA_MAX_SPLITS) { splits = FGQA_MAX_SPLITS; }
    plan->splits = splits < 1 ? 1 : (int32_t)splits;
    plan->tasks *= plan->splits;
    plan->workspace_bytes = fgqa_split_workspace(p, (uint32_t)plan->splits, NULL, &split);
}

/* Of a kernel whose blocks hold packed rows of a whole group. */
static inline void fgqa_fwd_tile(const fgqa_problem *p, fgqa_plan *plan, int32_t slots)
{
    const int64_t blocks = ((int64_t)p->sq * p->g + plan->block_q - 1) / plan->block_q;
    const int64_t usual = (fgqa_usual_rows(p) * p->g + plan->block_q - 1) / plan->block_q;
    plan->tasks = blocks * p->hk * p->b;
    fgqa_fwd_share(p, plan, usual * p->hk * p->b, slots, blocks == 1);
}

#endif
