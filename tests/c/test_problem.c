/* test_problem.c - the lowering of requests: views of every rank and layout, shapes of results, 64-bit strides, devices; and
 * the failures that Python on a CPU cannot reach (tests/test_errors.py has the others). */
#include "fixture.h"
#include <math.h>

static int same_view(fgqa_view v, const void *data, int64_t b, int64_t h, int64_t s, int64_t d)
{
    return v.data == data && v.stride_b == b && v.stride_h == h && v.stride_s == s && v.stride_d == d;
}

static int shape_is(const fgqa_tensor *t, int ndim, int64_t s0, int64_t s1, int64_t s2, int64_t s3)
{
    const int64_t want[4] = {s0, s1, s2, s3};
    int64_t stride = 1;
    if (t->ndim != ndim) { return 0; }
    for (int axis = ndim - 1; axis >= 0; axis--) {
        if (t->shape[axis] != want[axis] || t->stride[axis] != stride) { return 0; }
        stride *= want[axis] > 0 ? want[axis] : 1;
    }
    return 1;
}

static void fails(const fixture *f, fgqa_status code, const char *start, const char *contains)
{
    fgqa_problem p, untouched;
    memset(&p, 0x5a, sizeof p);
    memset(&untouched, 0x5a, sizeof untouched);
    const fgqa_status status = fgqa_problem_init(&f->r, &p);
    CHECK_FOR(status == code, "status %d instead of %d for \"%s ... %s\": %s", (int)status, (int)code, start, contains,
              status ? fgqa_message() : "success");
    CHECK_FOR(strncmp(fgqa_message(), start, strlen(start)) == 0, "\"%s\" does not start with \"%s\"", fgqa_message(), start);
    CHECK_FOR(strstr(fgqa_message(), contains) != NULL, "\"%s\" lacks \"%s\"", fgqa_message(), contains);
    CHECK(memcmp(&p, &untouched, sizeof p) == 0);
}

/* ---- lowering ---- */

static void layouts(void)
{
    fixture f;
    fgqa_tensor out;
    small(&f, FGQA_PASS_FWD);
    f.r.want_lse = 1;
    fgqa_problem p = lowered(&f);
    CHECK(p.b == 2 && p.hq == 6 && p.hk == 3 && p.g == 2 && p.sq == 5 && p.sk == 7 && p.d == 8 && p.dv == 4 && p.rank == 4);
    CHECK(p.total_q == 10 && p.total_k == 14 && fabs(p.scale - 1 / sqrt(8.0)) < 1e-15 && p.softcap == 0);
    CHECK(same_view(p.view[FGQA_ARG_q], f.t[FGQA_ARG_q].data, 240, 40, 8, 1));
    CHECK(p.view[FGQA_ARG_mask].data == NULL && p.view[FGQA_ARG_out].data == NULL && p.bias_rank == 0);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_out, &out) && shape_is(&out, 4, 2, 6, 5, 4) && out.dtype == FGQA_F32);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_lse, &out) && shape_is(&out, 3, 2, 6, 5, 0));
    CHECK(!fgqa_problem_result(&p, FGQA_ARG_dq, &out) && !fgqa_problem_result(&p, FGQA_ARG_weights, &out) &&
          !fgqa_problem_result(&p, FGQA_ARG_q, &out) && !fgqa_problem_result(&p, FGQA_ARG_dout, &out));
    f.r.want_lse = 0;
    p = lowered(&f);
    CHECK(!fgqa_problem_result(&p, FGQA_ARG_lse, &out));

    /* [b, s, h, d] */
    no_options(&f, FGQA_PASS_FWD);
    f.r.layout = FGQA_LAYOUT_BSHD;
    f.r.want_lse = 1;
    give(&f, FGQA_ARG_q, FGQA_F64, 2, 5, 6, 8);
    give(&f, FGQA_ARG_k, FGQA_F64, 2, 7, 3, 8);
    give(&f, FGQA_ARG_v, FGQA_F64, 2, 7, 3, 4);
    p = lowered(&f);
    CHECK(p.hq == 6 && p.sq == 5 && p.hk == 3 && p.sk == 7 && p.lse_dtype == FGQA_F64);
    CHECK(same_view(p.view[FGQA_ARG_k], f.t[FGQA_ARG_k].data, 168, 8, 24, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_out, &out) && shape_is(&out, 4, 2, 5, 6, 4));
    fgqa_problem_bind(&p, FGQA_ARG_out, &out);
    CHECK(same_view(p.view[FGQA_ARG_out], NULL, 120, 4, 24, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_lse, &out) && shape_is(&out, 3, 2, 6, 5, 0) && out.dtype == FGQA_F64);

    /* [h, s, d] and [s, h, d] */
    no_options(&f, FGQA_PASS_FWD);
    f.r.want_lse = 1;
    give(&f, FGQA_ARG_q, FGQA_F16, 4, 3, 4);
    give(&f, FGQA_ARG_k, FGQA_F16, 2, 3, 4);
    give(&f, FGQA_ARG_v, FGQA_F16, 2, 3, 4);
    p = lowered(&f);
    CHECK(p.b == 1 && p.hq == 4 && p.sq == 3 && p.rank == 3);
    CHECK(same_view(p.view[FGQA_ARG_q], f.t[FGQA_ARG_q].data, 0, 12, 4, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_lse, &out) && shape_is(&out, 2, 4, 3, 0, 0) && out.dtype == FGQA_F32);
    f.r.layout = FGQA_LAYOUT_BSHD;
    give(&f, FGQA_ARG_k, FGQA_F16, 4, 1, 4);
    give(&f, FGQA_ARG_v, FGQA_F16, 4, 1, 4);
    p = lowered(&f);
    CHECK(p.hq == 3 && p.sq == 4 && p.hk == 1 && p.sk == 4);
    CHECK(same_view(p.view[FGQA_ARG_q], f.t[FGQA_ARG_q].data, 0, 4, 12, 1));
    CHECK(same_view(p.view[FGQA_ARG_k], f.t[FGQA_ARG_k].data, 0, 0, 4, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_out, &out) && shape_is(&out, 3, 4, 3, 4, 0));
}

