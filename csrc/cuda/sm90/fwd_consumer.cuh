/* fwd_consumer.cuh - the consumer warpgroups of fwd.cu, which includes this in its middle: main loop and epilogue. */
#pragma once

/* A consumer's first row; its second is 8 further on. */
static __device__ __forceinline__ int32_t row_in_tile(uint32_t thread) { return (int32_t)((thread / 32 - 4) * 16 + thread % 32 / 4); }

/* Query head of a packed row of a tile whose first one is `first`. */
static __device__ __forceinline__ int32_t head_of(const fwd_params &p, int32_t first, int32_t packed) { return first + (packed & (1 << p.list.pack) - 1); }

#include "fwd_store.cuh"

/* What ends two rows: base, -inf without a key; sum over their lanes; what O is multiplied with; LSE. */
struct row_ends { float base[2], sum[2], factor[2], lse[2]; };

/* A row's base in natural units. LOWEST: with one that was cut, ends.lse tells the largest score, which is all that counts there. */
template <bool LOWEST> static __device__ __forceinline__ float natural_base(float base, float lse)
{
    return LOWEST && fabsf(base) == FLT_MAX ? lse : base * (float)FGQA_LN2;
}

/* What a part of the keys gives (any/fwd_split.h) -> global memory. out_scale: of O / l. True: an element is not finite. */
template <bool LOWEST>
static __device__ __forceinline__ bool store_part(const fwd_params &p, const tile &t, const float (&o)[DV / 2], const row_ends &ends, float out_scale)
{
    const int32_t lane = (int32_t)(thread_index() % 32), dv = p.common.problem.dv;
    float poison = 0.0f;                                         /* becomes NaN */
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t local = row_in_tile(thread_index()) + 8 * r, packed = t.row0 + local;
        const int64_t row = row_of_part(p, t, head_of(p, t.head, packed), packed >> p.list.pack);
        const int32_t columns = local < t.valid ? dv - 2 * (lane % 4) : 0;
        float *const to = p.split.o + row * dv + 2 * (lane % 4);
        const float factor = ends.sum[r] == 0.0f ? 0.0f : out_scale / ends.sum[r];
#pragma unroll
        for (int n = 0; n < DV / 8; n++) {
            const float2 x = {o[4 * n + 2 * r] * factor, o[4 * n + 2 * r + 1] * factor};
            poison = fmaf(x.x, 0.0f, fmaf(x.y, 0.0f, poison));
            if (8 * n < columns) { *(float2 *)(to + 8 * n) = x; }
        }
        const float top = natural_base<LOWEST>(ends.base[r], ends.lse[r]);
        if (lane % 4 == 0 && columns > 0) { ((float2 *)p.split.lse)[row] = make_float2(top, log2f(ends.sum[r])); }
    }
    return poison != 0.0f;
}

#include "fwd_merge.cuh"

/* softmax_finish() without a sink, and without a branch, so that in the step across tiles it fills gaps between exponentials.
 * What is computed again carefully has the same bits. */
static __device__ __forceinline__ void end_rows(row_ends &e, const softmax_rows &rows)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        e.base[r] = rows.m[r] == -INFINITY ? -INFINITY : rows.base[r];
        e.sum[r] = row_reduce_sum(rows.l[r]);
        e.factor[r] = e.sum[r] == 0.0f ? 0.0f : __fdividef(1.0f, e.sum[r]);
        e.lse[r] = e.sum[r] == 0.0f ? -INFINITY : fmaf(__log2f(e.sum[r]), (float)FGQA_LN2, rows.base[r] * (float)FGQA_LN2);
    }
}

/* The largest weight, about 1, is lost or has overflowed: the tile is done again. */
static __device__ __forceinline__ bool row_is_lost(const row_ends &ends, int r)
{
    return !(ends.sum[r] >= 0.5f && ends.sum[r] < INFINITY) && ends.base[r] > -INFINITY;
}

