/* tile.h - what forward, backward and weights share: packed rows side by side as lanes, blocks of K and V, score tiles.
 *
 * A panel is up to PANEL packed rows of one KV head (semantics.h: packed row r = query row r / g, head r % g of the
 * group), one lane each. Panels start at multiples of PANEL of their sequence and key blocks at multiples of KEYS, so what
 * a row adds up, in which order, depends on nothing but its own sequence.
 *
 * A tile is KEYS x lanes in scratch, key after key, w = nv*VL lanes apart: scores, then weights; additive masks; dropout.
 * Scores are base 2: x*log2(e); -inf is a key the row does not see.
 */
#ifndef FGQA_TILE_H
#define FGQA_TILE_H
#include "../core/philox.h"
#include "../core/plan.h"
#include "decode.h"
#include "gemm.h"
#include "rows.h"

#define PANEL (NV * VL)
#define KEYS 128
#define SCORE_KEYS (KEYS + (FGQA_PAIRS ? 32 : 0))   /* room in a tile: tiles of keys start at multiples of 32 (amx.h) */
#define ROUND_UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* Workers worth waking for plan->flops and `bytes` of K and V: one below 50 us at about half of what a core reaches and a
 * slow core's share of memory bandwidth, else one for each 20 us. */
FGQA_SHARED int32_t tile_threads(const fgqa_plan *plan, double bytes)
{
    const double microseconds = plan->flops / (FGQA_TILES ? 500e3 : FGQA_PAIRS ? 200e3 : VBYTES * (FGQA_REAL_F64 ? 0.6e3 : 1.2e3)) + bytes / 8e3;
    const double worth = microseconds < 50 || plan->tasks < 1 ? 1 : microseconds / 20;
    const double most = worth < (double)plan->tasks ? worth : (double)plan->tasks;
    return most < 1 ? 1 : most > INT32_MAX ? INT32_MAX : (int32_t)most;
}

/* ---- one sequence and KV head ---- */

typedef struct {
    const fgqa_problem *p;
    fgqa_sequence seq;
    int32_t b, kv_head;
    int64_t rows;                    /* packed rows of the sequence: sq*g */
    real score_scale, q_sign;        /* |scale|*log2(e), and the sign of scale, which the packed q carries */
    real cap_inner, cap_outer;       /* softcap: x*log2(e) = outer*tanh(q.k * inner); outer 0: no softcap */
    int has_add;                     /* mask or bias given: tiles need tile_additive() */
    int needs_transform;             /* scores are more than scale*(q.k) even where every key is seen */
} tile_sequence;

SIMD void *view_at(const fgqa_view *view, int64_t b, int64_t h, int64_t s)
{
    return (char *)view->data + (b * view->stride_b + h * view->stride_h + s * view->stride_s) * (int64_t)fgqa_dtype_bytes(view->dtype);
}

FGQA_SHARED tile_sequence tile_sequence_init(const fgqa_problem *p, int32_t b, int32_t kv_head)
{
    tile_sequence t = {.p = p, .seq = fgqa_problem_sequence(p, b), .b = b, .kv_head = kv_head};
    t.rows = (int64_t)t.seq.mask.sq * p->g;
    const double scale = p->scale < 0 ? -p->scale : p->scale;
    t.q_sign = p->scale < 0 ? -1 : 1;
    t.score_scale = (real)(scale * FGQA_LOG2E);
    if (p->softcap > 0) {
        t.cap_inner = (real)(scale / p->softcap);
        t.cap_outer = (real)(p->softcap * FGQA_LOG2E);
    }
    t.has_add = p->view[FGQA_ARG_mask].data != NULL || p->view[FGQA_ARG_bias].data != NULL;
    t.needs_transform = p->softcap > 0 || p->view[FGQA_ARG_alibi_slopes].data != NULL;
    return t;
}

/* Row of a [b, h, s, d] view that packed row r of this KV head owns (q, out, dout, dq). */
SIMD void *tile_packed_row(const tile_sequence *t, const fgqa_view *view, int64_t r)
{
    return view_at(view, t->b, fgqa_packed_row_head(r, t->kv_head, t->p->g), t->seq.q_row + fgqa_packed_row_q(r, t->p->g));
}

