/* problem.c - every check of an attention call, with its sentence, and its lowering to fgqa_problem. The tensors that act on
 * scores are checked in problem_scores.c, shapes of results in problem_results.c.
 *
 * A sentence names the argument, what was got, what is allowed and the fix.
 */
#include "problem_check.h"
#include "rows.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define MAX_HEAD_DIM FGQA_MAX_HEAD_DIM

const char *fgqa_arg_name(fgqa_arg arg)
{
    static const char *const names[FGQA_ARG_COUNT] = {
#define FGQA_ARG_NAME(name) #name,
        FGQA_INPUTS(FGQA_ARG_NAME)
        FGQA_RESULTS(FGQA_ARG_NAME)
#undef FGQA_ARG_NAME
    };
    return (unsigned)arg < FGQA_ARG_COUNT ? names[arg] : "?";
}

/* ---- what may come along, and arrays in general ---- */

typedef enum { REFUSED, OPTIONAL, REQUIRED } presence;

static presence expected(fgqa_pass pass, fgqa_arg arg)
{
    const int forward = pass == FGQA_PASS_FWD, backward = pass == FGQA_PASS_BWD;
    switch (arg) {
    case FGQA_ARG_q: case FGQA_ARG_k:
        return REQUIRED;
    case FGQA_ARG_v:
        return forward || backward ? REQUIRED : REFUSED;
    case FGQA_ARG_rows:
        return pass == FGQA_PASS_ROWS ? REQUIRED : REFUSED;
    case FGQA_ARG_dout:
        return backward ? REQUIRED : REFUSED;
    case FGQA_ARG_out: case FGQA_ARG_lse:
        return backward ? REQUIRED : forward ? OPTIONAL : REFUSED;
    case FGQA_ARG_dlse: case FGQA_ARG_dq: case FGQA_ARG_dk: case FGQA_ARG_dv: case FGQA_ARG_dbias: case FGQA_ARG_dsink:
        return backward ? OPTIONAL : REFUSED;
    case FGQA_ARG_weights:
        return forward || backward ? REFUSED : OPTIONAL;
    default:
        return OPTIONAL;
    }
}

static const char *function_name(fgqa_pass pass)
{
    return pass == FGQA_PASS_FWD ? "attention" : pass == FGQA_PASS_BWD ? "attention_backward" : "attention_weights";
}

fgqa_status fgqa_check_extents(const fgqa_tensor *t, const char *name)
{
    int64_t low = 0, high = 0, bytes = (int64_t)fgqa_dtype_bytes(t->dtype);
    int empty = 0, overflow = 0;
    for (int32_t axis = 0; axis < t->ndim; axis++) {
        if (t->shape[axis] < 0) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: extents must be 0 or more", name, fgqa_shape_text(t).s);
        }
        if (t->shape[axis] > INT32_MAX) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: every extent must be below 2^31; split axis %d", name,
                             fgqa_shape_text(t).s, (int)axis);
        }
        empty |= t->shape[axis] == 0;
    }
    for (int32_t axis = 0; axis < t->ndim && !empty; axis++) {
        int64_t reach;
        if (t->shape[axis] == 1) { continue; }
        overflow |= __builtin_mul_overflow(t->stride[axis], t->shape[axis] - 1, &reach) ||
                    __builtin_mul_overflow(reach, bytes, &reach);
        if (overflow) { break; }
        overflow |= reach < 0 ? __builtin_add_overflow(low, reach, &low) : __builtin_add_overflow(high, reach, &high);
    }
    overflow = overflow || __builtin_add_overflow(high, bytes, &high) || __builtin_sub_overflow(high, low, &high);
    if (overflow) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s and strides that reach beyond 64-bit addresses: no memory can hold it; "
                         "pass a view with the strides of its own memory", name, fgqa_shape_text(t).s);
    }
    return FGQA_OK;
}

