/* call.h - the entry points of the module, by file. All are METH_FASTCALL; api.py documents what they compute. */
#ifndef FGQA_CALL_H
#define FGQA_CALL_H
#include "pymodule.h"

/* call.c */
PyObject *fgqa_py_forward(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_backward(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_weights(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_explain(PyObject *module, PyObject *const *args, Py_ssize_t n);

/* call_keywords.c */
PyObject *fgqa_py_keyword_attention(PyObject *module, PyObject *const *args, Py_ssize_t n);

/* call_kvcache.c */
PyObject *fgqa_py_attention_with_kvcache(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_explain_with_kvcache(PyObject *module, PyObject *const *args, Py_ssize_t n);

/* call_xla.c */
PyObject *fgqa_py_xla_call(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_xla_handlers(PyObject *module, PyObject *unused);

/* place.c */
PyObject *fgqa_py_stream_address(PyObject *module, PyObject *object);

/* tools.c */
PyObject *fgqa_py_merge(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_dropout_mask(PyObject *module, PyObject *const *args, Py_ssize_t n);
PyObject *fgqa_py_kernels(PyObject *module, PyObject *unused);
PyObject *fgqa_py_cuda_kernels(PyObject *module, PyObject *unused);
PyObject *fgqa_py_cuda_warmup(PyObject *module, PyObject *device);
PyObject *fgqa_py_build_info(PyObject *module, PyObject *unused);
PyObject *fgqa_py_set_num_threads(PyObject *module, PyObject *n);
PyObject *fgqa_py_get_num_threads(PyObject *module, PyObject *unused);

/* The interrupt callback of a running call: Python's signal handlers, under the GIL that `context` (PyThreadState **) gave up. */
int fgqa_interrupted(void *context);

#endif