/* lse and dlse: the same place in [b, hq, sq]. */
SIMD real tile_lse_load(const tile_sequence *t, const fgqa_view *view, int64_t r)
{
    real x = 0;
    row_load(&x, tile_packed_row(t, view, r), view->dtype, 1, 1);
    return x;
}

SIMD void tile_lse_store(const tile_sequence *t, const fgqa_view *view, int64_t r, real x)
{
    row_store(tile_packed_row(t, view, r), view->dtype, 1, &x, 1);
}

/* A float per query head and batch (sink, alibi_slopes); row r's own. */
SIMD real tile_head_value(const tile_sequence *t, fgqa_arg arg, int64_t r)
{
    const fgqa_view *view = &t->p->view[arg];
    real x = 0;
    row_load(&x, view_at(view, t->b, fgqa_packed_row_head(r, t->kv_head, t->p->g), 0), view->dtype, 1, 1);
    return x;
}

/* ---- panels ---- */

typedef struct {
    _Alignas(64) ireal begin[PANEL], end[PANEL];   /* lane sees keys begin <= j < end; idle lanes see none */
    _Alignas(64) ireal diag[PANEL];                /* diag(i) */
    _Alignas(64) real slope[PANEL];                /* ALiBi slope * log2(e); 0 without ALiBi */
    _Alignas(64) ureal row[PANEL], head[PANEL];    /* i and b*hq + h: dropout's counter */
    const real *ahead;                             /* V of the keys at hand if the panel is alone and V in place, else NULL: prefetched */
    ptrdiff_t ld_ahead;
    const void *const *k_list, *const *v_list;     /* addresses of the rows instead of blocks, or NULL; V's to be prefetched */
    int64_t r0;                                    /* first packed row */
    int32_t rows, nv, w;                           /* rows in use, vectors that hold them, lanes: w = nv*VL */
    int32_t few;                                   /* nonzero: at most FEW_ROWS rows, computed by fwd_few.h; q is [lane][ROUND_UP(d, VL)] */
    int32_t i0, i1;                                /* query rows [i0, i1) */
    fgqa_range keys;                               /* keys that some row sees */
} tile_panel;

/* The panel at packed row r0 (a multiple of PANEL) of rows up to r1. */
FGQA_SHARED void tile_panel_init(tile_panel *panel, const tile_sequence *t, int64_t r0, int64_t r1)
{
    const fgqa_problem *p = t->p;
    panel->r0 = r0;
    panel->rows = r1 - r0 < PANEL ? (int32_t)(r1 - r0) : PANEL;
    panel->nv = (panel->rows + VL - 1) / VL;
    panel->w = panel->nv * VL;
    panel->few = 0;
    panel->ahead = NULL;
    panel->k_list = panel->v_list = NULL;
    panel->i0 = fgqa_packed_row_q(r0, p->g);
    panel->i1 = fgqa_packed_row_q(r0 + panel->rows - 1, p->g) + 1;
    panel->keys = fgqa_kv_range(&t->seq.mask, panel->i0, panel->i1);
    const int alibi = p->view[FGQA_ARG_alibi_slopes].data != NULL;
    const int32_t first_head = fgqa_packed_row_head(0, t->kv_head, p->g), end_head = first_head + p->g;
    const ureal last_head = (ureal)(uint32_t)(t->b * p->hq + fgqa_packed_row_head(r0 + panel->rows - 1, t->kv_head, p->g));
    int32_t i = panel->i0, h = fgqa_packed_row_head(r0, t->kv_head, p->g), begin = fgqa_kv_begin(&t->seq.mask, i), end = fgqa_kv_end(&t->seq.mask, i);
    for (int32_t lane = panel->w - VL; lane < panel->w; lane++) {     /* idle ones; used ones follow */
        panel->begin[lane] = panel->end[lane] = 0;
        panel->diag[lane] = panel->i1 - 1 + t->seq.mask.diag;
        panel->slope[lane] = 0;
        panel->row[lane] = (ureal)(panel->i1 - 1);
        panel->head[lane] = last_head;
    }
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        panel->begin[lane] = begin;
        panel->end[lane] = end;
        panel->diag[lane] = i + t->seq.mask.diag;
        panel->slope[lane] = alibi ? tile_head_value(t, FGQA_ARG_alibi_slopes, r0 + lane) * (real)FGQA_LOG2E : 0;
        panel->row[lane] = (ureal)i;
        panel->head[lane] = (ureal)(uint32_t)(t->b * p->hq + h);
        if (lane + 1 < panel->rows && ++h == end_head) {     /* packed rows: heads of the group, then the next query row */
            h = first_head;
            i++;
            begin = fgqa_kv_begin(&t->seq.mask, i);
            end = fgqa_kv_end(&t->seq.mask, i);
        }
    }
}