static fgqa_status check_arrays(const fgqa_request *r)
{
    for (int n = 0; n < FGQA_ARG_COUNT; n++) {
        const fgqa_tensor *t = r->tensor[n];
        const char *name = fgqa_arg_name((fgqa_arg)n);
        const presence allowed = expected(r->pass, (fgqa_arg)n);
        if (t == NULL) {
            if (allowed == REQUIRED) {
                return fgqa_fail(FGQA_ERROR_VALUE, "%s is missing: %s needs it", name, function_name(r->pass));
            }
            continue;
        }
        if (allowed == REFUSED) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s is not an argument of %s; leave it out", name, function_name(r->pass));
        }
        FGQA_TRY(fgqa_check_extents(t, name));
        const fgqa_device home = r->tensor[FGQA_ARG_q]->device;
        if (t->device.type != home.type || t->device.index != home.index) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s is on %s but q is on %s: all arrays of a call must be on one device; move %s to %s",
                             name, fgqa_device_text(t->device).s, fgqa_device_text(home).s, name, fgqa_device_text(home).s);
        }
    }
    return FGQA_OK;
}

fgqa_status fgqa_check_vector(const fgqa_tensor *t, const char *name, fgqa_dtype dtype, int64_t length, const char *form, const char *fix)
{
    if (t->dtype == FGQA_BOOL) {
        return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype bool: it must be %s, numbers and no mask; numpy.flatnonzero(mask) are those of a mask",
                         name, fgqa_dtype_name(dtype));
    }
    if (t->dtype != dtype) {
        return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s: it must be %s; convert it to %s%s", name, fgqa_dtype_name(t->dtype),
                         fgqa_dtype_name(dtype), fgqa_dtype_name(dtype),
                         dtype == FGQA_I64 ? ", or give Python's integers (JAX has int64 with jax_enable_x64 alone)" : "");
    }
    if (t->ndim != 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: it must have 1 dimension, %s; %s", name, fgqa_shape_text(t).s, form, fix);
    }
    if (length >= 0 && t->shape[0] != length) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: it must be %s = (%lld,); %s", name, fgqa_shape_text(t).s, form,
                         (long long)length, fix);
    }
    if (t->shape[0] > 1 && t->stride[0] != 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has stride %lld: it must be contiguous; pass a copy", name, (long long)t->stride[0]);
    }
    return FGQA_OK;
}

/* ---- q, k, v ---- */

static const char *rank_text(const fgqa_problem *p)
{
    return p->varlen ? "[total, h, d]"
           : p->rank == 3 ? (p->layout == FGQA_LAYOUT_BSHD ? "[s, h, d]" : "[h, s, d]")
                          : (p->layout == FGQA_LAYOUT_BSHD ? "[b, s, h, d]" : "[b, h, s, d]");
}

static fgqa_status check_ranks(const fgqa_request *r, fgqa_problem *p)
{
    const fgqa_tensor *q = r->tensor[FGQA_ARG_q];
    const int has_cu_q = r->tensor[FGQA_ARG_cu_seqlens_q] != NULL, has_cu_kv = r->tensor[FGQA_ARG_cu_seqlens_kv] != NULL;
    if (has_cu_q != has_cu_kv) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is given without %s: packed sequences need both, or neither; give both",
                         has_cu_q ? "cu_seqlens_q" : "cu_seqlens_kv", has_cu_q ? "cu_seqlens_kv" : "cu_seqlens_q");
    }
    p->varlen = has_cu_q;
    if (p->varlen && r->layout != FGQA_LAYOUT_BHSD) {
        return fgqa_fail(FGQA_ERROR_VALUE, "layout is \"bshd\" but cu_seqlens are given: packed tensors are always [total, h, d]; "
                         "leave layout out");
    }
    if (p->varlen && q->ndim != 3) {
        return fgqa_fail(FGQA_ERROR_VALUE, "q has %d dimension%s, shape %s: with cu_seqlens it must have 3, [total, h, d]; "
                         "join the sequences along the first axis", (int)q->ndim, q->ndim == 1 ? "" : "s", fgqa_shape_text(q).s);
    }
    if (q->ndim != 3 && q->ndim != 4) {
        return fgqa_fail(FGQA_ERROR_VALUE, "q has %d dimension%s, shape %s: it must have 4, %s, or 3, %s; add or merge axes",
                         (int)q->ndim, q->ndim == 1 ? "" : "s", fgqa_shape_text(q).s,
                         r->layout == FGQA_LAYOUT_BSHD ? "[b, s, h, d]" : "[b, h, s, d]",
                         r->layout == FGQA_LAYOUT_BSHD ? "[s, h, d]" : "[h, s, d]");
    }
    p->rank = q->ndim;
    p->layout = r->layout;
    for (int n = FGQA_ARG_k; n <= FGQA_ARG_v; n++) {
        const fgqa_tensor *t = r->tensor[n];
        if (t && t->ndim != q->ndim) {
            const char *name = fgqa_arg_name((fgqa_arg)n);
            return fgqa_fail(FGQA_ERROR_VALUE, "%s has %d dimension%s, shape %s, but q has %d, shape %s: q, k and v must have the same "
                             "number; bring %s to %s", name, (int)t->ndim, t->ndim == 1 ? "" : "s", fgqa_shape_text(t).s,
                             (int)q->ndim, fgqa_shape_text(q).s, name, rank_text(p));
        }
    }
    return FGQA_OK;
}

