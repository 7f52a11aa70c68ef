/* bwd_step128.cuh - part of bwd.cu: what a consumer does with a query tile of 64 rows, head dim 128. */
#pragma once

/* What a step leaves to the next one: S, made; of its tile the first row, whether some row does not see all keys, and the
 * bits; dQ of the step before, if it is not staged yet. */
struct left_over {
    float s[32], dq[32];
    int32_t row0;
    bool partial;
    lane_bits shown, kept;
};

/* S of the tile of a stage. */
static __device__ __forceinline__ void first_products(float (&s)[32], const shared &sm, const key_tile &keys, uint32_t stage)
{
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q[stage]), 0, 1024);
#pragma unroll
    for (int n = 0; n < 8; n++) {
        wgmma64<0>(s, keys.k_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, q_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
    }
    wgmma_commit();
}

static __device__ __forceinline__ void announce_ds(shared &sm, const ring2 &r, int lane)
{
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) { mbarrier_arrive(smem_address(&sm.ds_full[r.stage])); }
}

/* Step `count` of a task; goes_on: it is not the last. dQ is made a step late, of the dS of both consumers, so that neither waits
 * for the other. Of a task's first step nobody wants it, but with a branch around it ptxas would serialise every wgmma. S is made
 * a step early, so that the tensor cores have it to do while dQ is staged and the next step begins, also behind the last one, of
 * what memory holds: a last step without it would be code of its own, under a mask with more registers than there are, without
 * one 2 to 11% slower.
 *     lse2 to registers; dP issued
 *     P                                                        under dP
 *     dV issued; wait dP: dS, to shared memory                 under dV
 *     dK, then dQ of the step before issued
 *     wait dK:  its tiles are free; S of the next step issued, for which dS was in the way of registers
 *     wait dQ:  staged for the writer                          under S
 *     wait all: with accumulators or operands in flight over the back edge ptxas would serialise every wgmma
 * Under a mask staging dQ waits for the next step: up to 7% there, where without a mask it costs 1 to 2%.
 * Shared memory is read and written before wgmmas are issued or right after a wait: such instructions queue behind the wgmmas
 * of their warp. That is why what is to be known about the next tile comes with this one. Registers: dK 64, dV 64, S 32, dP
 * and later dQ 32, P and dS in 16 bits 16 + 16, lse2 and delta 16 each. */
