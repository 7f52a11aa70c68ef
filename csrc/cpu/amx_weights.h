/* amx_weights.h - vector work beside forward's products: weights p = 2^(s*scale - m) as B of a product, and their sums.
 *
 * Tiles and vectors are units of their own, but few instructions are in flight at a time, and beside tiles at work vectors do one
 * float operation a cycle: their streams must alternate, evenly. A product therefore takes along, after every step, a share of
 * the weights: of AMX_DEPTH keys after others, a strip, whose scores are there. They begin AMX_AHEAD strips early, beside the
 * values of the panel before, so that neither product is alone; the scores of AMX_RING strips are kept for that.
 *
 * m follows the largest score of a strip after others, and only when that has grown by more than AMX_LAZY: weights up to
 * 2^AMX_LAZY lose nothing in bfloat16, and O is rarely rescaled. Weights that are bfloat16 already are then rounded
 * once more; they are those of keys with much smaller ones. Strips beside products take m as it is first and look at their sums:
 * only where these are large is there a maximum to be found, and the strip done again. The result is the same.
 */
#ifndef FGQA_AMX_WEIGHTS_H
#define FGQA_AMX_WEIGHTS_H
#include "amx_tile.h"
#include "tile.h"

#define AMX_LAZY ((real)8)
#define AMX_AHEAD 2                     /* fewer than KEYS / AMX_DEPTH */
#define AMX_RING (AMX_AHEAD + 2)
#define AMX_STRIP (AMX_DEPTH * PANEL)   /* scores of a strip */

/* 2^(n/32) */
static const _Alignas(64) float amx_power[32] = {
    1.0f, 1.02189715f, 1.04427378f, 1.0671404f, 1.09050773f, 1.11438674f, 1.13878863f, 1.16372486f,
    1.18920712f, 1.21524736f, 1.24185781f, 1.26905096f, 1.29683955f, 1.32523664f, 1.35425555f, 1.38390988f,
    1.41421356f, 1.44518081f, 1.47682615f, 1.50916443f, 1.54221083f, 1.57598085f, 1.61049033f, 1.64575548f,
    1.68179283f, 1.7186193f, 1.75625216f, 1.79470908f, 1.83400809f, 1.87416763f, 1.91520656f, 1.95714412f,
};

/* 2^x to 1.8e-7, in a task, where subnormal results are flushed: a table and a polynomial of degree 2 on [0, 1/32) (minimax, p(0)
 * = 1, 6.6e-8). Beside tiles it is float operations that count: a degree of 5 without a table takes one more. */
SIMD vreal amx_exp2(vreal x)
{
    const vreal r = (vreal)_mm512_reduce_ps((__m512)x, 5 << 4 | _MM_FROUND_TO_NEG_INF);    /* x - floor(32*x)/32 */
    const __m512 n = _mm512_add_round_ps((__m512)x, _mm512_set1_ps(0x1.8p18f), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);   /* low bits: floor(32*x) */
    const vreal power = (vreal)_mm512_permutex2var_ps(_mm512_load_ps(amx_power), (__m512i)n, _mm512_load_ps(amx_power + VL));
    const vreal p = (v_set1(0.2426526924f) * r + v_set1(0.6931237316f)) * (power * r) + power;
    return (vreal)_mm512_scalef_ps((__m512)p, (__m512)x);     /* scalef takes floor(x) itself */
}

/* 2^x to 8.6e-5 (minimax, p(0) = 1): for what is rounded to bfloat16 and not added up. */
SIMD vreal amx_exp2_short(vreal x)
{
    const vreal f = (vreal)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
    const vreal p = ((v_set1(0.07706724107265472f) * f + v_set1(0.22764497995376587f)) * f + v_set1(0.6951166391372681f)) * f + v_set1(1);
    return (vreal)_mm512_scalef_ps((__m512)p, (__m512)x);
}

/* Two vectors as bfloat16 numbers a0 b0 a1 b1 ... */
SIMD __m512i amx_narrow_pairs(vreal a, vreal b)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, amx_narrow((__m512)a, (__m512)b));
}

/* The same for weights, ties up instead of to even, in four operations that any vector unit has; the conversion above and its
 * order take three cycles of both. A NaN may become a number here, but then the sum of its lane's weights is NaN. */
SIMD __m512i amx_round_pairs(vreal a, vreal b)
{
    const __m512i half = _mm512_set1_epi32(0x8000), high_words = _mm512_set4_epi32(0x0F0E0F0E, 0x0B0A0B0A, 0x07060706, 0x03020302);
    const __m512i even = _mm512_shuffle_epi8(_mm512_add_epi32((__m512i)a, half), high_words);
    return _mm512_mask_blend_epi16(0x55555555, _mm512_add_epi32((__m512i)b, half), even);
}

