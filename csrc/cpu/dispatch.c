/* dispatch.c - the CPU backend's kernels: one fgqa_kernel per pass and row of isa.def that this processor has.
 *
 * Each pass is a source compiled once per row and precision; it offers fgqa_<pass>_<isa>_<f32|f64>_tile and _run.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cpu.h"
#include "cpu_features.h"
#include "threads.h"

#define CPU_PASSES(X, isa) \
    X(fwd, FGQA_PASS_FWD, isa) \
    X(bwd, FGQA_PASS_BWD, isa) \
    X(rows, FGQA_PASS_ROWS, isa) \
    X(keysum, FGQA_PASS_KEYSUM, isa)

#if defined(__x86_64__)
#define ON_x86_64(here, elsewhere) here
#else
#define ON_x86_64(here, elsewhere) elsewhere
#endif
#if defined(__aarch64__)
#define ON_aarch64(here, elsewhere) here
#else
#define ON_aarch64(here, elsewhere) elsewhere
#endif
#define ON_any(here, elsewhere) here

typedef struct {
    void (*tile)(const fgqa_problem *problem, fgqa_plan *plan);
    fgqa_status (*run)(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec);
} cpu_code;

/* splits: forward and backward of this instruction set also take what they can split into bfloat16 numbers. */
typedef struct { const char *name, *isa; fgqa_pass pass; cpu_code f32, f64, bf16; int splits; } cpu_row;

#define DECLARE_CODE(pass, isa, real_name)                                              \
    void fgqa_##pass##_##isa##_##real_name##_tile(const fgqa_problem *, fgqa_plan *);     \
    fgqa_status fgqa_##pass##_##isa##_##real_name##_run(const fgqa_plan *, const fgqa_problem *, void *, const fgqa_exec *);
#define DECLARE_PASS(pass, id, isa) DECLARE_CODE(pass, isa, f32) DECLARE_CODE(pass, isa, f64)
#define FGQA_ISA(name, machine, flags) ON_##machine(CPU_PASSES(DECLARE_PASS, name), )
#define FGQA_ISA_BF16(name, machine, flags, rest, splits) ON_##machine(DECLARE_CODE(fwd, name, f32) DECLARE_CODE(bwd, name, f32), )
#include "isa.def"
#undef FGQA_ISA
#undef FGQA_ISA_BF16

