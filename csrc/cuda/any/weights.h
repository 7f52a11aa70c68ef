/* weights.h - attention weights on a GPU: of chosen query rows, and summed over the rows (weights.cu). */
#ifndef FGQA_CUDA_WEIGHTS_H
#define FGQA_CUDA_WEIGHTS_H
#include "../kernel_table.h"

enum { FGQA_WEIGHTS_ROWS = 64, FGQA_WEIGHTS_KEYS = 64, FGQA_WEIGHTS_STEP = 32, FGQA_WEIGHTS_THREADS = 256 };

#ifdef __cplusplus
extern "C" {
#endif
/* Fills the tiles, tasks and memory of a plan; both passes. */
void fgqa_weights_tile(const fgqa_problem *problem, fgqa_plan *plan);
int32_t fgqa_weights_smem(void);
fgqa_cuda_launch fgqa_weights_rows, fgqa_weights_keysum;
#ifdef __cplusplus
}
#endif

#endif
