/* test_xla.c - the custom call of XLA, with an interface and a kernel that are made here:
 * attributes, names, axes of vmap, failures. */
#include <stdint.h>

#include "../../csrc/cpu/cpu.h"
#include "check.h"
#include "xla_frame.h"

/* ---- a kernel: out(b, h, i, :) = q(b, h, i, 0) + k(b, h / g, 0, 0) ---- */

static fgqa_problem last;

static const char *serve(const fgqa_kernel *kernel, const fgqa_problem *problem, char why[128])
{
    (void)kernel;
    (void)problem;
    (void)why;
    return NULL;
}

static void tile(const fgqa_kernel *kernel, const fgqa_problem *problem, fgqa_plan *plan)
{
    (void)kernel;
    plan->workspace_bytes = problem->softcap == 13 ? SIZE_MAX / 4 : 100;
}

static float *at(const fgqa_view *v, int64_t b, int64_t h, int64_t s) { return (float *)v->data + b * v->stride_b + h * v->stride_h + s * v->stride_s; }

static fgqa_status run(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    CHECK(exec->interrupted == NULL && (uintptr_t)workspace % 64 == 0);
    memset(workspace, 1, plan->workspace_bytes);
    runs++;
    last = *p;
    for (int b = 0; b < p->b; b++) {
        for (int h = 0; h < p->hq; h++) {
            for (int i = 0; i < p->sq; i++) {
                const float sum = *at(&p->view[FGQA_ARG_q], b, h, i) + *at(&p->view[FGQA_ARG_k], b, h / p->g, 0);
                for (int d = 0; d < p->dv; d++) { at(&p->view[FGQA_ARG_out], b, h, i)[d] = sum; }
            }
        }
    }
    return FGQA_OK;
}

const fgqa_kernel *fgqa_cpu_kernels(int32_t *count)
{
    static const fgqa_kernel kernel = {.name = "fwd_test", .pass = FGQA_PASS_FWD, .device = FGQA_CPU, .refuse = serve, .tile = tile, .run = run};
    *count = 1;
    return &kernel;
}

/* ---- calls ---- */

static void fails(frame *f, xla_code code, const char *words)
{
    CHECK(fgqa_xla_cpu(&f->call) == &failure);
    CHECK_FOR(failure.code == code && strstr(failure.message, words) != NULL, "%d: %s", failure.code, failure.message);
    CHECK(runs == 0);
}

/* ---- data: hq 4, hk 2, sq 3, sk 5, d = dv = 2; as many entries as any test has ---- */

enum { ENTRIES = 12, Q = 4 * 3 * 2, K = 2 * 5 * 2 };

static float q[ENTRIES * Q], k[ENTRIES * K], v[ENTRIES * K], out[ENTRIES * Q];

static void fill(void)
{
    for (int n = 0; n < ENTRIES * Q; n++) { q[n] = (float)n; out[n] = -1; }
    for (int n = 0; n < ENTRIES * K; n++) { k[n] = 1000.0f * (float)n; }
}

/* Whether out is right where entry e reads entry e of q and entry k_of[e] of k. */
static void check_out(int entries, const int *k_of)
{
    for (int e = 0; e < entries; e++) {
        for (int row = 0; row < 12; row++) {
            const float wanted = q[e * Q + 2 * row] + k[k_of[e] * K + (row / 3 / 2) * 10];
            CHECK_FOR(out[e * Q + 2 * row] == wanted && out[e * Q + 2 * row + 1] == wanted, "entry %d row %d", e, row);
        }
    }
    CHECK(entries == ENTRIES || out[entries * Q] == -1);
}

static const int own[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}, zero[ENTRIES] = {0}, by_three[] = {0, 1, 2, 0, 1, 2}, by_outer[] = {0, 0, 0, 1, 1, 1};

static void test_plain_calls(void)
{
    frame f;
    begin(&f, "q k v ", 4, 0, 0);
    IN(&f, q, 2, 4, 3, 2); IN(&f, k, 2, 2, 5, 2); IN(&f, v, 2, 2, 5, 2); OUT(&f, out, 2, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 1);
    check_out(2, own);
    begin(&f, "q k v ", 3, 0, 0);
    IN(&f, q, 4, 3, 2); IN(&f, k, 2, 5, 2); IN(&f, v, 2, 5, 2); OUT(&f, out, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 1 && last.b == 1);
    check_out(1, own);
}

static void test_an_axis_of_vmap_becomes_the_batch(void)
{
    frame f;
    begin(&f, "q k v ", 3, 0, 0);
    IN(&f, q, 6, 4, 3, 2); IN(&f, k, 1, 2, 5, 2); IN(&f, v, 6, 2, 5, 2); OUT(&f, out, 6, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 1 && last.b == 6 && last.view[FGQA_ARG_k].stride_b == 0);
    check_out(6, zero);
    int32_t lens[12] = {0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5};
    begin(&f, "q k v kv_lens ", 4, 0, 0);
    IN(&f, q, 3, 2, 4, 3, 2); IN(&f, k, 3, 2, 2, 5, 2); IN(&f, v, 3, 2, 2, 5, 2);
    add_buffer(&f, 0, XLA_S32, lens, 2, (const int64_t[]){3, 2});
    OUT(&f, out, 3, 2, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 1 && last.b == 6 && last.kv_lens[5] == 5);
    check_out(6, own);
}

