/* softcap.cuh - tanh of scores, for cap * tanh(x / cap). NaN stays NaN. */
#pragma once
#include "../../core/semantics.h"
#include "numeric.cuh"

/* 1/x, relative error 2^-23; of inf and of x from 2^126 on 0. */
PTX_FN float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

static constexpr float TANH_NEAR = 0.625f;

/* |x| < TANH_NEAR: the odd polynomial of the Cephes library (S. L. Moshier), which keeps the relative error near 0. */
static __device__ __forceinline__ float tanh_near(float x)
{
    const float z = x * x;
    const float tail = (((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z
                       - 3.33332819422e-1f;
    return x + x * (z * tail);
}

/* Beyond: 1 - 2/(1 + e^(2|x|)) with the sign of x. */
static __device__ __forceinline__ float tanh_far(float x)
{
    return copysignf(1.0f - 2.0f * reciprocal(1.0f + ex2(fabsf(x) * (2.0f * (float)FGQA_LOG2E))), x);
}

static __device__ __forceinline__ float tanh_score(float x) { return fabsf(x) < TANH_NEAR ? tanh_near(x) : tanh_far(x); }

/* q.k, in any number of registers, -> tanh(ratio q.k) for ratio = scale / cap: scores in units of the cap. The same bits
 * whether or not the warp's scores are all near 0, as those of trained models mostly are: that takes half the time. */
template <int N> static __device__ __forceinline__ void cap_scores(float (&s)[N], float ratio)
{
    float most = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
        s[n] *= ratio;
        most = fmaxf(most, fabsf(s[n]));
    }
    if (__all_sync(0xFFFFFFFFu, most < TANH_NEAR)) {
#pragma unroll
        for (int n = 0; n < N; n++) { s[n] = tanh_near(s[n]); }
    } else {
#pragma unroll
        for (int n = 0; n < N; n++) { s[n] = tanh_score(s[n]); }
    }
}
