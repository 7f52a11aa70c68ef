/* cuda.h - the CUDA backend as the rest of the program sees it. Nothing here needs a driver or a GPU to be linked or loaded. */
#ifndef FGQA_CUDA_H
#define FGQA_CUDA_H
#include "../core/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Every row of kernels.def, fastest first. Rows that a device cannot run say so when asked (refuse). */
const fgqa_kernel *fgqa_cuda_kernels(int32_t *count);

/* What kernel choice needs to know of a device. */
typedef struct {
    int32_t capability;             /* compute capability x 10: 80, 86, 89, 90, 100, 120 */
    int32_t multiprocessors;
    int32_t smem_per_block;         /* bytes, opt-in limit */
    int32_t smem_per_multiprocessor;
    int32_t memory_gbs;             /* peak of its memory, 10^9 bytes a second; 0: unknown */
} fgqa_cuda_properties;

/* Read once per device. RuntimeError names the CUDA call that failed, e.g. without a driver. */
fgqa_status fgqa_cuda_device_properties(int32_t device, fgqa_cuda_properties *properties);

/* Stores the sentence for a CUDA runtime error (a cudaError_t): which call, its name and its text. FGQA_OK for 0. */
fgqa_status fgqa_cuda_check(int error, const char *call);

#ifdef __cplusplus
}
#endif

#endif
