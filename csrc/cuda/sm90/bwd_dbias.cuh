/* bwd_dbias.cuh - part of bwd.cu: the gradient of a bias that sequences or heads share, and of one beside a soft cap, whose
 * factor is in dS of the main kernel, by a kernel of its own. Head dims 64 and 128: also that of any float32 bias, for which dS
 * must not be rounded as products take it, of one beside slopes and of one that TMA cannot store. KIND: BIASED, BIAS_AND_DROPOUT,
 * or BIAS_AND_ALL, which has a mask tensor, too, and stores elements one by one where rows of dbias are not on 16 bytes. Head dim
 * 256: bwd_dbias_wide.cuh.
 *
 *     dbias = sum of P (dP - delta) over those that share it
 *
 * A block owns a tile of 128 rows (64 at head dim 256, and of a float32 bias at 128, which finds no room) x 128 keys of it and
 * computes S and dP of all that add to it once more, in a fixed order: the sums stay in registers, and there is neither an atomic
 * nor memory for parts.
 * No product mixes rows or keys, so that what is inf or NaN stays where it is: it is hidden in the end.
 *
 *   warpgroup 0, warp 0   producer: the tile of the bias, then K, V, Q, dO and the statistics of each head of each sequence that meets it
 *   warpgroups 1, 2       consumers: 64 keys each, scores transposed (bwd_consumer.cuh), a half of 64 rows after the other
 */
#pragma once

static constexpr int HALVES = BLOCK_Q / 64;                      /* of a query tile */
/* Rows of a tile of dbias, halves and query tiles of it. WIDE: float32 */
template <bool WIDE> static constexpr int TILE = D == 256 || (WIDE && D == 128) ? 64 : 128;
template <bool WIDE> static constexpr int TILE_HALVES = TILE<WIDE> / 64;
template <bool WIDE> static constexpr int ITEMS = TILE<WIDE> / BLOCK_Q;
static constexpr int TILE_KEYS = 128;

/* Tiles of dbias; its heads and sequences. */
struct dbias_extent { int32_t row_tiles, key_tiles, heads, sequences; };

static dbias_extent dbias_extent_of(const fgqa_problem &problem, int32_t rows)
{
    const int32_t row_tiles = (problem.sq + rows - 1) / rows, key_tiles = (problem.sk + TILE_KEYS - 1) / TILE_KEYS;
    return {row_tiles, key_tiles, problem.bias_shape[1], problem.bias_shape[0]};
}

static __host__ __device__ __forceinline__ int64_t tiles_of(const dbias_extent &x)
{
    return (int64_t)x.row_tiles * x.key_tiles * x.heads * x.sequences;
}

/* A tile of dbias. */
template <bool WIDE> struct dbias_place {
    int32_t i0, j0, head, batch, halves;
    __device__ __forceinline__ dbias_place(const fgqa_problem &problem, const dbias_extent &extent, int64_t n)
    {
        j0 = (int32_t)(n % extent.key_tiles) * TILE_KEYS;
        n /= extent.key_tiles;
        i0 = (int32_t)(n % extent.row_tiles) * TILE<WIDE>;
        n /= extent.row_tiles;
        head = (int32_t)(n % extent.heads);
        batch = (int32_t)(n / extent.heads);
        halves = TILE_HALVES<WIDE> > 1 && problem.sq - i0 > 64 ? 2 : 1;
    }
};

/* Whether some row of the tile sees some key of it. whole: all see all. */
template <bool WIDE> static __device__ __forceinline__ bool meets(const bwd_params &p, const fgqa_sequence &sequence, int32_t b, const dbias_place<WIDE> &at, bool *whole)
{
    const fgqa_mask &mask = sequence.mask;
    const int32_t i1 = min(mask.sq, at.i0 + TILE<WIDE>), j1 = min(mask.sk, at.j0 + TILE_KEYS);
    *whole = false;
    if (at.i0 >= i1 || at.j0 >= j1) { return false; }
    const fgqa_range *key_rows = bwd_key_rows(p.common.problem, p.w, b, sequence.k_row);
    const fgqa_range first = key_rows[at.j0], last = key_rows[j1 - 1];
    *whole = j1 - at.j0 == TILE_KEYS && last.begin <= at.i0 && first.end >= at.i0 + TILE<WIDE>;
    return max(first.begin, at.i0) < min(last.end, i1);
}