/* Rows of a panel as [lane][cols] (ld reals apart, a multiple of VL; columns up to ld are 0), lanes beyond the rows 0: all of the
 * panel, or as many as decode.h computes. */
FGQA_SHARED void tile_pack_rows(real *to, int32_t ld, const tile_sequence *t, const tile_panel *panel, const fgqa_view *view, int32_t cols, real factor)
{
    const int32_t lanes = panel->few ? few_lanes(panel->rows) : panel->w;
    for (int32_t lane = 0; lane < lanes; lane++, to += ld) {
        int32_t done = 0;
        if (lane < panel->rows) {
            row_load(to, tile_packed_row(t, view, panel->r0 + lane), view->dtype, view->stride_d, cols);
            if (factor != 1) {
                for (int32_t c = 0; c < cols; c++) { to[c] *= factor; }
            }
            done = cols;
        }
        memset(to + done, 0, (size_t)(ld - done) * sizeof(real));
    }
}

/* [lane][cols] to [col][lane]: the B operand of scores. ld as above; `to` has room for ROUND_UP(cols, VL) columns. */
FGQA_SHARED void tile_transpose_rows(real *to, const real *from, int32_t ld, int32_t w, int32_t cols)
{
    for (int32_t lane = 0; lane < w; lane += VL) {
        for (int32_t c = 0; c < cols; c += VL) { v_transpose(to + (ptrdiff_t)c * w + lane, w, from + (ptrdiff_t)lane * ld + c, ld); }
    }
}

/* And back: [col][lane] to [lane][cols]. */
FGQA_SHARED void tile_transpose_panel(real *to, int32_t ld, const real *from, int32_t w, int32_t cols)
{
    for (int32_t lane = 0; lane < w; lane += VL) {
        for (int32_t c = 0; c < cols; c += VL) { v_transpose(to + (ptrdiff_t)lane * ld + c, ld, from + (ptrdiff_t)c * w + lane, w); }
    }
}

/* ---- blocks of K and V ---- */

/* Rows [j0, j1) of a K or V view as reals with unit stride, `stride` apart: the caller's own memory when it is that
 * already, else a copy in scratch (KEYS x ROUND_UP(cols, VL)). */
typedef struct { const real *data; ptrdiff_t stride; } tile_block;

/* The first of rows [s0, s1), and how many of them follow each other: all, or those in one page of a KV cache. */
typedef struct { const char *row; int32_t rows; } tile_page;

SIMD tile_page tile_page_at(const tile_sequence *t, const fgqa_view *view, int32_t s0, int32_t s1)
{
    const fgqa_cache *cache = &t->p->cache;
    if (cache->page_size == 0) {
        const tile_page all = {view_at(view, t->b, t->kv_head, s0), s1 - s0};
        return all;
    }
    const int32_t row = s0 % cache->page_size, rest = cache->page_size - row;
    const tile_page page = {view_at(view, fgqa_cache_page(cache, t->b, s0), t->kv_head, row), s1 - s0 < rest ? s1 - s0 : rest};
    return page;
}

/* The factor of a float8 cache's elements; 1 for any other. */
FGQA_SHARED real tile_cache_scale(const tile_sequence *t, const fgqa_view *view)
{
    const fgqa_view *scale = view == &t->p->view[FGQA_ARG_k] ? &t->p->cache.k_scale : &t->p->cache.v_scale;
    real x = 1;
    if (scale->data) { row_load(&x, view_at(scale, t->b, t->kv_head, 0), scale->dtype, 1, 1); }
    return x;
}

SIMD int is_own(const fgqa_view *view, int32_t cols)
{
    return view->dtype == (FGQA_REAL_F64 ? FGQA_F64 : FGQA_F32) && (view->stride_d == 1 || cols <= 1);
}

