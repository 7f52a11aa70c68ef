/* handler.c - one custom call of XLA: attributes and buffers into a request, problem, plan, workspace, run; once for every entry
 * of vmap's axes but for the last, which becomes part of the batch where it can. No Python: XLA calls it from threads of its own.
 */
#include "handler.h"

#include <string.h>

#include "../cpu/cpu.h"
#include "../cpu/memory.h"
#include "../cuda/device.h"

enum { MOST_AXES = 12 };      /* of vmap */

/* ---- failures ---- */

static xla_error *failed(const xla_api *api, fgqa_status status)
{
    xla_error_create error = {.size = sizeof error, .message = fgqa_message(), .code = XLA_INTERNAL};
    switch (status) {
    case FGQA_OK:                    return NULL;
    case FGQA_ERROR_TYPE:
    case FGQA_ERROR_VALUE:
    case FGQA_ERROR_BUFFER:          error.code = XLA_INVALID_ARGUMENT; break;
    case FGQA_ERROR_NOT_IMPLEMENTED: error.code = XLA_UNIMPLEMENTED; break;
    case FGQA_ERROR_MEMORY:          error.code = XLA_RESOURCE_EXHAUSTED; break;
    case FGQA_ERROR_RUNTIME:
    case FGQA_ERROR_INTERRUPTED:     break;
    }
    return api->error_create(&error);
}

static void drop(const xla_api *api, xla_error *error)
{
    xla_error_destroy gone = {.size = sizeof gone, .error = error};
    if (error != NULL) { api->error_destroy(&gone); }
}

/* What XLA could not give. */
static fgqa_status refused(const xla_api *api, xla_error *error, fgqa_status code, const char *what)
{
    if (error == NULL) { return FGQA_OK; }
    xla_error_message words = {.size = sizeof words, .error = error};
    api->error_message(&words);
    (void)fgqa_fail(code, "XLA gave no %s: %s", what, words.message);
    drop(api, error);
    return code;
}

/* ---- attributes ---- */

static void *find_attribute(const xla_attributes *attributes, const char *name, xla_attribute_type type)
{
    const size_t length = strlen(name);
    for (int64_t n = 0; n < attributes->count; n++) {
        const xla_text *own = attributes->names[n];
        if (own->length == length && memcmp(own->text, name, length) == 0) { return attributes->types[n] == type ? attributes->values[n] : NULL; }
    }
    return NULL;
}

/* Eight bytes of a scalar; a program compiled by another version of this library may lack it. */
static fgqa_status read_scalar(const xla_attributes *attributes, const char *name, xla_dtype dtype, void *value)
{
    const xla_scalar *scalar = find_attribute(attributes, name, XLA_ATTRIBUTE_SCALAR);
    if (scalar == NULL || scalar->dtype != dtype) {
        return fgqa_fail(FGQA_ERROR_VALUE, "this call of flashgqa has no attribute %s: it was compiled for another version; compile the "
                         "program again", name);
    }
    memcpy(value, scalar->value, 8);
    return FGQA_OK;
}

static fgqa_status read_text(const xla_attributes *attributes, const char *name, char *text, size_t size)
{
    const xla_text *given = find_attribute(attributes, name, XLA_ATTRIBUTE_STRING);
    if (given == NULL || given->length >= size) {
        return fgqa_fail(FGQA_ERROR_VALUE, "this call of flashgqa has no attribute %s of less than %zu bytes: it was compiled for another "
                         "version; compile the program again", name, size);
    }
    memcpy(text, given->text, given->length);
    text[given->length] = '\0';
    return FGQA_OK;
}

