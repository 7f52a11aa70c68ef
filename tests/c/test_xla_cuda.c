/* test_xla_cuda.c - the custom call of XLA on a GPU, without one: whatever XLA refuses (device, stream, scratch memory) becomes
 * an error that says what, and whatever was taken by then is given back. XLA, the device and the kernel are made here.
 */
#include <stdint.h>

#include "../../csrc/cpu/cpu.h"
#include "../../csrc/cuda/device.h"
#include "check.h"
#include "xla_frame.h"

enum { ORDINAL = 3, CURRENT = 1 };

/* ---- a kernel that notes what it is given ---- */

static struct { size_t workspace; fgqa_status status; } wanted;     /* of the kernel */
static struct { void *stream; char *workspace; } given;

static const char *serve(const fgqa_kernel *kernel, const fgqa_problem *problem, char why[128])
{
    (void)kernel;
    (void)why;
    return problem->device.type == FGQA_CUDA && problem->device.index == ORDINAL ? NULL : "another device";
}

static void tile(const fgqa_kernel *kernel, const fgqa_problem *problem, fgqa_plan *plan)
{
    (void)kernel;
    (void)problem;
    plan->workspace_bytes = wanted.workspace;
}

static fgqa_status run(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec)
{
    (void)problem;
    CHECK(plan->workspace_bytes == wanted.workspace && exec->interrupted == NULL);
    if (workspace != NULL) { memset(workspace, 1, plan->workspace_bytes); }
    given.stream = exec->stream;
    given.workspace = workspace;
    runs++;
    return wanted.status == FGQA_OK ? FGQA_OK : fgqa_fail(wanted.status, "the launch failed");
}

const fgqa_kernel *fgqa_cuda_kernels(int32_t *count)
{
    static const fgqa_kernel kernel = {.name = "fwd_test", .pass = FGQA_PASS_FWD, .device = FGQA_CUDA, .refuse = serve, .tile = tile, .run = run};
    *count = 1;
    return &kernel;
}

const fgqa_kernel *fgqa_cpu_kernels(int32_t *count)
{
    *count = 0;
    return NULL;
}

/* ---- a device ---- */

static int current = CURRENT, cannot_enter;

int fgqa_cuda_built(void) { return 1; }
const char *fgqa_cuda_reason(void) { return NULL; }

fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before)
{
    if (cannot_enter) { return fgqa_fail(FGQA_ERROR_RUNTIME, "no context"); }
    *before = current;
    current = device;
    return FGQA_OK;
}

void fgqa_cuda_leave(int32_t device, int32_t before)
{
    CHECK(device == current);
    current = before;
}

/* ---- XLA ---- */

enum { DEVICE = 1, STREAM = 2, ALLOCATE = 4, FREE = 8 };

static int refusals;            /* which of them XLA refuses */
static int errors;              /* made and not yet destroyed */
static char memory[1024], stream_of_xla;
static int64_t held;            /* bytes that are out */

static xla_error *answer(int question)
{
    if (!(refusals & question)) { return NULL; }
    errors++;
    snprintf(failure.message, sizeof failure.message, "no %d today", question);
    return &failure;
}

static void error_message(xla_error_message *args) { args->message = args->error->message; }
static void error_destroy(xla_error_destroy *args)
{
    CHECK(args->error == &failure);
    errors--;
    memset(failure.message, '#', sizeof failure.message - 1);
}

static xla_error *device_get(xla_device_get *args)
{
    args->ordinal = ORDINAL;
    return answer(DEVICE);
}

static xla_error *stream_get(xla_stream_get *args)
{
    args->stream = &stream_of_xla;
    return answer(STREAM);
}

static xla_error *memory_allocate(xla_memory_allocate *args)
{
    CHECK(args->alignment == 1 && current == ORDINAL);
    if (!(refusals & ALLOCATE)) {
        CHECK(args->bytes <= sizeof memory - 1);
        held += (int64_t)args->bytes;
        args->data = memory + 1;        /* aligned as little as XLA promises */
    }
    return answer(ALLOCATE);
}