static fgqa_status check_dtypes(const fgqa_request *r, fgqa_problem *p)
{
    const fgqa_dtype dtype = r->tensor[FGQA_ARG_q]->dtype;
    for (int n = FGQA_ARG_q; n <= FGQA_ARG_v; n++) {
        const fgqa_tensor *t = r->tensor[n];
        if (t == NULL) { continue; }
        const char *name = fgqa_arg_name((fgqa_arg)n);
        if (t->dtype == FGQA_F8E4M3) {
            return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "%s has dtype float8_e4m3: %s takes float16, bfloat16, float32 and float64; "
                             "convert it to bfloat16", name, function_name(r->pass));
        }
        if (t->dtype != FGQA_F64 && t->dtype != FGQA_F32 && t->dtype != FGQA_F16 && t->dtype != FGQA_BF16) {
            return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s: it must be float16, bfloat16, float32 or float64; convert it to float32",
                             name, fgqa_dtype_name(t->dtype));
        }
        if (t->dtype != dtype) {
            return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s but q has %s: q, k and v must have one dtype; convert %s to %s", name,
                             fgqa_dtype_name(t->dtype), fgqa_dtype_name(dtype), name, fgqa_dtype_name(dtype));
        }
    }
    if (dtype == FGQA_F64 && p->device.type == FGQA_CUDA) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "q has dtype float64 on %s: float64 runs on the CPU only; convert to float32, or "
                         "move the tensors to the CPU", fgqa_device_text(p->device).s);
    }
    p->dtype = dtype;
    p->lse_dtype = dtype == FGQA_F64 ? FGQA_F64 : FGQA_F32;
    return FGQA_OK;
}

fgqa_status fgqa_check_head_dim(const char *name, int64_t extent, const char *letter)
{
    if (extent < 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has head dim %s = %lld: it must be 1 to %d; is the last axis the head dim?", name, letter,
                         (long long)extent, MAX_HEAD_DIM);
    }
    if (extent > MAX_HEAD_DIM) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "%s has head dim %s = %lld: kernels take 1 to %d; split or project the heads to at "
                         "most %d", name, letter, (long long)extent, MAX_HEAD_DIM, MAX_HEAD_DIM);
    }
    return FGQA_OK;
}

enum { B, H, S, D };

/* One extent that k or v must share with another tensor. */
static fgqa_status check_same(const char *name, const fgqa_tensor *t, const char *other, const fgqa_tensor *reference,
                              const char *what, int64_t got, int64_t wanted, const char *rank)
{
    if (got == wanted) { return FGQA_OK; }
    return fgqa_fail(FGQA_ERROR_VALUE, "%s has %s %lld but %s has %lld: they must be equal; shapes are %s %s and %s %s, read as %s; "
                     "slice, repeat or transpose %s", name, what, (long long)got, other, (long long)wanted, name,
                     fgqa_shape_text(t).s, other, fgqa_shape_text(reference).s, rank, name);
}

static fgqa_status check_heads(const fgqa_problem *p, int64_t hq, int64_t hk, int64_t sq, int64_t sk)
{
    if (hq < 1 || hk < 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has 0 heads: at least 1 is needed; tensors are read as %s", hq < 1 ? "q" : "k", rank_text(p));
    }
    if (hq % hk != 0) {
        const int other_fits = !p->varlen && sq > 0 && sk > 0 && sq % sk == 0;
        return fgqa_fail(FGQA_ERROR_VALUE, "k has %lld heads but q has %lld: query heads must be a multiple of KV heads "
                         "(q heads %lld %% k heads %lld != 0); repeat or drop heads%s", (long long)hk, (long long)hq, (long long)hq,
                         (long long)hk,
                         !other_fits ? "" : p->layout == FGQA_LAYOUT_BHSD ? ", or say layout=\"bshd\" if heads are the axis before the last"
                                                                         : ", or say layout=\"bhsd\" if heads come before the sequence");
    }
    return FGQA_OK;
}

