/* simd.h - one vector of reals, written once for every row of isa.def and both precisions.
 *
 * The compiler says which row is being compiled (its own target macros); FGQA_REAL_F64 says the precision. Arithmetic is
 * GCC/Clang vector extensions (a*b + c contracts to one fused multiply-add where the machine has it); intrinsics stand
 * only where a compiler does not find the instruction.
 *
 *     real, ireal     float and int32_t, or double and int64_t
 *     VL              lanes of a vector
 *     vreal, vint     VL reals, VL integers of the same width
 *     vmask           one truth value a lane
 */
#ifndef FGQA_SIMD_H
#define FGQA_SIMD_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(FGQA_ISA) || !defined(FGQA_REAL_F64)
#error "compiled once per row of isa.def and precision: -DFGQA_ISA=<name> -DFGQA_REAL_F64=<0|1>"
#endif

#if FGQA_REAL_F64
typedef double real;
typedef int64_t ireal;
typedef uint64_t ureal;
#define FGQA_REAL_NAME f64
#define REAL_LOWEST (-1.7976931348623157e308)
#else
typedef float real;
typedef int32_t ireal;
typedef uint32_t ureal;
#define FGQA_REAL_NAME f32
#define REAL_LOWEST (-3.40282346638528859812e38f)
#endif
#define REAL_INF ((real)__builtin_inf())

/* The symbol of this row: FGQA_ROW(fwd, run) is fgqa_fwd_avx512_f32_run. */
#define FGQA_ROW_PASTE(pass, isa, real_name, what) fgqa_##pass##_##isa##_##real_name##_##what
#define FGQA_ROW_EXPAND(pass, isa, real_name, what) FGQA_ROW_PASTE(pass, isa, real_name, what)
#define FGQA_ROW(pass, what) FGQA_ROW_EXPAND(pass, FGQA_ISA, FGQA_REAL_NAME, what)

/* Rows with products of bfloat16: the float kernels' frame around them. On tiles, or else by VDPBF16PS. */
#if defined(__AVX512BF16__)
#define FGQA_PAIRS 1
#else
#define FGQA_PAIRS 0
#endif
#if defined(__AMX_BF16__) || defined(__AMXBF16__)   /* gcc, clang */
#define FGQA_TILES 1
#else
#define FGQA_TILES 0
#endif

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define VBYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define VBYTES 32
#else
#define VBYTES 16
#endif
#define VL (VBYTES / (FGQA_REAL_F64 ? 8 : 4))

/* Rows that convert float16 by an instruction. */
#if defined(__F16C__) || defined(__aarch64__)
#define SIMD_HALF 1
#else
#define SIMD_HALF 0
#endif

typedef real vreal __attribute__((vector_size(VBYTES)));
typedef ireal vint __attribute__((vector_size(VBYTES)));
typedef uint64_t vu64 __attribute__((vector_size(VBYTES)));
typedef real vreal_any __attribute__((vector_size(VBYTES), aligned(sizeof(real)), may_alias));
typedef ireal vint_any __attribute__((vector_size(VBYTES), aligned(sizeof(ireal)), may_alias));

#define SIMD static inline __attribute__((always_inline, unused))
/* Functions of the shared headers that not every pass calls. */
#define FGQA_SHARED static __attribute__((unused))
#define SIMD_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(n) SIMD_PRAGMA(unroll n)
#else
#define UNROLL(n) SIMD_PRAGMA(GCC unroll n)
#endif

SIMD vreal v_load(const real *x) { return *(const vreal_any *)x; }
SIMD void v_store(real *x, vreal v) { *(vreal_any *)x = v; }
SIMD vint v_load_int(const ireal *x) { return *(const vint_any *)x; }
SIMD vreal v_set1(real x) { return x - (vreal){0}; }
SIMD vint v_set1_int(ireal x) { return x - (vint){0}; }
/* The first n < VL reals at x, then zeros; nothing behind them is read. */
SIMD vreal v_load_part(const real *x, int n)
{
#if VBYTES == 64 && FGQA_REAL_F64
    return (vreal)_mm512_maskz_loadu_pd((__mmask8)((1u << n) - 1), x);
#elif VBYTES == 64
    return (vreal)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), x);
