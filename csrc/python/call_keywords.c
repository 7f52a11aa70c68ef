/* call_keywords.c - flashgqa.attention as it is called: a function of C that puts keywords in the order of forward(). As a
 * function of Python it would take longer to set up its thirty defaults than to read three tensors. Names, defaults and
 * documentation are those of the function in api.py, which also answers whatever is not three arrays and keywords of its own.
 */
#include "call.h"

#include <stdlib.h>
#include <string.h>

#include "args.h"

enum { ARRAYS = 3, KEYWORDS = 2 + FGQA_OPTION_COUNT };      /* q, k, v; return_lse, out and the options */

/* One a module. The method outlives all objects made of it, since they hold the module. */
struct fgqa_keywords {
    PyMethodDef method;
    PyObject *text;                         /* bytes that method.ml_doc points into */
    PyObject *function;                     /* of api.py; NULL: the interpreter is at its end */
    PyObject *names[KEYWORDS], *defaults[KEYWORDS];
};

/* The function of api.py: it accepts the call in its own way, or says in Python's words what is wrong with it. */
static PyObject *call_python(PyObject *function, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    PyObject *positional = PyTuple_New(n), *keywords = positional ? PyDict_New() : NULL, *result = NULL;
    int failed = keywords == NULL;
    for (Py_ssize_t at = 0; at < n && !failed; at++) {
        Py_INCREF(args[at]);
        PyTuple_SetItem(positional, at, args[at]);
    }
    for (Py_ssize_t at = 0; names != NULL && at < PyTuple_Size(names) && !failed; at++) {
        failed = PyDict_SetItem(keywords, PyTuple_GetItem(names, at), args[n + at]) < 0;
    }
    if (!failed) { result = PyObject_Call(function, positional, keywords); }
    Py_XDECREF(keywords);
    Py_XDECREF(positional);
    return result;
}

/* Place of a keyword in `known`, whose strings are interned as those of nearly every call are; -1: not found that way. */
static int find_keyword(PyObject *const *known, PyObject *name)
{
    for (int n = 0; n < KEYWORDS; n++) {
        if (known[n] == name) { return n; }
    }
    return -1;
}

static PyObject *call_attention(PyObject *module, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    const struct fgqa_keywords *own = fgqa_module_state(module)->keywords;
    const Py_ssize_t given = names ? PyTuple_Size(names) : 0;
    PyObject *all[ARRAYS + KEYWORDS];
    if (own->function == NULL) {
        PyErr_SetString(PyExc_RuntimeError, "flashgqa.attention is called while Python ends");
        return NULL;
    }
    if (n != ARRAYS) { return call_python(own->function, args, n, names); }
    memcpy(all, args, ARRAYS * sizeof all[0]);
    memcpy(all + ARRAYS, own->defaults, KEYWORDS * sizeof all[0]);
    for (Py_ssize_t at = 0; at < given; at++) {
        const int place = find_keyword(own->names, PyTuple_GetItem(names, at));
        if (place < 0) { return call_python(own->function, args, n, names); }
        all[ARRAYS + place] = args[n + at];
    }
    return fgqa_py_forward(module, all, ARRAYS + KEYWORDS);
}

/* ---- how it is made ---- */

static void forget(struct fgqa_keywords *own)
{
    Py_CLEAR(own->function);
    for (int n = 0; n < KEYWORDS; n++) {
        Py_CLEAR(own->names[n]);
        Py_CLEAR(own->defaults[n]);
    }
}

/* Names in the order of forward(), and what each of them is by default. */
static int read_defaults(struct fgqa_keywords *own, PyObject *function)
{
    static const char *const names[KEYWORDS] = {
        "return_lse", "out",
#define FGQA_OPTION_NAME(name) #name,
        FGQA_OPTIONS(FGQA_OPTION_NAME)
#undef FGQA_OPTION_NAME
    };
    PyObject *defaults = PyObject_GetAttrString(function, "__kwdefaults__");
    int failed = defaults == NULL || !PyDict_Check(defaults) || PyDict_Size(defaults) != KEYWORDS;
    for (int n = 0; n < KEYWORDS && !failed; n++) {
        own->names[n] = PyUnicode_InternFromString(names[n]);
        own->defaults[n] = own->names[n] ? PyDict_GetItemWithError(defaults, own->names[n]) : NULL;
        Py_XINCREF(own->defaults[n]);
        failed = own->defaults[n] == NULL;
    }
    Py_XDECREF(defaults);
    Py_INCREF(function);
    own->function = function;
    if (failed && !PyErr_Occurred()) { PyErr_SetString(PyExc_TypeError, "the keywords of this function are not those of forward()"); }
    return failed ? -1 : 0;
}

/* keyword_attention(function, text) */
PyObject *fgqa_py_keyword_attention(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    fgqa_state *state = fgqa_module_state(module);
    if (n != 2 || !PyUnicode_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "_C.keyword_attention takes a function and its text");
        return NULL;
    }
    if (state->keywords == NULL) { state->keywords = calloc(1, sizeof *state->keywords); }
    if (state->keywords == NULL) { return PyErr_NoMemory(); }
    struct fgqa_keywords made = {.text = PyUnicode_AsUTF8String(args[1])}, *own = state->keywords;
    PyObject *from = made.text ? PyObject_GetAttrString(args[0], "__module__") : NULL, *result = NULL;
    if (from != NULL && read_defaults(&made, args[0]) == 0) {
        const struct fgqa_keywords old = *own;
        made.method = (PyMethodDef){"attention", (PyCFunction)(void (*)(void))call_attention, METH_FASTCALL | METH_KEYWORDS,
                                    PyBytes_AsString(made.text)};
        *own = made;
        made = old;
        result = PyCFunction_NewEx(&own->method, module, from);
    }
    forget(&made);
    Py_XDECREF(made.text);
    Py_XDECREF(from);
    return result;
}

int fgqa_keywords_visit(fgqa_state *state, visitproc visit, void *arg)
{
    if (state->keywords != NULL) { Py_VISIT(state->keywords->function); }
    return 0;
}

void fgqa_keywords_clear(fgqa_state *state)
{
    if (state->keywords != NULL) { forget(state->keywords); }
}

void fgqa_keywords_free(fgqa_state *state)
{
    if (state->keywords == NULL) { return; }
    forget(state->keywords);
    Py_CLEAR(state->keywords->text);
    free(state->keywords);
    state->keywords = NULL;
}
