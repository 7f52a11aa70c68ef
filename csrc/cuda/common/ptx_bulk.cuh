/* ptx_bulk.cuh - flat copies and additions between global and shared memory by the TMA unit, one instruction per function
 * (sm_90). PTX ISA, "cp.async.bulk, cp.reduce.async.bulk". Addresses and sizes are multiples of 16 bytes.
 */
#pragma once
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__

/* Global -> shared; the bytes count towards `bar`. */
PTX_FN void bulk_load(uint32_t dst, const void *src, uint32_t bytes, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
                 "r"(bytes), "r"(bar) : "memory");
}

/* Shared -> global, in this thread's bulk group; policies of L2: ptx_tma.cuh. */
PTX_FN void bulk_store(void *dst, uint32_t src, uint32_t bytes, uint64_t policy)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(dst), "r"(src), "r"(bytes), "l"(policy)
                 : "memory");
}

/* The same, added to float32. */
PTX_FN void bulk_add_f32(float *dst, uint32_t src, uint32_t bytes, uint64_t policy)
{
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, %3;" ::"l"(dst), "r"(src), "r"(bytes),
                 "l"(policy) : "memory");
}

/* All committed groups of this thread are done, not only read. Commit, and wait for the read: ptx_tma.cuh. */
PTX_FN void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