#else
    real part[VL] = {0};
    for (int i = 0; i < n; i++) { part[i] = x[i]; }
    return v_load(part);
#endif
}

SIMD vreal v_zero(void) { return (vreal){0}; }
SIMD vreal v_from_int(vint x) { return __builtin_convertvector(x, vreal); }
SIMD vreal v_abs(vreal x) { return (vreal)((vint)x & v_set1_int((ireal)((ureal)-1 >> 1))); }

/* ---- masks ---- */
#if VBYTES == 64
#if FGQA_REAL_F64
typedef __mmask8 vmask;
#define SIMD_CMP(a, b, predicate) _mm512_cmp_pd_mask((__m512d)(a), (__m512d)(b), predicate)
SIMD vmask m_lt_int(vint a, vint b) { return _mm512_cmplt_epi64_mask((__m512i)a, (__m512i)b); }
SIMD vreal v_select(vmask m, vreal a, vreal b) { return (vreal)_mm512_mask_blend_pd(m, (__m512d)b, (__m512d)a); }
SIMD vint v_mask_bits(vmask m) { return (vint)_mm512_movm_epi64(m); }
#else
typedef __mmask16 vmask;
#define SIMD_CMP(a, b, predicate) _mm512_cmp_ps_mask((__m512)(a), (__m512)(b), predicate)
SIMD vmask m_lt_int(vint a, vint b) { return _mm512_cmplt_epi32_mask((__m512i)a, (__m512i)b); }
SIMD vreal v_select(vmask m, vreal a, vreal b) { return (vreal)_mm512_mask_blend_ps(m, (__m512)b, (__m512)a); }
SIMD vint v_mask_bits(vmask m) { return (vint)_mm512_movm_epi32(m); }
#endif
SIMD vmask m_lt(vreal a, vreal b) { return (vmask)SIMD_CMP(a, b, _CMP_LT_OQ); }
SIMD vmask m_ge(vreal a, vreal b) { return (vmask)SIMD_CMP(a, b, _CMP_GE_OQ); }
SIMD vmask m_eq(vreal a, vreal b) { return (vmask)SIMD_CMP(a, b, _CMP_EQ_OQ); }
SIMD vmask m_not(vmask a) { return (vmask)~a; }
SIMD int m_any(vmask a) { return a != 0; }
#else
typedef vint vmask;
SIMD vmask m_lt_int(vint a, vint b) { return a < b; }
SIMD vreal v_select(vmask m, vreal a, vreal b) { return (vreal)((m & (vint)a) | (~m & (vint)b)); }
SIMD vint v_mask_bits(vmask m) { return m; }
SIMD vmask m_lt(vreal a, vreal b) { return a < b; }
SIMD vmask m_ge(vreal a, vreal b) { return a >= b; }
SIMD vmask m_eq(vreal a, vreal b) { return a == b; }
SIMD vmask m_not(vmask a) { return ~a; }
SIMD int m_any(vmask a)
{
    const vu64 bits = (vu64)a;
    uint64_t any = 0;
    for (int i = 0; i < VBYTES / 8; i++) { any |= bits[i]; }
    return any != 0;
}
#endif
SIMD vmask m_and(vmask a, vmask b) { return (vmask)(a & b); }
SIMD vmask m_or(vmask a, vmask b) { return (vmask)(a | b); }

/* a > b ? a : b; a NaN in either gives b. */
SIMD vreal v_max(vreal a, vreal b)
{
#if VBYTES == 64 && FGQA_REAL_F64
    return (vreal)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif VBYTES == 64
    return (vreal)_mm512_max_ps((__m512)a, (__m512)b);
#elif VBYTES == 32 && FGQA_REAL_F64
    return (vreal)_mm256_max_pd((__m256d)a, (__m256d)b);
#elif VBYTES == 32
    return (vreal)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__) && FGQA_REAL_F64
    return (vreal)_mm_max_pd((__m128d)a, (__m128d)b);
#elif defined(__x86_64__)
    return (vreal)_mm_max_ps((__m128)a, (__m128)b);
#else
    return v_select(m_lt(b, a), a, b);
