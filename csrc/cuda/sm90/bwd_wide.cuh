/* bwd_wide.cuh - part of bwd.cu, head dim 256: 64 keys a block. dK and dV would fill the registers of both consumers: one makes S, P
 * and dV, the other dP, dS and dK, and each one half of dQ, twice 64 rows x 64 columns, which it adds to memory itself.
 *
 *     values                                          keys
 *     S issued                                        dP issued
 *     wait S: P, to shared memory                     wait P and dP: dS, to shared memory
 *     dV issued                                                                                  under dV
 *     both meet; dQ issued                            both meet; dQ, then dK issued
 *     wait dQ: added; the same for its other half     wait dQ: added; the other half             under dK
 * Registers: dV or dK 128, S or dP and later dQ 32, P or dS in 16 bits 16, lse2 or delta 16.
 */
#pragma once

enum role { VALUES, KEYS };

static __device__ __forceinline__ void init_dq_barriers(shared &sm)
{
    for (int s = 0; s < 2; s++) {
        mbarrier_init(smem_address(&sm.turn_come[s]), 1);
        mbarrier_init(smem_address(&sm.dq_added[s]), CONSUMERS / 32);
    }
}

/* In order: waits for the block's turn at a query tile, and passes it on when the consumers have added; a thread for each of the two
 * stages, since to pass one turn on and to see the next takes longer than a step. Blocks only wait for blocks whose tickets came
 * before theirs, which are running: no deadlock whatever the card does. */
template <bool MASKED> static __device__ void write_dq(const bwd_params &p, shared &sm, uint32_t stage)
{
    const fgqa_problem &problem = p.common.problem;
    ring2 r;
    for (uint32_t count = 0;; count++) {
        mbarrier_wait(smem_address(&sm.task_full), count & 1);
        const task &t = sm.tasks[count & 1];
        if (t.done) { return; }
        const int64_t first_tile = t.q_tile;
        const int32_t steps = p.ordered ? t.steps : 0;
        walk<MASKED> at(t);
        mbarrier_arrive(smem_address(&sm.task_free));
        for (int32_t step = 0; step < steps; step++, at.next(p.w.splits, problem.g), r.advance()) {
            if (r.stage != stage) { continue; }
            int32_t *const turn = p.w.turn + first_tile + at.head * p.w.head_tiles + at.tile;
            const int32_t own_turn = turn_at<MASKED>(p, t, at.tile);
            int32_t state;
            while (((state = load_acquire_s32(turn)) & (FGQA_BWD_FRESH - 1)) != own_turn) { __nanosleep(20); }
            const bool first = state & FGQA_BWD_FRESH;
            sm.first[r.stage] = first;
            mbarrier_arrive(smem_address(&sm.turn_come[r.stage]));
            mbarrier_wait(smem_address(&sm.dq_added[r.stage]), r.parity);
            red_release_add_s32(turn, first ? 1 - FGQA_BWD_FRESH : 1);      /* after the consumers' additions, which it has met */
        }
    }
}

static __device__ __forceinline__ void add_dq(const bwd_params &p, shared &sm, const ring2 &r, const float (&dq)[32], int chunk, int thread)
{
    float *const to = p.w.dq + (int64_t)sm.tile[r.stage] * (BLOCK_Q * D) + chunk * (BLOCK_Q * CHUNK) + 4 * thread;
    const float scale = p.common.scale;
    if (p.ordered && sm.first[r.stage]) {
#pragma unroll
        for (int n = 0; n < 8; n++) { *(float4 *)(to + 512 * n) = make_float4(dq[4 * n] * scale, dq[4 * n + 1] * scale, dq[4 * n + 2] * scale, dq[4 * n + 3] * scale); }
    } else {
#pragma unroll
        for (int n = 0; n < 8; n++) {
            const float four[4] = {dq[4 * n] * scale, dq[4 * n + 1] * scale, dq[4 * n + 2] * scale, dq[4 * n + 3] * scale};
            red_add_f32x4(to + 512 * n, four);
        }
    }
}

/* dQ of a chunk of columns. */
static __device__ __forceinline__ void query_products(float (&dq)[32], uint64_t ds_columns, uint64_t k_columns)
{
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < BLOCK_K / 16; n++) { wgmma64<1>(dq, ds_columns + n * 2048 / 16, k_columns + n * 2048 / 16, n == 0); }
    wgmma_commit();
}

