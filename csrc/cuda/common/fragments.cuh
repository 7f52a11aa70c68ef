/* fragments.cuh - which (row, column) register r of a lane holds in the operands of mma.sync.
 *
 *                  rows x columns   registers                 row                       column
 *   accumulator    m16 x n8         4 float32                 lane/4 + 8 (r/2)          2 (lane%4) + r%2
 *   A, 16 bit      m16 x k16        4 pairs                   lane/4 + 8 (r%2)          2 (lane%4) + 8 (r/2) + {0, 1}
 *   B, 16 bit      k16 x n8         2 pairs (column major)    2 (lane%4) + 8 r + {0,1}  lane/4
 *   A, tf32        m16 x k8         4                         lane/4 + 8 (r%2)          lane%4 + 4 (r/2)
 *   B, tf32        k8 x n8          2                         lane%4 + 4 r              lane/4
 *
 * Two accumulators side by side, packed pairwise in order, are the A operand of a k16 step: {0,1} {2,3} {4,5} {6,7} of the
 * registers of columns 0-7 and 8-15. In tf32 one accumulator {0, 2, 1, 3} is the A operand of a k8 step whose k order is
 * 0 2 4 6 1 3 5 7: B must come in that order too.
 */
#pragma once
#include <stdint.h>

/* threadIdx.x, read anew each time: addresses derived from it are then computed where they are used, instead of being kept in
 * registers across loops that have none to spare. */
static __device__ __forceinline__ uint32_t thread_index()
{
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

static __device__ __forceinline__ int fragment_row(int lane, int r) { return lane / 4 + 8 * (r / 2); }
static __device__ __forceinline__ int fragment_column(int lane, int r) { return 2 * (lane % 4) + r % 2; }

/* Reductions over the four lanes that hold one row of an accumulator: bit-equal in all four. */
static __device__ __forceinline__ float row_reduce_max(float x)
{
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}

static __device__ __forceinline__ float row_reduce_sum(float x)
{
    x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}
