/* amx_fwd.h - forward's products on the tile unit: the part of fwd.c that differs in the row "amx".
 *
 *     S^T = K Q^T         K as it lies in memory, Q packed once a panel
 *     P^T = 2^(S^T - m)   written as bfloat16, pairs of keys interleaved
 *     O^T += V^T P^T      V transposed once a block of keys, for all panels of the task
 *
 * float16, and float32 where precision="bf16x3" asks for it, are split into two parts (amx.h): K, Q, V and P; float16 without
 * loss, and its scores are those of float32 arithmetic, as their LSE is float32. What is infinite or NaN must not meet the other
 * operand's low part, whose sign is its own: scores of such rows of K and Q are computed apart, and such rows of V are added
 * apart even where all lanes see them.
 *
 * m follows the largest score only when that has grown by more than AMX_LAZY: weights up to 2^AMX_LAZY lose nothing in
 * bfloat16, and O is rarely rescaled.
 */
#ifndef FGQA_AMX_FWD_H
#define FGQA_AMX_FWD_H
#include "../core/workspace.h"
#include "amx_panel.h"

#define AMX_LAZY ((real)8)
#define SMALLEST_SCALE 0x1p-126f

/* Numbers from high to low parts of a buffer of n numbers; 0: bfloat16, which has one part. */
SIMD ptrdiff_t amx_low_of(const fgqa_problem *p, ptrdiff_t n) { return p->dtype == FGQA_BF16 ? 0 : n; }
SIMD size_t amx_parts(const fgqa_problem *p) { return p->dtype == FGQA_BF16 ? 1 : 2; }

typedef struct {
    bf16 *k, *v;              /* rows of the block */
    bf16 *v_t, *v_t_clean;    /* A: [tile of columns][KEYS/AMX_DEPTH]; without the rows that hold a NaN or an infinity */
    bf16 *p[2];               /* B: [KEYS/AMX_DEPTH][nv]; they take turns */
    ptrdiff_t k_low, v_low, v_t_low, p_low;   /* from the high parts of each */
    tile_bad_rows bad_keys;   /* of K, where there are two parts, counted from origin */
    tile_bad_rows bad;        /* of V */
    int32_t origin, searched; /* the multiple of KEYS at which the block starts */
} amx_keys;

static void amx_keys_carve(amx_keys *keys, fgqa_arena *arena, const fgqa_problem *p)
{
    const size_t d = (size_t)AMX_PAD(p->d), dv = (size_t)AMX_PAD(p->dv), parts = amx_parts(p);
    keys->k = fgqa_arena_take(arena, parts * AMX_BLOCK_ROWS * d, sizeof(bf16));
    keys->v = fgqa_arena_take(arena, parts * AMX_BLOCK_ROWS * dv, sizeof(bf16));
    keys->v_t = fgqa_arena_take(arena, parts * KEYS * dv, sizeof(bf16));
    keys->v_t_clean = fgqa_arena_take(arena, parts * KEYS * dv, sizeof(bf16));
    for (int n = 0; n < 2; n++) { keys->p[n] = fgqa_arena_take(arena, parts * KEYS * PANEL, sizeof(bf16)); }
    keys->k_low = amx_low_of(p, AMX_BLOCK_ROWS * (ptrdiff_t)d);
    keys->v_low = amx_low_of(p, AMX_BLOCK_ROWS * (ptrdiff_t)dv);
    keys->v_t_low = amx_low_of(p, KEYS * (ptrdiff_t)dv);
    keys->p_low = amx_low_of(p, KEYS * PANEL);
}

/* V^T of the rows of V, all parts. */
static void amx_pack_values(const amx_keys *keys, bf16 *to, int32_t dv)
{
    amx_pack_keys(to, keys->v, dv);
    if (keys->v_low) { amx_pack_keys(to + keys->v_t_low, keys->v + keys->v_low, dv); }
}

