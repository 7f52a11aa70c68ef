/* fwd_pair.cuh - chain PAIRED of fwd.cu, which includes this in its middle: the two blocks of a cluster walk tiles that see the
 * same keys, those of two heads of a group, and each brings half the columns of every block of K and V into the shared memory of
 * both. So bytes leave L2 once for twice the rows, which at the limit of power is speed. Who hands a buffer back tells both
 * producers. The first block claims tiles for both. Tiles that have to be done again each block does alone, on the same barriers.
 */
#pragma once

/* Whose producers wait until a buffer has been read. */
template <chain CHAIN> static constexpr int READERS = CHAIN == PAIRED ? 2 : 1;

/* All threads of both blocks. */
static __device__ __forceinline__ void meet_pair()
{
    cluster_arrive();
    cluster_wait();
}

/* tma_load_4d() into the same place of both blocks; each has its half of the bytes counted by its own barrier. */
PTX_FN void tma_load_4d_for_both(uint32_t dst, const CUtensorMap *map, uint32_t bar, uint64_t policy, int c0, int c1, int c2, int c3)
{
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6, %7}], [%2], %8, %3;" ::"r"(dst), "l"((uint64_t)map), "r"(bar), "l"(policy),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"((uint16_t)3) : "memory");
}

/* By a warpgroup that has read a block of K or V. */
template <bool CAREFUL, chain CHAIN> static __device__ __forceinline__ void hand_back(uint32_t empty, uint32_t thread)
{
    if (CHAIN != PAIRED) {
        if (thread == 0) { mbarrier_arrive(empty); }
    } else if (thread < 2) {
        if (CAREFUL) { mbarrier_arrive(empty); } else { mbarrier_arrive_cluster(map_to_rank(empty, thread)); }
    }
}

/* tile_walk's advance(). claim: 0, or the second block's next item that it has not taken yet, which is never 0. Whole warp. */
static __device__ __forceinline__ void advance_pair(tile_walk<BLOCK_Q, false> &walk, uint32_t *claim, uint32_t *counter)
{
    const uint32_t second = map_to_rank(smem_address(claim), 1);
    uint32_t item = 0;
    if (thread_index() % 32 == 0 && cluster_rank() == 0) {
        item = gridDim.x + 2 * atomicAdd(counter, 1);
        while (load_cluster_relaxed(second) != 0) {}
        store_cluster_relaxed(second, item + 1);
    } else if (thread_index() % 32 == 0) {
        while ((item = load_cluster_relaxed(second)) == 0) {}
        store_cluster_relaxed(second, 0);
    }
    walk.round++;
    walk.item = __shfl_sync(ALL_LANES, item, 0);
}

/* ---- host ---- */

/* Keys from which two blocks in step gain more than they wait for each other. */
enum { PAIR_KEYS = 2048 };

/* Tiles 2 n and 2 n + 1 of the list are those of two heads that share a KV head, and there is one for each multiprocessor. */
static bool tiles_pair(const fgqa_problem *problem, const fgqa_plan *plan, const tile_list &list, int resident)
{
    const bool all_keys = problem->left == FGQA_UNBOUNDED && problem->chunk == 0 && problem->sk > PAIR_KEYS;
    return (problem->g >> list.pack) % 2 == 0 && all_keys && !problem->varlen && problem->cache.page_size == 0 && plan->splits == 1 && plan->tasks >= resident;
}

static cudaError_t launch_paired(void (*kernel)(fwd_params), const fwd_params &p, uint32_t blocks, int32_t device, cudaStream_t stream, launch_state *state)
{
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = 2;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks / 2 * 2);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = sizeof(shared);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = allow_shared_memory((const void *)kernel, sizeof(shared), device, state);
    return error == cudaSuccess ? cudaLaunchKernelEx(&config, kernel, p) : error;
}
