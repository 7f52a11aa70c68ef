/* split.cuh - device side of any/fwd_split.h, and what the forward kernels and their merge write per row. */
#pragma once
#include "../any/fwd_split.h"
#include "numeric.cuh"
#include "params.cuh"

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

/* A row of which parts are joined: top is the largest of its sink and of its parts' tops. A part's end is its top and log2 of
 * its sum; one that saw no key has top -inf and weight 0. */
struct joined_row {
    float top;
    bool nan;                   /* the sink or an end is */
    __device__ __forceinline__ float base() const { return top == -INFINITY ? 0.0f : top; }
    __device__ __forceinline__ float weight(float2 end) const { return exp2f(fmaf(end.x - base(), (float)FGQA_LOG2E, end.y)); }
    __device__ __forceinline__ float sink_weight(float sink) const { return expf(FGQA_SINK_EXPONENT(sink, base())); }
    /* sum: of all weights. What the weighted sum of the parts' o is multiplied with; the LSE. */
    __device__ __forceinline__ float scale(float sum) const { return nan ? NAN : sum == 0.0f ? 0.0f : 1.0f / sum; }
    __device__ __forceinline__ float lse(float sum) const { return nan ? NAN : sum == 0.0f ? -INFINITY : base() + logf(sum); }
};