#endif
}

/* ---- 2^x ----
 * 2^n * p(f), x = n + f, p a polynomial with p(0) = 1 exactly, so that 2^0 is 1 (minimax in relative error, found by
 * Remez exchange): error below 8.3e-8 (float, f in [0, 1)), 2.6e-9 (float, |f| <= 1/2), 1.8e-17 (double) before rounding.
 * Results below the smallest normal number are 0: subnormal factors would cost ~150 cycles each in the products that
 * follow. 2^-inf = 0, 2^NaN = NaN. */
#if FGQA_REAL_F64
#define EXP2_DEGREE 11
#define EXP2_MIN (-1022.0)
static const double exp2_coefficient[EXP2_DEGREE] = {
    0.69314718055994569675, 0.24022650695910098007, 0.055504108664790394552, 0.0096181291076070023796,
    0.0013333558153439964747, 0.0001540353044157213033, 0.000015252727385193868197, 1.3215442675329822143e-6,
    1.0180647659234138888e-7, 7.0725704128144235096e-9, 4.0780719295883366627e-10};
#elif VBYTES == 64
#define EXP2_DEGREE 5
#define EXP2_MIN (-126.0f)
static const float exp2_coefficient[EXP2_DEGREE] = {
    0.693151311807523f, 0.24016445013606755f, 0.055799913145968064f, 0.009017030284436749f, 0.0018671300819070081f};
#else
#define EXP2_DEGREE 6
#define EXP2_MIN (-126.0f)
static const float exp2_coefficient[EXP2_DEGREE] = {
    0.6931472149680279f, 0.24022652782887738f, 0.05550310551013797f, 0.009617692972993062f, 0.0013406643902351759f,
    0.0001559467816132662f};
#endif

SIMD vreal exp2_polynomial(vreal f)
{
    vreal p = v_set1(exp2_coefficient[EXP2_DEGREE - 1]);
    UNROLL(12)
    for (int n = EXP2_DEGREE - 2; n >= 0; n--) { p = p * f + v_set1(exp2_coefficient[n]); }
    return p * f + v_set1(1);
}

SIMD vreal v_exp2(vreal x)
{
#if VBYTES == 64 && FGQA_REAL_F64
    /* the double polynomial is centred: f = x - round(x), and the scaling takes round(x) */
    const __m512d f = _mm512_reduce_pd((__m512d)x, _MM_FROUND_TO_NEAREST_INT);
    const __mmask8 normal = _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(EXP2_MIN), _CMP_NLT_UQ);
    return (vreal)_mm512_maskz_scalef_pd(normal, (__m512d)exp2_polynomial((vreal)f), _mm512_sub_pd((__m512d)x, f));
#elif VBYTES == 64
    const __m512 f = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);   /* x - floor(x); scalef takes floor(x) itself */
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(EXP2_MIN), _CMP_NLT_UQ);
    return (vreal)_mm512_maskz_scalef_ps(normal, (__m512)exp2_polynomial((vreal)f), (__m512)x);
#else
#if FGQA_REAL_F64
    const real magic = 6755399441055744.0 + 1023, top = 1024;   /* 1.5*2^52 plus the exponent bias */
    const int shift = 52;
#else
    const real magic = 12582912.0f + 127, top = 128;            /* 1.5*2^23 plus the exponent bias */
    const int shift = 23;
#endif
    const vmask normal = ~(x < v_set1(EXP2_MIN));
    x = v_select(m_lt(v_set1(top), x), v_set1(top), x);
    const vreal biased = x + v_set1(magic);                     /* low bits: round(x) + bias */
    const vreal f = x - (biased - v_set1(magic));
    const vreal power = (vreal)((vint)biased << shift);
    return (vreal)((vint)(exp2_polynomial(f) * power) & normal);
#endif
}

/* tanh(x). |x| < 0.625: odd polynomial (float) or rational function (double) of the Cephes library (S. L. Moshier), which
 * keep the relative error near 0; beyond: (1 - e)/(1 + e) with e = 2^(-2|x|*log2 e). */