static void packed_sequences(void)
{
    fixture f;
    fgqa_tensor out;
    packed(&f, FGQA_PASS_FWD);
    f.r.want_lse = 1;
    f.r.causal = 1;
    fgqa_problem p = lowered(&f);
    CHECK(p.varlen && p.b == 3 && p.sq == 3 && p.sk == 4 && p.total_q == 5 && p.total_k == 7 && p.hq == 6 && p.hk == 3);
    CHECK(same_view(p.view[FGQA_ARG_q], f.t[FGQA_ARG_q].data, 0, 8, 48, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_out, &out) && shape_is(&out, 3, 5, 6, 4, 0));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_lse, &out) && shape_is(&out, 2, 6, 5, 0, 0));
    fgqa_problem_bind(&p, FGQA_ARG_lse, &out);
    CHECK(same_view(p.view[FGQA_ARG_lse], NULL, 0, 5, 1, 0));
    const fgqa_sequence s = fgqa_problem_sequence(&p, 2);
    CHECK(s.q_row == 2 && s.k_row == 5 && s.mask.sq == 3 && s.mask.sk == 2 && s.mask.diag == -1 && s.mask.right == 0);
    f.r.max_q = 9;
    f.r.max_kv = 4;
    p = lowered(&f);
    CHECK(p.sq == 9 && p.sk == 4);
    give(&f, FGQA_ARG_mask, FGQA_BOOL, 3, 1, 9, 4);
    p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_mask], f.t[FGQA_ARG_mask].data, 36, 0, 4, 1));
    f.r.max_q = f.r.max_kv = -1;
    f.r.tensor[FGQA_ARG_mask] = NULL;
    on_gpu(&f);      /* offsets are not read there: every row might be one sequence's */
    p = lowered(&f);
    CHECK(p.sq == 5 && p.sk == 7 && p.b == 3);
    give(&f, FGQA_ARG_mask, FGQA_BOOL, 3, 1, 1, 4);      /* made for sequences of up to 4 keys */
    give(&f, FGQA_ARG_bias, FGQA_F32, 3, 1, 3, 4);
    on_gpu(&f);
    p = lowered(&f);
    CHECK(p.sq == 3 && p.sk == 4);
    f.r.tensor[FGQA_ARG_bias] = NULL;
    p = lowered(&f);
    CHECK(p.sq == 5 && p.sk == 4);

    /* no sequence at all */
    const int32_t zero = 0;
    no_options(&f, FGQA_PASS_FWD);
    give(&f, FGQA_ARG_q, FGQA_F32, 0, 6, 8);
    give(&f, FGQA_ARG_k, FGQA_F32, 0, 3, 8);
    give(&f, FGQA_ARG_v, FGQA_F32, 0, 3, 8);
    give_int32(&f, FGQA_ARG_cu_seqlens_q, &zero, 1);
    give_int32(&f, FGQA_ARG_cu_seqlens_kv, &zero, 1);
    p = lowered(&f);
    CHECK(p.b == 0 && p.sq == 0 && p.sk == 0);
}

