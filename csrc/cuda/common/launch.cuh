/* launch.cuh - host side of a launch. */
#pragma once
#include <cuda_runtime_api.h>
#include <stdint.h>

/* Which devices a kernel has been prepared for; threads that race do the same work twice. */
struct launch_state { volatile bool ready[64]; };

/* Blocks get more than 48 KB of shared memory only after asking, once per kernel and device. */
static inline cudaError_t allow_shared_memory(const void *kernel, int32_t bytes, int32_t device, launch_state *state)
{
    if (bytes <= 48 * 1024 || state->ready[device]) { return cudaSuccess; }
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    state->ready[device] = error == cudaSuccess;
    return error;
}
