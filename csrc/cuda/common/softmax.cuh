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

/* A row's result: with `sink` (-inf: none) in the denominator. `top` is m, and like sink and *lse in natural units, in which no
 * finite score overflows; l is already summed over the row's lanes. Returns what the accumulated p.v is multiplied with. */
static __device__ __forceinline__ float softmax_finish(float top, float l, float sink, float *lse)
{
    const float base = finite_max(fmaxf(top, sink));
    const float rescale = ex2((top - base) * (float)FGQA_LOG2E);      /* 1 without a sink, 0 for a row that sees nothing */
    const float sum = l * rescale + ex2(FGQA_SINK_EXPONENT(sink, base) * (float)FGQA_LOG2E);
    *lse = sum == 0.0f ? -INFINITY : base + log2f(sum) * (float)FGQA_LN2;
    return sum == 0.0f ? 0.0f : rescale / sum;
}
