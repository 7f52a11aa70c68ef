/* dec_counters.cu - launches on one stream follow each other and may share counters. Launches of a graph run beside those of any
 * stream, but not beside themselves: those of one executable follow each other. Two executables of one graph that run at once
 * would share counters, as they share the results they write, and may wait for ever: such a graph must be recorded twice.
 */
#include "dec_counters.h"
#include "../stream_slot.h"

#include <cuda_runtime_api.h>

enum { MOST_BLOCKS = 160, RECORDED = 8192, MAX_DEVICES = 64 };

static __device__ uint32_t counters[FGQA_STREAM_SLOTS + RECORDED][MOST_BLOCKS];

/* Devices' addresses of `counters`; threads that race find the same. */
static uint32_t *base_of(int32_t device)
{
    static uint32_t *volatile known[MAX_DEVICES];
    void *address = NULL;
    if (known[device] == NULL && cudaGetSymbolAddress(&address, counters) == cudaSuccess) { known[device] = (uint32_t *)address; }
    return known[device];
}

extern "C" uint32_t *fgqa_dec_counters(int32_t device, int32_t count, void *stream)
{
    static int32_t recorded;
    if (count > MOST_BLOCKS || device < 0 || device >= MAX_DEVICES) { return NULL; }
    uint32_t *base = base_of(device);
    int64_t slot = fgqa_stream_slot(stream);
    if (base == NULL) {
        cudaGetLastError();
        return NULL;
    }
    if (slot < 0) {
        cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
        if (cudaStreamIsCapturing((cudaStream_t)stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusActive) {
            cudaGetLastError();
            return NULL;
        }
        if (__atomic_load_n(&recorded, __ATOMIC_RELAXED) >= RECORDED) { return NULL; }
        const int32_t number = __atomic_fetch_add(&recorded, 1, __ATOMIC_RELAXED);
        if (number >= RECORDED) { return NULL; }
        slot = FGQA_STREAM_SLOTS + number;
    }
    return base + slot * MOST_BLOCKS;
}