static void lengths_and_rules(void)
{
    static const int32_t q_lens[] = {5, 0}, kv_lens[] = {7, 3};
    fixture f;
    small(&f, FGQA_PASS_FWD);
    give_int32(&f, FGQA_ARG_q_lens, q_lens, 2);
    give_int32(&f, FGQA_ARG_kv_lens, kv_lens, 2);
    f.r.causal = 1;
    f.r.window_left = 3;
    f.r.window_right = 2;
    f.r.chunk = 4;
    f.r.has_chunk = 1;
    fgqa_problem p = lowered(&f);
    CHECK(p.left == 3 && p.right == 0 && p.chunk == 4 && p.q_lens[1] == 0 && p.kv_lens[1] == 3);
    CHECK(fgqa_problem_sequence(&p, 1).mask.diag == 3 && fgqa_problem_sequence(&p, 0).mask.diag == 2);
    f.r.align = FGQA_ALIGN_TOP_LEFT;
    f.r.causal = 0;
    f.r.window_left = (int64_t)1 << 40;
    f.r.chunk = (int64_t)1 << 40;
    p = lowered(&f);
    CHECK(p.left == FGQA_UNBOUNDED && p.right == 2 && p.chunk == INT32_MAX && fgqa_problem_sequence(&p, 1).mask.diag == 0);
}

static void score_tensors(void)
{
    fixture f;
    fgqa_tensor out;
    small(&f, FGQA_PASS_BWD);
    give(&f, FGQA_ARG_bias, FGQA_BF16, 6, 1, 7)->ndim = 3;
    fails(&f, FGQA_ERROR_VALUE, "bias has 3 dimensions, shape (6, 1, 7)", "bias[None] for [hq, sq, sk]");
    give(&f, FGQA_ARG_bias, FGQA_BF16, 1, 6, 1, 7);
    give(&f, FGQA_ARG_mask, FGQA_BOOL, 5, 7);
    give(&f, FGQA_ARG_alibi_slopes, FGQA_F32, 2, 6);
    give(&f, FGQA_ARG_sink, FGQA_F16, 6);
    give(&f, FGQA_ARG_dlse, FGQA_F32, 2, 6, 5);
    f.r.want_dbias = f.r.want_dsink = 1;
    fgqa_problem p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_bias], f.t[FGQA_ARG_bias].data, 0, 7, 0, 1) && p.bias_rank == 4);
    CHECK(p.bias_shape[0] == 1 && p.bias_shape[1] == 6 && p.bias_shape[2] == 1 && p.bias_shape[3] == 7);
    CHECK(same_view(p.view[FGQA_ARG_mask], f.t[FGQA_ARG_mask].data, 0, 0, 7, 1));
    CHECK(same_view(p.view[FGQA_ARG_alibi_slopes], f.t[FGQA_ARG_alibi_slopes].data, 6, 1, 0, 0));
    CHECK(same_view(p.view[FGQA_ARG_sink], f.t[FGQA_ARG_sink].data, 0, 1, 0, 0));
    CHECK(same_view(p.view[FGQA_ARG_dlse], f.t[FGQA_ARG_dlse].data, 30, 5, 1, 0));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_dbias, &out) && shape_is(&out, 4, 1, 6, 1, 7) && out.dtype == FGQA_BF16);
    fgqa_problem_bind(&p, FGQA_ARG_dbias, &out);
    CHECK(same_view(p.view[FGQA_ARG_dbias], NULL, 0, 7, 0, 1));
    CHECK(fgqa_problem_result(&p, FGQA_ARG_dsink, &out) && shape_is(&out, 1, 6, 0, 0, 0) && out.dtype == FGQA_F16);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_dv, &out) && shape_is(&out, 4, 2, 3, 7, 4) && out.dtype == FGQA_F32);
    CHECK(!fgqa_problem_result(&p, FGQA_ARG_out, &out) && !fgqa_problem_result(&p, FGQA_ARG_lse, &out));

    /* one number for all keys: stride 0 there, in bias and dbias alike */
    give(&f, FGQA_ARG_bias, FGQA_F32, 5, 1);
    p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_bias], f.t[FGQA_ARG_bias].data, 0, 0, 1, 0) && p.bias_rank == 2 && p.bias_shape[3] == 1);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_dbias, &out) && shape_is(&out, 2, 5, 1, 0, 0));
    fgqa_problem_bind(&p, FGQA_ARG_dbias, &out);
    CHECK(same_view(p.view[FGQA_ARG_dbias], NULL, 0, 0, 1, 0));
    f.r.want_dbias = f.r.want_dsink = 0;
    p = lowered(&f);
    CHECK(!fgqa_problem_result(&p, FGQA_ARG_dbias, &out) && !fgqa_problem_result(&p, FGQA_ARG_dsink, &out));

    /* rank 3 */
    no_options(&f, FGQA_PASS_FWD);
    give(&f, FGQA_ARG_q, FGQA_F32, 6, 5, 8);
    give(&f, FGQA_ARG_k, FGQA_F32, 3, 7, 8);
    give(&f, FGQA_ARG_v, FGQA_F32, 3, 7, 4);
    give(&f, FGQA_ARG_mask, FGQA_BOOL, 6, 1, 7);
    p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_mask], f.t[FGQA_ARG_mask].data, 0, 7, 0, 1));
}

