/* place.c - device and stream of a call. */
#include "place.h"

#include "../cuda/device.h"
#include "call.h"

void fgqa_place_begin(fgqa_place *place, PyObject *given)
{
    *place = (fgqa_place){.given = given == Py_None ? NULL : given, .device = {FGQA_CPU, 0}};
}

void fgqa_place_end(fgqa_place *place)
{
    if (place->device.type == FGQA_CPU) { return; }
    if (place->context != NULL) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        PyObject *left = PyObject_CallMethod(place->context, "__exit__", "OOO", Py_None, Py_None, Py_None);
        if (left == NULL) { PyErr_WriteUnraisable(place->context); }
        Py_XDECREF(left);
        Py_CLEAR(place->context);
        PyErr_Restore(type, value, traceback);
    }
    fgqa_cuda_leave(place->device.index, place->before);
    place->device.type = FGQA_CPU;
}

/* ---- streams ---- */

static int refuse_stream(PyObject *object)
{
    PyErr_Format(PyExc_TypeError, "stream is %R: it must be None, a stream's address as an integer, or a stream object (of "
                 "__cuda_stream__, torch, CuPy)", object);
    return -1;
}

static int read_handle(PyObject *number, PyObject *object, void **stream)
{
    if (number == NULL || !PyLong_Check(number) || PyBool_Check(number)) {
        PyErr_Clear();
        return refuse_stream(object);
    }
    *stream = PyLong_AsVoidPtr(number);
    if (!PyErr_Occurred()) {
        if (*stream == (void *)1) { *stream = NULL; }      /* two names of the legacy default stream */
        return 0;
    }
    PyErr_Clear();
    PyErr_Format(PyExc_ValueError, "stream is %R: it must be the address of a CUDA stream", object);
    return -1;
}

/* An integer; an object with __cuda_stream__() -> (version, address); torch's cuda_stream; CuPy's ptr. */
static int read_stream(PyObject *object, void **stream)
{
    if (PyLong_Check(object)) { return read_handle(object, object, stream); }
    PyObject *number = NULL;
    if (PyObject_HasAttrString(object, "__cuda_stream__")) {
        PyObject *pair = PyObject_CallMethod(object, "__cuda_stream__", NULL);
        if (pair == NULL) { return -1; }
        number = PyTuple_Check(pair) && PyTuple_Size(pair) == 2 ? PyTuple_GetItem(pair, 1) : NULL;
        Py_XINCREF(number);
        Py_DECREF(pair);
    } else if (PyObject_HasAttrString(object, "cuda_stream")) {
        number = PyObject_GetAttrString(object, "cuda_stream");
    } else if (PyObject_HasAttrString(object, "ptr")) {
        number = PyObject_GetAttrString(object, "ptr");
    }
    const int failed = read_handle(number, object, stream);
    Py_XDECREF(number);
    return failed;
}

/* stream_address(stream): what stream= of a call may be -> int */
PyObject *fgqa_py_stream_address(PyObject *module, PyObject *object)
{
    void *stream;
    (void)module;
    return read_stream(object, &stream) < 0 ? NULL : PyLong_FromVoidPtr(stream);
}

/* attribute of module.function(argument), an integer */
static int ask_library(const char *module, const char *function, int32_t device, const char *attribute, void **stream)
{
    PyObject *library = PyImport_ImportModule(module);      /* loaded already: a tensor of it is here */
    PyObject *current = library ? PyObject_CallMethod(library, function, "i", (int)device) : NULL;
    PyObject *number = current ? PyObject_GetAttrString(current, attribute) : NULL;
    if (number != NULL) { *stream = PyLong_AsVoidPtr(number); }
    Py_XDECREF(number);
    Py_XDECREF(current);
    Py_XDECREF(library);
    return PyErr_Occurred() ? -1 : 0;
}

