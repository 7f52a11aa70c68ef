/* bwd_shim.c - the backward rows of kernels.def behind one flat call, for bwd_check.py: no Python extension needed. */
#include "../../csrc/cuda/any/bwd_workspace.h"
#include "../../csrc/cuda/kernel_table.h"
#include <string.h>

typedef size_t workspace_fn(const fgqa_problem *problem, int32_t splits, void *base, fgqa_bwd_workspace *w);
typedef struct {
    const char *name;
    fgqa_cuda_row row;
    fgqa_cuda_launch *launch;
    fgqa_cuda_smem *smem;
    workspace_fn *workspace;
} shim_row;

#define ROW(...) FGQA_ROW_CAT(__VA_ARGS__)
#define FGQA_KERNEL(pass, arch, dtype, d, dv, bq, bk, stages, warps, variant) FGQA_SHIM_##pass(pass, arch, dtype, d, dv, variant)
#define FGQA_SHIM_fwd(...)
#define FGQA_SHIM_bwd(pass, arch, dtype, d, dv, variant)                     \
    fgqa_cuda_launch ROW(pass, arch, dtype, d, dv, variant);                 \
    fgqa_cuda_smem FGQA_SUFFIX(ROW(pass, arch, dtype, d, dv, variant), _smem); \
    workspace_fn FGQA_SUFFIX(ROW(pass, arch, dtype, d, dv, variant), _workspace);
#include "../../csrc/cuda/kernels.def"
#undef FGQA_KERNEL
#undef FGQA_SHIM_bwd

#define FGQA_KERNEL(pass, arch, dtype, d, dv, bq, bk, stages, warps, variant) FGQA_SHIM_##pass(pass, arch, dtype, d, dv, bq, bk, stages, warps, variant)
#define FGQA_SHIM_bwd(pass, arch, dtype, d, dv, bq, bk, stages, warps, variant)                                                            \
    {#dtype " " #d " " #variant, {FGQA_PASS_##pass, arch, FGQA_DTYPE_##dtype, d, dv, bq, bk, stages, warps, FGQA_VARIANT_##variant},        \
     ROW(pass, arch, dtype, d, dv, variant), FGQA_SUFFIX(ROW(pass, arch, dtype, d, dv, variant), _smem),                                     \
     FGQA_SUFFIX(ROW(pass, arch, dtype, d, dv, variant), _workspace)},
static const shim_row rows[] = {
#include "../../csrc/cuda/kernels.def"
};

int shim_rows(void) { return (int)(sizeof rows / sizeof rows[0]); }
const char *shim_name(int n) { return rows[n].name; }
int shim_smem(int n) { return rows[n].smem(); }

static fgqa_problem problem;

/* tensors: for each fgqa_arg {data, dtype, ndim, shape[4], stride[4]}, ndim -1: absent. Returns the sentence, or "". */
const char *shim_problem(const int64_t *tensors, int causal, int64_t left, int64_t right, int top_left, int64_t chunk, double scale, double softcap,
                         double dropout_p, int64_t seed, int64_t offset, int bshd, int64_t max_q, int64_t max_kv, int want_dbias, int want_dsink)
{
    static fgqa_tensor t[FGQA_ARG_COUNT];
    fgqa_request r;
    memset(&r, 0, sizeof r);
    r.pass = FGQA_PASS_BWD;
    for (int n = 0; n < FGQA_ARG_COUNT; n++) {
        const int64_t *x = tensors + 11 * n;
        if (x[2] < 0) { continue; }
        memset(&t[n], 0, sizeof t[n]);
        t[n].data = (void *)x[0];
        t[n].dtype = (fgqa_dtype)x[1];
        t[n].device.type = FGQA_CUDA;
        t[n].ndim = (int32_t)x[2];
        for (int k = 0; k < 4; k++) { t[n].shape[k] = x[3 + k]; t[n].stride[k] = x[7 + k]; }
        r.tensor[n] = &t[n];
    }
    r.causal = causal;
    r.window_left = left < 0 ? FGQA_UNBOUNDED : left;
    r.window_right = right < 0 ? FGQA_UNBOUNDED : right;
    r.align = top_left ? FGQA_ALIGN_TOP_LEFT : FGQA_ALIGN_BOTTOM_RIGHT;
    r.chunk = chunk;
    r.has_scale = scale != 0.0;
    r.scale = scale;
    r.has_softcap = softcap != 0.0;
    r.softcap = softcap;
    r.dropout_p = dropout_p;
    r.has_seed = dropout_p > 0.0 && !r.tensor[FGQA_ARG_seed];
    r.seed = (uint64_t)seed;
    r.offset = (uint64_t)offset;
    r.layout = bshd ? FGQA_LAYOUT_BSHD : FGQA_LAYOUT_BHSD;
    r.max_q = max_q;
    r.max_kv = max_kv;
    r.want_dbias = want_dbias;
    r.want_dsink = want_dsink;
    r.deterministic = 1;
    return fgqa_problem_init(&r, &problem) == FGQA_OK ? "" : fgqa_message();
}

int64_t shim_workspace(int n, int splits)
{
    fgqa_bwd_workspace w;
    return (int64_t)rows[n].workspace(&problem, splits, NULL, &w);
}

int shim_run(int n, int splits, void *workspace, void *stream)
{
    fgqa_plan plan;
    memset(&plan, 0, sizeof plan);
    plan.splits = splits;
    plan.block_q = rows[n].row.block_q;
    plan.block_k = rows[n].row.block_k;
    plan.tasks = 1;
    const fgqa_exec exec = {stream, NULL, NULL};
    return rows[n].launch(&plan, &problem, workspace, &exec);
}
