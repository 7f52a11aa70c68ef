/* tensor_in.c - which kind of object an argument is; NumPy arrays; copies where a kernel could not read in place. */
#include "tensor_in.h"

#include <string.h>

#include "../cpu/memory.h"

/* ---- dtypes ---- */

PyArray_Descr *fgqa_ml_dtype(fgqa_state *state, fgqa_dtype dtype)
{
    PyArray_Descr **cached = dtype == FGQA_BF16 ? &state->bfloat16 : &state->float8;
    if (*cached != NULL) { return *cached; }
    /* Only looked up, never imported: without the module no array can have its dtype. */
    PyObject *name = PyUnicode_FromString("ml_dtypes");
    PyObject *module = name ? PyImport_GetModule(name) : NULL;
    PyObject *scalar = module ? PyObject_GetAttrString(module, dtype == FGQA_BF16 ? "bfloat16" : "float8_e4m3fn") : NULL;
    PyArray_Descr *descr = NULL;
    if (scalar != NULL && PyArray_DescrConverter(scalar, &descr) == NPY_SUCCEED) { *cached = descr; }
    Py_XDECREF(scalar);
    Py_XDECREF(module);
    Py_XDECREF(name);
    PyErr_Clear();
    return *cached;
}

static int dtype_from_numpy(fgqa_state *state, PyArrayObject *array, fgqa_dtype *dtype)
{
    const int number = PyArray_TYPE(array);
    switch (number) {
    case NPY_FLOAT64: *dtype = FGQA_F64; return 0;
    case NPY_FLOAT32: *dtype = FGQA_F32; return 0;
    case NPY_FLOAT16: *dtype = FGQA_F16; return 0;
    case NPY_BOOL:    *dtype = FGQA_BOOL; return 0;
    default: break;
    }
    if (PyTypeNum_ISSIGNED(number)) {   /* int and long, or long and long long, are two numbers of one size */
        if (PyArray_ITEMSIZE(array) == 4) { *dtype = FGQA_I32; return 0; }
        if (PyArray_ITEMSIZE(array) == 8) { *dtype = FGQA_I64; return 0; }
    }
    if (PyTypeNum_ISUSERDEF(number)) {
        static const fgqa_dtype known[] = {FGQA_BF16, FGQA_F8E4M3};
        for (int n = 0; n < 2; n++) {
            PyArray_Descr *descr = fgqa_ml_dtype(state, known[n]);
            if (descr != NULL && descr->type_num == number) { *dtype = known[n]; return 0; }
        }
    }
    return -1;
}

/* ---- types ---- */

static PyObject *loaded_module(const char *name)
{
    PyObject *text = PyUnicode_FromString(name);
    PyObject *module = text ? PyImport_GetModule(text) : NULL;
    Py_XDECREF(text);
    return module;
}

/* module.name if the module is loaded and has it, else NULL without an exception. */
static PyObject *loaded_attribute(const char *module_name, const char *name)
{
    PyObject *module = loaded_module(module_name);
    PyObject *value = module ? PyObject_GetAttrString(module, name) : NULL;
    Py_XDECREF(module);
    if (value == NULL) { PyErr_Clear(); }
    return value;
}

/* The exchange table of a type that declares one itself. An inherited one says nothing of what the subclass means by
 * its memory, except for torch's Parameter. */
static const DLPackExchangeAPI *exchange_of(PyTypeObject *type, int may_inherit)
{
    static const char attribute[] = "__dlpack_c_exchange_api__";
    const DLPackExchangeAPI *api = NULL;
    PyObject *own = PyObject_GetAttrString((PyObject *)type, "__dict__");
    const int declares = own != NULL && PyMapping_HasKeyString(own, attribute);
    PyObject *capsule = declares || may_inherit ? PyObject_GetAttrString((PyObject *)type, attribute) : NULL;
    if (capsule != NULL && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        const DLPackExchangeAPIHeader *header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        while (header != NULL && header->version.major > DLPACK_MAJOR_VERSION) { header = header->prev_api; }
        if (header != NULL && header->version.major == DLPACK_MAJOR_VERSION) { api = (const DLPackExchangeAPI *)header; }
    }
    Py_XDECREF(capsule);
    Py_XDECREF(own);
    PyErr_Clear();
    return api;
}

