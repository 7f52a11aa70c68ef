/* bwd_dbias_wide.cuh - part of bwd.cu, head dim 256: the gradient of a bias that is shared or beside a soft cap (bwd_dbias.cuh),
 * float32 or of q's dtype, whatever is beside it and wherever its elements lie. Lanes read those of their own scores once a tile,
 * from global memory, and keep them in registers.
 *
 * One tile each of K, V, Q and dO finds room: K and Q are loaded anew as soon as S is made, V and dO as soon as dP is.
 *
 * mbarrier              arrivals (count)                            waited for by     meaning
 * k_full, v_full        producer + bytes, for each consumer (2)     consumers         k_full: a tile is done, too
 * q_full, dout_full     producer + bytes (1)                        consumers
 * s_empty               consumer warps (8)                          producer          S is made, what is about it was read
 * dp_empty              consumer warps (8)                          producer          dP is made
 */
#pragma once

struct dbias_shared {
    T k[2][CHUNKS][BLOCK_K * CHUNK], v[2][CHUNKS][BLOCK_K * CHUNK];      /* of each consumer */
    T q[CHUNKS][BLOCK_Q * CHUNK], dout[CHUNKS][BLOCK_Q * CHUNK];
    float lse2[BLOCK_Q], delta[BLOCK_Q];
    fgqa_range rows[2 * 64];                     /* that see each key of each consumer, where not all do */
    int4 about;                                  /* sequence (-1: the tile of dbias is done), head, CARE_ bits, query tile */
    alibi_tile alibi;
    dropout_key dropout;
    uint64_t k_full, v_full, q_full, dout_full, s_empty, dp_empty;
};
static_assert(sizeof(dbias_shared) <= SM_BYTES, "the tiles do not fit into shared memory");

typedef dbias_place<false> wide_place;

static __device__ void produce_dbias(const bwd_params &p, dbias_shared &sm, const dbias_extent &extent)
{
    const fgqa_problem &problem = p.common.problem;
    const uint64_t policy = createpolicy_evict_normal();
    const int64_t tiles = tiles_of(extent);
    const int32_t sequences = extent.sequences == 1 ? problem.b : 1, heads = extent.heads == 1 ? problem.hq : 1;
    uint32_t s_parity = 1, dp_parity = 1;
    for (int64_t n = blockIdx.x; n < tiles; n += gridDim.x) {
        const wide_place at(problem, extent, n);
        for (int32_t b = at.batch; b < at.batch + sequences; b++) {
            int32_t rows;
            bool whole;
            const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
            if (!meets(p, sequence, b, at, &whole)) { continue; }
            const int batch = problem.varlen ? 0 : b, row = (int)sequence.q_row + at.i0, key = (int)sequence.k_row + at.j0;
            for (int32_t head = at.head; head < at.head + heads; head++, s_parity ^= 1, dp_parity ^= 1) {
                const int32_t kv_head = fgqa_kv_head(head, problem.g);
                const int32_t q_tile = (int32_t)bwd_q_tile(problem, p.w, b, head, sequence.q_row, at.i0 / BLOCK_Q);
                const float *stats = (const float *)p.w.stats + (int64_t)q_tile * 2 * BLOCK_Q;
                mbarrier_wait(smem_address(&sm.s_empty), s_parity);
                sm.about = make_int4(b, head, whole ? 0 : PARTIAL, q_tile);
                sm.alibi = {slope_of_head(p, b, head), at.i0 + sequence.mask.diag - at.j0};
                for (int c = 0; c < 2; c++) {
                    load_keys(&p.k_map, sm.k[c], &sm.k_full, policy, kv_head, key + c * BLOCK_K, batch);
                }
                load_rows(&p.q_map, sm.q, sm.lse2, stats, &sm.q_full, policy, head, row, batch);
                mbarrier_wait(smem_address(&sm.dp_empty), dp_parity);
                for (int c = 0; c < 2; c++) {
                    load_keys(&p.v_map, sm.v[c], &sm.v_full, policy, kv_head, key + c * BLOCK_K, batch);
                }
                load_rows(&p.dout_map, sm.dout, sm.delta, stats + BLOCK_Q, &sm.dout_full, policy, head, row, batch);
            }
        }
        mbarrier_wait(smem_address(&sm.s_empty), s_parity);
        s_parity ^= 1;
        sm.about = make_int4(-1, 0, 0, 0);
        for (int c = 0; c < 2; c++) { mbarrier_arrive(smem_address(&sm.k_full)); }
    }
}

/* Products of 64 keys and 64 rows. */
static __device__ __forceinline__ void wide_products(float (&x)[32], uint64_t keys, uint64_t rows)
{
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
        const int at = (n / 4 * 64 * 128 + n % 4 * 32) / 16;
        wgmma64<0>(x, keys + at, rows + at, n == 0);
    }
    wgmma_commit();
}

static __device__ void consume_dbias(const bwd_params &p, dbias_shared &sm, const dbias_extent &extent, int consumer)
{
    const fgqa_problem &problem = p.common.problem;
    const int thread = (int)thread_index() & 127, lane = thread & 31;
    const int own_key = consumer * 64 + thread / 32 * 16 + lane / 4;         /* and own_key + 8 */
    const int64_t tiles = tiles_of(extent);
    const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k[consumer]), 0, 1024);
    const uint64_t v_rows = wgmma_desc_sw128(smem_address(sm.v[consumer]), 0, 1024);
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q), 0, 1024);
    const uint64_t dout_rows = wgmma_desc_sw128(smem_address(sm.dout), 0, 1024);
    const bool wide = problem.view[FGQA_ARG_bias].dtype == FGQA_F32, some_mask = problem.view[FGQA_ARG_mask].data;
    uint32_t k_parity = 0, parity = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const wide_place at(problem, extent, tile);
        const int32_t key_tile = at.j0 / BLOCK_K;
        float sum[32] = {};
        uint32_t bias[32], same = 0;
        load_bias_of_keys(bias, problem, at.batch, at.head, at.i0, at.j0 + own_key);
        if (!wide) { widen_words(bias); }