/* Notes for a warp which rows see each of its lanes' keys. */
static __device__ __forceinline__ void note_rows(fgqa_range (&noted)[2 * 64], const bwd_params &p, int32_t b, int32_t j0,
                                                 int consumer)
{
    const int thread = (int)thread_index() & 127, lane = thread & 31;
    const int key = consumer * 64 + thread / 32 * 16 + lane / 4 + lane % 4 * 8, j = j0 + key;
    __syncwarp();                                                /* the ranges of before are no longer read */
    if (lane % 4 < 2) {
        int32_t rows;
        const fgqa_sequence sequence = fgqa_device_sequence(p.common.problem, b, &rows);
        const fgqa_range none = {0, 0};
        noted[key] = j < sequence.mask.sk ? bwd_key_rows(p.common.problem, p.w, b, sequence.k_row)[j] : none;
    }
    __syncwarp();
}

/* S -> P. */
template <score_kind KIND, int WORDS>
static __device__ __forceinline__ void weigh(float (&s)[32], const uint32_t (&bias)[WORDS], const float4 (&lse2)[4],
                                             const bwd_params &p, const alibi_lane &alibi, const float *bases)
{
    if constexpr (BIAS_IN_MIX<KIND>) {
        biased_scores(s, s, bias, p, alibi, bases);
    } else {
        add_bias(s, bias, p.score_scale);
        if (bases) { lower_scores(s, bases); }
    }
#pragma unroll
    for (int n = 0; n < 32; n++) { s[n] = ex2(exponent<BIASED>(s[n], of_row(lse2, n / 4, n % 2), 0.0f, {}, 0, 0)); }
}

/* What may hide scores of a lane, or drop them. some_hidden: some bias is -inf; partial: not all rows see all keys. */
struct hiding {
    bool some_hidden, some_mask, partial;
    mask_bytes bytes;
    lane_bits kept;
};

/* sum += P (dP - delta), beside dropout without its scale. s: P, no longer wanted; rows: that see each key of the consumer. */
template <score_kind KIND, int WORDS>
static __device__ __forceinline__ void add_gradients(float (&sum)[32], float (&s)[32], const float (&dp)[32], const float4 (&delta)[4],
                                                     const uint32_t (&bias)[WORDS], const bwd_params &p, const hiding &by,
                                                     const fgqa_range *rows, int32_t row0)
{
#pragma unroll
    for (int n = 0; n < 32; n++) {
        if (DROPS<KIND>) {
            const bool keeps = by.kept.bits >> (16 * (n % 2) + lane_bits::at(n / 4, n / 2 % 2)) & 1;
            s[n] *= (keeps ? dp[n] : 0.0f) - of_row(delta, n / 4, n % 2) * p.inv_dropout_scale;
        } else {
            s[n] *= dp[n] - of_row(delta, n / 4, n % 2);
        }
    }
    if (by.some_hidden) {
#pragma unroll
        for (int n = 0; n < 16; n++) {
            const float2 x = bias_pair(bias, n);
            s[2 * n] = x.x == -INFINITY ? 0.0f : s[2 * n];
            s[2 * n + 1] = x.y == -INFINITY ? 0.0f : s[2 * n + 1];
        }
    }
    if (by.some_mask) {
        const lane_bits shown = bits_of_mask(by.bytes);
#pragma unroll
        for (int n = 0; n < 32; n++) { s[n] = shown.bits >> (16 * (n % 2) + lane_bits::at(n / 4, n / 2 % 2)) & 1 ? s[n] : 0.0f; }
    }
    if (by.partial) {
        const tile_mask mask(rows, row0);
#pragma unroll
        for (int n = 0; n < 32; n++) { s[n] = mask.bits[n / 2 % 2][n / 16] >> (n / 4 % 4 * 8 + n % 2) & 1 ? s[n] : 0.0f; }
    }
#pragma unroll
    for (int n = 0; n < 32; n++) { sum[n] += s[n]; }
}

PTX_FN void store_if(bool yes, float *to, float x)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t@p st.global.f32 [%1], %2;\n\t}"
                 ::"r"((int)yes), "l"(to), "f"(x) : "memory");
}

PTX_FN void store_if(bool yes, T *to, float x)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t@p st.global.b16 [%1], %2;\n\t}"
                 ::"r"((int)yes), "l"(to), "h"((uint16_t)pack2(x, 0.0f, T())) : "memory");
}

/* dbias element by element, by a consumer, to `at`: key, row, head, sequence. A warp's stores of float32 fill sectors of 32
 * bytes. E: of dbias. */
