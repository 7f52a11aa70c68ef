/* ptx_cp_async.cuh - cp.async, one instruction per function.
 * PTX ISA, "Data movement and conversion instructions: asynchronous copy".
 */
#pragma once
#include <stdint.h>

/* 16 bytes of shared memory at `dst` from 16-byte aligned global `src`: the first `bytes` (0..16) are copied, the rest is
 * zero. Nothing is read from global memory when bytes is 0. */
static __device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src, uint32_t bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}

static __device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}

static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Until at most PENDING of this thread's latest groups are still on their way. Other threads' copies: add a barrier. */
template <int PENDING> static __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
