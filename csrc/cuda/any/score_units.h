/* score_units.h - whether scores under a soft cap can be counted in units of the cap: kernels then multiply q.k by one number.
 * C11 and CUDA.
 */
#ifndef FGQA_SCORE_UNITS_H
#define FGQA_SCORE_UNITS_H
#include "../../core/problem.h"

#include <float.h>

/* scale / softcap, from q.k to units of the cap. 0: no cap, or the ratio, or twice the cap (the most that two scores differ
 * by), is no normal float32 number, and scores have to stay in natural units. */
static inline float fgqa_in_caps(const fgqa_problem *p)
{
    if (p->softcap == 0.0 || p->softcap > FLT_MAX / 2) { return 0.0f; }
    const float ratio = (float)p->scale * (float)(1.0 / p->softcap);
    return ratio >= FLT_MIN && ratio <= FLT_MAX ? ratio : 0.0f;
}

#endif
