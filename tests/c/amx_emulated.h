/* amx_emulated.h - the statements of csrc/cpu/amx_tile.h in plain C and AVX-512, one thread's tiles in thread-local memory.
 *
 *     FLASHGQA_AMX_EMULATED=1 pip install -e '.[test]'      the row "amx" runs, slowly, on any processor with AVX-512
 *
 * Sums run in order of the terms; the tile unit's own order and rounding differ in the last bits. A statement outside
 * amx_begin() .. amx_release() traps, as it does on the machine.
 */
#ifndef FGQA_AMX_EMULATED_H
#define FGQA_AMX_EMULATED_H
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define amx_load(tile, from, stride) amx_emulated_load(tile, from, stride)
#define amx_load_stream(tile, from, stride) amx_emulated_load(tile, from, stride)
#define amx_store(tile, to, stride) amx_emulated_store(tile, to, stride)
#define amx_zero(tile) memset(amx_emulated[tile], 0, sizeof amx_emulated[tile])
#define amx_dot(c, a, b) amx_emulated_dot(c, a, b)
#define amx_configure(config) (amx_emulated_configured = (config)->palette == 1)
#define amx_release() (amx_emulated_configured = 0)
#define amx_narrow(low, high) amx_emulated_narrow(low, high)

static __thread uint8_t amx_emulated[8][16][64];
static __thread int amx_emulated_configured;

static inline void amx_emulated_load(int tile, const void *from, intptr_t stride)
{
    if (!amx_emulated_configured) { __builtin_trap(); }
    for (int row = 0; row < 16; row++) { memcpy(amx_emulated[tile][row], (const char *)from + row * stride, 64); }
}

static inline void amx_emulated_store(int tile, void *to, intptr_t stride)
{
    if (!amx_emulated_configured) { __builtin_trap(); }
    for (int row = 0; row < 16; row++) { memcpy((char *)to + row * stride, amx_emulated[tile][row], 64); }
}

/* Subnormal numbers count as 0. */
static inline float amx_emulated_float(uint16_t x)
{
    const uint32_t bits = (uint32_t)(x & 0x7F80 ? x : x & 0x8000) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void amx_emulated_dot(int c, int a, int b)
{
    float sum[16][16], right[32][16];
    uint16_t left[16][32], pairs[16][32];
    memcpy(sum, amx_emulated[c], sizeof sum);
    memcpy(left, amx_emulated[a], sizeof left);
    memcpy(pairs, amx_emulated[b], sizeof pairs);
    for (int k = 0; k < 32; k++) {
        for (int n = 0; n < 16; n++) { right[k][n] = amx_emulated_float(pairs[k / 2][2 * n + k % 2]); }
    }
    for (int m = 0; m < 16; m++) {
        for (int k = 0; k < 32; k++) {
            const float x = amx_emulated_float(left[m][k]);
            for (int n = 0; n < 16; n++) { sum[m][n] += x * right[k][n]; }
        }
    }
    memcpy(amx_emulated[c], sum, sizeof sum);
}

static inline __m256i amx_emulated_round(__m512 x)
{
    const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    const __m512i half = _mm512_add_epi32(_mm512_set1_epi32(0x7FFF), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), tiny = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7F800000));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_or_si512(high, _mm512_set1_epi32(0x40)));
    rounded = _mm512_mask_blend_epi32(tiny, rounded, _mm512_and_si512(high, _mm512_set1_epi32(0x8000)));
    return _mm512_cvtepi32_epi16(rounded);
}

static inline __m512i amx_emulated_narrow(__m512 low, __m512 high)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(amx_emulated_round(low)), amx_emulated_round(high), 1);
}

#endif