/* Keys [j0, j1) of one block. */
static void amx_keys_load(amx_keys *keys, const tile_sequence *t, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    keys->origin = j0 / KEYS * KEYS;
    keys->searched = 0;
    keys->bad_keys.count = 0;
    amx_load_keys(keys->k, keys->k_low, t, &p->view[FGQA_ARG_k], j0, j1, p->d);
    amx_load_keys(keys->v, keys->v_low, t, &p->view[FGQA_ARG_v], j0, j1, p->dv);
    if (keys->k_low) { amx_zero_bad_rows(&keys->bad_keys, keys->k, keys->k_low, p->d); }
    amx_pack_values(keys, keys->v_t, p->dv);
}

/* The block's bad rows of V, found when first asked for; then they are zeroed and the block is transposed again. */
static int32_t amx_bad_values(amx_keys *keys, const fgqa_problem *p)
{
    if (!keys->searched && amx_zero_bad_rows(&keys->bad, keys->v, keys->v_low, p->dv)) { amx_pack_values(keys, keys->v_t_clean, p->dv); }
    keys->searched = 1;
    return keys->bad.count;
}

/* ---- weights ---- */

/* m after the keys of w, and what it takes from them. Returns whether some factor is not 1. */
SIMD int amx_weights_begin(const int nv, amx_beside *w, real *m, real *factor)
{
    vreal top[NV];
    int grown = 0;
    UNROLL(2)
    for (int v = 0; v < nv; v++) { top[v] = v_set1(-REAL_INF); }
    for (int32_t j = 0; j < w->keys; j++) {
        UNROLL(2)
        for (int v = 0; v < nv; v++) { top[v] = v_max(v_load(w->s + (j * nv + v) * VL), top[v]); }
    }
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        const vreal old = v_load(m + v * VL), highest = top[v] * v_set1(w->scale);
        const vmask grows = m_lt(old + v_set1(AMX_LAZY), highest);
        const vreal now = v_select(grows, highest, old);
        top[v] = now;
        w->shift[v] = v_select(m_eq(now, v_set1(-REAL_INF)), v_zero(), now);   /* nothing seen yet: 2^(-inf - 0) = 0 */
        v_store(m + v * VL, now);
        v_store(factor + v * VL, v_select(grows, v_exp2(old - w->shift[v]), v_set1(1)));
        grown |= m_any(grows);
        w->sum[v] = v_zero();
    }
    tile_scale_huge(nv, w->s, w->keys, &w->scale, top);
    return grown;
}

/* l = l*factor + sum p. */
SIMD void amx_weights_end(const int nv, const amx_beside *w, real *l, const real *factor)
{
    UNROLL(2)
    for (int v = 0; v < nv; v++) { v_store(l + v * VL, v_load(l + v * VL) * v_load(factor + v * VL) + w->sum[v]); }
}

/* p = 2^(s*scale - m) of n keys, a multiple of AMX_DEPTH, with m as it is after them; l = l*factor + sum p. Returns whether
 * some factor is not 1. `keep`: s becomes p as well. */
SIMD int amx_softmax_strip(const int nv, const int keep, const ptrdiff_t low, real *s, int32_t n, real scale, real *m, real *l, real *factor, bf16 *p)
{
    amx_beside w = {.s = s, .p = p, .keys = n, .scale = scale};
    const int grown = amx_weights_begin(nv, &w, m, factor);
    while (w.key < n) { amx_weights_pair(nv, keep, low, &w); }
    amx_weights_end(nv, &w, l, factor);
    return grown;
}

static int amx_softmax(int nv, int keep, ptrdiff_t low, real *s, int32_t n, real scale, real *m, real *l, real *factor, bf16 *p)
{
    if (nv == 1) { return amx_softmax_strip(1, 1, low, s, n, scale, m, l, factor, p); }
    if (keep) { return amx_softmax_strip(2, 1, low, s, n, scale, m, l, factor, p); }
    return low ? amx_softmax_strip(2, 0, KEYS * PANEL, s, n, scale, m, l, factor, p) : amx_softmax_strip(2, 0, 0, s, n, scale, m, l, factor, p);
}

