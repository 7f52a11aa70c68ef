/* append.cu - new keys and values into a KV cache: rotary embedding, division by the cache's scale, its dtype; and q, rotated, to
 * where attention reads it. One warp a row; lengths, tables and positions are read here, on the device.
 *
 * As on the CPU (cpu/append.c) arithmetic is float64 and each result is rounded once; what is not changed is copied bit by bit.
 * A slot outside of the cache is not written, a position outside of the angles is moved to the nearest.
 */
#include "append.h"

#include <cuda_fp8.h>

#include "../common/cache_slot.cuh"
#include "../common/launch.cuh"
#include "../common/numeric.cuh"
#include "../common/params.cuh"

static constexpr int WARPS = 4;

/* Rows of one launch: of each sequence, new rows x KV heads, then query rows x query heads. */
struct append_job {
    fgqa_problem problem;
    fgqa_view q_turned;
    int64_t new_rows, rows;      /* of a sequence: K and V rows to append; those and rows of q */
};

static __device__ __forceinline__ int bytes_of(fgqa_dtype dtype) { return dtype == FGQA_F32 ? 4 : dtype == FGQA_F8E4M3 ? 1 : dtype == FGQA_F64 ? 8 : 2; }

static __device__ __forceinline__ double load_element(const char *row, int64_t index, fgqa_dtype dtype)
{
    return dtype == FGQA_F64 ? ((const double *)row)[index] : (double)load_float(row, index, dtype);
}

static __device__ __forceinline__ void store_element(char *row, int64_t index, double x, fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F8E4M3: ((uint8_t *)row)[index] = __nv_cvt_double_to_fp8(x, __NV_SATFINITE, __NV_E4M3); break;
    case FGQA_F16: ((__half *)row)[index] = __double2half(x); break;
    case FGQA_BF16: ((__nv_bfloat16 *)row)[index] = __double2bfloat16(x); break;
    default: ((f32 *)row)[index] = (float)x; break;
    }
}

static __device__ __forceinline__ void copy_element(char *to, const char *from, fgqa_dtype dtype)
{
    if (dtype == FGQA_F32) { *(uint32_t *)to = *(const uint32_t *)from; } else { *(uint16_t *)to = *(const uint16_t *)from; }
}

/* Elements [0, cols) of a row of `from` into a row of `to`, the first 2 * pairs rotated by the angles of `position`. */
static __device__ void convert_row(char *to, const fgqa_view &to_view, const char *from, const fgqa_view &from_view, int32_t cols,
                                   const fgqa_rotary &rotary, int32_t pairs, int64_t position, double scale)
{
    const int lane = threadIdx.x % 32, to_bytes = bytes_of(to_view.dtype), from_bytes = bytes_of(from_view.dtype);
    for (int32_t n = lane; n < pairs; n += 32) {
        const int64_t at = position < 0 ? 0 : position < rotary.positions ? position : rotary.positions - 1;
        const int32_t first = fgqa_rotary_a(n, rotary.interleaved), second = fgqa_rotary_b(n, pairs, rotary.interleaved);
        const double cosine = load_element((const char *)rotary.cos.data, at * rotary.cos.stride_s + n * rotary.cos.stride_d, rotary.cos.dtype);
        const double sine = load_element((const char *)rotary.sin.data, at * rotary.sin.stride_s + n * rotary.sin.stride_d, rotary.sin.dtype);
        const double a = load_element(from, first * from_view.stride_d, from_view.dtype), b = load_element(from, second * from_view.stride_d, from_view.dtype);
        store_element(to, first * to_view.stride_d, FGQA_ROTARY_A(a, b, cosine, sine) / scale, to_view.dtype);
        store_element(to, second * to_view.stride_d, FGQA_ROTARY_B(a, b, cosine, sine) / scale, to_view.dtype);
    }
    for (int32_t c = 2 * pairs + lane; c < cols; c += 32) {
        if (to_view.dtype == from_view.dtype) {
            copy_element(to + c * to_view.stride_d * to_bytes, from + c * from_view.stride_d * from_bytes, to_view.dtype);
        } else {
            store_element(to, c * to_view.stride_d, load_element(from, c * from_view.stride_d, from_view.dtype) / scale, to_view.dtype);
        }
    }
}

