/* bwd_consumer.cuh - part of bwd.cu: what a consumer warpgroup does to its 64 keys.
 *
 * Scores are transposed, keys x rows: register 4 n + e of a lane is key 16 warp + lane / 4 + 8 (e / 2), row 8 n + 2 (lane % 4) +
 * e % 2. dK and dV: the same keys x columns.
 */
#pragma once

/* ---- what is not finite ---- */

/* 0 where the pair is not finite. */
static __device__ __forceinline__ bool clean_piece(uint32_t address)
{
    uint32_t x[4], bad = 0;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address) : "memory");
#pragma unroll
    for (int n = 0; n < 4; n++) {
        const uint32_t kept = finite_or_zero(x[n], T());
        bad |= kept ^ x[n];
        x[n] = kept;
    }
    if (bad) { asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory"); }
    return bad != 0;
}

/* Weights and dS are 0 where a row does not see a key, but 0 * NaN is NaN: elements that are not finite become 0 before products
 * see them, by both consumers. Keys then count as unseen: rows that see one have a NaN LSE, and its own gradients are overwritten
 * in the end. Queries: the row's weights become NaN by its LSE; where dO is not finite delta is not. */
static __device__ __noinline__ void clean_keys(shared &sm, int thread)
{
    if (thread < BLOCK_K / 32) { sm.poisoned_keys[thread] = 0; }
    bar_sync(BOTH, CONSUMERS);
    for (int n = thread; n < (int)sizeof(sm.k) / 16; n += CONSUMERS) {
        const int key = n / 8 % BLOCK_K;
        if (clean_piece(smem_address(sm.k) + 16 * n)) { atomicOr(&sm.poisoned_keys[key / 32], 1u << key % 32); }
    }
    fence_proxy_async();
    bar_sync(BOTH, CONSUMERS);
}

static __device__ __forceinline__ void clean_rows(shared &sm, uint32_t stage, int thread)
{
#pragma unroll 1
    for (int n = thread; n < (int)sizeof(sm.q[0]) / 16; n += CONSUMERS) {
        clean_piece(smem_address(sm.dout[stage]) + 16 * n);
        if (clean_piece(smem_address(sm.q[stage]) + 16 * n)) { sm.lse2[stage][bwd_stats_slot(n / 8 % BLOCK_Q)] = NAN; }
    }
    fence_proxy_async();
    bar_sync(BOTH, CONSUMERS);
}

static __device__ __forceinline__ bool keys_poisoned(const shared &sm, int thread)
{
    uint32_t sum = 0;
#pragma unroll
    for (int n = thread; n < (int)sizeof(sm.k) / 16; n += CONSUMERS) {
        const uint4 x = ((const uint4 *)sm.k)[n];
        sum = poison_test(x.x, sum, T());
        sum = poison_test(x.y, sum, T());
        sum = poison_test(x.z, sum, T());
        sum = poison_test(x.w, sum, T());
    }
    return bar_any(BOTH, CONSUMERS, (sum & 0x7FFF7FFF) != 0);
}

static __device__ __forceinline__ bool is_poisoned(const shared &sm, int key) { return sm.poisoned_keys[key / 32] >> key % 32 & 1; }

/* Rows that see key `key` of the tile. */
static __device__ __forceinline__ fgqa_range rows_of_key(const bwd_params &p, const task &t, int key)
{
    const int32_t j = t.n * BLOCK_K + key;
    const fgqa_range none = {0, 0};
    return j < t.mask.sk ? bwd_key_rows(p.common.problem, p.w, t.b, t.k_row)[j] : none;
}

/* dV += what is not finite in dO, for the keys that its rows see: after a walk that met such tiles. */
static __device__ __forceinline__ void add_poison(const bwd_params &p, const task &t, int key, int lane, float (&dv)[DV / 2])
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_range seen[2] = {rows_of_key(p, t, key), rows_of_key(p, t, key + 8)};
    const fgqa_view &view = problem.view[FGQA_ARG_dout];
    walk at(t);
#pragma unroll 1
    for (int32_t step = 0; step < t.steps; step++, at.next(p.w.splits, problem.g)) {
        if (!(load_relaxed_s32(p.w.turn + t.q_tile + at.head * p.w.head_tiles + at.tile) & FGQA_BWD_DIRTY)) { continue; }
        const int32_t end = min(t.mask.sq, (at.tile + 1) * BLOCK_Q);
#pragma unroll 1
        for (int32_t i = at.tile * BLOCK_Q; i < end; i++) {
            const char *row = fgqa_row_address(view, sizeof(T), t.b, t.kv_head * problem.g + at.head, t.q_row + i);
#pragma unroll
            for (int n = 0; n < DV / 2; n += 4) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int column = 2 * n + 2 * (lane % 4) + e;
                    const float x = column < problem.dv ? to_float(((const T *)row)[column]) : 0.0f;
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        if (!isfinite(x) && seen[half].begin <= i && i < seen[half].end) { dv[n + 2 * half + e] += x; }
                    }
                }
            }
        }
    }
}

