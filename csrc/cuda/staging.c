/* staging.c - arrays of the host to a GPU and back through page-locked memory. Copies to and from it run beside the kernels and
 * beside the host, which meanwhile packs the next piece or unpacks the one before.
 *
 * A device has one set of slots and streams, made when first needed and kept; one call at a time uses it.
 */
#include "device.h"

#include <cuda_runtime_api.h>
#include <pthread.h>
#include <string.h>

enum { MAX_DEVICES = 64, SLOTS = 4, SLOT_BYTES = 2 << 20, PARTS = 2 };

typedef struct { char *memory; cudaEvent_t done; } slot;

/* One direction: its stream, and the slots that are used in turn. */
typedef struct { cudaStream_t stream; slot slots[SLOTS]; uint64_t used; } lane;

struct fgqa_cuda_staging {
    pthread_mutex_t mutex;
    int ready;
    lane up, down;
    cudaEvent_t begun, uploaded, computed[PARTS];
    cudaStream_t compute;          /* of the call */
};

static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

static fgqa_status make_event(cudaEvent_t *event)
{
    return fgqa_cuda_check(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
}

static fgqa_status make_lane(lane *l)
{
    FGQA_TRY(fgqa_cuda_check(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags"));
    FGQA_TRY(fgqa_cuda_check(cudaHostAlloc((void **)&l->slots[0].memory, (size_t)SLOTS * SLOT_BYTES, cudaHostAllocPortable), "cudaHostAlloc"));
    for (int n = 0; n < SLOTS; n++) {
        l->slots[n].memory = l->slots[0].memory + (size_t)n * SLOT_BYTES;
        FGQA_TRY(make_event(&l->slots[n].done));
    }
    return FGQA_OK;
}

static fgqa_status make(fgqa_cuda_staging *s)
{
    FGQA_TRY(make_lane(&s->up));
    FGQA_TRY(make_lane(&s->down));
    FGQA_TRY(make_event(&s->begun));
    FGQA_TRY(make_event(&s->uploaded));
    for (int n = 0; n < PARTS; n++) { FGQA_TRY(make_event(&s->computed[n])); }
    s->ready = 1;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_staging_begin(int32_t device, void *stream, fgqa_cuda_staging **staging)
{
    static fgqa_cuda_staging *all;
    static fgqa_cuda_staging devices[MAX_DEVICES];
    pthread_mutex_lock(&making);
    if (all == NULL) {
        for (int n = 0; n < MAX_DEVICES; n++) { pthread_mutex_init(&devices[n].mutex, NULL); }
        all = devices;
    }
    pthread_mutex_unlock(&making);
    fgqa_cuda_staging *s = &devices[device];
    pthread_mutex_lock(&s->mutex);
    s->compute = stream;
    fgqa_status status = s->ready ? FGQA_OK : make(s);
    /* Device memory that the stream has allocated is there for the copies only once the stream has come so far. */
    if (status == FGQA_OK) { status = fgqa_cuda_check(cudaEventRecord(s->begun, s->compute), "cudaEventRecord"); }
    if (status == FGQA_OK) { status = fgqa_cuda_check(cudaStreamWaitEvent(s->up.stream, s->begun, 0), "cudaStreamWaitEvent"); }
    if (status != FGQA_OK) {
        pthread_mutex_unlock(&s->mutex);
        return status;
    }
    *staging = s;
    return FGQA_OK;
}

fgqa_status fgqa_cuda_staging_end(fgqa_cuda_staging *s)
{
    /* Nothing of a failed call may still run when its memory is freed. */
    const cudaError_t up = cudaStreamSynchronize(s->up.stream), down = cudaStreamSynchronize(s->down.stream), compute = cudaStreamSynchronize(s->compute);
    pthread_mutex_unlock(&s->mutex);
    return fgqa_cuda_check(up ? up : down ? down : compute, "cudaStreamSynchronize");
}

/* ---- between strided and packed memory ---- */

/* Trailing elements that lie side by side. */
static int64_t run_of(const fgqa_tensor *t, int32_t *outer)
{
    int64_t run = 1;
    int32_t axis = t->ndim - 1;
    for (; axis >= 0 && (t->shape[axis] == 1 || t->stride[axis] == run); axis--) { run *= t->shape[axis]; }
    *outer = axis + 1;
    return run;
}

/* Elements [first, first + count) in the order of their indices, into or out of `packed`. */
static void copy_range(const fgqa_tensor *t, int64_t first, int64_t count, char *packed, int unpack)
{
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(t->dtype);
    int32_t outer;
    const int64_t run = run_of(t, &outer);
    while (count > 0) {
        const int64_t inside = first % run, n = run - inside < count ? run - inside : count;
        int64_t rest = first / run, offset = inside;
        for (int32_t axis = outer - 1; axis >= 0; axis--) {
            offset += rest % t->shape[axis] * t->stride[axis];
            rest /= t->shape[axis];
        }
        char *at = (char *)t->data + offset * bytes;
        memcpy(unpack ? at : packed, unpack ? packed : at, (size_t)(n * bytes));
        packed += n * bytes;
        first += n;
        count -= n;
    }
}

static int64_t elements_of(const fgqa_tensor *t)
{
    int64_t count = 1;
    for (int32_t axis = 0; axis < t->ndim; axis++) { count *= t->shape[axis]; }
    return count;
}

/* ---- copies ---- */

fgqa_status fgqa_cuda_staging_upload(fgqa_cuda_staging *s, const fgqa_tensor *from, void *to)
{
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(from->dtype), total = elements_of(from), most = SLOT_BYTES / bytes;
    for (int64_t first = 0; first < total; first += most) {
        const int64_t count = total - first < most ? total - first : most;
        const slot *place = &s->up.slots[s->up.used++ % SLOTS];
        FGQA_TRY(fgqa_cuda_check(cudaEventSynchronize(place->done), "cudaEventSynchronize"));
        copy_range(from, first, count, place->memory, 0);
        FGQA_TRY(fgqa_cuda_copy((char *)to + first * bytes, place->memory, (size_t)(count * bytes), s->up.stream));
        FGQA_TRY(fgqa_cuda_check(cudaEventRecord(place->done, s->up.stream), "cudaEventRecord"));
    }
    return FGQA_OK;
}

fgqa_status fgqa_cuda_staging_uploaded(fgqa_cuda_staging *s)
{
    FGQA_TRY(fgqa_cuda_check(cudaEventRecord(s->uploaded, s->up.stream), "cudaEventRecord"));
    return fgqa_cuda_check(cudaStreamWaitEvent(s->compute, s->uploaded, 0), "cudaStreamWaitEvent");
}

fgqa_status fgqa_cuda_staging_computed(fgqa_cuda_staging *s, int32_t part)
{
    return fgqa_cuda_check(cudaEventRecord(s->computed[part % PARTS], s->compute), "cudaEventRecord");
}

/* A chunk under way to the host. */
typedef struct { int64_t first, count; const slot *place; } chunk;

static fgqa_status land(const fgqa_tensor *to, const chunk *c)
{
    FGQA_TRY(fgqa_cuda_check(cudaEventSynchronize(c->place->done), "cudaEventSynchronize"));
    copy_range(to, c->first, c->count, c->place->memory, 1);
    return FGQA_OK;
}

fgqa_status fgqa_cuda_staging_download(fgqa_cuda_staging *s, int32_t part, const fgqa_tensor *to, const void *from)
{
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(to->dtype), total = elements_of(to), most = SLOT_BYTES / bytes;
    const int64_t chunks = (total + most - 1) / most;
    chunk flying[SLOTS];
    FGQA_TRY(fgqa_cuda_check(cudaStreamWaitEvent(s->down.stream, s->computed[part % PARTS], 0), "cudaStreamWaitEvent"));
    for (int64_t n = 0; n < chunks + SLOTS - 1; n++) {
        if (n < chunks) {
            chunk *c = &flying[n % SLOTS];
            *c = (chunk){n * most, total - n * most < most ? total - n * most : most, &s->down.slots[n % SLOTS]};
            FGQA_TRY(fgqa_cuda_copy(c->place->memory, (const char *)from + c->first * bytes, (size_t)(c->count * bytes), s->down.stream));
            FGQA_TRY(fgqa_cuda_check(cudaEventRecord(c->place->done, s->down.stream), "cudaEventRecord"));
        }
        const int64_t oldest = n - (SLOTS - 1);
        if (oldest >= 0 && oldest < chunks) { FGQA_TRY(land(to, &flying[oldest % SLOTS])); }
    }
    return FGQA_OK;
}