/* Weights as floats, [n keys][w], to B. */
static void amx_pack_weights(bf16 *p, ptrdiff_t low, const real *s, int32_t n, int32_t nv)
{
    const int32_t w = nv * VL;
    for (int32_t j = 0; j < n; j += 2) {
        for (int32_t v = 0; v < nv; v++) {
            const real *const at = s + j * w + v * VL;
            amx_store_pairs(p + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE, low, v_load(at), v_load(at + w));
        }
    }
}

/* A panel and where its results grow. */
typedef struct { const tile_panel *panel; const bf16 *q; ptrdiff_t q_low; int q_special; real *o, *m, *l; } amx_rows;   /* q_special: it is not finite */

/* Scratch of tiles: s has AMX_DEPTH keys more than KEYS; two of s and factor, which take turns. */
typedef struct { real *s[2], *factor[2], *add, *rows; ireal *keep; } amx_scratch;

/* Number c of a packed row. */
SIMD real amx_packed(const amx_rows *to, int32_t lane, int32_t c)
{
    const bf16 *const at = to->q + (c / AMX_DEPTH * to->panel->nv + lane / AMX_SIDE) * AMX_TILE
                           + c % AMX_DEPTH / 2 * AMX_DEPTH + lane % AMX_SIDE * 2 + c % 2;
    return float_from_bf16(at[0]) + float_from_bf16(at[to->q_low]);
}

/* Scores of keys [j0, j1) with rows of K or Q that are not finite, where these have two parts. */
static void amx_scores_apart(const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, const amx_keys *keys, int32_t j0, int32_t j1, real *s)
{
    const int32_t d = t->p->d, w = to->panel->w;
    uint32_t lanes = 0;
    for (int32_t lane = 0; lane < to->panel->rows; lane++) {
        real nothing = 0;
        for (int32_t c = 0; c < d; c++) { nothing += amx_packed(to, lane, c) * 0; }
        lanes |= (uint32_t)(nothing != nothing) << lane;
    }
    for (int32_t j = j0, bad = 0; j < j1; j++) {
        while (bad < keys->bad_keys.count && keys->origin + keys->bad_keys.row[bad] < j) { bad++; }
        const int all = bad < keys->bad_keys.count && keys->origin + keys->bad_keys.row[bad] == j;
        if (!all && !lanes) { continue; }
        const tile_block row = tile_block_load(t, &t->p->view[FGQA_ARG_k], j, j + 1, d, scratch->rows);
        for (int32_t lane = 0; lane < to->panel->rows; lane++) {
            if (!all && !(lanes >> lane & 1)) { continue; }
            real sum = 0;
            for (int32_t c = 0; c < d; c++) { sum += amx_packed(to, lane, c) * row.data[c]; }
            s[(ptrdiff_t)(j - j0) * w + lane] = sum;
        }
    }
}

/* ---- one tile: scores, weights, values ---- */

/* Keys [j0, j1) of a block and the rows of a panel. */
typedef struct {
    amx_rows to;
    int32_t j0, n, first, before, all;   /* n keys, the first one's number in the block and in its step; all: keys of the steps */
    int plain, others, grown;   /* plain: weights are 2^(s*scale - m) of all lanes and KEYS keys; others: keys of the steps that are not the tile's */
    tile_kind kind;
    const real *add;
    real *s, *factor;
    bf16 *p;
} amx_tile;

/* Returns whether there is something to see. */
static int amx_tile_begin(amx_tile *tile, const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, amx_keys *keys, int32_t j0, int32_t j1,
                          int32_t block_end, int turn)
{
    const tile_panel *panel = to->panel;
    tile->kind = tile_scores_begin(t, panel, j0, j1, scratch->add, scratch->rows, &tile->add);
    if (tile->kind == TILE_UNSEEN) { return 0; }
    tile->to = *to;
    tile->j0 = j0;
    tile->n = j1 - j0;
    tile->first = j0 - keys->origin;
    tile->before = tile->first % AMX_DEPTH;
    tile->all = AMX_PAD(tile->before + tile->n);
    tile->others = tile->before || (tile->all != tile->before + tile->n && j1 < block_end);
    tile->s = scratch->s[turn];
    tile->factor = scratch->factor[turn];
    tile->p = keys->p[turn];
    tile->plain = tile->kind == TILE_FULL && tile->n == KEYS && panel->nv == NV && !t->needs_transform && !t->p->dropout_threshold
                  && t->score_scale >= SMALLEST_SCALE && !to->q_special && !keys->bad_keys.count && !(keys->v_low && amx_bad_values(keys, t->p));
    return 1;
}

