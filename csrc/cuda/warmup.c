/* warmup.c - every kernel of a device once, on zeros: after that none has to be loaded (or compiled from PTX), which takes time,
 * and which not every driver may do while a graph is recorded.
 *
 * Sizes are such that the keys of a forward pass and the rows of a backward one are split, which brings the kernels that combine
 * the parts; sink and bias bring those of their gradients. A decode row has a kernel for each width of its tiles, another one for
 * so few keys that clusters join their parts, and one more for batch_invariant; rows that read a copy of some caches bring the
 * kernels that make it. Rows for Hopper have kernels of their own for some options, and for some that come together, short ones
 * for few keys, tall ones for keys that are not in parts, those of wide heads for two blocks that share keys.
 * tests/test_warmup_cuda.py looks for kernels that are left.
 */
#include "../core/cache.h"
#include "device.h"
#include "kernel_table.h"
#include "any/term_copy.h"
#include "sm90/bwd_short.h"
#include "sm90/fwd_pack.h"

#include <cuda_runtime_api.h>
#include <string.h>

enum { WITH_BIAS = 1, WITH_MASK = 2, WITH_SOFTCAP = 4, WITH_ALIBI = 8, WITH_DROPOUT = 16, WITH_SCALES = 32,
       WITH_WIDE_BIAS = 64 | WITH_BIAS, WITH_CAUSAL = 128 };
enum { HEADS = 2, ROWS = 512, KEYS = 2048, MANY_KEYS = 16384 };

/* Few enough for one chunk of keys (FGQA_DEC_CHUNK_KEYS), which one block of a decode row has. */
enum { SLOTS = 512 };

/* MANY_ROWS: a tile of 128 for each multiprocessor of the largest GPU of Hopper's. BIGGEST: floats, or twice as many elements of
 * 16 bits, of which there may be so many rows and keys. */
enum { MANY_ROWS = 144 * 128 / HEADS, BIGGEST = HEADS * MANY_ROWS * 256 / 2 };

/* What a row is called with. */
typedef struct { int64_t rows, keys; int32_t invariant, options; } warmup_call;

/* Inputs read `zeros`, results overwrite each other in `results`. */
typedef struct { int32_t device; void *zeros, *results; } warmup_memory;

static fgqa_tensor contiguous(void *data, fgqa_dtype dtype, int32_t device, int32_t ndim, const int64_t *shape)
{
    fgqa_tensor t = {.data = data, .dtype = dtype, .device = {FGQA_CUDA, device}, .ndim = ndim};
    int64_t stride = 1;
    for (int32_t axis = ndim - 1; axis >= 0; axis--) {
        t.shape[axis] = shape[axis];
        t.stride[axis] = stride;
        stride *= shape[axis];
    }
    return t;
}

/* Binds results, and runs. */
static fgqa_status run_problem(const fgqa_kernel *kernel, fgqa_problem *problem, const fgqa_request *request, const warmup_memory *memory)
{
    fgqa_plan plan;
    FGQA_TRY(fgqa_plan_make(problem, kernel, 1, kernel->name, &plan));
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        fgqa_tensor result;
        if (request->tensor[arg] != NULL || !fgqa_problem_result(problem, (fgqa_arg)arg, &result)) { continue; }
        result.data = memory->results;
        fgqa_problem_bind(problem, (fgqa_arg)arg, &result);
    }
    void *workspace;
    const fgqa_exec exec = {NULL, NULL, NULL};
    FGQA_TRY(fgqa_cuda_allocate(plan.workspace_bytes, NULL, &workspace));
    const fgqa_status status = kernel->run(&plan, problem, workspace, &exec);
    fgqa_cuda_free(workspace, NULL);
    return status;
}