template <bool MASKED, role OWN_ROLE> static __device__ __forceinline__ void consume_as(const bwd_params &p, shared &sm)
{
    const int thread = (int)threadIdx.x & 127, lane = thread & 31, key = thread / 32 * 16 + lane / 4;                      /* and key + 8 */
    const uint64_t key_rows = wgmma_desc_sw128(OWN_ROLE == VALUES ? smem_address(sm.k) : smem_address(sm.v), 0, 1024);
    const uint64_t k_columns = wgmma_desc_sw128(smem_address(sm.k[2 * OWN_ROLE]), 0, 1024);                                /* own 128 columns */
    const uint64_t ds_columns = wgmma_desc_sw128(smem_address(sm.ds), 0, 1024);
    ring2 r;
    for (uint32_t state = 0;; state = ~state & 1) {            /* parity of the task, and what it met */
        mbarrier_wait(smem_address(&sm.task_full), state & 1);
        const task &t = sm.tasks[state & 1];
        if (t.done) { return; }
        int32_t steps = t.steps;
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.task_free)); }
        begin_keys<MASKED>(p, sm, t, state, OWN_ROLE * 128 + thread, key);
        float sum[D / 2];                                      /* dV or dK */
#pragma unroll
        for (int n = 0; n < D / 2; n++) { sum[n] = 0.0f; }

        for (; steps > 0; steps--) {
            float x[32], dq[32];                               /* S or dP */
            uint32_t pairs[16];                                /* of P^T or dS^T: A operand of dV or dK */
            const uint32_t rows = OWN_ROLE == VALUES ? smem_address(sm.q[r.stage]) : smem_address(sm.dout[r.stage]);
            const uint32_t columns = OWN_ROLE == VALUES ? smem_address(sm.dout[r.stage]) : smem_address(sm.q[r.stage]);
            int32_t row0 = 0;
            const bool partial = begin_step<MASKED>(sm, r, state, OWN_ROLE * 128 + thread, row0);
            const float4 *of_lane = (const float4 *)(OWN_ROLE == VALUES ? sm.lse2[r.stage] : sm.delta[r.stage]) + (lane & 3);
            const float4 stats[4] = {of_lane[0], of_lane[4], of_lane[8], of_lane[12]};
            const uint64_t query_rows = wgmma_desc_sw128(rows, 0, 1024), query_columns = wgmma_desc_sw128(columns, BLOCK_Q * 128, 1024);
            uint4 *const exchanged = (uint4 *)sm.weights + thread;
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                wgmma64<0>(x, key_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, query_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
            }
            wgmma_commit();
            if (OWN_ROLE == VALUES) {
                wgmma_wait<0>();
#pragma unroll
                for (int n = 0; n < 8; n++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) { x[4 * n + e] = ex2(fmaf(x[4 * n + e], p.scale_log2, -of_row(stats, n, e % 2))); }
                    pairs[2 * n] = pack2(x[4 * n], x[4 * n + 1], T());
                    pairs[2 * n + 1] = pack2(x[4 * n + 2], x[4 * n + 3], T());
                }
                if (MASKED && partial) { hide(pairs, tile_mask(sm.rows + OWN_ROLE * 64, row0)); }
#pragma unroll
                for (int n = 0; n < 4; n++) { exchanged[128 * n] = make_uint4(pairs[4 * n], pairs[4 * n + 1], pairs[4 * n + 2], pairs[4 * n + 3]); }
                bar_arrive(WEIGHTS, CONSUMERS);
                wgmma_fence();
#pragma unroll
                for (int n = 0; n < BLOCK_Q / 16; n++) { wgmma_rs_bt(sum, pairs + 4 * n, query_columns + n * 2048 / 16, 1); }
                wgmma_commit();
            } else {
                bar_sync(WEIGHTS, CONSUMERS);
                wgmma_wait<0>();
                if (thread == 0) { mbarrier_arrive(smem_address(&sm.dout_empty[r.stage])); }
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const uint4 four = exchanged[128 * n];
                    pairs[4 * n] = four.x;
                    pairs[4 * n + 1] = four.y;
                    pairs[4 * n + 2] = four.z;
                    pairs[4 * n + 3] = four.w;
                }