/* ---- interval masks ---- */

/* Bits x, x + 1, ... */
PTX_FN uint32_t bits_from(int x)
{
    uint32_t bits;
    asm("shl.b32 %0, %1, %2;" : "=r"(bits) : "r"(0xFFFFFFFFu), "r"(max(x, 0)));      /* shl shifts by 32 at most */
    return bits;
}

/* All bits of the lower half from the sign of byte `n` of `low`, of the upper one of byte `n` of `high`. */
template <int N> PTX_FN uint32_t spread_signs(uint32_t low, uint32_t high)
{
    uint32_t bits;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bits) : "r"(low), "r"(high), "n"((8 + N) * 0x11 + (12 + N) * 0x1100));
    return bits;
}

/* Which rows of a tile see a lane's two keys: bit 8 (n % 4) + e of word n / 4 for row 8 n + 2 (lane % 4) + e. */
struct tile_mask {
    uint32_t bits[2][2];                      /* key, word */

    /* rows: that see each key of the warpgroup */
    __device__ __forceinline__ tile_mask(const fgqa_range *rows, int32_t row0)
    {
        const int thread = (int)thread_index() & 127, own = row0 + thread % 4 * 2;
        rows += thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const fgqa_range seen = rows[8 * half];
#pragma unroll
            for (int word = 0; word < 2; word++) { bits[half][word] = bits_from(seen.begin - own - 32 * word) & ~bits_from(seen.end - own - 32 * word); }
        }
    }
    /* For the pair of rows of register pair n of a key. */
    template <int N> __device__ __forceinline__ uint32_t pair(int half) const { return spread_signs<N % 4>(bits[half][N / 4] << 7, bits[half][N / 4] << 6); }
};

/* Pairs of weights or dS of rows that do not see the key become 0, whatever they are. */
template <int N = 0> static __device__ __forceinline__ void hide(uint32_t (&pairs)[16], const tile_mask &mask)
{
    if constexpr (N < 8) {
        pairs[2 * N] &= mask.pair<N>(0);
        pairs[2 * N + 1] &= mask.pair<N>(1);
        hide<N + 1>(pairs, mask);
    }
}

/* ---- gradients of the keys ---- */

/* Accumulators as pairs of T into rows of two 64-column chunks. */
static __device__ __forceinline__ void stage_rows(uint32_t base, const float (&acc)[64], float factor, int thread)
{
    const int lane = thread % 32;
    const uint32_t row = base + (thread / 32) * 16 * 128 + (lane & 15) * 128;
#pragma unroll
    for (int n = 0; n < 8; n++) {             /* 16 columns */
        uint32_t r[4];
#pragma unroll
        for (int m = 0; m < 4; m++) { r[m] = pack2(acc[8 * n + 2 * m] * factor, acc[8 * n + 2 * m + 1] * factor, T()); }
        stmatrix_x4(row + n / 4 * (BLOCK_K * 128) + (((n & 3) * 32 + (lane >> 4) * 16) ^ ((lane & 7) << 4)), r[0], r[1], r[2], r[3]);
    }
}

static __device__ __forceinline__ void write_rows(const char *staged, const bwd_params &p, const task &t, int32_t j0, fgqa_arg arg, int32_t d, bool vector, int thread)
{
    const fgqa_view &view = p.common.problem.view[arg];
    char *const to = fgqa_row_address(view, sizeof(T), t.b, t.kv_head, t.k_row + j0);
#pragma unroll
    for (int n = thread; n < 64 * 16; n += 128) {
        const int row = n / 16, piece = n % 16;
        if (j0 + row >= t.key_rows || 8 * piece >= d) { continue; }
        const uint4 x = *(const uint4 *)(staged + piece / 8 * (BLOCK_K * 128) + row * 128 + ((piece % 8) ^ (row % 8)) * 16);
        char *const at = to + row * view.stride_s * (int64_t)sizeof(T) + 16 * piece;
        if (vector) { *(uint4 *)at = x; continue; }
        const uint32_t word[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < 8; e++) { ((uint16_t *)at)[e] = (uint16_t)(word[e / 2] >> 16 * (e % 2)); }
    }
}

