/* tensor_out.c - memory of results, and the objects that own it: a torch tensor made by torch, a CuPy array made by CuPy,
 * memory of a library with an exchange table, a NumPy array or a flashgqa.Tensor over memory of our own, the latter handed to
 * the from_dlpack of the caller's library.
 */
#include "tensor_out.h"

#include <string.h>

#include "../cpu/memory.h"

static const char block_name[] = "flashgqa.block";

/* Bytes of the elements of a result; its size has been checked by the problem. */
static size_t result_bytes(const fgqa_tensor *spec)
{
    size_t bytes = fgqa_dtype_bytes(spec->dtype);
    for (int32_t axis = 0; axis < spec->ndim; axis++) { bytes *= (size_t)spec->shape[axis]; }
    return bytes;
}

static void set_error(void *context, const char *kind, const char *message)
{
    (void)context;
    PyErr_Format(strcmp(kind, "MemoryError") == 0 ? PyExc_MemoryError : PyExc_RuntimeError, "allocating a result failed: %s: %s",
                 kind, message);
}

static int allocate_foreign(const DLPackExchangeAPI *api, const fgqa_tensor *spec, fgqa_result *result)
{
    const DLDevice device = {spec->device.type == FGQA_CPU ? kDLCPU : kDLCUDA, spec->device.index};
    DLTensor prototype = {NULL, device, spec->ndim, fgqa_dtype_to_dlpack(spec->dtype), result->tensor.shape,
                          result->tensor.stride, 0};
    if (api->managed_tensor_allocator(&prototype, &result->managed, NULL, set_error) != 0) {
        result->managed = NULL;
        if (!PyErr_Occurred()) { PyErr_SetString(PyExc_RuntimeError, "allocating a result failed"); }
        return -1;
    }
    const DLTensor *dl = &result->managed->dl_tensor;
    result->tensor.data = (void *)((uintptr_t)dl->data + (uintptr_t)dl->byte_offset);
    for (int32_t axis = 0; axis < spec->ndim && dl->strides != NULL; axis++) { result->tensor.stride[axis] = dl->strides[axis]; }
    return 0;
}

static PyObject *tuple_of(const int64_t *values, int32_t n)
{
    PyObject *tuple = PyTuple_New(n);
    for (int32_t at = 0; at < n && tuple != NULL; at++) {
        PyObject *value = PyLong_FromLongLong(values[at]);
        if (value == NULL) { Py_CLEAR(tuple); } else { PyTuple_SetItem(tuple, at, value); }
    }
    return tuple;
}

/* Borrowed; NULL with an exception. */
static PyObject *torch_dtype(fgqa_state *state, fgqa_dtype dtype)
{
    if (state->torch_dtype[dtype] == NULL) {
        PyObject *torch = PyImport_GetModule(state->str_torch);
        state->torch_dtype[dtype] = torch ? PyObject_GetAttrString(torch, fgqa_dtype_name(dtype)) : NULL;
        Py_XDECREF(torch);
    }
    return state->torch_dtype[dtype];
}

/* ((extents), (strides), dtype) of a tensor: a new reference, to the same tuple when the same form is asked for again. */
static PyObject *torch_args(fgqa_state *state, const fgqa_tensor *spec)
{
    for (int n = 0; n < FGQA_FORMS; n++) {
        PyObject *known = state->torch_args[n];
        if (known != NULL && fgqa_same_form(&state->torch_form[n], spec)) {
            Py_INCREF(known);
            return known;
        }
    }
    PyObject *dtype = torch_dtype(state, spec->dtype), *shape = dtype ? tuple_of(spec->shape, spec->ndim) : NULL;
    PyObject *stride = shape ? tuple_of(spec->stride, spec->ndim) : NULL, *args = stride ? PyTuple_Pack(3, shape, stride, dtype) : NULL;
    Py_XDECREF(stride);
    Py_XDECREF(shape);
    if (args != NULL) {
        const uint64_t n = state->n_forms++ % FGQA_FORMS;
        PyObject *old = state->torch_args[n];
        Py_INCREF(args);
        state->torch_form[n] = *spec;
        state->torch_args[n] = args;
        Py_XDECREF(old);
    }
    return args;
}