FGQA_SHARED tile_block tile_block_load(const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols, real *scratch)
{
    const int32_t ld = ROUND_UP(cols, VL), s0 = (int32_t)t->seq.k_row + j0, s1 = (int32_t)t->seq.k_row + j1;
    const int64_t step = view->stride_s * (int64_t)fgqa_dtype_bytes(view->dtype);
    const tile_block copy = {scratch, ld};
    tile_page page = tile_page_at(t, view, s0, s1);
    if (is_own(view, cols) && page.rows == s1 - s0) {
        const tile_block in_place = {(const real *)(const void *)page.row, (ptrdiff_t)view->stride_s};
        return in_place;
    }
    const real factor = t->p->cache.page_size ? tile_cache_scale(t, view) : 1;
    for (int32_t s = s0;;) {
        for (int32_t n = 0; n < page.rows; n++) {
            real *to = scratch + (ptrdiff_t)(s - s0 + n) * ld;
            row_load(to, page.row + n * step, view->dtype, view->stride_d, cols);
            for (int32_t c = 0; factor != 1 && c < cols; c++) { to[c] *= factor; }
        }
        s += page.rows;
        if (s >= s1) { return copy; }
        page = tile_page_at(t, view, s, s1);
    }
}

/* How rows of K and V are listed for the products of few packed rows; FEW_BLOCK: they must be copied as reals. */
FGQA_SHARED few_form tile_list_form(const fgqa_problem *p)
{
    const fgqa_view *const k = &p->view[FGQA_ARG_k], *const v = &p->view[FGQA_ARG_v];
    if (is_own(k, p->d) && is_own(v, p->dv)) { return FEW_LIST; }
    if (k->dtype != v->dtype || (k->stride_d != 1 && p->d > 1) || (v->stride_d != 1 && p->dv > 1)) { return FEW_BLOCK; }
    return FEW_HAS_BF16 && k->dtype == FGQA_BF16 ? FEW_LIST_BF16 : FEW_HAS_F16 && k->dtype == FGQA_F16 ? FEW_LIST_F16 : FEW_BLOCK;
}

/* The addresses of the rows instead, for products that take a list (decode.h), so that nothing is copied where pages are small or
 * elements are; 0 if they are reals that one page has. `list`: KEYS + LIST_AHEAD; it gets
 * the rows to be prefetched meanwhile, too. */
FGQA_SHARED int tile_block_list(const void **list, const few_form form, const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols)
{
    const int64_t step = view->stride_s * (int64_t)fgqa_dtype_bytes(view->dtype);
    const int32_t s0 = (int32_t)t->seq.k_row + j0, end = (int32_t)t->seq.k_row + t->seq.mask.sk, most = j1 - j0 + few_ahead(form, j1 - j0, cols);
    if (form == FEW_LIST && tile_page_at(t, view, s0, s0 + j1 - j0).rows == j1 - j0) { return 0; }
    int32_t n = 0;
    while (n < most && s0 + n < end) {
        const tile_page page = tile_page_at(t, view, s0 + n, end - s0 < most ? end : s0 + most);
        const char *row = page.row;
        for (int32_t k = 0; k < page.rows; k++, row += step) { list[n++] = row; }
    }
    for (; n < most; n++) { list[n] = list[n - 1]; }      /* only prefetched */
    return 1;
}

/* ---- rows that hold a NaN or an infinity ----
 * 0 * NaN is NaN, so a product over a tile that some lanes do not see in full must leave such rows out: they are zeroed in
 * a copy, and added back for the lanes that see them. */

typedef struct { int32_t count; int16_t row[KEYS]; } tile_bad_rows;

SIMD int row_is_finite(const real *x, int32_t n)
{
    vreal sum = v_zero();
    real tail = 0;
    int32_t i = 0;
    for (; i + VL <= n; i += VL) { sum += v_load(x + i) * v_zero(); }
    for (; i < n; i++) { tail += x[i] * 0; }
    return !m_any(m_not(m_eq(sum, sum))) && tail == tail;
}

FGQA_SHARED void tile_find_bad_rows(tile_bad_rows *bad, const tile_block *block, int32_t rows, int32_t cols)
{
    bad->count = 0;
    for (int32_t r = 0; r < rows; r++) {
        if (!row_is_finite(block->data + r * block->stride, cols)) { bad->row[bad->count++] = (int16_t)r; }
    }
}

