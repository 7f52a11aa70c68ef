/* bwd_finish.cuh - part of bwd.cu, head dims 64 and 128: dQ from float32 sums in the order of accumulators, without its scale,
 * to its rows, inside the main kernel. A query tile's word tells when all key tiles have been added. By the scheduler's warp
 * while it has nothing else to do, when the sums are mostly still in the L2 cache; what is left when there are no more tasks,
 * by the consumers. Packed sequences have no order in which their tiles become complete: by the consumers. */
#pragma once

static constexpr int UNITS = 16, OF_CONSUMER = BLOCK_Q * D / 8;      /* float4s of a tile that one consumer made */

/* Of the place of a part's walks: what they add in their end. */
static __device__ __forceinline__ float *late_sums(const bwd_params &p, int32_t b, int32_t kv_head, int32_t part, int32_t place)
{
    const int64_t section = ((int64_t)b * p.common.problem.hk + kv_head) * p.w.splits + part;
    return p.late_dq + (section * fgqa_bwd_late_places(&p.shift) + place) * (BLOCK_Q * D);
}

/* A query tile of one head whose dQ is to be converted. */
struct dq_tile {
    const float *sums, *late;                 /* late: of those that come to it in the end of a shifted walk, or NULL */
    const int32_t *turn;
    int32_t b, h, first_row, rows;            /* of dq; rows: 0 if no key tile adds to it, then bwd_delta.cu has written it */
    int32_t complete;                         /* what the tile's word says when all have added */
};

static __device__ __forceinline__ dq_tile dq_tile_of(const bwd_params &p, const fgqa_sequence &sequence, int32_t b, int32_t h, int32_t n)
{
    const int32_t i0 = n * BLOCK_Q, end = min(sequence.mask.sq, i0 + BLOCK_Q);
    const int64_t index = bwd_q_tile(p.common.problem, p.w, b, h, sequence.q_row, n);
    fgqa_range key_tiles = {0, 0};
    if (n >= 0 && i0 < end) { key_tiles = bwd_key_tiles(sequence.mask, BLOCK_K, i0, end); }
    dq_tile t = {p.w.dq + index * (BLOCK_Q * D), NULL, p.w.turn + index, b, h, (int32_t)sequence.q_row + i0, key_tiles.begin < key_tiles.end ? end - i0 : 0, key_tiles.end};
    if (p.shift.tiles > 0 && t.rows > 0) {
        const int32_t group = p.common.problem.g, pairs = (int32_t)p.w.head_tiles * group, pair = n * group + h % group, place = (pairs - 1 - pair) / p.w.splits;
        t.complete = fgqa_bwd_shifted_complete(&p.shift, place, key_tiles.end);
        if (t.complete >= FGQA_BWD_LATE) { t.late = late_sums(p, b, h / group, pair % p.w.splits, place); }
    }
    return t;
}

/* A warp's work: AT_ONCE of the units of 16 rows and 32 columns of a tile, from `first` on. */
template <int AT_ONCE> static __device__ __forceinline__ void finish_units(const bwd_params &p, const dq_tile &t, int first)
{
    const fgqa_problem &problem = p.common.problem;
    const int lane = (int)thread_index() % 32;
    float4 x[AT_ONCE][4];
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
        const int unit = first + m;
        const int from = 4 * (unit / 8 * OF_CONSUMER + unit % 2 * 512 + unit / 2 % 4 * 32 + lane);
#pragma unroll
        for (int n = 0; n < 4; n++) { x[m][n] = load_relaxed_f32x4(t.sums + from + 512 * n); }
        if (!t.late) { continue; }
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const float4 more = load_relaxed_f32x4(t.late + from + 512 * n);
            x[m][n] = make_float4(x[m][n].x + more.x, x[m][n].y + more.y, x[m][n].z + more.z, x[m][n].w + more.w);
        }
    }
#pragma unroll
    for (int m = 0; m < AT_ONCE; m++) {
        /* a consumer has half of the rows or, from head dim 128 on, of the columns */
        const int unit = first + m, half = unit / 8 * 64, column = (D == 64 ? 0 : half) + unit % 2 * 32 + lane % 4 * 8;
        int row = (D == 64 ? half : 0) + unit / 2 % 4 * 16 + lane / 4;
        uint32_t upper[4], lower[4];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            upper[n] = pack2(x[m][n].x * p.common.scale, x[m][n].y * p.common.scale, T());
            lower[n] = pack2(x[m][n].z * p.common.scale, x[m][n].w * p.common.scale, T());
        }
        transpose_quad(upper);
        transpose_quad(lower);
#pragma unroll
        for (int n = 0; n < 2; n++, row += 8) {
            if (row >= t.rows || column >= problem.d) { continue; }
            const uint32_t (&word)[4] = n == 0 ? upper : lower;
            char *const at = fgqa_row_address(problem.view[FGQA_ARG_dq], sizeof(T), t.b, t.h, t.first_row + row) + 2 * column;
            store_eight(at, word, p.vector_dq);
        }
    }
}

/* The tile of a number, roughly in the order in which they become complete: band by band of KV heads; the tiles from `low` on
 * upwards, those before in spans, each from its end to its begin or, BY_HEAD, so for each head; but last those that shifted
 * walks come to in the end. */