/* Whether q's object has the dtype, shape and strides of a result. */
static int is_like(const fgqa_import *in, const fgqa_tensor *spec)
{
    const fgqa_tensor *q = &in->tensor;
    int same = !in->copied && q->dtype == spec->dtype && q->ndim == spec->ndim;
    for (int32_t axis = 0; axis < spec->ndim && same; axis++) {
        same = q->shape[axis] == spec->shape[axis] && q->shape[axis] > 0 && (q->shape[axis] == 1 || q->stride[axis] == spec->stride[axis]);
    }
    return same;
}

/* torch.empty_like(q) where that is it, else q.new_empty(*shape, dtype=...): unlike memory that comes back through DLPack, its
 * storage is torch's own (it can be resized and recorded on streams), and no default device applies. Extents one by one: given a
 * tuple, torch first raises and drops an exception because it is no integer, which takes as long as the allocation. */
static PyObject *torch_empty(fgqa_state *state, const fgqa_import *q, const fgqa_tensor *spec)
{
    if (is_like(q, spec)) { return PyObject_CallFunctionObjArgs(state->torch.empty_like, q->object, NULL); }
    PyObject *dtype = torch_dtype(state, spec->dtype), *kwargs = dtype ? Py_BuildValue("{s:O}", "dtype", dtype) : NULL, *result = NULL;
    if (kwargs == NULL) { return NULL; }
    PyObject *args = tuple_of(spec->shape, spec->ndim);
    PyObject *method = PyObject_GetAttr(q->object, state->str_new_empty);
    if (args != NULL && method != NULL) { result = PyObject_Call(method, args, kwargs); }
    Py_XDECREF(method);
    Py_XDECREF(args);
    Py_DECREF(kwargs);
    return result;
}

/* 0, or 1 if something may come of a new tensor that its memory does not say: a dispatch mode, a transform of torch.func. */
static int is_watched(const fgqa_torch *torch)
{
    PyObject *modes = PyObject_CallNoArgs(torch->count_modes), *transform = modes ? PyObject_CallNoArgs(torch->any_transform) : NULL;
    const int plain = transform == Py_False && PyLong_AsLong(modes) == 0;
    Py_XDECREF(transform);
    Py_XDECREF(modes);
    PyErr_Clear();
    return !plain;
}

/* The function that torch.compile's own code allocates by, in half the time: it skips what torch asks of every call, so it is
 * asked here, and allocates on the current device, so the result is looked at. 0 if it serves not: *result is as it was. */
static int allocate_torch_shortly(fgqa_state *state, fgqa_import *q, const fgqa_tensor *spec, fgqa_result *result)
{
    const fgqa_torch *torch = &state->torch;
    DLTensor dl;
    if (torch->empty[spec->device.type] == NULL || q->type.exchange == NULL || q->type.exchange->dltensor_from_py_object_no_sync == NULL) {
        return 0;
    }
    if (q->results == FGQA_RESULTS_UNKNOWN) { q->results = is_watched(torch) ? FGQA_RESULTS_WATCHED : FGQA_RESULTS_PLAIN; }
    if (q->results == FGQA_RESULTS_WATCHED) { return 0; }
    PyObject *args = torch_args(state, spec), *object = args ? PyObject_Call(torch->empty[spec->device.type], args, NULL) : NULL;
    Py_XDECREF(args);
    if (object == NULL) { return -1; }
    if (q->type.exchange->dltensor_from_py_object_no_sync(object, &dl) != 0 || (dl.data == NULL && result_bytes(spec) > 0)
        || (spec->device.type == FGQA_CUDA && dl.device.device_id != spec->device.index)) {
        PyErr_Clear();
        Py_DECREF(object);
        return 0;
    }
    result->object = object;
    result->tensor.data = (void *)((uintptr_t)dl.data + (uintptr_t)dl.byte_offset);
    return 1;
}

