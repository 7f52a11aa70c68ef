/* call_cuda.c - what a call on a GPU does besides launching: scratch memory, copies of arguments, NumPy arrays there and back. */
#include "call_state.h"

#include <string.h>

#include "../cpu/memory.h"
#include "../cuda/device.h"
#include "call.h"

/* ---- scratch memory ---- */

enum { SCRATCH_ALIGNMENT = 256 };        /* bytes: the least that the frameworks' allocators and cudaMallocAsync() promise */

int fgqa_call_scratch(fgqa_call *call, size_t bytes, void **memory)
{
    fgqa_import *q = &call->in[FGQA_ARG_q];
    fgqa_result *result = &call->scratch[call->n_scratch];
    if (q->type.kind == FGQA_KIND_TORCH || q->type.kind == FGQA_KIND_CUPY) {
        if (fgqa_scratch_new(call->state, q, bytes, result) < 0) { return -1; }
    } else {
        memset(result, 0, sizeof *result);
        if (fgqa_raise(fgqa_cuda_allocate(bytes, call->place.stream, &result->tensor.data)) < 0) { return -1; }
    }
    call->n_scratch++;
    *memory = result->tensor.data;
    return 0;
}

void fgqa_call_drop_scratch(fgqa_call *call)
{
    while (call->n_scratch > 0) {
        fgqa_result *result = &call->scratch[--call->n_scratch];
        if (result->object == NULL && result->managed == NULL) { fgqa_cuda_free(result->tensor.data, call->place.stream); }
        fgqa_result_drop(result);
    }
}

/* Bytes of all elements, however often memory holds them; -1 if 64 bits cannot count them. */
static int count_bytes(const fgqa_tensor *tensor, size_t *bytes)
{
    int64_t product = (int64_t)fgqa_dtype_bytes(tensor->dtype);
    for (int32_t axis = 0; axis < tensor->ndim; axis++) {
        if (__builtin_mul_overflow(product, tensor->shape[axis], &product)) {
            PyErr_NoMemory();
            return -1;
        }
    }
    *bytes = (size_t)product;
    return 0;
}

/* rows= of a list is a NumPy array by now: it follows q. */
static int upload_rows(fgqa_call *call)
{
    fgqa_import *rows = &call->in[FGQA_ARG_rows];
    size_t bytes;
    void *memory;
    if (!(call->imported >> FGQA_ARG_rows & 1) || rows->type.kind != FGQA_KIND_NUMPY) { return 0; }
    if (fgqa_cuda_capturing(call->place.stream)) {
        PyErr_SetString(PyExc_ValueError, "rows are in host memory while the stream records a graph, which would read them at every "
                        "replay; pass them on the device of q");
        return -1;
    }
    fgqa_tensor *tensor = &rows->tensor;
    if (!call->plan_only && tensor->ndim == 1 && (tensor->stride[0] == 1 || tensor->shape[0] <= 1)) {
        if (count_bytes(tensor, &bytes) < 0 || fgqa_call_scratch(call, bytes, &memory) < 0
            || fgqa_raise(fgqa_cuda_copy(memory, tensor->data, bytes, call->place.stream)) < 0) {
            return -1;
        }
        call->host_rows = tensor->data;
        tensor->data = memory;
        tensor->device = call->place.device;
    }
    return 0;
}

int fgqa_call_gather_tensor(fgqa_call *call, fgqa_tensor *tensor, unsigned flags)
{
    size_t bytes;
    void *memory;
    if (tensor->device.type != FGQA_CUDA || !fgqa_needs_copy(tensor, flags)) { return 0; }
    if (!call->plan_only) {
        if (count_bytes(tensor, &bytes) < 0 || fgqa_call_scratch(call, bytes, &memory) < 0
            || fgqa_raise(fgqa_cuda_gather(tensor, memory, call->place.stream)) < 0) {
            return -1;
        }
        tensor->data = memory;
    } else {        /* what a plan says depends on where a copy would begin */
        tensor->data = (void *)((uintptr_t)tensor->data / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT);
    }
    fgqa_contiguous_strides(tensor);
    return 1;
}

