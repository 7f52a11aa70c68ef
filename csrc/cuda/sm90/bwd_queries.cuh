/* bwd_queries.cuh - part of bwd.cu, head dim 256: dQ, by a second kernel that makes S and dP again. With dQ added up in memory a
 * step of 64 rows and 64 keys would read 64 KB and add as much, more than the L2 cache gives; this one reads 64 KB for 128 rows,
 * keeps dQ in registers, and needs neither float32 sums in memory nor turns. 7 products where there were 5.
 *
 * A block is 128 rows of a head, 64 a consumer; its key tiles go through a ring of two K and a single V.
 *     S = Q K^T, dP = dO V^T issued
 *     wait S: P                                under dP
 *     wait dP: dS = P (dP - delta)
 *     dQ += dS K issued, wait                  all under the products of the other consumer
 * Registers: dQ 128, S 32, dP 32, dS in 16 bits 16. Rows are those of S, a lane has two (warpgroup.cuh).
 *
 * mbarrier              arrivals                                    waited for by
 * q_full[c], dout_full  producer + bytes (1)                        consumer c
 * k_full[s], v_full     producer + bytes (1)                        consumers
 * k_empty[s], v_empty   one thread of each consumer (2)             producer
 */
#pragma once

static constexpr int TILE_ROWS = 2 * BLOCK_Q, QUERIES_PRODUCER_REGS = 24, QUERIES_REGS = 240;

struct queries_shared {
    T q[2][CHUNKS][BLOCK_Q * CHUNK], dout[2][CHUNKS][BLOCK_Q * CHUNK];
    T k[2][CHUNKS][BLOCK_K * CHUNK], v[CHUNKS][BLOCK_K * CHUNK];
    uint64_t q_full[2], dout_full[2], k_full[2], k_empty[2], v_full, v_empty;
    dropout_key dropout;
    uint32_t poisoned[2], poisoned_keys[2];            /* of a stage: whether some key is inf or NaN; while a tile is cleaned: which */
};
static_assert(sizeof(queries_shared) <= SM_BYTES, "the tiles do not fit into shared memory");

/* A block's rows, and the key tiles that they see. */
struct query_tile {
    int32_t b, h, i0, begin, end;
    fgqa_sequence sequence;
};

/* Blocks in bands of heads: inside a band, row tile by row tile from the last one, which under a causal mask takes longest, so
 * that blocks at work together share K and V. */
static __device__ __forceinline__ bool find_tile(const bwd_params &p, uint32_t tiles, uint32_t band, query_tile *t)
{
    const fgqa_problem &problem = p.common.problem;
    const uint32_t heads = (uint32_t)problem.hq * (problem.varlen ? 1u : (uint32_t)problem.b), in_band = band * tiles;
    const uint32_t first = blockIdx.x / in_band * band, rest = blockIdx.x % in_band, width = min(band, heads - first), head = first + rest % width;
    int32_t tile = (int32_t)(tiles - 1 - rest / width), rows;
    t->b = (int32_t)(head / (uint32_t)problem.hq);
    t->h = (int32_t)(head % (uint32_t)problem.hq);
    if (problem.varlen) { t->b = bwd_packed_sequence(problem, TILE_ROWS, tile); }
    t->sequence = fgqa_device_sequence(problem, t->b, &rows);
    if (problem.varlen) { tile -= (int32_t)(t->sequence.q_row / TILE_ROWS) + t->b; }
    const fgqa_mask &mask = t->sequence.mask;
    if (tile < 0 || (int64_t)tile * TILE_ROWS >= mask.sq) { return false; }
    t->i0 = tile * TILE_ROWS;
    const fgqa_range keys = fgqa_kv_range(&mask, t->i0, min(mask.sq, t->i0 + TILE_ROWS));
    t->begin = keys.begin / BLOCK_K;
    t->end = keys.begin < keys.end ? (keys.end + BLOCK_K - 1) / BLOCK_K : t->begin;
    return true;
}

static __device__ __forceinline__ void load_chunks(const CUtensorMap *map, T (&to)[CHUNKS][64 * CHUNK], uint64_t *full, uint64_t policy, int head, int row, int batch)
{
    const uint32_t bar = smem_address(full);
    mbarrier_arrive_expect_tx(bar, sizeof(to));
    for (int c = 0; c < CHUNKS; c++) { tma_load_4d(smem_address(to[c]), map, bar, policy, c * CHUNK, head, row, batch); }
}