SIMD void amx_tile_scores(const amx_tile *tile, const tile_sequence *t, const amx_keys *keys, amx_beside *beside, const ptrdiff_t low)
{
    const ptrdiff_t ld = AMX_PAD(t->p->d), nv = tile->to.panel->nv;
    const amx_operand k = {keys->k + tile->first * ld, AMX_DEPTH, AMX_SIDE * ld, ld, keys->k_low, t->p->dtype == FGQA_F16};
    const amx_operand q = {tile->to.q, nv * AMX_TILE, AMX_TILE, 0, tile->to.q_low, 0};
    amx_product_beside(0, amx_tiles(tile->n), (int)nv, (int)ld / AMX_DEPTH, &k, &q, tile->s + tile->before * nv * VL, nv * VL, beside, low);
}

SIMD void amx_tile_values(const amx_tile *tile, const tile_sequence *t, const amx_keys *keys, const bf16 *v_t, amx_beside *beside, const ptrdiff_t low)
{
    const ptrdiff_t nv = tile->to.panel->nv, w = nv * VL;
    real *const o = tile->to.o;
    for (int32_t c = 0; tile->grown && c < t->p->dv; c++) {
        for (ptrdiff_t v = 0; v < w; v += VL) { v_store(o + c * w + v, v_load(o + c * w + v) * v_load(tile->factor + v)); }
    }
    const amx_operand values = {v_t + (tile->first - tile->before) * AMX_SIDE, AMX_TILE, AMX_KEYS_TILE, AMX_DEPTH, keys->v_t_low, 0};
    const amx_operand weights = {tile->p, nv * AMX_TILE, AMX_TILE, 0, keys->p_low, 0};
    amx_product_beside(1, amx_tiles(t->p->dv), (int)nv, tile->all / AMX_DEPTH, &values, &weights, o, w, beside, low);
}

/* From its scores on. */
static void amx_tile_finish(amx_tile *tile, const amx_scratch *scratch, const tile_sequence *t, amx_keys *keys)
{
    const fgqa_problem *p = t->p;
    const tile_panel *panel = tile->to.panel;
    const int32_t n = tile->n, w = panel->w, before = tile->before, all = tile->all, j0 = tile->j0, j1 = j0 + n;
    real *const s = tile->s, *const seen = s + before * w;
    if (tile->to.q_special || keys->bad_keys.count) { amx_scores_apart(scratch, t, &tile->to, keys, j0, j1, seen); }
    real scale = tile_scores_end(seen, t, panel, j0, j1, tile->kind, tile->add, NULL);
    if (!(scale >= SMALLEST_SCALE)) {          /* vectors of it are 0, and 0 * -inf is NaN */
        for (int32_t i = 0; i < n * w; i += VL) { v_store(seen + i, v_load(seen + i) * v_set1(scale)); }
        scale = 1;
    }
    for (int32_t i = 0; i < before * w; i += VL) { v_store(s + i, v_set1(-REAL_INF)); }
    for (int32_t i = (before + n) * w; i < all * w; i += VL) { v_store(s + i, v_set1(-REAL_INF)); }

    /* Keys of the first and last step that the panel does not reach count as unseen ones do. */
    const int dirty = (tile->kind == TILE_PARTIAL || tile->others || keys->v_low) && amx_bad_values(keys, p), dropped = p->dropout_threshold != 0;
    tile->grown = amx_softmax(panel->nv, dirty || dropped, keys->p_low, s, all, scale, tile->to.m, tile->to.l, tile->factor, tile->p);
    if (dropped) {
        tile_dropout(scratch->keep, t, panel, j0, j1);
        ireal *const weight = (ireal *)(void *)seen;
        for (int32_t i = 0; i < n * w; i += VL) { *(vint_any *)(weight + i) &= v_load_int(scratch->keep + i); }
        amx_pack_weights(tile->p, keys->p_low, s, all, panel->nv);
    }
    amx_tile_values(tile, t, keys, dirty ? keys->v_t_clean : keys->v_t, NULL, 0);
    for (int32_t i = 0; dirty && i < keys->bad.count; i++) {
        const int32_t j = keys->origin + keys->bad.row[i];
        if (j < j0 || j >= j1) { continue; }
        const tile_block row = tile_block_load(t, &p->view[FGQA_ARG_v], j, j + 1, p->dv, scratch->rows);
        tile_add_bad_row(panel, tile->add ? tile->add + (ptrdiff_t)(j - j0) * w : NULL, j, seen + (ptrdiff_t)(j - j0) * w, row.data, p->dv, tile->to.o);
    }
}

