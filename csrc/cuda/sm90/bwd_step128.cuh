/* bwd_step128.cuh - part of bwd.cu: what a consumer does with a query tile of 64 rows, head dim 128. */
#pragma once

/* One step; follows: whether the one before was of the same task. dQ is made a step late, of the dS of both consumers, so that neither
 * waits for the other. Of a task's first step nobody wants it, but with a branch around it ptxas would serialise every wgmma.
 *     lse2 to registers; S and dP issued
 *     wait S:   P                                              under dP
 *     dV issued; wait dP: dS, to shared memory                 under dV
 *     dQ of the step before, then dK issued
 *     wait dQ:  staged for the writer                          under dK
 *     wait all: with register operands in flight over the back edge ptxas would serialise every wgmma
 * Shared memory is read and written before wgmmas are issued or right after a wait: such instructions queue behind the wgmmas of
 * their warp. Registers: dK 64, dV 64, S 32, dP and later dQ 32, P and dS in 16 bits 16 + 16, lse2 and delta 16 each. */
template <bool MASKED, bool CAPPED> static __device__ __forceinline__ void step(const bwd_params &p, shared &sm, int consumer, int thread, const key_tile &keys, const ring2 &r, bool follows, uint32_t &state,
                                                                   float (&dk)[D / 2], float (&dv)[DV / 2])
{
    const int lane = thread & 31;
    const uint64_t k_rows = keys.k_rows, v_rows = keys.v_rows, k_columns = keys.k_columns;
    float s[32], dp[32], dq[32];
    uint32_t weights[16], sloped[16], gradients[16];           /* pairs of P^T, with a soft cap P^T (1 - t^2), and dS^T: A operands of dV and dK */
    const uint32_t q_tile = smem_address(sm.q[r.stage]), dout_tile = smem_address(sm.dout[r.stage]);

    int32_t row0 = 0;
    float4 lse2[4];
    const float4 *of_lane = (const float4 *)sm.lse2[r.stage] + (lane & 3);
    const bool partial = begin_step<MASKED>(sm, r, state, consumer * 128 + thread, row0, [&] {
#pragma unroll
        for (int n = 0; n < 4; n++) { lse2[n] = of_lane[4 * n]; }
    });
    const uint64_t q_rows = wgmma_desc_sw128(q_tile, 0, 1024), dout_rows = wgmma_desc_sw128(dout_tile, 0, 1024);
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        wgmma64<0>(s, k_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, q_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
    }
    wgmma_commit();
#pragma unroll
    for (int n = 0; n < 8; n++) {
        wgmma64<0>(dp, v_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, dout_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0);
    }
    wgmma_commit();

    wgmma_wait<1>();
    const float4 *delta_of_lane = (const float4 *)sm.delta[r.stage] + (lane & 3);
    float4 delta[4];
    if (CAPPED) {
        capped_weights(weights, sloped, s, lse2, p);
#pragma unroll
        for (int m = 0; m < 4; m++) { delta[m] = delta_of_lane[4 * m]; }
    }
#pragma unroll
    for (int n = 0; n < 8 && !CAPPED; n++) {
        if (n == 4) {
#pragma unroll
            for (int m = 0; m < 4; m++) { delta[m] = delta_of_lane[4 * m]; }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) { s[4 * n + e] = ex2(fmaf(s[4 * n + e], p.scale_log2, -of_row(lse2, n, e % 2))); }
        weights[2 * n] = pack2(s[4 * n], s[4 * n + 1], T());
        weights[2 * n + 1] = pack2(s[4 * n + 2], s[4 * n + 3], T());
    }
    if (MASKED && partial) { hide(weights, tile_mask(sm.rows + consumer * 64, row0)); }
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < 4; n++) { wgmma_rs_bt(dv, weights + 4 * n, wgmma_desc_sw128(dout_tile, BLOCK_Q * 128, 1024) + n * 2048 / 16, 1); }
    wgmma_commit();

    wgmma_wait<1>();
#pragma unroll
    for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float2 weight = unpack2((CAPPED ? sloped : weights)[2 * n + half], T());       /* as dV sees it */
            gradients[2 * n + half] = pack2(weight.x * (dp[4 * n + 2 * half] - of_row(delta, n, 0)), weight.y * (dp[4 * n + 2 * half + 1] - of_row(delta, n, 1)), T());
        }
    }
    if (MASKED && partial) { hide(gradients, tile_mask(sm.rows + consumer * 64, row0)); }
    mbarrier_wait(smem_address(&sm.ds_empty[r.stage]), r.parity ^ 1);
    store_gradients(smem_address(sm.ds[r.stage]), gradients, consumer);
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) { mbarrier_arrive(smem_address(&sm.ds_full[r.stage])); }
    const ring2 before = r.before();
    mbarrier_wait(smem_address(&sm.ds_full[before.stage]), before.parity);
    wgmma_fence();
    query_products(dq, smem_address(sm.ds[before.stage]), k_columns);
#pragma unroll
    for (int n = 0; n < 4; n++) { wgmma_rs_bt(dk, gradients + 4 * n, wgmma_desc_sw128(q_tile, BLOCK_Q * 128, 1024) + n * 2048 / 16, 1); }
    wgmma_commit();

    if (follows) { mbarrier_wait(smem_address(&sm.dq_empty[before.stage]), before.parity ^ 1); }
    wgmma_wait<1>();
    if (follows && lane == 0) { mbarrier_arrive(smem_address(&sm.ds_empty[before.stage])); }
    stage_dq(sm, before, dq, follows, consumer, lane);
    wgmma_wait<0>();
    if (thread == 0) {
        mbarrier_arrive(smem_address(&sm.dout_empty[r.stage]));
        mbarrier_arrive(smem_address(&sm.q_empty[r.stage]));
    }
}
