/* ptx_ldmatrix.cuh - ldmatrix, one instruction per function. Four 8x8 matrices of 16-bit elements (or 8x4 of 32-bit ones);
 * lane l gives the shared address of row l % 8 of matrix l / 8, and receives in r[m] the elements (l / 4, 2 (l % 4) + {0, 1})
 * of matrix m; with trans, the elements (2 (l % 4) + {0, 1}, l / 4).
 * PTX ISA, "Warp-level matrix load instruction: ldmatrix".
 */
#pragma once
#include <stdint.h>

static __device__ __forceinline__ uint32_t smem_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

static __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
