/* amx_bwd.h - the backward's products on the tile unit (bwd.c; bwd_block.h is the same in floats). bfloat16 only.
 *
 *     for each panel:   S^T = K Q^T      dP^T = V dO^T      P^T, dS^T rounded to bfloat16      dQ^T += K^T dS^T
 *     dV += P^T dO      dK += dS^T Q     over all lanes of the block at once
 *
 * K and V are operands as they lie in memory; K^T is packed once a block of keys, Q and dO twice a block of rows: lanes as
 * columns for the scores, lanes as terms for dK and dV. All sums are float32.
 *
 * Panels of what has lanes as terms lie a tile more apart than they are large: the same tile of each panel, read one after another,
 * would else fall into the same sets of the first-level cache.
 */
#ifndef FGQA_AMX_BWD_H
#define FGQA_AMX_BWD_H
#include "amx_panel.h"
#include "bwd_shared.h"

#define WEIGHT_PANEL (KEYS * PANEL + AMX_TILE)   /* numbers between panels of P^T and dS^T */
SIMD ptrdiff_t term_panel(int32_t cols) { return PANEL * (ptrdiff_t)AMX_PAD(cols) + AMX_TILE; }   /* and of Q and dO */

static bwd_shape shape_of(const fgqa_problem *p)
{
    bwd_shape shape = shape_of_lanes(p, (int32_t)sizeof(bf16) * 2 * (p->d + p->dv + KEYS) + (int32_t)sizeof(real) * p->d);
    shape.ldt = PANEL;
    return shape;
}

typedef struct {
    bwd_panel *panels;                         /* [panels]; q_t and dout_t only where a panel is `exact` */
    bwd_tiles tiles;
    bf16 *q_t, *dout_t;                        /* B, lanes as columns: [panel][step][nv] */
    bf16 *q, *dout;                            /* B, lanes as terms: [term_panel][tile of columns]; rows with a NaN or an infinity 0 */
    bf16 *weight, *ds;                         /* A, lanes as terms: P^T and dS^T of the block, [WEIGHT_PANEL][KEYS][PANEL] */
    bf16 *ds_t;                                /* B, keys as terms: dS^T of the panel at hand, [KEYS/AMX_DEPTH][nv] */
    bf16 *k, *v, *k_clean;                     /* rows of the block of keys, where they are copied; without bad ones */
    bf16 *k_t, *k_t_clean;                     /* A, keys as terms */
    bf16 *rows;                                /* PANEL rows of anything */
    real *k_copy;                              /* KEYS rows, for `exact` panels */
    real *tail;                                /* [AMX_SIDE][row_reals] */
    real *row;                                 /* one row of anything */
    real *dq, *dq_t;                           /* one panel of dQ; dQ^T panel after panel, each [d][w] */
    real *dk, *dv;                             /* [sk][ldk], [sk][ldv]; only where there is one split */
} bwd_scratch;

