/* plan.h - which kernel runs a problem, in what tiles, with how much scratch. Pointer-free but for the kernel row; prints itself.
 *
 * A backend offers its kernels as a list of rows; fgqa_plan_make() takes the first row of the list that serves the
 * problem; fgqa_plan_reasons() says why each earlier one did not. Rows are listed fastest first.
 */
#ifndef FGQA_PLAN_H
#define FGQA_PLAN_H
#include "problem.h"

typedef struct fgqa_kernel fgqa_kernel;

typedef struct {
    const fgqa_kernel *kernel;
    int32_t block_q;           /* packed query rows (token x head of the group) of one task */
    int32_t block_k;           /* keys of one tile */
    int32_t splits;            /* FWD: parts of the key range; BWD: parts of the query rows of one KV head */
    int64_t tasks;
    int32_t threads;           /* most workers worth waking; 1 for work under about 50 us */
    size_t scratch_bytes;      /* per worker */
    size_t workspace_bytes;    /* shared by all tasks, zero-filled by nobody */
    double flops;              /* of the visible part of the score matrix; what explain and benchmarks quote */
    char refused[6144];        /* "name: reason\n" for each kernel passed over, once asked for */
} fgqa_plan;

/* What a running call may need from its caller. */
typedef struct {
    void *stream;                          /* CUDA stream; NULL on the CPU */
    int (*interrupted)(void *context);     /* polled about every 50 ms on the calling thread; nonzero: stop */
    void *context;
} fgqa_exec;

struct fgqa_kernel {
    const char *name;                      /* "fwd_avx512": what kernel=, explain and profiles show; unique */
    fgqa_pass pass;
    fgqa_device_type device;
    /* NULL if the row can run this problem on this machine, else the reason: static text, or built in `why`. Without a `why`
     * nobody reads it. */
    const char *(*refuse)(const fgqa_kernel *kernel, const fgqa_problem *problem, char why[128]);
    /* Fills tiles, splits, tasks, threads and memory of the plan. From the shape alone, never from the thread count. */
    void (*tile)(const fgqa_kernel *kernel, const fgqa_problem *problem, fgqa_plan *plan);
    fgqa_status (*run)(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec);
    const void *row;                       /* the backend's own table row */
    /* As refuse, of a row that could run the problem but is slower than a later one; not asked when the caller named the row.
     * NULL: there is nothing to say. */
    const char *(*pass_over)(const fgqa_kernel *kernel, const fgqa_problem *problem, char why[128]);
};

/* `forced`: a kernel's name, or NULL. NotImplementedError with every refusal when nothing serves; ValueError with the
 * list of names when `forced` is unknown. */
fgqa_status fgqa_plan_make(const fgqa_problem *problem, const fgqa_kernel *kernels, int32_t n_kernels,
                           const char *forced, fgqa_plan *plan);

/* Fills `refused` for the same problem and kernels. Not done by the above: on the way of every call nobody reads it. */
void fgqa_plan_reasons(const fgqa_problem *problem, const fgqa_kernel *kernels, int32_t n_kernels, const char *forced, fgqa_plan *plan);

/* For refuse() and pass_over(): a reason built in `why`, or any one if that is NULL. */
const char *fgqa_reason(char why[128], const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Visible scores of the problem, summed over batch and query heads (exact for interval masks). Lengths that live on a
 * GPU are not read: there the padded shape counts. */
double fgqa_problem_visible_scores(const fgqa_problem *problem);

/* The plan as a few lines of text; returns the length it needed, like snprintf. */
int fgqa_plan_print(const fgqa_plan *plan, const fgqa_problem *problem, char *text, size_t size);

#endif