/* ---- tiles one after another ----
 *
 * While the weights of a plain tile are computed on vectors, the tile unit takes the scores of the next one and the values of
 * the one before.
 */

typedef struct {
    amx_tile at, last;        /* with scores; with weights */
    int has_at, has_last, turn;
} amx_line;

SIMD void amx_line_step_of(const ptrdiff_t low, amx_line *line, const amx_tile *next, const tile_sequence *t, const amx_keys *keys)
{
    const int parts = low ? t->p->dtype == FGQA_F16 ? 4 : 3 : 1;   /* products of the scores, at least of the values */
    amx_tile *const at = &line->at;
    int steps = 0;
    if (next) { steps += (amx_tiles(next->n) + 1) / 2 * (AMX_PAD(t->p->d) / AMX_DEPTH) * parts; }
    if (line->has_last) { steps += (amx_tiles(t->p->dv) + 1) / 2 * (line->last.all / AMX_DEPTH) * (low ? 3 : 1); }
    amx_beside w = {.s = at->s, .p = at->p, .keys = KEYS, .share = steps ? (KEYS / 2 + steps - 1) / steps * 2 : KEYS, .scale = t->score_scale};
    at->grown = amx_weights_begin(NV, &w, at->to.m, at->factor);
    if (next) { amx_tile_scores(next, t, keys, &w, low); }
    if (line->has_last) { amx_tile_values(&line->last, t, keys, keys->v_t, &w, low); }
    w.share = KEYS;
    amx_weights_share(low, &w);
    amx_weights_end(NV, &w, at->to.l, at->factor);
}

/* `next`: a tile that has begun, or NULL. */
static void amx_line_step(amx_line *line, const amx_tile *next, const amx_scratch *scratch, const tile_sequence *t, amx_keys *keys)
{
    if (line->has_at && line->at.plain) {
        if (keys->p_low) {
            amx_line_step_of(KEYS * PANEL, line, next, t, keys);
        } else {
            amx_line_step_of(0, line, next, t, keys);
        }
        line->last = line->at;
        line->has_last = 1;
    } else {
        if (next) { amx_tile_scores(next, t, keys, NULL, 0); }
        if (line->has_last) { amx_tile_values(&line->last, t, keys, keys->v_t, NULL, 0); }
        if (line->has_at) { amx_tile_finish(&line->at, scratch, t, keys); }
        line->has_last = 0;
    }
    line->has_at = next != NULL;
    if (next) { line->at = *next; }
}

/* All tiles done. */
static void amx_line_end(amx_line *line, const amx_scratch *scratch, const tile_sequence *t, amx_keys *keys)
{
    while (line->has_at || line->has_last) { amx_line_step(line, NULL, scratch, t, keys); }
}

/* Rows of a panel attend to keys [j0, j1) of the block; their results are complete after amx_line_end(). */
static void amx_attend(amx_line *line, const amx_scratch *scratch, const tile_sequence *t, const amx_rows *to, amx_keys *keys, int32_t j0, int32_t j1, int32_t block_end)
{
    amx_tile next;
    if (t->has_add) { amx_line_end(line, scratch, t, keys); }     /* there is one additive tile */
    if (!amx_tile_begin(&next, scratch, t, to, keys, j0, j1, block_end, line->turn)) { return; }
    line->turn ^= 1;
    amx_line_step(line, &next, scratch, t, keys);
}

#endif