/* One of several parts, in float32. */
static __device__ __forceinline__ void write_part(const bwd_params &p, const task &t, float *parts, const float (&acc)[64], float factor, int32_t key, int lane)
{
    const int64_t row = t.part * p.w.k_rows + bwd_k_row(p.common.problem, t.b, t.kv_head, t.k_row, key);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (key + 8 * half >= t.key_rows) { continue; }
        float *to = parts + (row + 8 * half) * D + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < 16; n++) { *(float2 *)(to + 8 * n) = make_float2(acc[4 * n + 2 * half] * factor, acc[4 * n + 2 * half + 1] * factor); }
    }
}

/* ---- the consumer ---- */

static __device__ __forceinline__ float2 unpack2(uint32_t x, bf16) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)); }
static __device__ __forceinline__ float2 unpack2(uint32_t x, f16) { return __half22float2(*(const __half2 *)&x); }

/* Element 2 (n % 2) + e of the four that a lane has of rows 16 (n / 2) .. in bwd_stats_slot() order. */
static __device__ __forceinline__ float of_row(const float4 (&x)[4], int n, int e)
{
    const float4 &four = x[n / 2];
    return n % 2 ? e ? four.w : four.z : e ? four.y : four.x;
}

/* One step:
 *     lse2 to registers; S and dP issued
 *     wait S:   P                                              under dP
 *     dV issued; wait dP: dS, to shared memory                 under dV
 *     both consumers meet; dQ, then dK issued
 *     wait dQ:  staged for the writer                          under dK
 *     wait all: with register operands in flight over the back edge ptxas would serialise every wgmma
 * Shared memory is read and written before wgmmas are issued or right after a wait: such instructions queue behind the wgmmas of
 * their warp. Registers: dK 64, dV 64, S 32, dP and later dQ 32, P and dS in 16 bits 16 + 16, lse2 and delta 16 each. */
template <bool MASKED> static __device__ void consume(const bwd_params &p, shared &sm, int consumer)
{
    const int thread = (int)threadIdx.x & 127, lane = thread & 31, key = consumer * 64 + thread / 32 * 16 + lane / 4;      /* and key + 8 */
    const float scale = p.common.scale;
    const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k) + consumer * 64 * 128, 0, 1024);                           /* own 64 keys */
    const uint64_t v_rows = k_rows + sizeof(sm.k) / 16;
    const uint64_t k_columns = wgmma_desc_sw128(smem_address(sm.k[consumer]), BLOCK_K * 128, 1024);                        /* own 64 columns */
    ring2 r;
    for (uint32_t state = 0;; state = ~state & 1) {            /* parity of the task, and what it met */
        mbarrier_wait(smem_address(&sm.task_full), state & 1);
        const task &t = sm.tasks[state & 1];
        if (t.done) { return; }
        int32_t steps = t.steps;
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.task_free)); }
        mbarrier_wait(smem_address(&sm.k_full), state & 1);
        mbarrier_wait(smem_address(&sm.v_full), state & 1);
        if (MASKED) {
            if (keys_poisoned(sm, consumer * 128 + thread)) {
                clean_keys(sm, consumer * 128 + thread);
                state |= KEYS_POISONED;
            }
            if (lane % 4 < 2) {                                /* for this warp alone */
                const int mine = key + lane % 4 * 8;
                const fgqa_range none = {0, 0};
                sm.rows[mine] = state & KEYS_POISONED && is_poisoned(sm, mine) ? none : rows_of_key(p, t, mine);
            }
            __syncwarp();
        }
        float dk[64], dv[64];