int fgqa_call_gather(fgqa_call *call)
{
    if (upload_rows(call) < 0) { return -1; }
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (!(call->imported >> arg & 1)) { continue; }
        const int copied = fgqa_call_gather_tensor(call, &call->in[arg].tensor, fgqa_arg_slot(call->request.pass, (fgqa_arg)arg).flags);
        if (copied < 0) { return -1; }
        if (copied) { call->in[arg].copied = 1; }
    }
    return 0;
}

/* ---- NumPy arrays on a GPU ---- */

/* The tensor without the axes in which it repeats itself: what is worth moving. */
static fgqa_tensor without_repeats(const fgqa_tensor *tensor)
{
    fgqa_tensor t = *tensor;
    for (int32_t axis = 0; axis < t.ndim; axis++) {
        if (t.stride[axis] == 0 && t.shape[axis] > 1) { t.shape[axis] = 1; }
    }
    return t;
}

int fgqa_call_place_arrays(fgqa_call *call)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (!(call->imported >> arg & 1)) { continue; }
        fgqa_tensor *tensor = &call->in[arg].tensor;
        call->host[arg] = *tensor;
        fgqa_tensor moved = without_repeats(tensor);
        fgqa_contiguous_strides(&moved);
        for (int32_t axis = 0; axis < tensor->ndim; axis++) {
            tensor->stride[axis] = moved.shape[axis] < tensor->shape[axis] ? 0 : moved.stride[axis];
        }
        /* An address of its own, aligned as device memory is, until there is one. */
        tensor->data = (void *)((uintptr_t)(arg + 1) << 56);
        tensor->device = call->place.device;
    }
    return 0;
}

int fgqa_call_stage(fgqa_call *call)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (!(call->imported >> arg & 1)) { continue; }
        call->host[arg] = without_repeats(&call->host[arg]);
        size_t bytes;
        if (count_bytes(&call->host[arg], &bytes) < 0 || fgqa_call_scratch(call, bytes, &call->in[arg].tensor.data) < 0) { return -1; }
    }
    return 0;
}

/* Host memory of the results. */
static int allocate_blocks(fgqa_call *call)
{
    for (int arg = FGQA_ARG_out; arg < FGQA_ARG_COUNT; arg++) {
        size_t bytes;
        if (!(call->allocated >> arg & 1)) { continue; }
        if (count_bytes(&call->result[arg].tensor, &bytes) < 0) { return -1; }
        call->result[arg].block = fgqa_block_new(bytes);
        if (call->result[arg].block == NULL) {
            PyErr_Format(PyExc_MemoryError, "a result of %zu bytes does not fit into memory", bytes);
            return -1;
        }
        call->host[arg] = call->result[arg].tensor;
        call->host[arg].data = call->result[arg].block;
        call->host[arg].device = (fgqa_device){FGQA_CPU, 0};
    }
    return 0;
}

/* How a staged call is cut, so that a part computes while the next one is on its way up and the one before on its way down: along
 * the first axis (batch, or KV heads of a single sequence), where every part is a problem of its own. */
typedef struct { int by_head; int32_t count, parts; } cut;

enum { MOST_PARTS = 8, WORTH_BYTES = 4 << 20 };

static cut cut_of(const fgqa_problem *p)
{
    cut whole = {0, 1, 1};
    if (p->varlen || p->layout != FGQA_LAYOUT_BHSD || p->dropout_threshold != 0 || p->want_dbias || p->want_dsink) { return whole; }
    const double bytes = (double)fgqa_dtype_bytes(p->dtype) * p->d * ((double)p->b * p->hq * p->sq + 2.0 * p->b * p->hk * p->sk);
    const cut c = {p->b == 1, p->b == 1 ? p->hk : p->b, MOST_PARTS};
    int32_t parts = c.count < MOST_PARTS ? c.count : MOST_PARTS;
    if (bytes / WORTH_BYTES < parts) { parts = (int32_t)(bytes / WORTH_BYTES); }
    return parts < 2 ? whole : (cut){c.by_head, c.count, parts};
}

static int32_t part_begin(const cut *c, int32_t part) { return (int32_t)((int64_t)c->count * part / c->parts); }

static int is_of_keys(int arg) { return arg == FGQA_ARG_k || arg == FGQA_ARG_v || arg == FGQA_ARG_dk || arg == FGQA_ARG_dv; }

