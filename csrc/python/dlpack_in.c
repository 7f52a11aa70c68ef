/* dlpack_in.c - foreign tensors by DLPack: the C exchange table of their type, else their __dlpack__ method. Nothing a
 * producer says is believed before it is checked.
 */
#include "tensor_in.h"

#include <string.h>

static int64_t element_bytes(DLDataType type) { return (type.bits + 7) / 8; }

int fgqa_dtype_from_dlpack(DLDataType type, fgqa_dtype *dtype)
{
    static const struct { uint8_t code, bits; fgqa_dtype dtype; } known[] = {
        {kDLFloat, 64, FGQA_F64}, {kDLFloat, 32, FGQA_F32}, {kDLFloat, 16, FGQA_F16}, {kDLBfloat, 16, FGQA_BF16},
        {kDLFloat8_e4m3fn, 8, FGQA_F8E4M3}, {kDLBool, 8, FGQA_BOOL}, {kDLInt, 32, FGQA_I32}, {kDLInt, 64, FGQA_I64},
    };
    for (size_t n = 0; n < sizeof known / sizeof known[0]; n++) {
        if (type.code == known[n].code && type.bits == known[n].bits && type.lanes == 1) {
            *dtype = known[n].dtype;
            return 0;
        }
    }
    return -1;
}

DLDataType fgqa_dtype_to_dlpack(fgqa_dtype dtype)
{
    const uint8_t bits = (uint8_t)(8 * fgqa_dtype_bytes(dtype));
    switch (dtype) {
    case FGQA_F64: case FGQA_F32: case FGQA_F16: return (DLDataType){kDLFloat, bits, 1};
    case FGQA_BF16:   return (DLDataType){kDLBfloat, bits, 1};
    case FGQA_F8E4M3: return (DLDataType){kDLFloat8_e4m3fn, bits, 1};
    case FGQA_BOOL:   return (DLDataType){kDLBool, bits, 1};
    case FGQA_I32: case FGQA_I64: case FGQA_DTYPE_COUNT: break;
    }
    return (DLDataType){kDLInt, bits, 1};
}

/* "uint8", "complex64", "float32x4" or "DLPack dtype (code, bits, lanes)". */
static PyObject *dtype_text(DLDataType type)
{
    static const char *const family[] = {"int", "uint", "float", NULL, "bfloat", "complex", "bool"};
    if (type.code < sizeof family / sizeof family[0] && family[type.code] != NULL) {
        return type.lanes == 1 ? PyUnicode_FromFormat("%s%d", family[type.code], type.bits)
                               : PyUnicode_FromFormat("%s%dx%d", family[type.code], type.bits, type.lanes);
    }
    return PyUnicode_FromFormat("DLPack dtype (code %d, bits %d, lanes %d)", type.code, type.bits, type.lanes);
}

static int refuse_dtype(const fgqa_slot *slot, DLDataType type)
{
    PyObject *text = dtype_text(type);
    if (text != NULL) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %U: it must be %s; convert it to %s", slot->name, text, slot->dtypes,
                     slot->example);
        Py_DECREF(text);
    }
    return -1;
}

static int on_cpu(int64_t device_type) { return device_type == kDLCPU || device_type == kDLCUDAHost; }

/* Takes note of where an argument is: on the CPU, or on a GPU that the call may run on. */
static int read_device(const fgqa_slot *slot, int64_t type, int64_t id, fgqa_place *place, fgqa_import *in)
{
    in->tensor.device = (fgqa_device){FGQA_CPU, 0};
    if (on_cpu(type)) { return 0; }
    if ((type == kDLCUDA || type == kDLCUDAManaged) && id >= 0 && id <= INT32_MAX) {
        if (fgqa_place_enter(place, slot->name, &in->type, (int32_t)id) < 0) { return -1; }
        in->tensor.device = (fgqa_device){FGQA_CUDA, (int32_t)id};
        in->stream = place->stream;
        return 0;
    }
    PyErr_Format(PyExc_NotImplementedError, "%s is on a device of DLPack type %lld: only the memory of CPUs and of NVIDIA GPUs is "
                 "supported; move it to the CPU", slot->name, (long long)type);
    return -1;
}

