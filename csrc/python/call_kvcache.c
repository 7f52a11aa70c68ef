/* call_kvcache.c - attention over a KV cache: the one call that writes into its inputs. Everything is checked, and all memory
 * is at hand, before the first byte of the cache changes; where the computation fails after that, it gets its bytes back (CPU).
 * On a GPU two steps follow each other on the call's stream, the append and attention, and nobody waits.
 */
#include "../cpu/cpu.h"
#include "../cpu/memory.h"
#include "../cpu/threads.h"
#include "../cuda/device.h"
#include "call.h"
#include "call_state.h"

typedef struct {
    fgqa_call call;
    fgqa_cache_request request;
    fgqa_import in[FGQA_CACHE_COUNT];
    uint32_t imported;
    fgqa_view q_given;                     /* q before the rotary embedding, which attention reads after it */
    int turns;                             /* whether there are rows of q to rotate */
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

static int appends(PyObject *const *objects) { return objects[FGQA_CACHE_k_new] != Py_None || objects[FGQA_CACHE_v_new] != Py_None; }

static int import_cache(cache_call *c, PyObject *const *objects)
{
    const int written = appends(objects);
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        const fgqa_slot slot = slot_of((fgqa_cache_arg)arg, written);
        const int needed = arg == FGQA_CACHE_k_cache || arg == FGQA_CACHE_v_cache;
        if (objects[arg] == Py_None && !needed) { continue; }
        if (fgqa_import_tensor(c->call.state, objects[arg], &slot, &c->call.place, &c->in[arg]) < 0) { return -1; }
        c->imported |= 1u << arg;
        c->request.tensor[arg] = &c->in[arg].tensor;
    }
    return 0;
}

/* fgqa_import_own() of all arguments. */
static int own(cache_call *c, int is_written)
{
    const fgqa_tensor *written[] = {c->call.request.tensor[FGQA_ARG_out], is_written ? c->request.tensor[FGQA_CACHE_k_cache] : NULL,
                                    is_written ? c->request.tensor[FGQA_CACHE_v_cache] : NULL};
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        const fgqa_slot slot = slot_of((fgqa_cache_arg)arg, is_written);
        if ((c->imported >> arg & 1) && fgqa_import_own(&c->in[arg], &slot, written, 3) < 0) { return -1; }
    }
    return fgqa_call_own(&c->call, written, 3);
}

static int check_place(fgqa_call *call)
{
    if (call->in[FGQA_ARG_q].tensor.device.type == FGQA_CPU && call->extras.device_given && call->extras.device.type == FGQA_CUDA) {
        PyErr_SetString(PyExc_ValueError, "device is \"cuda\" but q is on cpu: a cache stays where it is from call to call; keep it, and q, on "
                        "the GPU as torch or CuPy arrays, and leave device out");
        return -1;
    }
    return fgqa_call_check_place(call);
}

/* ---- on a GPU ---- */

static int gather(cache_call *c)
{
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        if (!(c->imported >> arg & 1)) { continue; }
        if (fgqa_call_gather_tensor(&c->call, &c->in[arg].tensor, slot_of((fgqa_cache_arg)arg, 0).flags) < 0) { return -1; }
    }
    return fgqa_call_gather(&c->call);
}

static int is_read(fgqa_cache_arg arg) { return arg >= FGQA_CACHE_cache_lens && arg != FGQA_CACHE_rotary_cos && arg != FGQA_CACHE_rotary_sin; }

/* The tensor as the host sees it: what the checks read of it in `block`, anything else by its address alone. */
static int fetch(fgqa_call *call, fgqa_tensor *tensor, int read, void **block)
{
    fgqa_tensor copy = *tensor;
    if (read) {
        if (fgqa_call_gather_tensor(call, &copy, FGQA_IN_CONTIGUOUS) < 0 || fgqa_call_fetch(call, &copy, block) < 0) { return -1; }
        copy.data = *block;
    }
    copy.device = (fgqa_device){FGQA_CPU, 0};
    *tensor = copy;
    return 0;
}

