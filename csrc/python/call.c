/* call.c - one attention call from its Python arguments to its Python results:
 * options, tensors, problem, plan, memory, run without the GIL, objects.
 */
#include "call.h"

#include <stdio.h>
#include <string.h>

#include "../core/rows.h"
#include "../cpu/cpu.h"
#include "../cpu/memory.h"
#include "../cpu/threads.h"
#include "../cuda/device.h"
#include "call_state.h"

/* in[] and result[] are left as they are: a bit says which entries exist. */
void fgqa_call_begin(fgqa_call *call, PyObject *module, fgqa_pass pass, PyObject *stream)
{
    memset(&call->request, 0, sizeof call->request);
    memset(&call->extras, 0, sizeof call->extras);
    call->state = fgqa_module_state(module);
    call->request.pass = pass;
    fgqa_place_begin(&call->place, stream);
    call->plan_only = call->staged = call->repeats = 0;
    call->options = NULL;
    call->imported = call->allocated = 0;
    call->workspace = call->block = NULL;
    call->host_rows = NULL;
    call->n_scratch = 0;
}

void fgqa_call_end(fgqa_call *call)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (call->imported >> arg & 1) { fgqa_import_release(&call->in[arg]); }
        if (call->allocated >> arg & 1) { fgqa_result_drop(&call->result[arg]); }
    }
    fgqa_call_drop_scratch(call);
    fgqa_workspace_return(call->block);
    fgqa_place_end(&call->place);
}

int fgqa_call_import(fgqa_call *call, fgqa_arg arg, PyObject *object)
{
    const fgqa_slot slot = fgqa_arg_slot(call->request.pass, arg);
    if (fgqa_import_tensor(call->state, object, &slot, &call->place, &call->in[arg]) < 0) { return -1; }
    call->imported |= 1u << arg;
    call->request.tensor[arg] = &call->in[arg].tensor;
    return 0;
}

int fgqa_call_import_options(fgqa_call *call, PyObject *const *options)
{
    if (fgqa_read_options(options, &call->request, &call->extras) < 0) { return -1; }
    for (int option = 0; option < FGQA_OPTION_COUNT; option++) {
        fgqa_arg arg;
        PyObject *object;
        if (fgqa_option_tensor(options, (fgqa_option)option, &arg, &object) && fgqa_call_import(call, arg, object) < 0) { return -1; }
    }
    return 0;
}

int fgqa_call_own(fgqa_call *call, const fgqa_tensor *const *written, int n)
{
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
        const fgqa_slot slot = fgqa_arg_slot(call->request.pass, (fgqa_arg)arg);
        if ((call->imported >> arg & 1) && fgqa_import_own(&call->in[arg], &slot, written, n) < 0) { return -1; }
    }
    return 0;
}

/* Arguments in groups of which one question tells whether they are plain torch tensors; the
 * order of errors is that of the arguments. */
static int import_guarded(fgqa_call *call, int count, const fgqa_arg *args, PyObject *const *objects, const fgqa_guarded *groups)
{
    int plain[2], torch[2] = {1, 1};
    DLTensor dl[FGQA_GUARDED];
    for (int n = 0; n < count; n++) {
        const int group = n / FGQA_GUARDED;
        if (n % FGQA_GUARDED == 0) { plain[group] = fgqa_torch_is_plain(call->state, groups[group], objects + n, dl); }
        call->place.plain = plain[group] ? &dl[n % FGQA_GUARDED] : NULL;
        if (fgqa_call_import(call, args[n], objects[n]) < 0) { return -1; }
        torch[group] &= call->in[args[n]].type.kind == FGQA_KIND_TORCH;
    }
    call->place.plain = NULL;
    for (int group = 0; group < count / FGQA_GUARDED; group++) {
        if (torch[group] && !plain[group]) { fgqa_torch_was_plain(call->state, groups[group], objects + group * FGQA_GUARDED); }
    }
    return 0;
}