static int current_stream(const fgqa_type *type, int32_t device, void **stream)
{
    *stream = NULL;
    if (type->exchange != NULL) {
        if (type->exchange->current_work_stream(kDLCUDA, device, stream) == 0) { return 0; }
        if (!PyErr_Occurred()) { PyErr_SetString(PyExc_RuntimeError, "the library of the tensors could not name its current stream"); }
        return -1;
    }
    if (type->kind == FGQA_KIND_TORCH) { return ask_library("torch.cuda", "current_stream", device, "cuda_stream", stream); }
    if (type->kind == FGQA_KIND_CUPY) { return ask_library("cupy.cuda", "get_current_stream", device, "ptr", stream); }
    return 0;
}

/* Makes the given stream the library's current one while the call lasts: its allocator works in the order of that stream. */
static int enter_context(fgqa_place *place, const fgqa_type *type)
{
    const int torch = type->kind == FGQA_KIND_TORCH;
    if (!torch && type->kind != FGQA_KIND_CUPY) { return 0; }
    if (place->stream == (void *)2) {
        PyErr_SetString(PyExc_ValueError, "stream is 2, the per-thread default stream, for which torch and CuPy do not allocate; "
                        "pass a stream of their own");
        return -1;
    }
    PyObject *library = PyImport_ImportModule(torch ? "torch.cuda" : "cupy.cuda");
    PyObject *address = PyLong_FromVoidPtr(place->stream);
    PyObject *context = library && address ? PyObject_CallMethod(library, "ExternalStream", "O", address) : NULL;
    if (context != NULL && torch) {
        PyObject *stream = context;
        context = PyObject_CallMethod(library, "stream", "O", stream);
        Py_DECREF(stream);
    }
    PyObject *entered = context ? PyObject_CallMethod(context, "__enter__", NULL) : NULL;
    if (entered != NULL) { place->context = context; } else { Py_XDECREF(context); }
    const int failed = entered == NULL;
    Py_XDECREF(entered);
    Py_XDECREF(address);
    Py_XDECREF(library);
    return failed ? -1 : 0;
}

/* ---- devices ---- */

static int refuse_gpu(const fgqa_place *place, const char *name, int32_t device)
{
    const char *reason = fgqa_cuda_reason();
    if (!fgqa_cuda_built()) {
        PyErr_Format(PyExc_NotImplementedError, "%s is on CUDA device %d, and this build has no CUDA kernels (%s); move it to the CPU",
                     name, (int)device, reason);
    } else if (place == NULL) {
        PyErr_Format(PyExc_NotImplementedError, "%s is on CUDA device %d, and this function runs on the CPU only; move it to the CPU",
                     name, (int)device);
    } else {
        PyErr_Format(PyExc_NotImplementedError, "%s is on CUDA device %d, and CUDA cannot be used here (%s); move it to the CPU", name,
                     (int)device, reason);
    }
    return -1;
}

int fgqa_place_enter(fgqa_place *place, const char *name, const fgqa_type *type, int32_t device)
{
    if (place == NULL || fgqa_cuda_reason() != NULL) { return refuse_gpu(place, name, device); }
    if (place->device.type == FGQA_CUDA) {
        if (place->device.index == device) { return 0; }
        PyErr_Format(PyExc_ValueError, "%s is on cuda:%d but %s is on cuda:%d: all arrays of a call must be on one device; move %s to "
                     "cuda:%d", name, (int)device, place->first, (int)place->device.index, name, (int)place->device.index);
        return -1;
    }
    void *stream = NULL;
    if (place->given != NULL ? read_stream(place->given, &stream) < 0 : current_stream(type, device, &stream) < 0) { return -1; }
    if (fgqa_raise(fgqa_cuda_enter(device, &place->before)) < 0) { return -1; }
    place->device = (fgqa_device){FGQA_CUDA, device};
    place->first = name;
    place->stream = stream;
    return place->given != NULL ? enter_context(place, type) : 0;
}
