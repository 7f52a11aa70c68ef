/* pymodule.h - what every file of the Python module shares: the API versions it is compiled for, and its state.
 *
 * Functions of csrc/python return 0, or -1 (or NULL) with a Python exception set.
 */
#ifndef FGQA_PYMODULE_H
#define FGQA_PYMODULE_H
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL fgqa_numpy_api
#ifndef FGQA_IMPORTS_NUMPY
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include "../core/plan.h"
#include "dlpack.h"

/* Strings that are looked up on every call, interned once. */
#define FGQA_NAMES(X) \
    X(__dlpack__) X(__dlpack_device__) X(new_empty) X(torch)

/* How arrays of one exact Python type are read and made. */
typedef enum {
    FGQA_KIND_NUMPY,
    FGQA_KIND_TORCH,            /* exactly torch.Tensor or torch.nn.Parameter */
    FGQA_KIND_TORCH_SUBCLASS,   /* may not be what its memory says (FakeTensor, DTensor, ...): refused */
    FGQA_KIND_TRACER,           /* of JAX: has no values */
    FGQA_KIND_CUPY,             /* cupy.ndarray */
    FGQA_KIND_DLPACK,           /* anything else with __dlpack__ */
    FGQA_KIND_OTHER
} fgqa_kind;

typedef struct {
    PyTypeObject *type;
    fgqa_kind kind;
    const DLPackExchangeAPI *exchange;   /* NULL: none, or not trusted for this type */
    PyObject *from_dlpack;               /* the library's importer for results; NULL: results are flashgqa.Tensor */
} fgqa_type;

enum { FGQA_TYPES = 16 };

/* What is asked of every torch tensor: the descriptors of torch.Tensor, found once, without a look-up by name each time. */
typedef struct {
    PyObject *requires_grad, *is_neg, *data_ptr, *empty_like;      /* the last one is torch's function */
    descrgetfunc get_requires_grad;
} fgqa_torch;

typedef struct {
    PyTypeObject *tensor_type;           /* flashgqa.Tensor */
    PyObject *dlpack_kwargs;             /* {"max_version": (1, 3)} */
    PyObject *empty_tuple;
    PyArray_Descr *bfloat16;             /* ml_dtypes' descr once seen, else NULL */
    PyArray_Descr *float8;
    fgqa_type types[FGQA_TYPES];         /* cache, oldest entry replaced first; guarded by the GIL */
    uint64_t n_types;                    /* entries ever added */
    PyObject *logged_plans;              /* set of texts with FLASHGQA_LOG=plan, else NULL */
#define FGQA_NAME_FIELD(name) PyObject *str_##name;
    FGQA_NAMES(FGQA_NAME_FIELD)
#undef FGQA_NAME_FIELD
    fgqa_torch torch;                    /* empty before the first torch tensor */
    PyObject *torch_dtype[FGQA_DTYPE_COUNT]; /* {"dtype": torch.float32} and so on, once a result has needed it */
} fgqa_state;

static inline fgqa_state *fgqa_module_state(PyObject *module) { return (fgqa_state *)PyModule_GetState(module); }

/* errors.c: the exception of a status, with the core's sentence; returns -1. FGQA_OK returns 0. */
int fgqa_raise(fgqa_status status);

#endif
