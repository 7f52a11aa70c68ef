/* dec_wide_end.cuh - the end of a segment in decode_wide.cu: from registers of the warpgroups to the result or to a record. Part of it:
 * the state, the shared memory and the fragments are its own. Here few warps wait for each instruction in turn, so that what is made
 * once a row is made by one lane of each warp.
 */
#pragma once

/* Sums l of a warp's keys, and m, to shared memory. */
template <class Shared, int N> static __device__ __forceinline__ void share_sums(Shared &mem, const dec_actor &actor, const state<N> &st, int group)
{
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        float l = st.l[j];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) { l += __shfl_xor_sync(0xFFFFFFFFu, l, d); }
        if (lane < 4 && !actor.rehearsal) {
            mem.warp_part[group][warp][row_of(j, lane)] = l;
            if (warp == 0) { mem.row_max[group][row_of(j, lane)] = st.m[j]; }
        }
    }
}

template <class Shared> static __device__ __forceinline__ float sum_of_row(const Shared &mem, const dec_actor &actor, int group, int row)
{
    float l = 0.0f;
#pragma unroll
    for (int w = 0; w < 4; w++) { l += actor.read(mem.warp_part[group][w][row]); }
    return l;
}

/* A finished segment. Of a group's ROWS rows from row0 on, lane r has in hand rows r, r + 32, ..: their m, l and factors of the sums. A whole
 * pair goes to the result, a part to its record. */
template <int ROWS> struct row_ends {
    static constexpr int COUNT = (ROWS + 31) / 32;
    float factor[COUNT][2];             /* of the sums of this stream, of the other one */

    template <class Shared> __device__ __forceinline__ void make(const dec_params &p, const Shared &mem, const dec_actor &actor, int32_t b, const pair_rows &rows, int32_t sq, int row0,
                                                                 int group, int64_t record)
    {
        const fgqa_problem &problem = p.common.problem;
        const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4;
#pragma unroll
        for (int n = 0; n < COUNT; n++) {
            const int of_rows = lane + 32 * n, row = (Shared::STREAMS == 2 ? row0 : 0) + of_rows, local = row0 + of_rows;
            factor[n][0] = factor[n][1] = 0.0f;
            if (of_rows >= ROWS || local >= rows.valid) { continue; }
            float m = actor.read(mem.row_max[group][row]), l = sum_of_row(mem, actor, group, row), weight[2] = {1.0f, 0.0f};
            if (Shared::STREAMS == 2) {
                const float other = actor.read(mem.row_max[1 - group][row]), most = fmaxf(m, other), base = finite_max(most);
                weight[0] = ex2((m - base) * p.scale_log2);
                weight[1] = ex2((other - base) * p.scale_log2);
                m = most;
                l = weight[0] * l + weight[1] * sum_of_row(mem, actor, 1 - group, row);
            }
            if (record >= 0) {
                if (warp < SLICES && !actor.rehearsal) { *(float2 *)(record_of(p, record, local, warp) + FGQA_DEC_SLICE) = make_float2(m, l); }
            } else {
                float lse;
                const float scale = finish_row(p, b, rows, sq, local, m, l, &lse);
                weight[0] *= scale;
                weight[1] *= scale;
                if (warp == 0 && !actor.rehearsal) { store_lse(problem, b, rows.kv_head * problem.g + rows.rows.h(local), rows.rows.i(local), lse); }
            }
            factor[n][0] = weight[0];
            factor[n][1] = weight[1];
        }
    }
    /* Of the lane's row number j. */
    __device__ __forceinline__ float of(int j, int lane, int stream) const
    {
        return __shfl_sync(0xFFFFFFFFu, factor[j / 8][stream], row_of(j, lane) % 32);
    }
};