/* Such pairs at `to` and, unless `low` is 0, what they leave of the numbers `low` behind. */
SIMD void amx_store_pairs(bf16 *to, ptrdiff_t low, vreal a, vreal b)
{
    const __m512i pairs = amx_round_pairs(a, b);
    _mm512_store_si512(to, pairs);
    if (low) {
        const vreal a_high = (vreal)_mm512_slli_epi32(pairs, 16), b_high = (vreal)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000));
        _mm512_store_si512(to + low, amx_round_pairs(a - a_high, b - b_high));
    }
}

/* A vector as two bfloat16 numbers, both as floats. What is not finite is all in the low part, which meets the other operand's
 * high part alone: of the two products its own sign and that of the other's low part would make a NaN. */
typedef struct { vreal high, low; } amx_split;

SIMD amx_split amx_split_of(vreal x)
{
    const __m512i rounded = _mm512_add_epi32((__m512i)x, _mm512_set1_epi32(0x8000));
    const __mmask16 finite = _knot_mask16(_mm512_fpclass_ps_mask((__m512)rounded, 0x99));    /* no NaN, no infinity */
    const __m512i high = _mm512_maskz_and_epi32(finite, rounded, _mm512_set1_epi32((int)0xFFFF0000));
    const amx_split split = {(vreal)high, (vreal)_mm512_mask_sub_ps((__m512)x, finite, (__m512)x, (__m512)high)};
    return split;
}

/* Weights of keys [key][nv*VL] of a panel. */
typedef struct {
    real *s;                     /* scores of the next key */
    bf16 *p;                     /* of all keys */
    real *m, *factor;            /* [nv*VL]; factor: what m takes from what was before these keys */
    real *ring;                  /* [AMX_RING][AMX_STRIP] */
    int32_t slot;                /* of the ring: the strip at hand */
    int32_t key, end;            /* the next key, the end of those with scores; even */
    int32_t due, rate;           /* pairs of keys to be done by now, and what a step adds to them, in 1/256 */
    int grown;                   /* some factor is not 1 */
    real score_scale, scale;
    vreal shift[2], strip[2], sum[2];
} amx_beside;

/* Weights of keys 0 .. keys-1 times a factor each lane; `s` (NULL: not kept): as reals, too. */
static void amx_weights_rescale(int32_t nv, ptrdiff_t low, bf16 *p, real *s, int32_t keys, const real *factor)
{
    for (int32_t j = 0; j < keys; j++) {
        for (int32_t v = 0; v < nv; v++) {
            const vreal f = v_load(factor + v * VL);
            real *const real_at = s + (j * nv + v) * VL;
            if (s) { v_store(real_at, v_load(real_at) * f); }
            if (j % 2) { continue; }
            bf16 *const at = p + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE;
            vreal even = v_zero(), odd = v_zero();
            for (ptrdiff_t part = low; part >= 0; part -= low ? low : 1) {
                const __m512i pairs = _mm512_load_si512(at + part);
                even += (vreal)_mm512_slli_epi32(pairs, 16);
                odd += (vreal)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000));
            }
            amx_store_pairs(at, low, even * f, odd * f);
        }
    }
}

/* m with the strip at s, and with it factor and the weights there are. */
SIMD void amx_strip_top(const int nv, const int keep, const ptrdiff_t low, amx_beside *w)
{
    vreal top[NV];
    int grown = 0;
    UNROLL(2)
    for (int v = 0; v < nv; v++) { top[v] = v_set1(-REAL_INF); }
    for (int32_t j = 0; j < AMX_DEPTH; j++) {
        UNROLL(2)
        for (int v = 0; v < nv; v++) { top[v] = v_max(v_load(w->s + (j * nv + v) * VL), top[v]); }
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        top[v] *= v_set1(w->score_scale);
        grown |= m_any(m_lt(v_load(w->m + v * VL) + v_set1(AMX_LAZY), top[v]));
    }
    if (__builtin_expect(grown, 0)) {
        _Alignas(64) real step[PANEL];
        UNROLL(2)
        for (int v = 0; v < nv; v++) {
            const vreal old = v_load(w->m + v * VL);
            const vmask grows = m_lt(old + v_set1(AMX_LAZY), top[v]);
            const vreal f = v_select(grows, v_exp2(old - top[v]), v_set1(1));
            w->sum[v] *= f;
            v_store(w->m + v * VL, v_select(grows, top[v], old));
            v_store(w->factor + v * VL, v_load(w->factor + v * VL) * f);
            v_store(step + v * VL, f);
        }
        if (w->key) { amx_weights_rescale(nv, low, w->p, keep ? w->s - w->key * nv * VL : NULL, w->key, step); }
        w->grown = 1;
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        top[v] = v_load(w->m + v * VL);
        w->shift[v] = v_select(m_eq(top[v], v_set1(-REAL_INF)), v_zero(), top[v]);   /* nothing seen yet: 2^(-inf - 0) = 0 */
        w->strip[v] = v_zero();
    }
    w->scale = w->score_scale;
    tile_scale_huge(nv, w->s, AMX_DEPTH, &w->scale, top);
}