static int check_place_on_gpu(const fgqa_extras *extras, fgqa_device device)
{
    if (!extras->device_given || (extras->device.type == FGQA_CUDA && (extras->device.index < 0 || extras->device.index == device.index))) {
        return 0;
    }
    PyErr_Format(PyExc_ValueError, "device is another one than that of q, which is on cuda:%d: device moves NumPy arrays only; leave it out",
                 (int)device.index);
    return -1;
}

/* device="cuda" with NumPy arrays. */
static int enter_gpu(fgqa_call *call)
{
    const fgqa_device device = call->extras.device;
    if (fgqa_cuda_reason() != NULL) {
        PyErr_Format(PyExc_NotImplementedError, "device is \"cuda\", and %s (%s); leave device out to compute on the CPU",
                     fgqa_cuda_built() ? "CUDA cannot be used here" : "this build has no CUDA kernels", fgqa_cuda_reason());
        return -1;
    }
    call->staged = 1;
    return fgqa_place_enter(&call->place, "q", &call->in[FGQA_ARG_q].type, device.index < 0 ? 0 : device.index);
}

int fgqa_call_check_place(fgqa_call *call)
{
    const fgqa_extras *extras = &call->extras;
    const fgqa_import *q = &call->in[FGQA_ARG_q];
    if (q->tensor.device.type == FGQA_CUDA) { return check_place_on_gpu(extras, q->tensor.device); }
    if (extras->device_given && extras->device.type == FGQA_CUDA) {
        if (q->type.kind == FGQA_KIND_NUMPY) { return enter_gpu(call); }
        PyErr_SetString(PyExc_ValueError, "device is \"cuda\" but q is on cpu: device moves NumPy arrays only; move q, k and v "
                        "to the GPU with their own library");
        return -1;
    }
    if (extras->stream != NULL) {
        PyErr_Format(PyExc_ValueError, "stream is %R but q is on cpu: only GPU tensors have streams; leave it out", extras->stream);
        return -1;
    }
    return 0;
}

/* The longest text of a plan, in bytes. */
enum { PLAN_TEXT = 8192 };

static int any_order(const fgqa_call *call)
{
    return call->problem.device.type == FGQA_CUDA && fgqa_cuda_any_order(&call->plan, &call->problem);
}

/* The plan as text. Which order dq is summed in is asked only where it may be any. */
static void print_plan(const fgqa_call *call, char text[PLAN_TEXT])
{
    const int length = fgqa_plan_print(&call->plan, &call->problem, text, PLAN_TEXT);
    if (call->problem.deterministic || call->problem.pass != FGQA_PASS_BWD || length >= PLAN_TEXT) { return; }
    snprintf(text + length, (size_t)(PLAN_TEXT - length), "dq        summed in %s\n", any_order(call) ? "any order" : "order, which is as fast here");
}

/* FLASHGQA_LOG=plan: each plan once. */
static int log_plan(fgqa_call *call)
{
    char text[PLAN_TEXT];
    if (call->state->logged_plans == NULL) { return 0; }
    print_plan(call, text);
    PyObject *line = PyUnicode_FromString(text);
    const int seen = line ? PySet_Contains(call->state->logged_plans, line) : -1;
    const int failed = seen < 0 || (seen == 0 && PySet_Add(call->state->logged_plans, line) < 0);
    Py_XDECREF(line);
    if (failed) { return -1; }
    if (seen == 0) { PySys_FormatStderr("flashgqa plan\n%s", text); }
    return 0;
}

