/* tensor_type.c - flashgqa.Tensor: results for callers whose library offers DLPack but no way to allocate. It has shape,
 * dtype and device, and hands its memory on by DLPack or as a NumPy array.
 */
#include "tensor_out.h"

#include <stdlib.h>
#include <string.h>

#include "../cpu/memory.h"

typedef struct {
    PyObject_HEAD
    fgqa_tensor tensor;      /* contiguous */
    void *block;             /* its memory, on the CPU */
    fgqa_cuda_memory *gpu;   /* or on a GPU */
} fgqa_tensor_object;

static void drop_memory(void *block, fgqa_cuda_memory *gpu)
{
    fgqa_block_drop(block);
    fgqa_cuda_memory_drop(gpu);
}

PyObject *fgqa_tensor_over(fgqa_state *state, const fgqa_tensor *tensor, void *block, fgqa_cuda_memory *gpu)
{
    fgqa_tensor_object *self = PyObject_New(fgqa_tensor_object, state->tensor_type);
    if (self == NULL) {
        drop_memory(block, gpu);
        return NULL;
    }
    self->tensor = *tensor;
    self->block = block;
    self->gpu = gpu;
    return (PyObject *)self;
}

static void tensor_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    drop_memory(((fgqa_tensor_object *)object)->block, ((fgqa_tensor_object *)object)->gpu);
    PyObject_Free(object);
    Py_DECREF(type);
}

/* ---- DLPack ---- */

/* One export; shape and strides of the DLTensor point into it, manager_ctx to its start. */
typedef struct {
    union { DLManagedTensorVersioned versioned; DLManagedTensor unversioned; } managed;
    int64_t shape[FGQA_MAX_DIMS], stride[FGQA_MAX_DIMS];
    void *block;
    fgqa_cuda_memory *gpu;
} fgqa_export;

static void delete_export(fgqa_export *out)
{
    drop_memory(out->block, out->gpu);
    free(out);
}

static void delete_versioned(DLManagedTensorVersioned *managed) { delete_export(managed->manager_ctx); }
static void delete_unversioned(DLManagedTensor *managed) { delete_export(managed->manager_ctx); }

/* A capsule that was never consumed still owns its tensor. */
static void drop_export(PyObject *capsule)
{
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        delete_versioned(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    } else if (PyCapsule_IsValid(capsule, "dltensor")) {
        delete_unversioned(PyCapsule_GetPointer(capsule, "dltensor"));
    }
}

static size_t tensor_bytes(const fgqa_tensor *tensor)
{
    size_t bytes = fgqa_dtype_bytes(tensor->dtype);
    for (int32_t axis = 0; axis < tensor->ndim; axis++) { bytes *= (size_t)tensor->shape[axis]; }
    return bytes;
}