/* Weights of the next n keys of a strip, an even number, as reals in place of the scores, too, if `keep`. */
SIMD void amx_strip_keys(const int nv, const int keep, const ptrdiff_t low, amx_beside *w, int32_t n)
{
    const vreal scale = v_set1(w->scale);
    vreal shift[NV], sum[NV];
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        shift[v] = w->shift[v];
        sum[v] = w->strip[v];
    }
    real *s = w->s;
    for (int32_t j = w->key; j < w->key + n; j += 2, s += 2 * nv * VL) {
        UNROLL(2)
        for (int v = 0; v < nv; v++) {
            real *const at = s + v * VL;
            const vreal even = amx_exp2(v_load(at) * scale - shift[v]), odd = amx_exp2(v_load(at + nv * VL) * scale - shift[v]);
            sum[v] += even + odd;
            if (keep) {
                v_store(at, even);
                v_store(at + nv * VL, odd);
            }
            amx_store_pairs(w->p + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE, low, even, odd);
        }
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) { w->strip[v] = sum[v]; }
    w->s = s;
    w->key += n;
}

/* Weights begin. */
SIMD void amx_weights_begin(const int nv, amx_beside *w)
{
    w->grown = 0;
    w->key = 0;
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        w->sum[v] = v_zero();
        v_store(w->factor + v * VL, v_set1(1));
    }
}

/* l = l*factor + sum p. */
SIMD void amx_weights_end(const int nv, const amx_beside *w, real *l)
{
    UNROLL(2)
    for (int v = 0; v < nv; v++) { v_store(l + v * VL, v_load(l + v * VL) * v_load(w->factor + v * VL) + w->sum[v]); }
}

/* ---- in a ring, of two vectors a key ---- */

static __attribute__((noinline)) void amx_strip_top_first(ptrdiff_t low, amx_beside *w) { amx_strip_top(NV, 0, low, w); }

static __attribute__((noinline)) void amx_strip_again(ptrdiff_t low, amx_beside *w)
{
    w->s -= AMX_STRIP;
    w->key -= AMX_DEPTH;
    amx_strip_top(NV, 0, low, w);
    amx_strip_keys(NV, 0, low, w, AMX_DEPTH);
}

SIMD void amx_strip_begin(const ptrdiff_t low, amx_beside *w)
{
    int fresh = 0;
    w->s = w->ring + w->slot * AMX_STRIP;
    w->scale = w->score_scale;
    UNROLL(2)
    for (int v = 0; v < NV; v++) {
        w->shift[v] = v_load(w->m + v * VL);
        w->strip[v] = v_zero();
        fresh |= m_any(m_not(m_lt(v_abs(w->shift[v]), v_set1(0x1p22f))));   /* none yet, NaN, or with few digits behind the point */
    }
    if (__builtin_expect(fresh, 0)) { amx_strip_top_first(low, w); }
}

SIMD void amx_strip_end(const ptrdiff_t low, amx_beside *w)
{
    const vreal most = v_set1((real)(1 << 7));   /* less than 2^AMX_LAZY: scores near m + AMX_LAZY may be rounded */
    if (__builtin_expect(m_any(m_not(m_and(m_lt(w->strip[0], most), m_lt(w->strip[1], most)))), 0)) { amx_strip_again(low, w); }
    UNROLL(2)
    for (int v = 0; v < NV; v++) { w->sum[v] += w->strip[v]; }
    w->slot = (w->slot + 1) % AMX_RING;
}

/* Weights of the keys up to `end`. */
SIMD void amx_weights_until(const ptrdiff_t low, amx_beside *w, int32_t end)
{
    while (w->key < end) {
        const int32_t at = w->key % AMX_DEPTH, rest = AMX_DEPTH - at, n = end - w->key < rest ? end - w->key : rest;
        if (!at) { amx_strip_begin(low, w); }
        amx_strip_keys(NV, 0, low, w, n);
        if (n == rest) { amx_strip_end(low, w); }
    }
}

/* So that `steps` shares do all keys up to `end`. */
SIMD void amx_weights_share_among(amx_beside *w, int32_t end, int32_t steps)
{
    w->due = w->key / 2 * 256;
    w->rate = steps ? ((end - w->key) / 2 * 256 + steps - 1) / steps : 0;
}

SIMD void amx_weights_share(const ptrdiff_t low, amx_beside *w, int steps)
{
    w->due += w->rate * steps;
    const int32_t due = w->due / 256 * 2;
    amx_weights_until(low, w, due < w->end ? due : w->end);
}

#endif
