/* bwd_wide.cuh - part of bwd.cu, head dim 256: dK and dV of 64 keys; dQ has a kernel of its own (bwd_queries.cuh). dK and dV
 * would fill the registers of both consumers, so one makes dV and the other dK. Weights go from one to the other through two
 * buffers in shared memory, so that the first may be a step ahead, and the products of one run under what the other waits for:
 *
 *     values                        keys
 *     S issued, wait: P             dP issued, wait; P taken: dS
 *     P to shared memory
 *     dV issued, wait               dK issued, wait
 * Registers: dV or dK 128, S or dP 32, P or dS in 16 bits 16, lse2 or delta 16.
 * What a mask tensor shows and dropout keeps is made under S and goes along with the weights, which are those before dropout.
 */
#pragma once

static __device__ __forceinline__ void init_more_barriers(shared &sm)
{
    for (int s = 0; s < 2; s++) {
        mbarrier_init(smem_address(&sm.weights_full[s]), 4);
        mbarrier_init(smem_address(&sm.weights_empty[s]), 4);
    }
}

enum role { VALUES, KEYS };
enum { POISONED_K = 1, POISONED_V = 2 };                         /* what of a key tile is inf or NaN; of V beside a bias */

/* All lanes of the warp have read or written. */
static __device__ __forceinline__ void warp_arrive(uint64_t *barrier, int lane)
{
    __syncwarp();
    if (lane == 0) { mbarrier_arrive(smem_address(barrier)); }
}