/* The memory with a new reference, or a copy of it. -1 with an exception. */
static int share_memory(const fgqa_tensor_object *self, int copy, fgqa_export *out, void **data)
{
    *data = self->tensor.data;
    if (!copy) {
        if (self->gpu != NULL) { fgqa_cuda_memory_share(self->gpu); } else { fgqa_block_share(self->block); }
        out->block = self->block;
        out->gpu = self->gpu;
        return 0;
    }
    *data = out->block = fgqa_block_new(tensor_bytes(&self->tensor));
    if (out->block == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(out->block, self->tensor.data, tensor_bytes(&self->tensor));
    return 0;
}

static DLDevice device_of(const fgqa_tensor *tensor)
{
    return (DLDevice){tensor->device.type == FGQA_CUDA ? kDLCUDA : kDLCPU, tensor->device.index};
}

static PyObject *export_tensor(const fgqa_tensor_object *self, int versioned, int copy)
{
    const fgqa_tensor *t = &self->tensor;
    fgqa_export *out = calloc(1, sizeof *out);
    void *data;
    if (out == NULL) { return PyErr_NoMemory(); }
    if (share_memory(self, copy, out, &data) < 0) {
        free(out);
        return NULL;
    }
    memcpy(out->shape, t->shape, sizeof out->shape);
    memcpy(out->stride, t->stride, sizeof out->stride);
    const DLTensor dl = {data, device_of(t), t->ndim, fgqa_dtype_to_dlpack(t->dtype), out->shape, out->stride, 0};
    if (versioned) {
        out->managed.versioned = (DLManagedTensorVersioned){{DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION}, out, delete_versioned,
                                                            copy ? DLPACK_FLAG_BITMASK_IS_COPIED : 0, dl};
    } else {
        out->managed.unversioned = (DLManagedTensor){dl, out, delete_unversioned};
    }
    PyObject *capsule = PyCapsule_New(out, versioned ? "dltensor_versioned" : "dltensor", drop_export);
    if (capsule == NULL) { delete_export(out); }
    return capsule;
}

/* stream: None is the legacy default stream, -1 asks for no order, as the array API has it. */
static int await_memory(const fgqa_tensor_object *self, PyObject *stream)
{
    void *waiting = NULL;
    int32_t before;
    if (stream != Py_None) {
        if (!PyLong_Check(stream)) {
            PyErr_Format(PyExc_TypeError, "stream is %R: it must be None or the address of a CUDA stream", stream);
            return -1;
        }
        const long long number = PyLong_AsLongLong(stream);
        if (number == -1 && !PyErr_Occurred()) { return 0; }
        if (PyErr_Occurred()) { PyErr_Clear(); }
        waiting = number == 1 ? NULL : PyLong_AsVoidPtr(stream);
        if (PyErr_Occurred()) { return -1; }
    }
    if (fgqa_raise(fgqa_cuda_enter(self->tensor.device.index, &before)) < 0) { return -1; }
    const fgqa_status status = fgqa_cuda_memory_wait(self->gpu, waiting);
    fgqa_cuda_leave(self->tensor.device.index, before);
    return fgqa_raise(status);
}

static int await_cpu(PyObject *stream)
{
    long number = -1;
    if (stream == Py_None || (PyLong_Check(stream) && (number = PyLong_AsLong(stream)) == -1 && !PyErr_Occurred())) { return 0; }
    PyErr_Format(PyExc_BufferError, "stream is %R: a tensor on the CPU has none; leave it out", stream);
    return -1;
}

static PyObject *tensor_dlpack(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"stream", "max_version", "dl_device", "copy", NULL};
    const fgqa_tensor_object *self = (fgqa_tensor_object *)object;
    const DLDevice device = device_of(&self->tensor);
    PyObject *stream = Py_None, *max_version = Py_None, *dl_device = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|$OOOO:__dlpack__", names, &stream, &max_version, &dl_device, &copy)) {
        return NULL;
    }
    long major = 0, minor = 0, type = device.device_type, id = device.device_id;
    if (max_version != Py_None && !(PyTuple_Check(max_version) && PyArg_ParseTuple(max_version, "ll", &major, &minor))) {
        PyErr_Format(PyExc_TypeError, "max_version is %R: it must be None or a pair (major, minor)", max_version);
        return NULL;
    }
    if (dl_device != Py_None && !(PyTuple_Check(dl_device) && PyArg_ParseTuple(dl_device, "ll", &type, &id))) {
        PyErr_Format(PyExc_TypeError, "dl_device is %R: it must be None or a pair (type, id)", dl_device);
        return NULL;
    }
    if (type != (long)device.device_type || id != device.device_id) {
        PyErr_Format(PyExc_BufferError, "dl_device is (%ld, %ld): this tensor is exported where it is, (%d, %d), only", type, id,
                     (int)device.device_type, (int)device.device_id);
        return NULL;
    }
    int32_t copies = 0;
    if (copy != Py_None && (copies = PyObject_IsTrue(copy)) < 0) { return NULL; }
    if (copies && self->gpu != NULL) {
        PyErr_SetString(PyExc_BufferError, "copy is True: a tensor on a GPU is exported without a copy only; copy it with the library "
                        "that reads it");
        return NULL;
    }
    if ((self->gpu != NULL ? await_memory(self, stream) : await_cpu(stream)) < 0) { return NULL; }
    return export_tensor(self, major >= DLPACK_MAJOR_VERSION, copies);
}

static PyObject *tensor_dlpack_device(PyObject *self, PyObject *unused)
{
    const DLDevice device = device_of(&((fgqa_tensor_object *)self)->tensor);
    (void)unused;
    return Py_BuildValue("(ii)", (int)device.device_type, (int)device.device_id);
}

/* ---- as NumPy and as text ---- */

static PyObject *as_numpy(PyObject *object)
{
    fgqa_tensor_object *self = (fgqa_tensor_object *)object;
    PyObject *module = PyType_GetModule(Py_TYPE(object));
    if (module == NULL) { return NULL; }
    if (self->gpu != NULL) {
        PyErr_Format(PyExc_TypeError, "this tensor is on cuda:%d, where NumPy cannot read it: pass it to the from_dlpack of a library "
                     "that can", (int)self->tensor.device.index);
        return NULL;
    }
    fgqa_block_share(self->block);
    return fgqa_numpy_over_block(fgqa_module_state(module), &self->tensor, self->block);
}

