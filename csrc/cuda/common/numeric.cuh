/* numeric.cuh - element types, conversions and the few transcendental functions the kernels use.
 *
 * 16-bit elements travel in pairs, as one 32-bit register of an mma operand.
 */
#pragma once
#include "../../core/tensor.h"
#include "ptx_mma.cuh"
#include <math.h>
#include <stdint.h>

/* Storage of 16-bit elements. CUDA's own types come with headers that take longer to compile than most kernels' host code. */
struct alignas(2) f16 { uint16_t bits; };
struct alignas(2) bf16 { uint16_t bits; };
typedef float f32;

/* 2^x, relative error 2^-22; denormal results are 0. */
PTX_FN float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
/* log2(x), absolute error 2^-22 near 1, relative 2^-22 elsewhere. */
PTX_FN float lg2(float x) { float y; asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }

/* {lo, hi} rounded to nearest even and packed, lo in the low half. */
PTX_FN uint32_t pack2(float lo, float hi, bf16) { uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }
PTX_FN uint32_t pack2(float lo, float hi, f16) { uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo)); return r; }

PTX_FN float to_float(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
PTX_FN float to_float(bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
PTX_FN float to_float(f32 x) { return x; }
PTX_FN void from_float(f16 *y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
PTX_FN void from_float(bf16 *y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y->bits) : "f"(x)); }
PTX_FN void from_float(f32 *y, float x) { *y = x; }

/* A pair as two floats, the low half first. */
PTX_FN float2 unpack2(uint32_t x, bf16) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)); }
PTX_FN float2 unpack2(uint32_t x, f16) { return make_float2(to_float(f16{(uint16_t)x}), to_float(f16{(uint16_t)(x >> 16)})); }

/* x = big + small up to 2^-24 |x|, both exact in tf32: three tf32 products make a float32 product. Inf and NaN are all in
 * `whole`, which is big otherwise. */
struct tf32_parts { uint32_t whole, big, small; };

static __device__ __forceinline__ tf32_parts split_tf32(uint32_t bits)
{
    tf32_parts p;
    const float x = __uint_as_float(bits);
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(p.whole) : "f"(x));
    p.big = isfinite(x) ? p.whole : 0;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(p.small) : "f"(isfinite(x) ? x - __uint_as_float(p.big) : 0.0f));
    return p;
}

/* d += a * b over one step of k: 32 bytes of a row, k16 of 16-bit elements or k8 of float32 ones (with float32 accuracy).
 * The last argument only names the type. */
static __device__ __forceinline__ void mma_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) { mma_m16n8k16_bf16(d, a, b0, b1); }
static __device__ __forceinline__ void mma_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) { mma_m16n8k16_f16(d, a, b0, b1); }

/* Tensor cores round sums towards zero: each step is summed apart and added in float32. */
static __device__ __forceinline__ void mma_step(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f32)
{
    uint32_t whole[4], big[4], small[4];
#pragma unroll
    for (int r = 0; r < 4; r++) {
        const tf32_parts parts = split_tf32(a[r]);
        whole[r] = parts.whole;
        big[r] = parts.big;
        small[r] = parts.small;
    }
    const tf32_parts p0 = split_tf32(b0), p1 = split_tf32(b1);
    float step[4] = {};
    mma_m16n8k8_tf32(step, small, p0.big, p1.big);
    mma_m16n8k8_tf32(step, big, p0.small, p1.small);
    mma_m16n8k8_tf32(step, whole, p0.whole, p1.whole);
#pragma unroll
    for (int r = 0; r < 4; r++) { d[r] += step[r]; }
}

/* Any float dtype as float32: bias, sink. */
static __device__ __forceinline__ float load_float(const void *p, int64_t index, fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F16: return to_float(((const f16 *)p)[index]);
    case FGQA_BF16: return to_float(((const bf16 *)p)[index]);
    case FGQA_F64: return (float)((const double *)p)[index];
    default: return ((const float *)p)[index];
    }
}

/* Float32 as an element of a result, which is float16, bfloat16 or float32. */
static __device__ __forceinline__ void store_result(void *p, int64_t index, float x, fgqa_dtype dtype)
{
    switch (dtype) {
    case FGQA_F16: from_float((f16 *)p + index, x); break;
    case FGQA_BF16: from_float((bf16 *)p + index, x); break;
    default: from_float((f32 *)p + index, x); break;
    }
}

/* As an element of any float dtype, as the gradients of a bias and of sinks are. */
static __device__ __forceinline__ void store_float(void *p, int64_t index, float x, fgqa_dtype dtype)
{
    if (dtype == FGQA_F64) {
        ((double *)p)[index] = x;
    } else {
        store_result(p, index, x, dtype);
    }
}