static fgqa_status read_request(const xla_attributes *attributes, fgqa_request *request)
{
    int64_t integer;
    memset(request, 0, sizeof *request);
#define READ_INTEGER(name) \
    FGQA_TRY(read_scalar(attributes, #name, XLA_S64, &integer)); \
    request->name = (__typeof__(request->name))integer;
    FGQA_XLA_INTEGERS(READ_INTEGER)
#undef READ_INTEGER
#define READ_NUMBER(name) FGQA_TRY(read_scalar(attributes, #name, XLA_F64, &request->name));
    FGQA_XLA_NUMBERS(READ_NUMBER)
#undef READ_NUMBER
    return FGQA_OK;
}

/* ---- buffers ---- */

/* A call in the making. Tensors are those of one entry of vmap's axes: `at` says which. */
typedef struct {
    fgqa_request request;
    fgqa_device device;
    int32_t axes;                               /* of vmap, in front */
    int64_t extent[MOST_AXES], at[MOST_AXES];
    int64_t folded;                             /* extent of one more such axis, behind them, that is part of the batch; 0: none */
    int64_t rank;                               /* of q, without all these */
    int32_t n_args;
    fgqa_arg args[FGQA_ARG_COUNT];
    fgqa_tensor tensor[FGQA_ARG_COUNT];         /* of args[n] */
    char kernel[64];
} entry;

static int read_dtype(xla_dtype dtype, fgqa_dtype *own)
{
    switch (dtype) {
    case XLA_F64:      *own = FGQA_F64; return 1;
    case XLA_F32:      *own = FGQA_F32; return 1;
    case XLA_F16:      *own = FGQA_F16; return 1;
    case XLA_BF16:     *own = FGQA_BF16; return 1;
    case XLA_F8E4M3FN: *own = FGQA_F8E4M3; return 1;
    case XLA_PRED:     *own = FGQA_BOOL; return 1;
    case XLA_S32:      *own = FGQA_I32; return 1;
    case XLA_S64:      *own = FGQA_I64; return 1;
    case XLA_U32:      break;
    }
    return 0;
}

/* How many entries lie before entry `at`. */
static int64_t entry_index(const entry *e, const xla_buffer *buffer)
{
    int64_t index = 0;
    for (int32_t axis = 0; axis < e->axes; axis++) {
        index = index * buffer->shape[axis] + (buffer->shape[axis] > 1 ? e->at[axis] : 0);
    }
    return index;
}

static int is_length(fgqa_arg arg) { return arg == FGQA_ARG_q_lens || arg == FGQA_ARG_kv_lens; }

static fgqa_status read_buffer(const entry *e, const xla_buffer *buffer, fgqa_arg arg, fgqa_tensor *tensor)
{
    static _Alignas(256) char nothing[256];     /* XLA has no address for what has no elements */
    const char *name = fgqa_arg_name(arg);
    const int64_t *shape = buffer->shape + e->axes;
    const int is_batch = e->folded > 0 && e->rank == 3 && !is_length(arg);      /* the folded axis, of what has no other batch */
    const int64_t factor = e->folded > 0 && !is_batch ? *shape++ : 1;
    const int64_t rank = buffer->shape + buffer->rank - shape;
    memset(tensor, 0, sizeof *tensor);
    if (rank < 0 || rank > FGQA_MAX_DIMS) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has %lld axes beside those of vmap: it must have at most %d", name, (long long)rank,
                         FGQA_MAX_DIMS);
    }
    tensor->ndim = (int32_t)rank;
    tensor->device = e->device;
    memcpy(tensor->shape, shape, (size_t)rank * sizeof shape[0]);
    tensor->shape[0] *= factor;
    if (arg == FGQA_ARG_seed && buffer->dtype == XLA_U32) {     /* [seed, offset] in halves, for programs without int64 */
        tensor->dtype = FGQA_I64;
        tensor->shape[0] /= 2;
    } else if (!read_dtype(buffer->dtype, &tensor->dtype)) {
        return fgqa_fail(FGQA_ERROR_TYPE, "%s has a dtype (XLA's %d) that attention does not take", name, (int)buffer->dtype);
    }
    int64_t stride = 1;
    for (int32_t axis = tensor->ndim - 1; axis >= 0; axis--) {
        tensor->stride[axis] = stride;
        stride *= tensor->shape[axis];
    }
    const int64_t bytes = stride * (int64_t)fgqa_dtype_bytes(tensor->dtype);
    tensor->data = buffer->data == NULL ? nothing : (char *)buffer->data + entry_index(e, buffer) * bytes;
    if (is_batch && shape[0] != e->folded) {
        tensor->shape[0] = e->folded;
        tensor->stride[0] = 0;
    }
    return FGQA_OK;
}

/* ---- names and axes ---- */

static int find_argument(const char *name, size_t length, fgqa_arg *arg)
{
    for (int n = 0; n < FGQA_ARG_COUNT; n++) {
        const char *own = fgqa_arg_name((fgqa_arg)n);
        if (strlen(own) == length && memcmp(own, name, length) == 0) {
            *arg = (fgqa_arg)n;
            return 1;
        }
    }
    return 0;
}

static fgqa_status read_names(entry *e, const xla_call *call)
{
    char names[FGQA_ARG_COUNT * 16];
    FGQA_TRY(read_text(&call->attributes, FGQA_XLA_ARGUMENTS, names, sizeof names));
    for (const char *name = names; *name && e->n_args < FGQA_ARG_COUNT; name += strcspn(name, " ") + 1) {
        if (!find_argument(name, strcspn(name, " "), &e->args[e->n_args++])) {
            return fgqa_fail(FGQA_ERROR_VALUE, "attention has no argument \"%.*s\"", (int)strcspn(name, " "), name);
        }
    }
    if (e->n_args != call->arguments.count) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%d arguments are named but %lld are given", (int)e->n_args, (long long)call->arguments.count);
    }
    return FGQA_OK;
}