template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void step(const bwd_params &p, shared &sm, const task &t, int consumer, int thread, const key_tile &keys, const ring2 &r, int32_t count, bool goes_on,
                                                                   uint32_t &state, left_over &left, float (&dk)[D / 2], float (&dv)[DV / 2])
{
    const int lane = thread & 31;
    const uint64_t v_rows = keys.v_rows, k_columns = keys.k_columns;
    const bool follows = count > 0, staged_late = MASKED && count > 1;
    float (&s)[32] = left.s, (&dq)[32] = left.dq, dp[32];
    uint32_t weights[16], sloped[16], gradients[16];           /* pairs of P^T, with a soft cap P^T (1 - t^2), and dS^T: A operands of dV and dK */
    const uint32_t q_tile = smem_address(sm.q[r.stage]), dout_tile = smem_address(sm.dout[r.stage]);

    float4 lse2[4];
    const float4 *of_lane = (const float4 *)sm.lse2[r.stage] + (lane & 3);
#pragma unroll
    for (int n = 0; n < 4; n++) { lse2[n] = of_lane[4 * n]; }
    if (MASKED) { store_dq<KIND>(sm, r, dq, staged_late, consumer); }                    /* of two steps before: the same buffer */
    if constexpr (HAS_BIAS<KIND>) {
        uint32_t bias[WIDE_BIAS<KIND> ? 32 : 16];
        take_bias<KIND>(bias, sm, r, 0, consumer, state);
        if constexpr (BIAS_IN_MIX<KIND>) {
            const float *bases = sm.about[r.stage].y & CARE_BASES ? bases_of(p, sm, r.stage) : NULL;
            biased_weights(weights, sloped, s, bias, lse2, p, alibi_of_lane<KIND>(sm, r.stage, consumer, thread), bases);
        } else {
            add_bias(s, bias, p.score_scale);
            if (sm.about[r.stage].y & CARE_BASES) { lower_scores(s, bases_of(p, sm, r.stage)); }
        }
    }
    int2 following = {0, 0};
    const bool hides = mask_hides<KIND>(left.shown);
    const alibi_lane alibi = alibi_of_lane<KIND>(sm, r.stage, consumer, thread);
    if (MASKED) { following = make_int2(sm.about[r.stage].z, sm.about[r.stage].w); }
    int32_t next_head = 0;
    if (HAS_BITS<KIND>) { next_head = sm.heads[r.stage].y; }
    mbarrier_wait(smem_address(&sm.dout_full[r.stage]), r.parity);
    const uint64_t dout_rows = wgmma_desc_sw128(dout_tile, 0, 1024);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        wgmma64<0>(dp, v_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, dout_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
    }
    wgmma_commit();

    const float4 *delta_of_lane = (const float4 *)sm.delta[r.stage] + (lane & 3);
    float4 delta[4];
    if (SLOPED<KIND>) {
        if (WITH_CAP<KIND>) { capped_weights<KIND>(weights, sloped, s, lse2, p, alibi); }
#pragma unroll
        for (int m = 0; m < 4; m++) { delta[m] = delta_of_lane[4 * m]; }
    }
#pragma unroll
    for (int n = 0; n < 8 && !SLOPED<KIND>; n++) {
        if (n == 4) {
#pragma unroll
            for (int m = 0; m < 4; m++) { delta[m] = delta_of_lane[4 * m]; }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) { s[4 * n + e] = ex2(exponent<KIND>(s[4 * n + e], of_row(lse2, n, e % 2), p.scale_log2, alibi, n, e)); }
        weights[2 * n] = pack2(s[4 * n], s[4 * n + 1], T());
        weights[2 * n + 1] = pack2(s[4 * n + 2], s[4 * n + 3], T());
    }
    if (MASKED) { announce_dq(sm, r, staged_late, lane); }
    if (MASKED && left.partial) { hide(weights, tile_mask(sm.rows + consumer * 64, left.row0)); }
    if (hides) { keep(weights, weights, left.shown); }
    uint32_t dropped[16];
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(weights, bias_tile<KIND>(sm, bias_slot<KIND>(0, r.stage, consumer), consumer)); }
    if (DROPS<KIND>) { keep(dropped, weights, left.kept); }
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 4; n++) { wgmma_rs_bt(dv, (DROPS<KIND> ? dropped : weights) + 4 * n, wgmma_desc_sw128(dout_tile, BLOCK_Q * 128, 1024) + n * 2048 / 16, 1); }
    wgmma_commit();

    wgmma_wait<1>();
    if (DROPS<KIND>) { dropout_gradients(gradients, SLOPED<KIND> ? sloped : weights, dp, delta, left.kept, p.inv_dropout_scale); }
