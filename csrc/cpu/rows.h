/* rows.h - rows of any dtype and stride to and from reals.
 *
 * Nothing outside the n elements of a row is touched. Narrowing rounds to nearest even, once.
 */
#ifndef FGQA_ROWS_H
#define FGQA_ROWS_H
#include "../core/tensor.h"
#include "simd.h"

SIMD float float_from_bits(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }
SIMD uint32_t float_bits(float x) { uint32_t bits; memcpy(&bits, &x, sizeof bits); return bits; }

SIMD float float_from_bf16(uint16_t x) { return float_from_bits((uint32_t)x << 16); }

SIMD uint16_t bf16_from_float(float x)
{
    const uint32_t bits = float_bits(x), rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
    return (uint16_t)(x != x ? (bits >> 16) | 0x40u : rounded >> 16);
}

/* Integer arithmetic throughout, but for the subnormals' subtraction of 2^-14, which is exact. */
SIMD float float_from_f16(uint16_t x)
{
    const uint32_t magnitude = (uint32_t)(x & 0x7FFFu) << 13, exponent = magnitude & 0x0F800000u;
    const uint32_t normal = magnitude + (exponent == 0x0F800000u ? 0x70000000u : 0x38000000u);
    const float subnormal = float_from_bits(magnitude + 0x38800000u) - float_from_bits(0x38800000u);
    return float_from_bits((exponent ? normal : float_bits(subnormal)) | (uint32_t)(x & 0x8000u) << 16);
}

SIMD uint16_t f16_from_float(float x)
{
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    /* below 2^-14: adding 0.5 leaves the half's subnormal bits, rounded, at the bottom of the float */
    const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return (uint16_t)(sign | (magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? subnormal : normal));
}

/* float8 e4m3 without infinities: exponent bias 7, 0x7F is NaN; subnormals as those of float16 above. */
SIMD float float_from_f8(uint8_t x)
{
    const uint32_t magnitude = (uint32_t)(x & 0x7Fu) << 20;
    const float subnormal = float_from_bits(magnitude + 0x3C800000u) - float_from_bits(0x3C800000u);
    const uint32_t normal = magnitude == 0x07F00000u ? 0x7FC00000u : magnitude + 0x3C000000u;
    return float_from_bits((magnitude < 0x00800000u ? float_bits(subnormal) : normal) | (uint32_t)(x & 0x80u) << 24);
}

/* Beyond +-448, infinities included, the largest number: a cache has no use for the NaN that a cast would give. */
SIMD uint8_t f8_from_float(float x)
{
    const uint32_t bits = float_bits(x), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 24) & 0x80u;
    const uint32_t normal = (magnitude - 0x3C000000u + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20;
    /* below 2^-6: adding 2^14 leaves the multiples of 2^-9, rounded, at the bottom of the float */
    const uint32_t subnormal = float_bits(float_from_bits(magnitude) + 16384.0f) - float_bits(16384.0f);
    const uint32_t special = magnitude > 0x7F800000u ? 0x7Fu : 0x7Eu;
    return (uint8_t)(sign | (magnitude >= 0x43E80000u ? special : magnitude < 0x3C800000u ? subnormal : normal));
}

/* A real as the float from which it is narrowed further. Of a double whatever the float leaves out sets the last bit, so that the
 * second rounding is that of the double: a tie is a tie only if it was one. */
SIMD float row_float(real x)
{
    const float near = (float)x;
#if FGQA_REAL_F64
    const double size = __builtin_fabs(x), near_size = __builtin_fabs((double)near);
    if (size < near_size) { return float_from_bits((float_bits(near) - 1u) | 1u); }
    if (size > near_size) { return float_from_bits(float_bits(near) | 1u); }
#endif
    return near;
}

SIMD uint16_t bf16_from_real(real x) { return bf16_from_float(row_float(x)); }
SIMD uint16_t f16_from_real(real x) { return f16_from_float(row_float(x)); }
SIMD uint8_t f8_from_real(real x) { return f8_from_float(row_float(x)); }