#pragma unroll
                for (int n = 0; n < 16; n++) {
                    const float2 weight = unpack2(pairs[n], T());                  /* as dV sees it */
                    pairs[n] = pack2(weight.x * (x[2 * n] - of_row(stats, n / 2, 0)), weight.y * (x[2 * n + 1] - of_row(stats, n / 2, 1)), T());
                }
                if (MASKED && partial) { hide(pairs, tile_mask(sm.rows + OWN_ROLE * 64, row0)); }
                const uint32_t ds_row = smem_address(sm.ds) + (thread / 32 * 16 + (thread & 15)) * 128;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    stmatrix_x4(ds_row + ((n * 32 + (thread >> 4 & 1) * 16) ^ ((thread & 7) << 4)), pairs[4 * n], pairs[4 * n + 1], pairs[4 * n + 2], pairs[4 * n + 3]);
                }
                fence_proxy_async();
            }
            barrier_sync(BOTH, CONSUMERS);
            query_products(dq, ds_columns, k_columns);
            if (OWN_ROLE == KEYS) {
#pragma unroll
                for (int n = 0; n < BLOCK_Q / 16; n++) { wgmma_rs_bt(sum, pairs + 4 * n, query_columns + n * 2048 / 16, 1); }
                wgmma_commit();
            }
            if (p.ordered) { mbarrier_wait(smem_address(&sm.turn_come[r.stage]), r.parity); }
            if (OWN_ROLE == KEYS) { wgmma_wait<1>(); } else { wgmma_wait<0>(); }
            if (OWN_ROLE == VALUES && thread == 0) { mbarrier_arrive(smem_address(&sm.dout_empty[r.stage])); }
            add_dq(p, sm, r, dq, 2 * OWN_ROLE, thread);
            query_products(dq, ds_columns, k_columns + sizeof(sm.k[0]) / 16);
            wgmma_wait<0>();
            add_dq(p, sm, r, dq, 2 * OWN_ROLE + 1, thread);
            __syncwarp();
            if (lane == 0) {
                if (p.ordered) { mbarrier_arrive(smem_address(&sm.dq_added[r.stage])); }
                mbarrier_arrive(smem_address(&sm.q_empty[r.stage]));           /* every warp has read the tile's place at dQ */
            }
            r.advance();
        }

        const int32_t j0 = t.n * BLOCK_K;
        if (MASKED && OWN_ROLE == VALUES && state & CARE_POISON) { add_poison(p, t, key, lane, sum); }
        if (MASKED && state & KEYS_POISONED) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const fgqa_range seen = rows_of_key(p, t, key + 8 * half);
                if (!is_poisoned(sm, key + 8 * half) || seen.begin >= seen.end) { continue; }
#pragma unroll
                for (int n = 0; n < D / 2; n += 4) { sum[n + 2 * half] = sum[n + 2 * half + 1] = NAN; }
            }
            barrier_sync(BOTH, CONSUMERS);                         /* the bits are no longer read */
        }
        const float factor = OWN_ROLE == VALUES ? 1.0f : p.common.scale;
        if (p.w.splits > 1) {
            write_part(p, t, OWN_ROLE == VALUES ? p.w.dv : p.w.dk, sum, factor, j0 + key, lane);
        } else {                                           /* through the memory of V and K, when nobody reads them any more */
            char *const own = OWN_ROLE == VALUES ? (char *)sm.v : (char *)sm.k;
            barrier_sync(BOTH, CONSUMERS);
            stage_rows(smem_address(own), sum, factor, thread);
            bar_sync(OWN + OWN_ROLE, 128);
            if (OWN_ROLE == VALUES) {
                write_rows(own, p, t, j0, FGQA_ARG_dv, p.common.problem.dv, p.vector_dv, thread);
            } else {
                write_rows(own, p, t, j0, FGQA_ARG_dk, p.common.problem.d, p.vector_dk, thread);
            }
            fence_proxy_async();
        }
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.kv_empty)); }
    }
}

template <bool MASKED> static __device__ void consume(const bwd_params &p, shared &sm, int consumer)
{
    if (consumer == VALUES) { consume_as<MASKED, VALUES>(p, sm); } else { consume_as<MASKED, KEYS>(p, sm); }
}
