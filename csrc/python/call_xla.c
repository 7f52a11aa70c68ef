/* call_xla.c - what flashgqa/jax.py asks while JAX traces: whether a call is sound, before there are any values, what it returns,
 * and with which attributes XLA will make it (xla/handler.h).
 */
#include "call.h"

#include <stdio.h>
#include <string.h>

#include "../cpu/memory.h"
#include "../xla/handler.h"
#include "args.h"
#include "call_state.h"

/* What a call will be given, with index arrays that stand in for those to come: zeros and, of cu_seqlens, sequences as long as
 * they may be. Whatever they say is checked where it is known, in the call. */
typedef struct {
    fgqa_tensor tensor[FGQA_ARG_COUNT];
    void *block[FGQA_ARG_COUNT];
    char names[FGQA_ARG_COUNT * 16];
} specs;

static char nothing[64];      /* the address of every array that is not read */

static int read_arg(PyObject *name, fgqa_arg *arg)
{
    for (int n = 0; n < FGQA_ARG_COUNT && PyUnicode_Check(name); n++) {
        *arg = (fgqa_arg)n;
        if (PyUnicode_CompareWithASCIIString(name, fgqa_arg_name(*arg)) == 0) { return 0; }
    }
    PyErr_Format(PyExc_ValueError, "%R is no array of a call", name);
    return -1;
}

static int read_dtype(PyObject *name, fgqa_pass pass, fgqa_arg arg, fgqa_dtype *dtype)
{
    const fgqa_slot slot = fgqa_arg_slot(pass, arg);
    for (int n = 0; n < FGQA_DTYPE_COUNT; n++) {
        *dtype = (fgqa_dtype)n;
        if (PyUnicode_CompareWithASCIIString(name, fgqa_dtype_name(*dtype)) == 0) { return 0; }
    }
    PyErr_Format(PyExc_TypeError, "%s has dtype %U: it must be %s; convert it to %s", slot.name, name, slot.dtypes, slot.example);
    return -1;
}

static int read_shape(PyObject *shape, fgqa_arg arg, fgqa_tensor *tensor)
{
    const Py_ssize_t ndim = PyTuple_Size(shape);
    int64_t stride = 1;
    if (ndim > FGQA_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s has shape %R: it must have at most %d axes", fgqa_arg_name(arg), shape, FGQA_MAX_DIMS);
        return -1;
    }
    tensor->ndim = (int32_t)ndim;
    for (int32_t axis = tensor->ndim - 1; axis >= 0; axis--) {
        if (fgqa_read_int(PyTuple_GetItem(shape, axis), "an extent", &tensor->shape[axis]) < 0) { return -1; }
        tensor->stride[axis] = stride;
        if (__builtin_mul_overflow(stride, tensor->shape[axis], &stride)) {
            PyErr_NoMemory();
            return -1;
        }
    }
    return 0;
}

/* {name: (dtype, shape)} */
static int read_specs(PyObject *given, fgqa_request *request, specs *s)
{
    PyObject *name, *spec, *dtype, *shape;
    Py_ssize_t position = 0;
    size_t used = 0;
    while (PyDict_Next(given, &position, &name, &spec)) {
        fgqa_arg arg;
        if (read_arg(name, &arg) < 0 || !PyArg_ParseTuple(spec, "UO!", &dtype, &PyTuple_Type, &shape)) { return -1; }
        fgqa_tensor *tensor = &s->tensor[arg];
        tensor->data = nothing;
        if (read_dtype(dtype, request->pass, arg, &tensor->dtype) < 0 || read_shape(shape, arg, tensor) < 0) { return -1; }
        request->tensor[arg] = tensor;
        used += (size_t)snprintf(s->names + used, sizeof s->names - used, "%s ", fgqa_arg_name(arg));
    }
    return 0;
}