/* One new key behind none, over the memory of the results, where nothing is lost. Scales: if the row serves them. */
static fgqa_status run_cached(const fgqa_kernel *kernel, const fgqa_cuda_row *row, fgqa_dtype stored, const warmup_memory *memory,
                              int64_t rows, int32_t invariant, int32_t options)
{
    const int64_t q_shape[] = {1, HEADS, rows, row->d}, k_shape[] = {1, 1, SLOTS, row->d}, v_shape[] = {1, 1, SLOTS, row->dv};
    const int64_t k_new_shape[] = {1, 1, 1, row->d}, v_new_shape[] = {1, 1, 1, row->dv}, lens_shape[] = {1}, scale_shape[] = {1};
    const fgqa_tensor q = contiguous(memory->zeros, row->dtype, memory->device, 4, q_shape);
    const fgqa_tensor k_new = contiguous(memory->zeros, row->dtype, memory->device, 4, k_new_shape);
    const fgqa_tensor v_new = contiguous(memory->zeros, row->dtype, memory->device, 4, v_new_shape);
    const fgqa_tensor lens = contiguous(memory->zeros, FGQA_I32, memory->device, 1, lens_shape);
    const fgqa_tensor scale = contiguous(memory->zeros, FGQA_F32, memory->device, 1, scale_shape);
    const fgqa_tensor k = contiguous(memory->results, stored, memory->device, 4, k_shape);
    const fgqa_tensor v = contiguous((float *)memory->results + BIGGEST / 2, stored, memory->device, 4, v_shape);
    fgqa_cache_request request = {.base = {.window_left = FGQA_UNBOUNDED, .window_right = FGQA_UNBOUNDED, .max_q = -1, .max_kv = -1, .want_lse = 1,
                                            .batch_invariant = invariant}};
    const fgqa_view none = {0};
    fgqa_problem problem;
    request.base.tensor[FGQA_ARG_q] = &q;
    request.tensor[FGQA_CACHE_k_cache] = &k;
    request.tensor[FGQA_CACHE_v_cache] = &v;
    request.tensor[FGQA_CACHE_k_new] = &k_new;
    request.tensor[FGQA_CACHE_v_new] = &v_new;
    request.tensor[FGQA_CACHE_cache_lens] = &lens;
    request.tensor[FGQA_CACHE_k_scale] = request.tensor[FGQA_CACHE_v_scale] = options & WITH_SCALES ? &scale : NULL;
    FGQA_TRY(fgqa_cache_init(&request, &problem));
    if (options & WITH_SCALES && kernel->refuse(kernel, &problem, NULL)) { return FGQA_OK; }
    int sound;
    FGQA_TRY(fgqa_cuda_check_cache(&problem, memory->results, &sound, NULL));
    FGQA_TRY(fgqa_cuda_append(&problem, &none, NULL));
    return run_problem(kernel, &problem, &request.base, memory);
}

static fgqa_status run_request(const fgqa_kernel *kernel, const fgqa_request *request, const warmup_memory *memory)
{
    fgqa_problem problem;
    FGQA_TRY(fgqa_problem_init(request, &problem));
    return run_problem(kernel, &problem, request, memory);
}

/* A row does not serve every set of options. */
static fgqa_status run_if_served(const fgqa_kernel *kernel, const fgqa_request *request, const warmup_memory *memory)
{
    fgqa_problem problem;
    FGQA_TRY(fgqa_problem_init(request, &problem));
    return kernel->refuse(kernel, &problem, NULL) ? FGQA_OK : run_problem(kernel, &problem, request, memory);
}

/* What makes a row's first kernel run. */
static int32_t own_options(const fgqa_cuda_row *row) { return row->general ? WITH_BIAS : row->dropout ? WITH_DROPOUT : 0; }

/* Kernels for a bias of q's dtype, beside those for a float32 one. */
static int32_t has_narrow_bias(const fgqa_cuda_row *row) { return row->pass == FGQA_PASS_BWD && !row->general; }

