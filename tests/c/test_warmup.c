/* test_warmup.c - warmup without a GPU: the table of kernels as it is (launch.c, kernels.def), launches that note what they were
 * called with. No row may refuse what warmup asks of it first, and what has a kernel of its own has to be among what it asks.
 */
#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/kernel_table.h"
#include "../../csrc/cuda/any/cache_copy.h"
#include "../../csrc/cuda/any/term_copy.h"
#include "../../csrc/cuda/any/weights.h"
#include "../../csrc/cuda/sm90/bwd_short.h"
#include "../../csrc/cuda/sm90/fwd_pack.h"
#include "../../csrc/cuda/any/bwd_plan.h"
#include "../../csrc/cuda/tensor_map.h"
#include "check.h"

#include <cuda_runtime_api.h>

/* ---- launches ---- */

enum { SOFTCAP = 1, ALIBI = 2, BIAS = 4, MASK = 8, DROPOUT = 16, CACHE = 32, SCALES = 64, DBIAS = 128, WIDE_BIAS = 256 | BIAS, CAUSAL = 512, SETS = 1024 };

typedef struct { const fgqa_cuda_row *row; int32_t ran[SETS], whole, in_parts, pairs, terms; uint32_t whole_keys; } record;

static record records[128];
static int32_t record_count;

static int note(const fgqa_plan *plan, const fgqa_problem *p)
{
    const fgqa_cuda_row *row = plan->kernel->row;
    const int set = (p->softcap != 0.0 ? SOFTCAP : 0) | (p->view[FGQA_ARG_alibi_slopes].data ? ALIBI : 0) | (p->view[FGQA_ARG_bias].data ? BIAS : 0)
        | (p->view[FGQA_ARG_mask].data ? MASK : 0) | (p->dropout_threshold ? DROPOUT : 0) | (p->cache.page_size ? CACHE : 0)
        | (p->right == 0 ? CAUSAL : 0) | (p->cache.k_scale.data && p->cache.v_scale.data ? SCALES : 0) | (p->view[FGQA_ARG_dbias].data ? DBIAS : 0)
        | (p->pass == FGQA_PASS_BWD && p->view[FGQA_ARG_bias].data && p->view[FGQA_ARG_bias].dtype != p->dtype ? WIDE_BIAS : 0);
    int32_t n = 0;
    while (n < record_count && records[n].row != row) { n++; }
    CHECK(n < (int32_t)(sizeof records / sizeof records[0]));
    if (n == record_count) { records[record_count++].row = row; }
    records[n].ran[set]++;
    records[n].whole += plan->splits == 1;
    records[n].in_parts += plan->splits > 1;
    records[n].pairs += p->sk > 2048 && plan->splits == 1 && plan->tasks >= 132;
    records[n].terms += p->view[FGQA_ARG_mask].data && p->view[FGQA_ARG_mask].stride_d != 1;
    records[n].whole_keys |= p->sk <= 128 ? 1u << fgqa_whole_keys(p) / 16 : 0;
    return cudaSuccess;
}

static const record *record_of(const fgqa_cuda_row *row)
{
    static const record none;
    for (int32_t n = 0; n < record_count; n++) {
        if (records[n].row == row) { return &records[n]; }
    }
    return &none;
}

#define NOTE                                                                                                      \
    (const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)                  \
    {                                                                                                             \
        (void)workspace, (void)exec;                                                                              \
        return note(plan, problem);                                                                               \
    }
#define FGQA_KERNEL(pass, arch, dtype, d, dv, block_q, block_k, stages, warps, variant)                           \
    fgqa_cuda_launch FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant);                                             \
    fgqa_cuda_smem FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _smem);                           \
    int FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant) NOTE                                                      \
    int32_t FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _smem)(void) { return 0; }
#include "../../csrc/cuda/kernels.def"
#undef FGQA_KERNEL

int fgqa_weights_rows NOTE
int fgqa_weights_keysum NOTE
int32_t fgqa_weights_smem(void) { return 0; }

void fgqa_weights_tile(const fgqa_problem *problem, fgqa_plan *plan)
{
    (void)problem;
    plan->tasks = 1;
}

/* ---- a device ---- */

static int capability;

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device)
{
    (void)device;
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : attribute == cudaDevAttrComputeCapabilityMinor ? capability % 10 : 132;
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char *cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "?"; }
const char *cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t stream)
{
    (void)memory, (void)value, (void)bytes, (void)stream;
    return cudaSuccess;
}

fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before)
{
    *before = device;
    return FGQA_OK;
}

void fgqa_cuda_leave(int32_t device, int32_t before) { (void)device, (void)before; }

fgqa_status fgqa_cuda_allocate(size_t bytes, void *stream, void **memory)
{
    (void)stream;
    *memory = malloc(bytes + 1);
    CHECK(*memory != NULL);
    return FGQA_OK;
}

void fgqa_cuda_free(void *memory, void *stream)
{
    (void)stream;
    free(memory);
}

fgqa_status fgqa_cuda_synchronize(void *stream) { (void)stream; return FGQA_OK; }

