/* ptx_tma.cuh - tensor copies between global and shared memory, one instruction per function (sm_90).
 * PTX ISA, "cp.async.bulk.tensor". Maps: tensor_map.h.
 */
#pragma once
#include <cuda.h>
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__

PTX_FN void prefetch_tensormap(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"((uint64_t)map) : "memory");
}

/* L2 policies, for the loads below and those of ptx_bulk.cuh. */
PTX_FN uint64_t createpolicy_evict_first() { uint64_t p; asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p)); return p; }
PTX_FN uint64_t createpolicy_evict_normal() { uint64_t p; asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p)); return p; }
PTX_FN uint64_t createpolicy_evict_last() { uint64_t p; asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p)); return p; }

/* Box at (c0, c1, c2, c3) -> shared `dst`; its bytes count towards `bar`. Out-of-range elements are zero and count too. */
PTX_FN void tma_load_4d(uint32_t dst, const CUtensorMap *map, uint32_t bar, uint64_t policy, int c0, int c1, int c2, int c3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(dst), "l"((uint64_t)map), "r"(bar), "l"(policy),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

/* What such a load would bring -> L2. */
PTX_FN void tma_prefetch_4d(const CUtensorMap *map, int c0, int c1, int c2, int c3)
{
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"((uint64_t)map), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

PTX_FN void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Waits until the committed stores have read their shared memory. */
PTX_FN void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

/* Makes this thread's ordinary writes to shared memory visible to TMA and wgmma. */
PTX_FN void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
/* Orders this block's ordinary accesses to global memory before TMA's. */
PTX_FN void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
