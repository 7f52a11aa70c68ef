/* properties.c - what a device is, read from the CUDA runtime once a process, and the runtime's errors as a status. */
#include "cuda.h"

#include <cuda_runtime_api.h>

enum { MAX_DEVICES = 64 };

fgqa_status fgqa_cuda_check(int error, const char *call)
{
    if (error == cudaSuccess) { return FGQA_OK; }
    const fgqa_status status = error == cudaErrorMemoryAllocation ? FGQA_ERROR_MEMORY : FGQA_ERROR_RUNTIME;
    return fgqa_fail(status, "%s failed: %s (%s, code %d)", call, cudaGetErrorString((cudaError_t)error),
                     cudaGetErrorName((cudaError_t)error), error);
}

fgqa_status fgqa_cuda_device_properties(int32_t device, fgqa_cuda_properties *properties)
{
    static fgqa_cuda_properties known[MAX_DEVICES];        /* capability 0: not read yet; threads that race write the same */
    if (device < 0 || device >= MAX_DEVICES) { return fgqa_fail(FGQA_ERROR_VALUE, "CUDA device %d: devices 0 to %d are supported", device, MAX_DEVICES - 1); }
    if (known[device].capability == 0) {
        int major = 0, minor = 0, count = 0, block = 0, whole = 0, khz = 0, bits = 0;
        FGQA_TRY(fgqa_cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute"));
        FGQA_TRY(fgqa_cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute"));
        FGQA_TRY(fgqa_cuda_check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute"));
        FGQA_TRY(fgqa_cuda_check(cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute"));
        FGQA_TRY(fgqa_cuda_check(cudaDeviceGetAttribute(&whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), "cudaDeviceGetAttribute"));
        if (cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, device) != cudaSuccess
            || cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
            cudaGetLastError();
            khz = 0;
        }
        known[device].memory_gbs = (int32_t)((int64_t)khz * 2 * bits / 8 / 1000000);        /* two transfers a clock */
        known[device].multiprocessors = count;
        known[device].smem_per_block = block;
        known[device].smem_per_multiprocessor = whole;
        known[device].capability = 10 * major + minor;
    }
    *properties = known[device];
    return FGQA_OK;
}
