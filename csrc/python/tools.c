/* tools.c - merge, dropout_mask, threads, and what this build and this machine offer. */
#include <string.h>

#include "../cpu/cpu.h"
#include "../cpu/cpu_features.h"
#include "../cpu/memory.h"
#include "../cpu/threads.h"
#include "../cuda/device.h"
#include "args.h"
#include "call.h"
#include "tensor_out.h"

/* ---- merge ---- */

typedef struct {
    Py_ssize_t n;
    fgqa_import *outs, *lses;      /* [n]; zero where not yet imported */
    fgqa_view *out_views, *lse_views;
} fgqa_parts;

static void free_parts(fgqa_parts *parts)
{
    for (Py_ssize_t k = 0; k < parts->n && parts->outs && parts->lses; k++) {
        fgqa_import_release(&parts->outs[k]);
        fgqa_import_release(&parts->lses[k]);
    }
    PyMem_Free(parts->outs);
    PyMem_Free(parts->lses);
    PyMem_Free(parts->out_views);
    PyMem_Free(parts->lse_views);
}

static int import_part(fgqa_state *state, PyObject *object, Py_ssize_t k, const char *name, fgqa_arg arg, fgqa_place *place, fgqa_import *in)
{
    char text[48];
    fgqa_slot slot = fgqa_arg_slot(FGQA_PASS_BWD, arg);
    PyOS_snprintf(text, sizeof text, "%s[%zd]", name, k);
    slot.name = text;
    return fgqa_import_tensor(state, object, &slot, place, in);
}

static int import_parts(fgqa_state *state, PyObject *outs, PyObject *lses, fgqa_place *place, fgqa_parts *parts)
{
    parts->n = PyTuple_Size(outs);
    if (parts->n < 1 || parts->n != PyTuple_Size(lses)) {
        PyErr_Format(PyExc_ValueError, "outs has %zd parts and lses has %zd: there must be as many of both, and at least one",
                     parts->n, PyTuple_Size(lses));
        parts->n = 0;
        return -1;
    }
    parts->outs = PyMem_Calloc((size_t)parts->n, sizeof *parts->outs);
    parts->lses = PyMem_Calloc((size_t)parts->n, sizeof *parts->lses);
    parts->out_views = PyMem_Calloc((size_t)parts->n, sizeof *parts->out_views);
    parts->lse_views = PyMem_Calloc((size_t)parts->n, sizeof *parts->lse_views);
    if (!parts->outs || !parts->lses || !parts->out_views || !parts->lse_views) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t k = 0; k < parts->n; k++) {
        if (import_part(state, PyTuple_GetItem(outs, k), k, "outs", FGQA_ARG_out, place, &parts->outs[k]) < 0
            || import_part(state, PyTuple_GetItem(lses, k), k, "lses", FGQA_ARG_lse, place, &parts->lses[k]) < 0) {
            return -1;
        }
    }
    return 0;
}

static PyObject *shape_tuple(const fgqa_tensor *tensor)
{
    PyObject *shape = PyTuple_New(tensor->ndim);
    for (int32_t axis = 0; axis < tensor->ndim && shape != NULL; axis++) {
        PyObject *extent = PyLong_FromLongLong(tensor->shape[axis]);
        if (extent == NULL) { Py_CLEAR(shape); } else { PyTuple_SetItem(shape, axis, extent); }
    }
    return shape;
}

static int same_form(const fgqa_tensor *a, const fgqa_tensor *b)
{
    return a->ndim == b->ndim && a->dtype == b->dtype && memcmp(a->shape, b->shape, (size_t)a->ndim * sizeof a->shape[0]) == 0;
}

static int check_part(const char *name, Py_ssize_t k, const fgqa_tensor *got, const fgqa_tensor *wanted)
{
    if (got->device.type != wanted->device.type) {
        PyErr_Format(PyExc_ValueError, "%s[%zd] and outs[0] are on a CPU and a GPU: all parts must be on one device", name, k);
        return -1;
    }
    if (same_form(got, wanted)) { return 0; }
    PyObject *shape = shape_tuple(got), *wanted_shape = shape_tuple(wanted);
    if (shape != NULL && wanted_shape != NULL) {
        PyErr_Format(got->dtype == wanted->dtype ? PyExc_ValueError : PyExc_TypeError,
                     "%s[%zd] has dtype %s, shape %R: it must be %s, %R, to go with outs[0]", name, k, fgqa_dtype_name(got->dtype),
                     shape, fgqa_dtype_name(wanted->dtype), wanted_shape);
    }
    Py_XDECREF(shape);
    Py_XDECREF(wanted_shape);
    return -1;
}