static bwd_scratch scratch_carve(fgqa_arena *arena, const fgqa_problem *p, const bwd_shape *shape, int32_t splits)
{
    bwd_scratch s;
    const size_t lanes = (size_t)shape->panels * PANEL, d = (size_t)AMX_PAD(p->d), dv = (size_t)AMX_PAD(p->dv);
    s.panels = fgqa_arena_take(arena, (size_t)shape->panels, sizeof(bwd_panel));
    for (int32_t n = 0; n < shape->panels; n++) { bwd_panel_carve(s.panels ? &s.panels[n] : NULL, arena, p); }
    s.tiles = bwd_tiles_carve(arena, p);
    s.q_t = fgqa_arena_take(arena, lanes * d, sizeof(bf16));
    s.dout_t = fgqa_arena_take(arena, lanes * dv, sizeof(bf16));
    s.q = fgqa_arena_take(arena, (size_t)shape->panels * (size_t)term_panel(p->d), sizeof(bf16));
    s.dout = fgqa_arena_take(arena, (size_t)shape->panels * (size_t)term_panel(p->dv), sizeof(bf16));
    s.weight = fgqa_arena_take(arena, (size_t)shape->panels * WEIGHT_PANEL, sizeof(bf16));
    s.ds = fgqa_arena_take(arena, (size_t)shape->panels * WEIGHT_PANEL, sizeof(bf16));
    s.ds_t = fgqa_arena_take(arena, PANEL * KEYS, sizeof(bf16));
    s.k = fgqa_arena_take(arena, AMX_BLOCK_ROWS * d, sizeof(bf16));
    s.v = fgqa_arena_take(arena, AMX_BLOCK_ROWS * dv, sizeof(bf16));
    s.k_clean = fgqa_arena_take(arena, AMX_BLOCK_ROWS * d, sizeof(bf16));
    s.k_t = fgqa_arena_take(arena, KEYS * d, sizeof(bf16));
    s.k_t_clean = fgqa_arena_take(arena, KEYS * d, sizeof(bf16));
    s.rows = fgqa_arena_take(arena, PANEL * (d > dv ? d : dv), sizeof(bf16));
    s.k_copy = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldk, sizeof(real));
    s.tail = fgqa_arena_take(arena, AMX_SIDE * (size_t)row_reals(shape), sizeof(real));
    s.row = fgqa_arena_take(arena, (size_t)row_reals(shape), sizeof(real));
    s.dq = fgqa_arena_take(arena, (size_t)PANEL * (size_t)shape->ldk, sizeof(real));
    s.dq_t = fgqa_arena_take(arena, lanes * (size_t)shape->ldk, sizeof(real));
    s.dk = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldk, sizeof(real)) : NULL;
    s.dv = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldv, sizeof(real)) : NULL;
    return s;
}

/* Rows of a panel that are not finite: zeroed, and noted in `bad` (unless NULL). */
static void zero_bad_lanes(bf16 *rows, int32_t cols, const tile_panel *panel, int32_t lane0, bad_lanes *bad)
{
    const int32_t ld = AMX_PAD(cols);
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        if (amx_row_is_finite(rows + lane * ld, ld)) { continue; }
        memset(rows + lane * ld, 0, (size_t)ld * sizeof(bf16));
        if (bad) { bad->lane[bad->count++] = (int16_t)(lane0 + lane); }
    }
}

/* Packs packed rows [r0, r1); returns the number of panels. */
static int32_t block_load(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int64_t r0, int64_t r1, bad_lanes *bad)
{
    const fgqa_problem *p = t->p;
    const fgqa_view *q = &p->view[FGQA_ARG_q], *dout = &p->view[FGQA_ARG_dout];
    const ptrdiff_t q_panel = PANEL * (ptrdiff_t)AMX_PAD(p->d), dout_panel = PANEL * (ptrdiff_t)AMX_PAD(p->dv);
    int32_t panels = 0;
    bad->count = 0;
    for (int64_t r = r0; r < r1; r += PANEL, panels++) {
        bwd_panel *const bp = &s->panels[panels];
        tile_panel_init(&bp->panel, t, r, r1);
        bwd_panel_lse(bp, t, r);
        if (bp->exact) {
            const stats_scratch stats = {s->tiles.s, s->tiles.add, s->tiles.rows, s->k_copy};
            tile_pack_rows(s->dq, job->shape.ldk, t, &bp->panel, q, p->d, t->q_sign);
            tile_transpose_rows(bp->q_t, s->dq, job->shape.ldk, bp->panel.w, p->d);
            bwd_own_lse(bp, t, t, &stats);
        }
        amx_load_panel(s->rows, 0, t, &bp->panel, q, p->d, t->q_sign < 0);
        amx_pack_panel(s->q_t + panels * q_panel, s->rows, &bp->panel, p->d);
        zero_bad_lanes(s->rows, p->d, &bp->panel, panels * PANEL, NULL);
        amx_pack_pairs(s->q + panels * term_panel(p->d), s->rows, AMX_PAD(p->d), amx_tiles(p->d));
        amx_load_panel(s->rows, 0, t, &bp->panel, dout, p->dv, 0);
        amx_pack_panel(s->dout_t + panels * dout_panel, s->rows, &bp->panel, p->dv);
        for (int32_t lane = 0; lane < bp->panel.rows; lane++) {
            row_load(s->dq, s->rows + lane * AMX_PAD(p->dv), dout->dtype, 1, p->dv);
            bp->delta[lane] = row_delta(job, t, r + lane, s->dq, s->row);
        }
        zero_bad_lanes(s->rows, p->dv, &bp->panel, panels * PANEL, bad);
        amx_pack_pairs(s->dout + panels * term_panel(p->dv), s->rows, AMX_PAD(p->dv), amx_tiles(p->dv));
    }
    return panels;
}