/* The block with its bad rows zeroed, in scratch (KEYS x ROUND_UP(cols, VL)). */
FGQA_SHARED tile_block tile_without_bad_rows(const tile_bad_rows *bad, const tile_block *block, int32_t rows, int32_t cols, real *scratch)
{
    const tile_block clean = {scratch, ROUND_UP(cols, VL)};
    int32_t next = 0;
    for (int32_t r = 0; r < rows; r++) {
        real *to = scratch + r * clean.stride;
        if (next < bad->count && bad->row[next] == r) {
            memset(to, 0, (size_t)cols * sizeof(real));
            next++;
        } else {
            memcpy(to, block->data + r * block->stride, (size_t)cols * sizeof(real));
        }
    }
    return clean;
}

/* Lane for lane, whether a row that sees keys [begin, end) sees this one; `add`: what is added to their scores, or NULL. */
SIMD vmask tile_sees_key(vint key, vint begin, vint end, const real *add)
{
    vmask sees = m_and(m_not(m_lt_int(key, begin)), m_lt_int(key, end));
    if (add) { sees = m_and(sees, m_not(m_eq(v_load(add), v_set1(-REAL_INF)))); }
    return sees;
}

/* Whether lanes v*VL.. of the panel see key j; `add` is the additive tile's row of key j, or NULL. */
SIMD vmask tile_sees(const tile_panel *panel, const real *add, int32_t j, int32_t v)
{
    return tile_sees_key(v_set1_int(j), v_load_int(panel->begin + v * VL), v_load_int(panel->end + v * VL), add ? add + v * VL : NULL);
}

/* out[col][lane] += weight[lane] * x[col] where the lane sees key j: one bad row's product. */
FGQA_SHARED void tile_add_bad_row(const tile_panel *panel, const real *add, int32_t j, const real *weight, const real *x, int32_t cols, real *out)
{
    for (int32_t v = 0; v < panel->nv; v++) {
        const vmask sees = tile_sees(panel, add, j, v);
        if (!m_any(sees)) { continue; }
        const vreal factor = v_load(weight + v * VL);
        for (int32_t c = 0; c < cols; c++) {
            real *to = out + (ptrdiff_t)c * panel->w + v * VL;
            v_store(to, v_load(to) + v_select(sees, factor * v_set1(x[c]), v_zero()));
        }
    }
}

/* ---- mask and bias ---- */

/* What follows a block's part of a row, so many bytes at `from`, to the second-level cache: the next block asks for it. */
SIMD void tile_additive_ahead(const void *from, int64_t bytes)
{
    for (int64_t at = bytes; at < 2 * bytes; at += 64) { __builtin_prefetch((const char *)from + at, 0, 2); }
}

/* n keys from j0 on of one row: bias, or 0; -inf where the bool mask says no. */
FGQA_SHARED void tile_additive_row(real *to, const tile_sequence *t, int32_t h, int32_t i, int32_t j0, int32_t n)
{
    const fgqa_view *bias = &t->p->view[FGQA_ARG_bias], *mask = &t->p->view[FGQA_ARG_mask];
    const int more = j0 + n < t->seq.mask.sk;
    if (bias->data) {
        const int64_t step = bias->stride_d * (int64_t)fgqa_dtype_bytes(bias->dtype);
        const char *from = (const char *)view_at(bias, t->b, h, i) + j0 * step;
        row_load(to, from, bias->dtype, bias->stride_d, n);
        if (more) { tile_additive_ahead(from, n * step); }
    } else {
        memset(to, 0, (size_t)n * sizeof(real));
    }
    if (mask->data) {
        const uint8_t *keep = (const uint8_t *)view_at(mask, t->b, h, i) + j0 * mask->stride_d;
        if (mask->stride_d == 1) {
            for (int32_t n0 = 0; n0 < n; n0++) { to[n0] = keep[n0] ? to[n0] : -REAL_INF; }
        } else {
            for (int32_t n0 = 0; n0 < n; n0++) { to[n0] = keep[n0 * mask->stride_d] ? to[n0] : -REAL_INF; }
        }
        if (more) { tile_additive_ahead(keep, n * mask->stride_d); }
    }
}

typedef enum {
    TILE_UNSEEN,    /* no lane sees a key: skip it */
    TILE_FULL,      /* every row sees every key, and nothing is added */
    TILE_PARTIAL
} tile_kind;

/* Whether a key is seen, and whether anything is changed by what is added. */
typedef struct { vmask seen, changed; } tile_verdict;

