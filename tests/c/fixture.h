/* fixture.h - requests for the C unit tests: small valid ones with real memory, to be bent by each test. */
#ifndef FGQA_TESTS_FIXTURE_H
#define FGQA_TESTS_FIXTURE_H
#include "../../csrc/core/problem.h"
#include "check.h"

/* Memory of one tensor each; results land in their own. */
#define FIXTURE_BYTES 65536
typedef struct {
    fgqa_request r;
    fgqa_tensor t[FGQA_ARG_COUNT];
} fixture;

static char fixture_memory[FGQA_ARG_COUNT][FIXTURE_BYTES];

/* Sets an argument to a contiguous tensor of that shape, e.g. give(&f, FGQA_ARG_q, FGQA_F32, 3, 4, 8, 16). */
#define give(f, arg, dtype, ...) \
    give_shape(f, arg, dtype, (const int64_t[]){__VA_ARGS__}, (int)(sizeof(int64_t[]){__VA_ARGS__}) / (int)sizeof(int64_t))

static inline fgqa_tensor *give_shape(fixture *f, fgqa_arg arg, fgqa_dtype dtype, const int64_t *shape, int ndim)
{
    fgqa_tensor *t = &f->t[arg];
    memset(t, 0, sizeof *t);
    t->data = fixture_memory[arg];
    t->dtype = dtype;
    t->ndim = ndim;
    int64_t stride = 1;
    for (int axis = ndim - 1; axis >= 0; axis--) {
        t->shape[axis] = shape[axis];
        t->stride[axis] = stride;
        stride *= shape[axis] > 0 ? shape[axis] : 1;
    }
    f->r.tensor[arg] = t;
    return t;
}

static inline fgqa_tensor *give_int32(fixture *f, fgqa_arg arg, const int32_t *values, int n)
{
    fgqa_tensor *t = give(f, arg, FGQA_I32, n);
    memcpy(t->data, values, (size_t)n * sizeof *values);
    return t;
}

/* The defaults of api.py. */
static inline void no_options(fixture *f, fgqa_pass pass)
{
    memset(f, 0, sizeof *f);
    f->r.pass = pass;
    f->r.window_left = f->r.window_right = FGQA_UNBOUNDED;
    f->r.max_q = f->r.max_kv = -1;
    f->r.deterministic = 1;
}

/* q [2, 6, 5, 8], k [2, 3, 7, 8], v [2, 3, 7, 4], float32, CPU; for BWD also dout, out, lse. */
static inline void small(fixture *f, fgqa_pass pass)
{
    no_options(f, pass);
    give(f, FGQA_ARG_q, FGQA_F32, 2, 6, 5, 8);
    give(f, FGQA_ARG_k, FGQA_F32, 2, 3, 7, 8);
    if (pass == FGQA_PASS_FWD || pass == FGQA_PASS_BWD) { give(f, FGQA_ARG_v, FGQA_F32, 2, 3, 7, 4); }
    if (pass == FGQA_PASS_BWD) {
        give(f, FGQA_ARG_dout, FGQA_F32, 2, 6, 5, 4);
        give(f, FGQA_ARG_out, FGQA_F32, 2, 6, 5, 4);
        give(f, FGQA_ARG_lse, FGQA_F32, 2, 6, 5);
    }
}

/* Sequences of 2, 0 and 3 rows, 1, 4 and 2 keys: q [5, 6, 8], k [7, 3, 8], v [7, 3, 4]. */
static inline void packed(fixture *f, fgqa_pass pass)
{
    static const int32_t cu_q[] = {0, 2, 2, 5}, cu_kv[] = {0, 1, 5, 7};
    no_options(f, pass);
    give(f, FGQA_ARG_q, FGQA_F32, 5, 6, 8);
    give(f, FGQA_ARG_k, FGQA_F32, 7, 3, 8);
    if (pass == FGQA_PASS_FWD || pass == FGQA_PASS_BWD) { give(f, FGQA_ARG_v, FGQA_F32, 7, 3, 4); }
    if (pass == FGQA_PASS_BWD) {
        give(f, FGQA_ARG_dout, FGQA_F32, 5, 6, 4);
        give(f, FGQA_ARG_out, FGQA_F32, 5, 6, 4);
        give(f, FGQA_ARG_lse, FGQA_F32, 6, 5);
    }
    give_int32(f, FGQA_ARG_cu_seqlens_q, cu_q, 4);
    give_int32(f, FGQA_ARG_cu_seqlens_kv, cu_kv, 4);
}

static inline void on_gpu(fixture *f)
{
    for (int n = 0; n < FGQA_ARG_COUNT; n++) { f->t[n].device = (fgqa_device){FGQA_CUDA, 0}; }
}

static inline fgqa_problem lowered(const fixture *f)
{
    fgqa_problem p;
    const fgqa_status status = fgqa_problem_init(&f->r, &p);
    CHECK_FOR(status == FGQA_OK, "%s", fgqa_message());
    return p;
}

#endif