/* The checks that a cache on the CPU goes through, which have the sentences. */
static int find_fault(cache_call *c)
{
    fgqa_cache_request request = c->request;
    fgqa_tensor tensor[FGQA_CACHE_COUNT + FGQA_ARG_COUNT];
    void *block[FGQA_CACHE_COUNT + FGQA_ARG_COUNT] = {NULL};
    fgqa_problem problem;
    int failed = 0;
    for (int n = 0; n < FGQA_CACHE_COUNT + FGQA_ARG_COUNT && failed == 0; n++) {
        const int of_cache = n < FGQA_CACHE_COUNT;
        const fgqa_tensor **given = of_cache ? &request.tensor[n] : &request.base.tensor[n - FGQA_CACHE_COUNT];
        if (*given == NULL) { continue; }
        tensor[n] = **given;
        failed = fetch(&c->call, &tensor[n], of_cache ? is_read((fgqa_cache_arg)n) : n - FGQA_CACHE_COUNT == FGQA_ARG_q_lens, &block[n]);
        *given = &tensor[n];
    }
    if (failed == 0) { failed = fgqa_raise(fgqa_cache_init(&request, &problem)); }
    for (int n = 0; n < FGQA_CACHE_COUNT + FGQA_ARG_COUNT; n++) { fgqa_block_drop(block[n]); }
    return failed;
}

/* check=True: one look at all of it on the device. */
static int check_contents(cache_call *c)
{
    void *memory;
    int sound = 0;
    if (fgqa_call_check_begin(&c->call) < 0 || fgqa_call_scratch(&c->call, sizeof(int32_t), &memory) < 0) { return -1; }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_status status = fgqa_cuda_check_cache(&c->call.problem, memory, &sound, c->call.place.stream);
    PyEval_RestoreThread(thread);
    if (fgqa_raise(status) < 0) { return -1; }
    if (sound) { return 0; }
    if (find_fault(c) == 0) {
        PyErr_SetString(PyExc_RuntimeError, "index arrays of the cache changed while they were checked: let nothing write to them, on any stream, "
                        "during the call");
    }
    return -1;
}

/* Where the rows of q go once they are rotated, and where attention reads them. */
static int make_room_for_q(cache_call *c)
{
    fgqa_problem *p = &c->call.problem;
    fgqa_view turned = {.dtype = p->dtype, .stride_b = (int64_t)p->hq * p->sq * p->d, .stride_h = (int64_t)p->sq * p->d, .stride_s = p->d, .stride_d = 1};
    c->q_given = p->view[FGQA_ARG_q];
    c->turns = p->cache.rotary.pairs > 0 && p->b > 0 && p->sq > 0;
    if (!c->turns) { return 0; }
    const size_t bytes = (size_t)p->b * (size_t)turned.stride_b * fgqa_dtype_bytes(p->dtype);
    turned.data = c->q_given.data;      /* stands in for it while planning */
    if (!c->call.plan_only && fgqa_call_scratch(&c->call, bytes, &turned.data) < 0) { return -1; }
    p->view[FGQA_ARG_q] = turned;
    return 0;
}

static int run_on_gpu(cache_call *c)
{
    fgqa_call *call = &c->call;
    fgqa_problem given = call->problem;
    given.view[FGQA_ARG_q] = c->q_given;
    const fgqa_view none = {0};
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {call->place.stream, fgqa_interrupted, &thread};
    fgqa_status status = FGQA_OK;
    if (c->turns || given.cache.new_max > 0) { status = fgqa_cuda_append(&given, c->turns ? &call->problem.view[FGQA_ARG_q] : &none, exec.stream); }
    if (status == FGQA_OK) { status = call->plan.kernel->run(&call->plan, &call->problem, call->workspace, &exec); }
    PyEval_RestoreThread(thread);
    return fgqa_raise(status);
}

/* ---- the call ---- */

static int prepare(cache_call *c, PyObject *const *args)
{
    fgqa_call *call = &c->call;
    if (fgqa_call_import(call, FGQA_ARG_q, args[0]) < 0 || import_cache(c, args + 1) < 0
        || fgqa_read_bool(args[ARG_interleaved], "rotary_interleaved", &c->request.rotary_interleaved) < 0
        || fgqa_read_bool(args[ARG_return_lse], "return_lse", &call->request.want_lse) < 0
        || fgqa_call_import_options(call, args + ARG_options) < 0 || check_place(call) < 0) {
        return -1;
    }
    if (args[ARG_out] != Py_None && fgqa_call_import(call, FGQA_ARG_out, args[ARG_out]) < 0) { return -1; }
    const int on_gpu = call->in[FGQA_ARG_q].tensor.device.type == FGQA_CUDA;
    if (!on_gpu && own(c, appends(args + 1)) < 0) { return -1; }
    c->request.base = call->request;
    if ((on_gpu && gather(c) < 0) || fgqa_raise(fgqa_cache_init(&c->request, &call->problem)) < 0) { return -1; }
    if (on_gpu && ((call->request.check && !call->plan_only && check_contents(c) < 0) || make_room_for_q(c) < 0)) { return -1; }
    return fgqa_call_make_plan(call) < 0 || (!call->plan_only && fgqa_call_allocate(call) < 0) ? -1 : 0;
}

