/* gather.cu - a strided tensor into contiguous memory, for arguments that no kernel reads in place. One thread an element. */
#include "gather.h"

#include "../common/launch.cuh"

static constexpr int THREADS = 256;

struct gather_shape { int64_t extent[FGQA_MAX_DIMS], stride[FGQA_MAX_DIMS], count; };

template <typename T> static __global__ void __launch_bounds__(THREADS)
gather_kernel(const T *from, T *to, const __grid_constant__ gather_shape shape)
{
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x; n < shape.count; n += step) {
        int64_t rest = n, offset = 0;
#pragma unroll
        for (int axis = FGQA_MAX_DIMS - 1; axis >= 0; axis--) {
            offset += rest % shape.extent[axis] * shape.stride[axis];
            rest /= shape.extent[axis];
        }
        to[n] = from[offset];
    }
}

template <typename T> static cudaError_t gather(const fgqa_tensor *from, void *to, const gather_shape &shape, cudaStream_t stream)
{
    const int64_t blocks = (shape.count + THREADS - 1) / THREADS;
    return launch_kernel(gather_kernel<T>, (uint32_t)(blocks < 65536 ? blocks : 65536), THREADS, 0, stream, (const T *)from->data, (T *)to, shape);
}

extern "C" int fgqa_gather(const fgqa_tensor *from, void *to, void *stream)
{
    gather_shape shape = {{1, 1, 1, 1}, {0, 0, 0, 0}, 1};
    for (int axis = 0; axis < from->ndim; axis++) {
        shape.extent[FGQA_MAX_DIMS - from->ndim + axis] = from->shape[axis];
        shape.stride[FGQA_MAX_DIMS - from->ndim + axis] = from->stride[axis];
        shape.count *= from->shape[axis];
    }
    if (shape.count == 0) { return cudaSuccess; }
    switch (from->dtype) {
    case FGQA_F64: case FGQA_I64:  return gather<int64_t>(from, to, shape, (cudaStream_t)stream);
    case FGQA_F32: case FGQA_I32:  return gather<int32_t>(from, to, shape, (cudaStream_t)stream);
    case FGQA_F16: case FGQA_BF16: return gather<int16_t>(from, to, shape, (cudaStream_t)stream);
    default:                       return cudaErrorInvalidValue;       /* bytes, for which fgqa_needs_copy() asks for no copy */
    }
}