/* The caller's axes of b h s d, -1 where absent. */
static void axes_of(int32_t ndim, int bshd, int axis[4])
{
    const int first = ndim == 4;
    axis[0] = first ? 0 : -1;
    axis[1] = first + (bshd ? 1 : 0);
    axis[2] = first + (bshd ? 0 : 1);
    axis[3] = first + 2;
}

static fgqa_view out_view(const fgqa_tensor *t, const int axis[4])
{
    return (fgqa_view){t->data, t->dtype, axis[0] < 0 ? 0 : t->stride[axis[0]], t->stride[axis[1]], t->stride[axis[2]],
                       t->shape[axis[3]] == 1 ? 1 : t->stride[axis[3]]};
}

static fgqa_view lse_view(const fgqa_tensor *t)
{
    return (fgqa_view){t->data, t->dtype, t->ndim == 3 ? t->stride[0] : 0, t->stride[t->ndim - 2], t->stride[t->ndim - 1], 0};
}

/* Forms of the results, which are those of every part; all parts are checked against them. */
static int describe_merge(const fgqa_parts *parts, int bshd, fgqa_tensor *out, fgqa_tensor *lse, int axis[4])
{
    const fgqa_tensor *first = &parts->outs[0].tensor;
    if (first->ndim != 3 && first->ndim != 4) {
        PyErr_Format(PyExc_ValueError, "outs[0] has %d dimensions: it must have 3 or 4, as attention returned it", (int)first->ndim);
        return -1;
    }
    if (first->dtype > FGQA_BF16) {
        PyErr_Format(PyExc_TypeError, "outs[0] has dtype %s: it must be float16, bfloat16, float32 or float64",
                     fgqa_dtype_name(first->dtype));
        return -1;
    }
    axes_of(first->ndim, bshd, axis);
    *out = *first;
    *lse = (fgqa_tensor){.dtype = first->dtype == FGQA_F64 ? FGQA_F64 : FGQA_F32, .device = first->device, .ndim = first->ndim - 1};
    for (int letter = 0, at = 0; letter < 3; letter++) {
        if (axis[letter] >= 0) { lse->shape[at++] = first->shape[axis[letter]]; }
    }
    fgqa_contiguous_strides(out);
    fgqa_contiguous_strides(lse);
    for (Py_ssize_t k = 0; k < parts->n; k++) {
        if (check_part("outs", k, &parts->outs[k].tensor, out) < 0 || check_part("lses", k, &parts->lses[k].tensor, lse) < 0) {
            return -1;
        }
        parts->out_views[k] = out_view(&parts->outs[k].tensor, axis);
        parts->lse_views[k] = lse_view(&parts->lses[k].tensor);
    }
    return 0;
}

static int run_merge(const fgqa_parts *parts, const fgqa_place *place, const fgqa_tensor *out, const fgqa_tensor *lse, const int axis[4])
{
    const fgqa_view out_to = out_view(out, axis), lse_to = lse_view(lse);
    const int64_t shape[4] = {axis[0] < 0 ? 1 : out->shape[axis[0]], out->shape[axis[1]], out->shape[axis[2]], out->shape[axis[3]]};
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {NULL, fgqa_interrupted, &thread};
    const int32_t n = parts->n > INT32_MAX ? INT32_MAX : (int32_t)parts->n;
    fgqa_threads_of_team(parts->outs[0].type.kind == FGQA_KIND_TORCH);
    const fgqa_status status = place->device.type == FGQA_CUDA
        ? fgqa_cuda_merge(n, parts->out_views, parts->lse_views, &out_to, &lse_to, shape, place->stream)
        : fgqa_cpu_merge(n, parts->out_views, parts->lse_views, &out_to, &lse_to, shape, &exec);
    fgqa_threads_of_team(0);
    PyEval_RestoreThread(thread);
    return fgqa_raise(status);
}