/* Batches or KV heads [begin, end) of a problem. */
static fgqa_problem part_of(const fgqa_problem *p, int by_head, int32_t begin, int32_t end)
{
    fgqa_problem q = *p;
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        fgqa_view *v = &q.view[arg];
        const int64_t bytes = (int64_t)fgqa_dtype_bytes(v->dtype);
        const int64_t step = by_head ? v->stride_h * (is_of_keys(arg) ? 1 : p->g) : v->stride_b;
        if (v->data != NULL) { v->data = (char *)v->data + begin * step * bytes; }
    }
    if (by_head) {
        q.hk = end - begin;
        q.hq = q.hk * p->g;
        return q;
    }
    q.b = end - begin;
    q.total_q = (int64_t)q.b * p->sq;
    q.total_k = (int64_t)q.b * p->sk;
    if (q.q_lens) { q.q_lens += begin; }
    if (q.kv_lens) { q.kv_lens += begin; }
    return q;
}

/* What a part has of a tensor, along the axis that is cut; 0 if the tensor is not cut: it goes with the first part. */
static int slice(const fgqa_call *call, const cut *c, int arg, int32_t part, fgqa_tensor *host, int64_t *offset)
{
    const fgqa_problem *p = &call->problem;
    const int32_t axis = c->by_head ? p->rank - 3 : 0;
    const int of_rows = arg == FGQA_ARG_q || arg == FGQA_ARG_out || arg == FGQA_ARG_lse || arg == FGQA_ARG_dout || arg == FGQA_ARG_dlse || arg == FGQA_ARG_dq || arg == FGQA_ARG_weights;
    *host = call->host[arg];
    *offset = 0;
    if (c->parts == 1 || !(of_rows || is_of_keys(arg)) || host->shape[axis] != (c->by_head && of_rows ? p->hq : c->count)) { return 0; }
    const int32_t each = c->by_head && of_rows ? p->g : 1;
    const int64_t begin = (int64_t)part_begin(c, part) * each, end = (int64_t)part_begin(c, part + 1) * each;
    int64_t entry = (int64_t)fgqa_dtype_bytes(host->dtype);
    for (int32_t n = axis + 1; n < host->ndim; n++) { entry *= host->shape[n]; }
    host->data = (char *)host->data + begin * host->stride[axis] * (int64_t)fgqa_dtype_bytes(host->dtype);
    host->shape[axis] = end - begin;
    *offset = begin * entry;
    return 1;
}

static int is_result(const fgqa_call *call, int arg)
{
    return call->allocated >> arg & 1 || (arg == FGQA_ARG_out && call->request.pass == FGQA_PASS_FWD && call->imported >> arg & 1);
}

static fgqa_status upload_part(const fgqa_call *call, fgqa_cuda_staging *staging, const cut *c, int32_t part)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        fgqa_tensor host;
        int64_t offset;
        if (!(call->imported >> arg & 1) || is_result(call, arg)) { continue; }
        if (!slice(call, c, arg, part, &host, &offset) && part > 0) { continue; }
        FGQA_TRY(fgqa_cuda_staging_upload(staging, &host, (char *)call->in[arg].tensor.data + offset));
    }
    return fgqa_cuda_staging_uploaded(staging);
}

static fgqa_status download_part(const fgqa_call *call, fgqa_cuda_staging *staging, const cut *c, int32_t part)
{
    for (int arg = FGQA_ARG_out; arg < FGQA_ARG_COUNT; arg++) {
        fgqa_tensor host;
        int64_t offset;
        if (!is_result(call, arg)) { continue; }
        const void *data = call->allocated >> arg & 1 ? call->result[arg].tensor.data : call->in[arg].tensor.data;
        if (!slice(call, c, arg, part, &host, &offset) && part < c->parts - 1) { continue; }
        FGQA_TRY(fgqa_cuda_staging_download(staging, part, &host, (const char *)data + offset));
    }
    return FGQA_OK;
}