/* Rows are short: the call of memcpy that a plain loop becomes takes as long as the copy. */
SIMD void row_copy(real *to, const real *from, int32_t n)
{
    int32_t i = 0;
#define ROW_KEEP_LOOP __asm__ volatile("" : : : "memory")
    for (; i + VL <= n; i += VL) {
        v_store(to + i, v_load(from + i));
        ROW_KEEP_LOOP;
    }
    for (; i < n; i++) {
        to[i] = from[i];
        ROW_KEEP_LOOP;
    }
#undef ROW_KEEP_LOOP
}

/* Whether a row lies in memory as reals do. */
SIMD int row_is_own(fgqa_dtype dtype, int64_t stride) { return dtype == (FGQA_REAL_F64 ? FGQA_F64 : FGQA_F32) && stride == 1; }

FGQA_SHARED void row_widen(real *restrict to, const void *from, fgqa_dtype dtype, int64_t stride, int32_t n)
{
#define ROW_LOAD(type, value)                                                          \
    do {                                                                               \
        const type *x = from;                                                          \
        if (stride == 1) {                                                             \
            for (int32_t i = 0; i < n; i++) { to[i] = (real)value(x[i]); }             \
        } else {                                                                       \
            for (int32_t i = 0; i < n; i++) { to[i] = (real)value(x[(int64_t)i * stride]); } \
        }                                                                              \
    } while (0)
    switch (dtype) {
    case FGQA_F64: ROW_LOAD(double, ); break;
    case FGQA_F32: ROW_LOAD(float, ); break;
    case FGQA_BF16: ROW_LOAD(uint16_t, float_from_bf16); break;
    case FGQA_F8E4M3: ROW_LOAD(uint8_t, float_from_f8); break;
    case FGQA_F16: {
        int32_t done = 0;
#if SIMD_HALF && !FGQA_REAL_F64
        if (stride == 1) {
            for (; done + 8 <= n; done += 8) { f16x8_widen(to + done, (const uint16_t *)from + done); }
        }
#endif
        from = (const uint16_t *)from + (int64_t)done * stride;
        to += done;
        n -= done;
        ROW_LOAD(uint16_t, float_from_f16);
        break;
    }
    default: break;   /* fgqa_problem_init lets no other dtype through */
    }
#undef ROW_LOAD
}

/* to[n] = from[0], from[stride], ... as reals. */
SIMD void row_load(real *restrict to, const void *from, fgqa_dtype dtype, int64_t stride, int32_t n)
{
    if (row_is_own(dtype, stride)) {
        row_copy(to, from, n);
    } else {
        row_widen(to, from, dtype, stride, n);
    }
}

FGQA_SHARED void row_narrow(void *to, fgqa_dtype dtype, int64_t stride, const real *restrict from, int32_t n)
{
#define ROW_STORE(type, value)                                                                   \
    do {                                                                                         \
        type *x = to;                                                                            \
        if (stride == 1) {                                                                       \
            for (int32_t i = 0; i < n; i++) { x[i] = (type)value(from[i]); }                     \
        } else {                                                                                 \
            for (int32_t i = 0; i < n; i++) { x[(int64_t)i * stride] = (type)value(from[i]); }   \
        }                                                                                        \
    } while (0)
    switch (dtype) {
    case FGQA_F64: ROW_STORE(double, ); break;
    case FGQA_F32: ROW_STORE(float, ); break;
    case FGQA_BF16: ROW_STORE(uint16_t, bf16_from_real); break;
    case FGQA_F8E4M3: ROW_STORE(uint8_t, f8_from_real); break;
    case FGQA_F16: {
        int32_t done = 0;
#if SIMD_HALF && !FGQA_REAL_F64
        if (stride == 1) {
            for (; done + 8 <= n; done += 8) { f16x8_narrow((uint16_t *)to + done, from + done); }
        }
#endif
        to = (uint16_t *)to + (int64_t)done * stride;
        from += done;
        n -= done;
        ROW_STORE(uint16_t, f16_from_real);
        break;
    }
    default: break;
    }
#undef ROW_STORE
}

SIMD void row_store(void *to, fgqa_dtype dtype, int64_t stride, const real *restrict from, int32_t n)
{
    if (row_is_own(dtype, stride)) {
        row_copy(to, from, n);
    } else {
        row_narrow(to, dtype, stride, from, n);
    }
}

#endif
