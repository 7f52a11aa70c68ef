/* call_repeat.c - calls that repeat an earlier one in all but the addresses and contents of their arrays, as most of a model's
 * do: the problem and the plan of the last few are kept, so that nothing is read, checked and chosen twice. Whatever a check or a
 * plan can depend on is part of the comparison: values of the options, forms of the arrays, their places in a cache line.
 */
#include "call_state.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { KEPT = 16, MOST_ARRAYS = 7, LINE = 64 };

typedef struct {
    fgqa_pass pass;
    int32_t want_lse;
    uint32_t given;                         /* bit per fgqa_arg; 0: nothing is kept here */
    PyObject *options[FGQA_OPTION_COUNT];   /* never changing ones */
    fgqa_tensor array[MOST_ARRAYS];         /* in the order of their bits */
    fgqa_problem problem;
    _Alignas(fgqa_plan) char plan[offsetof(fgqa_plan, refused)];
} repeat;

struct fgqa_repeats {
    repeat kept[KEPT];
    uint64_t added;
};

/* ---- options ---- */

static int is_constant(PyObject *x)
{
    if (x == Py_None || PyBool_Check(x) || PyFloat_CheckExact(x) || PyLong_CheckExact(x) || PyUnicode_CheckExact(x)) { return 1; }
    if (!PyTuple_CheckExact(x) || PyTuple_Size(x) != 2) { return 0; }
    for (int n = 0; n < 2; n++) {
        PyObject *bound = PyTuple_GetItem(x, n);
        if (bound != Py_None && !PyLong_CheckExact(bound)) { return 0; }
    }
    return 1;
}

/* Of two constants. */
static int same_constant(PyObject *a, PyObject *b)
{
    if (a == b) { return 1; }
    if (Py_TYPE(a) != Py_TYPE(b)) { return 0; }
    if (PyFloat_CheckExact(a)) {
        const double x = PyFloat_AsDouble(a), y = PyFloat_AsDouble(b);
        return memcmp(&x, &y, sizeof x) == 0;
    }
    if (PyLong_CheckExact(a)) {
        int beyond_a, beyond_b;
        const long long x = PyLong_AsLongLongAndOverflow(a, &beyond_a), y = PyLong_AsLongLongAndOverflow(b, &beyond_b);
        return x == y && beyond_a == 0 && beyond_b == 0;
    }
    return PyTuple_CheckExact(a) && same_constant(PyTuple_GetItem(a, 0), PyTuple_GetItem(b, 0))
           && same_constant(PyTuple_GetItem(a, 1), PyTuple_GetItem(b, 1));
}

static int same_options(const repeat *r, PyObject *const *options)
{
    for (int n = 0; n < FGQA_OPTION_COUNT; n++) {
        if (r->options[n] != options[n] && !(is_constant(options[n]) && same_constant(r->options[n], options[n]))) { return 0; }
    }
    return 1;
}

/* ---- arrays ---- */

static int same_array(const fgqa_tensor *a, const fgqa_tensor *b)
{
    return fgqa_same_form(a, b) && a->device.type == b->device.type && a->device.index == b->device.index
           && ((uintptr_t)a->data ^ (uintptr_t)b->data) % LINE == 0 && b->data != NULL;
}

static int same_arrays(const repeat *r, const fgqa_call *call)
{
    for (int arg = 0, n = 0; arg < FGQA_ARG_COUNT; arg++) {
        if ((r->given >> arg & 1) && !same_array(&r->array[n++], &call->in[arg].tensor)) { return 0; }
    }
    return 1;
}

/* ---- calls ---- */

int fgqa_call_repeats(fgqa_call *call, PyObject *const *options)
{
    const struct fgqa_repeats *all = call->state->repeats;
    call->options = call->plan_only || call->state->logged_plans != NULL ? NULL : options;
    for (int n = 0; all != NULL && call->options != NULL && n < KEPT; n++) {
        const repeat *r = &all->kept[n];
        if (r->given == 0 || r->given != call->imported || r->pass != call->request.pass || r->want_lse != call->request.want_lse
            || !same_arrays(r, call) || !same_options(r, options)) {
            continue;
        }
        call->problem = r->problem;
        memcpy(&call->plan, r->plan, sizeof r->plan);
        call->plan.refused[0] = '\0';
        for (int arg = 0; arg < FGQA_ARG_COUNT; arg++) {
            if (r->given >> arg & 1) { call->problem.view[arg].data = call->in[arg].tensor.data; }
        }
        call->repeats = 1;
        return 1;
    }
    return 0;
}

/* Not what has arrays among its options, a result of the caller's, contents to check, numbers of its own for each call (a seed),
 * or arrays that had to be copied on their device. */
static int is_worth_keeping(const fgqa_call *call)
{
    if (call->options == NULL || call->staged || call->n_scratch > 0 || call->request.check || call->problem.dropout_threshold != 0) { return 0; }
    for (int arg = 0, n = 0; arg < FGQA_ARG_COUNT; arg++) {
        const int result_of_forward = call->request.pass == FGQA_PASS_FWD && arg >= FGQA_ARG_out;
        if (!(call->imported >> arg & 1)) { continue; }
        if (call->in[arg].tensor.data == NULL || result_of_forward || n++ == MOST_ARRAYS) { return 0; }
    }
    for (int n = 0; n < FGQA_OPTION_COUNT; n++) {
        if (!is_constant(call->options[n])) { return 0; }
    }
    return 1;
}

void fgqa_call_keep(const fgqa_call *call)
{
    fgqa_state *state = call->state;
    PyObject *old[FGQA_OPTION_COUNT];
    if (!is_worth_keeping(call)) { return; }
    if (state->repeats == NULL) { state->repeats = calloc(1, sizeof *state->repeats); }
    if (state->repeats == NULL) { return; }      /* then every call goes the long way */
    repeat *r = &state->repeats->kept[state->repeats->added++ % KEPT];
    memcpy(old, r->options, sizeof old);
    r->pass = call->request.pass;
    r->want_lse = call->request.want_lse;
    r->given = call->imported;
    for (int n = 0; n < FGQA_OPTION_COUNT; n++) {
        Py_INCREF(call->options[n]);
        r->options[n] = call->options[n];
    }
    for (int arg = 0, n = 0; arg < FGQA_ARG_COUNT; arg++) {
        if (r->given >> arg & 1) { r->array[n++] = call->in[arg].tensor; }
    }
    r->problem = call->problem;
    memcpy(r->plan, &call->plan, sizeof r->plan);
    for (int n = 0; n < FGQA_OPTION_COUNT; n++) { Py_XDECREF(old[n]); }
}

void fgqa_repeats_drop(fgqa_state *state)
{
    struct fgqa_repeats *all = state->repeats;
    state->repeats = NULL;
    for (int n = 0; all != NULL && n < KEPT; n++) {
        for (int option = 0; option < FGQA_OPTION_COUNT; option++) { Py_XDECREF(all->kept[n].options[option]); }
    }
    free(all);
}
