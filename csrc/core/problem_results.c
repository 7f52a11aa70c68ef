/* problem_results.c - the form of every tensor of a problem, and the results: described, checked, bound. */
#include "problem_check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { B, H, S, D };   /* the letters of a view, in order */

/* ---- wording ---- */

static fgqa_text list_text(const char *open, const char *close, int32_t n, const int64_t *values, const char *const *names)
{
    fgqa_text text;
    size_t used = (size_t)snprintf(text.s, sizeof text.s, "%s", open);
    for (int32_t k = 0; k < n && used < sizeof text.s; k++) {
        const char *comma = k + 1 < n ? ", " : "";
        used += (size_t)(names ? snprintf(text.s + used, sizeof text.s - used, "%s%s", names[k], comma)
                               : snprintf(text.s + used, sizeof text.s - used, "%lld%s", (long long)values[k], comma));
    }
    if (used < sizeof text.s) { snprintf(text.s + used, sizeof text.s - used, "%s", close); }
    return text;
}

fgqa_text fgqa_shape_text(const fgqa_tensor *tensor)
{
    return list_text("(", tensor->ndim == 1 ? ",)" : ")", tensor->ndim, tensor->shape, NULL);
}

fgqa_text fgqa_device_text(fgqa_device device)
{
    fgqa_text text;
    if (device.type == FGQA_CPU) {
        snprintf(text.s, sizeof text.s, "cpu");
    } else {
        snprintf(text.s, sizeof text.s, "cuda:%d", (int)device.index);
    }
    return text;
}

/* Extents and names by the caller's axes. */
static void form_shape(const fgqa_form *form, int64_t shape[FGQA_MAX_DIMS], const char *names[FGQA_MAX_DIMS])
{
    for (int n = 0; n < 4; n++) {
        if (form->axis[n] >= 0) {
            shape[form->axis[n]] = form->extent[n];
            names[form->axis[n]] = form->name[n];
        }
    }
}

fgqa_text fgqa_form_text(const fgqa_form *form)
{
    fgqa_text text;
    int64_t shape[FGQA_MAX_DIMS] = {0};
    const char *names[FGQA_MAX_DIMS] = {0};
    form_shape(form, shape, names);
    snprintf(text.s, sizeof text.s, "%.60s = %.100s", list_text("[", "]", form->ndim, NULL, names).s,
             list_text("(", form->ndim == 1 ? ",)" : ")", form->ndim, shape, NULL).s);
    return text;
}

/* ---- forms ---- */

fgqa_form fgqa_tensor_form(const fgqa_problem *p)
{
    static const fgqa_form forms[] = {
        {.ndim = 4, .axis = {0, 1, 2, 3}},    /* [b, h, s, d] */
        {.ndim = 4, .axis = {0, 2, 1, 3}},    /* [b, s, h, d] */
        {.ndim = 3, .axis = {-1, 0, 1, 2}},   /* [h, s, d] */
        {.ndim = 3, .axis = {-1, 1, 0, 2}},   /* [s, h, d] and, with cu_seqlens, [total, h, d] */
    };
    if (p->varlen) { return forms[3]; }
    return forms[(p->rank == 3 ? 2 : 0) + (p->layout == FGQA_LAYOUT_BSHD)];
}

static void set_axis(fgqa_form *form, int letter, int64_t extent, const char *name)
{
    form->extent[letter] = extent;
    form->name[letter] = name;
}

/* The last `letters` axes in the order b h s d, without b for rank 3 inputs. */
static void plain_axes(fgqa_form *form, int with_b, int with_s, int with_d)
{
    form->ndim = 0;
    form->axis[B] = (int8_t)(with_b ? form->ndim++ : -1);
    form->axis[H] = (int8_t)form->ndim++;
    form->axis[S] = (int8_t)(with_s ? form->ndim++ : -1);
    form->axis[D] = (int8_t)(with_d ? form->ndim++ : -1);
}

