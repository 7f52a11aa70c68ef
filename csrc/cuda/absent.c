/* absent.c - the CUDA backend of a build without CUDA kernels: no kernel, no device, and the reason. */
#include "device.h"

/* From setup.py: what it lacked to build them. */
#ifndef FGQA_CUDA_REASON
#define FGQA_CUDA_REASON "built without CUDA"
#endif

static fgqa_status fail(void) { return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "this build has no CUDA kernels (%s)", FGQA_CUDA_REASON); }

int fgqa_cuda_built(void) { return 0; }
const char *fgqa_cuda_reason(void) { return FGQA_CUDA_REASON; }
int32_t fgqa_cuda_device_count(void) { return 0; }
int fgqa_cuda_capturing(void *stream) { (void)stream; return 0; }

const fgqa_kernel *fgqa_cuda_kernels(int32_t *count)
{
    *count = 0;
    return NULL;
}

void fgqa_cuda_versions(int32_t *runtime, int32_t *driver) { *runtime = *driver = 0; }

fgqa_status fgqa_cuda_device_text(int32_t device, char text[192])
{
    (void)device;
    text[0] = '\0';
    return fail();
}

const char *fgqa_cuda_refuse(const fgqa_kernel *kernel, int32_t device, char why[128])
{
    (void)kernel;
    (void)device;
    (void)why;
    return FGQA_CUDA_REASON;
}

int fgqa_cuda_any_order(const fgqa_plan *plan, const fgqa_problem *problem)
{
    (void)plan;
    (void)problem;
    return 0;
}

int32_t fgqa_cuda_shared_memory(const fgqa_kernel *kernel)
{
    (void)kernel;
    return 0;
}

fgqa_status fgqa_cuda_enter(int32_t device, int32_t *before)
{
    (void)device;
    (void)before;
    return fail();
}

void fgqa_cuda_leave(int32_t device, int32_t before)
{
    (void)device;
    (void)before;
}

fgqa_status fgqa_cuda_allocate(size_t bytes, void *stream, void **memory)
{
    (void)bytes;
    (void)stream;
    *memory = NULL;
    return fail();
}

void fgqa_cuda_free(void *memory, void *stream)
{
    (void)memory;
    (void)stream;
}

fgqa_status fgqa_cuda_copy(void *to, const void *from, size_t bytes, void *stream)
{
    (void)to;
    (void)from;
    (void)bytes;
    (void)stream;
    return fail();
}

fgqa_status fgqa_cuda_gather(const fgqa_tensor *from, void *to, void *stream)
{
    (void)from;
    (void)to;
    (void)stream;
    return fail();
}

fgqa_status fgqa_cuda_synchronize(void *stream)
{
    (void)stream;
    return fail();
}

fgqa_status fgqa_cuda_warmup(int32_t device)
{
    (void)device;
    return fail();
}

fgqa_status fgqa_cuda_memory_new(size_t bytes, int32_t device, void *stream, fgqa_cuda_memory **memory, void **data)
{
    (void)bytes;
    (void)device;
    (void)stream;
    (void)memory;
    (void)data;
    return fail();
}

fgqa_status fgqa_cuda_memory_filled(fgqa_cuda_memory *memory)
{
    (void)memory;
    return fail();
}

fgqa_status fgqa_cuda_memory_wait(const fgqa_cuda_memory *memory, void *stream)
{
    (void)memory;
    (void)stream;
    return fail();
}

void fgqa_cuda_memory_share(fgqa_cuda_memory *memory) { (void)memory; }
void fgqa_cuda_memory_drop(fgqa_cuda_memory *memory) { (void)memory; }

fgqa_status fgqa_cuda_staging_begin(int32_t device, void *stream, fgqa_cuda_staging **staging)
{
    (void)device;
    (void)stream;
    (void)staging;
    return fail();
}

fgqa_status fgqa_cuda_staging_upload(fgqa_cuda_staging *staging, const fgqa_tensor *from, void *to)
{
    (void)staging;
    (void)from;
    (void)to;
    return fail();
}

fgqa_status fgqa_cuda_staging_download(fgqa_cuda_staging *staging, int32_t part, const fgqa_tensor *to, const void *from)
{
    (void)staging;
    (void)part;
    (void)to;
    (void)from;
    return fail();
}

fgqa_status fgqa_cuda_staging_computed(fgqa_cuda_staging *staging, int32_t part)
{
    (void)staging;
    (void)part;
    return fail();
}

fgqa_status fgqa_cuda_staging_uploaded(fgqa_cuda_staging *staging)
{
    (void)staging;
    return fail();
}

fgqa_status fgqa_cuda_staging_end(fgqa_cuda_staging *staging)
{
    (void)staging;
    return fail();
}

fgqa_status fgqa_cuda_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse,
                            const int64_t shape[4], void *stream)
{
    (void)n;
    (void)outs;
    (void)lses;
    (void)out;
    (void)lse;
    (void)shape;
    (void)stream;
    return fail();
}

fgqa_status fgqa_cuda_check_cache(const fgqa_problem *problem, void *memory, int *sound, void *stream)
{
    (void)problem;
    (void)memory;
    (void)sound;
    (void)stream;
    return fail();
}

fgqa_status fgqa_cuda_append(const fgqa_problem *problem, const fgqa_view *q_turned, void *stream)
{
    (void)problem;
    (void)q_turned;
    (void)stream;
    return fail();
}
