/* softmax.cuh - online softmax of the rows a lane holds, in base 2.
 *
 * State of a row: m, its running maximum in units of the scores as given (same in the four lanes of the row), and l, the sum
 * of 2^(c (s - m)) over this lane's columns only; c = scale_log2 turns a score into a power of two. A row that has seen no
 * key has m = -inf, l = 0.
 */
#pragma once
#include "fragments.cuh"
#include "numeric.cuh"

/* m = -inf would make -inf - (-inf) = NaN in the exponent. */
static __device__ __forceinline__ float finite_max(float m) { return m == -INFINITY ? 0.0f : m; }

/* A row's result: with `sink` (natural units, -inf: none) in the denominator. `l` is already summed over the row's lanes.
 * Returns what the accumulated p.v is multiplied with; *lse is a natural logarithm. */
static __device__ __forceinline__ float softmax_finish(float m, float l, float scale_log2, float sink, float *lse)
{
    const float top = m == -INFINITY ? -INFINITY : m * scale_log2;
    const float sink_log2 = sink * (float)FGQA_LOG2E;
    const float base = finite_max(fmaxf(top, sink_log2));
    const float rescale = ex2(top - base);                       /* 1 without a sink, 0 for a row that sees nothing */
    const float sum = l * rescale + ex2(sink_log2 - base);
    *lse = sum == 0.0f ? -INFINITY : (base + log2f(sum)) * (float)FGQA_LN2;
    return sum == 0.0f ? 0.0f : rescale / sum;
}