/* Strides into `stride`: those given, but contiguous ones where none are given or none matter (an axis of extent 1, an
 * empty tensor). -1 without an exception if any element's address would not exist. */
static int take_strides(const DLTensor *dl, int64_t stride[FGQA_MAX_DIMS])
{
    const int64_t bytes = element_bytes(dl->dtype);
    int64_t elements = 1, lowest = 0, highest = bytes;
    int empty = 0;
    for (int32_t axis = dl->ndim - 1; axis >= 0; axis--) {
        stride[axis] = elements;
        empty |= dl->shape[axis] == 0;
        if (dl->shape[axis] > 0 && __builtin_mul_overflow(elements, dl->shape[axis], &elements)) { return -1; }
    }
    if (empty) { return 0; }
    for (int32_t axis = 0; axis < dl->ndim; axis++) {
        int64_t reach;
        if (dl->strides != NULL && dl->shape[axis] > 1) { stride[axis] = dl->strides[axis]; }
        if (__builtin_mul_overflow(stride[axis], dl->shape[axis] - 1, &reach) || __builtin_mul_overflow(reach, bytes, &reach)
            || __builtin_add_overflow(reach < 0 ? lowest : highest, reach, reach < 0 ? &lowest : &highest)) {
            return -1;
        }
    }
    if (dl->byte_offset > UINTPTR_MAX - (uintptr_t)dl->data) { return -1; }
    const uintptr_t first = (uintptr_t)dl->data + (uintptr_t)dl->byte_offset;
    return first < 0 - (uintptr_t)lowest || first > UINTPTR_MAX - (uintptr_t)highest ? -1 : 0;
}

/* Checks the description and takes it over; `dl` may die after this. */
static int take_tensor(const DLTensor *dl, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    fgqa_tensor *t = &in->tensor;
    if (read_device(slot, dl->device.device_type, dl->device.device_id, place, in) < 0) { return -1; }
    if (dl->ndim < 0 || (dl->ndim > 0 && dl->shape == NULL)) {
        PyErr_Format(PyExc_BufferError, "%s: its DLPack tensor has ndim %d%s", slot->name, (int)dl->ndim,
                     dl->ndim > 0 ? " and no shape" : "");
        return -1;
    }
    if (dl->ndim > FGQA_MAX_DIMS) {
        PyErr_Format(PyExc_ValueError, "%s has %d dimensions: at most %d are allowed; reshape it", slot->name, (int)dl->ndim,
                     FGQA_MAX_DIMS);
        return -1;
    }
    if (fgqa_dtype_from_dlpack(dl->dtype, &t->dtype) < 0) { return refuse_dtype(slot, dl->dtype); }
    int empty = 0;
    for (int32_t axis = 0; axis < dl->ndim; axis++) {
        if (dl->shape[axis] < 0) {
            PyErr_Format(PyExc_BufferError, "%s: its DLPack tensor has extent %lld in axis %d", slot->name,
                         (long long)dl->shape[axis], (int)axis);
            return -1;
        }
        empty |= dl->shape[axis] == 0;
        t->shape[axis] = dl->shape[axis];
    }
    if (take_strides(dl, t->stride) < 0) {
        PyErr_Format(PyExc_BufferError, "%s: shape and strides of its DLPack tensor reach beyond the address space", slot->name);
        return -1;
    }
    t->data = (void *)((uintptr_t)dl->data + (uintptr_t)dl->byte_offset);
    if (!empty && (dl->data == NULL || (uintptr_t)t->data % (uintptr_t)element_bytes(dl->dtype) != 0)) {
        PyErr_Format(PyExc_BufferError, dl->data == NULL ? "%s: its DLPack tensor has no memory (data is NULL)"
                     : "%s: the memory of its DLPack tensor is not aligned to its elements; pass a copy", slot->name);
        return -1;
    }
    t->ndim = dl->ndim;
    return 0;
}