static void test_axes_of_vmap_nest(void)
{
    frame f;
    begin(&f, "q k v ", 3, 0, 0);
    IN(&f, q, 2, 3, 4, 3, 2); IN(&f, k, 1, 3, 2, 5, 2); IN(&f, v, 2, 1, 2, 5, 2); OUT(&f, out, 2, 3, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 2 && last.b == 3);
    check_out(6, by_three);
    begin(&f, "q k v ", 4, 0, 0);           /* k is the same along the inner axis: nothing to fold there */
    IN(&f, q, 2, 3, 1, 4, 3, 2); IN(&f, k, 2, 1, 1, 2, 5, 2); IN(&f, v, 1, 1, 1, 2, 5, 2); OUT(&f, out, 2, 3, 1, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 6 && last.b == 1);
    check_out(6, by_outer);
    begin(&f, "q k v ", 3, 0, 0);
    IN(&f, NULL, 0, 4, 3, 2); IN(&f, k, 1, 2, 5, 2); IN(&f, v, 1, 2, 5, 2); OUT(&f, NULL, 0, 4, 3, 2);
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 0);
}

static void test_seeds_in_halves(void)
{
    const uint32_t words[3][4] = {{1, 2, 3, 0}, {4, 5, 6, 0}, {7, 8, 9, 0}};
    frame f;
    begin(&f, "q k v seed ", 3, 0.5, 0);
    IN(&f, q, 3, 4, 3, 2); IN(&f, k, 3, 2, 5, 2); IN(&f, v, 3, 2, 5, 2);
    add_buffer(&f, 0, XLA_U32, (void *)(uintptr_t)words, 2, (const int64_t[]){3, 4});
    OUT(&f, out, 3, 4, 3, 2);
    fill();
    CHECK(fgqa_xla_cpu(&f.call) == NULL && runs == 3 && last.seed == 7 + ((uint64_t)8 << 32) && last.offset == 9);
    check_out(3, own);
}

static void test_failures(void)
{
    frame f;
#define PLAIN(names, rank) \
    begin(&f, names, rank, 0, 0); \
    IN(&f, q, 4, 3, 2); IN(&f, k, 2, 5, 2); IN(&f, v, 2, 5, 2); OUT(&f, out, 4, 3, 2)
    PLAIN("q k v ", 3);
    f.call.attributes.count--;              /* rank, the last */
    fails(&f, XLA_INVALID_ARGUMENT, "no attribute rank");
    PLAIN("q k v ", 3);
    f.call.attributes.names = NULL;
    f.call.attributes.count = 0;
    fails(&f, XLA_INVALID_ARGUMENT, "no attribute pass");
    PLAIN("q k v mask ", 3);
    fails(&f, XLA_INVALID_ARGUMENT, "4 arguments are named but 3 are given");
    PLAIN("q k values ", 3);
    fails(&f, XLA_INVALID_ARGUMENT, "no argument \"values\"");
    PLAIN("q k v ", 4);
    fails(&f, XLA_UNIMPLEMENTED, "-1 axes of vmap");
    PLAIN("q k v ", 3);
    f.buffer[1].dtype = XLA_U32;
    fails(&f, XLA_INVALID_ARGUMENT, "k has a dtype");
    PLAIN("q k v ", 3);
    f.shape[1][0] = 3;
    fails(&f, XLA_INVALID_ARGUMENT, "head");
    PLAIN("q k v ", 3);
    f.shape[3][1] = 4;
    fails(&f, XLA_INVALID_ARGUMENT, "buffer for out has another dtype or shape");
    PLAIN("q k v ", 3);
    f.call.results.count = 0;
    fails(&f, XLA_INVALID_ARGUMENT, "no buffer for out");
    begin(&f, "q k v ", 3, 0, 13);
    IN(&f, q, 4, 3, 2); IN(&f, k, 2, 5, 2); IN(&f, v, 2, 5, 2); OUT(&f, out, 4, 3, 2);
    fails(&f, XLA_RESOURCE_EXHAUSTED, "does not fit into memory");
    PLAIN("q k v ", 3);
    f.texts[f.call.attributes.count - 2] = (xla_text){"fwd_other", 9};
    fails(&f, XLA_INVALID_ARGUMENT, "fwd_other");
    CHECK(fgqa_xla_cuda(&f.call) == &failure && failure.code == XLA_UNIMPLEMENTED && strstr(failure.message, "no CUDA kernels"));
}

static void test_the_version_is_told(void)
{
    xla_metadata metadata = {.version = {.major = -1, .minor = -1}};
    xla_metadata_extension ask = {.base = {.type = XLA_EXTENSION_METADATA}, .metadata = &metadata};
    xla_call call = {.size = sizeof call, .extensions = &ask.base};
    CHECK(fgqa_xla_cpu(&call) == NULL && metadata.version.major == 0 && metadata.version.minor == XLA_API_MINOR && metadata.traits == 0);
    metadata.version.minor = -1;
    CHECK(fgqa_xla_cuda(&call) == NULL && metadata.version.minor == XLA_API_MINOR);
}

int main(void)
{
    test_plain_calls();
    test_an_axis_of_vmap_becomes_the_batch();
    test_axes_of_vmap_nest();
    test_seeds_in_halves();
    test_failures();
    test_the_version_is_told();
    return checks_passed("test_xla");
}