template <typename E>
static __device__ __forceinline__ void store_elements(const bwd_params &p, const int4 &at, const float (&sums)[32], float factor)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_view &view = problem.view[FGQA_ARG_dbias];
    const int here = (int)thread_index() & 127;
    const int32_t row = at.y + here % 4 * 2, key = at.x + here / 32 * 16 + here % 32 / 4, rows = problem.sq - row;
    const int32_t count[2] = {key < problem.sk ? rows : 0, key + 8 < problem.sk ? rows : 0};
    E *to = (E *)fgqa_row_address(view, sizeof(E), at.w, at.z, row) + key;
#pragma unroll
    for (int n = 0; n < 8; n++, to += 8 * view.stride_s) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
            store_if(8 * n + m % 2 < count[m / 2], to + m % 2 * view.stride_s + m / 2 * 8, sums[4 * n + m] * factor);
        }
    }
}

#if FGQA_D != 256
template <bool WIDE> struct dbias_shared {
    T k[2][CHUNKS][BLOCK_K * CHUNK], v[2][CHUNKS][BLOCK_K * CHUNK];
    T q[2][CHUNKS][BLOCK_Q * CHUNK], dout[2][CHUNKS][BLOCK_Q * CHUNK];
    uint16_t bias[TILE_HALVES<WIDE>][2][64 * 64 * (WIDE ? 2 : 1)];      /* half, consumer; in the end dbias, unless that is float32 */
    float lse2[2][BLOCK_Q], delta[2][BLOCK_Q];
    fgqa_range rows[2 * 64];                                     /* that see each key of each consumer, where not all do */
    int4 about[2];                                               /* of K and V: sequence (-1: the tile is done), head, CARE_ bits, query tile */
    alibi_tile alibi[2];                                         /* of the first row and key of K and V */
    dropout_key dropout;
    uint64_t k_full[2], v_full[2], kv_empty[2], q_full[2], dout_full[2], rows_empty[2], bias_full[2], bias_empty[2];
};
static_assert(sizeof(dbias_shared<false>) <= SM_BYTES && sizeof(dbias_shared<true>) <= SM_BYTES, "the tiles do not fit into shared memory");

template <score_kind KIND, bool WIDE> static __device__ void produce_dbias(const bwd_params &p, dbias_shared<WIDE> &sm, const dbias_extent &extent)
{
    const fgqa_problem &problem = p.common.problem;
    const uint64_t policy = createpolicy_evict_normal();
    const int64_t tiles = tiles_of(extent);
    const int32_t sequences = extent.sequences == 1 ? problem.b : 1, heads = extent.heads == 1 ? problem.hq : 1;
    ring2 kv, r;
    uint32_t parity = 0;
    for (int64_t n = blockIdx.x; n < tiles; n += gridDim.x, parity ^= 1) {
        const dbias_place<WIDE> at(problem, extent, n);
        for (int half = 0; half < at.halves; half++) {
            const uint32_t bar = smem_address(&sm.bias_full[half]);
            mbarrier_wait(smem_address(&sm.bias_empty[half]), parity ^ 1);
            mbarrier_arrive_expect_tx(bar, sizeof(sm.bias[0]));
            constexpr int BOXES = WIDE ? 4 : 2;
            for (int c = 0; c < BOXES; c++) {
                tma_load_4d(smem_address(sm.bias[half]) + c * 8192, &p.bias_map, bar, policy, at.j0 + 128 / BOXES * c, at.head, at.i0 + 64 * half, at.batch);
            }
        }
        if (TILE_HALVES<WIDE> > 1 && at.halves == 1) {           /* in step */
            mbarrier_wait(smem_address(&sm.bias_empty[1]), parity ^ 1);
            mbarrier_arrive(smem_address(&sm.bias_full[1]));
        }
        for (int32_t b = at.batch; b < at.batch + sequences; b++) {
            int32_t rows;
            bool whole;
            const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
            if (!meets(p, sequence, b, at, &whole)) { continue; }
            const int batch = problem.varlen ? 0 : b;
            for (int32_t head = at.head; head < at.head + heads; head++) {
                const int32_t first_tile = (int32_t)bwd_q_tile(problem, p.w, b, head, sequence.q_row, at.i0 / BLOCK_Q);
                mbarrier_wait(smem_address(&sm.kv_empty[kv.stage]), kv.parity ^ 1);
                sm.about[kv.stage] = make_int4(b, head, whole ? 0 : PARTIAL, first_tile);
                if (WITH_ALIBI<KIND>) { sm.alibi[kv.stage] = {slope_of_head(p, b, head), at.i0 + sequence.mask.diag - at.j0}; }
                load_keys(&p.k_map, sm.k[kv.stage], &sm.k_full[kv.stage], policy, fgqa_kv_head(head, problem.g), (int)sequence.k_row + at.j0, batch);
                load_keys(&p.v_map, sm.v[kv.stage], &sm.v_full[kv.stage], policy, fgqa_kv_head(head, problem.g), (int)sequence.k_row + at.j0, batch);
                kv.advance();
                for (int item = 0; item < ITEMS<WIDE> && (item == 0 || at.halves > 1); item++, r.advance()) {
                    const int row = (int)sequence.q_row + at.i0 + item * BLOCK_Q;
                    const float *stats = (const float *)p.w.stats + (int64_t)(first_tile + item) * 2 * BLOCK_Q;
                    mbarrier_wait(smem_address(&sm.rows_empty[r.stage]), r.parity ^ 1);
                    load_rows(&p.q_map, sm.q[r.stage], sm.lse2[r.stage], stats, &sm.q_full[r.stage], policy, head, row, batch);
                    load_rows(&p.dout_map, sm.dout[r.stage], sm.delta[r.stage], stats + BLOCK_Q, &sm.dout_full[r.stage], policy, head, row, batch);
                }
            }
        }
        mbarrier_wait(smem_address(&sm.kv_empty[kv.stage]), kv.parity ^ 1);
        sm.about[kv.stage] = make_int4(-1, 0, 0, 0);
        mbarrier_arrive(smem_address(&sm.k_full[kv.stage]));
        mbarrier_arrive(smem_address(&sm.v_full[kv.stage]));
        kv.advance();
    }
}