static void weights(void)
{
    static const int64_t rows[] = {4, 0, 4};
    fixture f;
    fgqa_tensor out;
    small(&f, FGQA_PASS_ROWS);
    memcpy(give(&f, FGQA_ARG_rows, FGQA_I64, 3)->data, rows, sizeof rows);
    fgqa_problem p = lowered(&f);
    CHECK(p.n_rows == 3 && p.rows[2] == 4 && p.dv == 0);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_weights, &out) && shape_is(&out, 4, 2, 6, 3, 7) && out.dtype == FGQA_F32);
    fgqa_problem_bind(&p, FGQA_ARG_weights, &out);
    CHECK(same_view(p.view[FGQA_ARG_weights], NULL, 126, 21, 7, 1));
    CHECK(!fgqa_problem_result(&p, FGQA_ARG_out, &out));
    f.r.dropout_p = 0.1;
    f.r.has_seed = 1;
    fails(&f, FGQA_ERROR_VALUE, "dropout_p is 0.1", "without dropout");
    small(&f, FGQA_PASS_KEYSUM);
    p = lowered(&f);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_weights, &out) && shape_is(&out, 3, 2, 6, 7, 0));
    fgqa_problem_bind(&p, FGQA_ARG_weights, &out);
    CHECK(same_view(p.view[FGQA_ARG_weights], NULL, 42, 7, 0, 1));
    packed(&f, FGQA_PASS_KEYSUM);
    p = lowered(&f);
    CHECK(fgqa_problem_result(&p, FGQA_ARG_weights, &out) && shape_is(&out, 3, 3, 6, 4, 0));
    give(&f, FGQA_ARG_v, FGQA_F32, 7, 3, 4);
    fails(&f, FGQA_ERROR_VALUE, "v is not an argument of attention_weights", "leave it out");
}

static void seeds(void)
{
    static const int64_t seed[] = {-3, 77}, far[] = {1, (int64_t)1 << 32};
    fixture f;
    small(&f, FGQA_PASS_FWD);
    f.r.dropout_p = 0.25;
    fails(&f, FGQA_ERROR_VALUE, "dropout_p is 0.25 but seed is missing", "seed=<int>");
    f.r.has_seed = 1;
    f.r.seed = 5;
    fgqa_problem p = lowered(&f);
    CHECK(p.dropout_threshold == 16384 && p.seed == 5 && p.offset == 0 && p.seed_on_device == NULL);
    f.r.has_seed = 0;
    memcpy(give(&f, FGQA_ARG_seed, FGQA_I64, 2)->data, seed, sizeof seed);
    p = lowered(&f);
    CHECK(p.seed == (uint64_t)-3 && p.offset == 77 && p.seed_on_device == NULL);
    memcpy(f.t[FGQA_ARG_seed].data, far, sizeof far);
    fails(&f, FGQA_ERROR_VALUE, "seed has offset 4294967296", "0 to 2^32 - 1");
    on_gpu(&f);
    p = lowered(&f);
    CHECK(p.seed_on_device == f.t[FGQA_ARG_seed].data);
}

/* ---- strides ---- */

