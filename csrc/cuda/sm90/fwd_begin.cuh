/* fwd_begin.cuh - how a block begins where the host knows its only tile (chain MERGED of fwd.cu, which includes this in its
 * middle): the producer asks for the first keys and for Q before anything else is set up. By way of the scheduler that took 2 us
 * more, most of it instructions that nobody had run yet.
 */
#pragma once

/* done: so many of k_full are there. */
template <chain CHAIN> static __device__ __forceinline__ void init_key_barriers(shared &sm, int done)
{
    for (int s = 0; s < STAGES; s++) {
        if (s >= done) { mbarrier_init(smem_address(&sm.k_full[s]), 1); }
        mbarrier_init(smem_address(&sm.k_empty[s]), WG_COUNT * READERS<CHAIN>);
    }
    for (int s = 0; s < V_STAGES; s++) {
        mbarrier_init(smem_address(&sm.v_full[s]), 1);
        mbarrier_init(smem_address(&sm.v_empty[s]), WG_COUNT * READERS<CHAIN>);
    }
}

/* Copies of K and V that are asked for here. With more of them Q, the keys of rows and instructions come later. */
static constexpr int BEGUN = 1;

/* Whole warp. The first copy waits for as little as can be: barriers take 30 cycles each. */
template <chain CHAIN> static __device__ __forceinline__ void begin_tile(const fwd_params &p, shared &sm)
{
    if (!elect_one()) { return; }
    const uint64_t once = createpolicy_evict_first();
    const int32_t unit = (int32_t)blockIdx.y, batch = (int32_t)blockIdx.z, row = (p.known.of_part((int32_t)blockIdx.x).end - 1) * BLOCK_K;
    const uint32_t full = smem_address(&sm.k_full[0]);
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    launches_before_wait();
    mbarrier_arrive_expect_tx(full, K_BYTES);
    for (int c = 0; c < K_CHUNKS; c++) { tma_load_4d(smem_address(sm.k[0][c]), &p.k_map, full, once, c * CHUNK, unit, row, batch); }
    for (int s = 0; s < Q_STAGES; s++) { mbarrier_init(smem_address(&sm.q_full[s][0]), 2); }
    init_key_barriers<CHAIN>(sm, 1);
    fence_mbarrier_init();
    load_q(p, sm.q[0], smem_address(&sm.q_full[0][0]), once, unit << p.list.pack, 0, 0, batch);
}

/* What the scheduler would say of the tile. Whole warp. */
template <chain CHAIN> static __device__ __forceinline__ void tell_tile(const fwd_params &p, shared &sm)
{
    if (!elect_one()) { return; }
    const fgqa_range blocks = p.known.of_part((int32_t)blockIdx.x);
    tile &t = sm.tiles[0];
    t.block_begin = blocks.begin;
    t.block_end = blocks.end;
    t.row0 = t.q_row = t.k_row = 0;
    t.valid = p.common.problem.sq << p.list.pack;
    t.head = (int32_t)blockIdx.y << p.list.pack;
    t.batch = (int32_t)blockIdx.z;
    t.part = (int32_t)blockIdx.x;
    t.sq = p.common.problem.sq;
    t.sk = p.known.sk;
    t.diag = p.known.diag;
}

/* ---- host ---- */

/* Where all sequences have one length, the rows of a KV head are one tile, and nobody has to look for pages. */
static known_keys known_keys_of(const fgqa_problem *problem, const tile_list &list)
{
    known_keys known = {};
    if (!fgqa_dec_is_uniform(problem) || problem->cache.table || list.row_blocks != 1 || problem->g != 1 << list.pack) { return known; }
    const fgqa_sequence sequence = fgqa_problem_sequence(problem, 0);
    const fgqa_range keys = fgqa_kv_range(&sequence.mask, 0, sequence.mask.sq);
    const int32_t first = keys.begin / BLOCK_K, count = (keys.end + BLOCK_K - 1) / BLOCK_K - first;
    if (keys.begin == keys.end || count < (int32_t)list.splits) { return known; }
    known.first = first;
    known.share = count / (int32_t)list.splits;
    known.longer = count % (int32_t)list.splits;
    known.sk = sequence.mask.sk;
    known.diag = sequence.mask.diag;
    return known;
}
