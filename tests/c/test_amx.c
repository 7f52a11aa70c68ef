/* Packing and product of csrc/cpu/amx.h on tiles, which amx_emulated.h stands in for. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,amx-tile,amx-bf16")
#define FGQA_ISA amx
#define FGQA_REAL_F64 0
#define FGQA_AMX_EMULATED "../../tests/c/amx_emulated.h"
#include "amx_product.h"

int main(void)
{
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) { return checks_passed("test_amx"); }
    amx_begin();
    check_packing_and_product();
    amx_release();
    return checks_passed("test_amx");
}
#else
#include "check.h"
int main(void) { return checks_passed("test_amx"); }
#endif
