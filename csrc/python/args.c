/* args.c - Python values of options into the plain fields of a request. Ranges and combinations are checked in core. */
#include "args.h"

#include <string.h>

/* ---- values ---- */

static int is_bool(PyObject *object) { return PyBool_Check(object) || PyArray_IsScalar(object, Bool); }

int fgqa_is_integer(PyObject *object)
{
    return (PyLong_Check(object) && !PyBool_Check(object)) || PyArray_IsScalar(object, Integer);
}

int fgqa_read_bool(PyObject *object, const char *name, int32_t *value)
{
    if (!is_bool(object)) {
        PyErr_Format(PyExc_TypeError, "%s is %R: it must be True or False", name, object);
        return -1;
    }
    *value = PyObject_IsTrue(object);
    return 0;
}

int fgqa_read_int(PyObject *object, const char *name, int64_t *value)
{
    if (!fgqa_is_integer(object)) {
        PyErr_Format(PyExc_TypeError, "%s is %R: it must be an integer", name, object);
        return -1;
    }
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) { return -1; }
    int overflow;
    *value = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (overflow != 0) {
        PyErr_Format(PyExc_ValueError, "%s is %R: it must fit 64 bits", name, object);
        return -1;
    }
    return PyErr_Occurred() ? -1 : 0;
}

int fgqa_read_number(PyObject *object, const char *name, double *value)
{
    if (!PyFloat_Check(object) && !fgqa_is_integer(object) && !PyArray_IsScalar(object, Floating)) {
        const int converts = PyObject_HasAttrString(object, "__float__");
        PyErr_Format(PyExc_TypeError, "%s is %R: it must be a number%s%s%s", name, object, converts ? "; float(" : "",
                     converts ? name : "", converts ? ") makes one of an array of one element" : "");
        return -1;
    }
    *value = PyFloat_AsDouble(object);
    if (*value != -1.0 || !PyErr_Occurred()) { return 0; }
    if (PyErr_ExceptionMatches(PyExc_OverflowError)) { PyErr_Format(PyExc_ValueError, "%s is %R: it must be a finite number", name, object); }
    return -1;
}

int fgqa_read_seed(PyObject *object, uint64_t *seed)
{
    PyObject *number = PyNumber_Index(object);
    if (number == NULL) { return -1; }
    *seed = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (*seed == (uint64_t)-1 && PyErr_Occurred()) {
        PyErr_Format(PyExc_ValueError, "seed is %R: it must be 0 to 2**64 - 1", object);
        return -1;
    }
    return 0;
}

int fgqa_read_choice(PyObject *object, const char *name, const char *const *choices, int n, int *value)
{
    if (PyUnicode_Check(object)) {
        for (int k = 0; k < n; k++) {
            if (PyUnicode_CompareWithASCIIString(object, choices[k]) == 0) { *value = k; return 0; }
        }
    }
    PyObject *allowed = PyUnicode_FromFormat("\"%s\"", choices[0]);
    for (int k = 1; k < n && allowed != NULL; k++) {
        PyObject *longer = PyUnicode_FromFormat("%U or \"%s\"", allowed, choices[k]);
        Py_DECREF(allowed);
        allowed = longer;
    }
    if (allowed != NULL) {
        PyErr_Format(PyUnicode_Check(object) ? PyExc_ValueError : PyExc_TypeError, "%s is %R: it must be %U", name, object, allowed);
        Py_DECREF(allowed);
    }
    return -1;
}

/* ---- options of their own form ---- */

static int read_bound(PyObject *object, const char *name, int64_t *bound)
{
    if (object == Py_None) {
        *bound = FGQA_UNBOUNDED;
        return 0;
    }
    return fgqa_read_int(object, name, bound);
}

/* None or a pair (left, right) whose entries are None or integers. */
static int read_window(PyObject *object, fgqa_request *request)
{
    request->window_left = request->window_right = FGQA_UNBOUNDED;
    if (object == Py_None) { return 0; }
    if ((!PyTuple_Check(object) && !PyList_Check(object)) || PySequence_Size(object) != 2) {
        PyErr_Format(PyExc_TypeError, "window is %R: it must be None or a pair (left, right) of integers or None; the last n keys "
                     "are (n - 1, 0)", object);
        return -1;
    }
    PyObject *left = PySequence_GetItem(object, 0), *right = PySequence_GetItem(object, 1);
    const int failed = left == NULL || right == NULL || read_bound(left, "window[0]", &request->window_left) < 0
                       || read_bound(right, "window[1]", &request->window_right) < 0;
    Py_XDECREF(left);
    Py_XDECREF(right);
    return failed ? -1 : 0;
}