/* Index arithmetic beyond 2^31 elements: the views carry 64-bit strides, and the last element is where it must be. */
static void huge_strides(void)
{
    fixture f;
    small(&f, FGQA_PASS_FWD);
    fgqa_tensor *q = &f.t[FGQA_ARG_q];
    q->data = NULL;
    q->stride[0] = (int64_t)1 << 40;
    q->stride[1] = -((int64_t)1 << 33);
    q->stride[2] = ((int64_t)1 << 31) + 8;
    fgqa_problem p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_q], NULL, (int64_t)1 << 40, -((int64_t)1 << 33), ((int64_t)1 << 31) + 8, 1));
    const fgqa_view *v = &p.view[FGQA_ARG_q];
    const int64_t last = (int64_t)(p.b - 1) * v->stride_b + (int64_t)(p.hq - 1) * v->stride_h + (int64_t)(p.sq - 1) * v->stride_s + p.d - 1;
    CHECK(last == ((int64_t)1 << 40) - 5 * ((int64_t)1 << 33) + 4 * (((int64_t)1 << 31) + 8) + 7);

    /* > 2^31 elements for real: shape and spec, 64-bit counts */
    no_options(&f, FGQA_PASS_FWD);
    give(&f, FGQA_ARG_q, FGQA_F16, 64, 32, 131072, 128);
    give(&f, FGQA_ARG_k, FGQA_F16, 64, 8, 131072, 128);
    give(&f, FGQA_ARG_v, FGQA_F16, 64, 8, 131072, 128);
    p = lowered(&f);
    fgqa_tensor out;
    CHECK(fgqa_problem_result(&p, FGQA_ARG_out, &out) && out.stride[0] == (int64_t)32 * 131072 * 128);
    CHECK(p.total_q == (int64_t)64 * 131072 && p.view[FGQA_ARG_q].stride_b == (int64_t)1 << 29);

    /* offsets that do not fit */
    small(&f, FGQA_PASS_FWD);
    f.t[FGQA_ARG_k].stride[2] = INT64_MAX / 4;
    fails(&f, FGQA_ERROR_VALUE, "k has shape (2, 3, 7, 8) and strides", "64-bit");
    f.t[FGQA_ARG_k].stride[2] = -(INT64_MAX / 24);
    f.t[FGQA_ARG_k].stride[1] = INT64_MAX / 9;
    fails(&f, FGQA_ERROR_VALUE, "k has shape", "64-bit");
    small(&f, FGQA_PASS_FWD);
    f.t[FGQA_ARG_v].shape[2] = (int64_t)1 << 31;
    fails(&f, FGQA_ERROR_VALUE, "v has shape (2, 3, 2147483648, 4)", "below 2^31; split axis 2");
    f.t[FGQA_ARG_v].shape[2] = -7;
    fails(&f, FGQA_ERROR_VALUE, "v has shape (2, 3, -7, 4)", "0 or more");

    /* broadcast inputs are small, but their result cannot be counted in 64 bits */
    small(&f, FGQA_PASS_FWD);
    for (int n = FGQA_ARG_q; n <= FGQA_ARG_v; n++) {
        for (int axis = 0; axis < 4; axis++) { f.t[n].stride[axis] = axis == 3; }
        f.t[n].shape[0] = f.t[n].shape[1] = INT32_MAX;
        f.t[n].shape[2] = 1;
        f.t[n].shape[3] = 4;
    }
    fails(&f, FGQA_ERROR_VALUE, "out would have shape [b, hq, sq, dv] = (2147483647, 2147483647, 1, 4)", "split the call");
}

/* Strides of axes of extent 1 and of empty arrays may be anything. */
static void idle_strides(void)
{
    fixture f;
    no_options(&f, FGQA_PASS_FWD);
    give(&f, FGQA_ARG_q, FGQA_F32, 1, 4, 1, 1);
    give(&f, FGQA_ARG_k, FGQA_F32, 1, 1, 3, 1);
    give(&f, FGQA_ARG_v, FGQA_F32, 1, 1, 3, 2);
    f.t[FGQA_ARG_q].stride[0] = INT64_MIN;
    f.t[FGQA_ARG_q].stride[2] = INT64_MAX;
    f.t[FGQA_ARG_q].stride[3] = -5;
    f.t[FGQA_ARG_k].stride[1] = INT64_MAX;
    fgqa_problem p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_q], f.t[FGQA_ARG_q].data, 0, 1, 0, 1));
    CHECK(same_view(p.view[FGQA_ARG_k], f.t[FGQA_ARG_k].data, 0, 0, 1, 1));
    fgqa_tensor *out = give(&f, FGQA_ARG_out, FGQA_F32, 1, 4, 1, 2);
    out->stride[0] = -1;
    out->stride[2] = 0;
    p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_out], out->data, 0, 2, 0, 1));

    small(&f, FGQA_PASS_FWD);
    for (int n = FGQA_ARG_q; n <= FGQA_ARG_v; n++) {
        f.t[n].shape[0] = 0;
        f.t[n].stride[1] = INT64_MAX;
    }
    p = lowered(&f);
    CHECK(p.b == 0);
    give(&f, FGQA_ARG_out, FGQA_F32, 0, 6, 5, 4)->data = f.t[FGQA_ARG_q].data;
    lowered(&f);
}

