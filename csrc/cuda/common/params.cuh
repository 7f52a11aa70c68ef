/* params.cuh - what a kernel is given: the problem itself, and the constants derived from it once on the host.
 *
 * Everything here follows csrc/core/problem.h; the contents of device-side index arrays (lengths, cu_seqlens) are clamped
 * where they are read, so that no value in them leads outside the tensors.
 */
#pragma once
#include "../../core/problem.h"

struct fgqa_params {
    fgqa_problem problem;
    float scale;                      /* of q.k, natural units */
    float softcap, inv_softcap;       /* 0: off */
    float dropout_scale;
    int32_t vector_q, vector_k, vector_v, vector_out, vector_dout;   /* 16-byte access is possible: address and strides allow it */
};

/* Whether every row of the view starts on 16 bytes. */
static inline int32_t fgqa_view_is_vector(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *view = &p->view[arg];
    const int64_t bytes = p->dtype == FGQA_F32 ? 4 : 2;
    return (uintptr_t)view->data % 16 == 0 && view->stride_s * bytes % 16 == 0 && view->stride_b * bytes % 16 == 0
        && view->stride_h * bytes % 16 == 0;
}

static inline fgqa_params fgqa_params_make(const fgqa_problem *problem)
{
    fgqa_params p;
    p.problem = *problem;
    p.scale = (float)problem->scale;
    p.softcap = (float)problem->softcap;
    p.inv_softcap = problem->softcap != 0.0 ? (float)(1.0 / problem->softcap) : 0.0f;
    p.dropout_scale = (float)fgqa_dropout_scale(problem->dropout_threshold);
    p.vector_q = fgqa_view_is_vector(problem, FGQA_ARG_q);
    p.vector_k = fgqa_view_is_vector(problem, FGQA_ARG_k);
    p.vector_v = fgqa_view_is_vector(problem, FGQA_ARG_v);
    p.vector_out = fgqa_view_is_vector(problem, FGQA_ARG_out);
    p.vector_dout = fgqa_view_is_vector(problem, FGQA_ARG_dout);
    return p;
}

#if defined(__CUDACC__)

/* Element (b, h, s, 0) of a view, as a byte address. `bytes`: of one element. */
static __device__ __forceinline__ char *fgqa_row_address(const fgqa_view &view, int64_t bytes, int64_t b, int64_t h, int64_t s)
{
    return (char *)view.data + bytes * (b * view.stride_b + h * view.stride_h + s * view.stride_s);
}

/* Rows of a packed tensor that sequence b owns: [begin, begin + length) inside [0, total). */
static __device__ __forceinline__ int32_t fgqa_device_length(const int32_t *cu_seqlens, int32_t b, int64_t total, int64_t *begin)
{
    const int64_t first = cu_seqlens[b], last = cu_seqlens[b + 1];
    *begin = first < 0 ? 0 : first > total ? total : first;
    const int64_t end = last > total ? total : last;
    return end > *begin ? (int32_t)(end - *begin) : 0;
}

/* fgqa_problem_sequence() for lengths that live on the device. `rows` is how many query rows of the sequence there are to
 * write: mask.sq of them see keys by the mask rule, the others are padding. Lengths are not limited by max_q and max_kv
 * (which may be too small) unless a mask or bias has just that many elements. */
static __device__ __forceinline__ fgqa_sequence fgqa_device_sequence(const fgqa_problem &p, int32_t b, int32_t *rows)
{
    fgqa_sequence s = {0, 0, {p.sq, p.sk, 0, p.left, p.right, p.chunk}};
    *rows = p.sq;
    if (p.cu_seqlens_q) {
        s.mask.sq = fgqa_device_length(p.cu_seqlens_q, b, p.total_q, &s.q_row);
        s.mask.sk = fgqa_device_length(p.cu_seqlens_kv, b, p.total_k, &s.k_row);
        if (p.view[FGQA_ARG_mask].data || p.view[FGQA_ARG_bias].data) {
            s.mask.sq = min(s.mask.sq, p.sq);
            s.mask.sk = min(s.mask.sk, p.sk);
        }
        *rows = s.mask.sq;
    }
    if (p.q_lens) { s.mask.sq = max(0, min(p.q_lens[b], p.sq)); }
    if (p.kv_lens) { s.mask.sk = max(0, min(p.kv_lens[b], p.sk)); }
    if (p.cache.page_size) {
        const fgqa_cache &c = p.cache;
        const int64_t used = (c.lens ? c.lens[b] : c.slots) + (int64_t)(c.new_lens ? max(0, min(c.new_lens[b], c.new_max)) : c.new_max);
        const int32_t end = fgqa_clamp(used, 0, c.capacity), pad = c.left_pad ? max(0, min(c.left_pad[b], end)) : 0;
        s.k_row = pad;
        s.mask.sk = end - pad;
    }
    s.mask.diag = p.align == FGQA_ALIGN_BOTTOM_RIGHT ? s.mask.sk - s.mask.sq : 0;
    return s;
}

/* Packed rows first, first + 1, ... of one KV head: row `local` is query row `i(local)` of head `h(local)` of the group. */
struct packed_rows {
    int32_t i0, h0, group;
    uint32_t inverse;           /* ceil(2^32 / group), exact for quotients of numbers below 2^32 / group; 0: divide */
    __device__ __forceinline__ uint32_t quotient(uint32_t x) const 
    {
        return group == 1 ? x : inverse ? __umulhi(x, inverse) : x / (uint32_t)group;
    }
    __device__ __forceinline__ int32_t i(int32_t local) const { return i0 + (int32_t)quotient((uint32_t)(h0 + local)); }
    __device__ __forceinline__ int32_t h(int32_t local) const { return h0 + local - (int32_t)quotient((uint32_t)(h0 + local)) * group; }
};

static __device__ __forceinline__ packed_rows packed_rows_at(int64_t first, int32_t group)
{
    packed_rows r = {0, 0, group, 0};
    if (first <= UINT32_MAX) {                         /* a 64-bit division takes a microsecond's tenth, and everybody waits */
        r.i0 = (int32_t)((uint32_t)first / (uint32_t)group);
    } else {
        r.i0 = fgqa_packed_row_q(first, group);
    }
    r.h0 = (int32_t)(first - (int64_t)r.i0 * group);
    if (group > 1 && group < 32768) { r.inverse = UINT32_MAX / (uint32_t)group + 1; }
    return r;
}

#endif