template <bool MASKED> static __device__ void produce_keys(const bwd_params &p, queries_shared &sm, const query_tile &t)
{
    const fgqa_problem &problem = p.common.problem;
    const uint64_t keep = createpolicy_evict_last(), once = createpolicy_evict_first();
    const int batch = problem.varlen ? 0 : t.b, kv_head = fgqa_kv_head(t.h, problem.g), row = (int)t.sequence.q_row + t.i0;
    ring2 r;
    for (int32_t n = t.begin; n < t.end; n++, r.advance()) {
        const int key = (int)t.sequence.k_row + n * BLOCK_K;
        if (n == t.begin) {
            for (int c = 0; c < 2; c++) { load_chunks(&p.q_map, sm.q[c], &sm.q_full[c], once, t.h, row + c * BLOCK_Q, batch); }
        }
        mbarrier_wait(smem_address(&sm.k_empty[r.stage]), r.parity ^ 1);
        if (MASKED) { sm.poisoned[r.stage] = (uint32_t)p.w.poisoned[bwd_k_tile(problem, p.w, t.b, kv_head, t.sequence.k_row, n)]; }
        load_chunks(&p.k_map, sm.k[r.stage], &sm.k_full[r.stage], keep, kv_head, key, batch);
        if (n == t.begin) {
            for (int c = 0; c < 2; c++) { load_chunks(&p.dout_map, sm.dout[c], &sm.dout_full[c], once, t.h, row + c * BLOCK_Q, batch); }
        }
        mbarrier_wait(smem_address(&sm.v_empty), ~(uint32_t)(n - t.begin) & 1);
        load_chunks(&p.v_map, sm.v, &sm.v_full, keep, kv_head, key, batch);
    }
}

/* By both consumers: elements of K that are not finite become 0, since dS of rows that do not see them is 0; they count as
 * unseen. */
static __device__ __noinline__ void clean_tile(queries_shared &sm, uint32_t stage, int thread)
{
    bar_sync(BOTH, CONSUMERS);
    if (thread < 2) { sm.poisoned_keys[thread] = 0; }
    bar_sync(BOTH, CONSUMERS);
    for (int n = thread; n < (int)sizeof(sm.k[0]) / 16; n += CONSUMERS) {
        const int key = n / 8 % BLOCK_K;
        if (clean_piece(smem_address(sm.k[stage]) + 16 * n)) { atomicOr(&sm.poisoned_keys[key / 32], 1u << key % 32); }
    }
    fence_proxy_async();
    bar_sync(BOTH, CONSUMERS);
}

/* Whether dropout keeps what a lane holds in register m of its scores: row m / 2 % 2, column 8 (m / 4) + 2 (lane % 4) + m % 2,
 * in the bits of draw_kept(). */
static __device__ __forceinline__ bool keeps_weight(const uint32_t (&kept)[2], int m)
{
    const int block = m / 4, byte = (block % 4 < 2 ? 1 : 0) + 2 * (m % 2);
    return kept[block % 2] >> (8 * byte + BLOCK_K / 16 - 1 - (block / 4 * 2 + m / 2 % 2)) & 1;
}

