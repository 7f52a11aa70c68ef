/* tensor_in.h - Python objects as fgqa_tensor: NumPy arrays by the C API, everything else by DLPack. */
#ifndef FGQA_TENSOR_IN_H
#define FGQA_TENSOR_IN_H
#include "place.h"

enum {
    FGQA_IN_UNIT_LAST = 1,    /* kernels want unit stride in the last axis: any other array is copied once */
    FGQA_IN_CONTIGUOUS = 2,   /* index arrays: copied once if strided, on the CPU always, by fgqa_import_own() */
    FGQA_IN_WRITTEN = 4       /* out=: never copied, so refused where a copy would be needed */
};

/* What is known of an argument before its object is seen. */
typedef struct {
    const char *name;
    const char *dtypes;       /* allowed ones, for the message */
    const char *example;      /* one of them */
    unsigned flags;
} fgqa_slot;

/* Whether something watches what becomes of new torch tensors: the same for all results of a call, so it is asked once. */
typedef enum { FGQA_RESULTS_UNKNOWN, FGQA_RESULTS_PLAIN, FGQA_RESULTS_WATCHED } fgqa_results_kind;

/* One argument while a call lasts. Zero-initialised; `type` is set once an object has been seen. */
typedef struct {
    fgqa_tensor tensor;
    PyObject *object;                      /* the caller's; borrowed */
    void *stream;                          /* of the call, if the tensor is on a GPU */
    fgqa_type type;                        /* of the caller's object; owns from_dlpack, borrows the rest */
    fgqa_results_kind results;             /* of results made after this one */
    int copied;                            /* strides are those of a copy, not of the object */
    PyObject *copy;                        /* array that owns a copy made by NumPy, or NULL */
    void *memory;                          /* block that owns a copy made here, or NULL */
    DLManagedTensorVersioned *versioned;   /* consumed capsule, or NULL */
    DLManagedTensor *unversioned;
} fgqa_import;

/* Fills `in`; on failure nothing is held. place: of the call, NULL where only the CPU serves. A tensor on a GPU is never
 * copied here, see fgqa_needs_copy(). */
int fgqa_import_tensor(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in);

/* Once all arguments are there: an index array on the CPU becomes a copy. Other threads run while a call computes, and what they
 * write to the caller's array after its contents were checked would lead a kernel out of its tensors. An array that intersects
 * one of `n` that the call writes (NULL: none) stays, to be refused. */
int fgqa_import_own(fgqa_import *in, const fgqa_slot *slot, const fgqa_tensor *const *written, int n);

/* Whether kernels could not read the tensor in place. */
int fgqa_needs_copy(const fgqa_tensor *tensor, unsigned flags);

/* Strides of contiguous memory of the tensor's shape. */
void fgqa_contiguous_strides(fgqa_tensor *tensor);

/* Whether two tensors have the same dtype, shape and strides. */
int fgqa_same_form(const fgqa_tensor *a, const fgqa_tensor *b);

/* All elements in the order of their indices into contiguous memory. */
void fgqa_pack(void *to, const fgqa_tensor *from);

/* Gives back what the import holds: each deleter is called once. Keeps a pending exception. */
void fgqa_import_release(fgqa_import *in);

/* ---- torch_in.c ---- */

/* Before a torch tensor's memory is read: that it may be; *data: where torch says it is. After: that DLPack says the same. */
int fgqa_torch_check(fgqa_state *state, PyObject *object, const fgqa_slot *slot, const void **data);
int fgqa_torch_check_memory(const fgqa_slot *slot, const fgqa_tensor *tensor, const void *data);

/* Before the memory of imported tensors (NULL: none) is written: torch's autograd hears of its own, so that backward() refuses to
 * use what it saved of them. */
int fgqa_torch_write(fgqa_state *state, const fgqa_import *const *written, int n);

/* Whether FGQA_GUARDED objects are all torch tensors that would pass these checks, by their likeness to others that did, in a
 * third of the time; then also what DLPack says of them. 0 says nothing. */
int fgqa_torch_is_plain(fgqa_state *state, fgqa_guarded which, PyObject *const *objects, DLTensor dl[FGQA_GUARDED]);

/* For the above: torch tensors that did. */
void fgqa_torch_was_plain(fgqa_state *state, fgqa_guarded which, PyObject *const *objects);

/* ---- shared by tensor_in.c, dlpack_in.c and torch_in.c ---- */

/* How objects of this exact type are handled; cached. */
void fgqa_find_type(fgqa_state *state, PyTypeObject *type, fgqa_type *found);

int fgqa_import_dlpack(fgqa_state *state, PyObject *object, const fgqa_slot *slot, fgqa_place *place, fgqa_import *in);

/* Turns the pending exception of a producer into a BufferError that names the argument and keeps the cause. */
int fgqa_wrap_producer_error(const fgqa_slot *slot, const char *what);

/* 0 and *dtype, or -1 if no argument takes it. */
int fgqa_dtype_from_dlpack(DLDataType type, fgqa_dtype *dtype);
DLDataType fgqa_dtype_to_dlpack(fgqa_dtype dtype);

/* ml_dtypes' descr of bfloat16 or float8_e4m3fn if some array could have it, else NULL (no exception). Borrowed. */
PyArray_Descr *fgqa_ml_dtype(fgqa_state *state, fgqa_dtype dtype);

#endif