static fgqa_status read_qkv(const fgqa_request *r, fgqa_problem *p)
{
    FGQA_TRY(check_ranks(r, p));
    FGQA_TRY(check_dtypes(r, p));
    const fgqa_tensor *q = r->tensor[FGQA_ARG_q], *k = r->tensor[FGQA_ARG_k], *v = r->tensor[FGQA_ARG_v];
    const fgqa_form form = fgqa_tensor_form(p);
    const char *rank = rank_text(p);
    const int64_t b = form.axis[B] < 0 ? 1 : q->shape[form.axis[B]];
    const int64_t hq = q->shape[form.axis[H]], hk = k->shape[form.axis[H]];
    const int64_t sq = q->shape[form.axis[S]], sk = k->shape[form.axis[S]];
    const int64_t d = q->shape[form.axis[D]], dv = v ? v->shape[form.axis[D]] : 0;

    FGQA_TRY(fgqa_check_head_dim("q", d, "d"));
    FGQA_TRY(check_same("k", k, "q", q, "head dim", k->shape[form.axis[D]], d, rank));
    if (form.axis[B] >= 0) {
        FGQA_TRY(check_same("k", k, "q", q, "batch size", k->shape[form.axis[B]], b, rank));
    }
    FGQA_TRY(check_heads(p, hq, hk, sq, sk));
    if (v) {
        FGQA_TRY(fgqa_check_head_dim("v", dv, "dv"));
        if (form.axis[B] >= 0) {
            FGQA_TRY(check_same("v", v, "k", k, "batch size", v->shape[form.axis[B]], b, rank));
        }
        FGQA_TRY(check_same("v", v, "k", k, "head count", v->shape[form.axis[H]], hk, rank));
        FGQA_TRY(check_same("v", v, "k", k, "length", v->shape[form.axis[S]], sk, rank));
        p->view[FGQA_ARG_v] = fgqa_form_view(&form, v);
    }
    p->view[FGQA_ARG_q] = fgqa_form_view(&form, q);
    p->view[FGQA_ARG_k] = fgqa_form_view(&form, k);
    p->b = (int32_t)b;
    p->hq = (int32_t)hq;
    p->hk = (int32_t)hk;
    p->g = (int32_t)(hq / hk);
    p->sq = (int32_t)sq;
    p->sk = (int32_t)sk;
    p->d = (int32_t)d;
    p->dv = (int32_t)dv;
    p->total_q = b * sq;
    p->total_k = b * sk;
    return FGQA_OK;
}

/* ---- lengths ---- */

/* Offsets start at 0, never decrease and end at the number of rows; *longest becomes the largest sequence. */
static fgqa_status check_offsets(const int32_t *offsets, int32_t b, int64_t total, fgqa_arg arg, const char *tensor, int32_t *longest)
{
    const char *name = fgqa_arg_name(arg);
    *longest = 0;
    if (offsets[0] != 0) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s[0] is %d: offsets must start at 0; prepend a 0 to the running sums", name, (int)offsets[0]);
    }
    for (int32_t n = 0; n < b; n++) {
        if (offsets[n + 1] < offsets[n]) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s[%d] is %d, less than %s[%d] = %d: offsets must not decrease; pass running sums of the "
                             "lengths", name, (int)n + 1, (int)offsets[n + 1], name, (int)n, (int)offsets[n]);
        }
        const int32_t length = offsets[n + 1] - offsets[n];
        if (length > *longest) { *longest = length; }
    }
    if (offsets[b] != total) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s ends at %d but %s has %lld rows: the last offset must be that number; slice %s or fix the "
                         "lengths", name, (int)offsets[b], tensor, (long long)total, tensor);
    }
    return FGQA_OK;
}

int64_t fgqa_score_extent(const fgqa_request *r, int32_t from_end)
{
    static const fgqa_arg args[] = {FGQA_ARG_mask, FGQA_ARG_bias};
    for (int n = 0; n < 2; n++) {
        const fgqa_tensor *t = r->tensor[args[n]];
        if (t && t->ndim >= 2 && t->shape[t->ndim - from_end] > 1) { return t->shape[t->ndim - from_end]; }
    }
    return 0;
}