template <bool MASKED, score_kind KIND> static __device__ __forceinline__ void consume_keys(const bwd_params &p, queries_shared &sm, const query_tile &t, const score_terms &terms, int consumer)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_mask &mask = t.sequence.mask;
    const int thread = (int)threadIdx.x & 127, lane = thread & 31, row = thread / 32 * 16 + lane / 4;                    /* and row + 8 */
    const int32_t i0 = t.i0 + consumer * BLOCK_Q;
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q[consumer]), 0, 1024), dout_rows = wgmma_desc_sw128(smem_address(sm.dout[consumer]), 0, 1024);
    const uint64_t v_rows = wgmma_desc_sw128(smem_address(sm.v), 0, 1024);
    float lse2[2] = {INFINITY, INFINITY}, delta[2] = {0.0f, 0.0f};
    int32_t begin[2] = {0, 0}, end[2] = {0, 0}, full_begin = 0, full_end = 0;               /* keys that a row sees; that all rows see */
    if (i0 < mask.sq) {
        const float *stats = (const float *)p.w.stats + bwd_q_tile(problem, p.w, t.b, t.h, t.sequence.q_row, i0 / BLOCK_Q) * 2 * BLOCK_Q;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int slot = bwd_stats_slot(row + 8 * half);
            lse2[half] = stats[slot];
            delta[half] = stats[BLOCK_Q + slot];
            if (MASKED && i0 + row + 8 * half < mask.sq) {
                begin[half] = fgqa_kv_begin(&mask, i0 + row + 8 * half);
                end[half] = fgqa_kv_end(&mask, i0 + row + 8 * half);
            }
        }
        if (MASKED && i0 + BLOCK_Q <= mask.sq) {
            full_begin = fgqa_kv_begin(&mask, i0 + BLOCK_Q - 1);
            full_end = fgqa_kv_end(&mask, i0);
        }
    }
    const bool drops = DROPS<KIND> && problem.dropout_threshold != 0, some_mask = HAS_MASK<KIND> && problem.view[FGQA_ARG_mask].data;
    const fgqa_view &slopes = problem.view[FGQA_ARG_alibi_slopes];
    const bool sloped = WITH_ALIBI<KIND> && slopes.data;
    const int32_t heads[2] = {t.h, t.h}, own_rows[2] = {i0 + row, i0 + row + 8};
    const term_rows of_rows = find_term_rows(problem, terms, t.b, heads, own_rows);
    const uint32_t batch_head = (uint32_t)t.b * (uint32_t)problem.hq + (uint32_t)t.h;
    const drop_rows drawn_rows = {{(uint32_t)own_rows[0], (uint32_t)own_rows[1]}, {batch_head, batch_head}};
    float slope = 0.0f;
    biased_rows biased = {{lse2[0], lse2[1]}, {0.0f, 0.0f}, 0.0f, 0.0f};
    bool dirty = false;
    if (HAS_BIAS<KIND> && i0 < mask.sq) {
        const int64_t q_tile = bwd_q_tile(problem, p.w, t.b, t.h, t.sequence.q_row, i0 / BLOCK_Q);
        dirty = load_relaxed_s32(p.w.turn + q_tile) & FGQA_BWD_DIRTY;
        if (p.w.based[q_tile]) {
#pragma unroll
            for (int half = 0; half < 2; half++) { biased.base[half] = p.w.bases[q_tile * BLOCK_Q + row + 8 * half]; }
        }
    }
    if (sloped) { slope = load_float(slopes.data, t.b * slopes.stride_b + t.h * slopes.stride_h, slopes.dtype); }
    const float slope_log2 = slope * (float)FGQA_LOG2E;
    const float distance = (float)(own_rows[0] + mask.diag - lane % 4 * 2);      /* of the first row and column of a lane, from key 0 on */
    biased.slope = slope;
    biased.first = distance;
    if (drops) { delta[0] *= p.inv_dropout_scale; delta[1] *= p.inv_dropout_scale; }
    float dq[D / 2];