static fgqa_status run_kernel(const fgqa_kernel *kernel, const fgqa_cuda_row *row, const warmup_memory *memory, warmup_call call)
{
    const int32_t options = call.options, backward = row->pass == FGQA_PASS_BWD;
    if (row->cached == FGQA_CACHE_ONLY) {
        return run_cached(kernel, row, row->float8 ? FGQA_F8E4M3 : row->dtype, memory, call.rows, call.invariant, 0);
    }
    const int64_t q_shape[] = {1, HEADS, call.rows, row->d}, out_shape[] = {1, HEADS, call.rows, row->dv};
    const int64_t kv_heads = fgqa_bwd_is_whole(row) ? HEADS : 1;
    const int64_t k_shape[] = {1, kv_heads, call.keys, row->d}, v_shape[] = {1, kv_heads, call.keys, row->dv};
    const int64_t lse_shape[] = {1, HEADS, call.rows}, sink_shape[] = {HEADS}, bias_shape[] = {call.rows, call.keys};
    const int32_t narrow = has_narrow_bias(row) && (options & WITH_WIDE_BIAS) != WITH_WIDE_BIAS;
#define ZEROS(dtype, ndim, shape) contiguous(memory->zeros, dtype, memory->device, ndim, shape)
    const fgqa_tensor q = ZEROS(row->dtype, 4, q_shape), k = ZEROS(row->dtype, 4, k_shape), v = ZEROS(row->dtype, 4, v_shape);
    const fgqa_tensor out = ZEROS(row->dtype, 4, out_shape), lse = ZEROS(FGQA_F32, 3, lse_shape);
    const fgqa_tensor sink = ZEROS(FGQA_F32, 1, sink_shape), slopes = sink;
    const fgqa_tensor bias = ZEROS(narrow ? row->dtype : FGQA_F32, 2, bias_shape);
    fgqa_tensor mask = ZEROS(FGQA_BOOL, 2, bias_shape);
#undef ZEROS
    mask.stride[1] = 2;     /* unlike the bias nothing for TMA, not as a copy either, which has another kernel in some rows */
    fgqa_request request = {.pass = row->pass, .max_q = -1, .max_kv = -1, .want_lse = 1,
                            .want_dsink = backward && !fgqa_bwd_is_whole(row),
                            .window_left = FGQA_UNBOUNDED, .window_right = options & WITH_CAUSAL ? 0 : FGQA_UNBOUNDED,
                            .deterministic = 1, .batch_invariant = call.invariant,
                            .want_dbias = backward && (options & (WITH_BIAS | WITH_MASK)) == WITH_BIAS,
                            .has_softcap = (options & WITH_SOFTCAP) != 0, .softcap = options & WITH_SOFTCAP ? 1.0 : 0.0,
                            .dropout_p = options & WITH_DROPOUT ? 0.5 : 0.0, .has_seed = (options & WITH_DROPOUT) != 0};
    request.tensor[FGQA_ARG_q] = &q;
    request.tensor[FGQA_ARG_k] = &k;
    request.tensor[FGQA_ARG_v] = &v;
    request.tensor[FGQA_ARG_sink] = &sink;
    request.tensor[FGQA_ARG_bias] = options & WITH_BIAS ? &bias : NULL;
    request.tensor[FGQA_ARG_mask] = options & WITH_MASK ? &mask : NULL;
    request.tensor[FGQA_ARG_alibi_slopes] = options & WITH_ALIBI ? &slopes : NULL;
    if (backward) { request.tensor[FGQA_ARG_dout] = request.tensor[FGQA_ARG_out] = &out; }
    if (backward) { request.tensor[FGQA_ARG_lse] = &lse; }
    return options == own_options(row) ? run_request(kernel, &request, memory) : run_if_served(kernel, &request, memory);
}