static int allocate_torch(fgqa_state *state, fgqa_import *q, const fgqa_tensor *spec, fgqa_result *result)
{
    fgqa_type type;
    const int done = allocate_torch_shortly(state, q, spec, result);
    if (done != 0) { return done < 0 ? -1 : 0; }
    result->object = torch_empty(state, q, spec);
    if (result->object == NULL) { return -1; }
    fgqa_find_type(state, Py_TYPE(result->object), &type);
    PyObject *address = type.kind == FGQA_KIND_TORCH ? PyObject_CallFunctionObjArgs(state->torch.data_ptr, result->object, NULL) : NULL;
    result->tensor.data = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    if (PyErr_Occurred() || (result->tensor.data == NULL && result_bytes(spec) > 0)) {
        /* A mode of torch.compile or torch.func made something else than a tensor with memory. */
        if (!PyErr_Occurred()) {
            PyErr_SetString(PyExc_BufferError, "torch gave no memory for a result (under FakeTensorMode or functionalization?): call "
                            "this function outside of the transformation");
        }
        Py_CLEAR(result->object);
        return -1;
    }
    return 0;
}

/* cupy.empty(shape, dtype), from CuPy's pool of its current device and stream. */
static int allocate_cupy(fgqa_state *state, const fgqa_tensor *spec, fgqa_result *result)
{
    PyObject *library = PyImport_ImportModule("cupy"), *shape = tuple_of(spec->shape, spec->ndim), *number = NULL;
    PyArray_Descr *dtype = fgqa_numpy_descr(state, spec->dtype);
    if (library != NULL && shape != NULL && dtype != NULL) {
        result->object = PyObject_CallMethod(library, "empty", "OO", shape, (PyObject *)dtype);
    }
    PyObject *data = result->object ? PyObject_GetAttrString(result->object, "data") : NULL;
    if (data != NULL) { number = PyObject_GetAttrString(data, "ptr"); }
    if (number != NULL) { result->tensor.data = PyLong_AsVoidPtr(number); }
    Py_XDECREF(number);
    Py_XDECREF(data);
    Py_XDECREF(dtype);
    Py_XDECREF(shape);
    Py_XDECREF(library);
    if (!PyErr_Occurred()) { return 0; }
    Py_CLEAR(result->object);
    return -1;
}

int fgqa_scratch_new(fgqa_state *state, fgqa_import *like, size_t bytes, fgqa_result *result)
{
    const fgqa_tensor spec = {.dtype = FGQA_BOOL, .device = like->tensor.device, .ndim = 1, .shape = {(int64_t)bytes}, .stride = {1}};
    if (like->type.exchange == NULL) { return fgqa_result_new(state, like, &spec, result); }
    memset(result, 0, sizeof *result);
    result->tensor = spec;
    return allocate_foreign(like->type.exchange, &spec, result);
}

int fgqa_result_new(fgqa_state *state, fgqa_import *like, const fgqa_tensor *spec, fgqa_result *result)
{
    memset(result, 0, sizeof *result);
    result->tensor = *spec;
    if (like->type.kind == FGQA_KIND_TORCH) { return allocate_torch(state, like, spec, result); }
    if (like->type.exchange != NULL) { return allocate_foreign(like->type.exchange, spec, result); }
    if (like->type.kind == FGQA_KIND_CUPY) { return allocate_cupy(state, spec, result); }
    if (spec->device.type == FGQA_CUDA) {
        return fgqa_raise(fgqa_cuda_memory_new(result_bytes(spec), spec->device.index, like->stream, &result->gpu, &result->tensor.data));
    }
    result->block = fgqa_block_new(result_bytes(spec));
    if (result->block == NULL) {
        PyErr_Format(PyExc_MemoryError, "a result of %zu bytes does not fit into memory", result_bytes(spec));
        return -1;
    }
    result->tensor.data = result->block;
    return 0;
}