/* The from_dlpack of the library that defines `type`: its top package, JAX's being named otherwise than its array type's. */
static PyObject *importer_of(PyTypeObject *type)
{
    PyObject *importer = NULL;
    PyObject *module = PyObject_GetAttrString((PyObject *)type, "__module__");
    const char *path = module && PyUnicode_Check(module) ? PyUnicode_AsUTF8AndSize(module, NULL) : NULL;
    char package[64];
    if (path != NULL && strcspn(path, ".") < sizeof package) {
        memcpy(package, path, strcspn(path, "."));
        package[strcspn(path, ".")] = '\0';
        importer = strcmp(package, "jaxlib") == 0 || strcmp(package, "jax") == 0 ? loaded_attribute("jax.dlpack", "from_dlpack")
                                                                                 : loaded_attribute(package, "from_dlpack");
    }
    Py_XDECREF(module);
    PyErr_Clear();
    return importer;
}

static int is_type_of(const char *module, const char *name, PyTypeObject *type)
{
    PyObject *known = loaded_attribute(module, name);
    const int same = known == (PyObject *)type;
    Py_XDECREF(known);
    return same;
}

static int is_subtype_of(const char *module, const char *name, PyTypeObject *type)
{
    PyObject *known = loaded_attribute(module, name);
    const int below = known != NULL && PyType_Check(known) && PyType_IsSubtype(type, (PyTypeObject *)known);
    Py_XDECREF(known);
    return below;
}

static void inspect_type(fgqa_state *state, PyTypeObject *type, fgqa_type *entry)
{
    memset(entry, 0, sizeof *entry);
    entry->type = type;
    entry->kind = FGQA_KIND_OTHER;
    if (PyType_IsSubtype(type, &PyArray_Type)) {
        entry->kind = FGQA_KIND_NUMPY;
    } else if (is_subtype_of("torch", "Tensor", type)) {
        const int exact = is_type_of("torch", "Tensor", type);
        const int parameter = is_type_of("torch.nn", "Parameter", type);
        entry->kind = exact || parameter ? FGQA_KIND_TORCH : FGQA_KIND_TORCH_SUBCLASS;
        if (entry->kind == FGQA_KIND_TORCH) { entry->exchange = exchange_of(type, parameter); }
    } else if (is_subtype_of("jax.core", "Tracer", type)) {
        entry->kind = FGQA_KIND_TRACER;
    } else if (PyObject_HasAttr((PyObject *)type, state->str___dlpack__)) {
        entry->kind = is_type_of("cupy", "ndarray", type) ? FGQA_KIND_CUPY : FGQA_KIND_DLPACK;
        entry->exchange = exchange_of(type, 0);
        if (type != state->tensor_type && entry->exchange == NULL) { entry->from_dlpack = importer_of(type); }
    }
}

void fgqa_find_type(fgqa_state *state, PyTypeObject *type, fgqa_type *found)
{
    const uint64_t filled = state->n_types < FGQA_TYPES ? state->n_types : FGQA_TYPES;
    for (uint64_t n = 0; n < filled; n++) {
        if (state->types[n].type == type) { *found = state->types[n]; return; }
    }
    fgqa_type entry;
    inspect_type(state, type, &entry);   /* runs Python code: the cache may have changed meanwhile */
    fgqa_type *place = &state->types[state->n_types++ % FGQA_TYPES];
    const fgqa_type old = *place;
    Py_INCREF(type);
    *place = entry;
    *found = entry;
    Py_XDECREF(old.from_dlpack);
    Py_XDECREF(old.type);
}

/* ---- copies ---- */