/* For the own 64 keys and 64 rows. bases: NULL where there are none; row0: of the rows. */
template <score_kind KIND, bool WIDE>
static __device__ __forceinline__ void add_scores(float (&sum)[32], const bwd_params &p, const dbias_shared<WIDE> &sm, int consumer, uint32_t stage, uint32_t kv_stage, int half,
                                                  const float *bases, int32_t row0, bool partial, bool some_hidden, int32_t key_tile, int32_t b, int32_t head)
{
    const int thread = (int)thread_index() & 127, lane = thread & 31;
    const uint64_t k_rows = wgmma_desc_sw128(smem_address(sm.k[kv_stage]) + consumer * 64 * 128, 0, 1024), v_rows = wgmma_desc_sw128(smem_address(sm.v[kv_stage]) + consumer * 64 * 128, 0, 1024);
    const uint64_t q_rows = wgmma_desc_sw128(smem_address(sm.q[stage]) + (HALVES > 1 ? half : 0) * 64 * 128, 0, 1024);
    const uint64_t dout_rows = wgmma_desc_sw128(smem_address(sm.dout[stage]) + (HALVES > 1 ? half : 0) * 64 * 128, 0, 1024);
    const int quarter = (HALVES > 1 ? half : 0) * 16 + (lane & 3);
    float s[32], dp[32];
    float4 lse2[4], delta[4];
    uint32_t bias[WIDE ? 32 : 16];
#pragma unroll
    for (int n = 0; n < 4; n++) {
        lse2[n] = ((const float4 *)sm.lse2[stage])[quarter + 4 * n];
        delta[n] = ((const float4 *)sm.delta[stage])[quarter + 4 * n];
    }
    read_bias(bias, smem_address(sm.bias[half][consumer]));
    drawing drawing = {};
    if (DROPS<KIND>) {
        const uint32_t batch_head = (uint32_t)b * (uint32_t)p.common.problem.hq + (uint32_t)head;
        drawing = prepare_drawing(sm.dropout, key_tile, batch_head, row0, consumer, thread);
    }
    const bool some_mask = HAS_MASK<KIND> && p.common.problem.view[FGQA_ARG_mask].data;
    hiding by = {some_hidden, some_mask, partial, {}, {}};
    if (some_mask) { by.bytes = load_mask_bytes(p, b, key_tile, head, row0, consumer, thread); }
    alibi_lane alibi = {};
    if (WITH_ALIBI<KIND>) {
        alibi = alibi_of_lane(sm.alibi[kv_stage], consumer, thread);
        alibi.first += (float)(half * 64);
    }
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < D / 16; n++) { wgmma64<0>(s, k_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, q_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0); }
    wgmma_commit();