#pragma unroll
    for (int n = 0; n < D / 2; n++) { dq[n] = 0.0f; }

    ring2 r;
    for (int32_t n = t.begin; n < t.end; n++, r.advance()) {
        float s[32], dp[32];
        uint32_t pairs[16];                                    /* of dS: A operand of dQ */
        const int32_t j0 = n * BLOCK_K;
        uint32_t shown[2] = {0xFFFFFFFFu, 0xFFFFFFFFu}, kept[2] = {};
        if (some_mask) { load_mask<BLOCK_K>(shown, of_rows, terms, j0, problem.sk); }
        block_terms bias;
        if constexpr (HAS_BIAS<KIND>) {
            if (terms.wide_bias) { load_bias<2, TERM_WORDS / 4, BLOCK_K>(bias, of_rows, terms, j0, 0, problem.sk); } else { load_bias<1, TERM_WORDS / 2, BLOCK_K>(bias, of_rows, terms, j0, 0, problem.sk); }
            if (n + 1 < t.end) { prefetch_terms<BLOCK_K>(of_rows, terms, j0 + BLOCK_K); }
        }
        const dropout_key key = sm.dropout;                    /* before products are issued, behind which it would wait */
        mbarrier_wait(smem_address(&sm.k_full[r.stage]), r.parity);
        uint32_t poisoned = 0;
        bool values_poisoned = false;
        if (MASKED) {
            poisoned = sm.poisoned[r.stage];
            values_poisoned = poisoned & POISONED_V;
            poisoned &= POISONED_K;
            if (poisoned) { clean_tile(sm, r.stage, consumer * 128 + thread); }
        }
        /* keep_nan: for dbias */
        const auto clear_poisoned = [&](bool keep_nan) {
#pragma unroll
            for (int m = 0; m < 32; m++) {
                if (sm.poisoned_keys[m / 16] >> (m / 4 % 4 * 8 + m % 2 + 2 * (lane % 4)) & 1) { s[m] = keep_nan ? s[m] * 0.0f : 0.0f; }
            }
        };
        const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k[r.stage]), 0, 1024), k_columns = wgmma_desc_sw128(smem_address(sm.k[r.stage]), BLOCK_K * 128, 1024);
        if (n == t.begin) { mbarrier_wait(smem_address(&sm.q_full[consumer]), 0); }
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
            const int at = (m / 4 * 64 * 128 + m % 4 * 32) / 16;
            wgmma64<0>(s, q_rows + at, k_rows + at, m == 0);
        }
        wgmma_commit();
        if (n == t.begin) { mbarrier_wait(smem_address(&sm.dout_full[consumer]), 0); }
        mbarrier_wait(smem_address(&sm.v_full), (uint32_t)(n - t.begin) & 1);
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
            const int at = (m / 4 * 64 * 128 + m % 4 * 32) / 16;
            wgmma64<0>(dp, dout_rows + at, v_rows + at, m == 0);
        }
        wgmma_commit();
        if (drops) { draw_kept<BLOCK_K>(kept, key, drawn_rows, j0); }
        wgmma_wait<1>();
        if (WITH_CAP<KIND> || (HAS_BIAS<KIND> && p.in_caps > 0.0f)) { cap_scores(s, p.in_caps); }
        if constexpr (HAS_BIAS<KIND>) {
            const bool more = sloped || p.in_caps > 0.0f;
            if (terms.wide_bias && more) { biased_weights_of_rows<true, 2>(s, bias, of_rows, terms, p, biased, j0); }
            if (terms.wide_bias && !more) { biased_weights_of_rows<false, 2>(s, bias, of_rows, terms, p, biased, j0); }
            if (!terms.wide_bias && more) { biased_weights_of_rows<true, 1>(s, bias, of_rows, terms, p, biased, j0); }
            if (!terms.wide_bias && !more) { biased_weights_of_rows<false, 1>(s, bias, of_rows, terms, p, biased, j0); }
        } else if (sloped) {
            const float first = distance - (float)j0;
#pragma unroll
            for (int m = 0; m < 32; m++) {
                const float less = bwd_less_alibi(s[m], p.scale_log2, slope_log2, first + (float)(m / 2 % 2 * 8 - m / 4 * 8 - m % 2));
                s[m] = ex2(less - lse2[m / 2 % 2]) * (WITH_CAP<KIND> ? FGQA_SOFTCAP_GRAD(s[m], 1.0f) : 1.0f);
            }
        } else {
#pragma unroll
            for (int m = 0; m < 32; m++) { s[m] = ex2(fmaf(s[m], p.scale_log2, -lse2[m / 2 % 2])) * (WITH_CAP<KIND> ? FGQA_SOFTCAP_GRAD(s[m], 1.0f) : 1.0f); }
        }
        wgmma_wait<0>();
        if (thread == 0) { mbarrier_arrive(smem_address(&sm.v_empty)); }
        if (drops) {
#pragma unroll
            for (int m = 0; m < 32; m++) { s[m] *= (keeps_weight(kept, m) ? dp[m] : 0.0f) - delta[m / 2 % 2]; }
        } else {
#pragma unroll
            for (int m = 0; m < 32; m++) { s[m] *= dp[m] - delta[m / 2 % 2]; }
        }
        const bool hides = HAS_BIAS<KIND> && (dirty || values_poisoned);
        if (hides) {
            const uint2 hidden = hidden_by_bias(p, t.b, t.h, i0 + row, j0);
            shown[0] &= ~hidden.x;
            shown[1] &= ~hidden.y;
        }
        if (some_mask || hides) {
#pragma unroll
            for (int m = 0; m < 32; m++) { s[m] = shown[m / 2 % 2] >> (m / 4 * 2 + m % 2) & 1 ? s[m] : 0.0f; }
        }
        if (MASKED && (poisoned || j0 < full_begin || j0 + BLOCK_K > full_end)) {
            const int own = j0 + 2 * (lane % 4);
#pragma unroll
            for (int m = 0; m < 32; m++) {
                const int column = m / 4 * 8 + m % 2;
                if (column < begin[m / 2 % 2] - own || column >= end[m / 2 % 2] - own) { s[m] = 0.0f; }
            }
            if (poisoned) { clear_poisoned(HAS_BIAS<KIND> && p.some_dbias); }
        }
        if (HAS_BIAS<KIND> && p.some_dbias) {
            store_dbias_of_rows(p, s, t.b, t.h, i0 + row, j0);
            if (poisoned) { clear_poisoned(false); }
        }
