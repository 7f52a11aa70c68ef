/* bwd_wgmma.cuh - the forms of wgmma that only the backward pass needs (ptx_wgmma.cuh): D[64 x 64] (+)= A B, both from shared
 * memory, each K-major or (TRANSPOSED) MN-major.
 */
#pragma once
#include "../common/ptx_wgmma.cuh"

#define PTX_OUT8(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3]), "=f"(d[i + 4]), "=f"(d[i + 5]), "=f"(d[i + 6]), "=f"(d[i + 7])

/* Overwrites D, which is an output only: as an input, of undefined value, it would make ptxas wait for the wgmmas in flight. */
template <int TRANSPOSED, int B_TRANSPOSED> PTX_FN void wgmma64_first(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, 0, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." PTX_WGMMA_TYPE " {" PTX_R64 "}, %32, %33, p, 1, 1, %34, %35;\n\t}"
                 : PTX_OUT8(d, 0), PTX_OUT8(d, 8), PTX_OUT8(d, 16), PTX_OUT8(d, 24) : "l"(a), "l"(b), "n"(TRANSPOSED), "n"(B_TRANSPOSED));
}

template <int TRANSPOSED, int B_TRANSPOSED> PTX_FN void wgmma64_add(float (&d)[32], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." PTX_WGMMA_TYPE " {" PTX_R64 "}, %32, %33, 1, 1, 1, %34, %35;"
                 : PTX_D64 : "l"(a), "l"(b), "n"(TRANSPOSED), "n"(B_TRANSPOSED));
}

template <int TRANSPOSED, int B_TRANSPOSED = TRANSPOSED> PTX_FN void wgmma64(float (&d)[32], uint64_t a, uint64_t b, bool first)
{
    if (first) { wgmma64_first<TRANSPOSED, B_TRANSPOSED>(d, a, b); } else { wgmma64_add<TRANSPOSED, B_TRANSPOSED>(d, a, b); }
}
