/* tensor_map.c - TMA descriptors, passed as kernel parameters. The last one of each tensor is kept in each thread: where only the
 * address differs, as from one call of a model to the next, the driver replaces that in a fifth of the time.
 */
#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

typedef CUresult encoder(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                         const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
typedef CUresult replacer(CUtensorMap *, void *);

static void *find_entry(const char *name)
{
    enum cudaDriverEntryPointQueryResult result;
    void *entry = NULL;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &result);
#endif
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? entry : NULL;
}

/* Everything that a map says but the address. Without padding that is not zero: compared as bytes. */
typedef struct {
    cuuint64_t dims[5], strides[4];
    cuuint32_t extent[5];
    cuuint32_t rank, dtype, promotion;
} map_form;

/* threads that race find the same functions */
static int make_map(CUtensorMap *map, const map_form *form, void *address)
{
    static encoder *encode;
    static const cuuint32_t step[5] = {1, 1, 1, 1, 1};
    if (encode == NULL) { encode = (encoder *)find_entry("cuTensorMapEncodeTiled"); }
    if (encode == NULL) { return cudaErrorInsufficientDriver; }
    const CUresult result = encode(map, (CUtensorMapDataType)form->dtype, form->rank, address, form->dims, form->strides, form->extent, step,
                                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, (CUtensorMapL2promotion)form->promotion,
                                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

static int replace_address(CUtensorMap *map, void *address)
{
    static replacer *replace;
    if (replace == NULL) { replace = (replacer *)find_entry("cuTensorMapReplaceAddress"); }
    return replace != NULL && replace(map, address) == CUDA_SUCCESS;
}

static int place_of(fgqa_arg arg)
{
    switch (arg) {
    case FGQA_ARG_out: return 3;
    case FGQA_ARG_dout: return 4;
    case FGQA_ARG_bias: return 5;
    case FGQA_ARG_mask: return 6;
    case FGQA_ARG_dbias: return 7;
    default: return (int)arg - FGQA_ARG_q;
    }
}

static int keep_map(void *map, const fgqa_problem *p, fgqa_arg arg, const map_form *form)
{
    /* q, k, v, out, dout, bias, mask, dbias of either pass */
    static _Thread_local struct { CUtensorMap map; map_form form; void *address; } kept[2][8];
    const int pass = p->pass == FGQA_PASS_BWD, place = place_of(arg);
    void *address = p->view[arg].data;
    CUtensorMap *known = &kept[pass][place].map;
    if (memcmp(&kept[pass][place].form, form, sizeof *form) != 0 || (kept[pass][place].address != address && !replace_address(known, address))) {
        memset(&kept[pass][place].form, 0, sizeof *form);      /* of no map, should this fail */
        const int error = make_map(known, form, address);
        if (error != cudaSuccess) { return error; }
        kept[pass][place].form = *form;
    }
    kept[pass][place].address = address;
    memcpy(map, known, sizeof *known);
    return cudaSuccess;
}

/* Extents and strides (bytes) of head, row and batch. An axis of extent 1 has no stride of its own: any valid one will do. */
typedef struct { int64_t extent[3], stride[3]; } axes;

static axes axes_of(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *view = &p->view[arg];
    const int keys = arg == FGQA_ARG_k || arg == FGQA_ARG_v, bias = arg == FGQA_ARG_bias || arg == FGQA_ARG_dbias;
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(keys || bias ? view->dtype : p->dtype), rows = p->varlen && !bias ? (keys ? p->total_k : p->total_q) : keys ? p->sk : p->sq;
    axes a = {{keys ? p->hk : p->hq, keys && p->cache.page_size ? p->cache.page_size : rows,
               keys && p->cache.page_size ? p->cache.pages : p->varlen && !bias ? 1 : p->b}, {bytes * view->stride_h, bytes * view->stride_s, bytes * view->stride_b}};
    for (int n = 0; n < 3; n++) {
        if (a.extent[n] == 1) { a.stride[n] = 512; }
    }
    return a;
}

static const char *refuse_axes(axes a, const void *address)
{
    if ((uintptr_t)address % 16 != 0) { return "rows must start on 16 bytes"; }
    for (int n = 0; n < 3; n++) {
        if (a.extent[n] < 1) { return "a tensor is empty"; }
        if (a.extent[n] > INT32_MAX / 2) { return "TMA counts rows in 31 bits"; }
        if (a.stride[n] % 16 != 0) { return "rows must start on 16 bytes"; }
        if (a.stride[n] < 0 || a.stride[n] >= (int64_t)1 << 40) { return "TMA takes strides from 0 to 2^40 bytes"; }
    }
    return NULL;
}

const char *fgqa_tensor_map_refuse(const fgqa_problem *p, fgqa_arg arg) { return refuse_axes(axes_of(p, arg), p->view[arg].data); }

/* Of a bias or a mask. An axis that is broadcast has stride 0. */
static axes term_axes(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *view = &p->view[arg];
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(view->dtype);
    axes a = {{p->hq, p->sq, p->b}, {bytes * view->stride_h, bytes * view->stride_s, bytes * view->stride_b}};
    for (int n = 0; n < 3; n++) {
        if (a.stride[n] == 0) { a.extent[n] = 1; a.stride[n] = 512; }
    }
    return a;
}

const char *fgqa_term_map_refuse(const fgqa_problem *p, fgqa_arg arg)
{
    return p->view[arg].stride_d != 1 ? "keys must be next to each other" : refuse_axes(term_axes(p, arg), p->view[arg].data);
}

static cuuint32_t type_of(fgqa_dtype dtype)
{
    return fgqa_dtype_bytes(dtype) == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : dtype == FGQA_F32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
         : dtype == FGQA_F16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

static int make_form(void *map, const fgqa_problem *p, fgqa_arg arg, axes a, cuuint64_t columns, fgqa_map_box box, fgqa_dtype dtype)
{
    const map_form form = {
        .dims = {columns, (cuuint64_t)a.extent[0], (cuuint64_t)a.extent[1], (cuuint64_t)a.extent[2]},
        .strides = {(cuuint64_t)a.stride[0], (cuuint64_t)a.stride[1], (cuuint64_t)a.stride[2]},
        .extent = {(cuuint32_t)box.columns, (cuuint32_t)box.heads, (cuuint32_t)box.rows, 1},
        .rank = 4, .dtype = type_of(dtype), .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
    };
    return keep_map(map, p, arg, &form);
}

int fgqa_tensor_map(void *map, const fgqa_problem *p, fgqa_arg arg, fgqa_map_box box)
{
    const int bias = arg == FGQA_ARG_bias || arg == FGQA_ARG_dbias;
    const int64_t columns = bias ? p->sk : arg == FGQA_ARG_q || arg == FGQA_ARG_k ? p->d : p->dv;
    return make_form(map, p, arg, axes_of(p, arg), (cuuint64_t)columns, box, bias ? p->view[arg].dtype : p->dtype);
}

int fgqa_term_map(void *map, const fgqa_problem *p, fgqa_arg arg, fgqa_map_box box)
{
    return make_form(map, p, arg, term_axes(p, arg), (cuuint64_t)p->sk, box, p->view[arg].dtype);
}

int fgqa_cache_map(void *map, const fgqa_problem *p, fgqa_arg arg, int32_t rows, int32_t chunks)
{
    const axes a = axes_of(p, arg);
    const cuuint64_t columns = (cuuint64_t)(arg == FGQA_ARG_k ? p->d : p->dv);
    const fgqa_dtype dtype = p->view[arg].dtype;
    const cuuint32_t wide = 128 / (cuuint32_t)fgqa_dtype_bytes(dtype);
    const map_form form = {
        .dims = {chunks > 1 ? wide : columns, (cuuint64_t)a.extent[1], (cuuint64_t)chunks, (cuuint64_t)a.extent[0], (cuuint64_t)a.extent[2]},
        .strides = {(cuuint64_t)a.stride[1], 128, (cuuint64_t)a.stride[0], (cuuint64_t)a.stride[2]},
        .extent = {wide, (cuuint32_t)rows, (cuuint32_t)chunks, 1, 1},
        .rank = 5, .dtype = type_of(dtype), .promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B,      /* 256 bytes make these reads 10% slower */
    };
    return keep_map(map, p, arg, &form);
}