#pragma unroll
    for (int n = 0; n < D / 16; n++) { wgmma64<0>(dp, v_rows + (n / 4 * BLOCK_K * 128 + n % 4 * 32) / 16, dout_rows + (n / 4 * BLOCK_Q * 128 + n % 4 * 32) / 16, n == 0); }
    wgmma_commit();
    uint32_t drawn = 0;
    if (DROPS<KIND>) { drawn = draw_blocks<KIND>(p, drawing); }
    wgmma_wait<1>();
    if (DROPS<KIND>) { by.kept = bits_of_blocks(drawn); }
    weigh<KIND>(s, bias, lse2, p, alibi, bases);
    wgmma_wait<0>();
    add_gradients<KIND>(sum, s, dp, delta, bias, p, by, sm.rows + consumer * 64, row0);
}

/* Whether the warpgroup's part of a tile holds -inf somewhere, as far as this warp's keys go. */
template <bool WIDE> static __device__ __forceinline__ bool hides_some(uint32_t tile)
{
    uint32_t bias[WIDE ? 32 : 16], same = 0;
    read_bias(bias, tile);
#pragma unroll
    for (int n = 0; n < (WIDE ? 32 : 16); n++) { same |= WIDE ? bias[n] == WIDE_HIDDEN : __vcmpeq2(bias[n], HIDDEN); }
    return __any_sync(ALL_LANES, same != 0);
}

template <score_kind KIND, bool WIDE> static __device__ void consume_dbias(const bwd_params &p, dbias_shared<WIDE> &sm, const dbias_extent &extent, int consumer)
{
    const fgqa_problem &problem = p.common.problem;
    const int thread = (int)thread_index() & 127, lane = thread & 31;
    const int64_t tiles = tiles_of(extent);
    const float factor = DROPS<KIND> ? p.dbias_scale : 1.0f;
    ring2 kv, r;
    uint32_t parity = 0;
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x, parity ^= 1) {
        const dbias_place<WIDE> at(problem, extent, tile);
        float sums[TILE_HALVES<WIDE>][32] = {};
        bool some_hidden[TILE_HALVES<WIDE>] = {};
#pragma unroll
        for (int half = 0; half < TILE_HALVES<WIDE>; half++) {
            mbarrier_wait(smem_address(&sm.bias_full[half]), parity);
            if (half < at.halves) { some_hidden[half] = hides_some<WIDE>(smem_address(sm.bias[half][consumer])); }
        }
        for (;; kv.advance()) {
            mbarrier_wait(smem_address(&sm.k_full[kv.stage]), kv.parity);
            mbarrier_wait(smem_address(&sm.v_full[kv.stage]), kv.parity);
            const int4 about = sm.about[kv.stage];
            if (about.x < 0) { break; }
            const bool partial = about.z & PARTIAL;
            if (partial) { note_rows(sm.rows, p, about.x, at.j0, consumer); }
#pragma unroll
            for (int item = 0; item < ITEMS<WIDE>; item++) {
                if (item > 0 && at.halves == 1) { continue; }
                const int64_t q_tile = about.w + item;
                const float *bases = p.w.based[q_tile] ? p.w.bases + q_tile * BLOCK_Q : NULL;
                mbarrier_wait(smem_address(&sm.q_full[r.stage]), r.parity);
                mbarrier_wait(smem_address(&sm.dout_full[r.stage]), r.parity);
#pragma unroll
                for (int n = 0; n < HALVES; n++) {
                    const int half = item * HALVES + n;
                    if (half > 0 && at.halves == 1) { continue; }
                    add_scores<KIND, WIDE>(sums[half], p, sm, consumer, r.stage, kv.stage, half, bases ? bases + n * 64 : NULL, at.i0 + half * 64, partial, some_hidden[half],
                                           at.j0 / BLOCK_K, about.x, about.y);
                }
                __syncwarp();
                if (lane == 0) { mbarrier_arrive(smem_address(&sm.rows_empty[r.stage])); }
                r.advance();
            }
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.kv_empty[kv.stage])); }
        }
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.kv_empty[kv.stage])); }
        kv.advance();
