/* semantics.h - what attention means in flashgqa, written once, for C11 and for CUDA.
 *
 * A mask is two functions of the query row i, both non-decreasing in i:
 *     kv_begin(i)  first key that row i sees
 *     kv_end(i)    one past the last key that row i sees
 * Everything else (element test, forward tile range, backward tile range, "tile needs no
 * mask") is derived from these two; a new mask kind edits only them.
 *
 * Row i sits on the diagonal at key diag(i) = i + diag, where diag is sk - sq of its own
 * sequence (align="bottom-right") or 0 (align="top-left").
 */
#ifndef FGQA_SEMANTICS_H
#define FGQA_SEMANTICS_H
#include <stdint.h>

#if defined(__CUDACC__)
#define FGQA_FN static __host__ __device__ __forceinline__
#else
#define FGQA_FN static inline
#endif

#define FGQA_UNBOUNDED INT32_MAX
#define FGQA_LOG2E 1.44269504088896340736   /* scores are kept in base 2: p = 2^(x*log2e - m) */
#define FGQA_LN2   0.69314718055994530942   /* the returned LSE is a natural logarithm */

/* The mask of one sequence. The rule (left, right, chunk) is shared by a batch; the lengths are the sequence's own. */
typedef struct {
    int32_t sq, sk;        /* rows and keys of this sequence */
    int32_t diag;          /* diag(i) = i + diag */
    int32_t left, right;   /* keys visible left/right of diag(i), inclusive; FGQA_UNBOUNDED: all */
    int32_t chunk;         /* > 0: row i sees only keys j with floor(j/chunk) = floor(diag(i)/chunk); 0: off */
} fgqa_mask;

typedef struct { int32_t begin, end; } fgqa_range;   /* half-open */

FGQA_FN int32_t fgqa_clamp(int64_t x, int32_t lo, int32_t hi)
{
    return x < lo ? lo : x > hi ? hi : (int32_t)x;
}

FGQA_FN int64_t fgqa_floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

FGQA_FN int32_t fgqa_kv_begin(const fgqa_mask *m, int32_t i)
{
    const int64_t diag = (int64_t)i + m->diag;
    int64_t begin = m->left == FGQA_UNBOUNDED ? 0 : diag - m->left;
    if (m->chunk > 0) {
        const int64_t chunk_begin = fgqa_floor_div(diag, m->chunk) * m->chunk;
        if (begin < chunk_begin) { begin = chunk_begin; }
    }
    return fgqa_clamp(begin, 0, m->sk);
}

FGQA_FN int32_t fgqa_kv_end(const fgqa_mask *m, int32_t i)
{
    const int64_t diag = (int64_t)i + m->diag;
    int64_t end = m->right == FGQA_UNBOUNDED ? m->sk : diag + m->right + 1;
    if (m->chunk > 0) {
        const int64_t chunk_end = (fgqa_floor_div(diag, m->chunk) + 1) * m->chunk;
        if (end > chunk_end) { end = chunk_end; }
    }
    return fgqa_clamp(end, 0, m->sk);
}

/* ---- derived: nothing below knows which mask kinds exist ---- */

FGQA_FN int fgqa_visible(const fgqa_mask *m, int32_t i, int32_t j)
{
    return fgqa_kv_begin(m, i) <= j && j < fgqa_kv_end(m, i);
}

/* Keys that rows [i0, i1) can see, i0 < i1: what the forward pass walks. */
FGQA_FN fgqa_range fgqa_kv_range(const fgqa_mask *m, int32_t i0, int32_t i1)
{
    fgqa_range r;
    r.begin = fgqa_kv_begin(m, i0);
    r.end = fgqa_kv_end(m, i1 - 1);
    if (r.end < r.begin) { r.end = r.begin; }
    return r;
}

/* Whether every row of [i0, i1) sees every key of [j0, j1): the tile needs no mask. */
FGQA_FN int fgqa_tile_is_full(const fgqa_mask *m, int32_t i0, int32_t i1, int32_t j0, int32_t j1)
{
    return fgqa_kv_begin(m, i1 - 1) <= j0 && j1 <= fgqa_kv_end(m, i0);
}