/* P^T and dS^T of keys [begin, end), even numbers, from the scores and dP^T in `tiles`: as A (weight, ds) and ds as B (ds_t). */
SIMD void amx_weights(const bwd_panel *bp, const bwd_tiles *tiles, const int nv, int32_t begin, int32_t end, real scale, real keep_scale,
                      const bwd_flags flags, bf16 *weight, bf16 *ds, bf16 *ds_t)
{
    vreal lse[NV], log_sum[NV], delta[NV];
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        lse[v] = v_load(bp->lse.top + v * VL);
        log_sum[v] = v_load(bp->lse.log_sum + v * VL);
        delta[v] = v_load(bp->delta + v * VL);
    }
    for (int32_t j = begin; j < end; j += 2) {
        vreal even[2], odd[2], ds_even[2], ds_odd[2];
        UNROLL(2)
        for (int v = 0; v < 2; v++) {
            if (v >= nv) {
                even[v] = odd[v] = ds_even[v] = ds_odd[v] = v_zero();
                continue;
            }
            const ptrdiff_t at = (ptrdiff_t)j * nv * VL + v * VL;
            const bwd_score a = bwd_score_grad(tiles, at, lse[v], log_sum[v], delta[v], scale, keep_scale, flags);
            const bwd_score b = bwd_score_grad(tiles, at + nv * VL, lse[v], log_sum[v], delta[v], scale, keep_scale, flags);
            even[v] = a.weight;
            odd[v] = b.weight;
            ds_even[v] = a.ds;
            ds_odd[v] = b.ds;
            _mm512_store_si512(ds_t + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE, amx_narrow_pairs(a.ds, b.ds));
        }
        _mm512_store_si512(weight + j * PANEL, amx_narrow((__m512)even[0], (__m512)even[1]));
        _mm512_store_si512(weight + (j + 1) * PANEL, amx_narrow((__m512)odd[0], (__m512)odd[1]));
        _mm512_store_si512(ds + j * PANEL, amx_narrow((__m512)ds_even[0], (__m512)ds_even[1]));
        _mm512_store_si512(ds + (j + 1) * PANEL, amx_narrow((__m512)ds_odd[0], (__m512)ds_odd[1]));
    }
}

/* That of a panel whose lanes see the whole block, beside its products: of the strips of AMX_DEPTH keys that are there, up to `end`,
 * `rate` pairs of keys a step. */
typedef struct {
    const bwd_panel *bp;
    const bwd_tiles *tiles;
    real scale;
    bf16 *weight, *ds, *ds_t;
    int32_t key, end, rate;
} amx_bwd_beside;

SIMD void amx_bwd_until(amx_bwd_beside *w, int32_t end)
{
    const bwd_flags plain = {0, 0, 0, 0};
    amx_weights(w->bp, w->tiles, 2, w->key, end, w->scale, 1, plain, w->weight, w->ds, w->ds_t);
    w->key = end;
}

SIMD void amx_bwd_share(void *work, int steps)
{
    amx_bwd_beside *const w = work;
    const int32_t due = w->key + 2 * w->rate * steps;
    amx_bwd_until(w, due < w->end ? due : w->end);
}

/* S^T and dP^T of those, strip after strip, each beside the weights of the strip before. */
static void amx_plain_panel(amx_bwd_beside *w, const amx_operand *k, const amx_operand *q, int32_t k_steps, const amx_operand *v, const amx_operand *dout,
                            int32_t v_steps)
{
    amx_operand keys = *k, values = *v;
    for (int32_t j = 0; j < KEYS; j += AMX_DEPTH) {
        real *const s = w->tiles->s + j * PANEL, *const dp = w->tiles->dp + j * PANEL;
        w->end = j;
        w->rate = (AMX_DEPTH / 2 + k_steps + v_steps - 1) / (k_steps + v_steps);
        if (j) {
            amx_product_beside(0, 2, 2, k_steps, &keys, q, s, PANEL, amx_bwd_share, w);
            amx_product_beside(0, 2, 2, v_steps, &values, dout, dp, PANEL, amx_bwd_share, w);
            amx_bwd_until(w, j);
        } else {
            amx_product(0, 2, 2, k_steps, &keys, q, s, PANEL);
            amx_product(0, 2, 2, v_steps, &values, dout, dp, PANEL);
        }
        keys.data += keys.pair;
        values.data += values.pair;
    }
    amx_bwd_until(w, KEYS);
}

