/* bwd_step64.cuh - part of bwd.cu: what a consumer does with a query tile of 128 rows, head dim 64.
 *
 * The tile is worked on in halves A and B of 64 rows, so that the tensor cores have products of one half to make while weights of
 * the other are computed. Each consumer makes dQ of one half from the dS of both, a step late and behind the weights of half A:
 * until then it does not wait for the other one, so that the two drift apart until each computes while the other multiplies.
 *     S(A), dP(A) issued
 *     wait S(A):  P(A)                                                  under dP(A)
 *     dV(A), dQ of the step before, S(B) issued; wait dP(A): dS(A)      under these
 *     wait dQ: staged for the writer                                    under S(B)
 *     dS(A) to shared memory; dK(A), dP(B) issued
 *     wait S(B):  P(B)                                                  under dK(A), dP(B)
 *     dV(B) issued; wait dP(B): dS(B), to shared memory                 under dV(B)
 *     dK(B) issued
 * The first step of a task makes a dQ that nobody wants: with a branch around it ptxas would serialise every wgmma.
 * Registers: dK 32, dV 32, S 32 + 32, dP 32 + 32, lse2 and delta of a half 16 each; P and dS, 16 a half, where S and dP were.
 */
#pragma once

/* S or dP of a half: own 64 keys x 64 rows. */
static __device__ __forceinline__ void score_products(float (&x)[32], uint64_t keys, uint64_t rows)
{
#pragma unroll
    for (int n = 0; n < D / 16; n++) { wgmma64<0>(x, keys + n * 32 / 16, rows + n * 32 / 16, n == 0); }
    wgmma_commit();
}

/* dV += P dO or dK += dS Q over the rows of a half. */
static __device__ __forceinline__ void key_products(float (&sum)[32], const uint32_t (&pairs)[16], uint64_t columns)
{
#pragma unroll
    for (int n = 0; n < HALF / 16; n++) { wgmma_rs_bt(sum, pairs + 4 * n, columns + n * 2048 / 16, 1); }
    wgmma_commit();
}

/* What a step makes for the next one. */
struct bits_ahead { lane_bits shown[2], kept[2]; };

/* Beside a bias, dropout's bits are made at the end of the step before, where registers are free; alone, under products. */
template <score_kind KIND> static constexpr bool DRAWS_AHEAD = DROPS<KIND> && HAS_BIAS<KIND>;

/* Bits, the bias or the slopes beside a soft cap take the registers of the second half's lse2 until dS of the first is made. */
template <score_kind KIND> static constexpr bool LATE_LSE = HAS_BITS<KIND> || HAS_BIAS<KIND> || KIND == CAPPED_ALIBI;

/* With a soft cap alone dQ is made under the weights of half A, and products of A follow those of B: the other order was up to
 * 9% slower. */
template <score_kind KIND> static constexpr bool EARLY_DQ = KIND == CAPPED;

