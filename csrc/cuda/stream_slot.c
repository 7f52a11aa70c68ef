/* stream_slot.c - streams are told apart by the runtime's id, which unlike a handle is never given to another stream. */
#include "stream_slot.h"

#include <cuda_runtime_api.h>
#include <stdatomic.h>

int32_t fgqa_stream_slot(void *stream)
{
#if CUDART_VERSION >= 12000
    static _Atomic(unsigned long long) owner[FGQA_STREAM_SLOTS];      /* id + 1; 0: free. Filled in order, never emptied */
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
    if (cudaStreamIsCapturing((cudaStream_t)stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone
        || cudaStreamGetId((cudaStream_t)stream, &id) != cudaSuccess) {
        cudaGetLastError();
        return -1;
    }
    for (int32_t slot = 0; slot < FGQA_STREAM_SLOTS; slot++) {
        unsigned long long expected = 0;
        if (atomic_load(&owner[slot]) == id + 1) { return slot; }
        if (atomic_compare_exchange_strong(&owner[slot], &expected, id + 1) || expected == id + 1) { return slot; }
    }
#else
    (void)stream;
#endif
    return -1;
}
