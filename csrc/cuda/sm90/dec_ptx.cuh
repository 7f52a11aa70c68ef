/* dec_ptx.cuh - instructions that only the decode kernels use, one per function (sm_90a). */
#pragma once
#include "../common/ptx_cluster.cuh"
#include "../common/ptx_tma.cuh"
#include "../common/ptx_wgmma.cuh"

/* Box at (c0, .., c4) -> shared `dst`; its bytes count towards `bar`. Out-of-range elements are zero and count too. */
PTX_FN void tma_load_5d(uint32_t dst, const CUtensorMap *map, uint32_t bar, uint64_t policy, int c0, int c1, int c2, int c3, int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
                 " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(dst), "l"((uint64_t)map), "r"(bar), "l"(policy),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

/* What such a load would bring -> L2. */
PTX_FN void tma_prefetch_5d(const CUtensorMap *map, uint64_t policy, int c0, int c1, int c2, int c3, int c4)
{
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], %1;" ::"l"((uint64_t)map), "l"(policy),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
}

/* 4 bytes of shared memory at `dst` from global `src`; groups as of cp_async_16(). */
PTX_FN void cp_async_4(uint32_t dst, const void *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(dst), "l"(src) : "memory");
}

/* Named barriers that warps reach at different places in the code. */
PTX_FN void barrier_sync(uint32_t id, uint32_t threads) { asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PTX_FN void barrier_arrive(uint32_t id, uint32_t threads) { asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

PTX_FN void prefetch_l2(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory"); }

/* Named barrier that also tells whether any thread passed true. */
PTX_FN bool bar_any(uint32_t id, uint32_t threads, bool value)
{
    uint32_t any;
    asm volatile("{\n\t.reg .pred p, q;\n\tsetp.ne.u32 p, %3, 0;\n\t"
                 "bar.red.or.pred q, %1, %2, p;\n\tselp.u32 %0, 1, 0, q;\n\t}"
                 : "=r"(any) : "r"(id), "r"(threads), "r"((uint32_t)value) : "memory");
    return any;
}

/* Transposes one 8x8 matrix of 16-bit elements of the warp. */
PTX_FN uint32_t movmatrix_trans(uint32_t a)
{
    uint32_t d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

/* Four 8x8 matrices, transposed: row j of matrix n, 16 bytes at the address of lane 8 n + j, is its column j. */
PTX_FN void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

/* D[64 x N] (+)= A[64 x 16] B[16 x N], both from shared memory, B K-major; TRANS_A: A has its 64 rows contiguous.
 * accumulate 0 overwrites D. */
#define DEC_WGMMA(n, registers, operands, a, b, p, t)                                                                              \
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p ", 0;\n\t"                                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." PTX_WGMMA_TYPE " {" registers "}, %" #a ", %" #b ", p, 1, 1, %" #t ", 0;\n\t}" \
                 : operands : "l"(a_desc), "l"(b_desc), "r"(accumulate), "n"(TRANS_A))

template <int TRANS_A> PTX_FN void wgmma_turned(float (&d)[8], uint64_t a_desc, uint64_t b_desc, int accumulate)
{
    DEC_WGMMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", PTX_ACC8(d, 0), 8, 9, 10, 11);
}
template <int TRANS_A> PTX_FN void wgmma_turned(float (&d)[16], uint64_t a_desc, uint64_t b_desc, int accumulate)
{
    DEC_WGMMA(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", PTX_ACC16(d, 0), 16, 17, 18, 19);
}
template <int TRANS_A> PTX_FN void wgmma_turned(float (&d)[32], uint64_t a_desc, uint64_t b_desc, int accumulate)
{
    DEC_WGMMA(64, PTX_R64, PTX_ACC32(d, 0), 32, 33, 34, 35);
}
#undef DEC_WGMMA
