/* append.h - new keys and values into a KV cache, and the rotary embedding of q, in one launch ahead of attention. */
#ifndef FGQA_CUDA_APPEND_H
#define FGQA_CUDA_APPEND_H
#include "../../core/problem.h"

#ifdef __cplusplus
extern "C"
#endif
/* q_turned: where rotated rows of q go, of q's dtype, unit stride in d; data NULL: q is left as it is. A cudaError_t. */
int fgqa_append_launch(const fgqa_problem *problem, const fgqa_view *q_turned, void *stream);

#endif
