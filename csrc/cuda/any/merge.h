/* merge.h - partial results over disjoint keys become one, as csrc/cpu/merge.c has it. */
#ifndef FGQA_CUDA_MERGE_H
#define FGQA_CUDA_MERGE_H
#include "../../core/problem.h"

enum { FGQA_MERGE_PARTS = 32 };      /* one lane each */

typedef struct {
    int32_t n, dv;
    int64_t b, h, s;
    fgqa_view outs[FGQA_MERGE_PARTS], lses[FGQA_MERGE_PARTS], out, lse;      /* float32, float16 or bfloat16; lse float32 */
} fgqa_merge_parts;

#ifdef __cplusplus
extern "C"
#endif
int fgqa_merge_launch(const fgqa_merge_parts *parts, void *stream);      /* a cudaError_t */

#endif
