/* fwd_masker.cuh - the masker of fwd.cu, a warp: which keys the rows of a tile see, and where its O and LSE go. */
#pragma once

template <chain CHAIN> static __device__ __forceinline__ void plan_merge(const fwd_params &p, shared &sm);

template <chain CHAIN> static __device__ __forceinline__ uint32_t place_of_rows(const ring<Q_STAGES> &rq, const ring<T_STAGES> &rt)
{
    return ROW_PLACES<CHAIN> == T_STAGES ? rt.stage : rq.stage;
}

/* Where a tile's first row goes, in bytes from where the tensors begin. */
static __device__ __forceinline__ void place_tile(const fwd_params &p, tile &t)
{
    const fgqa_view &out = p.common.problem.view[FGQA_ARG_out], &lse = p.common.problem.view[FGQA_ARG_lse];
    const int64_t row = t.q_row + (t.row0 >> p.list.pack);
    t.out = (t.batch * out.stride_b + t.head * out.stride_h + row * out.stride_s) * (int64_t)sizeof(T);
    t.lse = (t.batch * lse.stride_b + t.head * lse.stride_h + row * lse.stride_s) * (int64_t)sizeof(float);
}

template <bool AGAIN, chain CHAIN> static __device__ __forceinline__ void describe_rows(const fwd_params &p, shared &sm, ring<Q_STAGES> &rq, ring<T_STAGES> &rt)
{
    const int lane = thread_index() % 32;
    for (bool more = true; more; rq.advance(), rt.advance()) {
        mbarrier_wait(smem_address(&sm.tile_full[rt.stage]), rt.parity);
        tile &t = sm.tiles[rt.stage];
        const fgqa_problem &problem = p.common.problem;
        const fgqa_mask mask = {t.sq, t.sk, t.diag, problem.left, problem.right, problem.chunk};
        const uint32_t at = place_of_rows<CHAIN>(rq, rt);
        fgqa_range seen[BLOCK_Q / 32];                           /* of rows that have no place yet */
        const int32_t last_row = t.row0 + t.valid - 1;           /* of others nobody asks for O */
        more = t.block_end != 0;
#pragma unroll 1
        for (int n = 0; n < BLOCK_Q / 32; n++) {                 /* one copy of the code: at a launch it comes from memory */
            const int32_t i = min(t.row0 + lane + 32 * n, last_row) >> p.list.pack;
            fgqa_range x = {0, 0};
            if (more && i < mask.sq) { x.begin = fgqa_kv_begin(&mask, i); x.end = fgqa_kv_end(&mask, i); }
            if (ROW_PLACES<CHAIN> == T_STAGES) { sm.rows[at][lane + 32 * n] = x; }
#pragma unroll
            for (int k = 0; ROW_PLACES<CHAIN> < T_STAGES && k < BLOCK_Q / 32; k++) {
                if (k == n) { seen[k] = x; }
            }
        }
#pragma unroll 1
        for (int part = 0; part < Q_PARTS; part++) {
            if (ROW_PLACES<CHAIN> < T_STAGES) {
                mbarrier_wait(smem_address(&sm.q_empty[rq.stage][part]), rq.parity ^ 1);
#pragma unroll
                for (int n = 0; n < BLOCK_Q / 32; n++) {
                    if (n / (2 * PART_WGS) == part) { sm.rows[at][lane + 32 * n] = seen[n]; }
                }
            }
            __syncwarp();
            if (lane >= part * PART_WGS && lane < (part + 1) * PART_WGS) {
                const int32_t first = lane * WG_ROWS, last = min(first + WG_ROWS, t.valid) - 1;
                const int32_t seeing = min(last, (mask.sq << p.list.pack) - t.row0 - 1);      /* the last row that sees any */
                wg_blocks own = {{0, 0}, t.block_begin + 1};
                if (first <= seeing) {
                    if (seeing == last) {
                        own.full.begin = (sm.rows[at][last].begin + BLOCK_K - 1) / BLOCK_K;
                        own.full.end = sm.rows[at][first].end / BLOCK_K;
                    }
                    own.end = min(max(own.end, (sm.rows[at][seeing].end + BLOCK_K - 1) / BLOCK_K), t.block_end);
                }
                /* The last P V of the tile before comes behind the K that are skipped; meanwhile as many V as are skipped find
                 * room. */
                if (CROSS_TILE) { own.end = max(own.end, t.block_end - (V_RING<CHAIN> - 1)); }
                /* A block without a mask asks nothing of its scores: by then each row must have had a key. */
                if (own.full.end < own.end && own.full.end * BLOCK_K == sm.rows[at][first].end) { own.full.end--; }
                sm.blocks[at][lane] = own;
            }
            if (lane == WG_COUNT && more && part == 0) { place_tile(p, t); }
            if (ROW_PLACES<CHAIN> == T_STAGES) { mbarrier_wait(smem_address(&sm.q_empty[rq.stage][part]), rq.parity ^ 1); }      /* the phase before is over */
            __syncwarp();
            if constexpr (CHAIN == MERGED && !AGAIN) {               /* there when the end is announced */
                if (!more && rt.stage == 0) { plan_merge<CHAIN>(p, sm); }
            }
            if (lane == 0) { mbarrier_arrive(smem_address(&sm.q_full[rq.stage][part])); }
        }
        if constexpr (CHAIN == MERGED && !AGAIN) {
            if (more) { plan_merge<CHAIN>(p, sm); }
        }
    }
}