static xla_error *memory_free(xla_memory_free *args)
{
    CHECK(args->data == memory + 1 && current == ORDINAL);
    held -= (int64_t)args->bytes;
    return answer(FREE);
}

static const xla_api gpu = {
    .size = sizeof gpu, .error_create = error_create, .error_message = error_message, .error_destroy = error_destroy,
    .stream_get = stream_get, .memory_allocate = memory_allocate, .memory_free = memory_free, .device_get = device_get,
};

/* ---- calls ---- */

static float q[4 * 3 * 2], k[2 * 5 * 2], v[2 * 5 * 2], out[4 * 3 * 2];

static xla_error *call(const xla_api *functions, size_t workspace, fgqa_status status, int refused)
{
    frame f;
    begin(&f, "q k v ", 3, 0, 0);
    IN(&f, q, 4, 3, 2); IN(&f, k, 2, 5, 2); IN(&f, v, 2, 5, 2); OUT(&f, out, 4, 3, 2);
    f.call.api = functions;
    wanted.workspace = workspace;
    wanted.status = status;
    refusals = refused;
    memset(&given, 0, sizeof given);
    xla_error *error = fgqa_xla_cuda(&f.call);
    CHECK(current == CURRENT && held == 0 && errors == 0);
    return error;
}

static void fails(size_t workspace, fgqa_status status, int refused, xla_code code, const char *words)
{
    CHECK(call(&gpu, workspace, status, refused) == &failure);
    CHECK_FOR(failure.code == code && strcmp(failure.message, words) == 0, "%d: %s", failure.code, failure.message);
}

static void test_what_the_kernel_is_given(void)
{
    CHECK(call(&gpu, 0, FGQA_OK, 0) == NULL && runs == 1 && given.stream == &stream_of_xla && given.workspace == NULL);
    CHECK(call(&gpu, 500, FGQA_OK, 0) == NULL && runs == 1 && given.stream == &stream_of_xla);
    CHECK((uintptr_t)given.workspace % 256 == 0 && given.workspace > memory && given.workspace + 500 <= memory + sizeof memory);
}

static void test_what_xla_refuses(void)
{
    fails(0, FGQA_OK, DEVICE, XLA_INTERNAL, "XLA gave no device: no 1 today");
    CHECK(runs == 0);
    fails(0, FGQA_OK, STREAM, XLA_INTERNAL, "XLA gave no stream: no 2 today");
    CHECK(runs == 0);
    fails(500, FGQA_OK, ALLOCATE, XLA_RESOURCE_EXHAUSTED, "XLA gave no scratch memory: no 4 today");
    CHECK(runs == 0);
    fails(500, FGQA_OK, FREE, XLA_INTERNAL, "XLA gave no way to free scratch memory: no 8 today");
    CHECK(runs == 1);
}

static void test_what_the_device_refuses(void)
{
    fails(0, FGQA_ERROR_RUNTIME, 0, XLA_INTERNAL, "the launch failed");
    fails(500, FGQA_ERROR_RUNTIME, 0, XLA_INTERNAL, "the launch failed");
    CHECK(runs == 1);
    cannot_enter = 1;
    fails(500, FGQA_OK, 0, XLA_INTERNAL, "no context");
    cannot_enter = 0;
    CHECK(runs == 0);
}

static void test_the_first_of_two_failures_is_told(void)
{
    fails(500, FGQA_ERROR_NOT_IMPLEMENTED, FREE, XLA_UNIMPLEMENTED, "the launch failed");
}

static void test_an_interface_without_devices(void)
{
    xla_api old = gpu;
    old.size = offsetof(xla_api, device_get);
    CHECK(call(&old, 0, FGQA_OK, 0) == &failure && failure.code == XLA_UNIMPLEMENTED && runs == 0);
    CHECK(strstr(failure.message, "this jaxlib does not say on which device a call runs; update it") != NULL);
}

int main(void)
{
    test_what_the_kernel_is_given();
    test_what_xla_refuses();
    test_what_the_device_refuses();
    test_the_first_of_two_failures_is_told();
    test_an_interface_without_devices();
    return checks_passed("test_xla_cuda");
}