#define CODE(pass, isa, real_name) {fgqa_##pass##_##isa##_##real_name##_tile, fgqa_##pass##_##isa##_##real_name##_run}
#define ROW(pass, id, isa, rest, bf16, splits) \
    {#pass "_" #isa, #isa, id, CODE(pass, rest, f32), CODE(pass, rest, f64), CODE(pass, bf16, f32), splits},
#define ROW_OF_PASS(pass, id, isa) ROW(pass, id, isa, isa, isa, 0)
#define ROWS_BF16(isa, rest, splits) \
    ROW(fwd, FGQA_PASS_FWD, isa, rest, isa, splits) \
    ROW(bwd, FGQA_PASS_BWD, isa, rest, isa, splits) \
    ROW(rows, FGQA_PASS_ROWS, isa, rest, rest, splits) \
    ROW(keysum, FGQA_PASS_KEYSUM, isa, rest, rest, splits)
static const cpu_row rows[] = {
#define FGQA_ISA(name, machine, flags) ON_##machine(CPU_PASSES(ROW_OF_PASS, name), )
#define FGQA_ISA_BF16(name, machine, flags, rest, splits) ON_##machine(ROWS_BF16(name, rest, splits), )
#include "isa.def"
#undef FGQA_ISA
#undef FGQA_ISA_BF16
};
#define ROW_COUNT ((int32_t)(sizeof rows / sizeof rows[0]))

static const struct { const char *name; int32_t compiled; } isas[] = {
#define FGQA_ISA(name, machine, flags) {#name, ON_##machine(1, 0)},
#define FGQA_ISA_BF16(name, machine, flags, rest, splits) FGQA_ISA(name, machine, flags)
#include "isa.def"
#undef FGQA_ISA
#undef FGQA_ISA_BF16
};
#define ISA_COUNT ((int32_t)(sizeof isas / sizeof isas[0]))

/* ---- one row as a kernel ---- */

static const char *refuse(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    const cpu_row *row = kernel->row;
    if (p->device.type != FGQA_CPU) { return "the arrays are not in CPU memory"; }
    if (p->precision != FGQA_PRECISION_DEFAULT && !row->splits) {
        return "precision=\"bf16x3\" needs a CPU with AMX: this kernel multiplies float32 numbers as they are; leave precision out";
    }
    if (p->precision != FGQA_PRECISION_DEFAULT && row->pass != FGQA_PASS_FWD && row->pass != FGQA_PASS_BWD) {
        return "precision=\"bf16x3\" is for outputs and gradients: this pass multiplies float32 numbers as they are; leave precision out";
    }
    if (p->dtype != FGQA_F64 && p->dtype != FGQA_F32 && p->dtype != FGQA_F16 && p->dtype != FGQA_BF16) {
        return fgqa_reason(why, "dtype %s: built for float64, float32, float16 and bfloat16", fgqa_dtype_name(p->dtype));
    }
    return NULL;
}

#define SPLIT_ROWS 256     /* packed rows that share the work of splitting K and V; decode steps have fewer */

/* What is split: float32 where precision asks for it, and float16 where that pays, by the
 * shape that all sequences of the batch have. */
static const cpu_code *code_for(const fgqa_kernel *kernel, const fgqa_problem *p)
{
    const cpu_row *row = kernel->row;
    const int float8_cache = p->view[FGQA_ARG_k].dtype != p->dtype;
    const int many = p->varlen || p->q_lens || (int64_t)p->sq * p->g >= SPLIT_ROWS;
    const int split = row->splits && (p->precision == FGQA_PRECISION_BF16X3 || (p->dtype == FGQA_F16 && many));
    return p->dtype == FGQA_F64 ? &row->f64 : (p->dtype == FGQA_BF16 || split) && !float8_cache ? &row->bf16 : &row->f32;
}

static void tile(const fgqa_kernel *kernel, const fgqa_problem *p, fgqa_plan *plan) { code_for(kernel, p)->tile(p, plan); }

static fgqa_status run(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    return code_for(plan->kernel, p)->run(plan, p, workspace, exec);
}

/* ---- the rows of this processor ---- */

static struct {
    pthread_once_t once;
    fgqa_kernel kernels[sizeof rows / sizeof rows[0]];
    int32_t count;
    const char *isa;             /* best row in use */
    char problem[256];           /* what is wrong with FLASHGQA_CPU_ISA; "" when nothing */
} cpu = {.once = PTHREAD_ONCE_INIT};

static int32_t isa_index(const char *name)
{
    for (int32_t n = 0; n < ISA_COUNT; n++) {
        if (strcmp(isas[n].name, name) == 0) { return n; }
    }
    return -1;
}

static int isa_usable(int32_t n) { return isas[n].compiled && fgqa_cpu_has(isas[n].name); }

static void usable_names(char *text, size_t size)
{
    size_t used = 0;
    text[0] = '\0';
    for (int32_t n = 0; n < ISA_COUNT && used < size; n++) {
        if (isa_usable(n)) { used += (size_t)snprintf(text + used, size - used, "%s%s", used ? ", " : "", isas[n].name); }
    }
}

static void find_kernels(void)
{
    int32_t best = 0;
    const char *wanted = getenv("FLASHGQA_CPU_ISA");
    if (wanted && *wanted) {
        char usable[128];
        usable_names(usable, sizeof usable);
        best = isa_index(wanted);
        if (best < 0) {
            snprintf(cpu.problem, sizeof cpu.problem, "FLASHGQA_CPU_ISA is \"%.32s\": no such instruction set; this processor can use %s", wanted, usable);
        } else if (!isa_usable(best)) {
            snprintf(cpu.problem, sizeof cpu.problem, "FLASHGQA_CPU_ISA is \"%.32s\", which this processor or build does not have; it can use %s", wanted, usable);
        }
        if (cpu.problem[0]) { best = 0; }
    }
    for (int32_t n = 0; n < ROW_COUNT; n++) {
        const int32_t isa = isa_index(rows[n].isa);
        if (isa < best || !isa_usable(isa)) { continue; }
        if (!cpu.isa) { cpu.isa = rows[n].isa; }
        const fgqa_kernel kernel = {rows[n].name, rows[n].pass, FGQA_CPU, refuse, tile, run, &rows[n], NULL};
        cpu.kernels[cpu.count++] = kernel;
    }
}

fgqa_status fgqa_cpu_init(void)
{
    pthread_once(&cpu.once, find_kernels);
    FGQA_TRY(fgqa_threads_init());
    return cpu.problem[0] ? fgqa_fail(FGQA_ERROR_VALUE, "%s", cpu.problem) : FGQA_OK;
}

const fgqa_kernel *fgqa_cpu_kernels(int32_t *count)
{
    pthread_once(&cpu.once, find_kernels);
    *count = cpu.count;
    return cpu.kernels;
}

const char *fgqa_cpu_isa(void)
{
    pthread_once(&cpu.once, find_kernels);
    return cpu.isa;
}

int32_t fgqa_cpu_isa_count(void) { return ISA_COUNT; }

const char *fgqa_cpu_isa_name(int32_t n, int32_t *compiled, int32_t *supported)
{
    *compiled = isas[n].compiled;
    *supported = fgqa_cpu_has(isas[n].name);
    return isas[n].name;
}
