/* tensor.c - dtypes and memory spans. */
#include "tensor.h"

size_t fgqa_dtype_bytes(fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F64: case FGQA_I64:  return 8;
    case FGQA_F32: case FGQA_I32:  return 4;
    case FGQA_F16: case FGQA_BF16: return 2;
    case FGQA_F8E4M3: case FGQA_BOOL: return 1;
    case FGQA_DTYPE_COUNT: break;
    }
    return 0;
}

const char *fgqa_dtype_name(fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F64:    return "float64";
    case FGQA_F32:    return "float32";
    case FGQA_F16:    return "float16";
    case FGQA_BF16:   return "bfloat16";
    case FGQA_F8E4M3: return "float8_e4m3";
    case FGQA_BOOL:   return "bool";
    case FGQA_I32:    return "int32";
    case FGQA_I64:    return "int64";
    case FGQA_DTYPE_COUNT: break;
    }
    return "unknown";
}

/* First byte and one past the last byte of the elements; begin == end when there are none. The problem's checks have
 * already established that the span fits the address space. */
static void byte_span(const fgqa_tensor *t, uintptr_t *begin, uintptr_t *end)
{
    const int64_t bytes = (int64_t)fgqa_dtype_bytes(t->dtype);
    int64_t first = 0, last = 0;
    *begin = *end = (uintptr_t)t->data;
    for (int32_t axis = 0; axis < t->ndim; axis++) {
        if (t->shape[axis] == 0) { return; }
        const int64_t reach = (t->shape[axis] - 1) * t->stride[axis];
        if (reach < 0) { first += reach; } else { last += reach; }
    }
    *begin += (uintptr_t)(first * bytes);
    *end += (uintptr_t)((last + 1) * bytes);
}

int fgqa_tensors_overlap(const fgqa_tensor *a, const fgqa_tensor *b)
{
    uintptr_t a_begin, a_end, b_begin, b_end;
    if (a->device.type != b->device.type || a->device.index != b->device.index) { return 0; }
    byte_span(a, &a_begin, &a_end);
    byte_span(b, &b_begin, &b_end);
    return a_begin < a_end && b_begin < b_end && a_begin < b_end && b_begin < a_end;
}
