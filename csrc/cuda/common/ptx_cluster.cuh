/* ptx_cluster.cuh - blocks of a cluster and the shared memory of each other, one instruction per function (sm_90). PTX ISA,
 * "barrier.cluster", "mapa".
 */
#pragma once
#include "ptx_sync.cuh"

/* All blocks of a cluster: threads that have ended count as arrived. What came before an arrival is seen after the wait. */
PTX_FN void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
PTX_FN void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

PTX_FN uint32_t cluster_number()
{
    uint32_t n;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(n));
    return n;
}
PTX_FN uint32_t cluster_rank()
{
    uint32_t n;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
    return n;
}

/* The same place in the shared memory of block `rank` of the cluster. */
PTX_FN uint32_t map_to_rank(uint32_t address, uint32_t rank)
{
    uint32_t mapped;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
    return mapped;
}

/* At places that map_to_rank() gave, as the rest. */
PTX_FN void store_cluster(uint32_t address, float4 x)
{
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w) : "memory");
}
PTX_FN void store_cluster(uint32_t address, float2 x)
{
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x.x), "f"(x.y) : "memory");
}

/* A word that two blocks pass to and fro: nothing else is ordered by it. */
PTX_FN uint32_t load_cluster_relaxed(uint32_t address)
{
    uint32_t x;
    asm volatile("ld.relaxed.cluster.shared::cluster.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}
PTX_FN void store_cluster_relaxed(uint32_t address, uint32_t x)
{
    asm volatile("st.relaxed.cluster.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

PTX_FN void mbarrier_arrive_cluster(uint32_t bar) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory"); }