static int stand_in(const fgqa_request *request, specs *s, fgqa_arg arg)
{
    fgqa_tensor *tensor = &s->tensor[arg];
    if (request->tensor[arg] == NULL || tensor->ndim != 1) { return 0; }       /* another rank is an error that needs no contents */
    const int64_t count = tensor->shape[0];
    const size_t bytes = (size_t)count * fgqa_dtype_bytes(tensor->dtype);
    s->block[arg] = tensor->data = fgqa_block_new(bytes);
    if (tensor->data == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memset(tensor->data, 0, bytes);
    const int of_q = arg == FGQA_ARG_cu_seqlens_q;
    const fgqa_tensor *rows = request->tensor[of_q ? FGQA_ARG_q : FGQA_ARG_k];
    if ((!of_q && arg != FGQA_ARG_cu_seqlens_kv) || tensor->dtype != FGQA_I32 || rows == NULL || rows->ndim == 0) { return 0; }
    int64_t longest = of_q ? request->max_q : request->max_kv;
    if (longest < 0) { longest = fgqa_score_extent(request, of_q ? 2 : 1); }
    if (longest <= 1) { longest = rows->shape[0]; }
    for (int64_t n = 1; n < count; n++) {
        const int64_t end = n * longest < rows->shape[0] && n + 1 < count ? n * longest : rows->shape[0];
        ((int32_t *)tensor->data)[n] = (int32_t)end;
    }
    return 0;
}

static PyObject *attributes_of(const fgqa_request *request, const fgqa_extras *extras, const specs *s)
{
    PyObject *dict = PyDict_New();
    int failed = dict == NULL;
#define PUT(name, object) \
    do { \
        PyObject *value = failed ? NULL : (object); \
        failed = value == NULL || PyDict_SetItemString(dict, name, value) < 0; \
        Py_XDECREF(value); \
    } while (0);
#define PUT_INTEGER(name) PUT(#name, PyLong_FromLongLong((long long)request->name))
#define PUT_NUMBER(name) PUT(#name, PyFloat_FromDouble(request->name))
    FGQA_XLA_INTEGERS(PUT_INTEGER)
    FGQA_XLA_NUMBERS(PUT_NUMBER)
    PUT(FGQA_XLA_RANK, PyLong_FromLong(s->tensor[FGQA_ARG_q].ndim))
    PUT(FGQA_XLA_ARGUMENTS, PyUnicode_FromString(s->names))
    PUT(FGQA_XLA_KERNEL, PyUnicode_FromString(extras->kernel ? extras->kernel : ""))
#undef PUT_NUMBER
#undef PUT_INTEGER
#undef PUT
    if (failed) { Py_CLEAR(dict); }
    return dict;
}

/* [(dtype, shape), ...] */
static PyObject *results_of(const fgqa_problem *problem)
{
    PyObject *list = PyList_New(0);
    for (int n = FGQA_ARG_out; n < FGQA_ARG_COUNT && list != NULL; n++) {
        fgqa_tensor spec;
        if (!fgqa_problem_result(problem, (fgqa_arg)n, &spec)) { continue; }
        PyObject *shape = PyTuple_New(spec.ndim), *result = NULL;
        for (int32_t axis = 0; axis < spec.ndim && shape != NULL; axis++) {
            PyTuple_SetItem(shape, axis, PyLong_FromLongLong(spec.shape[axis]));
        }
        if (shape != NULL) { result = Py_BuildValue("(sN)", fgqa_dtype_name(spec.dtype), shape); }
        if (result == NULL || PyList_Append(list, result) < 0) { Py_CLEAR(list); }
        Py_XDECREF(result);
    }
    return list;
}

/* xla_call({name: (dtype, shape)}, backward, return_lse, want_dbias, want_dsink,
 * *OPTIONS) -> (attributes, [(dtype, shape), ...]) */
PyObject *fgqa_py_xla_call(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    static const fgqa_arg contents[] = {FGQA_ARG_q_lens, FGQA_ARG_kv_lens, FGQA_ARG_cu_seqlens_q, FGQA_ARG_cu_seqlens_kv, FGQA_ARG_seed};
    fgqa_request request = {0};
    fgqa_extras extras = {0};
    fgqa_problem problem;
    specs s = {0};
    int32_t backward = 0;
    PyObject *attributes = NULL, *results = NULL, *pair = NULL;
    (void)module;
    if (fgqa_call_check_count("xla_call", n, 5 + FGQA_OPTION_COUNT) < 0) { return NULL; }
    if (!PyDict_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "_C.xla_call takes a dict of arrays");
        return NULL;
    }
    int failed = fgqa_read_bool(args[1], "backward", &backward) < 0;
    request.pass = backward ? FGQA_PASS_BWD : FGQA_PASS_FWD;
    failed = failed || fgqa_read_bool(args[2], "return_lse", &request.want_lse) < 0
                 || fgqa_read_bool(args[3], "want_dbias", &request.want_dbias) < 0
                 || fgqa_read_bool(args[4], "want_dsink", &request.want_dsink) < 0 || fgqa_read_options(args + 5, &request, &extras) < 0
                 || read_specs(args[0], &request, &s) < 0;
    for (size_t at = 0; at < sizeof contents / sizeof contents[0] && !failed; at++) { failed = stand_in(&request, &s, contents[at]) < 0; }
    if (!failed && fgqa_raise(fgqa_problem_init(&request, &problem)) == 0) {
        attributes = attributes_of(&request, &extras, &s);
        results = attributes ? results_of(&problem) : NULL;
        pair = results ? PyTuple_Pack(2, attributes, results) : NULL;
    }
    Py_XDECREF(attributes);
    Py_XDECREF(results);
    for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) { fgqa_block_drop(s.block[arg]); }
    return pair;
}

/* xla_handlers() -> {platform: capsule} */
PyObject *fgqa_py_xla_handlers(PyObject *module, PyObject *unused)
{
    static const char name[] = "xla._CUSTOM_CALL_TARGET";      /* what jaxlib looks for */
    const struct { const char *platform; xla_error *(*handler)(xla_call *); } handlers[] = {{"cpu", fgqa_xla_cpu}, {"CUDA", fgqa_xla_cuda}};
    PyObject *dict = PyDict_New();
    (void)module;
    (void)unused;
    for (size_t n = 0; n < sizeof handlers / sizeof handlers[0] && dict != NULL; n++) {
        PyObject *capsule = PyCapsule_New(__extension__(void *)handlers[n].handler, name, NULL);
        if (capsule == NULL || PyDict_SetItemString(dict, handlers[n].platform, capsule) < 0) { Py_CLEAR(dict); }
        Py_XDECREF(capsule);
    }
    return dict;
}
