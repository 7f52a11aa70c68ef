/* mask_tensor.cuh - what a mask tensor says of one score. Where many are asked for, a lane keeps the address of its row
 * (mask_tile.cuh). */
#pragma once
#include "params.cuh"

/* Whether row i of query head h may see key j: all may where there is no mask. */
static __device__ __forceinline__ bool mask_shows(const fgqa_problem &p, int32_t b, int32_t h, int32_t i, int32_t j)
{
    const fgqa_view &mask = p.view[FGQA_ARG_mask];
    return !mask.data || *(fgqa_row_address(mask, 1, b, h, i) + j * mask.stride_d);
}
