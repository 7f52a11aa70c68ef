/* device.h - devices, streams and memory of the CUDA backend for the Python layer, and whether there is such a backend at all.
 *
 * Streams are cudaStream_t as void *. Nothing here is called before a call needs a GPU, or asks for one; a build without CUDA
 * kernels has the same functions (absent.c).
 */
#ifndef FGQA_CUDA_DEVICE_H
#define FGQA_CUDA_DEVICE_H
#include "cuda.h"

/* Whether CUDA kernels were compiled in. */
int fgqa_cuda_built(void);

/* Why no GPU can be used, because of the build, the machine or a fork; NULL if one can. Creates no context. */
const char *fgqa_cuda_reason(void);

int32_t fgqa_cuda_device_count(void);

/* "NVIDIA H100 80GB HBM3, compute capability 9.0, 132 multiprocessors, 79.1 GiB" */
fgqa_status fgqa_cuda_device_text(int32_t device, char text[192]);

/* Versions of the CUDA runtime that was compiled in and of the driver, as 13000; 0: none. */
void fgqa_cuda_versions(int32_t *runtime, int32_t *driver);

/* Why the device cannot run the kernel, whatever the problem; NULL if it can. */
const char *fgqa_cuda_refuse(const fgqa_kernel *kernel, int32_t device, char why[128]);

/* Makes the device current; `before` is what it was. */
fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before);
void fgqa_cuda_leave(int32_t before);

/* Memory of the current device in the order of the stream. */
fgqa_status fgqa_cuda_allocate(size_t bytes, void *stream, void **memory);
void fgqa_cuda_free(void *memory, void *stream);

/* Between host and device, either way, in the order of the stream; pageable host memory may be reused on return. */
fgqa_status fgqa_cuda_copy(void *to, const void *from, size_t bytes, void *stream);

/* The elements of a tensor on the device, in the order of its indices. */
fgqa_status fgqa_cuda_gather(const fgqa_tensor *from, void *to, void *stream);

fgqa_status fgqa_cuda_synchronize(void *stream);

/* Whether the stream is recording a graph. */
int fgqa_cuda_capturing(void *stream);

#endif