/* merge(outs, lses, layout) -> (out, lse); outs and lses are tuples */
PyObject *fgqa_py_merge(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    static const char *const layouts[] = {"bhsd", "bshd"};
    fgqa_state *state = fgqa_module_state(module);
    fgqa_parts parts = {0};
    fgqa_tensor out_spec, lse_spec;
    fgqa_result out = {0}, lse = {0};
    fgqa_place place;
    int bshd = 0, axis[4];
    PyObject *result = NULL;
    if (n != 3 || !PyTuple_Check(args[0]) || !PyTuple_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "_C.merge takes two tuples and a layout");
        return NULL;
    }
    fgqa_place_begin(&place, Py_None);
    if ((args[2] == Py_None || fgqa_read_choice(args[2], "layout", layouts, 2, &bshd) == 0)
        && import_parts(state, args[0], args[1], &place, &parts) == 0
        && describe_merge(&parts, bshd, &out_spec, &lse_spec, axis) == 0
        && fgqa_result_new(state, &parts.outs[0], &out_spec, &out) == 0 && fgqa_result_new(state, &parts.outs[0], &lse_spec, &lse) == 0
        && run_merge(&parts, &place, &out.tensor, &lse.tensor, axis) == 0) {
        PyObject *first = fgqa_result_object(state, &parts.outs[0], &out);
        PyObject *second = first ? fgqa_result_object(state, &parts.outs[0], &lse) : NULL;
        result = second ? PyTuple_Pack(2, first, second) : NULL;
        Py_XDECREF(first);
        Py_XDECREF(second);
    }
    fgqa_result_drop(&out);
    fgqa_result_drop(&lse);
    free_parts(&parts);
    fgqa_place_end(&place);
    return result;
}

/* ---- dropout_mask ---- */

static int read_extent(PyObject *object, const char *name, int64_t *extent)
{
    if (fgqa_read_int(object, name, extent) < 0) { return -1; }
    if (*extent >= 0 && *extent <= INT32_MAX) { return 0; }
    PyErr_Format(PyExc_ValueError, "%s is %R: it must be 0 to 2**31 - 1", name, object);
    return -1;
}

/* An integer, or an int64 array [seed, offset] on the CPU. */
static int read_seed_option(fgqa_state *state, PyObject *object, uint64_t *seed, uint64_t *offset)
{
    *offset = 0;
    if (fgqa_is_integer(object)) { return fgqa_read_seed(object, seed); }
    const fgqa_slot slot = fgqa_arg_slot(FGQA_PASS_FWD, FGQA_ARG_seed);
    fgqa_import in;
    if (fgqa_import_tensor(state, object, &slot, NULL, &in) < 0) { return -1; }
    const fgqa_tensor *t = &in.tensor;
    int failed = t->dtype != FGQA_I64 || t->ndim != 1 || t->shape[0] != 2;
    if (failed) {
        PyErr_Format(t->dtype != FGQA_I64 ? PyExc_TypeError : PyExc_ValueError,
                     "seed has dtype %s and %d dimensions: it must be an integer, or int64 of shape (2,), [seed, offset]",
                     fgqa_dtype_name(t->dtype), (int)t->ndim);
    } else {
        memcpy(seed, t->data, sizeof *seed);
        memcpy(offset, (const int64_t *)t->data + 1, sizeof *offset);
        failed = *offset > UINT32_MAX;
        if (failed) { PyErr_SetString(PyExc_ValueError, "seed has an offset outside of 0 to 2**32 - 1"); }
    }
    fgqa_import_release(&in);
    return failed ? -1 : 0;
}