/* `n` elements that are `stride` bytes apart; of a size that the compiler knows, for it makes a call of a copy of any other. */
static char *pack_row(char *to, const char *from, int64_t n, int64_t stride, size_t bytes)
{
#define PACK(size) for (int64_t at = 0; at < n; at++, to += size, from += stride) { memcpy(to, from, size); }
    switch (bytes) {
    case 1: PACK(1) break;
    case 2: PACK(2) break;
    case 4: PACK(4) break;
    case 8: PACK(8) break;
    default: PACK(bytes) break;
    }
#undef PACK
    return to;
}

void fgqa_pack(void *to, const fgqa_tensor *from)
{
    const size_t bytes = fgqa_dtype_bytes(from->dtype);
    int64_t shape[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};
    for (int32_t axis = 0; axis < from->ndim; axis++) {
        shape[4 - from->ndim + axis] = from->shape[axis];
        stride[4 - from->ndim + axis] = from->stride[axis] * (int64_t)bytes;
    }
    char *packed = to;
    const char *base = from->data;
    const size_t row_bytes = stride[3] == (int64_t)bytes ? (size_t)shape[3] * bytes : 0;      /* 0: element by element */
    for (int64_t a = 0; a < shape[0]; a++) {
        for (int64_t b = 0; b < shape[1]; b++) {
            for (int64_t c = 0; c < shape[2]; c++) {
                const char *row = base + a * stride[0] + b * stride[1] + c * stride[2];
                if (row_bytes > 0) { memcpy(packed, row, row_bytes); packed += row_bytes; continue; }
                packed = pack_row(packed, row, shape[3], stride[3], bytes);
            }
        }
    }
}

void fgqa_contiguous_strides(fgqa_tensor *tensor)
{
    uint64_t stride = 1;        /* beyond 64 bits only where there are no elements */
    for (int32_t axis = tensor->ndim - 1; axis >= 0; axis--) {
        tensor->stride[axis] = (int64_t)stride;
        stride *= tensor->shape[axis] > 0 ? (uint64_t)tensor->shape[axis] : 1;
    }
}

int fgqa_same_form(const fgqa_tensor *a, const fgqa_tensor *b)
{
    const size_t bytes = (size_t)a->ndim * sizeof a->shape[0];
    return a->dtype == b->dtype && a->ndim == b->ndim && memcmp(a->shape, b->shape, bytes) == 0 && memcmp(a->stride, b->stride, bytes) == 0;
}

/* A copy of many bytes takes seconds, in which other threads run and after which Ctrl-C is heard. */
static int pack_aside(void *to, const fgqa_tensor *from, int64_t size)
{
    const int64_t many = 1 << 20;
    if (size < many) {
        fgqa_pack(to, from);
        return 0;
    }
    PyThreadState *thread = PyEval_SaveThread();
    fgqa_pack(to, from);
    PyEval_RestoreThread(thread);
    return PyErr_CheckSignals();
}

/* Replaces the tensor by a contiguous copy in memory of the import. */
static int copy_contiguous(fgqa_import *in, const fgqa_slot *slot)
{
    int64_t size = (int64_t)fgqa_dtype_bytes(in->tensor.dtype);
    int overflow = 0;
    for (int32_t axis = 0; axis < in->tensor.ndim && !overflow; axis++) { overflow = __builtin_mul_overflow(size, in->tensor.shape[axis], &size); }
    in->memory = overflow ? NULL : fgqa_block_new((size_t)size);
    if (in->memory == NULL) {
        PyErr_Format(PyExc_MemoryError, slot->flags & FGQA_IN_CONTIGUOUS ? "a copy of %s does not fit into memory: pass one that is smaller"
                     : "%s is not contiguous, and a copy of it does not fit into memory: pass one that is contiguous, or smaller", slot->name);
        return -1;
    }
    if (pack_aside(in->memory, &in->tensor, size) < 0) { return -1; }
    in->copied = 1;
    in->tensor.data = in->memory;
    fgqa_contiguous_strides(&in->tensor);
    return 0;
}

