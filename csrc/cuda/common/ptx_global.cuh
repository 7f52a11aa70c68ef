/* ptx_global.cuh - global memory shared between running blocks: reductions, acquire and release. One instruction per function.
 * PTX ISA, "Data movement and conversion instructions: ld, st", "Parallel synchronization: red", "Memory consistency model".
 */
#pragma once
#include <stdint.h>

/* x[0..3] += v, four independent float32 additions; one instruction from sm_90 on. */
static __device__ __forceinline__ void red_add_f32x4(float *x, const float (&v)[4])
{
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(x), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
#else
#pragma unroll
    for (int n = 0; n < 4; n++) { asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(x + n), "f"(v[n]) : "memory"); }
#endif
}

/* What other blocks have written and released: from L2, past this SM's L1. */
static __device__ __forceinline__ float4 load_relaxed_f32x4(const float *x)
{
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(x) : "memory");
    return v;
}

static __device__ __forceinline__ float2 load_relaxed_f32x2(const float *x)
{
    float2 v;
    asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(x) : "memory");
    return v;
}

static __device__ __forceinline__ int32_t load_relaxed_s32(const int32_t *x)
{
    int32_t v;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(x) : "memory");
    return v;
}

static __device__ __forceinline__ int32_t load_acquire_s32(const int32_t *x)
{
    int32_t v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(x) : "memory");
    return v;
}

/* *counter + 1, but 0 after `last`: released, and acquires what the others have released. The old value. */
static __device__ __forceinline__ uint32_t atom_inc_acq_rel(uint32_t *counter, uint32_t last)
{
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(last) : "memory");
    return old;
}

/* *x += v after all that this thread has seen done (its own writes, and those of threads it has met at a barrier). */
static __device__ __forceinline__ void red_release_add_s32(int32_t *x, int32_t v)
{
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(x), "r"(v) : "memory");
}

/* 8 bytes of shared memory from 8-byte aligned global memory, or zero. Group and wait as for cp_async_16(). */
static __device__ __forceinline__ void cp_async_8(uint32_t dst, const void *src, bool copy)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(copy ? 8 : 0) : "memory");
}