void fgqa_result_drop(fgqa_result *result)
{
    if (result->managed != NULL && result->managed->deleter != NULL) {
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        result->managed->deleter(result->managed);
        PyErr_Restore(type, value, traceback);
    }
    Py_XDECREF(result->object);
    fgqa_block_drop(result->block);
    fgqa_cuda_memory_drop(result->gpu);
    memset(result, 0, sizeof *result);
}

PyArray_Descr *fgqa_numpy_descr(fgqa_state *state, fgqa_dtype dtype)
{
    static const int numbers[] = {[FGQA_F64] = NPY_FLOAT64, [FGQA_F32] = NPY_FLOAT32, [FGQA_F16] = NPY_FLOAT16,
                                  [FGQA_BOOL] = NPY_BOOL, [FGQA_I32] = NPY_INT32, [FGQA_I64] = NPY_INT64};
    if (dtype != FGQA_BF16 && dtype != FGQA_F8E4M3) { return PyArray_DescrFromType(numbers[dtype]); }
    PyArray_Descr *descr = fgqa_ml_dtype(state, dtype);
    if (descr == NULL) {
        PyErr_Format(PyExc_TypeError, "NumPy has no dtype %s before ml_dtypes is imported", fgqa_dtype_name(dtype));
    }
    Py_XINCREF(descr);
    return descr;
}

static void drop_capsule(PyObject *capsule) { fgqa_block_drop(PyCapsule_GetPointer(capsule, block_name)); }

PyObject *fgqa_numpy_over_block(fgqa_state *state, const fgqa_tensor *tensor, void *block)
{
    npy_intp shape[FGQA_MAX_DIMS] = {0}, stride[FGQA_MAX_DIMS] = {0};
    for (int32_t axis = 0; axis < tensor->ndim; axis++) {
        shape[axis] = (npy_intp)tensor->shape[axis];
        stride[axis] = (npy_intp)tensor->stride[axis] * (npy_intp)fgqa_dtype_bytes(tensor->dtype);
    }
    PyObject *capsule = PyCapsule_New(block, block_name, drop_capsule);
    if (capsule == NULL) {
        fgqa_block_drop(block);
        return NULL;
    }
    PyArray_Descr *descr = fgqa_numpy_descr(state, tensor->dtype);
    PyObject *array = descr ? PyArray_NewFromDescr(&PyArray_Type, descr, tensor->ndim, shape, stride, tensor->data,
                                                   NPY_ARRAY_WRITEABLE, NULL) : NULL;
    if (array == NULL) {
        Py_DECREF(capsule);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, capsule) < 0) {   /* steals the capsule in any case */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *foreign_object(const DLPackExchangeAPI *api, fgqa_result *result)
{
    void *object = NULL;
    if (api->managed_tensor_to_py_object_no_sync(result->managed, &object) != 0) {
        fgqa_result_drop(result);
        return NULL;
    }
    result->managed = NULL;
    return object;
}

PyObject *fgqa_result_object(fgqa_state *state, const fgqa_import *like, fgqa_result *result)
{
    void *block = result->block;
    fgqa_cuda_memory *gpu = result->gpu;
    PyObject *own = result->object;
    result->block = NULL;
    result->gpu = NULL;
    result->object = NULL;
    if (own != NULL) { return own; }
    if (result->managed != NULL) { return foreign_object(like->type.exchange, result); }
    if (like->type.kind == FGQA_KIND_NUMPY) { return fgqa_numpy_over_block(state, &result->tensor, block); }
    if (gpu != NULL && fgqa_raise(fgqa_cuda_memory_filled(gpu)) < 0) {
        fgqa_cuda_memory_drop(gpu);
        return NULL;
    }
    PyObject *tensor = fgqa_tensor_over(state, &result->tensor, block, gpu);
    if (tensor == NULL || like->type.from_dlpack == NULL) { return tensor; }
    PyObject *object = PyObject_CallFunctionObjArgs(like->type.from_dlpack, tensor, NULL);
    Py_DECREF(tensor);
    return object;
}