template <bool MASKED, score_kind KIND, role OWN_ROLE> static __device__ __forceinline__ void consume_as(const bwd_params &p, shared &sm)
{
    const int thread = (int)threadIdx.x & 127, lane = thread & 31, key = thread / 32 * 16 + lane / 4;                      /* and key + 8 */
    const uint64_t key_rows = wgmma_desc_sw128(OWN_ROLE == VALUES ? smem_address(sm.k) : smem_address(sm.v), 0, 1024);
    const bool capped = WITH_CAP<KIND> || (KIND == BIAS_AND_ALL && p.in_caps > 0.0f);
    const bool drops = DROPS<KIND> && p.common.problem.dropout_threshold != 0, some_mask = HAS_MASK<KIND> && p.common.problem.view[FGQA_ARG_mask].data;
    ring2 r;
    for (uint32_t state = 0;; state = ~state & 1) {            /* parity of the task, and what it met */
        mbarrier_wait(smem_address(&sm.task_full), state & 1);
        const task &t = sm.tasks[state & 1];
        if (t.done) { return; }
        int32_t steps = t.steps;
        warp_arrive(&sm.task_free, lane);
        begin_keys<MASKED, KIND == BIAS_AND_ALL ? KIND : PLAIN>(p, sm, t, state, OWN_ROLE * 128 + thread, key);
        if (MASKED && OWN_ROLE == VALUES && thread == 0) {
            p.w.poisoned[bwd_k_tile(p.common.problem, p.w, t.b, t.kv_head, t.k_row, t.n)] = (state & KEYS_POISONED ? POISONED_K : 0) | (state & VALUES_POISONED ? POISONED_V : 0);
        }
        float sum[D / 2];                                      /* dV or dK */
#pragma unroll
        for (int n = 0; n < D / 2; n++) { sum[n] = 0.0f; }

        for (; steps > 0; steps--) {
            float x[32];                                       /* S or dP */
            uint32_t pairs[16], sloped[16];                    /* of P^T or dS^T: A operand of dV or dK; of what dS is made of instead of P */
            const uint32_t rows = OWN_ROLE == VALUES ? smem_address(sm.q[r.stage]) : smem_address(sm.dout[r.stage]);
            const uint32_t columns = OWN_ROLE == VALUES ? smem_address(sm.dout[r.stage]) : smem_address(sm.q[r.stage]);
            int32_t row0 = 0;
            const bool partial = begin_step<MASKED, KIND>(sm, r, state, OWN_ROLE * 128 + thread, row0, [] {});
            const float4 *of_lane = (const float4 *)(OWN_ROLE == VALUES ? sm.lse2[r.stage] : sm.delta[r.stage]) + (lane & 3);
            const float4 stats[4] = {of_lane[0], of_lane[4], of_lane[8], of_lane[12]};
            const uint64_t query_rows = wgmma_desc_sw128(rows, 0, 1024), query_columns = wgmma_desc_sw128(columns, BLOCK_Q * 128, 1024);
            uint4 *const exchanged = (uint4 *)sm.weights[r.stage] + thread;
            const alibi_lane alibi = alibi_of_lane<KIND>(sm, r.stage, 0, thread);
            const bool shows = some_mask || (HAS_BIAS<KIND> && hides_by_bias(state));
            lane_bits shown = {0xFFFFFFFFu}, kept = shown;
            mask_bytes bytes = {};
            int32_t head = 0;
            if (HAS_BITS<KIND> && OWN_ROLE == VALUES) { head = sm.heads[r.stage].x; }
            if (some_mask && OWN_ROLE == VALUES) { bytes = load_mask_bytes(p, t, head, row0, 0, thread); }
            uint32_t bias[32];
            const float *bases = NULL;
            if constexpr (HAS_BIAS<KIND> && OWN_ROLE == VALUES) {
                load_bias_of_keys(bias, p.common.problem, t.b, head, row0, t.n * BLOCK_K + key);
                prefetch_bias_of_keys(p.common.problem, t, sm.heads[r.stage].y, sm.about[r.stage].z, thread);
                if (sm.about[r.stage].y & CARE_BASES) { bases = p.w.bases + (int64_t)sm.q_tile[r.stage] * BLOCK_Q; }
            }
            drawing drawing = {};
            if (drops && OWN_ROLE == VALUES) { drawing = prepare_drawing<KIND>(p, sm, t, head, row0, 0, thread); }
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                wgmma64<0>(x, key_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, query_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
            }
            wgmma_commit();
            if (OWN_ROLE == VALUES) {
                mbarrier_wait(smem_address(&sm.weights_empty[r.stage]), r.parity ^ 1);
                if (drops) { kept = bits_of_blocks(draw_blocks(drawing)); }
                if (some_mask) { shown = bits_of_mask(bytes); }
                if constexpr (HAS_BIAS<KIND>) {
                    if (hides_by_bias(state)) { hide_by_words(shown, bias, p.common.problem.view[FGQA_ARG_bias].dtype == FGQA_F32); }
                }
                if (HAS_BITS<KIND>) { sm.bits[r.stage][thread] = make_uint2(shown.bits, kept.bits); }
                wgmma_wait<0>();
                if (thread == 0) { mbarrier_arrive(smem_address(&sm.q_empty[r.stage])); }
                if constexpr (HAS_BIAS<KIND>) {
                    if (p.common.problem.view[FGQA_ARG_bias].dtype != FGQA_F32) { widen_words(bias); }
                    biased_weights(pairs, sloped, x, bias, stats, p, alibi, bases);
                } else if (WITH_CAP<KIND>) {
                    capped_weights<KIND>(pairs, sloped, x, stats, p, alibi);
                } else if (KIND == ALIBI_AND_BITS && !p.common.problem.view[FGQA_ARG_alibi_slopes].data) {
                    make_weights<PLAIN>(pairs, x, stats, p.scale_log2, alibi);
                } else {
                    make_weights<KIND>(pairs, x, stats, p.scale_log2, alibi);
                }
                if (MASKED && partial) { hide(pairs, tile_mask(sm.rows + OWN_ROLE * 64, row0)); }
                if (shows) { keep(pairs, pairs, shown); }
                const uint32_t (&sent)[16] = WITH_CAP<KIND> || HAS_BIAS<KIND> ? sloped : pairs;
#pragma unroll
                for (int n = 0; n < 4; n++) { exchanged[128 * n] = make_uint4(sent[4 * n], sent[4 * n + 1], sent[4 * n + 2], sent[4 * n + 3]); }
                warp_arrive(&sm.weights_full[r.stage], lane);
                if (drops) { keep(pairs, pairs, kept); }
            } else {
                mbarrier_wait(smem_address(&sm.weights_full[r.stage]), r.parity);
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
                if (HAS_BITS<KIND>) {
                    const uint2 both = sm.bits[r.stage][thread];
                    shown.bits = both.x;
                    kept.bits = both.y;
                }
                warp_arrive(&sm.weights_empty[r.stage], lane);
                if (drops) { dropout_gradients(pairs, pairs, x, stats, kept, p.inv_dropout_scale); }
#pragma unroll
                for (int n = 0; n < 16 && !drops; n++) {
                    const float2 weight = unpack2(pairs[n], T());                  /* as dV sees it */
                    pairs[n] = pack2(weight.x * (x[2 * n] - of_row(stats, n / 2, 0)), weight.y * (x[2 * n + 1] - of_row(stats, n / 2, 1)), T());
                }
                if (MASKED && partial) { hide(pairs, tile_mask(sm.rows + OWN_ROLE * 64, row0)); }
                if (shows) { keep(pairs, pairs, shown); }
            }
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < BLOCK_Q / 16; n++) { wgmma_rs_bt(sum, pairs + 4 * n, query_columns + n * 2048 / 16, 1); }
            wgmma_commit();
            wgmma_wait<0>();
            if (thread == 0) { mbarrier_arrive(smem_address(OWN_ROLE == VALUES ? &sm.dout_empty[r.stage] : &sm.q_empty[r.stage])); }
            r.advance();
        }

        warp_arrive(&sm.kv_empty, lane);
        const int32_t j0 = t.n * BLOCK_K;
        const int last = (int)thread_index() & 127, last_lane = last % 32, last_key = last / 32 * 16 + last_lane / 4;      /* anew: fewer registers in the loop */
        if (MASKED && OWN_ROLE == VALUES && state & CARE_POISON) { add_poison<KIND>(p, t, last_key, last_lane, sum); }
        if (!capped && MASKED && state & KEYS_POISONED) { overwrite_poisoned<KIND>(p, sm, t, last_key, sum); }
        if (capped && OWN_ROLE == KEYS) { note_poison(p, t, state & KEYS_POISONED, last_key / FGQA_BWD_KEYS_A_WORD, last_lane, sum); }
        const float factor = OWN_ROLE == KEYS ? p.common.scale : DROPS<KIND> ? p.common.dropout_scale : 1.0f;
        if (p.w.splits > 1) {
            write_part(p, t, OWN_ROLE == VALUES ? p.w.dv : p.w.dk, sum, factor, j0 + last_key, last_lane);
        } else {
            const fgqa_problem &problem = p.common.problem;
            write_keys(sum, factor, p, t, j0 + last_key, OWN_ROLE == VALUES ? FGQA_ARG_dv : FGQA_ARG_dk, OWN_ROLE == VALUES ? problem.dv : problem.d, OWN_ROLE == VALUES ? p.vector_dv : p.vector_dk, last_lane);
        }
    }
}

template <bool MASKED, score_kind KIND> static __device__ void consume(const bwd_params &p, shared &sm, int consumer)
{
    if (consumer == VALUES) { consume_as<MASKED, KIND, VALUES>(p, sm); } else { consume_as<MASKED, KIND, KEYS>(p, sm); }
}