static int run(cache_call *c)
{
    fgqa_call *call = &c->call;
    const int is_given = call->imported >> FGQA_ARG_out & 1, appends_keys = c->imported >> FGQA_CACHE_k_new & 1;
    const fgqa_import *written[] = {is_given ? &call->in[FGQA_ARG_out] : NULL, appends_keys ? &c->in[FGQA_CACHE_k_cache] : NULL,
                                    appends_keys ? &c->in[FGQA_CACHE_v_cache] : NULL};
    if (fgqa_torch_write(call->state, written, 3) < 0) { return -1; }
    if (call->problem.device.type == FGQA_CUDA) { return run_on_gpu(c); }
    const size_t bytes = fgqa_cpu_append_bytes(&call->problem);
    void *kept = bytes > 0 ? fgqa_block_new(bytes) : NULL;
    if (bytes > 0 && kept == NULL) {
        PyErr_Format(PyExc_MemoryError, "a copy of the %zu bytes that are appended to does not fit into memory", bytes);
        return -1;
    }
    PyThreadState *thread = PyEval_SaveThread();
    const fgqa_exec exec = {NULL, fgqa_interrupted, &thread};
    fgqa_threads_of_team(call->in[FGQA_ARG_q].type.kind == FGQA_KIND_TORCH);
    fgqa_status status = bytes > 0 ? fgqa_cpu_append(&call->problem, kept) : FGQA_OK;
    if (status == FGQA_OK) {
        status = call->plan.kernel->run(&call->plan, &call->problem, call->workspace, &exec);
        if (status != FGQA_OK && bytes > 0 && fgqa_cpu_append_undo(&call->problem, kept) != FGQA_OK) {
            status = fgqa_fail(FGQA_ERROR_RUNTIME, "the call failed and the cache could not be put back; slots behind cache_lens may hold new keys");
        }
    }
    fgqa_threads_of_team(0);
    PyEval_RestoreThread(thread);
    fgqa_block_drop(kept);
    return fgqa_raise(status);
}

static PyObject *whole_call(PyObject *module, const char *name, int plan_only, PyObject *const *args, Py_ssize_t n)
{
    cache_call c;
    PyObject *result = NULL;
    if (fgqa_call_check_count(name, n, ARG_options + FGQA_OPTION_COUNT) < 0) { return NULL; }
    c.imported = 0;
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) { c.request.tensor[arg] = NULL; }
    fgqa_call_begin(&c.call, module, FGQA_PASS_FWD, args[ARG_options + FGQA_OPTION_stream]);
    c.call.plan_only = plan_only;
    if (prepare(&c, args) == 0) {
        result = plan_only ? fgqa_call_plan_data(&c.call) : run(&c) == 0 ? fgqa_call_take_forward(&c.call, args[ARG_out]) : NULL;
    }
    for (int arg = 0; arg < FGQA_CACHE_COUNT; arg++) {
        if (c.imported >> arg & 1) { fgqa_import_release(&c.in[arg]); }
    }
    fgqa_call_end(&c.call);
    return result;
}

/* attention_with_kvcache(q, k_cache, v_cache, k_new, v_new, cache_lens, new_lens, page_table, batch_index, left_pad, rotary_cos,
 * rotary_sin, rotary_offsets, k_scale, v_scale, rotary_interleaved, return_lse, out, *options) -> out | (out, lse) */
PyObject *fgqa_py_attention_with_kvcache(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    return whole_call(module, "attention_with_kvcache", 0, args, n);
}

/* The same arguments -> dict */
PyObject *fgqa_py_explain_with_kvcache(PyObject *module, PyObject *const *args, Py_ssize_t n)
{
    return whole_call(module, "explain_with_kvcache", 1, args, n);
}