/* ---- results the caller brings ---- */

static void brought_results(void)
{
    fixture f;
    small(&f, FGQA_PASS_FWD);
    fgqa_tensor *out = give(&f, FGQA_ARG_out, FGQA_F32, 2, 6, 5, 4);
    fgqa_problem p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_out], out->data, 120, 20, 4, 1));
    out->stride[1] = -20;      /* heads written backwards */
    out->data = (float *)out->data + 100;
    lowered(&f);
    out->readonly = 1;
    fails(&f, FGQA_ERROR_VALUE, "out is read-only", "writable");
    out = give(&f, FGQA_ARG_out, FGQA_F32, 2, 6, 5, 4);
    out->stride[3] = 2;
    fails(&f, FGQA_ERROR_VALUE, "out has stride 2 in its last axis", "contiguous in its last axis");
    out->stride[3] = 1;
    out->stride[1] = 19;
    fails(&f, FGQA_ERROR_VALUE, "out has overlapping elements", "pass a copy");
    out->stride[1] = 0;
    fails(&f, FGQA_ERROR_VALUE, "out has overlapping elements", "pass a copy");
    out = give(&f, FGQA_ARG_out, FGQA_F32, 2, 6, 5, 4);
    out->data = f.t[FGQA_ARG_v].data;
    fails(&f, FGQA_ERROR_VALUE, "out overlaps v", "memory of its own");
    out->data = (char *)f.t[FGQA_ARG_v].data + 2 * 3 * 7 * 4 * 4;      /* right behind v */
    lowered(&f);
    out->data = (char *)f.t[FGQA_ARG_v].data + 2 * 3 * 7 * 4 * 4 - 1;
    fails(&f, FGQA_ERROR_VALUE, "out overlaps v", "memory of its own");
    give(&f, FGQA_ARG_out, FGQA_F64, 2, 6, 5, 4);
    fails(&f, FGQA_ERROR_TYPE, "out has dtype float64", "float32");
    give(&f, FGQA_ARG_out, FGQA_F32, 2, 5, 6, 4);
    fails(&f, FGQA_ERROR_VALUE, "out has shape (2, 5, 6, 4)", "[b, hq, sq, dv] = (2, 6, 5, 4)");
    give(&f, FGQA_ARG_out, FGQA_F32, 2, 6, 5, 4);
    give(&f, FGQA_ARG_lse, FGQA_F32, 2, 6, 5);
    fails(&f, FGQA_ERROR_VALUE, "lse is not a result of this call", "leave it out");
    f.r.want_lse = 1;
    f.t[FGQA_ARG_lse].data = f.t[FGQA_ARG_out].data;
    fails(&f, FGQA_ERROR_VALUE, "lse overlaps out", "memory of its own");

    small(&f, FGQA_PASS_BWD);
    f.t[FGQA_ARG_out].readonly = 1;           /* an input here */
    f.t[FGQA_ARG_dout].stride[1] = 0;         /* the gradient of a sum */
    f.t[FGQA_ARG_dout].stride[3] = 0;
    p = lowered(&f);
    CHECK(same_view(p.view[FGQA_ARG_dout], f.t[FGQA_ARG_dout].data, 120, 0, 4, 0));
    give(&f, FGQA_ARG_dq, FGQA_F32, 2, 6, 5, 8)->data = f.t[FGQA_ARG_out].data;
    fails(&f, FGQA_ERROR_VALUE, "dq overlaps out", "memory of its own");
    give(&f, FGQA_ARG_dq, FGQA_F32, 2, 6, 5, 8);
    give(&f, FGQA_ARG_dk, FGQA_F32, 2, 3, 7, 8)->data = f.t[FGQA_ARG_dq].data;
    fails(&f, FGQA_ERROR_VALUE, "dk overlaps dq", "memory of its own");
    give(&f, FGQA_ARG_dk, FGQA_F32, 2, 3, 7, 8);
    give(&f, FGQA_ARG_lse, FGQA_F64, 2, 6, 5);
    fails(&f, FGQA_ERROR_TYPE, "lse has dtype float64", "float32");
    give(&f, FGQA_ARG_lse, FGQA_F32, 2, 5, 6);
    fails(&f, FGQA_ERROR_VALUE, "lse has shape (2, 5, 6)", "[b, hq, sq] = (2, 6, 5)");
    f.r.tensor[FGQA_ARG_lse] = NULL;
    fails(&f, FGQA_ERROR_VALUE, "lse is missing", "attention_backward needs it");
    small(&f, FGQA_PASS_BWD);
    f.r.want_dsink = 1;
    fails(&f, FGQA_ERROR_VALUE, "dsink is wanted but sink is missing", "pass the sink");
}