SIMD vreal v_tanh(vreal x)
{
    const vreal size = v_abs(x), z = x * x;
    const vreal e = v_exp2(size * v_set1((real)-2.88539008177792681472));
    const vreal far = (v_set1(1) - e) / (v_set1(1) + e);
    const vint sign = v_set1_int((ireal)((ureal)1 << (8 * sizeof(real) - 1)));
    const vreal signed_far = (vreal)((vint)far | ((vint)x & sign));
#if FGQA_REAL_F64
    const vreal top = (z * v_set1(-9.64399179425052238628e-1) + v_set1(-9.92877231001918586564e1)) * z
                      + v_set1(-1.61468768441708447952e3);
    const vreal bottom = ((z + v_set1(1.12811678491632931402e2)) * z + v_set1(2.23548839060100448583e3)) * z
                         + v_set1(4.84406305325125486048e3);
    const vreal near = x + x * z * (top / bottom);
#else
    const vreal tail = (((v_set1(-5.70498872745e-3f) * z + v_set1(2.06390887954e-2f)) * z + v_set1(-5.37397155531e-2f)) * z
                        + v_set1(1.33314422036e-1f)) * z + v_set1(-3.33332819422e-1f);
    const vreal near = x + x * (z * tail);
#endif
    return v_select(m_lt(size, v_set1((real)0.625)), near, signed_far);
}

/* ---- transpose ---- */
#if defined(__clang__) || __GNUC__ >= 12
#define SIMD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SIMD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vint){__VA_ARGS__})
#endif
#if VBYTES == 64 && !FGQA_REAL_F64
#define INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VBYTES == 64 || (VBYTES == 32 && !FGQA_REAL_F64)
#define INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#elif VBYTES == 32 || !FGQA_REAL_F64
#define INTERLEAVE_LOW 0, 4, 1, 5
#define INTERLEAVE_HIGH 2, 6, 3, 7
#else
#define INTERLEAVE_LOW 0, 2
#define INTERLEAVE_HIGH 1, 3
#endif

/* The sum of all lanes, halves added to halves. */
SIMD real v_sum(vreal x)
{
    UNROLL(4)
    for (int n = VL; n > 1; n /= 2) { x = SIMD_SHUFFLE(x, x, INTERLEAVE_LOW) + SIMD_SHUFFLE(x, x, INTERLEAVE_HIGH); }
    return x[0];
}

#if VBYTES == 64 && !FGQA_REAL_F64 && !FGQA_PAIRS
/* to[c*to_stride + r] = from[r][c], VL x VL. Quarters of rows come from memory where they belong, so that two rounds of shuffles
 * within quarters are left of four: some processors have one unit for shuffles. */
SIMD void v_transpose(real *to, ptrdiff_t to_stride, const real *from, ptrdiff_t from_stride)
{
    UNROLL(4)
    for (int c = 0; c < VL; c += 4) {
        __m512 a[4];
        UNROLL(4)
        for (int r = 0; r < 4; r++) {
            const real *const at = from + r * from_stride + c;
            a[r] = _mm512_castps128_ps512(_mm_loadu_ps(at));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0x00F0, _mm_loadu_ps(at + 4 * from_stride));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0x0F00, _mm_loadu_ps(at + 8 * from_stride));
            a[r] = _mm512_mask_broadcast_f32x4(a[r], 0xF000, _mm_loadu_ps(at + 12 * from_stride));
        }
        const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(a[0], a[1])), high01 = _mm512_castps_pd(_mm512_unpackhi_ps(a[0], a[1]));
        const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(a[2], a[3])), high23 = _mm512_castps_pd(_mm512_unpackhi_ps(a[2], a[3]));
        v_store(to + c * to_stride, (vreal)_mm512_unpacklo_pd(low01, low23));
        v_store(to + (c + 1) * to_stride, (vreal)_mm512_unpackhi_pd(low01, low23));
        v_store(to + (c + 2) * to_stride, (vreal)_mm512_unpacklo_pd(high01, high23));
        v_store(to + (c + 3) * to_stride, (vreal)_mm512_unpackhi_pd(high01, high23));
    }
}
#else
/* to[c*to_stride + r] = from[r][c], VL x VL: log2(VL) rounds of perfect shuffles. */
SIMD void v_transpose(real *to, ptrdiff_t to_stride, const real *from, ptrdiff_t from_stride)
{
    vreal a[VL], b[VL];
    UNROLL(16)
    for (int r = 0; r < VL; r++) { a[r] = v_load(from + r * from_stride); }
    UNROLL(4)
    for (int round = 1; round < VL; round *= 2) {
        UNROLL(8)
        for (int r = 0; r < VL / 2; r++) {
            b[2 * r] = SIMD_SHUFFLE(a[r], a[r + VL / 2], INTERLEAVE_LOW);
            b[2 * r + 1] = SIMD_SHUFFLE(a[r], a[r + VL / 2], INTERLEAVE_HIGH);
        }
        UNROLL(16)
        for (int r = 0; r < VL; r++) { a[r] = b[r]; }
    }
    UNROLL(16)
    for (int r = 0; r < VL; r++) { v_store(to + r * to_stride, a[r]); }
}
#endif