SIMD tile_verdict tile_verdict_begin(void)
{
    const vmask none = m_lt(v_zero(), v_zero());
    const tile_verdict verdict = {none, none};
    return verdict;
}

SIMD tile_kind tile_verdict_kind(const tile_verdict *verdict)
{
    return !m_any(verdict->seen) ? TILE_UNSEEN : m_any(verdict->changed) ? TILE_PARTIAL : TILE_FULL;
}

/* Whether mask and bias differ from query row to query row, and from head to head of a group. */
SIMD int tile_additive_by_row(const fgqa_problem *p)
{
    const fgqa_view *bias = &p->view[FGQA_ARG_bias], *mask = &p->view[FGQA_ARG_mask];
    return (bias->data && bias->stride_s) || (mask->data && mask->stride_s);
}

SIMD int tile_additive_by_head(const fgqa_problem *p)
{
    const fgqa_view *bias = &p->view[FGQA_ARG_bias], *mask = &p->view[FGQA_ARG_mask];
    return (bias->data && bias->stride_h) || (mask->data && mask->stride_h);
}

/* That of packed row r, whose predecessor's is KEYS before unless r is `first`; up to a whole vector. */
SIMD void tile_additive_lane(real *to, const tile_sequence *t, int64_t r, int first, int32_t j0, int32_t n, tile_verdict *verdict)
{
    const fgqa_problem *const p = t->p;
    const int32_t i = fgqa_packed_row_q(r, p->g);
    if (!first && !tile_additive_by_head(p) && (!tile_additive_by_row(p) || i == fgqa_packed_row_q(r - 1, p->g))) {
        memcpy(to, to - KEYS, (size_t)ROUND_UP(n, VL) * sizeof(real));
        return;
    }
    tile_additive_row(to, t, fgqa_packed_row_head(r, t->kv_head, p->g), i, j0, n);
    for (int32_t j = n; j < ROUND_UP(n, VL); j++) { to[j] = to[0]; }      /* which changes no verdict */
    for (int32_t j = 0; j < n; j += VL) {
        const vreal x = v_load(to + j);
        verdict->seen = m_or(verdict->seen, m_not(m_eq(x, v_set1(-REAL_INF))));
        verdict->changed = m_or(verdict->changed, m_not(m_eq(x, v_zero())));
    }
}

/* Fills add[key][lane] for keys [j0, j1) of a panel from mask and bias, -inf where masked; idle lanes
 * get anything. `scratch`: VL x KEYS reals. */
FGQA_SHARED tile_kind tile_additive(real *add, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, real *scratch)
{
    const int32_t n = j1 - j0;
    tile_verdict verdict = tile_verdict_begin();
    if (!tile_additive_by_head(t->p) && !tile_additive_by_row(t->p)) {
        tile_additive_lane(scratch, t, panel->r0, 1, j0, n, &verdict);
        const tile_kind kind = tile_verdict_kind(&verdict);
        for (int32_t c = 0; kind == TILE_PARTIAL && c < n; c++) {
            for (int32_t v = 0; v < panel->nv; v++) { v_store(add + (ptrdiff_t)c * panel->w + v * VL, v_set1(scratch[c])); }
        }
        return kind;
    }
    for (int32_t v = 0; v < panel->nv; v++) {
        for (int32_t lane = 0; lane < VL && v * VL + lane < panel->rows; lane++) {
            tile_additive_lane(scratch + lane * KEYS, t, panel->r0 + v * VL + lane, lane == 0, j0, n, &verdict);
        }
        for (int32_t c = 0; c < n; c += VL) { v_transpose(add + (ptrdiff_t)c * panel->w + v * VL, panel->w, scratch + c, KEYS); }
    }
    return tile_verdict_kind(&verdict);
}

/* ---- scores ---- */

#define SMALLEST_SCALE ((real)(FGQA_REAL_F64 ? 0x1p-1022 : 0x1p-126))   /* vectors of a smaller one are 0, and 0 * -inf is NaN */

/* What a sequence does to its scores. A copy on the stack is in registers where scores are stored. */
typedef struct { real scale, cap_inner, cap_outer; int alibi; } tile_chain;

SIMD tile_chain tile_chain_of(const tile_sequence *t)
{
    const tile_chain chain = {t->score_scale, t->cap_inner, t->cap_outer, t->p->view[FGQA_ARG_alibi_slopes].data != NULL};
    return chain;
}