/* None, "cpu", "cuda" or "cuda:<index>". */
static int read_device(PyObject *object, fgqa_extras *extras)
{
    if (object == Py_None) { return 0; }
    const char *text = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, NULL) : NULL;
    if (PyErr_Occurred()) { return -1; }
    extras->device_given = 1;
    extras->device = (fgqa_device){FGQA_CPU, -1};
    if (text != NULL && strcmp(text, "cpu") == 0) { return 0; }
    extras->device.type = FGQA_CUDA;
    if (text != NULL && strcmp(text, "cuda") == 0) { return 0; }
    if (text != NULL && strncmp(text, "cuda:", 5) == 0 && text[5] != '\0' && strlen(text + 5) <= 4
        && strspn(text + 5, "0123456789") == strlen(text + 5)) {
        int32_t index = 0;
        for (const char *digit = text + 5; *digit; digit++) { index = 10 * index + (*digit - '0'); }
        extras->device.index = index;
        return 0;
    }
    PyErr_Format(text ? PyExc_ValueError : PyExc_TypeError, "device is %R: it must be None, \"cpu\", \"cuda\" or \"cuda:<index>\"",
                 object);
    return -1;
}

static int read_optional_int(PyObject *object, const char *name, int64_t absent, int64_t *value)
{
    *value = absent;
    return object == Py_None ? 0 : fgqa_read_int(object, name, value);
}

static int read_optional_number(PyObject *object, const char *name, int32_t *given, double *value)
{
    *given = object != Py_None;
    return object == Py_None ? 0 : fgqa_read_number(object, name, value);
}

int fgqa_read_options(PyObject *const *options, fgqa_request *request, fgqa_extras *extras)
{
    static const char *const aligns[] = {"bottom-right", "top-left"};
    static const char *const layouts[] = {"bhsd", "bshd"};
    static const char *const precisions[] = {"bf16x3"};
    int choice = 0;
#define OPTION(name) options[FGQA_OPTION_##name], #name
    if (fgqa_read_bool(OPTION(causal), &request->causal) < 0) { return -1; }
    if (read_window(options[FGQA_OPTION_window], request) < 0) { return -1; }
    if (fgqa_read_choice(OPTION(align), aligns, 2, &choice) < 0) { return -1; }
    request->align = choice == 0 ? FGQA_ALIGN_BOTTOM_RIGHT : FGQA_ALIGN_TOP_LEFT;
    request->has_chunk = options[FGQA_OPTION_chunk] != Py_None;
    if (read_optional_int(OPTION(chunk), 0, &request->chunk) < 0) { return -1; }
    if (read_optional_number(OPTION(scale), &request->has_scale, &request->scale) < 0) { return -1; }
    if (read_optional_number(OPTION(softcap), &request->has_softcap, &request->softcap) < 0) { return -1; }
    if (read_optional_int(OPTION(max_q), -1, &request->max_q) < 0) { return -1; }
    if (read_optional_int(OPTION(max_kv), -1, &request->max_kv) < 0) { return -1; }
    if (fgqa_read_number(OPTION(dropout_p), &request->dropout_p) < 0) { return -1; }
    if (fgqa_is_integer(options[FGQA_OPTION_seed])) {
        request->has_seed = 1;
        if (fgqa_read_seed(options[FGQA_OPTION_seed], &request->seed) < 0) { return -1; }
    } else if (is_bool(options[FGQA_OPTION_seed]) || PyFloat_Check(options[FGQA_OPTION_seed])) {
        PyErr_Format(PyExc_TypeError, "seed is %R: it must be an integer or an int64 array [seed, offset]", options[FGQA_OPTION_seed]);
        return -1;
    }
    request->layout_given = options[FGQA_OPTION_layout] != Py_None;
    choice = 0;
    if (request->layout_given && fgqa_read_choice(OPTION(layout), layouts, 2, &choice) < 0) { return -1; }
    request->layout = choice == 0 ? FGQA_LAYOUT_BHSD : FGQA_LAYOUT_BSHD;
    if (fgqa_read_bool(OPTION(deterministic), &request->deterministic) < 0) { return -1; }
    if (fgqa_read_bool(OPTION(batch_invariant), &request->batch_invariant) < 0) { return -1; }
    if (fgqa_read_bool(OPTION(check), &request->check) < 0) { return -1; }
    if (options[FGQA_OPTION_precision] != Py_None) {
        if (fgqa_read_choice(OPTION(precision), precisions, 1, &choice) < 0) { return -1; }
        request->precision = FGQA_PRECISION_BF16X3;
    }
    if (read_device(options[FGQA_OPTION_device], extras) < 0) { return -1; }
    extras->stream = options[FGQA_OPTION_stream] == Py_None ? NULL : options[FGQA_OPTION_stream];
    if (options[FGQA_OPTION_kernel] != Py_None) {
        if (!PyUnicode_Check(options[FGQA_OPTION_kernel])) {
            PyErr_Format(PyExc_TypeError, "kernel is %R: it must be None or a kernel's name", options[FGQA_OPTION_kernel]);
            return -1;
        }
        extras->kernel = PyUnicode_AsUTF8AndSize(options[FGQA_OPTION_kernel], NULL);
        if (extras->kernel == NULL) { return -1; }
    }
#undef OPTION
    return 0;
}