/* The arguments to where they are computed, and the problem. */
static int make_problem(fgqa_call *call)
{
    if (call->in[FGQA_ARG_q].tensor.device.type == FGQA_CPU) {
        const fgqa_tensor *out = call->request.pass == FGQA_PASS_FWD ? call->request.tensor[FGQA_ARG_out] : NULL;
        if (fgqa_call_own(call, &out, 1) < 0 || fgqa_raise(fgqa_problem_init(&call->request, &call->problem)) < 0) { return -1; }
        if (!call->staged) { return 0; }
        if (call->problem.varlen) {      /* the longest sequence: a GPU does not look into cu_seqlens */
            call->request.max_q = call->problem.sq;
            call->request.max_kv = call->problem.sk;
        }
        call->request.check = 0;         /* just done */
        if (fgqa_call_place_arrays(call) < 0) { return -1; }
    } else if (fgqa_call_gather(call) < 0) {
        return -1;
    }
    if (fgqa_raise(fgqa_problem_init(&call->request, &call->problem)) < 0) { return -1; }
    if (call->host_rows && fgqa_raise(fgqa_check_rows(&call->problem, call->host_rows)) < 0) { return -1; }
    return call->request.check && !call->plan_only ? fgqa_call_check_contents(call) : 0;
}

int fgqa_call_make_plan(fgqa_call *call)
{
    int32_t n_kernels = 0;
    const fgqa_kernel *kernels = call->problem.device.type == FGQA_CPU ? fgqa_cpu_kernels(&n_kernels) : fgqa_cuda_kernels(&n_kernels);
    if (fgqa_raise(fgqa_plan_make(&call->problem, kernels, n_kernels, call->extras.kernel, &call->plan)) < 0) { return -1; }
    if (call->plan_only || call->state->logged_plans != NULL) {
        fgqa_plan_reasons(&call->problem, kernels, n_kernels, call->extras.kernel, &call->plan);
    }
    return log_plan(call);
}

static int plan_call(fgqa_call *call)
{
    if (call->repeats) { return 0; }
    if (fgqa_call_check_place(call) < 0 || make_problem(call) < 0 || fgqa_call_make_plan(call) < 0) { return -1; }
    fgqa_call_keep(call);
    if (!call->staged || call->plan_only) { return 0; }
    return fgqa_call_stage(call) < 0 ? -1 : fgqa_raise(fgqa_problem_init(&call->request, &call->problem));
}

/* Results have the type of q. */
int fgqa_call_allocate(fgqa_call *call)
{
    for (int n = FGQA_ARG_out; n < FGQA_ARG_COUNT; n++) {
        const fgqa_arg arg = (fgqa_arg)n;
        fgqa_tensor spec;
        if (call->request.tensor[arg] != NULL || !fgqa_problem_result(&call->problem, arg, &spec)) { continue; }
        if (call->staged) {
            size_t bytes = fgqa_dtype_bytes(spec.dtype);      /* the problem has checked that they can be counted */
            for (int32_t axis = 0; axis < spec.ndim; axis++) { bytes *= (size_t)spec.shape[axis]; }
            memset(&call->result[arg], 0, sizeof call->result[arg]);
            call->result[arg].tensor = spec;
            if (fgqa_call_scratch(call, bytes, &call->result[arg].tensor.data) < 0) { return -1; }
        } else if (fgqa_result_new(call->state, &call->in[FGQA_ARG_q], &spec, &call->result[arg]) < 0) {
            return -1;
        }
        call->allocated |= 1u << arg;
        fgqa_problem_bind(&call->problem, arg, &call->result[arg].tensor);
    }
    if (call->staged) { return 0; }      /* its parts have workspaces of their own */
    if (call->plan.workspace_bytes > 0 && call->problem.device.type == FGQA_CUDA) {
        return fgqa_call_scratch(call, call->plan.workspace_bytes, &call->workspace);
    }
    if (call->plan.workspace_bytes > 0) {
        call->workspace = call->block = fgqa_workspace_take(call->plan.workspace_bytes);
        if (call->workspace == NULL) {
            PyErr_Format(PyExc_MemoryError, "a workspace of %zu bytes does not fit into memory", call->plan.workspace_bytes);
            return -1;
        }
    }
    return 0;
}

int fgqa_interrupted(void *context)
{
    PyThreadState **thread = context;
    PyEval_RestoreThread(*thread);
    const int signalled = PyErr_CheckSignals() != 0;
    *thread = PyEval_SaveThread();
    return signalled;
}

