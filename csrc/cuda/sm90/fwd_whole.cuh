/* fwd_whole.cuh - short rows of fwd.cu, which includes this, where all keys of a sequence are in shared memory at once: a block
 * has one tile and asks for all that it needs before anything else. Of a launch that short most was the time until the first
 * product: roles that wait for one another, their instructions on the way from memory. Here are no rings, lists and claims, and
 * other blocks of the multiprocessor are what a block overlaps with. Padded sequences whose lengths the host knows.
 */
#pragma once

template <int KEYS> struct whole_tile {
    T q[1][Q_CHUNKS][WG_ROWS * CHUNK], k[K_CHUNKS][KEYS * CHUNK], v[V_CHUNKS][KEYS * CHUNK];
    tile t;
    fgqa_range seen[WG_ROWS];                                    /* for the careful pass alone */
    uint64_t k_full, v_full;                                     /* Q and K; V */
};

/* Blocks of a multiprocessor: as many as have memory and registers. */
template <int KEYS> static constexpr int WHOLE_FIT = 228 * 1024 / (int)(sizeof(whole_tile<KEYS>) + 1024);
template <int KEYS> static constexpr int WHOLE_RUN = DV > 64 ? 4 : KEYS > 32 ? 5 : 6;
template <int KEYS> static constexpr int WHOLE_BLOCKS = WHOLE_FIT<KEYS> < WHOLE_RUN<KEYS> ? WHOLE_FIT<KEYS> : WHOLE_RUN<KEYS>;

/* By one thread, at once: nothing here has to be known of masks. */
template <int KEYS> static __device__ __forceinline__ void load_whole(const fwd_params &p, whole_tile<KEYS> &sm, int32_t head, int32_t row0, int32_t batch)
{
    const uint32_t k_full = smem_address(&sm.k_full), v_full = smem_address(&sm.v_full);
    const uint64_t keep = createpolicy_evict_last();
    const int32_t kv_head = p.whole.units == 1 ? (int32_t)blockIdx.y : (int32_t)blockIdx.y / p.whole.units;
    mbarrier_init(k_full, 2);
    mbarrier_init(v_full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(k_full, sizeof(sm.k));
    for (int c = 0; c < K_CHUNKS; c++) { tma_load_4d(smem_address(sm.k[c]), &p.k_map, k_full, keep, c * CHUNK, kv_head, 0, batch); }
    load_q(p, sm.q, k_full, createpolicy_evict_first(), head, 0, row0, batch);
    mbarrier_arrive_expect_tx(v_full, sizeof(sm.v));
    for (int c = 0; c < V_CHUNKS; c++) { tma_load_4d(smem_address(sm.v[c]), &p.v_map, v_full, keep, c * CHUNK, kv_head, 0, batch); }
}

/* By one thread. */
static __device__ __forceinline__ void describe_whole(const fwd_params &p, tile &t, int32_t head, int32_t row0, int32_t batch)
{
    t.row0 = row0;
    t.valid = min(BLOCK_Q, (p.common.problem.sq << p.list.pack) - row0);
    t.head = head;
    t.batch = batch;
    t.q_row = t.k_row = 0;
    t.sq = p.common.problem.sq;
    place_tile(p, t);
}

/* Keys that a packed row sees. */
static __device__ __forceinline__ fgqa_range keys_of_row(const fwd_params &p, int32_t packed)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_mask mask = {problem.sq, p.whole.sk, p.whole.diag, problem.left, problem.right, problem.chunk};
    const int32_t i = min(packed >> p.list.pack, problem.sq - 1);
    const fgqa_range all = {0, p.whole.sk};
    return p.whole.masked ? fgqa_kv_range(&mask, i, i + 1) : all;
}

/* careful: without inf and NaN in V (careful.cuh); one copy of the products, whose registers ptxas counts once. True: an
 * element is not finite, or a row is lost. */
