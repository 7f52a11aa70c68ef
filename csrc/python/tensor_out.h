/* tensor_out.h - results in the caller's own array type, without a copy. */
#ifndef FGQA_TENSOR_OUT_H
#define FGQA_TENSOR_OUT_H
#include "../cuda/device.h"
#include "tensor_in.h"

/* A result while it is computed. Zero-initialised when absent. */
typedef struct {
    fgqa_tensor tensor;
    void *block;                           /* memory of our own, or NULL */
    fgqa_cuda_memory *gpu;                 /* the same on a GPU, or NULL */
    PyObject *object;                      /* torch tensor that will be returned, or NULL */
    DLManagedTensorVersioned *managed;     /* memory of another library, or NULL */
} fgqa_result;

/* Memory for `spec`, from the library of `like` if that hands out memory. */
int fgqa_result_new(fgqa_state *state, fgqa_import *like, const fgqa_tensor *spec, fgqa_result *result);

/* Memory of the same library that never becomes an object of it. */
int fgqa_scratch_new(fgqa_state *state, fgqa_import *like, size_t bytes, fgqa_result *result);

/* The Python object of a result; the memory is given away, also on failure. */
PyObject *fgqa_result_object(fgqa_state *state, const fgqa_import *like, fgqa_result *result);

void fgqa_result_drop(fgqa_result *result);

/* A NumPy array over the block, which it owns from now on, also on failure. */
PyObject *fgqa_numpy_over_block(fgqa_state *state, const fgqa_tensor *tensor, void *block);

/* tensor_type.c: flashgqa.Tensor over the block or the GPU's memory, which it owns from now on, also on failure. */
PyObject *fgqa_tensor_over(fgqa_state *state, const fgqa_tensor *tensor, void *block, fgqa_cuda_memory *gpu);
PyTypeObject *fgqa_tensor_type_new(PyObject *module);

/* The NumPy dtype of a tensor; NULL with a TypeError if NumPy has none. */
PyArray_Descr *fgqa_numpy_descr(fgqa_state *state, fgqa_dtype dtype);

#endif