/* Row i of k_new and v_new of sequence b, KV head h, into its slot. */
static __device__ void append_row(const append_job &job, int32_t b, int32_t h, int32_t i, int64_t before)
{
    const fgqa_problem &p = job.problem;
    const fgqa_cache &c = p.cache;
    const int64_t slot = before + i;
    if (i >= (c.new_lens ? c.new_lens[b] : c.new_max) || slot < 0 || slot >= c.capacity) { return; }
    const slot_place own_page = {b, (uint32_t)slot}, at = c.table ? place_of_slot(c, c.table + b * c.table_stride, (uint32_t)slot) : own_page;
    if (at.page < 0) { return; }
    const int64_t position = c.rotary.offsets ? (int64_t)c.rotary.offsets[b] + i : slot;
    const fgqa_view &k = p.view[FGQA_ARG_k], &v = p.view[FGQA_ARG_v];
    const double k_scale = c.k_scale.data ? *(const float *)fgqa_row_address(c.k_scale, sizeof(float), b, h, 0) : 1.0;
    const double v_scale = c.v_scale.data ? *(const float *)fgqa_row_address(c.v_scale, sizeof(float), b, h, 0) : 1.0;
    convert_row(fgqa_row_address(k, bytes_of(k.dtype), at.page, h, at.slot), k, fgqa_row_address(c.k_new, bytes_of(c.k_new.dtype), b, h, i),
                c.k_new, p.d, c.rotary, c.rotary.pairs, position, k_scale);
    convert_row(fgqa_row_address(v, bytes_of(v.dtype), at.page, h, at.slot), v, fgqa_row_address(c.v_new, bytes_of(c.v_new.dtype), b, h, i),
                c.v_new, p.dv, c.rotary, 0, 0, v_scale);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) fgqa_append_kernel(const __grid_constant__ append_job job)
{
    const fgqa_problem &p = job.problem;
    const fgqa_cache &c = p.cache;
    const int64_t step = (int64_t)gridDim.x * WARPS;
    for (int64_t n = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32; n < p.b * job.rows; n += step) {
        const int32_t b = (int32_t)(n / job.rows);
        int64_t row = n % job.rows;
        const int64_t before = c.lens ? c.lens[b] : c.slots;
        if (row < job.new_rows) {
            append_row(job, b, (int32_t)(row % p.hk), (int32_t)(row / p.hk), before);
            continue;
        }
        row -= job.new_rows;
        const int32_t i = (int32_t)(row / p.hq), h = (int32_t)(row % p.hq);
        int32_t rows;
        const fgqa_sequence sequence = fgqa_device_sequence(p, b, &rows);
        const int64_t slot = sequence.k_row + sequence.mask.diag + i;      /* the last row sits at the last slot */
        const int64_t position = c.rotary.offsets ? c.rotary.offsets[b] + slot - before : slot;
        const fgqa_view &q = p.view[FGQA_ARG_q];
        convert_row(fgqa_row_address(job.q_turned, bytes_of(q.dtype), b, h, i), job.q_turned, fgqa_row_address(q, bytes_of(q.dtype), b, h, i), q, p.d,
                    c.rotary, c.rotary.pairs, position, 1.0);
    }
}

extern "C" int fgqa_append_launch(const fgqa_problem *p, const fgqa_view *q_turned, void *stream)
{
    append_job job = {*p, *q_turned, (int64_t)p->cache.new_max * p->hk, 0};
    job.rows = job.new_rows + (q_turned->data ? (int64_t)p->sq * p->hq : 0);
    const int64_t blocks = (p->b * job.rows + WARPS - 1) / WARPS;
    if (blocks == 0) { return cudaSuccess; }
    return launch_kernel(fgqa_append_kernel, (uint32_t)(blocks < 65536 ? blocks : 65536), 32 * WARPS, 0, stream, job);
}