#pragma unroll
    for (int n = 0; n < 8 && !DROPS<KIND>; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 weight = unpack2((SLOPED<KIND> ? sloped : weights)[2 * n + half], T());       /* as dV sees it */
            gradients[2 * n + half] = pack2(weight.x * (dp[4 * n + 2 * half] - of_row(delta, n, 0)), weight.y * (dp[4 * n + 2 * half + 1] - of_row(delta, n, 1)), T());
        }
    }
    if (MASKED && left.partial) { hide(gradients, tile_mask(sm.rows + consumer * 64, left.row0)); }
    if (hides) { keep(gradients, gradients, left.shown); }
    mask_bytes bytes = {};
    const bool other_mask = HAS_MASK<KIND> && !same_mask(p, left.row0, following.x);
    if (other_mask) { bytes = load_mask_bytes(p, t, next_head, following.x, consumer, thread); }
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(gradients, bias_tile<KIND>(sm, bias_slot<KIND>(0, r.stage, consumer), consumer)); }
    mbarrier_wait(smem_address(&sm.ds_empty[r.stage]), r.parity ^ 1);
    store_gradients(smem_address(sm.ds[r.stage]), gradients, consumer);
    if (!MASKED) { announce_ds(sm, r, lane); }
    if (HAS_BIAS<KIND>) { leave_bias<KIND>(p, sm, t, 0, r.stage, left.row0, consumer, state, gradients); }
    const drawing drawing = prepare_drawing<KIND>(p, sm, t, next_head, following.x, consumer, thread);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 4; n++) { wgmma_rs_bt(dk, gradients + 4 * n, wgmma_desc_sw128(q_tile, BLOCK_Q * 128, 1024) + n * 2048 / 16, 1); }
    wgmma_commit();
    const ring2 before = r.before();
    mbarrier_wait(smem_address(&sm.ds_full[before.stage]), before.parity);
    wgmma_fence();
    query_products(dq, smem_address(sm.ds[before.stage]), k_columns);
    if (MASKED) { announce_ds(sm, r, lane); }
    uint32_t drawn = 0;
    if (DROPS<KIND>) {
        wgmma_wait<2>();                                         /* dV needs its operands no longer */
        drawn = draw_blocks<KIND>(p, drawing);
    }

    ring2 next = r;
    next.advance();
    if (goes_on) { mbarrier_wait(smem_address(&sm.q_full[next.stage]), next.parity); }
    if (MASKED) {
        left.row0 = following.x;
        clean_step<KIND>(sm, next, following.y, state, consumer * 128 + thread);
        left.partial = (following.y | state) & (PARTIAL | KEYS_POISONED);
    }
    if (follows) { wait_for_dq_buffer<KIND>(sm, before); }
    wgmma_wait<1>();
    if (thread == 0) {
        mbarrier_arrive(smem_address(&sm.dout_empty[r.stage]));
        mbarrier_arrive(smem_address(&sm.q_empty[r.stage]));
        if constexpr (STORES_DBIAS<KIND>) { free_dbias(p, &sm.bias_empty[r.stage]); }
    }
    wgmma_fence();
    first_products(s, sm, keys, next.stage);
    wgmma_wait<1>();
    if (follows && lane == 0) { mbarrier_arrive(smem_address(&sm.ds_empty[before.stage])); }
    if (other_mask) { left.shown = bits_of_mask(bytes); }
    if (DROPS<KIND>) { left.kept = bits_of_blocks(drawn); }
    if (!MASKED) {
        store_dq<KIND>(sm, before, dq, follows, consumer);
        announce_dq(sm, before, follows, lane);
    }
    wgmma_wait<0>();
}

/* All steps of a task, but dQ of the last one. */
template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void take_steps(const bwd_params &p, shared &sm, const task &t, int consumer, int thread, const key_tile &keys, ring2 &r, int32_t steps, uint32_t &state,
                                                                         float (&dk)[D / 2], float (&dv)[DV / 2])
{
    const int lane = thread & 31;
    left_over left = {};
    if (steps > 0) {
        mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
        if (MASKED) {
            const int4 about = sm.about[r.stage];
            left.row0 = about.x;
            clean_step<KIND>(sm, r, about.y, state, consumer * 128 + thread);
            left.partial = (about.y | state) & (PARTIAL | KEYS_POISONED);
        }
        wgmma_fence();
        first_products(left.s, sm, keys, r.stage);
        if (DROPS<KIND>) { left.kept = bits_of_blocks(draw_blocks<KIND>(p, prepare_drawing<KIND>(p, sm, t, sm.heads[r.stage].x, left.row0, consumer, thread))); }
        if (HAS_MASK<KIND>) { left.shown = first_bits_of_mask<KIND>(p, sm, t, r.stage, left.row0, consumer, thread); }
        wgmma_wait<0>();
    }
    for (int32_t n = 0; n < steps; n++) {
        step<MASKED, KIND>(p, sm, t, consumer, thread, keys, r, n, n + 1 < steps, state, left, dk, dv);
        r.advance();
    }
    if (MASKED) {
        store_dq<KIND>(sm, r, left.dq, steps > 1, consumer);
        announce_dq(sm, r, steps > 1, lane);
    }
}
