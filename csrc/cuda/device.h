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

/* Loads every kernel that the device can run and runs it once on zeros, so that no later call has to. */
fgqa_status fgqa_cuda_warmup(int32_t device);

/* Why the device cannot run the kernel, whatever the problem; NULL if it can. */
const char *fgqa_cuda_refuse(const fgqa_kernel *kernel, int32_t device, char why[128]);

/* Whether additions to dQ come in any order: never unless the problem allows it. */
int fgqa_cuda_any_order(const fgqa_plan *plan, const fgqa_problem *problem);

/* Bytes of shared memory of one block. */
int32_t fgqa_cuda_shared_memory(const fgqa_kernel *kernel);

/* Makes the device current and sees to it that the thread has a context; `before` is what was current. */
fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before);
void fgqa_cuda_leave(int32_t device, int32_t before);

/* Memory of the current device in the order of the stream. */
fgqa_status fgqa_cuda_allocate(size_t bytes, void *stream, void **memory);
void fgqa_cuda_free(void *memory, void *stream);

/* Memory of the current device that is shared by reference and outlives the call (memory.c). It is filled by what the stream
 * has been given when _filled() is called; _wait() makes another stream wait for that. */
typedef struct fgqa_cuda_memory fgqa_cuda_memory;
fgqa_status fgqa_cuda_memory_new(size_t bytes, int32_t device, void *stream, fgqa_cuda_memory **memory, void **data);
fgqa_status fgqa_cuda_memory_filled(fgqa_cuda_memory *memory);
fgqa_status fgqa_cuda_memory_wait(const fgqa_cuda_memory *memory, void *stream);
void fgqa_cuda_memory_share(fgqa_cuda_memory *memory);
void fgqa_cuda_memory_drop(fgqa_cuda_memory *memory);      /* NULL: nothing */

/* Between host and device, either way, in the order of the stream; pageable host memory may be reused on return. */
fgqa_status fgqa_cuda_copy(void *to, const void *from, size_t bytes, void *stream);

/* Arrays of the host to the current device and back (staging.c), for one call at a time: from _begin() to _end(), which waits
 * for all of it. Uploads are behind what the call's stream has been given before _begin(); what it is given after _uploaded()
 * is behind them. The download of a part is behind what the stream had been given at _computed(), and complete on return; the
 * parts follow each other, and one may be under way while the one before is downloaded. Tensors are strided, device memory is
 * contiguous. */
typedef struct fgqa_cuda_staging fgqa_cuda_staging;
fgqa_status fgqa_cuda_staging_begin(int32_t device, void *stream, fgqa_cuda_staging **staging);
fgqa_status fgqa_cuda_staging_upload(fgqa_cuda_staging *staging, const fgqa_tensor *from, void *to);
fgqa_status fgqa_cuda_staging_uploaded(fgqa_cuda_staging *staging);
fgqa_status fgqa_cuda_staging_computed(fgqa_cuda_staging *staging, int32_t part);
fgqa_status fgqa_cuda_staging_download(fgqa_cuda_staging *staging, int32_t part, const fgqa_tensor *to, const void *from);
fgqa_status fgqa_cuda_staging_end(fgqa_cuda_staging *staging);

/* The elements of a tensor on the device, in the order of its indices. */
fgqa_status fgqa_cuda_gather(const fgqa_tensor *from, void *to, void *stream);

/* The merge of n parts; shape: b, h, s, dv. At most 32. */
fgqa_status fgqa_cuda_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse,
                            const int64_t shape[4], void *stream);

/* Ahead of attention over a KV cache: new keys and values into their slots; rows of q, rotated, to `q_turned` (data NULL: none). */
fgqa_status fgqa_cuda_append(const fgqa_problem *problem, const fgqa_view *q_turned, void *stream);

/* Whether the index arrays of a cache say what they may; complete on return. `memory`: 4 bytes on the device. */
fgqa_status fgqa_cuda_check_cache(const fgqa_problem *problem, void *memory, int *sound, void *stream);

fgqa_status fgqa_cuda_synchronize(void *stream);

/* Whether the stream is recording a graph. */
int fgqa_cuda_capturing(void *stream);

#endif
