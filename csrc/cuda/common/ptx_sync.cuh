/* ptx_sync.cuh - mbarriers, named barriers, register budgets: one instruction per function (sm_90).
 * PTX ISA, "mbarrier", "bar, barrier", "setmaxnreg". Shared-memory addresses are 32-bit.
 */
#pragma once
#include <stdint.h>

#define PTX_FN static __device__ __forceinline__

/* A phase completes when `count` arrivals and all expected bytes are in. */
PTX_FN void mbarrier_init(uint32_t bar, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

PTX_FN void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

PTX_FN void mbarrier_arrive(uint32_t bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

PTX_FN void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

/* Returns once the phase with this parity has completed. A fresh barrier counts as "parity 1 completed".
 * The loop is also a basic-block boundary: ptxas moves no ordinary instruction across it, which the forward kernel needs. */
PTX_FN void mbarrier_wait(uint32_t bar, uint32_t parity)
{
    asm volatile("{\n\t.reg .pred done;\n"
                 "WAIT_%=:\n\t"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
                 "@!done bra WAIT_%=;\n\t}" ::"r"(bar), "r"(parity) : "memory");
}

/* Whether that phase has completed, asked once. */
PTX_FN bool mbarrier_test(uint32_t bar, uint32_t parity)
{
    uint32_t done;
    asm volatile("{\n\t.reg .pred done;\n\tmbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\tselp.u32 %0, 1, 0, done;\n\t}"
                 : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    return done != 0;
}

/* Named barriers; 0 is __syncthreads. */
PTX_FN void bar_sync(uint32_t id, uint32_t threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
PTX_FN void bar_arrive(uint32_t id, uint32_t threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

/* True in one thread of a warp, all of which come here. ptxas knows that no other goes on: a copy of what the whole warp knows
 * is one instruction in its branch, and not a loop over threads. PTX ISA, "elect.sync". */
PTX_FN bool elect_one()
{
    uint32_t one;
    asm volatile("{\n\t.reg .pred one;\n\telect.sync _|one, 0xFFFFFFFF;\n\tselp.u32 %0, 1, 0, one;\n\t}" : "=r"(one)::"memory");
    return one != 0;
}

/* Registers a thread of this warpgroup has from here on: a multiple of 8, 24 to 256. */
template <int REGS> PTX_FN void setmaxnreg_inc()
{
    static_assert(REGS % 8 == 0 && REGS >= 24 && REGS <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGS));
}
template <int REGS> PTX_FN void setmaxnreg_dec()
{
    static_assert(REGS % 8 == 0 && REGS >= 24 && REGS <= 256, "setmaxnreg takes multiples of 8 from 24 to 256");
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGS));
}