int fgqa_import_own(fgqa_import *in, const fgqa_slot *slot, const fgqa_tensor *const *written, int n)
{
    if (!(slot->flags & FGQA_IN_CONTIGUOUS) || in->tensor.device.type != FGQA_CPU || in->copied || in->copy != NULL) { return 0; }
    for (int at = 0; at < n; at++) {
        if (written[at] != NULL && fgqa_tensors_overlap(&in->tensor, written[at])) { return 0; }
    }
    return copy_contiguous(in, slot);
}

/* Whether an axis has a stride other than `wanted` that matters. */
static int strided(const fgqa_tensor *tensor, int32_t axis, int64_t wanted)
{
    return tensor->shape[axis] > 1 && tensor->stride[axis] != wanted;
}

int fgqa_needs_copy(const fgqa_tensor *tensor, unsigned flags)
{
    if ((flags & FGQA_IN_WRITTEN) || tensor->ndim == 0) { return 0; }
    if (fgqa_dtype_bytes(tensor->dtype) == 1) { return 0; }      /* read wherever they lie, or refused for their dtype */
    if (flags & FGQA_IN_UNIT_LAST) { return strided(tensor, tensor->ndim - 1, 1); }
    if (flags & FGQA_IN_CONTIGUOUS) {
        int64_t stride = 1;
        for (int32_t axis = tensor->ndim - 1; axis >= 0; axis--) {
            if (strided(tensor, axis, stride)) { return 1; }
            stride *= tensor->shape[axis];
        }
    }
    return 0;
}

/* ---- NumPy ---- */

static int check_ndim(const fgqa_slot *slot, int64_t ndim)
{
    if (ndim <= FGQA_MAX_DIMS) { return 0; }
    PyErr_Format(PyExc_ValueError, "%s has %lld dimensions: at most %d are allowed; reshape it", slot->name, (long long)ndim,
                 FGQA_MAX_DIMS);
    return -1;
}

/* An array whose elements can be read as C values: aligned, native byte order, strides of whole elements. */
static int is_readable(PyArrayObject *array)
{
    if (!PyArray_ISALIGNED(array) || PyArray_ISBYTESWAPPED(array)) { return 0; }
    const npy_intp bytes = PyArray_ITEMSIZE(array);
    for (int axis = 0; axis < PyArray_NDIM(array); axis++) {
        if (PyArray_DIM(array, axis) > 1 && PyArray_STRIDE(array, axis) % bytes != 0) { return 0; }
    }
    return 1;
}

static int import_numpy(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_import *in)
{
    PyArrayObject *array = (PyArrayObject *)object;
    fgqa_tensor *t = &in->tensor;
    if (in->type.type != &PyArray_Type && is_subtype_of("numpy.ma", "MaskedArray", in->type.type)) {
        PyErr_Format(PyExc_TypeError, "%s is a numpy.ma.MaskedArray, whose mask would be ignored: pass %s.filled(value), and "
                     "what must not be attended to as mask=", slot->name, slot->name);
        return -1;
    }
    if (dtype_from_numpy(state, array, &t->dtype) < 0) {
        PyErr_Format(PyExc_TypeError, "%s has dtype %S: it must be %s; convert it, as by %s.astype(\"%s\")", slot->name,
                     (PyObject *)PyArray_DESCR(array), slot->dtypes, slot->name, slot->example);
        return -1;
    }
    if (check_ndim(slot, PyArray_NDIM(array)) < 0) { return -1; }
    if (!is_readable(array)) {
        if (slot->flags & FGQA_IN_WRITTEN) {
            PyErr_Format(PyExc_ValueError, "%s is %s: results are written in place; pass an aligned array in native byte order",
                         slot->name, PyArray_ISBYTESWAPPED(array) ? "byte-swapped" : "not aligned to its elements");
            return -1;
        }
        PyArray_Descr *native = PyArray_DescrNewByteorder(PyArray_DESCR(array), NPY_NATIVE);
        in->copy = native ? PyArray_FromArray(array, native, NPY_ARRAY_CARRAY | NPY_ARRAY_ENSURECOPY | NPY_ARRAY_ENSUREARRAY)
                          : NULL;
        if (in->copy == NULL) { return -1; }
        array = (PyArrayObject *)in->copy;
    }
    t->data = PyArray_DATA(array);
    t->device = (fgqa_device){FGQA_CPU, 0};
    t->ndim = PyArray_NDIM(array);
    t->readonly = !PyArray_ISWRITEABLE(array);
    const npy_intp bytes = PyArray_ITEMSIZE(array);
    for (int axis = 0; axis < t->ndim; axis++) {
        t->shape[axis] = PyArray_DIM(array, axis);
        t->stride[axis] = PyArray_STRIDE(array, axis) / bytes;
    }
    return 0;
}