/* ---- tensors ---- */

int fgqa_option_tensor(PyObject *const *options, fgqa_option option, fgqa_arg *arg, PyObject **object)
{
    switch (option) {
    case FGQA_OPTION_mask:          *arg = FGQA_ARG_mask; break;
    case FGQA_OPTION_bias:          *arg = FGQA_ARG_bias; break;
    case FGQA_OPTION_alibi_slopes:  *arg = FGQA_ARG_alibi_slopes; break;
    case FGQA_OPTION_sink:          *arg = FGQA_ARG_sink; break;
    case FGQA_OPTION_q_lens:        *arg = FGQA_ARG_q_lens; break;
    case FGQA_OPTION_kv_lens:       *arg = FGQA_ARG_kv_lens; break;
    case FGQA_OPTION_cu_seqlens_q:  *arg = FGQA_ARG_cu_seqlens_q; break;
    case FGQA_OPTION_cu_seqlens_kv: *arg = FGQA_ARG_cu_seqlens_kv; break;
    case FGQA_OPTION_seed:          *arg = FGQA_ARG_seed; break;
    default: return 0;
    }
    *object = options[option];
    return *object != Py_None && !(option == FGQA_OPTION_seed && fgqa_is_integer(*object));
}

fgqa_slot fgqa_arg_slot(fgqa_pass pass, fgqa_arg arg)
{
    static const char floats[] = "float16, bfloat16, float32 or float64";
    fgqa_slot slot = {fgqa_arg_name(arg), floats, "float32", 0};
    switch (arg) {
    case FGQA_ARG_q: case FGQA_ARG_k: case FGQA_ARG_v: case FGQA_ARG_dout:
        slot.flags = FGQA_IN_UNIT_LAST;
        break;
    case FGQA_ARG_out:
        slot.flags = pass == FGQA_PASS_FWD ? FGQA_IN_WRITTEN : FGQA_IN_UNIT_LAST;
        break;
    case FGQA_ARG_mask:
        slot.dtypes = "bool (an additive mask goes into bias=)";
        slot.example = "bool";
        break;
    case FGQA_ARG_alibi_slopes:
        slot.dtypes = "float32";
        break;
    case FGQA_ARG_lse: case FGQA_ARG_dlse:
        slot.dtypes = "float32 (float64 for float64 inputs)";
        break;
    case FGQA_ARG_q_lens: case FGQA_ARG_kv_lens: case FGQA_ARG_cu_seqlens_q: case FGQA_ARG_cu_seqlens_kv:
        slot.dtypes = slot.example = "int32";
        slot.flags = FGQA_IN_CONTIGUOUS;
        break;
    case FGQA_ARG_seed: case FGQA_ARG_rows:
        slot.dtypes = slot.example = "int64";
        slot.flags = FGQA_IN_CONTIGUOUS;
        break;
    default:
        break;
    }
    return slot;
}