/* From x = q.k: scale, softcap, + add (NULL: none), ALiBi, mask. tanh (NULL: not wanted) receives tanh(x/cap), of which the
 * backward pass needs 1 - tanh^2. A finite score never becomes -inf, which is kept for "not seen": a row whose keys all carry the
 * lowest float as bias is uniform, as it is in the plain formula. */
SIMD vreal tile_score(const tile_chain chain, vreal x, const real *add, vint key, vint begin, vint end, vint diag, vreal slope, real *tanh)
{
    if (chain.cap_outer > 0) {
        x = v_tanh(x * v_set1(chain.cap_inner));
        if (tanh) { v_store(tanh, x); }
        x *= v_set1(chain.cap_outer);
    } else {
        x *= v_set1(chain.scale);
    }
    if (add) { x += v_load(add) * v_set1((real)FGQA_LOG2E); }
    if (chain.alibi) { x += FGQA_ALIBI(slope, v_abs(v_from_int(diag - key))); }
    return v_select(tile_sees_key(key, begin, end, add), v_max(v_set1(REAL_LOWEST), x), v_set1(-REAL_INF));
}

/* That of a tile, in place; tanh_tile or NULL. */
FGQA_SHARED void tile_transform(real *s, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, const real *add, real *tanh_tile)
{
    const tile_chain chain = tile_chain_of(t);
    for (int32_t v = 0; v < panel->nv; v++) {
        const vint begin = v_load_int(panel->begin + v * VL), end = v_load_int(panel->end + v * VL), diag = v_load_int(panel->diag + v * VL);
        const vreal slope = v_load(panel->slope + v * VL);
        for (int32_t j = j0; j < j1; j++) {
            const ptrdiff_t at = (ptrdiff_t)(j - j0) * panel->w + v * VL;
            const real *const added = add ? add + at : NULL;
            v_store(s + at, tile_score(chain, v_load(s + at), added, v_set1_int(j), begin, end, diag, slope, tanh_tile ? tanh_tile + at : NULL));
        }
    }
}

/* q.k of `keys` keys that lie in pages, page by page; the pages of V, which has the same, are brought into L2. */
FGQA_SHARED void tile_scores_by_page(real *s, const tile_sequence *t, const tile_panel *panel, int32_t keys, const real *q)
{
    const ptrdiff_t step = (ptrdiff_t)t->p->view[FGQA_ARG_k].stride_s, step_v = (ptrdiff_t)t->p->view[FGQA_ARG_v].stride_s;
    for (int32_t j = 0, n; j < keys; j += n) {
        const real *const k = panel->k_list[j];
        for (n = 1; j + n < keys && panel->k_list[j + n] == k + n * step; n++) {}
        gemm_row_set_ahead(n, panel->nv, t->p->d, k, step, q, panel->w, s + (ptrdiff_t)j * panel->w, panel->w, panel->v_list[j], step_v);
    }
}

/* What surrounds the product K q of keys [j0, j1), inside panel->keys and one key block. Before it: whether all is seen, and the
 * additive tile. `add`: KEYS x PANEL, `scratch`: VL x KEYS; used when the sequence has_add. *used_add is add, or NULL where it
 * is not needed. */
FGQA_SHARED tile_kind tile_scores_begin(const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, real *add, real *scratch,
                                        const real **used_add)
{
    tile_kind kind = TILE_FULL;
    *used_add = NULL;
    if (t->has_add) {
        kind = tile_additive(add, t, panel, j0, j1, scratch);
        if (kind == TILE_UNSEEN) { return kind; }
        if (kind == TILE_PARTIAL) { *used_add = add; }
    }
    return fgqa_tile_is_full(&t->seq.mask, panel->i0, panel->i1, j0, j1) ? kind : TILE_PARTIAL;
}

/* And after it: returns scale, with score = s*scale, which is 1 once transformed. */
FGQA_SHARED real tile_scores_end(real *s, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, tile_kind kind,
                                 const real *used_add, real *tanh_tile)
{
    if (kind != TILE_PARTIAL && !t->needs_transform) { return t->score_scale; }
    tile_transform(s, t, panel, j0, j1, used_add, tanh_tile);
    return 1;
}

