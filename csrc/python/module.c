/* module.c - flashgqa._C: method table, module state, initialisation. */
#define FGQA_IMPORTS_NUMPY
#include "pymodule.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../cpu/cpu.h"
#include "args.h"
#include "call.h"
#include "tensor_out.h"

#define FAST(function) (PyCFunction)(void (*)(void))function, METH_FASTCALL

static PyMethodDef methods[] = {
    {"forward", FAST(fgqa_py_forward), "forward(q, k, v, return_lse, out, *OPTIONS) -> out | (out, lse)"},
    {"keyword_attention", FAST(fgqa_py_keyword_attention),
     "keyword_attention(function, text) -> a function of C that does what `function`, attention() of api.py, does; text: its signature "
     "and documentation"},
    {"backward", FAST(fgqa_py_backward),
     "backward(dout, q, k, v, out, lse, dlse, want_dbias, *OPTIONS) -> (dq, dk, dv, dbias, dsink)"},
    {"weights", FAST(fgqa_py_weights), "weights(q, k, rows, *OPTIONS) -> weights"},
    {"explain", FAST(fgqa_py_explain), "explain(q, k, v, return_lse, out, backward, *OPTIONS) -> dict"},
    {"attention_with_kvcache", FAST(fgqa_py_attention_with_kvcache),
     "attention_with_kvcache(q, k_cache, v_cache, k_new, v_new, cache_lens, new_lens, page_table, batch_index, left_pad, rotary_cos, "
     "rotary_sin, rotary_offsets, k_scale, v_scale, rotary_interleaved, return_lse, out, *OPTIONS) -> out | (out, lse)"},
    {"explain_with_kvcache", FAST(fgqa_py_explain_with_kvcache), "explain_with_kvcache(as attention_with_kvcache) -> dict"},
    {"xla_call", FAST(fgqa_py_xla_call),
     "xla_call({name: (dtype, shape)}, backward, return_lse, want_dbias, want_dsink, *OPTIONS) -> (attributes, [(dtype, shape), ...])"},
    {"xla_handlers", fgqa_py_xla_handlers, METH_NOARGS, "xla_handlers() -> {platform: capsule}"},
    {"merge", FAST(fgqa_py_merge), "merge(outs, lses, layout) -> (out, lse)"},
    {"dropout_mask", FAST(fgqa_py_dropout_mask), "dropout_mask(b, hq, sq, sk, dropout_p, seed) -> bool array"},
    {"kernels", fgqa_py_kernels, METH_NOARGS, "kernels() -> [(name, pass, device)]"},
    {"cuda_kernels", fgqa_py_cuda_kernels, METH_NOARGS, "cuda_kernels() -> [(name, pass, reason or None, bytes of shared memory)]"},
    {"cuda_warmup", fgqa_py_cuda_warmup, METH_O, "cuda_warmup(device, /): loads and runs every kernel of a CUDA device"},
    {"stream_address", fgqa_py_stream_address, METH_O, "stream_address(stream, /) -> int: of what stream= may be"},
    {"build_info", fgqa_py_build_info, METH_NOARGS, "build_info() -> dict"},
    {"set_num_threads", fgqa_py_set_num_threads, METH_O, 
     "set_num_threads(n, /)\n--\n\nMost threads that a call may use, the calling one included: 1 to 1024, or None for the default "
     "(FLASHGQA_NUM_THREADS, else OMP_NUM_THREADS, else the processors this process may use). Results do not depend on it."},
    {"get_num_threads", fgqa_py_get_num_threads, METH_NOARGS, 
     "get_num_threads()\n--\n\nMost threads that a call may use; see set_num_threads."},
    {NULL, NULL, 0, NULL},
};

/* FLASHGQA_LOG: unset, empty, or "plan". */
static int read_log(fgqa_state *state)
{
    const char *log = getenv("FLASHGQA_LOG");
    if (log == NULL || *log == '\0') { return 0; }
    if (strcmp(log, "plan") != 0) {
        PyErr_Format(PyExc_ValueError, "FLASHGQA_LOG is \"%s\": it must be \"plan\", or unset", log);
        return -1;
    }
    state->logged_plans = PySet_New(NULL);
    return state->logged_plans ? 0 : -1;
}

static int add_option_names(PyObject *module)
{
    static const char *const names[] = {
#define FGQA_OPTION_NAME(name) #name,
        FGQA_OPTIONS(FGQA_OPTION_NAME)
#undef FGQA_OPTION_NAME
    };
    PyObject *tuple = PyTuple_New(FGQA_OPTION_COUNT);
    for (int n = 0; n < FGQA_OPTION_COUNT && tuple != NULL; n++) {
        PyObject *name = PyUnicode_InternFromString(names[n]);
        if (name == NULL) { Py_CLEAR(tuple); } else { PyTuple_SetItem(tuple, n, name); }
    }
    const int failed = tuple == NULL || PyModule_AddObjectRef(module, "OPTIONS", tuple) < 0;
    Py_XDECREF(tuple);
    return failed ? -1 : 0;
}

