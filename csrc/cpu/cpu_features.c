/* cpu_features.c - CPUID and XGETBV on x86-64, AT_HWCAP on aarch64 Linux; read once. */
#include "cpu_features.h"
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#define FEATURES(X) \
    X(avx) X(avx2) X(fma) X(f16c) X(avx512f) X(avx512dq) X(avx512bw) X(avx512vl) X(avx512_bf16) X(avx512_bf16_fast) X(avx512_fp16) \
    X(amx_tile) X(amx_bf16) X(amx_int8) X(amx_fp16) X(amx_permitted) X(asimd) X(fphp) X(asimdhp) X(bf16) X(sve)

typedef struct {
#define FEATURE_FIELD(name) int name;
    FEATURES(FEATURE_FIELD)
#undef FEATURE_FIELD
} features;

static features found;
static char found_names[256];
static pthread_once_t found_once = PTHREAD_ONCE_INIT;

#if defined(__x86_64__)
/* Linux gives a process the tile registers on request only; it refuses where a signal stack is too small for them, or a
 * sandbox forbids the call. Granted once, it holds for all threads and children. */
static int permit_tiles(void)
{
#if defined(__linux__) && defined(SYS_arch_prctl)
    const int request = 0x1023, tile_data = 18;             /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return 0;
#endif
}

/* VDPBF16PS at the rate of a fused multiply-add, so at twice its terms, on AMD; a Xeon gave it half that rate, which makes it no
 * faster than float32 (benchmarks/LOG.md). The maker is what CPUID says of it. */
static int pairs_are_fast(void)
{
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx && ecx == signature_AMD_ecx && edx == signature_AMD_edx;
}

static void detect(features *f)
{
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) {
        return;                                /* no OSXSAVE: the OS saves no wide registers */
    }
    uint32_t xcr0, xcr0_high;
    __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
    const int os_avx = (xcr0 & 0x6) == 0x6;                 /* xmm, ymm */
    const int os_avx512 = os_avx && (xcr0 & 0xE0) == 0xE0;  /* opmask, upper zmm, zmm16-31 */
    const int os_amx = (xcr0 & 0x60000) == 0x60000;         /* tile configuration, tile data */
    f->avx = os_avx && (ecx >> 28 & 1);
    f->fma = os_avx && (ecx >> 12 & 1);
    f->f16c = os_avx && (ecx >> 29 & 1);
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
        return;
    }
    const unsigned subleaves = eax;
    f->avx2 = os_avx && (ebx >> 5 & 1);
    f->avx512f = os_avx512 && (ebx >> 16 & 1);
    f->avx512dq = os_avx512 && (ebx >> 17 & 1);
    f->avx512bw = os_avx512 && (ebx >> 30 & 1);
    f->avx512vl = os_avx512 && (ebx >> 31 & 1);
    f->avx512_fp16 = os_avx512 && (edx >> 23 & 1);
    f->amx_bf16 = os_amx && (edx >> 22 & 1);
    f->amx_tile = os_amx && (edx >> 24 & 1);
    f->amx_int8 = os_amx && (edx >> 25 & 1);
    if (subleaves >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) {
        f->avx512_bf16 = os_avx512 && (eax >> 5 & 1);
        f->avx512_bf16_fast = f->avx512_bf16 && pairs_are_fast();
        f->amx_fp16 = os_amx && (eax >> 21 & 1);
    }
    f->amx_permitted = f->amx_tile && permit_tiles();
}
#elif defined(__aarch64__)
static void detect(features *f)
{
    f->asimd = 1;                              /* mandatory in AArch64 */
#if defined(__linux__)
    const unsigned long hwcap = getauxval(AT_HWCAP);
    f->asimd = (hwcap & HWCAP_ASIMD) != 0;
    f->fphp = (hwcap & HWCAP_FPHP) != 0;
    f->asimdhp = (hwcap & HWCAP_ASIMDHP) != 0;
    f->sve = (hwcap & HWCAP_SVE) != 0;
#if defined(HWCAP2_BF16)
    f->bf16 = (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#endif
#endif
}
#else
static void detect(features *f)
{
    (void)f;
}
#endif

static void detect_once(void)
{
    detect(&found);
    size_t used = 0;
#define FEATURE_NAME(name) \
    if (found.name) { used += (size_t)snprintf(found_names + used, sizeof found_names - used, used ? " %s" : "%s", #name); }
    FEATURES(FEATURE_NAME)
#undef FEATURE_NAME
}

int fgqa_cpu_has(const char *isa)
{
    pthread_once(&found_once, detect_once);
    const int avx2 = found.avx2 && found.fma && found.f16c;
    const int avx512 = avx2 && found.avx512f && found.avx512dq && found.avx512bw && found.avx512vl;
    const struct { const char *name; int supported; } rows[] = {
#if defined(FGQA_AMX_EMULATED)
        {"amx", avx512},
#else
        {"amx", avx512 && found.avx512_bf16 && found.amx_bf16 && found.amx_permitted},
#endif
        {"avx512bf16", avx512 && found.avx512_bf16 && found.avx512_bf16_fast},
        {"avx512", avx512},
        {"avx2", avx2},
        {"neon", found.asimd},
        {"portable", 1},
    };
    for (size_t n = 0; n < sizeof rows / sizeof *rows; n++) {
        if (strcmp(isa, rows[n].name) == 0) {
            return rows[n].supported;
        }
    }
    return 0;
}

const char *fgqa_cpu_feature_names(void)
{
    pthread_once(&found_once, detect_once);
    return found_names;
}
