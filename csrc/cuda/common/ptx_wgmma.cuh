/* ptx_wgmma.cuh - wgmma and its operands, one instruction per function (sm_90a). D[64 x N] (+)= A[64 x 16] B[16 x N], 16-bit in,
 * float32 out. PTX ISA, "wgmma".
 *
 * D: register 4 n + e of lane l in warp w of the warpgroup is row 16 w + l / 4 + 8 (e / 2), column 8 n + 2 (l % 4) + e % 2.
 * A in registers: four pairs, in the order of two neighbouring 8-column groups of such a D (fragments.cuh).
 * The element type of a row of kernels.def is FGQA_DTYPE: PTX_WGMMA_TYPE is its name in PTX.
 */
#pragma once
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__

#define PTX_TYPE_bf16 "bf16.bf16"
#define PTX_TYPE_f16 "f16.f16"
#define PTX_TYPE_OF_(dtype) PTX_TYPE_##dtype
#define PTX_TYPE_OF(dtype) PTX_TYPE_OF_(dtype)
#define PTX_WGMMA_TYPE PTX_TYPE_OF(FGQA_DTYPE)

/* Orders register and shared-memory writes before the wgmmas that read them. */
PTX_FN void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX_FN void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* All but the N latest groups are done. */
template <int N> PTX_FN void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

/* Pins accumulators behind a wait for the compiler; no instruction. */
template <int N> PTX_FN void wgmma_pin(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) { asm volatile("" : "+f"(d[i])::"memory"); }
}

/* Descriptor of a matrix in shared memory, 128-byte swizzle, 1024-byte aligned. Offsets in bytes:
 * sbo between groups of 8 rows, lbo between 64-element column chunks (MN-major only). */
PTX_FN uint64_t wgmma_desc_sw128(uint32_t addr, uint32_t lbo, uint32_t sbo)
{
    return (uint64_t)((addr & 0x3FFFF) >> 4) | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)1 << 62;
}

#define PTX_ACC8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PTX_ACC16(d, i) PTX_ACC8(d, i), PTX_ACC8(d, i + 8)
#define PTX_ACC32(d, i) PTX_ACC16(d, i), PTX_ACC16(d, i + 16)
#define PTX_D32 PTX_ACC16(d, 0)
#define PTX_D64 PTX_ACC32(d, 0)
#define PTX_D80 PTX_ACC32(d, 0), PTX_ACC8(d, 32)
#define PTX_D96 PTX_ACC32(d, 0), PTX_ACC16(d, 32)
#define PTX_D112 PTX_ACC32(d, 0), PTX_ACC16(d, 32), PTX_ACC8(d, 48)
#define PTX_D128 PTX_ACC32(d, 0), PTX_ACC32(d, 32)
#define PTX_D192 PTX_ACC32(d, 0), PTX_ACC32(d, 32), PTX_ACC32(d, 64)
#define PTX_D256 PTX_ACC32(d, 0), PTX_ACC32(d, 32), PTX_ACC32(d, 64), PTX_ACC32(d, 96)
#define PTX_R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define PTX_R64 PTX_R32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define PTX_R80 PTX_R64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define PTX_R96 PTX_R80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define PTX_R112 PTX_R96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define PTX_R128 PTX_R112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define PTX_R192 PTX_R128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86," \
    "%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define PTX_R256 PTX_R192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114," \
    "%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

/* A and B from shared memory, both K-major. accumulate = 0 overwrites D. ra, rb, rp: the operands after the N/2 of D. */
#define PTX_WGMMA_SS(N, ra, rb, rp)                                                                                     \
    PTX_FN void wgmma_ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate)                                     \
    {                                                                                                                   \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #rp ", 0;\n\t"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_WGMMA_TYPE " {" PTX_R##N "}, %" #ra ", %" #rb \
                     ", p, 1, 1, 0, 0;\n\t}" : PTX_D##N : "l"(a), "l"(b), "r"(accumulate));                             \
    }

/* A in registers, B from shared memory MN-major (transposed on the fly). */
#define PTX_WGMMA_RS(N, r0, r1, r2, r3, rb, rp)                                                                         \
    PTX_FN void wgmma_rs_bt(float (&d)[N / 2], const uint32_t *a, uint64_t b, int accumulate)                           \
    {                                                                                                                   \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #rp ", 0;\n\t"                                            \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." PTX_WGMMA_TYPE " {" PTX_R##N "}, "               \
                     "{%" #r0 ", %" #r1 ", %" #r2 ", %" #r3 "}, %" #rb ", p, 1, 1, 1;\n\t}"                             \
                     : PTX_D##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                 \
    }

PTX_WGMMA_SS(32, 16, 17, 18)
PTX_WGMMA_SS(64, 32, 33, 34)
PTX_WGMMA_SS(80, 40, 41, 42)
PTX_WGMMA_SS(96, 48, 49, 50)
PTX_WGMMA_SS(112, 56, 57, 58)
PTX_WGMMA_SS(128, 64, 65, 66)
PTX_WGMMA_SS(192, 96, 97, 98)
PTX_WGMMA_SS(256, 128, 129, 130)
PTX_WGMMA_RS(64, 32, 33, 34, 35, 36, 37)
PTX_WGMMA_RS(96, 48, 49, 50, 51, 52, 53)
PTX_WGMMA_RS(128, 64, 65, 66, 67, 68, 69)
PTX_WGMMA_RS(192, 96, 97, 98, 99, 100, 101)
PTX_WGMMA_RS(256, 128, 129, 130, 131, 132, 133)
