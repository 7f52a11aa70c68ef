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

enum { FGQA_TYPES = 16, FGQA_FORMS = 8 };

/* What is asked of every torch tensor: the descriptors of torch.Tensor, found once, without a look-up by name each time. */
typedef struct {
    PyObject *requires_grad, *is_neg, *data_ptr;
    PyObject *empty_like, *is_grad_enabled;                        /* torch's functions */
    descrgetfunc get_requires_grad;
    PyObject *empty[2];                     /* torch's short way to a new tensor, by fgqa_device_type; NULL: this torch has none */
    PyObject *count_modes, *any_transform;  /* whether new tensors are what their memory says */
    PyObject *guard_of;                     /* makes a guard; NULL: this torch has none */
    PyObject *increment_version;            /* torch.autograd.graph's */
} fgqa_torch;

/* Groups of FGQA_GUARDED arguments that are asked about together: q, k, v of a forward pass, dout,
 * q, k and v, out, lse of a backward pass. */
typedef enum { FGQA_GUARDED_FORWARD, FGQA_GUARDED_FIRST, FGQA_GUARDED_LAST, FGQA_GUARDED_COUNT } fgqa_guarded;
enum { FGQA_GUARDED = 3, FGQA_GUARDS = 4 };

/* torch's word for what all of a group are (flashgqa/_torch_guard.py); check NULL: none. */
typedef struct {
    PyObject *check;
    int requires_grad;                      /* of one of them: plain only while nothing is recorded */
} fgqa_guard;

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
    PyObject *torch_dtype[FGQA_DTYPE_COUNT]; /* torch.float32 and so on, once a result has needed it */
    fgqa_tensor torch_form[FGQA_FORMS];     /* of results made lately, guarded by the GIL, and */
    PyObject *torch_args[FGQA_FORMS];       /* what makes them: ((extents), (strides), dtype) */
    uint64_t n_forms;
    fgqa_guard guards[FGQA_GUARDED_COUNT][FGQA_GUARDS];      /* the last to accept first */
    uint64_t n_guards;                      /* ever made */
    struct fgqa_repeats *repeats;           /* call_repeat.c */
    struct fgqa_keywords *keywords;         /* call_keywords.c */
} fgqa_state;

static inline fgqa_state *fgqa_module_state(PyObject *module) { return (fgqa_state *)PyModule_GetState(module); }

/* call_repeat.c: forgets all calls. */
void fgqa_repeats_drop(fgqa_state *state);

/* call_keywords.c: what the module refers to there; _clear drops it, _free its memory, which functions of the module lie in. */
int fgqa_keywords_visit(fgqa_state *state, visitproc visit, void *arg);
void fgqa_keywords_clear(fgqa_state *state);
void fgqa_keywords_free(fgqa_state *state);

/* errors.c: the exception of a status, with the core's sentence; returns -1. FGQA_OK returns 0. */
int fgqa_raise(fgqa_status status);

#endif