/* Sinks in the denominators. first: the thread's first row. */
template <bool LOWEST> static __device__ __forceinline__ void add_sinks(const fwd_params &p, const tile &t, int32_t first, row_ends &ends)
{
#pragma unroll 1
    for (int r = 0; r < 2; r++) {
        const int32_t packed = t.row0 + first + 8 * r;
        const float sink = sink_logit(p.common.problem, t.batch, head_of(p, t.head, packed), packed >> p.list.pack >= t.sq);
        const float top = natural_base<LOWEST>(r ? ends.base[1] : ends.base[0], r ? ends.lse[1] : ends.lse[0]);
        float lse, factor = softmax_finish(top, r ? ends.sum[1] : ends.sum[0], sink, &lse);
        if (r) { ends.factor[1] = factor; ends.lse[1] = lse; } else { ends.factor[0] = factor; ends.lse[0] = lse; }
    }
}

/* O / l and LSE, or what a part of the keys gives -> global memory. slot: of the tile; at: of its rows. */
template <bool CAREFUL, chain CHAIN>
static __device__ __forceinline__ void finish_rows(const fwd_params &p, shared &sm, uint32_t slot, uint32_t at, const row_places &places, float (&o)[DV / 2],
                                                   row_ends &ends)
{
    const fgqa_problem &problem = p.common.problem;
    const uint32_t thread = thread_index(), lane = thread % 32;
    const int32_t first = row_in_tile(thread);
    const tile &t = sm.tiles[slot];
    const bool partial = CHAIN == MERGED || parts_of<BLOCK_Q, CHAIN == EVEN>(p.list) > 1;
    constexpr bool LOWEST = CAREFUL && WITH_TERMS<CHAIN>;
    bool again = false;
#pragma unroll
    for (int r = 0; r < 2; r++) { again |= row_is_lost(ends, r); }
    if (problem.view[FGQA_ARG_sink].data && !partial) { add_sinks<LOWEST>(p, t, first, ends); }
    if (CAREFUL) { add_seen_poison<CHAIN>(p, thread_index(), sm.rows[at], t, o); }
    const float out_scale = DROPOUT ? p.common.dropout_scale : CHAIN == SCALED ? cache_scale(problem.cache.v_scale, t.batch, fgqa_kv_head(t.head, problem.g)) : 1.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) { ends.factor[r] *= out_scale; }
    if (partial) {
        again |= store_part<LOWEST>(p, t, o, ends, out_scale);
    } else {
        char *const to[2] = {places.o[0] + t.out, places.o[1] + t.out};
        const int32_t there = problem.dv - first_column(), columns[2] = {first < t.valid ? there : 0, first + 8 < t.valid ? there : 0};
        if (places.lse && first + 8 * (int32_t)(lane % 4) < t.valid) { *(float *)(places.lse + t.lse) = lane % 4 ? ends.lse[1] : ends.lse[0]; }
        again |= store_o(to, columns, o, ends.factor) != 0;
    }
    if (!CAREFUL && __any_sync(ALL_LANES, again)) {
        sm.poisoned[slot] = 1;
        if constexpr (CHAIN == MERGED) { plan_of(sm).poisoned = 1; }
    }
    __syncwarp();
    if (lane == 0) { mbarrier_arrive(smem_address(&sm.o_full[slot])); }
}

/* ALiBi of the thread's rows: add_any_alibi() takes slopes as they are given, add_alibi() in units of the scores. */
template <bool CAREFUL> static __device__ __forceinline__ void take_slopes(const fwd_params &p, const tile &t, int32_t first_row, alibi_rows &alibi)
{
    const fgqa_view &slopes = p.common.problem.view[FGQA_ARG_alibi_slopes];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int32_t packed = t.row0 + first_row + 8 * r;
        const float slope = load_float(slopes.data, t.batch * slopes.stride_b + head_of(p, t.head, packed) * slopes.stride_h, slopes.dtype);
        alibi.slope[r] = CAREFUL ? slope : moderate_slope(slope * p.inv_unit);
    }
    alibi.diagonal = (t.row0 + first_row >> p.list.pack) + t.diag - 2 * (int32_t)(thread_index() % 4);
}

/* With ALiBi the base follows scores whose weights would be 2^ALIBI_RISE or more. With 3 a lane's weights of a row in a block
 * never add up to more than MODERATE, and nobody asks for that; at head dim 64 a base that goes up more often costs more. */
static constexpr int ALIBI_RISE = DV > 64 ? 3 : 8;

/* With a bias or a mask tensor a block's scores tell nothing of the next one's: the base follows all, so that nobody is
 * moderated. Scores below LOWEST_BASE, such as a bias of the least number that there is, make no base, and weights of 0; rows
 * without any other are done again. */