fgqa_status fgqa_cuda_gather(const fgqa_tensor *from, void *to, void *stream)
{
    (void)from, (void)to, (void)stream;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse, const int64_t shape[4],
                            void *stream)
{
    (void)n, (void)outs, (void)lses, (void)out, (void)lse, (void)shape, (void)stream;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_append(const fgqa_problem *problem, const fgqa_view *q_turned, void *stream)
{
    (void)problem, (void)q_turned, (void)stream;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_check_cache(const fgqa_problem *problem, void *memory, int *sound, void *stream)
{
    (void)problem, (void)memory, (void)stream;
    *sound = 1;
    return FGQA_OK;
}

int fgqa_cache_copy_launch(const fgqa_problem *problem, const fgqa_problem *copy, void *stream)
{
    (void)problem, (void)copy, (void)stream;
    return cudaSuccess;
}

int fgqa_term_copy_launch(const fgqa_problem *problem, const fgqa_problem *copy, int which, void *stream)
{
    (void)problem, (void)copy, (void)which, (void)stream;
    return cudaSuccess;
}

const char *fgqa_tensor_map_refuse(const fgqa_problem *problem, fgqa_arg arg)
{
    (void)problem, (void)arg;
    return NULL;
}

/* ---- the tests ---- */

static void check_row(const fgqa_kernel *kernel)
{
    const fgqa_cuda_row *row = kernel->row;
    const record *r = record_of(row);
    int32_t total = 0;
    for (int set = 0; set < SETS; set++) { total += r->ran[set]; }
    CHECK_FOR(total > 0, "%s was not run", kernel->name);
    if (row->arch != 90 || row->most_rows) { return; }
#define RAN(set) CHECK_FOR(r->ran[set] > 0, "%s was not run with options %d", kernel->name, set)
    if (row->dropout) {
        RAN(DROPOUT);
        RAN(DROPOUT | BIAS);
        RAN(DROPOUT | MASK);
        RAN(DROPOUT | SOFTCAP);
        RAN(DROPOUT | ALIBI);
        RAN(DROPOUT | SOFTCAP | ALIBI);
        CHECK_FOR(!FGQA_HAS_TERMS(row->d, row->block_k) || r->terms > 0, "%s", kernel->name);
        for (int set = 0; set < SETS; set++) { CHECK_FOR(set & DROPOUT || !r->ran[set], "%s", kernel->name); }
        return;
    }
    RAN(0);
    if (fgqa_bwd_is_whole(row)) {
        for (int32_t size = FGQA_BWD_LEAST_WHOLE; size <= row->block_q; size *= 2) { total--; }
        CHECK_FOR(total == 0, "%s has a kernel for each of its sizes", kernel->name);
        return;
    }
    if (row->pass == FGQA_PASS_BWD || FGQA_HAS_SOFTCAP(row->block_q)) { RAN(SOFTCAP); }
    if (row->pass == FGQA_PASS_FWD) {
        if (row->cached != FGQA_CACHE_NEVER) { RAN(CACHE); }
        if (FGQA_HAS_MERGE(row->d, row->block_q)) { CHECK_FOR(r->whole > 0 && r->in_parts > 0, "%s", kernel->name); }
        if (FGQA_HAS_ALIBI(row->d, row->block_q)) { RAN(ALIBI); }
        if (FGQA_HAS_TERMS(row->d, row->block_k)) {
            RAN(BIAS);
            RAN(MASK);
            CHECK_FOR(r->terms > 0, "%s", kernel->name);
        }
        if (FGQA_IS_SHORT(row->block_q)) {
            static const int32_t whole[] = {FGQA_WHOLE_KEYS};
            for (size_t n = 0; n < sizeof whole / sizeof whole[0]; n++) { CHECK_FOR(r->whole_keys >> whole[n] / 16 & 1, "%s", kernel->name); }
        }
        if (FGQA_HAS_PAIRS(row->d)) { CHECK_FOR(r->pairs > 0, "%s", kernel->name); }
        if (FGQA_HAS_ALL(row->d, row->block_k)) { RAN(SOFTCAP | ALIBI); }
        if (FGQA_HAS_SCALES(row->d, row->block_q)) { RAN(CACHE | SCALES); }
        return;
    }
    RAN(CAUSAL);
    RAN(ALIBI);
    RAN(SOFTCAP | ALIBI);
    RAN(MASK);
    RAN(DROPOUT);
    RAN(DROPOUT | MASK);
    RAN(DROPOUT | SOFTCAP);
    RAN(DROPOUT | ALIBI);
    RAN(BIAS | DBIAS);
    if (FGQA_BWD_HAS_BIAS(row->d)) {
        RAN(BIAS | MASK);
        RAN(DROPOUT | BIAS | DBIAS);
        RAN(DROPOUT | BIAS | MASK);
        RAN(WIDE_BIAS | DBIAS);
        RAN(DROPOUT | WIDE_BIAS | DBIAS);
        RAN(SOFTCAP | BIAS | DBIAS);
        RAN(SOFTCAP | WIDE_BIAS | DBIAS);
    }
#undef RAN
}

/* Device numbers differ: launch.c asks each device once. */
static void test_device(int32_t device, int of)
{
    int32_t count, served = 0;
    char why[128];
    capability = of;
    record_count = 0;
    memset(records, 0, sizeof records);
    CHECK_FOR(fgqa_cuda_warmup(device) == FGQA_OK, "%s", fgqa_message());
    const fgqa_kernel *kernels = fgqa_cuda_kernels(&count);
    for (int32_t n = 0; n < count; n++) {
        if (fgqa_cuda_refuse(&kernels[n], device, why)) { continue; }
        check_row(&kernels[n]);
        served++;
    }
    CHECK(served > 0 && served == record_count);
}

int main(void)
{
    test_device(0, 90);
    test_device(1, 80);
    return checks_passed("test_warmup");
}
