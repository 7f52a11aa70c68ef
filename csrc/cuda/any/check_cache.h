/* check_cache.h - whether the index arrays of a KV cache say what they may, in one launch. */
#ifndef FGQA_CUDA_CHECK_CACHE_H
#define FGQA_CUDA_CHECK_CACHE_H
#include "../../core/problem.h"

#ifdef __cplusplus
extern "C"
#endif
/* *fault, on the device, becomes 1 if they do not, else 0. slots: of a sequence. A cudaError_t. */
int fgqa_check_cache_launch(const fgqa_problem *problem, int64_t slots, int32_t *fault, void *stream);

#endif