#pragma unroll
        for (int n = 0; n < 32; n++) { same |= bias[n] == WIDE_HIDDEN; }
        const bool some_hidden = __any_sync(ALL_LANES, same != 0);
        for (;; parity ^= 1) {
            mbarrier_wait(smem_address(&sm.k_full), k_parity);
            k_parity ^= 1;
            const int4 about = sm.about;
            if (about.x < 0) { break; }
            const bool partial = about.z & PARTIAL;
            if (partial) { note_rows(sm.rows, p, about.x, at.j0, consumer); }
            const float *bases = p.w.based[about.w] ? p.w.bases + (int64_t)about.w * BLOCK_Q : NULL;
            hiding by = {some_hidden, some_mask, partial, {}, {}};
            if (some_mask) { by.bytes = load_mask_bytes(p, about.x, key_tile, about.y, at.i0, consumer, thread); }
            const alibi_lane alibi = alibi_of_lane(sm.alibi, consumer, thread);
            const uint32_t batch_head = (uint32_t)about.x * (uint32_t)problem.hq + (uint32_t)about.y;
            const drawing drawing = prepare_drawing(sm.dropout, key_tile, batch_head, at.i0, consumer, thread);
            float s[32], dp[32];
            float4 lse2[4], delta[4];
            mbarrier_wait(smem_address(&sm.q_full), parity);
#pragma unroll
            for (int n = 0; n < 4; n++) { lse2[n] = ((const float4 *)sm.lse2)[lane % 4 + 4 * n]; }
            wide_products(s, k_rows, q_rows);
            mbarrier_wait(smem_address(&sm.v_full), parity);
            mbarrier_wait(smem_address(&sm.dout_full), parity);
            wide_products(dp, v_rows, dout_rows);
            const uint32_t drawn = draw_blocks<BIAS_AND_ALL>(p, drawing);
            wgmma_wait<1>();
            __syncwarp();
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.s_empty)); }
            by.kept = bits_of_blocks(drawn);
            weigh<BIAS_AND_ALL>(s, bias, lse2, p, alibi, bases);
            wgmma_wait<0>();
#pragma unroll
            for (int n = 0; n < 4; n++) { delta[n] = ((const float4 *)sm.delta)[lane % 4 + 4 * n]; }
            __syncwarp();
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.dp_empty)); }
            add_gradients<BIAS_AND_ALL>(sum, s, dp, delta, bias, p, by, sm.rows + consumer * 64, at.i0);
        }
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.s_empty)); }
        const int4 to = make_int4(at.j0 + 64 * consumer, at.i0, at.head, at.batch);
        if (wide) { store_elements<float>(p, to, sum, p.dbias_scale); } else { store_elements<T>(p, to, sum, p.dbias_scale); }
    }
}

static __global__ void __launch_bounds__(THREADS, 1) dbias_kernel(const __grid_constant__ bwd_params p, const dbias_extent extent)
{
    extern __shared__ __align__(1024) char memory[];
    dbias_shared &sm = *(dbias_shared *)memory;
    const int wg = __shfl_sync(ALL_LANES, thread_index() / 128, 0);
    if (thread_index() == 0) {
        if (smem_address(memory) % 1024) { __trap(); }           /* the swizzle pattern repeats every 1024 bytes */
        sm.dropout = dropout_key_make(p.common.problem);
        mbarrier_init(smem_address(&sm.k_full), 2);
        mbarrier_init(smem_address(&sm.v_full), 2);
        mbarrier_init(smem_address(&sm.q_full), 1);
        mbarrier_init(smem_address(&sm.dout_full), 1);
        mbarrier_init(smem_address(&sm.s_empty), CONSUMERS / 32);
        mbarrier_init(smem_address(&sm.dp_empty), CONSUMERS / 32);
        fence_mbarrier_init();
    }
    __syncthreads();
    if (wg == 0) {
        setmaxnreg_dec<PRODUCER_REGS>();
        if (thread_index() == 0) { produce_dbias(p, sm, extent); }
    } else {
        setmaxnreg_inc<CONSUMER_REGS>();
        consume_dbias(p, sm, extent, wg - 1);
    }
}

/* Behind the main kernel: it needs its statistics alone. */
static int sum_dbias(const bwd_params &p, int32_t device, int multiprocessors, cudaStream_t stream)
{
    static launch_state state;
    const dbias_extent extent = dbias_extent_of(p.common.problem, TILE<false>);
    const uint32_t blocks = (uint32_t)min(tiles_of(extent), (int64_t)multiprocessors);
    if (blocks == 0) { return cudaSuccess; }
    const cudaError_t error = allow_shared_memory((const void *)dbias_kernel, sizeof(dbias_shared), device, &state);
    return error != cudaSuccess ? error : launch_kernel(dbias_kernel, blocks, THREADS, sizeof(dbias_shared), stream, p, extent);
}