/* ---- devices ---- */

static void devices(void)
{
    static const int32_t bad[] = {99, -4};
    fixture f;
    small(&f, FGQA_PASS_FWD);
    give_int32(&f, FGQA_ARG_kv_lens, bad, 2);
    fails(&f, FGQA_ERROR_VALUE, "kv_lens[0] is 99 but k has length 7", "0 to 7");
    on_gpu(&f);       /* device memory is not read */
    fgqa_problem p = lowered(&f);
    CHECK(p.device.type == FGQA_CUDA && p.kv_lens == (const int32_t *)f.t[FGQA_ARG_kv_lens].data);
    f.t[FGQA_ARG_kv_lens].device = (fgqa_device){FGQA_CPU, 0};
    fails(&f, FGQA_ERROR_VALUE, "kv_lens is on cpu but q is on cuda:0", "move kv_lens to cuda:0");
    f.t[FGQA_ARG_kv_lens].device = (fgqa_device){FGQA_CUDA, 1};
    fails(&f, FGQA_ERROR_VALUE, "kv_lens is on cuda:1 but q is on cuda:0", "one device");
    f.r.tensor[FGQA_ARG_kv_lens] = NULL;
    for (int n = FGQA_ARG_q; n <= FGQA_ARG_v; n++) { f.t[n].dtype = FGQA_F64; }
    fails(&f, FGQA_ERROR_NOT_IMPLEMENTED, "q has dtype float64 on cuda:0", "convert to float32");
    for (int n = FGQA_ARG_q; n <= FGQA_ARG_v; n++) { f.t[n].dtype = FGQA_F8E4M3; }
    fails(&f, FGQA_ERROR_NOT_IMPLEMENTED, "q has dtype float8_e4m3", "bfloat16");
    packed(&f, FGQA_PASS_FWD);
    f.r.max_q = 1;
    fails(&f, FGQA_ERROR_VALUE, "max_q is 1 but the longest sequence of cu_seqlens_q has 3 rows", "pass 3");
    on_gpu(&f);
    CHECK(lowered(&f).sq == 1);
}

/* ---- anything at all ---- */

static uint64_t random_state = 1;

static uint64_t draw(uint64_t n)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % n;
}

/* Bends valid requests at random: the answer is a problem whose results can be described, or a sentence; and no undefined
 * behaviour on the way (the sanitizer run sees to that). On the GPU, so that no contents are read. */
