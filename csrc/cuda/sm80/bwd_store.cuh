/* bwd_store.cuh - part of bwd.cu: what leaves a block. dQ is added up by the blocks in turn, dK and dV are stored once.
 */
#pragma once

/* Two neighbouring elements of a row of d elements. */
static __device__ __forceinline__ void write_pair(char *row, int column, int d, float x, float y, bool pair, f32)
{
    float *to = (float *)row + column;
    if ((!GENERAL || pair) && column + 1 < d) {
        *(float2 *)to = make_float2(x, y);
    } else {
        if (column < d) { to[0] = x; }
        if (column + 1 < d) { to[1] = y; }
    }
}
template <typename E> static __device__ __forceinline__ void write_pair(char *row, int column, int d, float x, float y, bool pair, E)
{
    E *to = (E *)row + column;
    if ((!GENERAL || pair) && column + 1 < d) {
        *(uint32_t *)to = pack2(x, y, E());
    } else {
        if (column < d) { from_float(to, x); }
        if (column + 1 < d) { from_float(to + 1, y); }
    }
}

/* This key tile's part of dQ of the step's query tile. `turn_seen`: the tile's counter as it was some time ago. A counter that
 * is seen to have come so far has the additions before it behind it at L2, where ours are made, too. */
static __device__ __forceinline__ void add_dq(const shared &mem, const fgqa_params &params, float (&dq)[of_dq::MB][of_dq::NB][4],
                                              const walk_step &step, int32_t turn_seen, bool pair, int warp, int lane)
{
    const fgqa_problem &p = params.problem;
    const task &t = mem.task;
    const int32_t rank = step.rank;
    float *sum = (float *)step.at[AT_SUM] + (warp * of_dq::MB * of_dq::NB * 32 + lane) * 4;
    while ((turn_seen & ~FGQA_BWD_DIRTY) < rank) { turn_seen = load_relaxed_s32((const int32_t *)step.at[AT_TURN]); }
    if (!step.last && rank == 0) {
#pragma unroll
        for (int n = 0; n < of_dq::MB * of_dq::NB; n++) {
            const float(&x)[4] = dq[n / of_dq::NB][n % of_dq::NB];
            __stcg((float4 *)(sum + n * 128), make_float4(x[0], x[1], x[2], x[3]));
        }
        return;
    }
    if (!step.last) {
#pragma unroll
        for (int n = 0; n < of_dq::MB * of_dq::NB; n++) { red_add_f32x4(sum + n * 128, dq[n / of_dq::NB][n % of_dq::NB]); }
        return;
    }
    const int32_t row0 = step.i * BLOCK_Q + of_dq::row(warp) + lane / 4;
    const int64_t row_bytes = p.view[FGQA_ARG_dq].stride_s * (int64_t)sizeof(T);
    char *out = step.at[AT_DQ] + (of_dq::row(warp) + lane / 4) * row_bytes;
#pragma unroll
    for (int mb = 0; mb < of_dq::MB; mb++) {
        if (rank > 0) {
            float4 before[of_dq::NB];                      /* all on their way before the first is used */
#pragma unroll
            for (int n = 0; n < of_dq::NB; n++) { before[n] = load_relaxed_f32x4(sum + (mb * of_dq::NB + n) * 128); }
#pragma unroll
            for (int n = 0; n < of_dq::NB; n++) {
                dq[mb][n][0] += before[n].x;
                dq[mb][n][1] += before[n].y;
                dq[mb][n][2] += before[n].z;
                dq[mb][n][3] += before[n].w;
            }
        }
#pragma unroll
        for (int n = 0; n < of_dq::NB; n++) {
            const int column = of_dq::col(warp) + 8 * n + fragment_column(lane, 0);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (row0 + 16 * mb + 8 * half < t.sequence.mask.sq) {
                    write_pair(out + (16 * mb + 8 * half) * row_bytes, column, p.d, params.scale * dq[mb][n][2 * half],
                               params.scale * dq[mb][n][2 * half + 1], pair, T());
                }
            }
        }
    }
}

/* A warp's part of dK or dV, times `scale`: to the result, or to this part's share of it in float32. */
template <typename S, int WIDTH>
static __device__ __forceinline__ void store_keys(const shared &mem, const fgqa_params &params, const fgqa_bwd_workspace &w, const float (&x)[S::MB][S::NB][4],
                                                  const fgqa_view &view, float *parts, int d, float scale, bool pair, int warp, int lane)
{
    const task &t = mem.task;
    const int32_t j0 = t.n * BLOCK_K + S::row(warp) + lane / 4;
#pragma unroll
    for (int mb = 0; mb < S::MB; mb++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int32_t j = j0 + 16 * mb + 8 * half;
            if (j < t.key_rows) {
                char *row = fgqa_row_address(view, sizeof(T), t.b, t.kv_head, t.sequence.k_row + j);
                if (w.splits > 1) { row = (char *)(parts + (t.part * w.k_rows + bwd_k_row(params.problem, t.b, t.kv_head, t.sequence.k_row, j)) * WIDTH); }
#pragma unroll
                for (int n = 0; n < S::NB; n++) {
                    const int column = S::col(warp) + 8 * n + fragment_column(lane, 0);
                    const float a = scale * x[mb][n][2 * half], b = scale * x[mb][n][2 * half + 1];
                    if (w.splits > 1) { write_pair(row, column, WIDTH, a, b, true, f32()); } else { write_pair(row, column, d, a, b, pair, T()); }
                }
            }
        }
    }
}

/* After a barrier behind the additions to its tile. */
static __device__ __forceinline__ void pass_turn(const walk_step &step) { red_release_add_s32((int32_t *)step.at[AT_TURN], 1); }