/* ---- 32-bit words for Philox: one word a lane (in 64-bit lanes when real is double) ---- */
#if FGQA_REAL_F64
typedef vu64 vword;
#else
typedef uint32_t vword __attribute__((vector_size(VBYTES)));
#endif

#if !FGQA_REAL_F64
/* VL bfloat16 or float16 numbers. */
SIMD vreal v_load_bf16(const uint16_t *x)
{
#if defined(__aarch64__)
    return (vreal)vshll_n_u16(vld1_u16(x), 16);     /* what follows gcc 12 does number by number */
#else
    typedef uint16_t vhalf __attribute__((vector_size(VBYTES / 2), aligned(2), may_alias));
    return (vreal)(__builtin_convertvector(*(const vhalf *)x, vword) << 16);
#endif
}
#if defined(__F16C__) && VBYTES == 64
SIMD vreal v_load_f16(const uint16_t *x) { return (vreal)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)x)); }
#elif defined(__F16C__)
SIMD vreal v_load_f16(const uint16_t *x) { return (vreal)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)x)); }
#elif defined(__aarch64__)
SIMD vreal v_load_f16(const uint16_t *x)
{
    vreal wide;                                     /* vcvt_f32_f16() reads memory, as gcc 12 has it: sums would be stored before it */
    __asm__("fcvtl %0.4s, %1.4h" : "=w"(wide) : "w"(vld1_u16(x)));
    return wide;
}
#endif
/* Eight float16 numbers to floats and back. */
#if defined(__F16C__)
SIMD void f16x8_widen(float *to, const uint16_t *from) { _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)from))); }
SIMD void f16x8_narrow(uint16_t *to, const float *from)
{
    _mm_storeu_si128((__m128i *)(void *)to, _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
SIMD void f16x8_widen(float *to, const uint16_t *from)
{
    vst1q_f32(to, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
    vst1q_f32(to + 4, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4))));
}
SIMD void f16x8_narrow(uint16_t *to, const float *from)
{
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from))));
    vst1_u16(to + 4, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + 4))));
}
#endif
#endif

/* Products of the low halves of 64-bit lanes. */
SIMD vu64 v_mul_low32(vu64 a, vu64 b)
{
#if VBYTES == 64
    return (vu64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif VBYTES == 32
    return (vu64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return (vu64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
    return (vu64)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
    const vu64 low = (uint64_t)0xFFFFFFFFu - (vu64){0};
    return (a & low) * (b & low);
#endif
}

/* High and low word of x*factor in every lane. */
SIMD void v_mul_words(vword x, uint32_t factor, vword *high, vword *low)
{
    const vu64 f = (uint64_t)factor - (vu64){0}, mask = (uint64_t)0xFFFFFFFFu - (vu64){0};
#if FGQA_REAL_F64
    const vu64 product = v_mul_low32(x, f);
    *high = product >> 32;
    *low = product & mask;
#else
    const vu64 even = v_mul_low32((vu64)x, f), odd = v_mul_low32((vu64)x >> 32, f);
    *high = (vword)((even >> 32) | (odd & ~mask));
    *low = (vword)((even & mask) | (odd << 32));
#endif
}

#endif