/* follows: whether the step before was of the same task. */
template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void step(const bwd_params &p, shared &sm, const task &t, int consumer, int thread, const key_tile &keys, const ring2 &r, bool follows, uint32_t &state, bits_ahead &ahead,
                                                                   float (&dk)[D / 2], float (&dv)[DV / 2])
{
    const int lane = thread & 31;
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q[r.stage]), 0, 1024), dout_rows = wgmma_desc_sw128(smem_address(sm.dout[r.stage]), 0, 1024);
    constexpr uint64_t NEXT = HALF * 128 / 16;                  /* from half A to half B of a tile; by columns, too: D is one chunk */
    float s_a[32], s_b[32], dp_a[32], dp_b[32], dq[32];
    uint32_t weights_a[16], weights_b[16], sloped_a[16], sloped_b[16], gradients_a[16], gradients_b[16], dropped_a[16], dropped_b[16];
    lane_bits kept_a = {}, kept_b = {};
    constexpr bool LATE_MASK = HAS_BIAS<KIND> && DROPS<KIND>;   /* its bytes take registers that are not left before */
    float4 lse2[4], delta[4];

    int32_t row0 = 0;
    const lane_bits shown_a = ahead.shown[0], shown_b = ahead.shown[1];
    const bool hides_a = mask_hides<KIND>(shown_a), hides_b = mask_hides<KIND>(shown_b);
    const bool partial = begin_step<MASKED, KIND>(sm, r, state, consumer * 128 + thread, row0, [&] { load_stats(lse2, sm.lse2[r.stage], 0, lane); });
    const ring2 before = r.before();
    int32_t next_row0 = 0, next_head = 0, own_head = 0;
    if (DROPS<KIND>) { own_head = sm.heads[r.stage].x; }
    if (HAS_MASK<KIND> || DRAWS_AHEAD<KIND>) {
        next_row0 = sm.about[r.stage].z;
        next_head = sm.heads[r.stage].y;
    }
    alibi_lane alibi = alibi_of_lane<KIND>(sm, r.stage, consumer, thread);
    if (!HAS_BIAS<KIND>) { load_stats(delta, sm.delta[r.stage], 0, lane); }
    uint32_t bias[WIDE_BIAS<KIND> ? 32 : 16];
    bool lowers = false;
    if constexpr (HAS_BIAS<KIND>) {
        lowers = sm.about[r.stage].y & CARE_BASES;
        take_bias<KIND>(bias, sm, r, 0, consumer, state);
    }
    drawing drawing = {};
    if (!DRAWS_AHEAD<KIND>) { drawing = prepare_drawing<KIND>(p, sm, t, own_head, row0, consumer, thread); }
    if (EARLY_DQ<KIND>) { mbarrier_wait(smem_address(&sm.ds_full[0]), before.stage); }
    wgmma_fence();
    score_products(s_a, keys.k_rows, q_rows);
    score_products(dp_a, keys.v_rows, dout_rows);
    if (EARLY_DQ<KIND>) { query_products(dq, smem_address(sm.ds[0][consumer]), keys.k_columns); }
    uint32_t drawn = 0;
    if (DROPS<KIND> && !DRAWS_AHEAD<KIND>) { drawn = draw_blocks<KIND>(p, drawing); }

    wgmma_wait<EARLY_DQ<KIND> ? 2 : 1>();
    if (DROPS<KIND>) { kept_a = DRAWS_AHEAD<KIND> ? ahead.kept[0] : bits_of_blocks(drawn); }
    if constexpr (HAS_BIAS<KIND> && !BIAS_IN_MIX<KIND>) {
        add_bias(s_a, bias, p.score_scale);
        if (lowers) { lower_scores(s_a, bases_of(p, sm, r.stage)); }
    }
    if constexpr (BIAS_IN_MIX<KIND>) {
        biased_weights(weights_a, sloped_a, s_a, bias, lse2, p, alibi, lowers ? bases_of(p, sm, r.stage) : NULL);
    } else if (WITH_CAP<KIND>) {
        capped_weights<KIND>(weights_a, sloped_a, s_a, lse2, p, alibi);
    } else {
        make_weights<KIND>(weights_a, s_a, lse2, p.scale_log2, alibi);
    }
    if (!LATE_LSE<KIND>) { load_stats(lse2, sm.lse2[r.stage], 1, lane); }
    if (HAS_BIAS<KIND>) { load_stats(delta, sm.delta[r.stage], 0, lane); }        /* as below */
    alibi.first += (float)HALF;
    if (MASKED && partial) { hide(weights_a, tile_mask(sm.rows + consumer * 64, row0)); }
    if (hides_a) { keep(weights_a, weights_a, shown_a); }
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(weights_a, bias_tile<KIND>(sm, bias_slot<KIND>(0, r.stage, consumer), consumer)); }
    if (DROPS<KIND>) { keep(dropped_a, weights_a, kept_a); }
    if (!EARLY_DQ<KIND>) { mbarrier_wait(smem_address(&sm.ds_full[0]), before.stage); }
    wgmma_fence();
    if (EARLY_DQ<KIND>) { score_products(s_b, keys.k_rows, q_rows + NEXT); }
    key_products(dv, DROPS<KIND> ? dropped_a : weights_a, dout_rows);
    if (!EARLY_DQ<KIND>) {
        query_products(dq, smem_address(sm.ds[0][consumer]), keys.k_columns);
        score_products(s_b, keys.k_rows, q_rows + NEXT);
    }

    wgmma_wait<3>();
    if (DROPS<KIND>) {
        dropout_gradients(gradients_a, SLOPED<KIND> ? sloped_a : weights_a, dp_a, delta, kept_a, p.inv_dropout_scale);
    } else {
        make_gradients(gradients_a, SLOPED<KIND> ? sloped_a : weights_a, dp_a, delta);
    }
    if (!WIDE_BIAS<KIND>) { load_stats(delta, sm.delta[r.stage], 1, lane); }
    if (LATE_LSE<KIND>) { load_stats(lse2, sm.lse2[r.stage], 1, lane); }
    if (MASKED && partial) { hide(gradients_a, tile_mask(sm.rows + consumer * 64, row0)); }
    if (hides_a) { keep(gradients_a, gradients_a, shown_a); }
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(gradients_a, bias_tile<KIND>(sm, bias_slot<KIND>(0, r.stage, consumer), consumer)); }
    if (follows) { wait_for_dq_buffer<KIND>(sm, before); }
    wgmma_wait<EARLY_DQ<KIND> ? 2 : 1>();
    if (follows && lane == 0) { mbarrier_arrive(smem_address(&sm.ds_empty[0])); }
    store_dq<KIND>(sm, before, dq, follows, consumer);
    announce_dq(sm, before, follows, lane);
    mbarrier_wait(smem_address(&sm.ds_empty[0]), before.stage);
    store_gradients(smem_address(sm.ds[0][0]), gradients_a, consumer);
    mask_bytes bytes_a = {}, bytes_b = {};
    const bool other_mask = HAS_MASK<KIND> && !same_mask(p, row0, next_row0);
    if (other_mask && !LATE_MASK) {
        bytes_a = load_mask_bytes(p, t, next_head, next_row0, consumer, thread);
        bytes_b = load_mask_bytes(p, t, next_head, next_row0 + HALF, consumer, thread);
    }
    if (HAS_BIAS<KIND>) { leave_bias<KIND>(p, sm, t, 0, r.stage, row0, consumer, state, gradients_a); }
    if constexpr (HAS_BIAS<KIND>) {
        take_bias<KIND>(bias, sm, r, 1, consumer, state);
    }
    if (!DRAWS_AHEAD<KIND>) { drawing = prepare_drawing<KIND>(p, sm, t, own_head, row0 + HALF, consumer, thread); }
    wgmma_fence();
    if (EARLY_DQ<KIND>) { score_products(dp_b, keys.v_rows, dout_rows + NEXT); }
    key_products(dk, gradients_a, q_rows);
    if (!EARLY_DQ<KIND>) { score_products(dp_b, keys.v_rows, dout_rows + NEXT); }
    if (DROPS<KIND> && !DRAWS_AHEAD<KIND>) { drawn = draw_blocks<KIND>(p, drawing); }

    wgmma_wait<EARLY_DQ<KIND> ? 3 : 2>();
    if constexpr (HAS_BIAS<KIND>) {
        if (STORES_DBIAS<KIND> && thread == 0) { free_dbias(p, &sm.bias_empty[0]); }
        if (!BIAS_IN_MIX<KIND>) {
            add_bias(s_b, bias, p.score_scale);
            if (lowers) { lower_scores(s_b, bases_of(p, sm, r.stage) + HALF); }
        }
    }
    if (DROPS<KIND>) { kept_b = DRAWS_AHEAD<KIND> ? ahead.kept[1] : bits_of_blocks(drawn); }
    if constexpr (BIAS_IN_MIX<KIND>) {
        biased_weights(weights_b, sloped_b, s_b, bias, lse2, p, alibi, lowers ? bases_of(p, sm, r.stage) + HALF : NULL);
    } else if (WITH_CAP<KIND>) {
        capped_weights<KIND>(weights_b, sloped_b, s_b, lse2, p, alibi);
    } else {
        make_weights<KIND>(weights_b, s_b, lse2, p.scale_log2, alibi);
    }
    if (WIDE_BIAS<KIND>) { load_stats(delta, sm.delta[r.stage], 1, lane); }       /* whose registers the bias takes before */
    if (MASKED && partial) { hide(weights_b, tile_mask(sm.rows + consumer * 64, row0 + HALF)); }
    if (hides_b) { keep(weights_b, weights_b, shown_b); }
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(weights_b, bias_tile<KIND>(sm, bias_slot<KIND>(1, r.stage, consumer), consumer)); }
    if (DROPS<KIND>) { keep(dropped_b, weights_b, kept_b); }
    wgmma_fence();
    key_products(dv, DROPS<KIND> ? dropped_b : weights_b, dout_rows + NEXT);

    wgmma_wait<EARLY_DQ<KIND> ? 2 : 1>();
    if (DROPS<KIND>) {
        dropout_gradients(gradients_b, SLOPED<KIND> ? sloped_b : weights_b, dp_b, delta, kept_b, p.inv_dropout_scale);
    } else {
        make_gradients(gradients_b, SLOPED<KIND> ? sloped_b : weights_b, dp_b, delta);
    }
    if (MASKED && partial) { hide(gradients_b, tile_mask(sm.rows + consumer * 64, row0 + HALF)); }
    if (hides_b) { keep(gradients_b, gradients_b, shown_b); }
    if (HAS_BIAS<KIND> && hides_by_bias(state)) { hide_by_bias<KIND>(gradients_b, bias_tile<KIND>(sm, bias_slot<KIND>(1, r.stage, consumer), consumer)); }
    store_gradients(smem_address(sm.ds[0][1]), gradients_b, consumer);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) { mbarrier_arrive(smem_address(&sm.ds_full[0])); }
    if (HAS_BIAS<KIND>) { leave_bias<KIND>(p, sm, t, 1, r.stage, row0 + HALF, consumer, state, gradients_b); }
    if (DRAWS_AHEAD<KIND>) { drawing = prepare_drawing<KIND>(p, sm, t, next_head, next_row0, consumer, thread); }
    wgmma_fence();
    key_products(dk, gradients_b, q_rows + NEXT);
    if (DRAWS_AHEAD<KIND>) {
        const uint32_t first = draw_blocks<KIND>(p, drawing);
        drawing.row += HALF;
        const uint32_t second = draw_blocks<KIND>(p, drawing);
        ahead.kept[0] = bits_of_blocks(first);
        ahead.kept[1] = bits_of_blocks(second);
    }
    if (other_mask) {
        if (LATE_MASK) {
            bytes_a = load_mask_bytes(p, t, next_head, next_row0, consumer, thread);
            bytes_b = load_mask_bytes(p, t, next_head, next_row0 + HALF, consumer, thread);
        }
        ahead.shown[0] = bits_of_mask(bytes_a);
        ahead.shown[1] = bits_of_mask(bytes_b);
    }

    wgmma_wait<0>();
    if (thread == 0) {
        mbarrier_arrive(smem_address(&sm.dout_empty[r.stage]));
        mbarrier_arrive(smem_address(&sm.q_empty[r.stage]));
        if constexpr (STORES_DBIAS<KIND>) { free_dbias(p, &sm.bias_empty[1]); }
    }
}

/* All steps of a task, but dQ of the last one. */
template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void take_steps(const bwd_params &p, shared &sm, const task &t, int consumer, int thread, const key_tile &keys, ring2 &r, int32_t steps, uint32_t &state,
                                                                         float (&dk)[D / 2], float (&dv)[DV / 2])
{
    bits_ahead ahead = {};
    if (HAS_MASK<KIND> && steps > 0) {
        mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
        for (int half = 0; half < 2; half++) { ahead.shown[half] = first_bits_of_mask<KIND>(p, sm, t, r.stage, sm.about[r.stage].x + half * HALF, consumer, thread); }
    }
    if (DRAWS_AHEAD<KIND> && steps > 0) {
        mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
        for (int half = 0; half < 2; half++) {
            ahead.kept[half] = bits_of_blocks(draw_blocks<KIND>(p, prepare_drawing<KIND>(p, sm, t, sm.heads[r.stage].x, sm.about[r.stage].x + half * HALF, consumer, thread)));
        }
    }
    for (int32_t n = 0; n < steps; n++) {
        step<MASKED, KIND>(p, sm, t, consumer, thread, keys, r, n > 0, state, ahead, dk, dv);
        r.advance();
    }
}
