/* The same product by VDPBF16PS (csrc/cpu/amx_dot.h), where the processor has it. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")
#define FGQA_ISA avx512bf16
#define FGQA_REAL_F64 0
#include "amx_product.h"

int main(void)
{
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) { return checks_passed("test_amx_dot"); }
    check_packing_and_product();
    return checks_passed("test_amx_dot");
}
#else
#include "check.h"
int main(void) { return checks_passed("test_amx_dot"); }
#endif