static void random_requests(void)
{
    static const int64_t extents[] = {0, 1, 2, 3, 5, 6, 7, 8, 256, 257, INT32_MAX, (int64_t)INT32_MAX + 1, INT64_MAX, -1, INT64_MIN};
    static const int64_t strides[] = {0, 1, 2, -1, 64, INT32_MAX, INT64_MAX, INT64_MIN, INT64_MAX / 7, -(INT64_MAX / 3)};
    static const double numbers[] = {0, 1, -1, 0.5, 1e-320, 1e300, INFINITY, -INFINITY, NAN};
    enum { EXTENTS = sizeof extents / sizeof *extents, STRIDES = sizeof strides / sizeof *strides };
    long accepted = 0, refused[FGQA_ERROR_INTERRUPTED + 1] = {0};
    for (int round = 0; round < 200000; round++) {
        fixture f;
        fgqa_problem p;
        (draw(2) ? small : packed)(&f, (fgqa_pass)draw(4));
        if (f.r.pass == FGQA_PASS_ROWS) { give(&f, FGQA_ARG_rows, FGQA_I64, 2); }
        if (draw(2)) { give(&f, FGQA_ARG_bias, FGQA_F32, 1, 6, 1, 1)->ndim = 2 + (int)draw(3); }
        if (draw(4) == 0) { give(&f, FGQA_ARG_mask, FGQA_BOOL, 5, 7); }
        if (draw(4) == 0) { give(&f, FGQA_ARG_alibi_slopes, FGQA_F32, 6); }
        if (draw(4) == 0) { give(&f, FGQA_ARG_sink, FGQA_F16, 6); }
        if (draw(4) == 0) { give(&f, FGQA_ARG_kv_lens, FGQA_I32, 2); }
        if (draw(4) == 0) { give(&f, FGQA_ARG_seed, FGQA_I64, 2); }
        if (draw(4) == 0) { give(&f, f.r.pass == FGQA_PASS_FWD ? FGQA_ARG_out : FGQA_ARG_dq, FGQA_F32, 2, 6, 5, 4); }
        f.r.want_dbias = f.r.tensor[FGQA_ARG_bias] != NULL;
        f.r.want_dsink = f.r.tensor[FGQA_ARG_sink] != NULL;
        f.r.want_lse = (int32_t)draw(2);
        f.r.layout = draw(4) ? FGQA_LAYOUT_BHSD : FGQA_LAYOUT_BSHD;
        for (uint64_t bends = draw(4); bends > 0; bends--) {
            const fgqa_arg arg = (fgqa_arg)draw(FGQA_ARG_COUNT);
            fgqa_tensor *t = &f.t[arg];
            switch (draw(8)) {
            case 0: t->shape[draw(4)] = extents[draw(EXTENTS)]; break;
            case 1: t->stride[draw(4)] = strides[draw(STRIDES)]; break;
            case 2: t->dtype = (fgqa_dtype)draw(FGQA_DTYPE_COUNT); break;
            case 3: t->ndim = (int32_t)draw(5); break;
            case 4: f.r.tensor[arg] = draw(2) ? t : NULL; break;
            case 5: f.r.window_left = extents[draw(EXTENTS)]; f.r.chunk = extents[draw(EXTENTS)]; break;
            case 6: f.r.has_softcap = f.r.has_scale = (int32_t)draw(2); f.r.softcap = numbers[draw(9)]; f.r.scale = numbers[draw(9)]; break;
            case 7: f.r.max_q = f.r.max_kv = extents[draw(EXTENTS)]; f.r.dropout_p = numbers[draw(9)]; break;
            }
        }
        on_gpu(&f);
        const fgqa_status status = fgqa_problem_init(&f.r, &p);
        if (status != FGQA_OK) {
            refused[status]++;
            CHECK(fgqa_message()[0] != '\0' && strstr(fgqa_message(), "(null)") == NULL);
            continue;
        }
        accepted++;
        for (int n = FGQA_ARG_out; n < FGQA_ARG_COUNT; n++) {
            fgqa_tensor spec;
            if (!fgqa_problem_result(&p, (fgqa_arg)n, &spec)) { continue; }
            int64_t count = spec.ndim > 0;
            for (int axis = 0; axis < spec.ndim; axis++) { count *= spec.shape[axis]; }
            CHECK(spec.ndim >= 1 && count >= 0);
            fgqa_problem_bind(&p, (fgqa_arg)n, &spec);
        }
        CHECK(p.d >= 1 && p.d <= 256 && p.g * p.hk == p.hq && p.b >= 0 && p.left >= 0 && p.right >= 0 && p.chunk >= 0);
    }
    CHECK(accepted > 20000 && refused[FGQA_ERROR_VALUE] > 20000 && refused[FGQA_ERROR_TYPE] > 2000);
    printf("%ld random requests accepted\n", accepted);
}

int main(void)
{
    layouts();
    packed_sequences();
    lengths_and_rules();
    score_tensors();
    weights();
    seeds();
    huge_strides();
    idle_strides();
    brought_results();
    devices();
    random_requests();
    CHECK(strcmp(fgqa_arg_name(FGQA_ARG_cu_seqlens_kv), "cu_seqlens_kv") == 0);
    CHECK(strcmp(fgqa_arg_name(FGQA_ARG_weights), "weights") == 0);
    return checks_passed("test_problem");
}