/* The extent to walk: the caller's bound if given, else the longest sequence; on a GPU, where offsets are not read, what mask
 * or bias were made for, else all rows. */
static fgqa_status check_bound(const fgqa_problem *p, int64_t bound, int32_t longest, int64_t scores, int64_t total,
                               const char *name, const char *offsets, int32_t *extent)
{
    const int on_host = p->device.type == FGQA_CPU;
    if (bound < -1 || bound > INT32_MAX) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is %lld: it must be 0 to 2^31 - 1; leave it out, or pass the longest sequence", name,
                         (long long)bound);
    }
    if (bound < 0) {
        *extent = on_host ? longest : (int32_t)(scores > 0 ? scores : total);
        return FGQA_OK;
    }
    if (on_host && bound < longest) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is %lld but the longest sequence of %s has %d rows: it must be an upper bound; pass %d or "
                         "leave it out", name, (long long)bound, offsets, (int)longest, (int)longest);
    }
    *extent = (int32_t)bound;
    return FGQA_OK;
}

static fgqa_status read_packed(const fgqa_request *r, fgqa_problem *p)
{
    const fgqa_tensor *cu_q = r->tensor[FGQA_ARG_cu_seqlens_q], *cu_kv = r->tensor[FGQA_ARG_cu_seqlens_kv];
    int32_t longest_q = 0, longest_kv = 0;
    if (r->tensor[FGQA_ARG_q_lens] || r->tensor[FGQA_ARG_kv_lens]) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is given together with cu_seqlens: packed sequences carry their lengths in cu_seqlens; "
                         "leave it out", r->tensor[FGQA_ARG_q_lens] ? "q_lens" : "kv_lens");
    }
    FGQA_TRY(fgqa_check_vector(cu_q, "cu_seqlens_q", FGQA_I32, -1, "[b + 1]", "give running sums of the lengths"));
    if (cu_q->shape[0] < 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "cu_seqlens_q is empty: it must hold b + 1 offsets, [0] for no sequence");
    }
    FGQA_TRY(fgqa_check_vector(cu_kv, "cu_seqlens_kv", FGQA_I32, cu_q->shape[0], "[b + 1]", "give as many offsets as cu_seqlens_q has"));
    p->b = (int32_t)(cu_q->shape[0] - 1);
    p->cu_seqlens_q = cu_q->data;
    p->cu_seqlens_kv = cu_kv->data;
    if (p->device.type == FGQA_CPU) {
        FGQA_TRY(check_offsets(p->cu_seqlens_q, p->b, p->total_q, FGQA_ARG_cu_seqlens_q, "q", &longest_q));
        FGQA_TRY(check_offsets(p->cu_seqlens_kv, p->b, p->total_k, FGQA_ARG_cu_seqlens_kv, "k", &longest_kv));
    }
    FGQA_TRY(check_bound(p, r->max_q, longest_q, fgqa_score_extent(r, 2), p->total_q, "max_q", "cu_seqlens_q", &p->sq));
    return check_bound(p, r->max_kv, longest_kv, fgqa_score_extent(r, 1), p->total_k, "max_kv", "cu_seqlens_kv", &p->sk);
}

static fgqa_status read_padded_lengths(const fgqa_request *r, const fgqa_problem *p, fgqa_arg arg, int32_t extent,
                                       const char *tensor, const int32_t **lengths)
{
    const fgqa_tensor *t = r->tensor[arg];
    if (t == NULL) { return FGQA_OK; }
    FGQA_TRY(fgqa_check_vector(t, fgqa_arg_name(arg), FGQA_I32, p->b, "[b]", "give one length a sequence"));
    *lengths = t->data;
    for (int32_t n = 0; n < p->b && p->device.type == FGQA_CPU; n++) {
        if ((*lengths)[n] < 0 || (*lengths)[n] > extent) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s[%d] is %d but %s has length %d: lengths must be 0 to %d; clip it, or pad %s",
                             fgqa_arg_name(arg), (int)n, (int)(*lengths)[n], tensor, (int)extent, (int)extent, tensor);
        }
    }
    return FGQA_OK;
}