static int run_call(fgqa_call *call)
{
    if (call->request.pass == FGQA_PASS_FWD && (call->imported >> FGQA_ARG_out & 1)) {
        const fgqa_import *out = &call->in[FGQA_ARG_out];
        if (fgqa_torch_write(call->state, &out, 1) < 0) { return -1; }
    }
    if (call->staged) { return fgqa_call_run_staged(call); }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {call->place.stream, fgqa_interrupted, &thread};
    fgqa_threads_of_team(call->in[FGQA_ARG_q].type.kind == FGQA_KIND_TORCH);
    const fgqa_status status = call->plan.kernel->run(&call->plan, &call->problem, call->workspace, &exec);
    fgqa_threads_of_team(0);
    PyEval_RestoreThread(thread);
    return fgqa_raise(status);
}

PyObject *fgqa_call_take(fgqa_call *call, fgqa_arg arg, PyObject *given)
{
    if (given != NULL && given != Py_None) {
        Py_INCREF(given);
        return given;
    }
    if (!(call->allocated >> arg & 1)) { Py_RETURN_NONE; }
    call->allocated &= ~(1u << arg);
    return fgqa_result_object(call->state, &call->in[FGQA_ARG_q], &call->result[arg]);
}

PyObject *fgqa_call_take_forward(fgqa_call *call, PyObject *given)
{
    PyObject *out = fgqa_call_take(call, FGQA_ARG_out, given);
    if (out == NULL || !call->request.want_lse) { return out; }
    PyObject *lse = fgqa_call_take(call, FGQA_ARG_lse, NULL);
    PyObject *pair = lse ? PyTuple_Pack(2, out, lse) : NULL;
    Py_XDECREF(lse);
    Py_DECREF(out);
    return pair;
}

int fgqa_call_check_count(const char *name, Py_ssize_t n, Py_ssize_t wanted)
{
    if (n == wanted) { return 0; }
    PyErr_Format(PyExc_TypeError, "_C.%s takes %zd arguments, got %zd", name, wanted, n);
    return -1;
}

/* forward(q, k, v, return_lse, out, *options) -> out | (out, lse) */
static int prepare_forward(fgqa_call *call, PyObject *const *args)
{
    static const fgqa_arg order[] = {FGQA_ARG_q, FGQA_ARG_k, FGQA_ARG_v};
    static const fgqa_guarded groups[] = {FGQA_GUARDED_FORWARD};
    if (import_guarded(call, 3, order, args, groups) < 0) { return -1; }
    if (fgqa_read_bool(args[3], "return_lse", &call->request.want_lse) < 0) { return -1; }
    if (args[4] == Py_None && fgqa_call_repeats(call, args + 5)) { return 0; }
    if (fgqa_call_import_options(call, args + 5) < 0) { return -1; }
    return args[4] == Py_None ? 0 : fgqa_call_import(call, FGQA_ARG_out, args[4]);
}

PyObject *fgqa_py_forward(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    fgqa_call call;
    PyObject *result = NULL;
    if (fgqa_call_check_count("forward", n, 5 + FGQA_OPTION_COUNT) < 0) { return NULL; }
    fgqa_call_begin(&call, module, FGQA_PASS_FWD, args[5 + FGQA_OPTION_stream]);
    if (prepare_forward(&call, args) == 0 && plan_call(&call) == 0 && fgqa_call_allocate(&call) == 0 && run_call(&call) == 0) {
        result = fgqa_call_take_forward(&call, args[4]);
    }
    fgqa_call_end(&call);
    return result;
}

