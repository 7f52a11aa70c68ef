/* bwd_short.h - short backward rows for Hopper (bwd_short.cu): which they are, what they serve, how it is cut. */
#ifndef FGQA_BWD_SHORT_H
#define FGQA_BWD_SHORT_H
#include "../kernel_table.h"

/* Rows and keys of the smallest kernel; each one after it holds twice as many. */
enum { FGQA_BWD_LEAST_WHOLE = 64 };

/* A row whose blocks have all rows and all keys of a head at once. */
static inline int fgqa_bwd_is_whole(const fgqa_cuda_row *row) { return row->pass == FGQA_PASS_BWD && row->arch == 90 && row->stages == 1; }

/* What shapes it leaves to the rows behind; NULL: it serves them, and faster. */
static inline const char *fgqa_bwd_refuse_whole(const fgqa_cuda_row *row, const fgqa_problem *p, char why[128])
{
    if (p->varlen) { return "has no packed sequences, whose lengths only the device knows"; }
    if (p->batch_invariant) { return "the same sequence packed would have other bits"; }
    if (p->sq < 1 || p->sk < 1) { return "needs rows and keys"; }
    if (p->sq > row->block_q || p->sk > row->block_k) { return fgqa_reason(why, "has up to %d rows and %d keys", row->block_q, row->block_k); }
    if (p->g > 1) { return "has no heads that share keys"; }
    if (p->want_dsink) { return "has no gradient of sinks"; }
    return (double)p->b * p->hq > INT32_MAX ? "too many heads" : NULL;
}

static inline void fgqa_bwd_tile_whole(const fgqa_problem *p, fgqa_plan *plan)
{
    plan->splits = 1;
    plan->tasks = (int64_t)p->b * p->hq;
    plan->workspace_bytes = 0;
}

#endif