/* __array__(dtype=None, copy=None) as NumPy 2 calls it. */
static PyObject *tensor_array(PyObject *object, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"dtype", "copy", NULL};
    PyObject *dtype = Py_None, *copy = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O$O:__array__", names, &dtype, &copy)) { return NULL; }
    PyArray_Descr *descr = NULL;
    if (dtype != Py_None && PyArray_DescrConverter(dtype, &descr) != NPY_SUCCEED) { return NULL; }
    PyObject *array = as_numpy(object);
    if (array == NULL) {
        Py_XDECREF(descr);
        return NULL;
    }
    if (descr == NULL) {
        descr = PyArray_DESCR((PyArrayObject *)array);
        Py_INCREF(descr);
    }
    const int casts = !PyArray_EquivTypes(descr, PyArray_DESCR((PyArrayObject *)array));
    if (casts && copy == Py_False) {
        PyErr_Format(PyExc_ValueError, "copy is False, but dtype %S needs a copy", (PyObject *)descr);
        Py_DECREF(descr);
        Py_DECREF(array);
        return NULL;
    }
    PyObject *result = PyArray_FromArray((PyArrayObject *)array, descr,   /* steals descr */
                                         NPY_ARRAY_FORCECAST | (copy == Py_True ? NPY_ARRAY_ENSURECOPY : 0));
    Py_DECREF(array);
    return result;
}

static PyObject *tensor_shape(PyObject *object, void *closure)
{
    const fgqa_tensor *t = &((fgqa_tensor_object *)object)->tensor;
    (void)closure;
    PyObject *shape = PyTuple_New(t->ndim);
    for (int32_t axis = 0; axis < t->ndim && shape != NULL; axis++) {
        PyObject *extent = PyLong_FromLongLong(t->shape[axis]);
        if (extent == NULL) { Py_CLEAR(shape); } else { PyTuple_SetItem(shape, axis, extent); }
    }
    return shape;
}

static PyObject *tensor_ndim(PyObject *object, void *closure)
{
    (void)closure;
    return PyLong_FromLong(((fgqa_tensor_object *)object)->tensor.ndim);
}

static PyObject *tensor_dtype(PyObject *object, void *closure)
{
    (void)closure;
    return PyUnicode_FromString(fgqa_dtype_name(((fgqa_tensor_object *)object)->tensor.dtype));
}

static PyObject *tensor_device(PyObject *object, void *closure)
{
    const fgqa_device *device = &((fgqa_tensor_object *)object)->tensor.device;
    (void)closure;
    return device->type == FGQA_CUDA ? PyUnicode_FromFormat("cuda:%d", (int)device->index) : PyUnicode_FromString("cpu");
}

static PyObject *tensor_repr(PyObject *object)
{
    PyObject *shape = tensor_shape(object, NULL);
    PyObject *device = shape ? tensor_device(object, NULL) : NULL;
    PyObject *text = device ? PyUnicode_FromFormat("flashgqa.Tensor(shape=%R, dtype=%s, device=%U)", shape,
                                                   fgqa_dtype_name(((fgqa_tensor_object *)object)->tensor.dtype), device) : NULL;
    Py_XDECREF(device);
    Py_XDECREF(shape);
    return text;
}

/* ---- the type ---- */

static PyMethodDef tensor_methods[] = {
    {"__dlpack__", (PyCFunction)(void (*)(void))tensor_dlpack, METH_VARARGS | METH_KEYWORDS,
     "__dlpack__(*, stream=None, max_version=None, dl_device=None, copy=None)\n--\n\nA DLPack capsule of this tensor."},
    {"__dlpack_device__", tensor_dlpack_device, METH_NOARGS, "__dlpack_device__()\n--\n\n(1, 0): the CPU; (2, n): CUDA device n."},
    {"__array__", (PyCFunction)(void (*)(void))tensor_array, METH_VARARGS | METH_KEYWORDS,
     "__array__(dtype=None, *, copy=None)\n--\n\nThis tensor as a NumPy array over the same memory."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef tensor_getset[] = {
    {"shape", tensor_shape, NULL, "Extents of the axes.", NULL},
    {"ndim", tensor_ndim, NULL, "Number of axes.", NULL},
    {"dtype", tensor_dtype, NULL, "Name of the element type.", NULL},
    {"device", tensor_device, NULL, "Name of the device.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

PyTypeObject *fgqa_tensor_type_new(PyObject *module)
{
    static PyType_Slot slots[] = {
        {Py_tp_dealloc, tensor_dealloc},
        {Py_tp_repr, tensor_repr},
        {Py_tp_methods, tensor_methods},
        {Py_tp_getset, tensor_getset},
        {Py_tp_doc, "A result whose memory is shared by DLPack; numpy.asarray() and any from_dlpack() read it without a copy."},
        {0, NULL},
    };
    static PyType_Spec spec = {"flashgqa.Tensor", sizeof(fgqa_tensor_object), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    return (PyTypeObject *)PyType_FromModuleAndSpec(module, &spec, NULL);
}
