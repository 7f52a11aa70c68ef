/* cuda_runtime_api.h - what csrc/cuda/launch.c and warmup.c take from the CUDA runtime's header of this name, for test_warmup.c,
 * which needs no CUDA. Numbers are of no account.
 */
#ifndef FGQA_TESTS_CUDA_RUNTIME_API_H
#define FGQA_TESTS_CUDA_RUNTIME_API_H
#include <stddef.h>

typedef enum { cudaSuccess, cudaErrorMemoryAllocation } cudaError_t;
typedef void *cudaStream_t;
enum cudaDeviceAttr {
    cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrMemoryClockRate, cudaDevAttrGlobalMemoryBusWidth
};

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device);
cudaError_t cudaGetLastError(void);
cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream);
const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);

#endif