#pragma unroll
        for (int half = 0; half < TILE_HALVES<WIDE>; half++) {
            if (half >= at.halves) {
                if (lane == 0) { mbarrier_arrive(smem_address(&sm.bias_empty[half])); }
                continue;
            }
            const int4 to = make_int4(at.j0 + 64 * consumer, at.i0 + 64 * half, at.head, at.batch);
            if constexpr (WIDE) {
                free_bias(&sm.bias_empty[half]);
                store_elements<float>(p, to, sums[half], factor);
            } else if (BIAS_IN_MIX<KIND> && !p.vector_dbias) {
                free_bias(&sm.bias_empty[half]);
                store_elements<T>(p, to, sums[half], factor);
            } else {
                uint32_t pairs[16];
#pragma unroll
                for (int n = 0; n < 16; n++) { pairs[n] = pack2(sums[half][2 * n] * factor, sums[half][2 * n + 1] * factor, T()); }
                store_dbias<BIASED>(p, smem_address(sm.bias[half][consumer]), &sm.bias_empty[half], to, pairs, consumer);
            }
        }
        if (!WIDE && thread == 0 && (!BIAS_IN_MIX<KIND> || p.vector_dbias)) {
            for (int half = 0; half < at.halves; half++) { free_dbias(p, &sm.bias_empty[half]); }
        }
    }
}

template <score_kind KIND, bool WIDE> static __global__ void __launch_bounds__(THREADS, 1) dbias_kernel(const __grid_constant__ bwd_params p, const dbias_extent extent)
{
    extern __shared__ __align__(1024) char memory[];
    dbias_shared<WIDE> &sm = *(dbias_shared<WIDE> *)memory;
    const int warp = __shfl_sync(ALL_LANES, thread_index() / 32, 0), wg = warp / 4, lane = (int)thread_index() % 32;
    if (thread_index() == 0) {
        if (smem_address(memory) % 1024) { __trap(); }           /* the swizzle pattern repeats every 1024 bytes */
        if (DROPS<KIND>) { sm.dropout = dropout_key_make(p.common.problem); }
        for (int s = 0; s < 2; s++) {
            mbarrier_init(smem_address(&sm.k_full[s]), 1);
            mbarrier_init(smem_address(&sm.v_full[s]), 1);
            mbarrier_init(smem_address(&sm.kv_empty[s]), CONSUMERS / 32);
            mbarrier_init(smem_address(&sm.q_full[s]), 1);
            mbarrier_init(smem_address(&sm.dout_full[s]), 1);
            mbarrier_init(smem_address(&sm.rows_empty[s]), CONSUMERS / 32);
            mbarrier_init(smem_address(&sm.bias_full[s]), 1);
            mbarrier_init(smem_address(&sm.bias_empty[s]), CONSUMERS / 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (wg == 0) {
        setmaxnreg_dec<PRODUCER_REGS>();
        if (warp == 0 && lane == 0) { produce_dbias<KIND, WIDE>(p, sm, extent); }
    } else {
        setmaxnreg_inc<CONSUMER_REGS>();
        consume_dbias<KIND, WIDE>(p, sm, extent, wg - 1);
    }
}

template <bool WIDE> static decltype(&dbias_kernel<BIASED, WIDE>) dbias_kernel_of(bool mixed, bool drops)
{
    return mixed ? dbias_kernel<BIAS_AND_ALL, WIDE> : drops ? dbias_kernel<BIAS_AND_DROPOUT, WIDE> : dbias_kernel<BIASED, WIDE>;
}

/* Behind the main kernel: it needs its statistics alone. */
static int sum_dbias(const bwd_params &p, int32_t device, int multiprocessors, cudaStream_t stream)
{
    static launch_state states[6];
    const fgqa_problem &problem = p.common.problem;
    const bool drops = problem.dropout_threshold != 0, wide = problem.view[FGQA_ARG_bias].dtype == FGQA_F32;
    const bool more = problem.softcap > 0.0 || problem.view[FGQA_ARG_alibi_slopes].data || problem.view[FGQA_ARG_mask].data;
    const bool mixed = more || (!wide && !p.vector_dbias);
    const auto kernel = wide ? dbias_kernel_of<true>(mixed, drops) : dbias_kernel_of<false>(mixed, drops);
    const size_t bytes = wide ? sizeof(dbias_shared<true>) : sizeof(dbias_shared<false>);
    const dbias_extent extent = dbias_extent_of(problem, wide ? TILE<true> : TILE<false>);
    const int64_t tiles = tiles_of(extent);
    if (tiles == 0) { return cudaSuccess; }
    const cudaError_t error = allow_shared_memory((const void *)kernel, bytes, device, &states[3 * wide + (mixed ? 2 : drops)]);
    if (error != cudaSuccess) { return error; }
    return launch_kernel(kernel, (uint32_t)min(tiles, (int64_t)multiprocessors), THREADS, bytes, stream, p, extent);
}
#endif
