/* args.h - the options of a call: their order, their Python values, and their place in an fgqa_request. */
#ifndef FGQA_ARGS_H
#define FGQA_ARGS_H
#include "tensor_in.h"

/* Every option that all passes share, in the order in which api.py hands them over (_C.OPTIONS). */
#define FGQA_OPTIONS(X) \
    X(causal) X(window) X(align) X(chunk) X(scale) X(softcap) X(mask) X(bias) X(alibi_slopes) X(sink) \
    X(q_lens) X(kv_lens) X(cu_seqlens_q) X(cu_seqlens_kv) X(max_q) X(max_kv) X(dropout_p) X(seed) X(layout) \
    X(stream) X(deterministic) X(batch_invariant) X(precision) X(check) X(device) X(kernel)

typedef enum {
#define FGQA_OPTION_ENUM(name) FGQA_OPTION_##name,
    FGQA_OPTIONS(FGQA_OPTION_ENUM)
#undef FGQA_OPTION_ENUM
    FGQA_OPTION_COUNT
} fgqa_option;

/* Options that are no tensors and no part of the request. */
typedef struct {
    const char *kernel;            /* forced kernel or NULL; lives as long as the option's object */
    PyObject *stream;              /* borrowed; NULL if None */
    int device_given;
    fgqa_device device;            /* of device=; index -1: any */
} fgqa_extras;

/* Reads all options but the tensors: those stay for fgqa_option_tensor(). */
int fgqa_read_options(PyObject *const *options, fgqa_request *request, fgqa_extras *extras);

/* The tensor that an option may hold: its argument and its object, or 0 if the option is none or None. */
int fgqa_option_tensor(PyObject *const *options, fgqa_option option, fgqa_arg *arg, PyObject **object);

/* How an argument is read. */
fgqa_slot fgqa_arg_slot(fgqa_pass pass, fgqa_arg arg);

/* Values; `name` is for the message. */
int fgqa_read_bool(PyObject *object, const char *name, int32_t *value);
int fgqa_read_int(PyObject *object, const char *name, int64_t *value);
int fgqa_read_number(PyObject *object, const char *name, double *value);
int fgqa_read_seed(PyObject *object, uint64_t *seed);
/* Index of the string among `n` choices. */
int fgqa_read_choice(PyObject *object, const char *name, const char *const *choices, int n, int *value);

int fgqa_is_integer(PyObject *object);   /* int or a NumPy integer, not bool */

#endif