/* The block of keys at hand, rows of K and V; K^T without its bad rows is made when the first tile needs it. */
typedef struct {
    int32_t j0, j1, searched;
    const bf16 *k, *v;
    ptrdiff_t ldk, ldv;
    tile_bad_rows bad;
} key_block;

/* Rows of a view: where they lie in memory if all that is read is there, rows behind the block's end among it, else copied. */
static const bf16 *block_rows(bf16 *copy, ptrdiff_t *ld, const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols)
{
    if (view->stride_d == 1 && cols % AMX_DEPTH == 0 && view->stride_s % 1024 && t->seq.mask.sk - j0 >= AMX_BLOCK_ROWS) {
        *ld = (ptrdiff_t)view->stride_s;
        return view_at(view, t->b, t->kv_head, t->seq.k_row + j0);
    }
    amx_load_keys(copy, 0, t, view, j0, j1, cols);
    *ld = AMX_PAD(cols);
    return copy;
}

/* Whether K has bad rows; then there is k_t_clean. */
static int block_bad_keys(const bwd_scratch *s, const tile_sequence *t, key_block *block)
{
    const int32_t d = t->p->d, rows = block->j1 - block->j0;
    int32_t bad = block->searched ? block->bad.count : 0;
    for (int32_t j = 0; j < rows && !block->searched; j++) { bad |= !amx_row_is_finite(block->k + j * block->ldk, AMX_PAD(d)); }
    if (bad && !block->searched) {
        amx_load_keys(s->k_clean, 0, t, &t->p->view[FGQA_ARG_k], block->j0, block->j1, d);
        amx_zero_bad_rows(&block->bad, s->k_clean, 0, d);
        amx_pack_keys(s->k_t_clean, AMX_PAIR(KEYS), s->k_clean, AMX_PAD(d), d);
    }
    block->searched = 1;
    return bad;
}

