/* launch.cuh - host side of a launch. */
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

/* Arguments are copied before it returns. One call of the runtime, where <<<>>> makes three. */
template <typename... Parameters, typename... Arguments>
static inline cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int32_t threads, int32_t shared_bytes, void *stream, const Arguments &...arguments)
{
    static_assert(sizeof...(Parameters) == sizeof...(Arguments), "one argument for each parameter");
    void *addresses[] = {(void *)&arguments...};
    return cudaLaunchKernel((const void *)kernel, blocks, dim3((uint32_t)threads), addresses, (size_t)shared_bytes, (cudaStream_t)stream);
}

/* Which devices a kernel has been prepared for; threads that race do the same work twice. */
enum { MAX_DEVICES = 64 };
struct launch_state { volatile bool ready[MAX_DEVICES]; };

/* Blocks get more than 48 KB of shared memory only after asking, once per kernel and device. */
static inline cudaError_t allow_shared_memory(const void *kernel, int32_t bytes, int32_t device, launch_state *state)
{
    if (bytes <= 48 * 1024 || state->ready[device]) { return cudaSuccess; }
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    state->ready[device] = error == cudaSuccess;
    return error;
}
