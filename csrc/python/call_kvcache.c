/* call_kvcache.c - attention over a KV cache: the one call that writes into its inputs. Everything is checked, and all memory
 * is at hand, before the first byte of the cache changes; where the computation fails after that, it gets its bytes back.
 */
#include "../core/cache.h"
#include "../cpu/cpu.h"
#include "call.h"
#include "call_state.h"
#include "memory.h"

typedef struct {
    fgqa_call call;
    fgqa_cache_request request;
    fgqa_import in[FGQA_CACHE_COUNT];
    uint32_t imported;
} cache_call;

/* The order of the arguments: q, the tensors of fgqa_cache_arg, then these, then the options. */
enum { ARG_interleaved = 1 + FGQA_CACHE_COUNT, ARG_return_lse, ARG_out, ARG_options };

static fgqa_slot slot_of(fgqa_cache_arg arg, int appends)
{
    fgqa_slot slot = {fgqa_cache_arg_name(arg), "float16, bfloat16, float32 or float64", "float32", 0};
    switch (arg) {
    case FGQA_CACHE_k_cache: case FGQA_CACHE_v_cache:
        slot.dtypes = "float16, bfloat16, float32, float64 or float8_e4m3";
        slot.flags = appends ? FGQA_IN_WRITTEN : 0;
        break;
    case FGQA_CACHE_cache_lens: case FGQA_CACHE_new_lens: case FGQA_CACHE_page_table: case FGQA_CACHE_batch_index: case FGQA_CACHE_left_pad:
    case FGQA_CACHE_rotary_offsets:
        slot.dtypes = slot.example = "int32";
        slot.flags = FGQA_IN_CONTIGUOUS;
        break;
    case FGQA_CACHE_k_scale: case FGQA_CACHE_v_scale:
        slot.dtypes = "float32";
        break;
    default:
        break;
    }
    return slot;
}

static int check_on_cpu(const char *name, const fgqa_tensor *t)
{
    if (t->device.type == FGQA_CPU) { return 0; }
    PyErr_Format(PyExc_NotImplementedError, "%s is on cuda:%d: attention_with_kvcache computes on the CPU only so far; use "
                 "attention(q, k_cache, v_cache, kv_lens=...) on the GPU for a contiguous cache that is filled already, or move the tensors to the CPU",
                 name, (int)t->device.index);
    return -1;
}

static int import_q(cache_call *c, PyObject *object)
{
    return fgqa_call_import(&c->call, FGQA_ARG_q, object) < 0 ? -1 : check_on_cpu("q", &c->call.in[FGQA_ARG_q].tensor);
}

static int import_cache(cache_call *c, PyObject *const *objects)
{
    const int appends = objects[FGQA_CACHE_k_new] != Py_None || objects[FGQA_CACHE_v_new] != Py_None;
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        const fgqa_slot slot = slot_of((fgqa_cache_arg)arg, appends);
        const int needed = arg == FGQA_CACHE_k_cache || arg == FGQA_CACHE_v_cache;
        if (objects[arg] == Py_None && !needed) { continue; }
        if (fgqa_import_tensor(c->call.state, objects[arg], &slot, &c->call.place, &c->in[arg]) < 0) { return -1; }
        c->imported |= 1u << arg;
        c->request.tensor[arg] = &c->in[arg].tensor;
        if (check_on_cpu(slot.name, &c->in[arg].tensor) < 0) { return -1; }
    }
    return 0;
}

static int check_place(const fgqa_call *call)
{
    if (call->extras.device_given && call->extras.device.type == FGQA_CUDA) {
        PyErr_SetString(PyExc_NotImplementedError, "device is \"cuda\": attention_with_kvcache computes on the CPU only so far; leave device out");
        return -1;
    }
    if (call->extras.stream != NULL) {
        PyErr_Format(PyExc_ValueError, "stream is %R but q is on cpu: only GPU tensors have streams; leave it out", call->extras.stream);
        return -1;
    }
    return 0;
}

static int prepare(cache_call *c, PyObject *const *args)
{
    fgqa_call *call = &c->call;
    if (import_q(c, args[0]) < 0 || import_cache(c, args + 1) < 0
        || fgqa_read_bool(args[ARG_interleaved], "rotary_interleaved", &c->request.rotary_interleaved) < 0
        || fgqa_read_bool(args[ARG_return_lse], "return_lse", &call->request.want_lse) < 0
        || fgqa_call_import_options(call, args + ARG_options) < 0 || check_place(call) < 0) {
        return -1;
    }
    if (args[ARG_out] != Py_None && fgqa_call_import(call, FGQA_ARG_out, args[ARG_out]) < 0) { return -1; }
    c->request.base = call->request;
    if (fgqa_raise(fgqa_cache_init(&c->request, &call->problem)) < 0) { return -1; }
    return fgqa_call_make_plan(call) < 0 || fgqa_call_allocate(call) < 0 ? -1 : 0;
}

static int run(cache_call *c)
{
    fgqa_call *call = &c->call;
    const size_t bytes = fgqa_cpu_append_bytes(&call->problem);
    void *kept = bytes > 0 ? fgqa_block_new(bytes) : NULL;
    if (bytes > 0 && kept == NULL) {
        PyErr_Format(PyExc_MemoryError, "a copy of the %zu bytes that are appended to does not fit into memory", bytes);
        return -1;
    }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {NULL, fgqa_interrupted, &thread};
    fgqa_status status = bytes > 0 ? fgqa_cpu_append(&call->problem, kept) : FGQA_OK;
    if (status == FGQA_OK) {
        status = call->plan.kernel->run(&call->plan, &call->problem, call->workspace, &exec);
        if (status != FGQA_OK && bytes > 0 && fgqa_cpu_append_undo(&call->problem, kept) != FGQA_OK) {
            status = fgqa_fail(FGQA_ERROR_RUNTIME, "the call failed and the cache could not be put back; slots behind cache_lens may hold new keys");
        }
    }
    PyEval_RestoreThread(thread);
    fgqa_block_drop(kept);
    return fgqa_raise(status);
}

/* attention_with_kvcache(q, k_cache, v_cache, k_new, v_new, cache_lens, new_lens, page_table, batch_index, left_pad, rotary_cos,
 * rotary_sin, rotary_offsets, k_scale, v_scale, rotary_interleaved, return_lse, out, *options) -> out | (out, lse) */
PyObject *fgqa_py_attention_with_kvcache(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    cache_call c;
    PyObject *result = NULL;
    if (n != ARG_options + FGQA_OPTION_COUNT) {
        PyErr_Format(PyExc_TypeError, "_C.attention_with_kvcache takes %d arguments, got %zd", (int)(ARG_options + FGQA_OPTION_COUNT), n);
        return NULL;
    }
    c.imported = 0;
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) { c.request.tensor[arg] = NULL; }
    fgqa_call_begin(&c.call, module, FGQA_PASS_FWD, args[ARG_options + FGQA_OPTION_stream]);
    if (prepare(&c, args) == 0 && run(&c) == 0) {
        PyObject *out = fgqa_call_take(&c.call, FGQA_ARG_out, args[ARG_out]);
        PyObject *lse = out && c.call.request.want_lse ? fgqa_call_take(&c.call, FGQA_ARG_lse, NULL) : NULL;
        result = lse ? PyTuple_Pack(2, out, lse) : c.call.request.want_lse ? NULL : out;
        if (result != out) { Py_XDECREF(out); }
        Py_XDECREF(lse);
    }
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        if (c.imported >> arg & 1) { fgqa_import_release(&c.in[arg]); }
    }
    fgqa_call_end(&c.call);
    return result;
}