/* P^T and dS^T of panel n and keys [j0, j1) of the block; dQ^T += K^T dS^T. Returns the rows of weight and ds that were written. */
static fgqa_range block_panel(const bwd_scratch *s, const tile_sequence *t, int32_t n, key_block *block, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    const bwd_panel *const bp = &s->panels[n];
    const int32_t w = bp->panel.w, nv = bp->panel.nv, ld = AMX_PAD(p->d), ldo = AMX_PAD(p->dv);
    const int32_t first = j0 - block->j0, before = first % AMX_DEPTH, from = first - before, all = AMX_PAD(before + j1 - j0);
    const fgqa_range nothing = {0, 0}, written = {from, from + all};
    const bwd_tiles tiles = s->tiles;
    real *const seen = tiles.s + before * w, *const tanh = tiles.tanh ? tiles.tanh + before * w : NULL;
    const real *add;
    real scale = 1;
    tile_kind kind;
    if (bp->exact) {
        const tile_block k = tile_block_load(t, &p->view[FGQA_ARG_k], j0, j1, p->d, s->k_copy);
        kind = tile_scores(seen, t, &bp->panel, j0, j1, &k, bp->q_t, tiles.add, tiles.rows, tanh, &add, &scale);
        if (kind == TILE_UNSEEN) { return nothing; }
        tile_scale(seen, (j1 - j0) * w, &scale);
    } else {
        kind = tile_scores_begin(t, &bp->panel, j0, j1, tiles.add, tiles.rows, &add);
        if (kind == TILE_UNSEEN) { return nothing; }
    }
    const int partial = kind == TILE_PARTIAL || all != j1 - j0;
    const bwd_flags flags = {partial, p->softcap > 0, p->dropout_threshold != 0, bp->exact};
    bf16 *const weight = s->weight + (ptrdiff_t)n * WEIGHT_PANEL + from * PANEL, *const ds = s->ds + (ptrdiff_t)n * WEIGHT_PANEL + from * PANEL;
    const amx_operand k = {block->k + first * block->ldk, AMX_DEPTH, AMX_SIDE * block->ldk, AMX_DEPTH * block->ldk, block->ldk, 0, 0};
    const amx_operand q = {s->q_t + n * PANEL * (ptrdiff_t)ld, nv * AMX_TILE, AMX_TILE, 0, 0, 0, 0};
    const amx_operand v = {block->v + first * block->ldv, AMX_DEPTH, AMX_SIDE * block->ldv, AMX_DEPTH * block->ldv, block->ldv, 0, 0};
    const amx_operand dout = {s->dout_t + n * PANEL * (ptrdiff_t)ldo, nv * AMX_TILE, AMX_TILE, 0, 0, 0, 0};
    if (nv == 2 && j1 - j0 == KEYS && !partial && !t->needs_transform && !flags.dropped && !flags.exact) {
        amx_bwd_beside plain = {.bp = bp, .tiles = &tiles, .scale = t->score_scale, .weight = weight, .ds = ds, .ds_t = s->ds_t};
        amx_plain_panel(&plain, &k, &q, ld / AMX_DEPTH, &v, &dout, ldo / AMX_DEPTH);
    } else {
        if (!bp->exact) {
            amx_product(0, amx_tiles(j1 - j0), nv, ld / AMX_DEPTH, &k, &q, seen, w);
            scale = tile_scores_end(seen, t, &bp->panel, j0, j1, kind, add, tanh);
        }
        for (int32_t i = 0; i < before * w; i += VL) { v_store(tiles.s + i, v_set1(-REAL_INF)); }
        for (int32_t i = (before + j1 - j0) * w; i < all * w; i += VL) { v_store(tiles.s + i, v_set1(-REAL_INF)); }
        amx_product(0, amx_tiles(j1 - j0), nv, ldo / AMX_DEPTH, &v, &dout, tiles.dp + before * w, w);
        const real keep_scale = (real)fgqa_dropout_scale(p->dropout_threshold);
        if (flags.dropped) { tile_dropout(tiles.keep + before * w, t, &bp->panel, j0, j1); }
        if (nv == 1) {
            amx_weights(bp, &tiles, 1, 0, all, scale, keep_scale, flags, weight, ds, s->ds_t);
        } else if (flags.partial || flags.capped || flags.dropped || flags.exact) {
            amx_weights(bp, &tiles, 2, 0, all, scale, keep_scale, flags, weight, ds, s->ds_t);
        } else {
            amx_bwd_beside whole = {.bp = bp, .tiles = &tiles, .scale = scale, .weight = weight, .ds = ds, .ds_t = s->ds_t};
            amx_bwd_until(&whole, all);
        }
    }
    const amx_operand k_t = {(partial && block_bad_keys(s, t, block) ? s->k_t_clean : s->k_t) + AMX_PAIR(from), 2 * AMX_TILE, AMX_TILE, AMX_PAIR(KEYS), AMX_DEPTH, 0, 0};
    const amx_operand ds_t = {s->ds_t, nv * AMX_TILE, AMX_TILE, 0, 0, 0, 0};
    amx_product(1, amx_tiles(p->d), nv, all / AMX_DEPTH, &k_t, &ds_t, s->dq_t + n * PANEL * (ptrdiff_t)AMX_SIDE * amx_tiles(p->d), w);
    return written;
}

/* c[key][col] += sum over the lanes of panels [first, last): a is [WEIGHT_PANEL][KEYS][PANEL] from the first key on, b [term_panel][tile of columns].
 * Only n keys of c are touched. */