/* Registers o[j][2 chunk + half] of rows row0 + row_of(j, lane), to the result or the record. */
template <int COUNT> static __device__ __forceinline__ void store_rows(const dec_params &p, const dec_actor &actor, int32_t b, const pair_rows &rows, int row0,
                                                                       const float (&o)[COUNT][2 * CHUNKS], int64_t record)
{
    const fgqa_problem &problem = p.common.problem;
    const int lane = (int)thread_index() % 32, warp = actor.thread / 32 % 4;
    if (record >= 0) {
#pragma unroll
        for (int j = 0; j < COUNT; j++) {
            const int local = row0 + row_of(j, lane);
            if (local >= rows.valid || actor.rehearsal) { continue; }
            float *const row = record_of(p, record, local, 0);
#pragma unroll
            for (int n = 0; n < 2 * CHUNKS; n++) {
                const int column = out_column(n / 2, n % 2, warp, lane);
                row[column / FGQA_DEC_SLICE * FGQA_DEC_RECORD + column % FGQA_DEC_SLICE] = o[j][n];
            }
        }
        return;
    }
    const auto address = [&](int local) {
        return fgqa_row_address(problem.view[FGQA_ARG_out], sizeof(T), b, rows.kv_head * problem.g + rows.rows.h(local), rows.rows.i(local));
    };
    const auto store = [&](char *row, int local, int column, uint32_t pair) {
        if (local < rows.valid && column < problem.dv && !actor.rehearsal) { *(uint32_t *)(row + column * (int)sizeof(T)) = pair; }
    };
#pragma unroll
    for (int j = 0; j < COUNT; j += FLOAT8 ? 1 : 2) {
        const int local = row0 + (FLOAT8 ? row_of(j, lane) : 4 * j + lane / 4);
        char *const row = address(local);
#pragma unroll
        for (int n = 0; n < 2 * CHUNKS; n += FLOAT8 ? 2 : 1) {
            if (FLOAT8) {                       /* two columns of a row are in one lane */
                store(row, local, out_column(n / 2, 0, warp, lane), pack2(o[j][n], o[j][n + 1], T()));
            } else {                            /* two rows of a column; turned */
                store(row, local, 64 * (n / 2) + 16 * warp + 8 * (n % 2) + 2 * (lane % 4), movmatrix_trans(pack2(o[j][n], o[j + 1][n], T())));
            }
        }
    }
}

/* Consumers. STREAMS 2: both groups have the same rows; each makes the sums of one half of them and gives the other half away. */
template <int N> static __device__ __forceinline__ void finish_segment(const dec_params &p, wide_shared<N, 2> &mem, const dec_actor &actor, const state<N> &st, int32_t b,
                                                                       const pair_rows &rows, int32_t sq, int stream, int64_t record)
{
    constexpr int COUNT = N / 8, OWN = COUNT * 2 * CHUNKS;
    const int lane = (int)thread_index() % 32, at = actor.thread % 128, row0 = stream * N / 2;
    float o[COUNT][2 * CHUNKS];
    row_ends<N / 2> ends;
    share_sums(mem, actor, st, stream);
#pragma unroll
    for (int n = 0; n < OWN; n++) {
        const int j = n / (2 * CHUNKS), part = n % (2 * CHUNKS), r = 4 * (j / 2) + j % 2 + 2 * (part % 2);
        const float low = st.o[part / 2][r], high = st.o[part / 2][r + N / 4];
        o[j][part] = stream ? high : low;
        if (!actor.rehearsal) { mem.of_group[stream].away[n][at] = stream ? low : high; }
    }
    actor.sync();
    ends.make(p, mem, actor, b, rows, sq, row0, stream, record);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const float weight = ends.of(j, lane, 0), other_weight = ends.of(j, lane, 1);
#pragma unroll
        for (int part = 0; part < 2 * CHUNKS; part++) {
            o[j][part] = weight * o[j][part] + other_weight * actor.read(mem.of_group[1 - stream].away[j * 2 * CHUNKS + part][at]);
        }
    }
    store_rows(p, actor, b, rows, row0, o, record);
    actor.sync();                               /* shared memory is free again; every record of the segment is written */
}

/* STREAMS 1: rows of their own. */
template <int N> static __device__ __forceinline__ void finish_segment(const dec_params &p, wide_shared<N, 1> &mem, const dec_actor &actor, const state<N> &st, int32_t b,
                                                                       const pair_rows &rows, int32_t sq, int group, int64_t record)
{
    constexpr int COUNT = N / 4;
    const int lane = (int)thread_index() % 32;
    float o[COUNT][2 * CHUNKS];
    row_ends<N> ends;
    share_sums(mem, actor, st, group);
    bar_sync(actor.rehearsal ? REHEARSAL : (uint32_t)(READY + group), actor.rehearsal ? 32 : 128);
    ends.make(p, mem, actor, b, rows, sq, group * N, group, record);
    __syncwarp();
#pragma unroll
    for (int j = 0; j < COUNT; j++) {
        const float weight = ends.of(j, lane, 0);
#pragma unroll
        for (int part = 0; part < 2 * CHUNKS; part++) { o[j][part] = weight * st.o[part / 2][4 * (j / 2) + j % 2 + 2 * (part % 2)]; }
    }
    store_rows(p, actor, b, rows, group * N, o, record);
    actor.sync();                               /* as above */
}