/* dropout_mask(b, hq, sq, sk, dropout_p, seed) -> bool array [b, hq, sq, sk], True where the weight is kept */
PyObject *fgqa_py_dropout_mask(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    static const char *const names[] = {"b", "hq", "sq", "sk"};
    fgqa_state *state = fgqa_module_state(module);
    fgqa_tensor spec = {.dtype = FGQA_BOOL, .ndim = 4};
    double p;
    uint64_t seed = 0, offset = 0;
    if (n != 6) {
        PyErr_SetString(PyExc_TypeError, "_C.dropout_mask takes 6 arguments");
        return NULL;
    }
    int64_t bytes = 1;
    for (int axis = 0; axis < 4; axis++) {
        if (read_extent(args[axis], names[axis], &spec.shape[axis]) < 0) { return NULL; }
        if (__builtin_mul_overflow(bytes, spec.shape[axis], &bytes)) { bytes = INT64_MAX; }
    }
    if (fgqa_read_number(args[4], "dropout_p", &p) < 0) { return NULL; }
    if (!(p >= 0 && p <= 1)) {
        PyErr_Format(PyExc_ValueError, "dropout_p is %R: it must be a probability from 0 to 1", args[4]);
        return NULL;
    }
    if (args[5] == Py_None && p > 0) {
        PyErr_SetString(PyExc_ValueError, "seed is None: the dropped weights follow from the seed alone; pass an int, or int64 [seed, offset]");
        return NULL;
    }
    if (args[5] != Py_None && read_seed_option(state, args[5], &seed, &offset) < 0) { return NULL; }
    fgqa_contiguous_strides(&spec);
    spec.data = fgqa_block_new((size_t)bytes);
    if (spec.data == NULL) {
        PyErr_SetString(PyExc_MemoryError, "a mask of b * hq * sq * sk bytes does not fit into memory");
        return NULL;
    }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {NULL, fgqa_interrupted, &thread};
    const fgqa_status status = fgqa_cpu_dropout_mask(spec.data, (int32_t)spec.shape[0], (int32_t)spec.shape[1], (int32_t)spec.shape[2],
                                                     (int32_t)spec.shape[3], fgqa_dropout_threshold(p), seed, offset, &exec);
    PyEval_RestoreThread(thread);
    if (fgqa_raise(status) < 0) {
        fgqa_block_drop(spec.data);
        return NULL;
    }
    return fgqa_numpy_over_block(state, &spec, spec.data);
}

/* ---- machine and build ---- */

static const char *pass_text(fgqa_pass pass)
{
    switch (pass) {
    case FGQA_PASS_FWD:    return "forward";
    case FGQA_PASS_BWD:    return "backward";
    case FGQA_PASS_ROWS:   return "weights of rows";
    case FGQA_PASS_KEYSUM: return "weights by key";
    }
    return "?";
}

/* [(name, pass, device), ...] of the kernels that run on this machine, fastest first */
PyObject *fgqa_py_kernels(PyObject *module, PyObject *unused)
{
    int32_t n = 0;
    const fgqa_kernel *kernels = fgqa_cpu_kernels(&n);
    PyObject *list = PyList_New(0);
    (void)module;
    (void)unused;
    for (int32_t k = 0; k < n && list != NULL; k++) {
        PyObject *row = Py_BuildValue("(sss)", kernels[k].name, pass_text(kernels[k].pass),
                                      kernels[k].device == FGQA_CPU ? "cpu" : "cuda");
        if (row == NULL || PyList_Append(list, row) < 0) { Py_CLEAR(list); }
        Py_XDECREF(row);
    }
    return list;
}

/* [(name, pass, reason, bytes of shared memory), ...] of the CUDA kernels of this build, fastest first; reason None: it runs on
 * some GPU here */
PyObject *fgqa_py_cuda_kernels(PyObject *module, PyObject *unused)
{
    int32_t n = 0;
    const fgqa_kernel *kernels = fgqa_cuda_kernels(&n);
    const char *missing = fgqa_cuda_reason();
    PyObject *list = PyList_New(0);
    (void)module;
    (void)unused;
    for (int32_t k = 0; k < n && list != NULL; k++) {
        char why[128];
        const char *reason = missing;
        for (int32_t device = 0; missing == NULL && device < fgqa_cuda_device_count(); device++) {
            reason = fgqa_cuda_refuse(&kernels[k], device, why);
            if (reason == NULL) { break; }
        }
        PyObject *row = Py_BuildValue("(sszi)", kernels[k].name, pass_text(kernels[k].pass), reason,
                                      (int)fgqa_cuda_shared_memory(&kernels[k]));
        if (row == NULL || PyList_Append(list, row) < 0) { Py_CLEAR(list); }
        Py_XDECREF(row);
    }
    return list;
}