static void amx_accumulate(int32_t n, int32_t panels, const bf16 *a, const bf16 *b, int32_t cols, real *c, int32_t ldc, real *tail)
{
    const amx_operand rows = {a, WEIGHT_PANEL, AMX_TILE, 2 * AMX_TILE, PANEL, 0, 0}, lanes = {b, term_panel(cols), AMX_TILE, 0, 0, 0, 0};
    const int32_t whole = n / AMX_SIDE, rest = n % AMX_SIDE;
    amx_product(1, whole, amx_tiles(cols), panels, &rows, &lanes, c, ldc);
    if (!rest) { return; }
    const amx_operand last = {a + whole * AMX_TILE, WEIGHT_PANEL, AMX_TILE, 0, PANEL, 0, 0};
    amx_product(0, 1, amx_tiles(cols), panels, &last, &lanes, tail, ldc);
    for (int32_t i = 0; i < rest * ldc; i += VL) {
        real *const to = c + (ptrdiff_t)whole * AMX_SIDE * ldc + i;
        v_store(to, v_load(to) + v_load(tail + i));
    }
}

static void zero_keys(bf16 *tile, int32_t j0, int32_t j1)
{
    if (j0 < j1) { memset(tile + j0 * PANEL, 0, (size_t)((j1 - j0) * PANEL) * sizeof(bf16)); }
}

/* Keys [j0, j1), one key block, against the block of rows in `s`. */
static void block_keys(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int32_t panels, int32_t j0, int32_t j1,
                       const bad_lanes *bad, real *dk, real *dv)
{
    const fgqa_problem *p = job->p;
    const bwd_shape *shape = &job->shape;
    const tile_extent e = extent_of(s->panels, panels, j0, j1);
    if (e.first >= e.last) { return; }
    key_block block = {.j0 = j0, .j1 = j1};
    block.k = block_rows(s->k, &block.ldk, t, &p->view[FGQA_ARG_k], j0, j1, p->d);
    block.v = block_rows(s->v, &block.ldv, t, &p->view[FGQA_ARG_v], j0, j1, p->dv);
    amx_pack_keys(s->k_t, AMX_PAIR(KEYS), block.k, block.ldk, p->d);
    const int32_t begin = (e.j0 - j0) / AMX_SIDE * AMX_SIDE, end = ROUND_UP(e.j1 - j0, AMX_SIDE);
    for (int32_t n = e.first; n < e.last; n++) {
        const fgqa_range r = panel_keys(&s->panels[n].panel, j0, j1);
        fgqa_range written = {begin, begin};
        if (r.begin < r.end) { written = block_panel(s, t, n, &block, r.begin, r.end); }
        bf16 *const tiles[2] = {s->weight + (ptrdiff_t)n * WEIGHT_PANEL, s->ds + (ptrdiff_t)n * WEIGHT_PANEL};
        for (int i = 0; i < 2; i++) {
            zero_keys(tiles[i], begin, written.begin < end ? written.begin : end);
            zero_keys(tiles[i], written.end > begin ? written.end : begin, end);
        }
    }
    for (int32_t j = j0 + begin, next; j < j0 + end; j = next) {
        tile_extent step;
        next = step_end(s->panels, panels, j, j0 + end, &step);
        if (step.first >= step.last) { continue; }
        const ptrdiff_t at = (ptrdiff_t)step.first * WEIGHT_PANEL + (j - j0) * PANEL;
        const int32_t keys = (next < t->seq.mask.sk ? next : t->seq.mask.sk) - j, count = step.last - step.first;
        amx_accumulate(keys, count, s->weight + at, s->dout + step.first * term_panel(p->dv), p->dv, dv + (ptrdiff_t)j * shape->ldv, shape->ldv, s->tail);
        amx_accumulate(keys, count, s->ds + at, s->q + step.first * term_panel(p->d), p->d, dk + (ptrdiff_t)j * shape->ldk, shape->ldk, s->tail);
    }
    for (int32_t n = 0; n < bad->count; n++) {
        const int32_t lane = bad->lane[n];
        real weight[KEYS];
        if (lane < e.first * PANEL || lane >= e.last * PANEL) { continue; }
        for (int32_t j = e.j0; j < e.j1; j++) {
            weight[j - e.j0] = float_from_bf16(s->weight[(ptrdiff_t)(lane / PANEL) * WEIGHT_PANEL + (j - j0) * PANEL + lane % PANEL]);
        }
        add_bad_lane(t, s->panels[0].panel.r0 + lane, weight, e.j1 - e.j0, dv + (ptrdiff_t)e.j0 * shape->ldv, shape->ldv, s->row);
    }
}

#endif
