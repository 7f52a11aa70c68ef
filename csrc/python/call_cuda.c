/* call_cuda.c - what a call on a GPU does besides launching: scratch memory, copies of arguments, NumPy arrays there and back. */
#include "call_state.h"

#include <string.h>

#include "../cuda/device.h"
#include "memory.h"

/* ---- scratch memory ---- */

int fgqa_call_scratch(fgqa_call *call, size_t bytes, void **memory)
{
    const fgqa_import *q = &call->in[FGQA_ARG_q];
    const fgqa_tensor spec = {.dtype = FGQA_BOOL, .device = call->place.device, .ndim = 1, .shape = {(int64_t)bytes}, .stride = {1}};
    fgqa_result *result = &call->scratch[call->n_scratch];
    if (q->type.kind == FGQA_KIND_TORCH || q->type.kind == FGQA_KIND_CUPY) {
        if (fgqa_result_new(call->state, q, &spec, result) < 0) { return -1; }
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
        if (result->object == NULL) { fgqa_cuda_free(result->tensor.data, call->place.stream); }
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

int fgqa_call_gather(fgqa_call *call)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (!(call->imported >> arg & 1)) { continue; }
        fgqa_tensor *tensor = &call->in[arg].tensor;
        size_t bytes;
        void *memory;
        if (tensor->device.type != FGQA_CUDA || !fgqa_needs_copy(tensor, fgqa_arg_slot(call->request.pass, (fgqa_arg)arg).flags)) { continue; }
        if (!call->plan_only) {
            if (count_bytes(tensor, &bytes) < 0 || fgqa_call_scratch(call, bytes, &memory) < 0
                || fgqa_raise(fgqa_cuda_gather(tensor, memory, call->place.stream)) < 0) {
                return -1;
            }
            tensor->data = memory;
        }
        fgqa_contiguous_strides(tensor);
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

static int stage(fgqa_call *call, int arg)
{
    const fgqa_tensor host = without_repeats(&call->host[arg]);
    fgqa_tensor packed = host;
    size_t bytes;
    void *memory, *block = NULL;
    fgqa_contiguous_strides(&packed);
    if (count_bytes(&host, &bytes) < 0 || fgqa_call_scratch(call, bytes, &memory) < 0) { return -1; }
    call->in[arg].tensor.data = memory;
    if (arg == FGQA_ARG_out && call->request.pass == FGQA_PASS_FWD) { return 0; }
    if (memcmp(host.stride, packed.stride, (size_t)host.ndim * sizeof host.stride[0]) != 0) {
        block = fgqa_block_new(bytes);
        if (block == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        fgqa_pack(block, &host);
    }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_status status = fgqa_cuda_copy(memory, block ? block : host.data, bytes, call->place.stream);
    PyEval_RestoreThread(thread);
    fgqa_block_drop(block);
    return fgqa_raise(status);
}

int fgqa_call_stage(fgqa_call *call)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (call->imported >> arg & 1 && stage(call, arg) < 0) { return -1; }
    }
    return 0;
}

/* Device memory into a new block, complete on return. */
static int fetch(const fgqa_call *call, const fgqa_tensor *tensor, void **block)
{
    size_t bytes;
    if (count_bytes(tensor, &bytes) < 0) { return -1; }
    *block = fgqa_block_new(bytes);
    if (*block == NULL) {
        PyErr_Format(PyExc_MemoryError, "a result of %zu bytes does not fit into memory", bytes);
        return -1;
    }
    PyThreadState *thread = PyEval_SaveThread();
    fgqa_status status = fgqa_cuda_copy(*block, tensor->data, bytes, call->place.stream);
    if (status == FGQA_OK) { status = fgqa_cuda_synchronize(call->place.stream); }
    PyEval_RestoreThread(thread);
    return fgqa_raise(status);
}

int fgqa_call_fetch(fgqa_call *call)
{
    for (int arg = FGQA_ARG_out; arg < FGQA_ARG_COUNT; arg++) {
        fgqa_result *result = &call->result[arg];
        if (!(call->allocated >> arg & 1)) { continue; }
        if (fetch(call, &result->tensor, &result->block) < 0) { return -1; }
        result->tensor.data = result->block;
        result->tensor.device = (fgqa_device){FGQA_CPU, 0};
    }
    if (call->request.pass == FGQA_PASS_FWD && call->imported >> FGQA_ARG_out & 1) {
        void *block = NULL;
        const int failed = fetch(call, &call->in[FGQA_ARG_out].tensor, &block);
        if (failed == 0) { fgqa_unpack(&call->host[FGQA_ARG_out], block); }
        fgqa_block_drop(block);
        return failed;
    }
    return 0;
}

/* ---- check=True ---- */

static int is_index_array(int arg)
{
    return arg == FGQA_ARG_q_lens || arg == FGQA_ARG_kv_lens || arg == FGQA_ARG_cu_seqlens_q || arg == FGQA_ARG_cu_seqlens_kv
           || arg == FGQA_ARG_seed || arg == FGQA_ARG_rows;
}

int fgqa_call_check_contents(fgqa_call *call)
{
    fgqa_request request = call->request;
    fgqa_tensor tensor[FGQA_ARG_COUNT];
    fgqa_problem problem;
    void *block[FGQA_ARG_COUNT] = {NULL};
    int failed = 0;
    if (fgqa_cuda_capturing(call->place.stream)) {
        PyErr_SetString(PyExc_ValueError, "check is True while the stream records a graph: the check waits for the GPU; check before "
                        "the capture, and leave check out in it");
        return -1;
    }
    for (int arg = 0; arg < FGQA_ARG_COUNT && failed == 0; arg++) {
        if (request.tensor[arg] == NULL) { continue; }
        tensor[arg] = *request.tensor[arg];
        if (is_index_array(arg)) {
            failed = fetch(call, &tensor[arg], &block[arg]);
            tensor[arg].data = block[arg];
        }
        tensor[arg].device = (fgqa_device){FGQA_CPU, 0};
        request.tensor[arg] = &tensor[arg];
    }
    if (failed == 0) { failed = fgqa_raise(fgqa_problem_init(&request, &problem)); }
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) { fgqa_block_drop(block[arg]); }
    return failed;
}