/* backward(dout, q, k, v, out, lse, dlse, want_dbias, *options) -> (dq, dk, dv, dbias, dsink), None where there is none */
static int prepare_backward(fgqa_call *call, PyObject *const *args)
{
    static const fgqa_arg order[] = {FGQA_ARG_dout, FGQA_ARG_q, FGQA_ARG_k, FGQA_ARG_v, FGQA_ARG_out, FGQA_ARG_lse};
    static const fgqa_guarded groups[] = {FGQA_GUARDED_FIRST, FGQA_GUARDED_LAST};
    if (import_guarded(call, 6, order, args, groups) < 0) { return -1; }
    if (args[6] != Py_None && fgqa_call_import(call, FGQA_ARG_dlse, args[6]) < 0) { return -1; }
    int32_t want_dbias = 0;
    if (fgqa_read_bool(args[7], "want_dbias", &want_dbias) < 0) { return -1; }
    if (fgqa_call_repeats(call, args + 8)) { return 0; }
    if (fgqa_call_import_options(call, args + 8) < 0) { return -1; }
    call->request.want_dbias = want_dbias && call->request.tensor[FGQA_ARG_bias] != NULL;
    call->request.want_dsink = call->request.tensor[FGQA_ARG_sink] != NULL;
    return 0;
}

PyObject *fgqa_py_backward(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    fgqa_call call;
    PyObject *result = NULL;
    if (fgqa_call_check_count("backward", n, 8 + FGQA_OPTION_COUNT) < 0) { return NULL; }
    fgqa_call_begin(&call, module, FGQA_PASS_BWD, args[8 + FGQA_OPTION_stream]);
    if (prepare_backward(&call, args) == 0 && plan_call(&call) == 0 && fgqa_call_allocate(&call) == 0 && run_call(&call) == 0) {
        static const fgqa_arg order[] = {FGQA_ARG_dq, FGQA_ARG_dk, FGQA_ARG_dv, FGQA_ARG_dbias, FGQA_ARG_dsink};
        result = PyTuple_New(5);
        for (int at = 0; at < 5 && result != NULL; at++) {
            PyObject *gradient = fgqa_call_take(&call, order[at], NULL);
            if (gradient == NULL) { Py_CLEAR(result); } else { PyTuple_SetItem(result, at, gradient); }
        }
    }
    fgqa_call_end(&call);
    return result;
}

/* weights(q, k, rows, *options) -> weights; rows None: summed over the query rows */
PyObject *fgqa_py_weights(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    fgqa_call call;
    PyObject *result = NULL;
    if (fgqa_call_check_count("weights", n, 3 + FGQA_OPTION_COUNT) < 0) { return NULL; }
    fgqa_call_begin(&call, module, args[2] == Py_None ? FGQA_PASS_KEYSUM : FGQA_PASS_ROWS, args[3 + FGQA_OPTION_stream]);
    if (fgqa_call_import(&call, FGQA_ARG_q, args[0]) == 0 && fgqa_call_import(&call, FGQA_ARG_k, args[1]) == 0
        && (args[2] == Py_None || fgqa_call_import(&call, FGQA_ARG_rows, args[2]) == 0) && fgqa_call_import_options(&call, args + 3) == 0
        && plan_call(&call) == 0 && fgqa_call_allocate(&call) == 0 && run_call(&call) == 0) {
        result = fgqa_call_take(&call, FGQA_ARG_weights, NULL);
    }
    fgqa_call_end(&call);
    return result;
}

/* ---- explain ---- */

/* [(name, reason), ...] of plan.refused */
static PyObject *refusals(const fgqa_plan *plan)
{
    PyObject *list = PyList_New(0);
    for (const char *line = plan->refused; list != NULL && *line;) {
        const size_t length = strcspn(line, "\n"), name = strcspn(line, ":");
        const size_t reason = name + 2 < length ? name + 2 : length;
        PyObject *pair = name < length ? Py_BuildValue("(s#s#)", line, (Py_ssize_t)name, line + reason, (Py_ssize_t)(length - reason))
                                       : Py_BuildValue("(s#s)", line, (Py_ssize_t)length, "");
        if (pair == NULL || PyList_Append(list, pair) < 0) { Py_CLEAR(list); }
        Py_XDECREF(pair);
        line += length + (line[length] == '\n');
    }
    return list;
}