static constexpr int TERMS_RISE = 3;
static constexpr float LOWEST_BASE = -0x1p26f;

/* A row whose base is above this has had scores like others': with BY_TMA, unless there is ALiBi, nobody looks for its
 * maximum, and its weights are moderated as without a bias. */
static constexpr float LOW_BASE = -64.0f;

/* Largest exponent, relative to the base, of a weight that leaves it. */
template <chain CHAIN> static constexpr float RISE = CHAIN == ALIBI ? (float)ALIBI_RISE : WITH_TERMS<CHAIN> ? (float)TERMS_RISE : ALMOST_OVERFLOW;
template <chain CHAIN> static constexpr bool ALL_MODERATE = (CHAIN == ALIBI || DIRECT_TERMS<CHAIN>) && BLOCK_K / 4 * (1 << (int)RISE<CHAIN>) <= (int)MODERATE;

template <chain CHAIN> struct consumer_rings { ring<Q_STAGES> q; ring<T_STAGES> t; ring<STAGES> k; ring<V_RING<CHAIN>> v; term_ring terms; };

/* CAREFUL: tiles that came out non-finite once more, without inf and NaN in V (careful.cuh), one step after the other.
 * CHAIN: what else happens to scores. S and m are in units of the cap with CAPPED, in natural ones with a bias and with ANY_MIX. */