/* Whether the last axis of vmap can be part of the batch: arrays that have no axes but those of q, k and v, and
 * lengths. Dropout counts sequences, each of which vmap begins anew. What is the same for all has a stride of
 * 0, which only a new batch axis can have. */
static int can_fold(const entry *e, const xla_call *call)
{
    const int32_t axis = e->axes - 1;
    if (axis < 0 || e->extent[axis] == 0 || e->request.dropout_p != 0) { return 0; }
    for (int32_t n = 0; n < e->n_args; n++) {
        const fgqa_arg arg = e->args[n];
        const int of_rows = arg <= FGQA_ARG_v || (arg >= FGQA_ARG_dout && arg <= FGQA_ARG_lse);
        if (!of_rows && !is_length(arg)) { return 0; }
        if ((e->rank == 4 || is_length(arg)) && call->arguments.buffers[n]->shape[axis] != e->extent[axis]) { return 0; }
    }
    return 1;
}

/* How many axes of vmap there are, as q tells, and their extents: the most that any argument has. */
static fgqa_status read_axes(entry *e, const xla_call *call)
{
    int64_t axes = 0;
    FGQA_TRY(read_scalar(&call->attributes, FGQA_XLA_RANK, XLA_S64, &e->rank));
    for (int32_t n = 0; n < e->n_args; n++) {
        if (e->args[n] == FGQA_ARG_q) { axes = call->arguments.buffers[n]->rank - e->rank; }
    }
    if (axes < 0 || axes > MOST_AXES) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "q has %lld axes of vmap: at most %d nest", (long long)axes, MOST_AXES);
    }
    e->axes = (int32_t)axes;
    for (int32_t axis = 0; axis < e->axes; axis++) {
        e->extent[axis] = 1;
        for (int32_t n = 0; n < e->n_args; n++) {
            const xla_buffer *buffer = call->arguments.buffers[n];
            const int64_t extent = axis < buffer->rank ? buffer->shape[axis] : 1;
            if (extent != 1) { e->extent[axis] = extent; }
        }
    }
    if (can_fold(e, call)) { e->folded = e->extent[--e->axes]; }
    return FGQA_OK;
}

/* The next entry; 0 after the last. */
static int advance(entry *e)
{
    for (int32_t axis = e->axes - 1; axis >= 0; axis--) {
        if (++e->at[axis] < e->extent[axis]) { return 1; }
        e->at[axis] = 0;
    }
    return 0;
}

/* ---- a problem ---- */

static fgqa_status make_problem(entry *e, const xla_call *call, fgqa_problem *problem)
{
    for (int32_t n = 0; n < e->n_args; n++) {
        FGQA_TRY(read_buffer(e, call->arguments.buffers[n], e->args[n], &e->tensor[n]));
        e->request.tensor[e->args[n]] = &e->tensor[n];
    }
    FGQA_TRY(fgqa_problem_init(&e->request, problem));
    int64_t at = 0;
    for (int n = FGQA_ARG_out; n < FGQA_ARG_COUNT; n++) {
        fgqa_tensor spec, storage;
        if (!fgqa_problem_result(problem, (fgqa_arg)n, &spec)) { continue; }
        if (at == call->results.count) { return fgqa_fail(FGQA_ERROR_VALUE, "there is no buffer for %s", fgqa_arg_name((fgqa_arg)n)); }
        FGQA_TRY(read_buffer(e, call->results.buffers[at++], (fgqa_arg)n, &storage));
        if (storage.dtype != spec.dtype || storage.ndim != spec.ndim
            || memcmp(storage.shape, spec.shape, (size_t)spec.ndim * sizeof spec.shape[0]) != 0) {
            return fgqa_fail(FGQA_ERROR_VALUE, "the buffer for %s has another dtype or shape than the result", fgqa_arg_name((fgqa_arg)n));
        }
        fgqa_problem_bind(problem, (fgqa_arg)n, &storage);
    }
    return FGQA_OK;
}