/* A row's kernels for options, beside that for none of them. */
static fgqa_status run_options(const fgqa_kernel *kernel, const fgqa_cuda_row *row, const warmup_memory *memory)
{
    static const int32_t sets[] = {WITH_BIAS, WITH_SOFTCAP, WITH_ALIBI, WITH_SOFTCAP | WITH_BIAS, WITH_SOFTCAP | WITH_ALIBI,
                                   WITH_MASK, WITH_DROPOUT, WITH_DROPOUT | WITH_MASK, WITH_DROPOUT | WITH_BIAS, WITH_BIAS | WITH_MASK,
                                   WITH_DROPOUT | WITH_BIAS | WITH_MASK, WITH_WIDE_BIAS, WITH_DROPOUT | WITH_WIDE_BIAS,
                                   WITH_DROPOUT | WITH_SOFTCAP, WITH_DROPOUT | WITH_ALIBI, WITH_DROPOUT | WITH_SOFTCAP | WITH_ALIBI,
                                   WITH_CAUSAL, WITH_SOFTCAP | WITH_WIDE_BIAS};
    for (size_t n = 0; n < sizeof sets / sizeof sets[0]; n++) {
        const int again = (sets[n] & WITH_WIDE_BIAS) == WITH_WIDE_BIAS && !has_narrow_bias(row);
        if (sets[n] != own_options(row) && !again) { FGQA_TRY(run_kernel(kernel, row, memory, (warmup_call){ROWS, KEYS, 0, sets[n]})); }
    }
    return FGQA_OK;
}

/* Numbers of rows and keys that have kernels of their own. */
static fgqa_status run_sizes(const fgqa_kernel *kernel, const fgqa_cuda_row *row, const warmup_memory *memory)
{
    static const int32_t whole[] = {FGQA_WHOLE_KEYS};
    if (row->arch != 90 || row->pass != FGQA_PASS_FWD || row->dropout) { return FGQA_OK; }
    for (size_t n = 0; FGQA_IS_SHORT(row->block_q) && n < sizeof whole / sizeof whole[0]; n++) {
        FGQA_TRY(run_kernel(kernel, row, memory, (warmup_call){ROWS, whole[n], 0, 0}));
    }
    return FGQA_HAS_PAIRS(row->d) ? run_kernel(kernel, row, memory, (warmup_call){MANY_ROWS, 2 * KEYS, 0, 0}) : FGQA_OK;
}

/* Kernels of weights, which serve all dtypes. */
static fgqa_status run_weights(const fgqa_kernel *kernel, fgqa_dtype dtype, const warmup_memory *memory)
{
    const int64_t shape[] = {1, 1, 8, 8}, rows_shape[] = {1};
    const fgqa_tensor q = contiguous(memory->zeros, dtype, memory->device, 4, shape);
    const fgqa_tensor rows = contiguous(memory->zeros, FGQA_I64, memory->device, 1, rows_shape);
    fgqa_request request = {.pass = kernel->pass, .window_left = FGQA_UNBOUNDED, .window_right = FGQA_UNBOUNDED, .max_q = -1, .max_kv = -1};
    request.tensor[FGQA_ARG_q] = request.tensor[FGQA_ARG_k] = &q;
    request.tensor[FGQA_ARG_rows] = kernel->pass == FGQA_PASS_ROWS ? &rows : NULL;
    return run_request(kernel, &request, memory);
}

static fgqa_status run_others(const warmup_memory *memory)
{
    static const fgqa_dtype dtypes[] = {FGQA_F64, FGQA_F32, FGQA_F16};
    const int64_t shape[] = {8}, merged[] = {1, 1, 1, 8};
    const fgqa_view in = {memory->zeros, FGQA_F32, 0, 0, 0, 1}, out = {memory->results, FGQA_F32, 0, 0, 0, 1};
    fgqa_problem masked = {.b = 1, .hq = 1, .sq = 1, .sk = 8}, copy;
    masked.view[FGQA_ARG_mask] = (fgqa_view){memory->zeros, FGQA_BOOL, 0, 0, 0, 1};
    (void)fgqa_term_copy(&masked, FGQA_COPY_MASK, memory->results, &copy);
    FGQA_TRY(fgqa_cuda_check(fgqa_term_copy_launch(&masked, &copy, FGQA_COPY_MASK, NULL), "copy of a mask"));
    FGQA_TRY(fgqa_cuda_merge(1, &in, &in, &out, &out, merged, NULL));
    for (size_t n = 0; n < sizeof dtypes / sizeof dtypes[0]; n++) {
        const fgqa_tensor from = contiguous(memory->zeros, dtypes[n], memory->device, 1, shape);
        FGQA_TRY(fgqa_cuda_gather(&from, memory->results, NULL));
    }
    return FGQA_OK;
}