PyObject *fgqa_call_plan_data(const fgqa_call *call)
{
    const fgqa_problem *p = &call->problem;
    const fgqa_plan *plan = &call->plan;
    char text[PLAN_TEXT];
    print_plan(call, text);
    PyObject *refused = refusals(plan);
    if (refused == NULL) { return NULL; }
    return Py_BuildValue("{s:s,s:s,s:s,s:s,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:L,s:i,s:n,s:n,s:d,s:O,s:N,s:s}",
                         "kernel", plan->kernel->name, "pass", p->pass == FGQA_PASS_FWD ? "forward" : "backward",
                         "device", p->device.type == FGQA_CPU ? "cpu" : "cuda", "dtype", fgqa_dtype_name(p->dtype),
                         "b", (int)p->b, "hq", (int)p->hq, "hk", (int)p->hk, "sq", (int)p->sq, "sk", (int)p->sk, "d", (int)p->d,
                         "dv", (int)p->dv, "block_q", (int)plan->block_q, "block_k", (int)plan->block_k, "splits", (int)plan->splits,
                         "tasks", (long long)plan->tasks, "threads", (int)plan->threads,
                         "scratch_bytes", (Py_ssize_t)plan->scratch_bytes, "workspace_bytes", (Py_ssize_t)plan->workspace_bytes,
                         "flops", plan->flops, "any_order", any_order(call) ? Py_True : Py_False, "refused", refused, "text", text);
}

/* Turns a planned forward request into that of its backward pass: dout, out and lse as the forward pass would return them.
 * Their memory is never touched while planning; q's stands in for it. */
static int turn_backward(fgqa_call *call, fgqa_tensor stand_in[3])
{
    fgqa_request *r = &call->request;
    fgqa_problem_result(&call->problem, FGQA_ARG_out, &stand_in[0]);
    fgqa_problem_result(&call->problem, FGQA_ARG_lse, &stand_in[1]);
    for (int n = 0; n < 2; n++) { stand_in[n].data = call->in[FGQA_ARG_q].tensor.data; }
    stand_in[2] = stand_in[0];
    r->pass = FGQA_PASS_BWD;
    r->tensor[FGQA_ARG_out] = &stand_in[0];
    r->tensor[FGQA_ARG_lse] = &stand_in[1];
    r->tensor[FGQA_ARG_dout] = &stand_in[2];
    r->want_dbias = r->tensor[FGQA_ARG_bias] != NULL;
    r->want_dsink = r->tensor[FGQA_ARG_sink] != NULL;
    return fgqa_raise(fgqa_problem_init(r, &call->problem)) < 0 ? -1 : fgqa_call_make_plan(call);
}

/* explain(q, k, v, return_lse, out, backward, *options) -> dict */
PyObject *fgqa_py_explain(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    fgqa_call call;
    fgqa_tensor stand_in[3];
    PyObject *result = NULL;
    int32_t backward = 0;
    if (fgqa_call_check_count("explain", n, 6 + FGQA_OPTION_COUNT) < 0 || fgqa_read_bool(args[5], "backward", &backward) < 0) { return NULL; }
    PyObject *forward_args[5 + FGQA_OPTION_COUNT];
    memcpy(forward_args, args, 5 * sizeof args[0]);
    memcpy(forward_args + 5, args + 6, FGQA_OPTION_COUNT * sizeof args[0]);
    fgqa_call_begin(&call, module, FGQA_PASS_FWD, args[6 + FGQA_OPTION_stream]);
    call.plan_only = 1;
    int failed = prepare_forward(&call, forward_args);
    if (failed == 0 && backward) {
        /* A forced kernel is one of the backward pass: the forward problem is only lowered, not planned. */
        call.request.want_lse = 1;
        failed = fgqa_call_check_place(&call) < 0 || make_problem(&call) < 0 || turn_backward(&call, stand_in) < 0;
    } else if (failed == 0) {
        failed = plan_call(&call);
    }
    if (failed == 0) { result = fgqa_call_plan_data(&call); }
    fgqa_call_end(&call);
    return result;
}
