/* cache_copy.cu - what a call sees of its KV cache, copied. Elements of float8 are exact in q's dtype; their scales
 * are for the reader.
 * Lengths and the table are read here, on the device. A block takes runs of slots of one head of K or of V, 16 bytes a thread.
 */
#include "cache_copy.h"

#include "../common/launch.cuh"
#include "../sm80/cache_tile.cuh"

static constexpr int THREADS = 256, ROUNDS = 4, MOST_BLOCKS = 4096, ELEMENTS = 8;

struct copy_job {
    fgqa_problem problem;
    fgqa_view to[2];            /* K, V */
    int32_t lane_bits[2];       /* 2^ as many threads have a row: a power of two, not fewer than the row has pieces */
    uint32_t blocks;            /* of a head of K or V */
};

/* Eight elements that a thread has loaded, as T. */
template <typename T> static __device__ __forceinline__ uint4 widened(uint2 bytes)
{
    uint32_t word[ELEMENTS / 2];
#pragma unroll
    for (int n = 0; n < ELEMENTS / 2; n++) {
        const uint32_t two = (n < 2 ? bytes.x : bytes.y) >> 16 * (n % 2);
        word[n] = pack2(float8_value(two), float8_value(two >> 8), T());
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename T> static __device__ __forceinline__ void copy_head(const copy_job &job)
{
    const fgqa_problem &p = job.problem;
    const fgqa_cache &c = p.cache;
    const uint32_t part = blockIdx.x % job.blocks, head = blockIdx.x / job.blocks / 2;
    const int kv = (int)(blockIdx.x / job.blocks % 2), bits = kv ? job.lane_bits[1] : job.lane_bits[0];
    const int32_t b = (int32_t)(head / (uint32_t)p.hk), kv_head = (int32_t)(head % (uint32_t)p.hk);
    const fgqa_view &from = p.view[kv ? FGQA_ARG_v : FGQA_ARG_k], &to = job.to[kv];
    const int32_t column = (int32_t)(threadIdx.x & (1u << bits) - 1) * ELEMENTS, at_once = THREADS >> bits;
    if (column >= (kv ? p.dv : p.d)) { return; }
    int32_t rows;
    const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
    if (sequence.mask.sq < 1) { return; }
    const fgqa_range seen = fgqa_kv_range(&sequence.mask, 0, sequence.mask.sq);
    if (seen.begin == seen.end) { return; }
    const int32_t pad = (int32_t)sequence.k_row, begin = pad + max(seen.begin - FGQA_COPY_MARGIN, 0), end = pad + seen.end;
    const int32_t keys = pad + sequence.mask.sk, last = end < p.sk - FGQA_COPY_MARGIN ? end + FGQA_COPY_MARGIN : p.sk;
    const int32_t *const table = c.table ? c.table + b * c.table_stride : NULL;
    const bool float8 = from.dtype == FGQA_F8E4M3;
    for (int64_t run = begin + (int64_t)part * ROUNDS * at_once; run < last; run += (int64_t)job.blocks * ROUNDS * at_once) {
        const int32_t first = (int32_t)run + (int32_t)(threadIdx.x >> bits);
        uint4 x[ROUNDS];
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            const int32_t slot = first + n * at_once;
            slot_place at = {b, (uint32_t)slot};
            x[n] = make_uint4(0, 0, 0, 0);
            if (slot >= keys) { continue; }
            if (table) { at = place_of_slot(c, table, (uint32_t)slot); }
            if (at.page < 0) { continue; }
            const char *const row = fgqa_row_address(from, cache_bytes(from), at.page, kv_head, at.slot) + cache_bytes(from) * column;
            if (float8) {
                const uint2 bytes = *(const uint2 *)row;
                x[n].x = bytes.x;
                x[n].y = bytes.y;
            } else {
                x[n] = *(const uint4 *)row;
            }
        }
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            const int32_t slot = first + n * at_once;
            if (slot >= last) { continue; }
            *(uint4 *)(fgqa_row_address(to, sizeof(T), b, kv_head, slot) + (int)sizeof(T) * column) = float8 ? widened<T>(make_uint2(x[n].x, x[n].y)) : x[n];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) fgqa_cache_copy_bf16(const __grid_constant__ copy_job job) { copy_head<bf16>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) fgqa_cache_copy_f16(const __grid_constant__ copy_job job) { copy_head<f16>(job); }

static int32_t lane_bits(int32_t columns)
{
    int32_t bits = 0;
    while (ELEMENTS << bits < columns) { bits++; }
    return bits;
}

extern "C" int fgqa_cache_copy_launch(const fgqa_problem *p, const fgqa_problem *copy, void *stream)
{
    const copy_job form = {*p, {copy->view[FGQA_ARG_k], copy->view[FGQA_ARG_v]}, {lane_bits(p->d), lane_bits(p->dv)}, 1};
    const int64_t heads = 2 * (int64_t)p->b * p->hk, at_once = ROUNDS * (THREADS >> form.lane_bits[0]);
    const int64_t wanted = (p->sk + at_once - 1) / at_once, room = MOST_BLOCKS / heads;
    copy_job job = form;
    job.blocks = (uint32_t)(wanted < room ? wanted : room > 0 ? room : 1);
    return launch_kernel(p->dtype == FGQA_BF16 ? fgqa_cache_copy_bf16 : fgqa_cache_copy_f16, (uint32_t)(heads * job.blocks), THREADS, 0, stream, job);
}