static fgqa_status run_all(const warmup_memory *memory)
{
    int32_t count;
    const fgqa_kernel *kernels = fgqa_cuda_kernels(&count);
    FGQA_TRY(fgqa_cuda_check(cudaMemsetAsync(memory->zeros, 0, BIGGEST * sizeof(float), NULL), "cudaMemsetAsync"));
    for (int32_t n = 0; n < count; n++) {
        char why[128];
        const fgqa_cuda_row *row = kernels[n].row;      /* the table's rows begin with it */
        if (fgqa_cuda_refuse(&kernels[n], memory->device, why) != NULL) { continue; }
        if (fgqa_bwd_is_whole(row)) {                   /* a kernel for up to half as many rows and keys, and so on */
            for (int64_t rows = row->block_q; rows >= FGQA_BWD_LEAST_WHOLE; rows /= 2) {
                FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, rows, 0, 0}));
            }
            continue;
        }
        if (row->pass == FGQA_PASS_FWD || row->pass == FGQA_PASS_BWD) {
            const int32_t options = own_options(row);
            int64_t rows = row->most_rows ? row->most_rows / HEADS : row->cached == FGQA_CACHE_ONLY ? 1 : ROWS;
            FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, KEYS, row->most_rows != 0, options}));
            const int has_unsplit = FGQA_HAS_MERGE(row->d, row->block_q) || FGQA_HAS_EVEN(row->d, row->block_q);
            if (row->pass == FGQA_PASS_FWD && has_unsplit && !row->dropout) {
                /* keys that are not in parts */
                FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, KEYS, 1, options}));
            }
            if (row->cached == FGQA_CACHE_ALSO && !row->most_rows) {
                FGQA_TRY(run_cached(&kernels[n], row, FGQA_F8E4M3, memory, rows, 0, 0));
                FGQA_TRY(run_cached(&kernels[n], row, FGQA_F8E4M3, memory, rows, 0, WITH_SCALES));
            }
            for (; row->most_rows && rows > 0; rows /= 2) {
                FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, KEYS, 0, options}));
                FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, MANY_KEYS, 0, options}));
                FGQA_TRY(run_kernel(&kernels[n], row, memory, (warmup_call){rows, SLOTS, 1, options}));
            }
            if (row->pass == FGQA_PASS_FWD && row->general && row->cached != FGQA_CACHE_ONLY) {
                fgqa_cuda_row odd = *row;       /* parts of results whose rows start anywhere */
                odd.dv--;
                FGQA_TRY(run_kernel(&kernels[n], &odd, memory, (warmup_call){rows, KEYS, 0, options}));
            }
            if (!row->general && row->cached != FGQA_CACHE_ONLY && !row->most_rows) {
                FGQA_TRY(run_options(&kernels[n], row, memory));
                FGQA_TRY(run_sizes(&kernels[n], row, memory));
            }
            continue;
        }
        for (fgqa_dtype dtype = FGQA_F32; dtype <= FGQA_BF16; dtype++) { FGQA_TRY(run_weights(&kernels[n], dtype, memory)); }
    }
    FGQA_TRY(run_others(memory));
    return fgqa_cuda_synchronize(NULL);
}

fgqa_status fgqa_cuda_warmup(int32_t device)
{
    warmup_memory memory = {.device = device};
    int32_t before;
    FGQA_TRY(fgqa_cuda_enter(device, &before));
    fgqa_status status = fgqa_cuda_allocate(BIGGEST * sizeof(float), NULL, &memory.zeros);
    if (status == FGQA_OK) { status = fgqa_cuda_allocate(BIGGEST * sizeof(float), NULL, &memory.results); }
    if (status == FGQA_OK) { status = run_all(&memory); }
    fgqa_cuda_free(memory.zeros, NULL);
    fgqa_cuda_free(memory.results, NULL);
    fgqa_cuda_leave(device, before);
    return status;
}