int fgqa_wrap_producer_error(const fgqa_slot *slot, const char *what)
{
    PyObject *type, *cause, *traceback, *error, *value;
    if (!PyErr_ExceptionMatches(PyExc_Exception) || PyErr_ExceptionMatches(PyExc_MemoryError)) { return -1; }
    PyErr_Fetch(&type, &cause, &traceback);
    PyErr_NormalizeException(&type, &cause, &traceback);
    if (traceback != NULL) { PyException_SetTraceback(cause, traceback); }
    /* The first line only: torch appends a C++ stack. */
    PyObject *text = PyObject_Str(cause);
    const char *line = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
    PyObject *first = line ? PyUnicode_DecodeUTF8(line, (Py_ssize_t)strcspn(line, "\n"), "replace") : NULL;
    if (first != NULL) { PyErr_Format(PyExc_BufferError, "%s: its %s failed: %U", slot->name, what, first); }
    Py_XDECREF(first);
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    PyErr_Fetch(&error, &value, &traceback);
    PyErr_NormalizeException(&error, &value, &traceback);
    PyException_SetCause(value, cause);   /* steals */
    PyErr_Restore(error, value, traceback);
    return -1;
}

/* ---- the C exchange table ---- */

static int import_exchange(PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    const DLPackExchangeAPI *api = in->type.exchange;
    if (api->dltensor_from_py_object_no_sync != NULL) {
        /* Borrowed: the caller's reference keeps memory, shape and strides alive until the call returns. */
        DLTensor dl;
        if (api->dltensor_from_py_object_no_sync(object, &dl) != 0) { return fgqa_wrap_producer_error(slot, "DLPack exchange"); }
        return take_tensor(&dl, slot, place, in);
    }
    if (api->managed_tensor_from_py_object_no_sync(object, &in->versioned) != 0) {
        in->versioned = NULL;
        return fgqa_wrap_producer_error(slot, "DLPack exchange");
    }
    in->tensor.readonly = (in->versioned->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
    return take_tensor(&in->versioned->dl_tensor, slot, place, in);
}

/* ---- the Python protocol ---- */

/* Asked first, so that nothing is exported from a device that is refused anyway, and the stream is known that the export is
 * for. */
static int ask_device(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    PyObject *pair = PyObject_CallMethodObjArgs(object, state->str___dlpack_device__, NULL);
    if (pair == NULL) { return fgqa_wrap_producer_error(slot, "__dlpack_device__"); }
    int result = -1;
    long type = -1, id = -1;
    if (PyTuple_Check(pair) && PyTuple_Size(pair) == 2) {
        PyObject *number = PyNumber_Index(PyTuple_GetItem(pair, 0));   /* an IntEnum in NumPy and torch */
        type = number ? PyLong_AsLong(number) : -1;
        Py_XDECREF(number);
        number = PyErr_Occurred() ? NULL : PyNumber_Index(PyTuple_GetItem(pair, 1));
        id = number ? PyLong_AsLong(number) : -1;
        Py_XDECREF(number);
        if (PyErr_Occurred()) { fgqa_wrap_producer_error(slot, "__dlpack_device__"); }
        else { result = read_device(slot, type, id, place, in); }
    } else {
        PyErr_Format(PyExc_BufferError, "%s: its __dlpack_device__ returned %R: it must be a pair (device type, id)", slot->name,
                     pair);
    }
    Py_DECREF(pair);
    return result;
}

/* The producer makes `place`'s stream wait for its own; on the CPU there is none to name. */
static PyObject *export_capsule(fgqa_state *state, PyObject *object, const fgqa_place *place)
{
    PyObject *method = PyObject_GetAttr(object, state->str___dlpack__), *kwargs = NULL, *capsule = NULL;
    if (method == NULL) { return NULL; }
    if (place != NULL) {
        const unsigned long long handle = (uintptr_t)place->stream;
        kwargs = Py_BuildValue("{s:K}", "stream", handle ? handle : 1);   /* 1: the legacy default stream, 0 is not allowed */
        if (kwargs == NULL || PyDict_Update(kwargs, state->dlpack_kwargs) < 0) { goto done; }
        capsule = PyObject_Call(method, state->empty_tuple, kwargs);
    } else {
        capsule = PyObject_Call(method, state->empty_tuple, state->dlpack_kwargs);
    }
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {   /* producers older than the array API of 2023 */
        PyErr_Clear();
        if (kwargs != NULL && PyDict_DelItemString(kwargs, "max_version") < 0) { goto done; }
        capsule = PyObject_Call(method, state->empty_tuple, kwargs);
    }
done:
    Py_XDECREF(kwargs);
    Py_DECREF(method);
    return capsule;
}

/* Takes the tensor out of the capsule: from here on its deleter is ours to call. */
static int consume_capsule(PyObject *capsule, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        DLManagedTensorVersioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") != 0) { return -1; }
        in->versioned = managed;
        if (managed->version.major != DLPACK_MAJOR_VERSION) {
            PyErr_Format(PyExc_BufferError, "%s: its DLPack tensor has version %u.%u: this build reads version %d; update "
                         "flashgqa or the producer", slot->name, (unsigned)managed->version.major,
                         (unsigned)managed->version.minor, DLPACK_MAJOR_VERSION);
            return -1;
        }
        in->tensor.readonly = (managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0;
        return take_tensor(&managed->dl_tensor, slot, place, in);
    }
    if (PyCapsule_IsValid(capsule, "dltensor")) {
        DLManagedTensor *managed = PyCapsule_GetPointer(capsule, "dltensor");
        if (PyCapsule_SetName(capsule, "used_dltensor") != 0) { return -1; }
        in->unversioned = managed;
        if (slot->flags & FGQA_IN_WRITTEN) {
            PyErr_Format(PyExc_ValueError, "%s is exported by an unversioned DLPack capsule, which cannot say that it may be written "
                         "(JAX arrays may not); pass a NumPy array or a torch tensor", slot->name);
            return -1;
        }
        return take_tensor(&managed->dl_tensor, slot, place, in);
    }
    if (!PyCapsule_CheckExact(capsule)) {
        PyErr_Format(PyExc_BufferError, "%s: its __dlpack__ returned %R instead of a capsule", slot->name, capsule);
        return -1;
    }
    const char *name = PyCapsule_GetName(capsule);
    PyErr_Clear();
    const int used = name && (strcmp(name, "used_dltensor") == 0 || strcmp(name, "used_dltensor_versioned") == 0);
    PyErr_Format(PyExc_BufferError, used ? "%s: its __dlpack__ returned a capsule named \"%s\": it has been consumed already"
                 : "%s: its __dlpack__ returned a capsule named \"%s\": it must be \"dltensor\" or \"dltensor_versioned\"",
                 slot->name, name ? name : "");
    return -1;
}

int fgqa_import_dlpack(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    const int torch = in->type.kind == FGQA_KIND_TORCH;
    const void *data = NULL;
    if (place != NULL && place->plain != NULL) { return take_tensor(place->plain, slot, place, in); }
    if (torch && fgqa_torch_check(state, object, slot, &data) < 0) { return -1; }
    if (in->type.exchange != NULL) {
        if (import_exchange(object, slot, place, in) < 0) { return -1; }
    } else {
        if (ask_device(state, object, slot, place, in) < 0) { return -1; }
        PyObject *capsule = export_capsule(state, object, in->tensor.device.type == FGQA_CUDA ? place : NULL);
        if (capsule == NULL) { return fgqa_wrap_producer_error(slot, "__dlpack__"); }
        const int failed = consume_capsule(capsule, slot, place, in);
        Py_DECREF(capsule);
        if (failed < 0) { return -1; }
    }
    return torch ? fgqa_torch_check_memory(slot, &in->tensor, data) : 0;
}