/* ---- any object ---- */

static int refuse_object(PyObject *object, const fgqa_slot *slot, const fgqa_type *type)
{
    PyObject *name = PyObject_GetAttrString((PyObject *)type->type, "__name__");
    if (name == NULL) { return -1; }
    if (type->kind == FGQA_KIND_TORCH_SUBCLASS) {
        PyErr_Format(PyExc_TypeError, "%s is a torch.Tensor subclass, %U: only torch.Tensor and torch.nn.Parameter are read, as "
                     "a subclass may not hold its values in its memory; pass %s.as_subclass(torch.Tensor) if it does",
                     slot->name, name, slot->name);
    } else if (type->kind == FGQA_KIND_TRACER) {
        PyErr_Format(PyExc_TypeError, "%s is a JAX tracer, %U: arrays have no values inside of jit, grad and vmap; use "
                     "flashgqa.jax.attention there", slot->name, name);
    } else if (object == Py_None) {
        PyErr_Format(PyExc_TypeError, "%s is None: pass a NumPy array or any DLPack tensor", slot->name);
    } else {
        PyErr_Format(PyExc_TypeError, "%s is %U: it must be a NumPy array or any tensor with __dlpack__; convert it, as by "
                     "numpy.asarray(%s, dtype=\"%s\")", slot->name, name, slot->name, slot->example);
    }
    Py_DECREF(name);
    return -1;
}

int fgqa_import_tensor(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in)
{
    memset(in, 0, sizeof *in);
    in->object = object;
    fgqa_find_type(state, Py_TYPE(object), &in->type);
    Py_XINCREF(in->type.from_dlpack);
    int failed = -1;
    switch (in->type.kind) {
    case FGQA_KIND_NUMPY:  failed = import_numpy(state, object, slot, in); break;
    case FGQA_KIND_TORCH:
    case FGQA_KIND_CUPY:
    case FGQA_KIND_DLPACK: failed = fgqa_import_dlpack(state, object, slot, place, in); break;
    case FGQA_KIND_TORCH_SUBCLASS:
    case FGQA_KIND_TRACER:
    case FGQA_KIND_OTHER:  failed = refuse_object(object, slot, &in->type); break;
    }
    if (failed == 0 && in->tensor.device.type == FGQA_CPU && fgqa_needs_copy(&in->tensor, slot->flags)) { failed = copy_contiguous(in, slot); }
    if (failed < 0) { fgqa_import_release(in); }
    return failed;
}

void fgqa_import_release(fgqa_import *in)
{
    if (in->versioned != NULL || in->unversioned != NULL) {
        /* A deleter may run Python code, which must not see the exception of a failing call. */
        PyObject *type, *value, *traceback;
        PyErr_Fetch(&type, &value, &traceback);
        if (in->versioned != NULL && in->versioned->deleter != NULL) { in->versioned->deleter(in->versioned); }
        if (in->unversioned != NULL && in->unversioned->deleter != NULL) { in->unversioned->deleter(in->unversioned); }
        PyErr_Restore(type, value, traceback);
    }
    Py_CLEAR(in->copy);
    Py_CLEAR(in->type.from_dlpack);
    fgqa_block_drop(in->memory);
    memset(in, 0, sizeof *in);
}