static int module_exec(PyObject *module)
{
    fgqa_state *state = fgqa_module_state(module);
    if (PyArray_ImportNumPyAPI() < 0) { return -1; }
    if (fgqa_raise(fgqa_cpu_init()) < 0 || read_log(state) < 0) { return -1; }
#define FGQA_INTERN(name) \
    state->str_##name = PyUnicode_InternFromString(#name); \
    if (state->str_##name == NULL) { return -1; }
    FGQA_NAMES(FGQA_INTERN)
#undef FGQA_INTERN
    state->empty_tuple = PyTuple_New(0);
    state->dlpack_kwargs = Py_BuildValue("{s:(ii)}", "max_version", DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION);
    state->tensor_type = fgqa_tensor_type_new(module);
    if (state->empty_tuple == NULL || state->dlpack_kwargs == NULL || state->tensor_type == NULL) { return -1; }
    if (PyModule_AddObjectRef(module, "Tensor", (PyObject *)state->tensor_type) < 0
        || PyModule_AddStringConstant(module, "__version__", FGQA_VERSION) < 0) {   /* the version in pyproject.toml */
        return -1;
    }
    return add_option_names(module);
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
    fgqa_state *state = fgqa_module_state(module);
    Py_VISIT(state->tensor_type);
    Py_VISIT(state->dlpack_kwargs);
    Py_VISIT(state->logged_plans);
    for (int n = 0; n < FGQA_DTYPE_COUNT; n++) { Py_VISIT(state->torch_dtype[n]); }
    Py_VISIT(state->torch.requires_grad);
    Py_VISIT(state->torch.is_neg);
    Py_VISIT(state->torch.data_ptr);
    Py_VISIT(state->torch.empty_like);
    for (int n = 0; n < 2; n++) { Py_VISIT(state->torch.empty[n]); }
    Py_VISIT(state->torch.count_modes);
    Py_VISIT(state->torch.any_transform);
    Py_VISIT(state->torch.guard_of);
    Py_VISIT(state->torch.increment_version);
    Py_VISIT(state->torch.is_grad_enabled);
    for (int n = 0; n < FGQA_GUARDED_COUNT * FGQA_GUARDS; n++) { Py_VISIT(state->guards[n / FGQA_GUARDS][n % FGQA_GUARDS].check); }
    for (int n = 0; n < FGQA_FORMS; n++) { Py_VISIT(state->torch_args[n]); }
    const int visited = fgqa_keywords_visit(state, visit, arg);
    if (visited != 0) { return visited; }
    for (int n = 0; n < FGQA_TYPES; n++) {
        Py_VISIT(state->types[n].type);
        Py_VISIT(state->types[n].from_dlpack);
    }
    return 0;
}

static int module_clear(PyObject *module)
{
    fgqa_state *state = fgqa_module_state(module);
    Py_CLEAR(state->tensor_type);
    Py_CLEAR(state->dlpack_kwargs);
    Py_CLEAR(state->empty_tuple);
    fgqa_repeats_drop(state);
    fgqa_keywords_clear(state);
    Py_CLEAR(state->bfloat16);
    Py_CLEAR(state->float8);
    Py_CLEAR(state->logged_plans);
    for (int n = 0; n < FGQA_DTYPE_COUNT; n++) { Py_CLEAR(state->torch_dtype[n]); }
    Py_CLEAR(state->torch.requires_grad);
    Py_CLEAR(state->torch.is_neg);
    Py_CLEAR(state->torch.data_ptr);
    Py_CLEAR(state->torch.empty_like);
    for (int n = 0; n < 2; n++) { Py_CLEAR(state->torch.empty[n]); }
    Py_CLEAR(state->torch.count_modes);
    Py_CLEAR(state->torch.any_transform);
    Py_CLEAR(state->torch.guard_of);
    Py_CLEAR(state->torch.increment_version);
    Py_CLEAR(state->torch.is_grad_enabled);
    for (int n = 0; n < FGQA_GUARDED_COUNT * FGQA_GUARDS; n++) { Py_CLEAR(state->guards[n / FGQA_GUARDS][n % FGQA_GUARDS].check); }
    for (int n = 0; n < FGQA_FORMS; n++) { Py_CLEAR(state->torch_args[n]); }
    for (int n = 0; n < FGQA_TYPES; n++) {
        Py_CLEAR(state->types[n].type);
        Py_CLEAR(state->types[n].from_dlpack);
    }
#define FGQA_FORGET(name) Py_CLEAR(state->str_##name);
    FGQA_NAMES(FGQA_FORGET)
#undef FGQA_FORGET
    return 0;
}

static void module_free(void *module)
{
    module_clear(module);
    fgqa_keywords_free(fgqa_module_state(module));
}

/* Slots that only newer interpreters know, by number: an older one refuses a module that has them. */
enum { SLOT_MULTIPLE_INTERPRETERS = 3, SLOT_GIL = 4 };

static PyModuleDef_Slot slots[4];

static void fill_slots(void)
{
    int major = 0, minor = 0, n = 0;
    sscanf(Py_GetVersion(), "%d.%d", &major, &minor);
    slots[n++] = (PyModuleDef_Slot){Py_mod_exec, module_exec};
    /* NumPy cannot be loaded into a second interpreter, and the caches of the module state rely on the GIL. */
    if (minor >= 12) { slots[n++] = (PyModuleDef_Slot){SLOT_MULTIPLE_INTERPRETERS, NULL}; }
    if (minor >= 13) { slots[n++] = (PyModuleDef_Slot){SLOT_GIL, NULL}; }
    slots[n] = (PyModuleDef_Slot){0, NULL};
}

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "flashgqa._C",
    .m_doc = "The compiled part of flashgqa; flashgqa.api documents what its functions compute.",
    .m_size = sizeof(fgqa_state),
    .m_methods = methods,
    .m_slots = slots,
    .m_traverse = module_traverse,
    .m_clear = module_clear,
    .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void)
{
    fill_slots();
    return PyModuleDef_Init(&definition);
}