/* Rows that can see some key of [j0, j1): what the backward pass walks.
 * Inverts the two monotone functions by bisection, so there is no second formula. */
FGQA_FN fgqa_range fgqa_q_range(const fgqa_mask *m, int32_t j0, int32_t j1)
{
    fgqa_range r;
    int32_t lo = 0, hi = m->sq;
    while (lo < hi) {                              /* first row with kv_end > j0 */
        const int32_t mid = lo + (hi - lo) / 2;
        if (fgqa_kv_end(m, mid) > j0) { hi = mid; } else { lo = mid + 1; }
    }
    r.begin = lo;
    hi = m->sq;
    while (lo < hi) {                              /* first row with kv_begin >= j1 */
        const int32_t mid = lo + (hi - lo) / 2;
        if (fgqa_kv_begin(m, mid) >= j1) { hi = mid; } else { lo = mid + 1; }
    }
    r.end = lo;
    return r;
}

/* GQA: query head h reads key/value head h / group. A packed row r of a KV head is
 * (query row r / group, query head kv_head*group + r % group); division keeps row order monotone. */
FGQA_FN int32_t fgqa_kv_head(int32_t h, int32_t group)             { return h / group; }
FGQA_FN int32_t fgqa_packed_row_q(int64_t r, int32_t group)        { return (int32_t)(r / group); }
FGQA_FN int32_t fgqa_packed_row_head(int64_t r, int32_t kv_head, int32_t group) { return kv_head * group + (int32_t)(r % group); }

/* Score chain: x = scale*(q.k); softcap; + bias; - slope*|diag(i) - j|; mask. As expressions, so that
 * one text serves scalars, SIMD vectors and device code. d(cap*tanh(x/cap))/dx = 1 - (y/cap)^2. */
#define FGQA_SOFTCAP_GRAD(y, inv_cap) (1 - ((y) * (inv_cap)) * ((y) * (inv_cap)))
#define FGQA_ALIBI(slope, abs_distance) (-(slope) * (abs_distance))

/* The exponent of a sink's weight, less that of the largest weight, in one unit: 0 where both are +inf, the limit. So a sink
 * of +inf takes all of the weight, while a score of +inf makes its row NaN. */
#define FGQA_SINK_EXPONENT(sink, most) ((sink) == (most) ? 0 : (sink) - (most))

/* Rotary embedding (Su et al., "RoFormer", arXiv:2104.09864): of a row, elements a and b of pair n turn by one angle. Pairs are
 * (n, n + pairs), or neighbours (2n, 2n + 1) where interleaved; elements from 2*pairs on stay as they are. */
FGQA_FN int32_t fgqa_rotary_a(int32_t n, int32_t interleaved)                { return interleaved ? 2 * n : n; }
FGQA_FN int32_t fgqa_rotary_b(int32_t n, int32_t pairs, int32_t interleaved) { return interleaved ? 2 * n + 1 : n + pairs; }
#define FGQA_ROTARY_A(a, b, cosine, sine) ((a) * (cosine) - (b) * (sine))
#define FGQA_ROTARY_B(a, b, cosine, sine) ((a) * (sine) + (b) * (cosine))

/* Dropout: 16 random bits keep a weight if bits >= threshold, threshold = round(65536*p); survivors are scaled by
 * the realised rate 65536/(65536 - threshold). threshold = 65536 drops everything. */
FGQA_FN uint32_t fgqa_dropout_threshold(double p)   /* 0 <= p <= 1; halves to even, like Python's round() */
{
    const double x = 65536.0 * p;
    const uint32_t t = (uint32_t)x;
    return t + (x - t > 0.5 || (x - t == 0.5 && (t & 1u)));
}
FGQA_FN int fgqa_dropout_keeps(uint32_t bits16, uint32_t threshold) { return bits16 >= threshold; }
FGQA_FN double fgqa_dropout_scale(uint32_t threshold) { return threshold >= 65536u ? 0.0 : 65536.0 / (65536.0 - threshold); }

#endif