#pragma unroll
        for (int m = 0; m < 16; m++) { pairs[m] = pack2(s[2 * m], s[2 * m + 1], T()); }
        wgmma_fence();
#pragma unroll
        for (int m = 0; m < BLOCK_K / 16; m++) { wgmma_rs_bt(dq, pairs + 4 * m, k_columns + m * 2048 / 16, 1); }
        wgmma_commit();
        wgmma_wait<0>();
        if (thread == 0) { mbarrier_arrive(smem_address(&sm.k_empty[r.stage])); }
    }

    if (i0 >= mask.sq) { return; }
    const fgqa_view &view = problem.view[FGQA_ARG_dq];
    write_rows(dq, p.common.scale, fgqa_row_address(view, sizeof(T), problem.varlen ? 0 : t.b, t.h, t.sequence.q_row + i0 + row), view.stride_s, mask.sq - i0 - row, problem.d, p.vector_dq, lane);
}

template <bool MASKED, score_kind KIND> __global__ void __launch_bounds__(THREADS, 1) queries_kernel(const __grid_constant__ bwd_params p, uint32_t tiles, uint32_t band, const score_terms terms)
{
    extern __shared__ __align__(1024) char memory[];
    queries_shared &sm = *(queries_shared *)memory;
    const int wg = __shfl_sync(ALL_LANES, thread_index() / 128, 0);
    query_tile t;
    if (!find_tile(p, tiles, band, &t)) { return; }
    if (thread_index() == 0) {
        if (smem_address(memory) % 1024) { __trap(); }
        if (DROPS<KIND>) { sm.dropout = dropout_key_make(p.common.problem); }
        mbarrier_init(smem_address(&sm.v_full), 1);
        mbarrier_init(smem_address(&sm.v_empty), 2);
        for (int s = 0; s < 2; s++) {
            mbarrier_init(smem_address(&sm.q_full[s]), 1);
            mbarrier_init(smem_address(&sm.dout_full[s]), 1);
            mbarrier_init(smem_address(&sm.k_full[s]), 1);
            mbarrier_init(smem_address(&sm.k_empty[s]), 2);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (wg == 0) {
        setmaxnreg_dec<QUERIES_PRODUCER_REGS>();
        if (thread_index() == 0) { produce_keys<MASKED>(p, sm, t); }
    } else {
        setmaxnreg_inc<QUERIES_REGS>();
        consume_keys<MASKED, KIND>(p, sm, t, terms, wg - 1);
    }
}

/* dQ, after the main kernel. */
static int finish(const bwd_params &p, int32_t device, int32_t multiprocessors, cudaStream_t stream)
{
    static launch_state states[7];
    const fgqa_problem &problem = p.common.problem;
    const score_terms terms = score_terms_of(&problem);
    const bool capped = problem.softcap > 0.0, alibi = problem.view[FGQA_ARG_alibi_slopes].data;
    const bool bits = terms.some_mask || problem.dropout_threshold != 0;
    const int which = terms.some_bias ? 6 : capped ? bits ? 5 : alibi ? 4 : 3 : alibi || bits ? 2 : p.w.key_rows != NULL;
    const auto kernel = which == 6 ? queries_kernel<true, BIAS_AND_ALL> : which == 5 ? queries_kernel<true, CAPPED_AND_BITS> : which == 4 ? queries_kernel<true, CAPPED_ALIBI> : which == 3 ? queries_kernel<true, CAPPED> : which == 2 ? queries_kernel<true, ALIBI_AND_BITS>
        : which == 1 ? queries_kernel<true, PLAIN> : queries_kernel<false, PLAIN>;
    const uint32_t tiles = problem.varlen ? (uint32_t)(problem.total_q / TILE_ROWS) + (uint32_t)problem.b + 1 : ((uint32_t)problem.sq + TILE_ROWS - 1) / TILE_ROWS;
    const uint32_t heads = (uint32_t)problem.hq * (problem.varlen ? 1u : (uint32_t)problem.b), g = (uint32_t)problem.g;
    if (tiles == 0 || heads == 0 || problem.b == 0) { return cudaSuccess; }
    /* whole groups of heads, for about four rounds of blocks, the last of which is short under a causal mask */
    const uint32_t groups = min(8u, (4 * (uint32_t)multiprocessors + tiles * g - 1) / (tiles * g));
    const cudaError_t error = allow_shared_memory((const void *)kernel, sizeof(queries_shared), device, &states[which]);
    return error != cudaSuccess ? error : launch_kernel(kernel, heads * tiles, THREADS, sizeof(queries_shared), stream, p, tiles, groups * g, terms);
}
