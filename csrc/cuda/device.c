/* device.c - devices, streams and memory: what the Python layer needs of the CUDA runtime. */
#include "device.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include "any/append.h"
#include "any/check_cache.h"
#include "any/gather.h"
#include "any/merge.h"

/* ---- is there a GPU ---- */

static pthread_once_t once = PTHREAD_ONCE_INIT;
static atomic_int forked;        /* this process is the child of one that had used CUDA, whose driver state it cannot use */
static int32_t device_count;
static char reason[256];

static void after_fork(void) { atomic_store(&forked, 1); }

static void look_for_devices(void)
{
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    pthread_atfork(NULL, NULL, after_fork);
    if (error == cudaErrorInsufficientDriver) {
        int driver = 0;
        cudaDriverGetVersion(&driver);
        snprintf(reason, sizeof reason, driver == 0 ? "no NVIDIA driver was found"
                 : "the NVIDIA driver supports CUDA %d.%d and this build needs %d.%d: update the driver",
                 driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
    } else if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
        snprintf(reason, sizeof reason, "no NVIDIA GPU was found");
    } else if (error != cudaSuccess) {
        snprintf(reason, sizeof reason, "cudaGetDeviceCount failed: %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
    } else {
        device_count = count;
    }
    cudaGetLastError();
}

int fgqa_cuda_built(void) { return 1; }

const char *fgqa_cuda_reason(void)
{
    pthread_once(&once, look_for_devices);
    if (atomic_load(&forked)) {
        return "CUDA was used before this process was forked from its parent; start processes by the \"spawn\" or \"forkserver\" method";
    }
    return reason[0] ? reason : NULL;
}

int32_t fgqa_cuda_device_count(void) { return fgqa_cuda_reason() == NULL ? device_count : 0; }

void fgqa_cuda_versions(int32_t *runtime, int32_t *driver)
{
    int version = 0;
    *runtime = CUDART_VERSION;
    *driver = cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
    cudaGetLastError();
}

/* Also takes back the error that the runtime keeps, so that it is reported once. */
static fgqa_status check(cudaError_t error, const char *call)
{
    if (error != cudaSuccess) { cudaGetLastError(); }
    return fgqa_cuda_check(error, call);
}

fgqa_status fgqa_cuda_device_text(int32_t device, char text[192])
{
    struct cudaDeviceProp p;
    FGQA_TRY(check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties"));
    snprintf(text, 192, "%.100s, compute capability %d.%d, %d multiprocessors, %.1f GiB", p.name, p.major, p.minor, p.multiProcessorCount,
             (double)p.totalGlobalMem / (1 << 30));
    return FGQA_OK;
}

/* ---- the current device ---- */

/* Whether this thread has a context. One that has not used CUDA yet, as PyTorch's autograd engine starts them, has a current
 * device but no context, without which the driver makes no tensor maps. Setting the device anew, which binds one, only then:
 * it would also replace a context that the caller made by the driver's functions. */
static int has_context(void)
{
    typedef int get_current(void **context);
    static _Atomic(get_current *) found;       /* threads that race find the same */
    get_current *get = atomic_load_explicit(&found, memory_order_relaxed);
    void *context = NULL;
    if (get == NULL) {
        enum cudaDriverEntryPointQueryResult result;
        void *entry = NULL;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &entry, 4000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuCtxGetCurrent", &entry, cudaEnableDefault, &result);
#endif
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
            cudaGetLastError();
            return 0;
        }
        get = (get_current *)entry;
        atomic_store_explicit(&found, get, memory_order_relaxed);
    }
    return get(&context) == 0 && context != NULL;
}

fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before)
{
    const char *why = fgqa_cuda_reason();
    int current = 0;
    if (why != NULL) { return fgqa_fail(FGQA_ERROR_RUNTIME, "CUDA cannot be used: %s", why); }
    if (device < 0 || device >= device_count) {
        return fgqa_fail(FGQA_ERROR_VALUE, "device is cuda:%d: this machine has %d CUDA device%s, counted from 0", (int)device,
                         (int)device_count, device_count == 1 ? "" : "s");
    }
    FGQA_TRY(check(cudaGetDevice(&current), "cudaGetDevice"));
    if (current != device || !has_context()) { FGQA_TRY(check(cudaSetDevice(device), "cudaSetDevice")); }
    *before = current;
    return FGQA_OK;
}

void fgqa_cuda_leave(int32_t device, int32_t before)
{
    if (before != device) { cudaSetDevice(before); }
}

/* ---- memory ---- */

fgqa_status fgqa_cuda_allocate(size_t bytes, void *stream, void **memory)
{
    *memory = NULL;
    const cudaError_t error = cudaMallocAsync(memory, bytes > 0 ? bytes : 1, stream);
    if (error == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return fgqa_fail(FGQA_ERROR_MEMORY, "%zu bytes do not fit into the memory of the GPU", bytes);
    }
    return check(error, "cudaMallocAsync");
}

void fgqa_cuda_free(void *memory, void *stream)
{
    if (memory != NULL && cudaFreeAsync(memory, stream) != cudaSuccess) { cudaGetLastError(); }
}

fgqa_status fgqa_cuda_copy(void *to, const void *from, size_t bytes, void *stream)
{
    return bytes == 0 ? FGQA_OK : check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream), "cudaMemcpyAsync");
}

fgqa_status fgqa_cuda_gather(const fgqa_tensor *from, void *to, void *stream)
{
    return check((cudaError_t)fgqa_gather(from, to, stream), "a copy to contiguous memory");
}

fgqa_status fgqa_cuda_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse,
                            const int64_t shape[4], void *stream)
{
    if (n > FGQA_MERGE_PARTS) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "outs has %d parts: at most %d are merged at once on a GPU; merge groups of them first",
                         (int)n, (int)FGQA_MERGE_PARTS);
    }
    if (out->dtype == FGQA_F64) { return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "outs[0] has dtype float64: float64 runs on the CPU only; move the tensors to the CPU"); }
    fgqa_merge_parts parts = {.n = n, .dv = (int32_t)shape[3], .b = shape[0], .h = shape[1], .s = shape[2], .out = *out, .lse = *lse};
    memcpy(parts.outs, outs, (size_t)n * sizeof *outs);
    memcpy(parts.lses, lses, (size_t)n * sizeof *lses);
    return check((cudaError_t)fgqa_merge_launch(&parts, stream), "merge");
}

fgqa_status fgqa_cuda_append(const fgqa_problem *problem, const fgqa_view *q_turned, void *stream)
{
    return check((cudaError_t)fgqa_append_launch(problem, q_turned, stream), "the append to a KV cache");
}

fgqa_status fgqa_cuda_check_cache(const fgqa_problem *problem, void *memory, int *sound, void *stream)
{
    const fgqa_cache *c = &problem->cache;
    int32_t fault = 1;
    const int64_t slots = c->table ? c->slots * c->table_stride : c->slots;
    FGQA_TRY(check((cudaError_t)fgqa_check_cache_launch(problem, slots, memory, stream), "the check of a KV cache"));
    FGQA_TRY(fgqa_cuda_copy(&fault, memory, sizeof fault, stream));
    FGQA_TRY(fgqa_cuda_synchronize(stream));
    *sound = !fault;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_synchronize(void *stream) { return check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); }

int fgqa_cuda_capturing(void *stream)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {      /* the legacy stream while another one captures */
        cudaGetLastError();
        return 1;
    }
    return status != cudaStreamCaptureStatusNone;
}
