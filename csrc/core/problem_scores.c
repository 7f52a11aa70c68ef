/* problem_scores.c - checks of the tensors that act on scores: mask, bias, alibi_slopes, sink. */
#include "problem_check.h"

static int is_float(fgqa_dtype dtype) { return dtype == FGQA_F64 || dtype == FGQA_F32 || dtype == FGQA_F16 || dtype == FGQA_BF16; }

/* What may have been meant by a shape that does not broadcast: key padding without its axes of heads and rows, rows and keys that
 * changed places. NULL: neither. */
static const char *likely_fix(const fgqa_tensor *t, const fgqa_problem *p)
{
    const int64_t rows = t->shape[t->ndim - 2], keys = t->shape[t->ndim - 1];
    if (t->ndim == 2 && rows == p->b && keys == p->sk) { return "write key padding [b, sk] as [b, 1, 1, sk], by [:, None, None]"; }
    return rows == p->sk && keys == p->sq && rows != keys ? "its last two axes are query rows, then keys: swap them" : NULL;
}

/* Broadcasts mask or bias to [b, hq, sq, sk]: its axes are the last ones, each of extent 1 or full. */
static fgqa_status check_broadcast(const fgqa_tensor *t, fgqa_problem *p, fgqa_arg arg, int32_t shape[4])
{
    const char *name = fgqa_arg_name(arg);
    const char *const names[4] = {"b", "hq", p->varlen ? "max_q" : "sq", p->varlen ? "max_kv" : "sk"};
    const fgqa_form full = {.ndim = 4, .axis = {0, 1, 2, 3}, .extent = {p->b, p->hq, p->sq, p->sk},
                            .name = {names[0], names[1], names[2], names[3]}};
    if (t->ndim == 3 && (p->rank == 4 || p->varlen)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has 3 dimensions, shape %s: whether its first axis is b or hq is not clear; "
                         "give it 4, %s[:, None] for [b, %s, %s] or %s[None] for [hq, %s, %s]", name, fgqa_shape_text(t).s,
                         name, names[2], names[3], name, names[2], names[3]);
    }
    if (t->ndim < 2) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has %d dimension%s, shape %s: it must have 2 ([%s, %s]), 4 ([b, hq, %s, %s]) or, "
                         "with 3-dimensional q, 3; key padding is written [b, 1, 1, %s]", name, (int)t->ndim,
                         t->ndim == 1 ? "" : "s", fgqa_shape_text(t).s, names[2], names[3], names[2], names[3], names[3]);
    }
    int64_t stride[4] = {0, 0, 0, 0};
    for (int n = 0; n < 4; n++) {
        const int axis = n - (4 - t->ndim);
        const int64_t extent = axis < 0 ? 1 : t->shape[axis];
        if (extent != 1 && extent != full.extent[n]) {
            const char *fix = likely_fix(t, p);
            return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: it must broadcast to %s, but axis %d has extent %lld where 1 or %lld "
                             "is allowed; %s%s%s", name, fgqa_shape_text(t).s, fgqa_form_text(&full).s, axis,
                             (long long)extent, (long long)full.extent[n], fix ? fix : "slice or expand it to ", fix ? "" : names[n],
                             p->varlen && n >= 2 ? " (give max_q and max_kv if it was made for larger maxima)" : "");
        }
        shape[n] = (int32_t)extent;
        stride[n] = extent == 1 ? 0 : t->stride[axis];
    }
    const fgqa_view view = {t->data, t->dtype, stride[0], stride[1], stride[2], stride[3]};
    p->view[arg] = view;
    return FGQA_OK;
}

static fgqa_status check_mask(const fgqa_tensor *mask, fgqa_problem *p)
{
    int32_t shape[4];
    if (mask->dtype != FGQA_BOOL) {
        return fgqa_fail(FGQA_ERROR_TYPE, "mask has dtype %s: it must be bool (True = may attend); %s", fgqa_dtype_name(mask->dtype),
                         is_float(mask->dtype) ? "pass numbers to be added to the scores as bias=" : "write mask != 0");
    }
    return check_broadcast(mask, p, FGQA_ARG_mask, shape);
}

static fgqa_status check_bias(const fgqa_tensor *bias, fgqa_problem *p)
{
    if (!is_float(bias->dtype)) {
        return fgqa_fail(FGQA_ERROR_TYPE, "bias has dtype %s: it must be float16, bfloat16, float32 or float64; %s",
                         fgqa_dtype_name(bias->dtype), bias->dtype == FGQA_BOOL ? "pass booleans as mask=" : "convert it to float32");
    }
    p->bias_rank = bias->ndim;
    return check_broadcast(bias, p, FGQA_ARG_bias, p->bias_shape);
}

static fgqa_status check_alibi(const fgqa_tensor *slopes, fgqa_problem *p)
{
    if (slopes->dtype != FGQA_F32) {
        return fgqa_fail(FGQA_ERROR_TYPE, "alibi_slopes has dtype %s: it must be float32; convert it to float32",
                         fgqa_dtype_name(slopes->dtype));
    }
    const int has_b = slopes->ndim == 2;
    if (!(slopes->ndim == 1 || has_b) || slopes->shape[slopes->ndim - 1] != p->hq || (has_b && slopes->shape[0] != p->b)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "alibi_slopes has shape %s: it must be [hq] = (%d,) or [b, hq] = (%d, %d); "
                         "give one slope a query head", fgqa_shape_text(slopes).s, (int)p->hq, (int)p->b, (int)p->hq);
    }
    const fgqa_view view = {slopes->data, slopes->dtype, has_b && p->b > 1 ? slopes->stride[0] : 0,
                            p->hq > 1 ? slopes->stride[slopes->ndim - 1] : 0, 0, 0};
    p->view[FGQA_ARG_alibi_slopes] = view;
    return FGQA_OK;
}

static fgqa_status check_sink(const fgqa_tensor *sink, fgqa_problem *p)
{
    if (!is_float(sink->dtype)) {
        return fgqa_fail(FGQA_ERROR_TYPE, "sink has dtype %s: it must be float16, bfloat16, float32 or float64; convert it to float32",
                         fgqa_dtype_name(sink->dtype));
    }
    if (sink->ndim != 1 || sink->shape[0] != p->hq) {
        return fgqa_fail(FGQA_ERROR_VALUE, "sink has shape %s: it must be [hq] = (%d,); give one logit a query head",
                         fgqa_shape_text(sink).s, (int)p->hq);
    }
    const fgqa_view view = {sink->data, sink->dtype, 0, p->hq > 1 ? sink->stride[0] : 0, 0, 0};
    p->view[FGQA_ARG_sink] = view;
    return FGQA_OK;
}

fgqa_status fgqa_check_score_tensors(const fgqa_request *r, fgqa_problem *p)
{
    if (r->tensor[FGQA_ARG_mask]) { FGQA_TRY(check_mask(r->tensor[FGQA_ARG_mask], p)); }
    if (r->tensor[FGQA_ARG_bias]) { FGQA_TRY(check_bias(r->tensor[FGQA_ARG_bias], p)); }
    if (r->tensor[FGQA_ARG_alibi_slopes]) { FGQA_TRY(check_alibi(r->tensor[FGQA_ARG_alibi_slopes], p)); }
    if (r->tensor[FGQA_ARG_sink]) { FGQA_TRY(check_sink(r->tensor[FGQA_ARG_sink], p)); }
    return FGQA_OK;
}