template <bool CAREFUL, chain CHAIN>
static __device__ __forceinline__ void consume(const fwd_params &p, shared &sm, int warp, consumer_rings<CHAIN> &rings)
{
    constexpr bool CROSS = CROSS_TILE && !CAREFUL && CHAIN != MERGED, TURNS = TAKE_TURNS && !CAREFUL, ONLY_Q = Q_STAGES == 1 && !CAREFUL;
    /* others' main loops have no registers left */
    constexpr bool KEEP_PLACES = WG_COUNT == 2 && D <= 128 && CHAIN != CAPPED && !ANY_MIX<CHAIN> && CHAIN != TILED && CHAIN != MERGED;
    const uint32_t thread = thread_index(), lane = thread % 32, first_row = row_in_tile(thread);
    const int wg = warp / 4 - 1, part = Q_PARTS > 1 ? wg : 0;    /* of Q */
    const bool natural = ANY_MIX<CHAIN> || (CHAIN == TERMS && p.terms.some_bias) || (CHAIN == TILED && p.term_boxes.bias.some);
    const float unit = CHAIN == CAPPED ? p.common.softcap : natural ? 1.0f : p.common.scale, unit_log2 = unit * (float)FGQA_LOG2E;
    float scale_log2 = unit_log2;                                /* with SCALED of the tile's keys */
    ring<Q_STAGES> &rq = rings.q;
    ring<T_STAGES> &rt = rings.t;
    ring<STAGES> &rk = rings.k;
    ring<V_RING<CHAIN>> &rv = rings.v;
    term_ring &chunks = rings.terms;
    int block_begin, block_end, skipped;                         /* of the tile; blocks behind its end that only others' rows see */
    int begin[2], end[2];                                        /* keys that own rows see, less own column */
    uint32_t row_place;                                          /* of rows[] and blocks[] */
    fgqa_range full;                                             /* blocks that need no mask */
    const bool some_alibi = p.common.problem.view[FGQA_ARG_alibi_slopes].data;
    alibi_rows alibi;
    term_rows terms;
    dropout_key of_call;
    row_places places = {};
    softmax_rows rows = {};
    float o[DV / 2] = {};
    uint32_t pr[BLOCK_K / 4];

    uint32_t k_at = desc_low(smem_address(sm.k[rk.stage]), 0);
    uint32_t v_at = desc_low(smem_address(sm.v[rv.stage]), BLOCK_K * 128);
    auto wait_k = [&] { mbarrier_wait(smem_address(&sm.k_full[rk.stage]), rk.parity); };
    auto wait_v = [&] {
        mbarrier_wait(smem_address(&sm.v_full[rv.stage]), rv.parity);
        if (CAREFUL) { clean_v<T>(smem_address(sm.v[rv.stage]), sizeof(sm.v[0]), TOGETHER + wg); }
    };
    /* One thread speaks for its warpgroup, whose warps a wgmma keeps together; in the careful pass some fall far behind. */
    auto keep_together = [&] {
        if (CAREFUL) { bar_sync(TOGETHER + wg, 128); }
    };
    auto release_k = [&] {
        keep_together();
        hand_back<CAREFUL, CHAIN>(smem_address(&sm.k_empty[rk.stage]), thread % 128);
        rk.advance();
        k_at = desc_low(smem_address(sm.k[rk.stage]), 0);
    };
    auto release_v = [&] {
        keep_together();
        hand_back<CAREFUL, CHAIN>(smem_address(&sm.v_empty[rv.stage]), thread % 128);
        rv.advance();
        v_at = desc_low(smem_address(sm.v[rv.stage]), BLOCK_K * 128);
    };
    /* With BY_TMA. */
    auto hand_back_chunk = [&] {
        fence_proxy_async();                                     /* what has been read before what TMA writes */
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(chunks.is_empty()); }
        chunks.advance();
    };
    /* The next chunk, which `read` reads. */
    auto take_chunk = [&](auto read) {
        mbarrier_wait(chunks.is_full(), chunks.parity);
        read(chunks.slot());
        hand_back_chunk();
    };
    auto skip_chunks = [&] {
#pragma unroll 1
        for (int n = 0; n < p.term_boxes.chunks; n++) { take_chunk([](uint32_t) {}); }
    };
    /* Each warp for itself: wait_pv() waits for the Q in use, or for its tile. */
    auto release_q = [&](uint32_t stage) {
        __syncwarp();
        if (lane == 0) { mbarrier_arrive(smem_address(&sm.q_empty[stage][part])); }
    };
    /* Behind Q K^T of block j. Where there is no second Q the next one comes under the tile's last softmax, P V and stores of O. */
    auto release_only_q = [&](int j) {
        if (ONLY_Q && j == block_begin) { release_q(rq.stage); }
    };
    /* false: there are no more tiles */
    auto take_tile = [&] {
        mbarrier_wait(smem_address(&sm.q_full[rq.stage][part]), rq.parity);
        const tile &t = sm.tiles[rt.stage];
        if (t.block_end == 0) {
            release_q(rq.stage);
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.o_full[rt.stage])); }
            rq.advance();
            rt.advance();
            return false;
        }
        block_begin = t.block_begin;
        const uint32_t at = place_of_rows<CHAIN>(rq, rt);
        block_end = CAREFUL ? t.block_end : sm.blocks[at][wg].end;      /* there all warps of a warpgroup clean each V */
        skipped = t.block_end - block_end;
        row_place = at;
        return true;
    };
    auto take_rows = [&] {
        full = sm.blocks[row_place][wg].full;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const fgqa_range seen = sm.rows[row_place][first_row + 8 * r];
            begin[r] = seen.begin - 2 * (int32_t)(lane % 4);
            end[r] = seen.end - 2 * (int32_t)(lane % 4);
        }
        if (CHAIN == ALIBI || (ANY_MIX<CHAIN> && some_alibi)) { take_slopes<CAREFUL>(p, sm.tiles[rt.stage], (int32_t)first_row, alibi); }
        if (CHAIN == SCALED) {
            const tile &t = sm.tiles[rt.stage];
            scale_log2 = unit_log2 * cache_scale(p.common.problem.cache.k_scale, t.batch, fgqa_kv_head(t.head, p.common.problem.g));
        }
        if constexpr (DIRECT_TERMS<CHAIN>) {
            const tile &t = sm.tiles[rt.stage];
            const int32_t packed[2] = {t.row0 + (int32_t)first_row, t.row0 + (int32_t)first_row + 8};
            const int32_t head[2] = {head_of(p, t.head, packed[0]), head_of(p, t.head, packed[1])}, row[2] = {packed[0] >> p.list.pack, packed[1] >> p.list.pack};
            terms = find_term_rows(p.common.problem, p.terms, t.batch, head, row);
        }
    };
    auto fetch = [&](block_terms &of_block, int j) {
        if constexpr (DIRECT_TERMS<CHAIN>) { fetch_terms<BLOCK_K>(of_block, terms, p.terms, j * BLOCK_K, p.common.problem.sk); }
        if constexpr (BY_TMA<CHAIN>) {
            of_block.seen[0] = of_block.seen[1] = ALL_LANES;
            if (p.term_boxes.mask.some) {
                take_chunk([&](uint32_t slot) { read_mask<BLOCK_K>(of_block.seen, p.term_boxes.mask, slot); });
            }
        }
    };
    /* ptxas moves arithmetic in front of products, but no volatile read that it begins with; and behind the wait for them,
     * among the exponentials, which is where it costs least. */
    auto draw = [&](uint32_t (&kept)[2], int j) {
        if constexpr (DROPOUT) {
            const volatile tile &t = sm.tiles[rt.stage];
            const int32_t packed = t.row0 + (int32_t)first_row, head = t.head;
            const uint32_t heads_before = (uint32_t)t.batch * (uint32_t)p.common.problem.hq;
            drop_rows rows;
#pragma unroll
            for (int r = 0; r < 2; r++) {
                rows.i[r] = (uint32_t)(packed + 8 * r >> p.list.pack);
                rows.batch_head[r] = heads_before + (uint32_t)head_of(p, head, packed + 8 * r);
            }
            draw_kept<BLOCK_K>(kept, of_call, rows, j * BLOCK_K);
            asm volatile("" : "+r"(kept[0]), "+r"(kept[1]));
        }
    };
    auto pack = [&](const float (&s)[BLOCK_K / 2], const uint32_t (&kept)[2]) {
        pack_weights<T>(pr, s);
        if constexpr (DROPOUT) { drop_weights<BLOCK_K>(pr, kept); }
    };
    auto score = [&](float (&s)[BLOCK_K / 2], int j, block_terms &of_block) {
        if constexpr (CHAIN == TERMS) { add_terms<CAREFUL, T, BLOCK_K>(s, of_block, terms, p.terms, p.common.scale, j * BLOCK_K, p.common.problem.sk); }
        const bool capped = ANY_MIX<CHAIN> && p.in_caps > 0.0f;
        const float of_scores = capped ? p.common.softcap : p.common.scale;
        if (CHAIN == CAPPED || capped) { cap_scores(s, p.in_caps); }
        if constexpr (BY_TMA<CHAIN>) {
            const term_source &bias = p.term_boxes.bias;
            if (bias.some && bias.bytes == 4) {
#pragma unroll
                for (int n = 0; n < BLOCK_K / 8; n += 4) {
                    take_chunk([&](uint32_t slot) { add_wide_chunk<CAREFUL>(s, bias, slot, of_scores, n); });
                }
            } else if (bias.some) {
#pragma unroll
                for (int n = 0; n < BLOCK_K / 8; n += 8) {
                    take_chunk([&](uint32_t slot) { add_chunk<CAREFUL, T>(s, bias, slot, of_scores, n); });
                }
            } else if (CHAIN == TILED_ALL) {
#pragma unroll
                for (int n = 0; n < BLOCK_K / 2; n++) { s[n] = with_bias<CAREFUL>(s[n], of_scores, 0.0f); }
            }
        }
        if constexpr (CHAIN == ALL) { add_terms_in_natural_units<CAREFUL, T, BLOCK_K>(s, of_block, terms, p.terms, of_scores, j * BLOCK_K, p.common.problem.sk); }
        if (CHAIN == ALIBI || (ANY_MIX<CHAIN> && some_alibi)) {
            const int32_t further = 8 >> p.list.pack;
            if (CAREFUL) { add_any_alibi<ANY_MIX<CHAIN>>(s, alibi, further, j * BLOCK_K, p.inv_unit); } else { add_alibi(s, alibi, further, j * BLOCK_K); }
        }
    };
    auto in_interval = [&](int r, int j) { return columns_before(end[r] - j * BLOCK_K) & ~columns_before(begin[r] - j * BLOCK_K); };
    auto mask = [&](float (&s)[BLOCK_K / 2], int j, bool bounded, const block_terms &of_block) {
        uint32_t seen[2];
        const bool some_mask = BY_TMA<CHAIN> ? p.term_boxes.mask.some : p.terms.some_mask;
        if (WITH_TERMS<CHAIN> && !bounded && !some_mask) { return; }
#pragma unroll
        for (int r = 0; r < 2; r++) { seen[r] = !WITH_TERMS<CHAIN> ? in_interval(r, j) : bounded ? in_interval(r, j) & of_block.seen[r] : of_block.seen[r]; }
        constexpr uint32_t OF_BLOCK = BLOCK_K == 128 ? ALL_LANES : (1u << BLOCK_K / 4) - 1;
        if (BY_TMA<CHAIN> && __all_sync(ALL_LANES, (seen[0] & seen[1] & OF_BLOCK) == OF_BLOCK)) { return; }
        if (WITH_TERMS<CHAIN> || bounded) { hide_others(s, seen); }
    };
    auto await_turn = [&] {
        if (TURNS) { bar_sync(TURN + wg, 256); }
    };
    auto pass_turn = [&] {
        if (TURNS) { bar_arrive(TURN + (wg + 1 == WG_COUNT ? 0 : wg + 1), 256); }
    };
    auto qk = [&](float (&s)[BLOCK_K / 2]) {
        wgmma_fence();
        qk_wgmma<D, BLOCK_K>(s, wgmma_desc_sw128(smem_address(sm.q[rq.stage][wg]), 0, 1024), desc_of(k_at));
        wgmma_commit();
    };
    auto pv = [&](int accumulate) {
        pv_wgmma<DV, BLOCK_K>(o, pr, desc_of(v_at), accumulate);
        wgmma_commit();
    };

    /* Ends the P V in flight; waits for the next K of the tile, if any. The branch of the mbarrier wait is needed even without
     * one (the Q in use returns at once): ptxas moves arithmetic across a wgmma_wait, but not across a branch. Not the V in
     * use: another warp may have released it, and a warp that comes two phases late waits for ever. Nor a Q that this warp has
     * released: the tile in use, whose place is free only when O is stored. */
    auto wait_pv = [&](bool next_k) {
        wgmma_wait<0>();
        wgmma_pin(o);
        uint64_t *const in_use = ONLY_Q ? &sm.tile_full[rt.stage] : &sm.q_full[rq.stage][part];
        mbarrier_wait(smem_address(next_k ? &sm.k_full[rk.stage] : in_use), next_k ? rk.parity : ONLY_Q ? rt.parity : rq.parity);
        release_v();
    };
    auto has_none = [&](float m) { return WITH_TERMS<CHAIN> && !CAREFUL ? m < LOWEST_BASE : m == -INFINITY; };
    /* the base follows scores whatever it is */
    const bool follows = CHAIN == TILED_ALL ? some_alibi : CHAIN != TILED;
    auto is_low = [&](float m) { return m * scale_log2 < LOW_BASE; };
    auto take_base = [&](int r, float top) {
        set_base(rows, r, top, scale_log2);
        if (WITH_TERMS<CHAIN> && !CAREFUL && top < LOWEST_BASE) { rows.base[r] = 0.0f; }
        if (WITH_TERMS<CHAIN> && CAREFUL && fabsf(top) < INFINITY) { rows.base[r] = fminf(fmaxf(rows.base[r], -FLT_MAX), FLT_MAX); }
    };
    /* Row by row: one's maximum passes between lanes under the other's exponentials. */
    auto first_weights = [&](float (&s)[BLOCK_K / 2], float (&sum)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            take_base(r, row_top(s, r));
            sum[r] = exponentials<CAREFUL>(s, rows, r, scale_log2);
        }
    };
    /* Rows that had no key so far take their base from this block. */
    auto late_base = [&](const float (&s)[BLOCK_K / 2]) {
        if (__any_sync(ALL_LANES, rows.m[0] == -INFINITY || rows.m[1] == -INFINITY)) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float top = row_top(s, r);
                if (rows.m[r] == -INFINITY) { set_base(rows, r, top, scale_log2); }
            }
        }
    };
    /* The base follows scores whose weights would be NaN without care, and enormous ones; and all that grow with ALiBi, where
     * each block of keys in front of the diagonal has larger ones than the block before it. alpha: O's factor. */
    auto rising_base = [&](const float (&s)[BLOCK_K / 2], float (&alpha)[2]) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float top = row_top(s, r), m = rows.m[r], base = rows.base[r];
            const bool none = has_none(m), enormous = CAREFUL && !none && is_enormous(m, scale_log2);
            alpha[r] = 1.0f;
            const float rise = follows || is_low(m) ? RISE<CHAIN> : ALMOST_OVERFLOW;
            if (none || (enormous ? top > m : fmaf(top, scale_log2, -base) >= rise)) {
                take_base(r, top);
                if (!none) { alpha[r] = ex2(enormous ? (m - top) * scale_log2 : base - rows.base[r]); }
                rows.l[r] *= alpha[r];
            }
        }
    };
    /* S -> P. The chain from the end of Q K^T to the next one decides the speed, and in it the number of instructions: the
     * tensor core's accumulators take half of what registers can deliver. So nothing is asked of a block's scores
     * (softmax_rows) and exponentials begin at once, under P V; only their sums tell whether base has to go up. */
    auto softmax_under_pv = [&](float (&s)[BLOCK_K / 2], const uint32_t (&kept)[2], auto masked, auto first, bool next_k) {
        constexpr bool MASKED = decltype(masked)::value, FIRST = decltype(first)::value, RISING = !FIRST && (CAREFUL || CHAIN == ALIBI || WITH_TERMS<CHAIN>);
        float sum[2], alpha[2];
        if (FIRST) {
            first_weights(s, sum);
        } else {
            if (RISING) {
                if (BY_TMA<CHAIN>) { alpha[0] = alpha[1] = 1.0f; }
                if (CAREFUL || follows || __any_sync(ALL_LANES, is_low(rows.m[0]) || is_low(rows.m[1]))) { rising_base(s, alpha); }
            } else if (MASKED) {
                late_base(s);
            }
#pragma unroll
            for (int r = 0; r < 2; r++) { sum[r] = exponentials<CAREFUL>(s, rows, r, scale_log2); }
        }
        wait_pv(next_k);
        if (RISING && __any_sync(ALL_LANES, alpha[0] != 1.0f || alpha[1] != 1.0f)) { scale_rows(o, alpha); }
        if (!FIRST && !ALL_MODERATE<CHAIN> && __any_sync(ALL_LANES, sum[0] > MODERATE || sum[1] > MODERATE)) {
            moderate_weights(s, o, rows, sum);
        }
#pragma unroll
        for (int r = 0; r < 2; r++) { rows.l[r] = FIRST ? sum[r] : rows.l[r] + sum[r]; }
        pack(s, kept);
        if (!FIRST) { wait_v(); }
    };
    auto wait_operands = [&] {                                   /* of the next step, or of the last P V */
        wait_v();
        if (block_end - block_begin > 1) { wait_k(); }
    };
    /* Turns at blocks that are skipped. One of a tile is left to others only when its first block is done and O of the tile
     * before is stored: so these come beside those of the warpgroups that skip nothing, not behind them. Left later than that,
     * its first K would not be there. In a launch's first tile all are left before the next K is waited for: where a chunk of a
     * mask ends between warpgroups, so many blocks may be skipped that it takes a place that others hand back in their turns.
     * Head dims other than 128, for which this has not been timed, leave each where the block is skipped. */
    constexpr bool EARLY_TURNS = TURNS && D == 128;
    auto leave_turns = [&](int n) {
#pragma unroll 1
        for (; EARLY_TURNS && n > 0; n--) {
            await_turn();
            pass_turn();
        }
    };
    /* Blocks of which own rows see nothing are handed back unread, by the warp that speaks for all: others must not come to wait
     * for a block that has gone. */
    auto skip_blocks = [&](bool k, bool v) {
#pragma unroll 1
        for (int n = skipped; n > 0; n--) {
            if (k) {
                if (BY_TMA<CHAIN>) { skip_chunks(); }
                if (!EARLY_TURNS) {
                    await_turn();
                    pass_turn();
                }
                if (warp % 4 == 0) { wait_k(); }
                release_k();
            }
            if (v) {
                if (warp % 4 == 0) { wait_v(); }
                release_v();
            }
        }
    };
    /* first block of a tile, nothing to overlap with */
    auto first_block = [&] {
        float s[BLOCK_K / 2];
        block_terms of_block;
        uint32_t kept[2];
        wait_k();
        qk(s);
        take_rows();
        fetch(of_block, block_end - 1);
        draw(kept, block_end - 1);
        wgmma_wait<0>();
        wgmma_pin(s);
        release_k();
        release_only_q(block_end - 1);
        score(s, block_end - 1, of_block);
        mask(s, block_end - 1, CAREFUL || block_end > full.end || block_end - 1 < full.begin, of_block);
        first_weights(s, rows.l);
        pack(s, kept);
        leave_turns(skipped);
        wait_operands();
    };
    /* block j < block_end - 1; on entry K(j) and V(j + 1) are there and P holds block j + 1 */
    auto step = [&](int j, auto masked, bool bounded) {
        float s[BLOCK_K / 2];
        block_terms of_block;
        uint32_t kept[2];
        const int accumulate = j < block_end - 2;
        await_turn();
        qk(s);
        pv(accumulate);
        fetch(of_block, j);
        if (DIRECT_TERMS<CHAIN> && j > block_begin) { prefetch_terms<BLOCK_K>(terms, p.terms, (j - 1) * BLOCK_K); }
        draw(kept, j);
        wgmma_wait<1>();
        pass_turn();
        wgmma_pin(s);
        release_k();
        release_only_q(j);
        score(s, j, of_block);
        if (decltype(masked)::value) { mask(s, j, bounded, of_block); }
        softmax_under_pv(s, kept, masked, std::false_type{}, j > block_begin);
    };
    auto middle_blocks = [&] {
        int j = block_end - 2;
        if constexpr (WITH_TERMS<CHAIN>) {                       /* one copy of much code */
#pragma unroll 1
            for (; j >= block_begin; j--) { step(j, std::true_type{}, CAREFUL || j >= full.end || j < full.begin); }
        } else {
            while (j >= block_begin) {
#pragma unroll 1
                for (; j >= block_begin && (CAREFUL || j >= full.end || j < full.begin); j--) { step(j, std::true_type{}, true); }
#pragma unroll 1
                for (; !CAREFUL && j >= block_begin && j < full.end && j >= full.begin; j--) { step(j, std::false_type{}, false); }
            }
        }
    };
    if (wg == WG_COUNT - 1) { pass_turn(); }
    if (KEEP_PLACES) { places = place_rows(p, thread_index()); }
    if (DROPOUT) { of_call = dropout_key_make(p.common.problem); }
    if (!take_tile()) { return; }
    skip_blocks(true, true);
    first_block();
    for (bool more = true; more;) {
        middle_blocks();
        const uint32_t slot = rt.stage, at = row_place, done = rq.stage;
        if (!CAREFUL && !ONLY_Q) { release_q(done); }
        const int accumulate = block_end - block_begin > 1;
        const softmax_rows done_rows = rows;
        row_ends ends;
        rq.advance();
        rt.advance();
        if (CROSS) { more = take_tile(); }
        if (CROSS && more) {                                /* as step(), but S belongs to the next tile and O is finished */
            float s[BLOCK_K / 2];
            block_terms of_block;
            uint32_t kept[2];
            leave_turns(skipped - 1);
            skip_blocks(true, false);
            wait_k();
            await_turn();
            qk(s);
            pv(accumulate);
            take_rows();
            fetch(of_block, block_end - 1);
            draw(kept, block_end - 1);
            wgmma_wait<1>();
            pass_turn();
            wgmma_pin(s);
            release_k();
            score(s, block_end - 1, of_block);
            mask(s, block_end - 1, block_end > full.end || block_end - 1 < full.begin, of_block);
            end_rows(ends, done_rows);
            softmax_under_pv(s, kept, std::true_type{}, std::true_type{}, false);
            skip_blocks(false, true);
        } else {
            wgmma_fence();
            pv(accumulate);
            constexpr bool BEHIND = CHAIN == MERGED && !CAREFUL; /* behind the product whatever does not wait for it */
            if (BEHIND) {
                end_rows(ends, done_rows);
                take_tile();                                     /* the end */
            }
            wgmma_wait<0>();
            wgmma_pin(o);
            release_v();
            if (!BEHIND) { end_rows(ends, done_rows); }
            if (CAREFUL && WITH_TERMS<CHAIN>) {                  /* scores that have a base in natural units alone: take_base() has cut it */
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (fabsf(done_rows.base[r]) == FLT_MAX) { ends.lse[r] = fmaf(__log2f(ends.sum[r]), (float)FGQA_LN2, done_rows.m[r]); }
                }
            }
        }
        finish_rows<CAREFUL, CHAIN>(p, sm, slot, at, KEEP_PLACES ? places : place_rows(p, thread_index()), o, ends);
        if (CAREFUL) { release_q(done); }                        /* and its rows */
        if (CHAIN == MERGED) {
            if (CAREFUL) { take_tile(); }                        /* the end */
            return;
        }
        if (!CROSS) {
            more = take_tile();
            if (more) {
                skip_blocks(true, true);
                first_block();
            }
        } else if (more) {
            leave_turns(min(skipped, 1));
            wait_operands();
        }
    }
}