static fgqa_status read_lengths(const fgqa_request *r, fgqa_problem *p)
{
    if (p->varlen) { return read_packed(r, p); }
    if (r->max_q != -1 || r->max_kv != -1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is %lld but cu_seqlens are not given: maxima belong to packed sequences; leave it out",
                         r->max_q != -1 ? "max_q" : "max_kv", (long long)(r->max_q != -1 ? r->max_q : r->max_kv));
    }
    FGQA_TRY(read_padded_lengths(r, p, FGQA_ARG_q_lens, p->sq, "q", &p->q_lens));
    return read_padded_lengths(r, p, FGQA_ARG_kv_lens, p->sk, "k", &p->kv_lens);
}

/* ---- options ---- */

static fgqa_status check_window_side(int64_t side, int n, int32_t *bound)
{
    if (side < 0) {
        return fgqa_fail(FGQA_ERROR_VALUE, "window[%d] is %lld: entries must be 0 or more; use None for a side without bound%s", n,
                         (long long)side, side == -1 ? " (flash_attn's -1)" : "");
    }
    *bound = side > FGQA_UNBOUNDED ? FGQA_UNBOUNDED : (int32_t)side;
    return FGQA_OK;
}

static fgqa_status read_mask_rule(const fgqa_request *r, fgqa_problem *p)
{
    FGQA_TRY(check_window_side(r->window_left, 0, &p->left));
    FGQA_TRY(check_window_side(r->window_right, 1, &p->right));
    if (r->causal) { p->right = 0; }
    if (r->chunk < 0 || (r->has_chunk && r->chunk == 0)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "chunk is %lld: it must be 1 or more keys; use None for no chunks", (long long)r->chunk);
    }
    p->chunk = r->chunk > INT32_MAX ? INT32_MAX : (int32_t)r->chunk;
    p->align = r->align;
    return FGQA_OK;
}

/* Whether a number survives in the precision of the computation. */
static int fits(double x, fgqa_dtype dtype) { return isfinite(x) && (dtype == FGQA_F64 || fabs(x) <= (double)FLT_MAX); }

static fgqa_status read_scores(const fgqa_request *r, fgqa_problem *p)
{
    p->scale = r->has_scale ? r->scale : 1.0 / sqrt((double)p->d);
    if (!fits(p->scale, p->dtype)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "scale is %g: it must be a finite %s; use None for 1/sqrt(d)", r->scale,
                         fgqa_dtype_name(p->lse_dtype));
    }
    if (r->has_softcap) {
        /* Kernels multiply by 1/softcap, which must be finite too. */
        if (!(r->softcap > 0) || !fits(r->softcap, p->dtype) || !fits(1.0 / r->softcap, p->dtype)) {
            return fgqa_fail(FGQA_ERROR_VALUE, "softcap is %g: it must be a finite number greater than 0, and 1/softcap a finite %s; "
                             "use None for no cap", r->softcap, fgqa_dtype_name(p->lse_dtype));
        }
        p->softcap = r->softcap;
    }
    if (r->precision == FGQA_PRECISION_BF16X3 && p->dtype != FGQA_F32) {
        return fgqa_fail(FGQA_ERROR_VALUE, "precision is \"bf16x3\" but q has dtype %s: it splits float32 numbers only; leave precision out",
                         fgqa_dtype_name(p->dtype));
    }
    p->precision = r->precision;
    return fgqa_check_score_tensors(r, p);
}

static fgqa_status read_seed(const fgqa_request *r, fgqa_problem *p)
{
    const fgqa_tensor *t = r->tensor[FGQA_ARG_seed];
    if (t == NULL) {
        p->seed = r->seed;
        p->offset = r->offset;
    } else {
        FGQA_TRY(fgqa_check_vector(t, "seed", FGQA_I64, 2, "[2]", "give [seed, offset]"));
        if (p->device.type != FGQA_CPU) {
            p->seed_on_device = t->data;
            return FGQA_OK;
        }
        memcpy(&p->seed, t->data, sizeof p->seed);
        memcpy(&p->offset, (const int64_t *)t->data + 1, sizeof p->offset);
    }
    if (p->offset > UINT32_MAX) {
        return fgqa_fail(FGQA_ERROR_VALUE, "seed has offset %lld: it must be 0 to 2^32 - 1; put more bits into the seed",
                         (long long)p->offset);
    }
    return FGQA_OK;
}

