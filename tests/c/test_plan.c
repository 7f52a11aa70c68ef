/* test_plan.c - which kernel a plan takes, its reasons, its count of work and its words, with kernels that do nothing. */
#include "../../csrc/core/plan.h"
#include "fixture.h"

static const char *never(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    (void)kernel;
    return fgqa_reason(why, "head dim %d is not 64", (int)p->d);
}

static const char *no_mask(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    (void)kernel;
    (void)why;
    return p->view[FGQA_ARG_mask].data ? "no mask tensors" : NULL;
}

static const char *always(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    (void)kernel;
    (void)p;
    (void)why;
    return NULL;
}

static void tile(const fgqa_kernel *kernel, const fgqa_problem *p, fgqa_plan *plan)
{
    (void)kernel;
    plan->block_q = 16;
    plan->block_k = 64;
    plan->tasks = (int64_t)p->b * p->hk;
    plan->threads = plan->flops > 1e6 ? 8 : 1;     /* the count of work is there already */
    plan->scratch_bytes = 3000;
    plan->workspace_bytes = (size_t)5 << 20;
}

static const fgqa_kernel kernels[] = {
    {"fwd_gpu", FGQA_PASS_FWD, FGQA_CUDA, always, tile, NULL, NULL, NULL},
    {"fwd_narrow", FGQA_PASS_FWD, FGQA_CPU, never, tile, NULL, NULL, NULL},
    {"fwd_fast", FGQA_PASS_FWD, FGQA_CPU, no_mask, tile, NULL, NULL, NULL},
    {"fwd_general", FGQA_PASS_FWD, FGQA_CPU, always, tile, NULL, NULL, NULL},
    {"bwd_narrow", FGQA_PASS_BWD, FGQA_CPU, never, tile, NULL, NULL, NULL},
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

static void says(fgqa_status status, fgqa_status code, const char *message)
{
    CHECK_FOR(status == code && strstr(fgqa_message(), message), "%d \"%s\" instead of %d \"%s\"", (int)status, fgqa_message(),
              (int)code, message);
}

static void choice(void)
{
    fixture f;
    fgqa_plan plan;
    small(&f, FGQA_PASS_FWD);
    fgqa_problem p = lowered(&f);
    CHECK(fgqa_plan_make(&p, kernels, KERNELS, NULL, &plan) == FGQA_OK);
    CHECK(strcmp(plan.kernel->name, "fwd_fast") == 0 && !plan.refused[0]);
    fgqa_plan_reasons(&p, kernels, KERNELS, NULL, &plan);
    CHECK(strcmp(plan.refused, "fwd_narrow: head dim 8 is not 64\n") == 0);
    CHECK(plan.block_q == 16 && plan.tasks == 6 && plan.splits == 1 && plan.threads == 1);
    CHECK(fgqa_plan_make(&p, kernels, KERNELS, "fwd_general", &plan) == FGQA_OK && plan.kernel == &kernels[3]);
    fgqa_plan_reasons(&p, kernels, KERNELS, "fwd_general", &plan);
    CHECK(!plan.refused[0]);
    says(fgqa_plan_make(&p, kernels, KERNELS, "fwd_narrow", &plan), FGQA_ERROR_NOT_IMPLEMENTED, "fwd_narrow: head dim 8 is not 64");
    says(fgqa_plan_make(&p, kernels, KERNELS, "fwd_gpu", &plan), FGQA_ERROR_VALUE,
         "kernel is \"fwd_gpu\": no forward kernel for CPU has that name; choose one of fwd_narrow, fwd_fast, fwd_general, or None");
    says(fgqa_plan_make(&p, kernels, 1, NULL, &plan), FGQA_ERROR_NOT_IMPLEMENTED, "this build has no forward kernel for CPU");

    give(&f, FGQA_ARG_mask, FGQA_BOOL, 5, 7);
    p = lowered(&f);
    CHECK(fgqa_plan_make(&p, kernels, KERNELS, NULL, &plan) == FGQA_OK && plan.kernel == &kernels[3]);
    fgqa_plan_reasons(&p, kernels, KERNELS, NULL, &plan);
    CHECK(strcmp(plan.refused, "fwd_narrow: head dim 8 is not 64\nfwd_fast: no mask tensors\n") == 0);

    small(&f, FGQA_PASS_BWD);
    p = lowered(&f);
    says(fgqa_plan_make(&p, kernels, KERNELS, NULL, &plan), FGQA_ERROR_NOT_IMPLEMENTED,
         "no backward kernel for CPU serves this call:\nbwd_narrow: head dim 8 is not 64\n");
}

/* As many kernels as a GPU has: a sentence names them all, or each reason once, and ends with what would help. */
static void long_tables(void)
{
    enum { MANY = 120, LONGEST = 38 };
    static char names[MANY][LONGEST + 1];
    static fgqa_kernel table[MANY];
    fixture f;
    fgqa_plan plan;
    for (int n = 0; n < MANY; n++) {
        snprintf(names[n], sizeof names[n], "fwd_%0*d", LONGEST - 4, n);
        const fgqa_kernel one = {names[n], FGQA_PASS_FWD, FGQA_CPU, never, tile, NULL, NULL, NULL};
        memcpy(&table[n], &one, sizeof one);
    }
    small(&f, FGQA_PASS_FWD);
    const fgqa_problem p = lowered(&f);
    says(fgqa_plan_make(&p, table, MANY, NULL, &plan), FGQA_ERROR_NOT_IMPLEMENTED,
         "0: head dim 8 is not 64\nchange what the reasons name");
    says(fgqa_plan_make(&p, table, MANY, "no", &plan), FGQA_ERROR_VALUE, ", or None");
    CHECK(strstr(fgqa_message(), names[MANY - 1]) != NULL);
}

/* Every pass has its count. */
static void passes(void)
{
    static const int64_t rows[] = {0, 4};
    static const fgqa_kernel any[] = {
        {"bwd", FGQA_PASS_BWD, FGQA_CPU, always, tile, NULL, NULL, NULL},
        {"rows", FGQA_PASS_ROWS, FGQA_CPU, always, tile, NULL, NULL, NULL},
        {"keysum", FGQA_PASS_KEYSUM, FGQA_CPU, always, tile, NULL, NULL, NULL},
        {"rows_gpu", FGQA_PASS_ROWS, FGQA_CUDA, always, tile, NULL, NULL, NULL},
    };
    fixture f;
    fgqa_plan plan;
    small(&f, FGQA_PASS_BWD);
    fgqa_problem p = lowered(&f);
    CHECK(fgqa_plan_make(&p, any, 4, NULL, &plan) == FGQA_OK && plan.flops == 2 * (3 * 8 + 2 * 4) * 2 * 6 * 5 * 7);
    small(&f, FGQA_PASS_KEYSUM);
    p = lowered(&f);
    CHECK(fgqa_plan_make(&p, any, 4, NULL, &plan) == FGQA_OK && plan.flops == 2 * 2 * 8 * 2 * 6 * 5 * 7);
    small(&f, FGQA_PASS_ROWS);
    memcpy(give(&f, FGQA_ARG_rows, FGQA_I64, 2)->data, rows, sizeof rows);
    f.r.causal = 1;      /* row 0 sees 3 keys, row 4 all 7 */
    p = lowered(&f);
    CHECK(fgqa_plan_make(&p, any, 4, NULL, &plan) == FGQA_OK && plan.flops == 2 * 8 * 2 * 6 * (3 + 7));
    on_gpu(&f);
    p = lowered(&f);
    CHECK(fgqa_plan_make(&p, any, 4, NULL, &plan) == FGQA_OK && plan.flops == 2 * 8 * 2 * 6 * (7 + 7));
}

/* By asking every element. */
static double counted(const fgqa_problem *p)
{
    double n = 0;
    for (int32_t b = 0; b < p->b; b++) {
        const fgqa_mask m = fgqa_problem_sequence(p, b).mask;
        for (int32_t i = 0; i < m.sq; i++) {
            for (int32_t j = 0; j < m.sk; j++) { n += fgqa_visible(&m, i, j); }
        }
    }
    return n * p->hq;
}

static void work(void)
{
    static const int32_t q_lens[] = {5, 2}, kv_lens[] = {3, 3};
    fixture f;
    fgqa_plan plan;
    small(&f, FGQA_PASS_FWD);
    fgqa_problem p = lowered(&f);
    CHECK(fgqa_problem_visible_scores(&p) == 2 * 6 * 5 * 7);
    CHECK(fgqa_plan_make(&p, kernels, KERNELS, NULL, &plan) == FGQA_OK && plan.flops == 2 * (8 + 4) * 2 * 6 * 5 * 7);
    for (int rule = 0; rule < 4 * 3 * 2; rule++) {
        small(&f, FGQA_PASS_FWD);
        f.r.window_left = rule % 4 == 0 ? FGQA_UNBOUNDED : rule % 4;
        f.r.causal = rule / 4 % 3;
        f.r.chunk = rule / 4 % 3 == 2 ? 3 : 0;
        f.r.align = rule / 12 ? FGQA_ALIGN_TOP_LEFT : FGQA_ALIGN_BOTTOM_RIGHT;
        p = lowered(&f);
        const double whole = counted(&p);
        CHECK(fgqa_problem_visible_scores(&p) == whole);
        give_int32(&f, FGQA_ARG_q_lens, q_lens, 2);
        give_int32(&f, FGQA_ARG_kv_lens, kv_lens, 2);
        p = lowered(&f);
        CHECK(fgqa_problem_visible_scores(&p) == counted(&p));
        f.r.tensor[FGQA_ARG_q_lens] = NULL;
        p = lowered(&f);
        CHECK(fgqa_problem_visible_scores(&p) == counted(&p));
        on_gpu(&f);         /* where lengths are not read */
        p = lowered(&f);
        CHECK(fgqa_problem_visible_scores(&p) == whole);
        packed(&f, FGQA_PASS_FWD);
        f.r.causal = 1;
        f.r.align = rule / 12 ? FGQA_ALIGN_TOP_LEFT : FGQA_ALIGN_BOTTOM_RIGHT;
        p = lowered(&f);
        CHECK(fgqa_problem_visible_scores(&p) == counted(&p));
    }
    static const int32_t sides[] = {FGQA_UNBOUNDED, 0, 1, 5, 40}, chunks[] = {0, 1, 4, 7, 100};
    for (int rule = 0; rule < 5 * 5 * 5 * 2; rule++) {
        for (int lengths = 0; lengths < 6 * 6; lengths++) {
            static const int32_t sizes[] = {0, 1, 2, 13, 31, 50};
            const int32_t sq = sizes[lengths % 6], sk = sizes[lengths / 6];
            no_options(&f, FGQA_PASS_FWD);
            give(&f, FGQA_ARG_q, FGQA_F32, 1, 1, sq, 1);
            give(&f, FGQA_ARG_k, FGQA_F32, 1, 1, sk, 1);
            give(&f, FGQA_ARG_v, FGQA_F32, 1, 1, sk, 1);
            f.r.window_left = sides[rule % 5];
            f.r.window_right = sides[rule / 5 % 5];
            f.r.chunk = chunks[rule / 25 % 5];
            f.r.align = rule / 125 ? FGQA_ALIGN_TOP_LEFT : FGQA_ALIGN_BOTTOM_RIGHT;
            p = lowered(&f);
            CHECK_FOR(fgqa_problem_visible_scores(&p) == counted(&p), "rule %d sq %d sk %d", rule, (int)sq, (int)sk);
        }
    }
    /* 2^31 - 1 rows are counted without walking them, with and without a mask */
    no_options(&f, FGQA_PASS_FWD);
    give(&f, FGQA_ARG_q, FGQA_F32, 1, 1, INT32_MAX, 1);
    give(&f, FGQA_ARG_k, FGQA_F32, 1, 1, INT32_MAX, 1);
    give(&f, FGQA_ARG_v, FGQA_F32, 1, 1, INT32_MAX, 1);
    p = lowered(&f);
    CHECK(fgqa_problem_visible_scores(&p) == (double)INT32_MAX * INT32_MAX);
    f.r.causal = 1;
    p = lowered(&f);
    CHECK(fgqa_problem_visible_scores(&p) == (double)((int64_t)INT32_MAX * ((int64_t)INT32_MAX + 1) / 2));
    f.r.chunk = 1 << 20;
    p = lowered(&f);
    CHECK(fgqa_problem_visible_scores(&p) == 2048.0 * ((1 << 20) * (((int64_t)1 << 20) + 1) / 2) - (1 << 20));
}

static void words(void)
{
    static const int32_t kv_lens[] = {3, 3};
    fixture f;
    fgqa_plan plan;
    char text[2048], part[40];
    small(&f, FGQA_PASS_FWD);
    f.r.causal = 1;
    f.r.window_left = 4;
    f.r.dropout_p = 0.5;
    f.r.has_seed = 1;
    give(&f, FGQA_ARG_sink, FGQA_F32, 6);
    give_int32(&f, FGQA_ARG_kv_lens, kv_lens, 2);
    const fgqa_problem p = lowered(&f);
    CHECK(fgqa_plan_make(&p, kernels, KERNELS, NULL, &plan) == FGQA_OK);
    fgqa_plan_reasons(&p, kernels, KERNELS, NULL, &plan);
    const int length = fgqa_plan_print(&plan, &p, text, sizeof text);
    CHECK(length == (int)strlen(text));
    static const char *const wanted[] = {
        "problem   forward, float32, b 2, hq 6, hk 3 (2 query heads a KV head), sq 5, sk 7, d 8, dv 4\n",
        "options   scale 0.353553, window (4, 0), sink, kv_lens, dropout 32768/65536\n",
        "kernel    fwd_fast on CPU\n",
        "tiles     16 query rows x 64 keys, 1 split, 6 tasks, at most 1 thread\n",
        "memory    2.9 KiB scratch a thread, 5.0 MiB workspace\n",
        "work      ",
        "passed    fwd_narrow: head dim 8 is not 64\n",
    };
    for (size_t n = 0; n < sizeof wanted / sizeof *wanted; n++) {
        CHECK_FOR(strstr(text, wanted[n]), "\"%s\" is missing from\n%s", wanted[n], text);
    }
    memset(part, 'x', sizeof part);
    CHECK(fgqa_plan_print(&plan, &p, part, 20) == length && strlen(part) == 19 && strncmp(part, text, 19) == 0 && part[20] == 'x');
    CHECK(fgqa_plan_print(&plan, &p, NULL, 0) == length);
    puts(text);
}

int main(void)
{
    choice();
    long_tables();
    passes();
    work();
    words();
    return checks_passed("test_plan");
}