static fgqa_status run_parts(const fgqa_call *call, fgqa_cuda_staging *staging, const cut *c, const fgqa_exec *exec)
{
    for (int32_t part = 0; part <= c->parts; part++) {
        if (part < c->parts) {
            fgqa_problem problem = call->problem;
            fgqa_plan plan = call->plan;
            FGQA_TRY(upload_part(call, staging, c, part));
            if (c->parts > 1) {
                problem = part_of(&call->problem, c->by_head, part_begin(c, part), part_begin(c, part + 1));
                FGQA_TRY(fgqa_plan_make(&problem, call->plan.kernel, 1, call->plan.kernel->name, &plan));
            }
            void *workspace = NULL;
            if (plan.workspace_bytes > 0) { FGQA_TRY(fgqa_cuda_allocate(plan.workspace_bytes, exec->stream, &workspace)); }
            const fgqa_status status = plan.kernel->run(&plan, &problem, workspace, exec);
            fgqa_cuda_free(workspace, exec->stream);
            FGQA_TRY(status);
            FGQA_TRY(fgqa_cuda_staging_computed(staging, part));
        }
        if (part > 0) { FGQA_TRY(download_part(call, staging, c, part - 1)); }
    }
    return FGQA_OK;
}

int fgqa_call_run_staged(fgqa_call *call)
{
    const cut c = cut_of(&call->problem);
    fgqa_cuda_staging *staging;
    if (allocate_blocks(call) < 0) { return -1; }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {call->place.stream, fgqa_interrupted, &thread};
    fgqa_status status = fgqa_cuda_staging_begin(call->place.device.index, call->place.stream, &staging);
    if (status == FGQA_OK) {
        status = run_parts(call, staging, &c, &exec);
        if (status == FGQA_OK) {
            status = fgqa_cuda_staging_end(staging);
        } else {
            (void)fgqa_cuda_staging_end(staging);      /* the first failure is the one to report */
        }
    }
    PyEval_RestoreThread(thread);
    for (int arg = FGQA_ARG_out; arg < FGQA_ARG_COUNT && status == FGQA_OK; arg++) {
        if (call->allocated >> arg & 1) { call->result[arg].tensor = call->host[arg]; }
    }
    return fgqa_raise(status);
}

int fgqa_call_fetch(const fgqa_call *call, const fgqa_tensor *tensor, void **block)
{
    size_t bytes;
    if (count_bytes(tensor, &bytes) < 0) { return -1; }
    *block = fgqa_block_new(bytes);
    if (*block == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyThreadState *thread = PyEval_SaveThread();
    fgqa_status status = fgqa_cuda_copy(*block, tensor->data, bytes, call->place.stream);
    if (status == FGQA_OK) { status = fgqa_cuda_synchronize(call->place.stream); }
    PyEval_RestoreThread(thread);
    return fgqa_raise(status);
}

/* ---- check=True ---- */

static int is_index_array(int arg)
{
    return arg == FGQA_ARG_q_lens || arg == FGQA_ARG_kv_lens || arg == FGQA_ARG_cu_seqlens_q || arg == FGQA_ARG_cu_seqlens_kv
           || arg == FGQA_ARG_seed || arg == FGQA_ARG_rows;
}

int fgqa_call_check_begin(const fgqa_call *call)
{
    if (!fgqa_cuda_capturing(call->place.stream)) { return 0; }
    PyErr_SetString(PyExc_ValueError, "check is True while the stream records a graph: the check waits for the GPU; check before "
                    "the capture, and leave check out in it");
    return -1;
}

int fgqa_call_check_contents(fgqa_call *call)
{
    fgqa_request request = call->request;
    fgqa_tensor tensor[FGQA_ARG_COUNT];
    fgqa_problem problem;
    void *block[FGQA_ARG_COUNT] = {NULL};
    int failed = fgqa_call_check_begin(call);
    for (int arg = 0; arg < FGQA_ARG_COUNT && failed == 0; arg++) {
        if (request.tensor[arg] == NULL) { continue; }
        tensor[arg] = *request.tensor[arg];
        if (is_index_array(arg)) {
            failed = fgqa_call_fetch(call, &tensor[arg], &block[arg]);
            tensor[arg].data = block[arg];
        }
        tensor[arg].device = (fgqa_device){FGQA_CPU, 0};
        request.tensor[arg] = &tensor[arg];
    }
    if (failed == 0) { failed = fgqa_raise(fgqa_problem_init(&request, &problem)); }
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) { fgqa_block_drop(block[arg]); }
    return failed;
}