template <int KEYS> static __device__ __forceinline__ bool attend(const fwd_params &p, whole_tile<KEYS> &sm, bool careful)
{
    const tile &t = sm.t;
    const uint32_t thread = thread_index() + 128;                /* as those of consumers count */
    const int32_t first = row_in_tile(thread), column = 2 * (int32_t)(thread % 4);
    const float scale_log2 = p.common.scale * (float)FGQA_LOG2E;
    softmax_rows rows = {};
    row_ends ends;
    float s[KEYS / 2], o[DV / 2];
    uint32_t pr[KEYS / 4];
    const fgqa_range seen[2] = {keys_of_row(p, t.row0 + first), keys_of_row(p, t.row0 + first + 8)};
    mbarrier_wait(smem_address(&sm.k_full), 0);
    wgmma_fence();
    qk_wgmma<D, KEYS>(s, wgmma_desc_sw128(smem_address(sm.q), 0, 1024), wgmma_desc_sw128(smem_address(sm.k), 0, 1024));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
    if (p.whole.masked || p.whole.sk < KEYS) {
        uint32_t bits[2];
#pragma unroll
        for (int r = 0; r < 2; r++) { bits[r] = columns_before(seen[r].end - column) & ~columns_before(seen[r].begin - column); }
        hide_others(s, bits);
    }
#pragma unroll
    for (int r = 0; r < 2; r++) { set_base(rows, r, row_top(s, r), scale_log2); }
#pragma unroll
    for (int r = 0; r < 2; r++) { rows.l[r] = careful ? exponentials<true>(s, rows, r, scale_log2) : exponentials<false>(s, rows, r, scale_log2); }
    pack_weights<T>(pr, s);
    mbarrier_wait(smem_address(&sm.v_full), 0);
    if (careful) { clean_v<T>(smem_address(sm.v), sizeof(sm.v), TOGETHER); }
    wgmma_fence();
    pv_wgmma<DV, KEYS>(o, pr, wgmma_desc_sw128(smem_address(sm.v), KEYS * 128, 1024), 0);
    wgmma_commit();
    end_rows(ends, rows);
    const row_places places = place_rows(p, thread);
    wgmma_wait<0>();
    wgmma_pin(o);
    const bool lost = row_is_lost(ends, 0) || row_is_lost(ends, 1);
    if (p.common.problem.view[FGQA_ARG_sink].data) { add_sinks<false>(p, t, first, ends); }
    if (careful) { add_seen_poison<PLAIN>(p, thread, sm.seen, t, o); }
    char *const to[2] = {places.o[0] + t.out, places.o[1] + t.out};
    const int32_t there = p.common.problem.dv - first_column(), columns[2] = {first < t.valid ? there : 0, first + 8 < t.valid ? there : 0};
    const int32_t r = (int32_t)(thread % 4);                     /* the row whose LSE this lane stores, if it is one */
    if (places.lse && first + 8 * r < t.valid) { *(float *)(places.lse + t.lse) = r ? ends.lse[1] : ends.lse[0]; }
    return store_o(to, columns, o, ends.factor) != 0 || lost;
}

template <int KEYS>
static __global__ void __launch_bounds__(4 * 32, WHOLE_BLOCKS<KEYS>) whole_kernel(const __grid_constant__ fwd_params p)
{
    extern __shared__ __align__(1024) char memory[];
    whole_tile<KEYS> &sm = *(whole_tile<KEYS> *)memory;
    const int warp = __shfl_sync(ALL_LANES, thread_index() / 32, 0);
    const int32_t head = (int32_t)blockIdx.y << p.list.pack, row0 = (int32_t)blockIdx.x * BLOCK_Q, batch = p.split.first_b + (int32_t)blockIdx.z;
    if (warp > 0 && elect_one()) { prefetch_tensormap(warp == 1 ? &p.k_map : warp == 2 ? &p.q_map : &p.v_map); }
    if (warp == 0 && elect_one()) { load_whole(p, sm, head, row0, batch); }
    if (warp == 1 && elect_one()) { describe_whole(p, sm.t, head, row0, batch); }
    __syncthreads();
    bool careful = false;
#pragma unroll 1
    while (__syncthreads_or(attend(p, sm, careful)) && !careful) {
        careful = true;
        if (thread_index() < WG_ROWS) { sm.seen[thread_index()] = keys_of_row(p, row0 + (int32_t)thread_index()); }
        __syncthreads();
    }
}

/* ---- host ---- */

/* keys: of FGQA_WHOLE_KEYS. Sequences beyond what a grid holds along z have launches of their own. */
template <int KEYS, int... MORE> static cudaError_t launch_whole(int32_t keys, fwd_params &p, cudaStream_t stream)
{
    static launch_state state;
    if constexpr (sizeof...(MORE) > 0) {
        if (keys > KEYS) { return launch_whole<MORE...>(keys, p, stream); }
    }
    const fgqa_problem &problem = p.common.problem;
    const fgqa_sequence sequence = fgqa_problem_sequence(&problem, 0);
    const int32_t masked = problem.right != FGQA_UNBOUNDED || problem.left != FGQA_UNBOUNDED || problem.chunk > 0;
    p.whole = {sequence.mask.sk, sequence.mask.diag, masked, problem.g >> p.list.pack};
    cudaError_t error = allow_shared_memory((const void *)whole_kernel<KEYS>, sizeof(whole_tile<KEYS>), problem.device.index, &state);
    for (p.split.first_b = 0; error == cudaSuccess && p.split.first_b < problem.b; p.split.first_b += UINT16_MAX) {
        const dim3 grid(p.list.row_blocks, p.list.units, (uint32_t)(problem.b - p.split.first_b < UINT16_MAX ? problem.b - p.split.first_b : UINT16_MAX));
        error = launch_kernel(whole_kernel<KEYS>, grid, 4 * 32, sizeof(whole_tile<KEYS>), stream, p);
    }
    return error;
}