int fgqa_problem_form(const fgqa_problem *p, fgqa_arg arg, fgqa_form *form)
{
    const int forward = p->pass == FGQA_PASS_FWD, backward = p->pass == FGQA_PASS_BWD;
    fgqa_form f = fgqa_tensor_form(p);
    f.dtype = p->dtype;
    set_axis(&f, B, p->b, "b");
    set_axis(&f, H, p->hq, "hq");
    set_axis(&f, S, p->varlen ? p->total_q : p->sq, p->varlen ? "total_q" : "sq");
    set_axis(&f, D, p->d, "d");
    switch (arg) {
    case FGQA_ARG_dq:
        if (!backward) { return 0; }
        break;
    case FGQA_ARG_dk: case FGQA_ARG_dv:
        if (!backward) { return 0; }
        set_axis(&f, H, p->hk, "hk");
        set_axis(&f, S, p->varlen ? p->total_k : p->sk, p->varlen ? "total_k" : "sk");
        if (arg == FGQA_ARG_dv) { set_axis(&f, D, p->dv, "dv"); }
        break;
    case FGQA_ARG_out: case FGQA_ARG_dout:
        if (!(backward || (forward && arg == FGQA_ARG_out))) { return 0; }
        set_axis(&f, D, p->dv, "dv");
        break;
    case FGQA_ARG_lse: case FGQA_ARG_dlse:
        if (!(backward || (forward && arg == FGQA_ARG_lse && p->want_lse))) { return 0; }
        f.dtype = p->lse_dtype;
        plain_axes(&f, p->rank == 4, 1, 0);
        break;
    case FGQA_ARG_dbias:
        if (!(backward && p->want_dbias)) { return 0; }
        f.dtype = p->view[FGQA_ARG_bias].dtype;
        f.ndim = p->bias_rank;
        for (int n = 0; n < 4; n++) {
            f.axis[n] = (int8_t)(n - (4 - p->bias_rank) < 0 ? -1 : n - (4 - p->bias_rank));
            f.extent[n] = p->bias_shape[n];
        }
        set_axis(&f, D, p->bias_shape[D], "sk");
        break;
    case FGQA_ARG_dsink:
        if (!(backward && p->want_dsink)) { return 0; }
        f.dtype = p->view[FGQA_ARG_sink].dtype;
        plain_axes(&f, 0, 0, 0);
        break;
    case FGQA_ARG_weights:
        if (forward || backward) { return 0; }
        f.dtype = p->lse_dtype;
        plain_axes(&f, p->rank == 4 || p->varlen, p->pass == FGQA_PASS_ROWS, 1);
        set_axis(&f, S, p->n_rows, "rows");
        set_axis(&f, D, p->sk, p->varlen ? "max_kv" : "sk");
        break;
    default:
        return 0;
    }
    *form = f;
    return 1;
}

fgqa_view fgqa_form_view(const fgqa_form *form, const fgqa_tensor *tensor)
{
    int64_t stride[4] = {0, 0, 0, 0};
    for (int n = 0; n < 4; n++) {
        const int axis = form->axis[n];
        /* The stride of an axis of extent 1 is never walked and may be anything. */
        if (axis >= 0 && tensor->shape[axis] != 1) { stride[n] = tensor->stride[axis]; }
        if (n == D && axis >= 0 && tensor->shape[axis] == 1) { stride[n] = 1; }
    }
    const fgqa_view view = {tensor->data, tensor->dtype, stride[B], stride[H], stride[S], stride[D]};
    return view;
}

/* A one-key dbias that stands for all keys has stride 0 along them, unlike a head dim of 1. */
static fgqa_view result_view(fgqa_arg arg, const fgqa_form *form, const fgqa_tensor *tensor)
{
    fgqa_view view = fgqa_form_view(form, tensor);
    if (arg == FGQA_ARG_dbias && form->extent[D] == 1) { view.stride_d = 0; }
    return view;
}

/* Whether this pass writes the argument: out and lse are inputs of the backward pass. */
static int is_written(const fgqa_problem *p, fgqa_arg arg)
{
    return arg >= FGQA_ARG_out && !(p->pass == FGQA_PASS_BWD && arg <= FGQA_ARG_lse);
}

int fgqa_problem_result(const fgqa_problem *p, fgqa_arg result, fgqa_tensor *spec)
{
    fgqa_form form;
    const char *names[FGQA_MAX_DIMS];
    if (!is_written(p, result) || !fgqa_problem_form(p, result, &form)) { return 0; }
    memset(spec, 0, sizeof *spec);
    spec->dtype = form.dtype;
    spec->device = p->device;
    spec->ndim = form.ndim;
    form_shape(&form, spec->shape, names);
    int64_t stride = 1;
    for (int32_t axis = form.ndim - 1; axis >= 0; axis--) {
        spec->stride[axis] = stride;
        stride *= spec->shape[axis] > 0 ? spec->shape[axis] : 1;
    }
    return 1;
}

void fgqa_problem_bind(fgqa_problem *p, fgqa_arg result, const fgqa_tensor *storage)
{
    fgqa_form form;
    if (fgqa_problem_form(p, result, &form)) { p->view[result] = result_view(result, &form, storage); }
}

/* ---- checks ---- */

