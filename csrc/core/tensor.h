/* tensor.h - what the core knows of an array: pointer, dtype, shape, strides, device. No ownership. */
#ifndef FGQA_TENSOR_H
#define FGQA_TENSOR_H
#include <stddef.h>
#include <stdint.h>

#define FGQA_MAX_DIMS 4

typedef enum {
    FGQA_F64, FGQA_F32, FGQA_F16, FGQA_BF16,   /* q, k, v, bias, sink, results */
    FGQA_F8E4M3,                               /* KV caches */
    FGQA_BOOL, FGQA_I32, FGQA_I64,             /* masks; lengths and offsets; seeds and rows */
    FGQA_DTYPE_COUNT
} fgqa_dtype;

typedef enum { FGQA_CPU, FGQA_CUDA } fgqa_device_type;

typedef struct { fgqa_device_type type; int32_t index; } fgqa_device;

typedef struct {
    void *data;
    fgqa_dtype dtype;
    fgqa_device device;
    int32_t ndim;
    int32_t readonly;                  /* never written, never accepted as out= */
    int64_t shape[FGQA_MAX_DIMS];
    int64_t stride[FGQA_MAX_DIMS];     /* in elements; may be 0 or negative */
} fgqa_tensor;

/* Bytes of one element. */
size_t fgqa_dtype_bytes(fgqa_dtype dtype);
/* "float32", "bfloat16", "bool", ... */
const char *fgqa_dtype_name(fgqa_dtype dtype);
/* Whether two arrays share a byte; decided on the address spans of their elements (conservative for
 * interleaved strided views: a span overlap counts as overlap). */
int fgqa_tensors_overlap(const fgqa_tensor *a, const fgqa_tensor *b);

#endif