static __device__ __forceinline__ dq_tile numbered_tile(const bwd_params &p, uint32_t number)
{
    const fgqa_problem &problem = p.common.problem;
    int32_t rows;
    if (problem.varlen) {
        const int32_t h = (int32_t)(number / (uint32_t)p.w.head_tiles), n = (int32_t)(number % (uint32_t)p.w.head_tiles), b = bwd_packed_sequence(problem, BLOCK_Q, n);
        const fgqa_sequence sequence = fgqa_device_sequence(problem, b, &rows);
        return dq_tile_of(p, sequence, b, h, n - (int32_t)(sequence.q_row / BLOCK_Q) - b);
    }
    const uint32_t group = (uint32_t)problem.g, tiles = (uint32_t)p.w.head_tiles, in_band = p.finish.band * tiles * group;
    const uint32_t first = number / in_band * p.finish.band, rest = number % in_band, width = min(p.finish.band, (uint32_t)(problem.b * problem.hk) - first);
    const uint32_t pair = first + rest % width, at = (rest / width + p.finish.late) % (tiles * group), span = p.finish.span;
    uint32_t begin = p.finish.low, tile = begin + (at - begin * group) / group, head = at % group;
    if (at < begin * group) {
        begin = at / (span * group) * span;
        const uint32_t within = at - begin * group, length = min(span, p.finish.low - begin);
        tile = begin + length - 1 - (p.by_head ? within % length : within / group);
        head = p.by_head ? within / length : within % group;
    }
    const int32_t b = (int32_t)(pair / (uint32_t)problem.hk), h = (int32_t)(pair % (uint32_t)problem.hk * group + group - 1 - head);
    return dq_tile_of(p, fgqa_device_sequence(problem, b, &rows), b, h, (int32_t)tile);
}

static __device__ __forceinline__ bool is_complete(const dq_tile &t)
{
    return t.rows == 0 || (load_acquire_s32(t.turn) & (FGQA_BWD_FRESH - 1)) == t.complete;
}

/* A warp takes the number of a tile; false: there is none left. */
static __device__ __forceinline__ bool take_tile(const bwd_params &p, dq_tile *t)
{
    uint32_t number = 0;
    if (thread_index() % 32 == 0) { number = (uint32_t)atomicAdd((unsigned long long *)&p.w.control->finished, 1ull); }
    number = __shfl_sync(ALL_LANES, number, 0);
    if (number >= p.finish.tiles) { return false; }
    *t = numbered_tile(p, number);
    return true;
}

/* A warp waits for a tile and does what is left of it. Only when there are no more tasks: those that add to it are in work
 * elsewhere. */
template <int AT_ONCE> static __device__ __forceinline__ void finish_tile(const bwd_params &p, const dq_tile &t, int32_t unit)
{
    while (!__all_sync(ALL_LANES, is_complete(t))) { __nanosleep(100); }
    for (; t.rows > 0 && unit < UNITS; unit += AT_ONCE) { finish_units<AT_ONCE>(p, t, unit); }
}

/* A little of what the scheduler can do between tasks, without waiting; t is its own. false: no tile is left. */
static __device__ __forceinline__ bool finish_some(const bwd_params &p, dq_tile &t, int32_t &unit)
{
    if (unit == UNITS) {
        dq_tile next;
        if (!take_tile(p, &next)) { return false; }
        __syncwarp();
        if (thread_index() % 32 == 0) { t = next; }
        __syncwarp();
        unit = t.rows > 0 ? 0 : UNITS;
    } else if (unit > 0 || __all_sync(ALL_LANES, is_complete(t))) {
        finish_units<1>(p, t, unit++);
    } else {
        __nanosleep(200);
    }
    return true;
}

/* finish.tiles, .. of the main kernel's parameters. Under a causal mask a run of key tiles completes those query tiles which
 * no later one meets; a chain's second half completes the others on its way up. */
static decltype(bwd_params::finish) finish_order(const bwd_params &p, const fgqa_problem *problem, const fgqa_bwd_order &order, int32_t multiprocessors)
{
    const uint32_t tiles = (uint32_t)p.w.head_tiles, pairs = (uint32_t)(problem->b * problem->hk), in_work = (uint32_t)max(max(order.run, order.chain), multiprocessors / order.band);
    decltype(bwd_params::finish) f = {0, 1, tiles, tiles, 0};
    if (problem->varlen) { f.tiles = problem->b > 0 ? (uint32_t)problem->hq * tiles : 0; }
    if (problem->varlen || pairs == 0 || tiles == 0) { return f; }
    f.tiles = pairs * (uint32_t)problem->g * tiles;
    f.band = min(max(1u, p.band / (uint32_t)p.w.splits), pairs);
    if (fgqa_bwd_causal(problem) || p.by_head) { f.span = min(tiles, (order.chain > 0 ? (uint32_t)order.chain : in_work) * (BLOCK_K / BLOCK_Q)); }
    if (order.chain > 0) { f.low = (tiles + 1) / 2; }
    if (p.shift.tiles > 0 && !fgqa_bwd_causal(problem)) { f.late = (uint32_t)fgqa_bwd_late_places(&p.shift) * (uint32_t)p.w.splits; }
    return f;
}