PyObject *fgqa_py_cuda_warmup(PyObject *module, PyObject *device)
{
    int64_t index;
    (void)module;
    if (fgqa_read_int(device, "device", &index) < 0) { return NULL; }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_status status = fgqa_cuda_warmup(index < 0 || index > INT32_MAX ? -1 : (int32_t)index);
    PyEval_RestoreThread(thread);
    if (fgqa_raise(status) < 0) { return NULL; }
    Py_RETURN_NONE;
}

/* ["NVIDIA H200, ...", ...] */
static PyObject *device_texts(void)
{
    PyObject *list = PyList_New(0);
    for (int32_t device = 0; device < fgqa_cuda_device_count() && list != NULL; device++) {
        char text[192];
        PyObject *line = fgqa_cuda_device_text(device, text) == FGQA_OK ? PyUnicode_FromString(text) : PyUnicode_FromString(fgqa_message());
        if (line == NULL || PyList_Append(list, line) < 0) { Py_CLEAR(list); }
        Py_XDECREF(line);
    }
    return list;
}

/* [(name, compiled, supported), ...] */
static PyObject *isa_rows(void)
{
    PyObject *list = PyList_New(0);
    for (int32_t k = 0; k < fgqa_cpu_isa_count() && list != NULL; k++) {
        int32_t compiled = 0, supported = 0;
        const char *name = fgqa_cpu_isa_name(k, &compiled, &supported);
        PyObject *row = Py_BuildValue("(sOO)", name, compiled ? Py_True : Py_False, supported ? Py_True : Py_False);
        if (row == NULL || PyList_Append(list, row) < 0) { Py_CLEAR(list); }
        Py_XDECREF(row);
    }
    return list;
}

#if defined(__clang__)
#define FGQA_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define FGQA_COMPILER "gcc " __VERSION__
#else
#define FGQA_COMPILER "unknown"
#endif

PyObject *fgqa_py_build_info(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    PyObject *rows = isa_rows();
    PyObject *devices = rows ? device_texts() : NULL;
    if (devices == NULL) {
        Py_XDECREF(rows);
        return NULL;
    }
    const char *reason = fgqa_cuda_reason();
    int32_t runtime, driver;
    fgqa_cuda_versions(&runtime, &driver);
    return Py_BuildValue("{s:N,s:s,s:s,s:z,s:O,s:O,s:z,s:N,s:i,s:i,s:s,s:s}", "isa", rows, "isa_in_use", fgqa_cpu_isa(), "cpu_features",
                         fgqa_cpu_feature_names(), "openmp", fgqa_threads_team_runtime(), "cuda", reason ? Py_False : Py_True,
                         "cuda_built", fgqa_cuda_built() ? Py_True : Py_False, "cuda_reason", reason, "cuda_devices", devices,
                         "cuda_runtime", (int)runtime, "cuda_driver", (int)driver,
                         "compiler", FGQA_COMPILER, "dlpack", Py_STRINGIFY(DLPACK_MAJOR_VERSION) "." Py_STRINGIFY(DLPACK_MINOR_VERSION));
}

PyObject *fgqa_py_set_num_threads(PyObject *module, PyObject *n)
{
    int64_t threads = 0;
    (void)module;
    if (n != Py_None && fgqa_read_int(n, "n", &threads) < 0) { return NULL; }
    if (n != Py_None && (threads < 1 || threads > FGQA_MAX_THREADS)) {
        PyErr_Format(PyExc_ValueError, "n is %R: it must be 1 to %d, or None for the default", n, FGQA_MAX_THREADS);
        return NULL;
    }
    fgqa_set_num_threads((int32_t)threads);
    Py_RETURN_NONE;
}

PyObject *fgqa_py_get_num_threads(PyObject *module, PyObject *unused)
{
    (void)module;
    (void)unused;
    return PyLong_FromLong(fgqa_get_num_threads());
}
