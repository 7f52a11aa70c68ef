/* tensor_map.c - TMA descriptors. They are made anew for every launch (about a microsecond for all) and passed as kernel parameters. */
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

typedef CUresult encoder(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                         const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/* Threads that race find the same. */
static encoder *find_encoder(void)
{
    static encoder *found;
    if (found == NULL) {
        enum cudaDriverEntryPointQueryResult result;
        void *entry = NULL;
#if CUDART_VERSION >= 12050
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
        if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) { return NULL; }
        found = (encoder *)entry;
    }
    return found;
}

/* Extents and strides (bytes) of head, row and batch. An axis of extent 1 has no stride of its own: any valid one will do. */
typedef struct { int64_t extent[3], stride[3]; } axes;

static axes axes_of(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *view = &p->view[arg];
    const int keys = arg == FGQA_ARG_k || arg == FGQA_ARG_v;
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(keys ? view->dtype : p->dtype), rows = p->varlen ? (keys ? p->total_k : p->total_q) : keys ? p->sk : p->sq;
    axes a = {{keys ? p->hk : p->hq, keys && p->cache.page_size ? p->cache.page_size : rows,
               keys && p->cache.page_size ? p->cache.pages : p->varlen ? 1 : p->b}, {bytes * view->stride_h, bytes * view->stride_s, bytes * view->stride_b}};
    for (int n = 0; n < 3; n++) {
        if (a.extent[n] == 1) { a.stride[n] = 512; }
    }
    return a;
}

const char *fgqa_tensor_map_refuse(const fgqa_problem *p, fgqa_arg arg)
{
    const axes a = axes_of(p, arg);
    if ((uintptr_t)p->view[arg].data % 16 != 0) { return "rows must start on 16 bytes"; }
    for (int n = 0; n < 3; n++) {
        if (a.extent[n] < 1) { return "a tensor is empty"; }
        if (a.extent[n] > INT32_MAX / 2) { return "TMA counts rows in 31 bits"; }
        if (a.stride[n] % 16 != 0) { return "rows must start on 16 bytes"; }
        if (a.stride[n] <= 0 || a.stride[n] >= (int64_t)1 << 40) { return "TMA takes strides above 0 and below 2^40 bytes"; }
    }
    return NULL;
}

int fgqa_tensor_map(void *map, const fgqa_problem *p, fgqa_arg arg, fgqa_map_box box)
{
    encoder *const encode = find_encoder();
    const axes a = axes_of(p, arg);
    const cuuint64_t columns = (cuuint64_t)(arg == FGQA_ARG_q || arg == FGQA_ARG_k ? p->d : p->dv);
    const cuuint64_t dims[4] = {columns, (cuuint64_t)a.extent[0], (cuuint64_t)a.extent[1], (cuuint64_t)a.extent[2]};
    const cuuint64_t strides[3] = {(cuuint64_t)a.stride[0], (cuuint64_t)a.stride[1], (cuuint64_t)a.stride[2]};
    const cuuint32_t extent[4] = {(cuuint32_t)box.columns, (cuuint32_t)box.heads, (cuuint32_t)box.rows, 1}, step[4] = {1, 1, 1, 1};
    if (encode == NULL) { return cudaErrorInsufficientDriver; }
    const CUresult result = encode((CUtensorMap *)map, p->dtype == FGQA_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
                                   p->view[arg].data, dims, strides, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

int fgqa_cache_map(void *map, const fgqa_problem *p, fgqa_arg arg, int32_t rows, int32_t chunks)
{
    encoder *const encode = find_encoder();
    const axes a = axes_of(p, arg);
    const cuuint64_t columns = (cuuint64_t)(arg == FGQA_ARG_k ? p->d : p->dv);
    const fgqa_dtype dtype = p->view[arg].dtype;
    const uint32_t wide = 128 / (uint32_t)fgqa_dtype_bytes(dtype);
    const CUtensorMapDataType element = dtype == FGQA_F8E4M3 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
        : dtype == FGQA_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const cuuint64_t dims[5] = {chunks > 1 ? wide : columns, (cuuint64_t)a.extent[1], (cuuint64_t)chunks, (cuuint64_t)a.extent[0], (cuuint64_t)a.extent[2]};
    const cuuint64_t strides[4] = {(cuuint64_t)a.stride[1], 128, (cuuint64_t)a.stride[0], (cuuint64_t)a.stride[2]};
    const cuuint32_t extent[5] = {wide, (cuuint32_t)rows, (cuuint32_t)chunks, 1, 1}, step[5] = {1, 1, 1, 1, 1};
    if (encode == NULL) { return cudaErrorInsufficientDriver; }
    /* promotion to 256 bytes makes these reads 10% slower */
    const CUresult result = encode((CUtensorMap *)map, element, 5, p->view[arg].data, dims, strides, extent, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