#pragma unroll
        for (int n = 0; n < 64; n++) { dk[n] = dv[n] = 0.0f; }

        for (; steps > 0; steps--) {
            float s[32], dp[32], dq[32];
            uint32_t weights[16], gradients[16];           /* pairs of P^T and dS^T: A operands of dV and dK */
            const uint32_t q_tile = smem_address(sm.q[r.stage]), dout_tile = smem_address(sm.dout[r.stage]);

            mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
            mbarrier_wait(smem_address(&sm.dout_full[r.stage]), r.parity);
            int32_t row0 = 0;
            bool partial = false;
            if (MASKED) {
                const int2 about = sm.about[r.stage];
                row0 = about.x;
                partial = (about.y | state) & (PARTIAL | KEYS_POISONED);
                if (about.y & (CARE_PADDING | CARE_POISON)) {
                    state |= about.y & CARE_POISON;
                    clean_rows(sm, r.stage, consumer * 128 + thread);
                }
            }
            const float4 *of_lane = (const float4 *)sm.lse2[r.stage] + (lane & 3);
            const float4 lse2[4] = {of_lane[0], of_lane[4], of_lane[8], of_lane[12]};
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
#pragma unroll
            for (int n = 0; n < 8; n++) {
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
                    const float2 weight = unpack2(weights[2 * n + half], T());       /* as dV sees it */
                    gradients[2 * n + half] = pack2(weight.x * (dp[4 * n + 2 * half] - of_row(delta, n, 0)), weight.y * (dp[4 * n + 2 * half + 1] - of_row(delta, n, 1)), T());
                }
            }
            if (MASKED && partial) { hide(gradients, tile_mask(sm.rows + consumer * 64, row0)); }
            const int here = (int)thread_index() & 127;    /* anew: one register less in the loop */
            const uint32_t ds = smem_address(sm.ds[r.stage]), ds_row = ds + (consumer * 64 + here / 32 * 16 + (here & 15)) * 128;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                stmatrix_x4(ds_row + ((n * 32 + (here >> 4 & 1) * 16) ^ ((here & 7) << 4)), gradients[4 * n], gradients[4 * n + 1], gradients[4 * n + 2], gradients[4 * n + 3]);
            }
            fence_proxy_async();
            bar_sync(BOTH, CONSUMERS);
            const uint64_t ds_columns = wgmma_desc_sw128(ds, 0, 1024);
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < 8; n++) { wgmma64<1>(dq, ds_columns + n * 2048 / 16, k_columns + n * 2048 / 16, n == 0); }
            wgmma_commit();
#pragma unroll
            for (int n = 0; n < 4; n++) { wgmma_rs_bt(dk, gradients + 4 * n, wgmma_desc_sw128(q_tile, BLOCK_Q * 128, 1024) + n * 2048 / 16, 1); }
            wgmma_commit();

            mbarrier_wait(smem_address(&sm.dq_empty[r.stage]), r.parity ^ 1);
            wgmma_wait<1>();
            if (thread == 0) { mbarrier_arrive(smem_address(&sm.dout_empty[r.stage])); }
#pragma unroll
            for (int n = 0; n < 32; n++) { dq[n] *= scale; }
            float4 *const staged = (float4 *)sm.dq[r.stage] + consumer * 1024 + ((int)thread_index() & 127);
#pragma unroll
            for (int n = 0; n < 8; n++) { staged[128 * n] = make_float4(dq[4 * n], dq[4 * n + 1], dq[4 * n + 2], dq[4 * n + 3]); }
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.dq_full[r.stage])); }
            wgmma_wait<0>();
            if (thread == 0) { mbarrier_arrive(smem_address(&sm.q_empty[r.stage])); }
            r.advance();
        }

        const int32_t j0 = t.n * BLOCK_K;
        const int last = (int)thread_index() & 127, last_lane = last % 32, last_key = consumer * 64 + last / 32 * 16 + last_lane / 4;
        if (MASKED && state & CARE_POISON) { add_poison(p, t, last_key, last_lane, dv); }
        if (MASKED && state & KEYS_POISONED) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const fgqa_range seen = rows_of_key(p, t, last_key + 8 * half);
                if (!is_poisoned(sm, last_key + 8 * half) || seen.begin >= seen.end) { continue; }
#pragma unroll
                for (int n = 0; n < 64; n += 4) { dk[n + 2 * half] = dk[n + 2 * half + 1] = dv[n + 2 * half] = dv[n + 2 * half + 1] = NAN; }
            }
            bar_sync(BOTH, CONSUMERS);                         /* the bits are no longer read */
        }
        if (p.w.splits > 1) {
            write_part(p, t, p.w.dk, dk, scale, j0 + last_key, last_lane);
            write_part(p, t, p.w.dv, dv, 1.0f, j0 + last_key, last_lane);
        } else {                                           /* through the memory of V and K: own keys */
            char *const v_own = (char *)sm.v + consumer * 64 * 128, *const k_own = (char *)sm.k + consumer * 64 * 128;
            stage_rows(smem_address(v_own), dv, 1.0f, last);
            bar_sync(BOTH, CONSUMERS);                     /* the other consumer is done with K, too */
            stage_rows(smem_address(k_own), dk, scale, last);
            bar_sync(OWN + consumer, 128);
            write_rows(v_own, p, t, j0 + consumer * 64, FGQA_ARG_dv, p.common.problem.dv, p.vector_dv, last);
            write_rows(k_own, p, t, j0 + consumer * 64, FGQA_ARG_dk, p.common.problem.d, p.vector_dk, last);
            fence_proxy_async();
        }
        __syncwarp();
        if (last_lane == 0) { mbarrier_arrive(smem_address(&sm.kv_empty)); }
    }
}
