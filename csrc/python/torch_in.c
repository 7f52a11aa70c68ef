/* torch_in.c - what there is to ask of a torch tensor besides what DLPack says.
 */
#include "tensor_in.h"

#include <string.h>

/* Functions that a torch may lack: torch.compile's own way to make a tensor, what says that nothing else is going on, guards. */
static void find_short_ways(fgqa_torch *t, PyObject *torch)
{
    PyObject *c = PyObject_GetAttrString(torch, "_C"), *dynamo = c ? PyObject_GetAttrString(c, "_dynamo") : NULL;
    PyObject *guards = dynamo ? PyObject_GetAttrString(dynamo, "guards") : NULL;
    if (guards != NULL) {
        t->count_modes = PyObject_GetAttrString(c, "_len_torch_dispatch_stack");
        t->any_transform = t->count_modes ? PyObject_GetAttrString(c, "_are_functorch_transforms_active") : NULL;
        t->empty[FGQA_CPU] = t->any_transform ? PyObject_GetAttrString(guards, "_empty_strided_cpu") : NULL;
        t->empty[FGQA_CUDA] = t->empty[FGQA_CPU] ? PyObject_GetAttrString(guards, "_empty_strided_cuda") : NULL;
    }
    PyErr_Clear();
    PyObject *own = PyImport_ImportModule("flashgqa._torch_guard");
    t->guard_of = own ? PyObject_GetAttrString(own, "guard_of") : NULL;
    if (t->guard_of == Py_None) { Py_CLEAR(t->guard_of); }
    PyErr_Clear();
    Py_XDECREF(own);
    Py_XDECREF(guards);
    Py_XDECREF(dynamo);
    Py_XDECREF(c);
}

static int find_torch(fgqa_torch *found, fgqa_state *state)
{
    PyObject *torch = PyImport_GetModule(state->str_torch), *type = torch ? PyObject_GetAttrString(torch, "Tensor") : NULL;
    fgqa_torch t = {0};
    if (type != NULL) {
        t.requires_grad = PyObject_GetAttrString(type, "requires_grad");
        t.is_neg = PyObject_GetAttrString(type, "is_neg");
        t.data_ptr = PyObject_GetAttrString(type, "data_ptr");
        t.empty_like = PyObject_GetAttrString(torch, "empty_like");
        t.is_grad_enabled = PyObject_GetAttrString(torch, "is_grad_enabled");
    }
    Py_XDECREF(type);
    if (t.requires_grad != NULL) { t.get_requires_grad = (descrgetfunc)PyType_GetSlot(Py_TYPE(t.requires_grad), Py_tp_descr_get); }
    if (t.get_requires_grad != NULL && t.is_neg != NULL && t.data_ptr != NULL && t.empty_like != NULL && t.is_grad_enabled != NULL) {
        find_short_ways(&t, torch);
        *found = t;
        Py_DECREF(torch);
        return 0;
    }
    Py_XDECREF(torch);
    if (!PyErr_Occurred()) { PyErr_SetString(PyExc_RuntimeError, "torch.Tensor is not what it should be"); }
    Py_XDECREF(t.requires_grad);
    Py_XDECREF(t.is_neg);
    Py_XDECREF(t.data_ptr);
    Py_XDECREF(t.empty_like);
    Py_XDECREF(t.is_grad_enabled);
    return -1;
}

static int is_recording(const fgqa_torch *torch)
{
    PyObject *enabled = PyObject_CallNoArgs(torch->is_grad_enabled);
    if (enabled == NULL) { return -1; }
    Py_DECREF(enabled);
    return enabled != Py_False;
}

/* What torch's exchange table does not check: a tensor that records gradients, or whose memory is not its values
 * (negative bit, sparse layout, wrappers of torch.func and functionalization, all of exact type torch.Tensor). */
static int check_torch(fgqa_state *state, PyObject *object, const fgqa_slot *slot)
{
    if (state->torch.is_neg == NULL && find_torch(&state->torch, state) < 0) { return -1; }
    PyObject *flag = state->torch.get_requires_grad(state->torch.requires_grad, object, (PyObject *)Py_TYPE(object));
    if (flag == NULL) { return -1; }
    const int requires_grad = flag == Py_True;
    Py_DECREF(flag);
    if (requires_grad) {
        const int recording = is_recording(&state->torch);
        if (recording < 0) { return -1; }
        if (recording) {
            PyErr_Format(PyExc_BufferError, "%s requires grad, and gradients do not flow through this function: use that of "
                         "flashgqa.torch, or detach() it or run under torch.no_grad()", slot->name);
            return -1;
        }
    }
    PyObject *negative = PyObject_CallFunctionObjArgs(state->torch.is_neg, object, NULL);
    if (negative == NULL) { return fgqa_wrap_producer_error(slot, "is_neg()"); }
    const int lazy = negative != Py_False;
    Py_DECREF(negative);
    if (lazy) {
        PyErr_Format(PyExc_BufferError, "%s has torch's negative bit set, so its memory is not its values: pass "
                     "%s.resolve_neg()", slot->name, slot->name);
        return -1;
    }
    return 0;
}

