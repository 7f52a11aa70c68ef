/* fwd_combine.h - the second kernel of a forward pass that was split over keys, unless its blocks merge the parts themselves
 * (sm90/fwd_merge.cuh). Returns a cudaError_t. */
#ifndef FGQA_FWD_COMBINE_H
#define FGQA_FWD_COMBINE_H
#include "../../core/plan.h"
#ifdef __cplusplus
extern "C"
#endif
int fgqa_fwd_combine(const fgqa_problem *problem, void *workspace, uint32_t splits, const fgqa_exec *exec);
#endif