/* Scratch memory of a GPU is XLA's own, which reuses it in the order of the stream. */
static fgqa_status run_on_gpu(const xla_call *call, const fgqa_plan *plan, const fgqa_problem *problem, void *stream)
{
    const fgqa_exec exec = {stream, NULL, NULL};
    if (plan->workspace_bytes == 0) { return plan->kernel->run(plan, problem, NULL, &exec); }
    /* Workspaces are aligned as memory of CUDA is; XLA promises less. */
    const size_t alignment = 256, bytes = plan->workspace_bytes + alignment;
    xla_memory_allocate memory = {.size = sizeof memory, .context = call->context, .bytes = bytes, .alignment = 1};
    FGQA_TRY(refused(call->api, call->api->memory_allocate(&memory), FGQA_ERROR_MEMORY, "scratch memory"));
    void *workspace = (char *)memory.data + (alignment - (uintptr_t)memory.data % alignment) % alignment;
    const fgqa_status status = plan->kernel->run(plan, problem, workspace, &exec);
    xla_memory_free end = {.size = sizeof end, .context = call->context, .bytes = bytes, .data = memory.data};
    xla_error *error = call->api->memory_free(&end);
    if (status == FGQA_OK) { return refused(call->api, error, FGQA_ERROR_RUNTIME, "way to free scratch memory"); }
    drop(call->api, error);     /* what the kernel says is the cause */
    return status;
}

static fgqa_status run_on_cpu(const fgqa_plan *plan, const fgqa_problem *problem)
{
    const fgqa_exec exec = {NULL, NULL, NULL};
    void *workspace = plan->workspace_bytes > 0 ? fgqa_workspace_take(plan->workspace_bytes) : NULL;
    if (workspace == NULL && plan->workspace_bytes > 0) {
        return fgqa_fail(FGQA_ERROR_MEMORY, "a workspace of %zu bytes does not fit into memory", plan->workspace_bytes);
    }
    const fgqa_status status = plan->kernel->run(plan, problem, workspace, &exec);
    fgqa_workspace_return(workspace);
    return status;
}

static fgqa_status run_entries(const xla_call *call, fgqa_device device, void *stream)
{
    entry e;
    memset(&e, 0, sizeof e);
    e.device = device;
    FGQA_TRY(read_request(&call->attributes, &e.request));
    FGQA_TRY(read_text(&call->attributes, FGQA_XLA_KERNEL, e.kernel, sizeof e.kernel));
    FGQA_TRY(read_names(&e, call));
    FGQA_TRY(read_axes(&e, call));
    for (int32_t axis = 0; axis < e.axes; axis++) {
        if (e.extent[axis] == 0) { return FGQA_OK; }
    }
    int32_t n_kernels = 0;
    const fgqa_kernel *kernels = device.type == FGQA_CPU ? fgqa_cpu_kernels(&n_kernels) : fgqa_cuda_kernels(&n_kernels);
    do {
        fgqa_problem problem;
        fgqa_plan plan;
        FGQA_TRY(make_problem(&e, call, &problem));
        FGQA_TRY(fgqa_plan_make(&problem, kernels, n_kernels, e.kernel[0] ? e.kernel : NULL, &plan));
        FGQA_TRY(device.type == FGQA_CPU ? run_on_cpu(&plan, &problem) : run_on_gpu(call, &plan, &problem, stream));
    } while (advance(&e));
    return FGQA_OK;
}

static fgqa_status run_on_device(const xla_call *call)
{
    if (!fgqa_cuda_built()) { return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "this build has no CUDA kernels (%s)", fgqa_cuda_reason()); }
    if (call->api->size < sizeof(xla_api)) { return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "this jaxlib does not say on which device a call runs; update it"); }
    xla_device_get device = {.size = sizeof device, .context = call->context};
    xla_stream_get stream = {.size = sizeof stream, .context = call->context};
    FGQA_TRY(refused(call->api, call->api->device_get(&device), FGQA_ERROR_RUNTIME, "device"));
    FGQA_TRY(refused(call->api, call->api->stream_get(&stream), FGQA_ERROR_RUNTIME, "stream"));
    int32_t before;
    FGQA_TRY(fgqa_cuda_enter(device.ordinal, &before));
    const fgqa_status status = run_entries(call, (fgqa_device){FGQA_CUDA, device.ordinal}, stream.stream);
    fgqa_cuda_leave(device.ordinal, before);
    return status;
}

/* ---- entry points ---- */

/* Whether XLA only asks for the version. */
static int answer_metadata(xla_call *call)
{
    for (xla_extension *extension = call->extensions; extension != NULL; extension = extension->next) {
        if (extension->type == XLA_EXTENSION_METADATA) {
            xla_metadata *metadata = ((xla_metadata_extension *)extension)->metadata;
            metadata->version.major = XLA_API_MAJOR;
            metadata->version.minor = XLA_API_MINOR;
            return 1;
        }
    }
    return 0;
}

xla_error *fgqa_xla_cpu(xla_call *call)
{
    if (answer_metadata(call)) { return NULL; }
    return failed(call->api, run_entries(call, (fgqa_device){FGQA_CPU, 0}, NULL));
}

xla_error *fgqa_xla_cuda(xla_call *call)
{
    if (answer_metadata(call)) { return NULL; }
    return failed(call->api, run_on_device(call));
}
