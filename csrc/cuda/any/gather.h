/* gather.h - a strided tensor into contiguous memory. */
#ifndef FGQA_GATHER_H
#define FGQA_GATHER_H
#include "../../core/tensor.h"

#ifdef __cplusplus
extern "C"
#endif
int fgqa_gather(const fgqa_tensor *from, void *to, void *stream);   /* a cudaError_t */

#endif
