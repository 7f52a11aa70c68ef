/* memory.c - GPU memory that outlives a call: results for libraries that cannot allocate. Deleters of foreign libraries end up
 * here, on any thread and without the GIL.
 */
#include "device.h"

#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <stdlib.h>

struct fgqa_cuda_memory {
    atomic_size_t references;
    void *data, *stream;
    int32_t device;
    cudaEvent_t filled;        /* NULL before fgqa_cuda_memory_filled() */
};

fgqa_status fgqa_cuda_memory_new(size_t bytes, int32_t device, void *stream, fgqa_cuda_memory **memory, void **data)
{
    fgqa_cuda_memory *m = calloc(1, sizeof *m);
    if (m == NULL) { return fgqa_fail(FGQA_ERROR_MEMORY, "%zu bytes do not fit into memory", sizeof *m); }
    const fgqa_status status = fgqa_cuda_allocate(bytes, stream, &m->data);
    if (status != FGQA_OK) {
        free(m);
        return status;
    }
    atomic_init(&m->references, 1);
    m->stream = stream;
    m->device = device;
    *memory = m;
    *data = m->data;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_memory_filled(fgqa_cuda_memory *m)
{
    FGQA_TRY(fgqa_cuda_check(cudaEventCreateWithFlags(&m->filled, cudaEventDisableTiming), "cudaEventCreateWithFlags"));
    return fgqa_cuda_check(cudaEventRecord(m->filled, m->stream), "cudaEventRecord");
}

fgqa_status fgqa_cuda_memory_wait(const fgqa_cuda_memory *m, void *stream)
{
    return m->filled == NULL || stream == m->stream ? FGQA_OK
         : fgqa_cuda_check(cudaStreamWaitEvent(stream, m->filled, 0), "cudaStreamWaitEvent");
}

void fgqa_cuda_memory_share(fgqa_cuda_memory *m) { atomic_fetch_add_explicit(&m->references, 1, memory_order_relaxed); }

/* Whoever drops the last reference is done with the memory, as DLPack demands of a consumer. The stream of the call may be gone
 * by now: the memory goes back in the order of the default stream, behind what filled it. */
void fgqa_cuda_memory_drop(fgqa_cuda_memory *m)
{
    int32_t before;
    if (m == NULL || atomic_fetch_sub_explicit(&m->references, 1, memory_order_acq_rel) != 1) { return; }
    if (fgqa_cuda_enter(m->device, &before) == FGQA_OK) {
        if (m->filled != NULL) {
            cudaStreamWaitEvent(NULL, m->filled, 0);
            cudaEventDestroy(m->filled);
            fgqa_cuda_free(m->data, NULL);
        } else {
            fgqa_cuda_free(m->data, m->stream);
        }
        cudaGetLastError();
        fgqa_cuda_leave(m->device, before);
    }
    free(m);
}