/* All of it, into s[key][lane]. `k` is row j0 of the block, `q` the panel [d][w]. */
FGQA_SHARED tile_kind tile_scores(real *s, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1, const tile_block *k,
                                  const real *q, real *add, real *scratch, real *tanh_tile, const real **used_add, real *scale)
{
    const tile_kind kind = tile_scores_begin(t, panel, j0, j1, add, scratch, used_add);
    if (kind == TILE_UNSEEN) { return kind; }
    if (panel->k_list) {
        tile_scores_by_page(s, t, panel, j1 - j0, q);
    } else if (panel->ahead) {
        gemm_row_set_ahead(j1 - j0, panel->nv, t->p->d, k->data, k->stride, q, panel->w, s, panel->w, panel->ahead, panel->ld_ahead);
    } else {
        gemm_row_set(j1 - j0, panel->nv, t->p->d, k->data, k->stride, q, panel->w, s, panel->w, NULL);
    }
    *scale = tile_scores_end(s, t, panel, j0, j1, kind, *used_add, tanh_tile);
    return kind;
}

/* n scores times *scale, each rounded, and 1 in its place. Fused with the subtraction of a maximum beyond 2^23 (double: 2^52)
 * they would keep digits that it lost in rounding, and 2^x could be 0 or infinite for the largest of them. */
SIMD void tile_scale(real *s, int32_t n, real *scale)
{
    for (int32_t i = 0; i < n && *scale != 1; i += VL) { v_store(s + i, v_load(s + i) * v_set1(*scale)); }
    *scale = 1;
}

/* That, of n keys, where one of the maxima is so large. */
SIMD void tile_scale_huge(const int nv, real *s, int32_t n, real *scale, const vreal *top)
{
    vmask huge = m_lt(v_zero(), v_zero());
    UNROLL(3)
    for (int v = 0; v < nv; v++) {
        const vreal size = v_abs(top[v]);
        huge = m_or(huge, m_and(m_lt(v_set1(FGQA_REAL_F64 ? (real)0x1p52 : (real)0x1p23), size), m_lt(size, v_set1(REAL_INF))));
    }
    if (__builtin_expect(m_any(huge), 0)) { tile_scale(s, n * nv * VL, scale); }
}

/* ---- dropout ---- */

/* keep[key][lane]: all bits set where the weight of keys [j0, j1) survives, none where it is dropped. */
FGQA_SHARED void tile_dropout(ireal *keep, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    const vint threshold = v_set1_int((ireal)p->dropout_threshold);
    for (int32_t block = j0 / 8; block <= (j1 - 1) / 8; block++) {
        for (int32_t v = 0; v < panel->nv; v++) {
            vword x0 = (vword)v_set1_int((ireal)(ureal)(uint32_t)block), x1 = (vword)v_load_int((const ireal *)panel->row + v * VL);
            vword x2 = (vword)v_load_int((const ireal *)panel->head + v * VL), x3 = (vword)v_set1_int((ireal)(ureal)(uint32_t)p->offset);
            uint32_t k0 = (uint32_t)p->seed, k1 = (uint32_t)(p->seed >> 32);
            for (int round = 0; round < FGQA_PHILOX_ROUNDS; round++) {
                vword high0, low0, high2, low2;
                v_mul_words(x0, FGQA_PHILOX_M0, &high0, &low0);
                v_mul_words(x2, FGQA_PHILOX_M1, &high2, &low2);
                x0 = high2 ^ x1 ^ (vword)v_set1_int((ireal)(ureal)k0);
                x2 = high0 ^ x3 ^ (vword)v_set1_int((ireal)(ureal)k1);
                x1 = low2;
                x3 = low0;
                k0 += FGQA_PHILOX_W0;
                k1 += FGQA_PHILOX_W1;
            }
            const vint words[4] = {(vint)x0, (vint)x1, (vint)x2, (vint)x3};
            for (int n = 0; n < 8; n++) {
                const int32_t j = block * 8 + n;
                if (j < j0 || j >= j1) { continue; }
                const vint half = (n & 1 ? (vint)((vword)words[n >> 1] >> 16) : words[n >> 1]) & v_set1_int(0xFFFF);
                *(vint_any *)(keep + (ptrdiff_t)(j - j0) * panel->w + v * VL) = v_mask_bits(m_not(m_lt_int(half, threshold)));
            }
        }
    }
}

#endif
