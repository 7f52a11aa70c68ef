/* split.cuh - the key range of a row block cut into parts that different blocks work on, and where their results wait.
 *
 * Each part leaves, per packed row, its normalised output (float32) and its LSE; any/fwd_combine.cu merges them. The sink and
 * nothing else is left to the merge. Rows are numbered ((b * hq) + h) * sq + i, or h * total_q + (row in the packed tensor).
 */
#pragma once
#include "../../core/workspace.h"
#include "numeric.cuh"
#include "params.cuh"

struct split_plan {
    int64_t first_pair;         /* of this launch: sequence * hk + KV head */
    uint32_t blocks, splits;    /* row blocks of one KV head; parts of its keys */
    int64_t rows;
    float *o, *lse;             /* [splits][rows][dv], [splits][rows]; NULL when splits is 1 */
};

/* Carves (or, with base NULL, measures) the workspace of a split forward pass. */
static inline size_t split_workspace(const fgqa_problem *p, uint32_t splits, void *base, split_plan *split)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    split->splits = splits;
    split->rows = p->varlen ? (int64_t)p->hq * p->total_q : (int64_t)p->b * p->hq * p->sq;
    split->o = split->lse = NULL;
    if (splits > 1) {
        split->o = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)split->rows * (size_t)p->dv, sizeof(float));
        split->lse = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)split->rows, sizeof(float));
    }
    return arena.used;
}

#if defined(__CUDACC__)
/* Part `part` of a range of tiles: equal shares, the first ones one tile longer. */
static __device__ __forceinline__ fgqa_range split_range(fgqa_range tiles, uint32_t part, uint32_t splits)
{
    const uint32_t count = (uint32_t)(tiles.end - tiles.begin), share = count / splits, longer = count % splits;
    const int32_t begin = tiles.begin + (int32_t)(part * share + min(part, longer));
    const fgqa_range r = {begin, begin + (int32_t)(share + (part < longer))};
    return r;
}

static __device__ __forceinline__ int64_t split_row(const fgqa_problem &p, int32_t b, int32_t h, int64_t q_row, int32_t i)
{
    return p.varlen ? (int64_t)h * p.total_q + q_row + i : ((int64_t)b * p.hq + h) * p.sq + i;
}

/* One logit a query head in the denominator; -inf: none. Padding rows have none either. */
static __device__ __forceinline__ float sink_logit(const fgqa_problem &p, int32_t b, int32_t h, bool padding)
{
    const fgqa_view &sink = p.view[FGQA_ARG_sink];
    return sink.data && !padding ? load_float(sink.data, b * sink.stride_b + h * sink.stride_h, sink.dtype) : -INFINITY;
}

static __device__ __forceinline__ void store_lse(const fgqa_problem &p, int32_t b, int32_t h, int64_t row, float lse)
{
    if (p.view[FGQA_ARG_lse].data) { *(float *)fgqa_row_address(p.view[FGQA_ARG_lse], sizeof(float), b, h, row) = lse; }
}
#endif