/* Where torch says the values are; the exchange table may say otherwise (it does for some wrappers). */
static int torch_memory(fgqa_state *state, PyObject *object, const fgqa_slot *slot, const void **data)
{
    PyObject *number = PyObject_CallFunctionObjArgs(state->torch.data_ptr, object, NULL);
    *data = number ? PyLong_AsVoidPtr(number) : NULL;
    Py_XDECREF(number);
    return PyErr_Occurred() ? fgqa_wrap_producer_error(slot, "memory cannot be read (a sparse tensor, or a wrapper made by torch.func "
                                                  "or torch.compile?); pass a plain strided tensor: data_ptr()") : 0;
}

int fgqa_torch_check_memory(const fgqa_slot *slot, const fgqa_tensor *t, const void *data)
{
    for (int32_t axis = 0; axis < t->ndim; axis++) {
        if (t->shape[axis] == 0) { return 0; }
    }
    if (data == t->data) { return 0; }
    PyErr_Format(PyExc_BufferError, "%s is a torch tensor without memory of its own (a wrapper made by torch.func or "
                 "torch.compile?): call this function outside of the transformation", slot->name);
    return -1;
}

int fgqa_torch_write(fgqa_state *state, const fgqa_import *const *written, int n)
{
    fgqa_torch *torch = &state->torch;
    PyObject *tensors = NULL;
    for (int at = 0; at < n; at++) {
        if (written[at] == NULL || written[at]->type.kind != FGQA_KIND_TORCH) { continue; }
        if (tensors == NULL) { tensors = PyList_New(0); }
        if (tensors == NULL || PyList_Append(tensors, written[at]->object) < 0) { goto failed; }
    }
    if (tensors == NULL) { return 0; }
    if (torch->increment_version == NULL) {
        PyObject *graph = PyImport_ImportModule("torch.autograd.graph");
        torch->increment_version = graph ? PyObject_GetAttrString(graph, "increment_version") : NULL;
        Py_XDECREF(graph);
        if (torch->increment_version == NULL) { goto failed; }
    }
    PyObject *done = PyObject_CallFunctionObjArgs(torch->increment_version, tensors, NULL);
    Py_DECREF(tensors);
    Py_XDECREF(done);
    return done ? 0 : -1;
failed:
    Py_XDECREF(tensors);
    return -1;
}

int fgqa_torch_check(fgqa_state *state, PyObject *object, const fgqa_slot *slot, const void **data)
{
    return check_torch(state, object, slot) < 0 || torch_memory(state, object, slot, data) < 0 ? -1 : 0;
}

/* ---- all of a call at once ---- */

/* Guards of more than these would cost more than they save, were the kinds of tensors always new. */
enum { MOST_GUARDS = 64 };

static PyObject *pack(PyObject *const *objects)
{
    PyObject *tuple = PyTuple_New(FGQA_GUARDED);
    for (int n = 0; n < FGQA_GUARDED && tuple != NULL; n++) {
        Py_INCREF(objects[n]);
        PyTuple_SetItem(tuple, n, objects[n]);
    }
    return tuple;
}

/* The one that accepted last comes first the next time. */
static void swap(fgqa_guard *a, fgqa_guard *b)
{
    const fgqa_guard c = *a;
    *a = *b;
    *b = c;
}

/* Also what a guard needs, which does not live through a tensor without sizes. */
static int describe(fgqa_state *state, PyObject *object, DLTensor *dl)
{
    fgqa_type type;
    fgqa_find_type(state, Py_TYPE(object), &type);
    return type.kind == FGQA_KIND_TORCH && type.exchange != NULL && type.exchange->dltensor_from_py_object_no_sync != NULL
           && type.exchange->dltensor_from_py_object_no_sync(object, dl) == 0;
}

int fgqa_torch_is_plain(fgqa_state *state, fgqa_guarded which, PyObject *const *objects, DLTensor dl[FGQA_GUARDED])
{
    fgqa_guard *guards = state->guards[which];
    if (guards[0].check == NULL) { return 0; }
    for (int n = 0; n < FGQA_GUARDED; n++) {
        if (!describe(state, objects[n], &dl[n])) {
            PyErr_Clear();
            return 0;
        }
    }
    PyObject *args = pack(objects);
    int plain = 0;
    for (int n = 0; n < FGQA_GUARDS && args != NULL && !plain && guards[n].check != NULL; n++) {
        const fgqa_guard guard = guards[n];
        PyObject *answer = PyObject_Call(guard.check, args, NULL);
        plain = answer == Py_True && !(guard.requires_grad && is_recording(&state->torch) != 0);
        Py_XDECREF(answer);
        if (plain && n > 0) { swap(&guards[0], &guards[n]); }
    }
    PyErr_Clear();
    Py_XDECREF(args);
    return plain;
}

void fgqa_torch_was_plain(fgqa_state *state, fgqa_guarded which, PyObject *const *objects)
{
    fgqa_guard *guards = state->guards[which];
    if (state->torch.guard_of == NULL || state->n_guards >= MOST_GUARDS) { return; }
    PyObject *args = pack(objects), *pair = args ? PyObject_Call(state->torch.guard_of, args, NULL) : NULL;
    state->n_guards++;
    if (pair != NULL) {
        PyObject *old = guards[FGQA_GUARDS - 1].check;
        memmove(&guards[1], &guards[0], (FGQA_GUARDS - 1) * sizeof guards[0]);
        guards[0].check = PyTuple_GetItem(pair, 0);
        guards[0].requires_grad = PyTuple_GetItem(pair, 1) != Py_False;
        Py_INCREF(guards[0].check);
        Py_XDECREF(old);
    }
    PyErr_Clear();
    Py_XDECREF(pair);
    Py_XDECREF(args);
}