static fgqa_status read_dropout(const fgqa_request *r, fgqa_problem *p)
{
    if (!(r->dropout_p >= 0 && r->dropout_p <= 1)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "dropout_p is %g: it must be a probability from 0 to 1", r->dropout_p);
    }
    if (r->dropout_p > 0 && r->pass != FGQA_PASS_FWD && r->pass != FGQA_PASS_BWD) {
        return fgqa_fail(FGQA_ERROR_VALUE, "dropout_p is %g: attention_weights are those without dropout; leave it out", r->dropout_p);
    }
    if (r->dropout_p > 0 && !r->has_seed && !r->tensor[FGQA_ARG_seed]) {
        return fgqa_fail(FGQA_ERROR_VALUE, "dropout_p is %g but seed is missing: the dropped weights follow from the seed alone; pass "
                         "seed=<int>, or int64 [seed, offset]", r->dropout_p);
    }
    if (r->dropout_p > 0 && (int64_t)p->b * p->hq > UINT32_MAX) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "dropout_p is %g with b * hq = %lld: dropout counts heads in 32 bits, at most 2^32; "
                         "split the batch", r->dropout_p, (long long)p->b * p->hq);
    }
    p->dropout_threshold = fgqa_dropout_threshold(r->dropout_p);
    return read_seed(r, p);
}

fgqa_status fgqa_check_rows(const fgqa_problem *p, const int64_t *rows)
{
    for (int32_t n = 0; n < p->n_rows; n++) {
        if (rows[n] < 0 || rows[n] >= p->sq) {
            return fgqa_fail(FGQA_ERROR_VALUE, "rows[%d] is %lld but q has %d rows: indices must be 0 to %d; negative ones do not count "
                             "from the end", (int)n, (long long)rows[n], (int)p->sq, (int)p->sq - 1);
        }
    }
    return FGQA_OK;
}

static fgqa_status read_rows(const fgqa_request *r, fgqa_problem *p)
{
    const fgqa_tensor *t = r->tensor[FGQA_ARG_rows];
    if (t == NULL) { return FGQA_OK; }
    FGQA_TRY(fgqa_check_vector(t, "rows", FGQA_I64, -1, "[rows]", "give the indices of query rows"));
    p->rows = t->data;
    p->n_rows = (int32_t)t->shape[0];
    return p->device.type == FGQA_CPU ? fgqa_check_rows(p, p->rows) : FGQA_OK;
}

static fgqa_status read_gradients(const fgqa_request *r, fgqa_problem *p)
{
    if (p->pass != FGQA_PASS_BWD) { return FGQA_OK; }
    if (r->want_dbias && !r->tensor[FGQA_ARG_bias]) {
        return fgqa_fail(FGQA_ERROR_VALUE, "dbias is wanted but bias is missing: pass the bias of the forward call");
    }
    if (r->want_dsink && !r->tensor[FGQA_ARG_sink]) {
        return fgqa_fail(FGQA_ERROR_VALUE, "dsink is wanted but sink is missing: pass the sink of the forward call");
    }
    p->want_dbias = r->want_dbias;
    p->want_dsink = r->want_dsink;
    FGQA_TRY(fgqa_check_form(r, p, FGQA_ARG_dout));
    if (r->tensor[FGQA_ARG_dlse]) { FGQA_TRY(fgqa_check_form(r, p, FGQA_ARG_dlse)); }
    return FGQA_OK;
}

fgqa_status fgqa_problem_init(const fgqa_request *r, fgqa_problem *problem)
{
    fgqa_problem p;
    memset(&p, 0, sizeof p);
    FGQA_TRY(check_arrays(r));
    p.pass = r->pass;
    p.device = r->tensor[FGQA_ARG_q]->device;
    p.want_lse = r->want_lse;
    p.deterministic = r->deterministic;
    p.batch_invariant = r->batch_invariant;
    p.check = r->check;
    FGQA_TRY(read_qkv(r, &p));
    FGQA_TRY(read_lengths(r, &p));
    FGQA_TRY(read_mask_rule(r, &p));
    FGQA_TRY(read_scores(r, &p));
    FGQA_TRY(read_dropout(r, &p));
    FGQA_TRY(read_rows(r, &p));
    FGQA_TRY(read_gradients(r, &p));
    FGQA_TRY(fgqa_check_results(r, &p));
    *problem = p;
    return FGQA_OK;
}