fgqa_status fgqa_check_form(const fgqa_request *r, fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_tensor *t = r->tensor[arg];
    const char *name = fgqa_arg_name(arg);
    fgqa_form form;
    int64_t shape[FGQA_MAX_DIMS] = {0};
    const char *names[FGQA_MAX_DIMS];
    if (!fgqa_problem_form(p, arg, &form)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is not a result of this call; leave it out", name);
    }
    if (t->dtype != form.dtype) {
        return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s: with q of %s it must be %s; %s %s", name, fgqa_dtype_name(t->dtype),
                         fgqa_dtype_name(p->dtype), fgqa_dtype_name(form.dtype),
                         is_written(p, arg) ? "allocate it as" : "convert it to", fgqa_dtype_name(form.dtype));
    }
    form_shape(&form, shape, names);
    if (t->ndim != form.ndim || memcmp(shape, t->shape, (size_t)form.ndim * sizeof shape[0]) != 0) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: with these inputs it must be %s; %s", name, fgqa_shape_text(t).s,
                         fgqa_form_text(&form).s, is_written(p, arg) ? "allocate it with that shape, or leave it out"
                                                                     : "pass the one of the same forward call");
    }
    p->view[arg] = result_view(arg, &form, t);
    return FGQA_OK;
}

int fgqa_strides_overlap(int32_t n, const int64_t *shape, const int64_t *stride)
{
    int32_t order[FGQA_MAX_DIMS + 1];
    int32_t used = 0;
    for (int32_t axis = 0; axis < n; axis++) {
        if (shape[axis] == 0) { return 0; }
        if (shape[axis] == 1) { continue; }
        int32_t at = used++;
        for (; at > 0 && llabs(stride[order[at - 1]]) > llabs(stride[axis]); at--) { order[at] = order[at - 1]; }
        order[at] = axis;
    }
    int64_t span = 0;
    for (int32_t k = 0; k < used; k++) {
        const int64_t step = llabs(stride[order[k]]);
        if (step <= span) { return 1; }
        span += step * (shape[order[k]] - 1);
    }
    return 0;
}

static fgqa_status check_written(const fgqa_request *r, const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_tensor *t = r->tensor[arg];
    const char *name = fgqa_arg_name(arg);
    if (t->readonly) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is read-only: results are written into it; pass a writable array", name);
    }
    for (int32_t axis = 0; axis < t->ndim; axis++) {
        if (t->shape[axis] == 0) { return FGQA_OK; }   /* nothing to write; NumPy gives such arrays strides of 0 */
    }
    const int32_t last = t->ndim - 1;
    if (arg != FGQA_ARG_lse && t->shape[last] > 1 && t->stride[last] != 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has stride %lld in its last axis: it must be 1 element; "
                         "pass an array that is contiguous in its last axis", name, (long long)t->stride[last]);
    }
    if (fgqa_strides_overlap(t->ndim, t->shape, t->stride)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has overlapping elements (a broadcast or stride-tricked view of shape %s): "
                         "each result needs memory of its own; pass a copy", name, fgqa_shape_text(t).s);
    }
    for (int other = 0; other < FGQA_ARG_COUNT; other++) {
        /* Of two results the later one is refused, when its turn comes. */
        if (r->tensor[other] == NULL || other == (int)arg || (other > (int)arg && is_written(p, (fgqa_arg)other))) { continue; }
        if (fgqa_tensors_overlap(t, r->tensor[other])) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s overlaps %s (their address ranges intersect): %s is written while %s is in use; "
                             "give %s memory of its own", name, fgqa_arg_name((fgqa_arg)other), name,
                             fgqa_arg_name((fgqa_arg)other), name);
        }
    }
    return FGQA_OK;
}

/* The bytes of a result in 64 bits: broadcast inputs may be small where the result is not. */
static fgqa_status check_size(const fgqa_problem *p, fgqa_arg arg)
{
    fgqa_form form;
    int64_t bytes = 8;
    if (!fgqa_problem_form(p, arg, &form)) { return FGQA_OK; }
    for (int n = 0; n < 4; n++) {
        if (form.axis[n] >= 0 && form.extent[n] > 0 && __builtin_mul_overflow(bytes, form.extent[n], &bytes)) {
            return fgqa_fail(FGQA_ERROR_VALUE, "%s would have shape %s: more bytes than 64-bit sizes can count; split the call",
                             fgqa_arg_name(arg), fgqa_form_text(&form).s);
        }
    }
    return FGQA_OK;
}

fgqa_status fgqa_check_results(const fgqa_request *r, fgqa_problem *p)
{
    for (int n = FGQA_ARG_out; n < FGQA_ARG_COUNT; n++) {
        const fgqa_arg arg = (fgqa_arg)n;
        FGQA_TRY(check_size(p, arg));
        if (r->tensor[n] == NULL) { continue; }
        FGQA_TRY(fgqa_check_form(r, p, arg));
        if (is_written(p, arg)) { FGQA_TRY(check_written(r, p, arg)); }
    }
    return FGQA_OK;
}
