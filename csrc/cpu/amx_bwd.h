/* amx_bwd.h - the backward's products on the tile unit (bwd.c; bwd_block.h is the same in floats).
 *
 *     for each panel:   S^T = K Q^T      dP^T = V dO^T      P^T, dS^T rounded to bfloat16      dQ^T += K^T dS^T
 *     dV += P^T dO      dK += dS^T Q     over all lanes of the block at once
 *
 * K and V are operands as they lie in memory; K^T is packed once a block of keys, Q and dO twice a block of rows: lanes as
 * columns for the scores, lanes as terms for dK and dV. All sums are float32.
 *
 * Panels of what has lanes as terms lie a tile more apart than they are large: the same tile of each panel, read one after
 * another, would else fall into the same sets of the first-level cache.
 *
 * float16, and float32 where precision="bf16x3" asks for it, are split into two parts (amx.h): every operand, P and dS among
 * them; scores of float16 are those of float32 arithmetic, as forward's are. What is infinite or NaN must not meet the other
 * operand's low part, whose sign is its own: scores and dP of blocks with such rows of K and V, and of panels where such a row of
 * Q or dO sees one of the keys, are computed in floats.
 */
#ifndef FGQA_AMX_BWD_H
#define FGQA_AMX_BWD_H
#include "amx_panel.h"
#include "bwd_shared.h"

#define WEIGHT_PANEL (KEYS * PANEL + AMX_TILE)   /* numbers between panels of P^T and dS^T */
SIMD ptrdiff_t term_panel(int32_t cols) { return PANEL * (ptrdiff_t)AMX_PAD(cols) + AMX_TILE; }   /* and of Q and dO */

/* A buffer of one part or two. */
typedef struct { bf16 *at; ptrdiff_t low; } amx_buffer;

static amx_buffer amx_take(fgqa_arena *arena, const fgqa_problem *p, size_t n)
{
    const amx_buffer buffer = {fgqa_arena_take(arena, amx_parts(p) * n, sizeof(bf16)), amx_low_of(p, (ptrdiff_t)n)};
    return buffer;
}

static bwd_shape shape_of(const fgqa_problem *p)
{
    const int32_t parts = (int32_t)amx_parts(p);
    bwd_shape shape = shape_of_lanes(p, parts * (int32_t)sizeof(bf16) * 2 * (p->d + p->dv + KEYS) + (int32_t)sizeof(real) * p->d);
    shape.ldt = PANEL;
    return shape;
}

struct bwd_scratch {
    bwd_panel *panels;                         /* [panels]; q_t and dout_t only where scores are computed in floats */
    bwd_tiles tiles;
    amx_buffer q_t, dout_t;                    /* B, lanes as columns: [panel][step][nv] */
    amx_buffer q, dout;                        /* B, lanes as terms: [term_panel][tile of columns]; rows with a NaN or an infinity 0 */
    amx_buffer weight, ds;                     /* A, lanes as terms: P^T and dS^T of the block, [WEIGHT_PANEL][KEYS][PANEL] */
    amx_buffer ds_t;                           /* B, keys as terms: dS^T of the panel at hand, [KEYS/AMX_DEPTH][nv] */
    amx_buffer k, v, k_clean;                  /* rows of the block of keys, where they are copied; without bad ones */
    amx_buffer k_t, k_t_clean;                 /* A, keys as terms */
    amx_buffer rows;                           /* PANEL rows of anything */
    real *key_copy;                            /* KEYS rows of K or V, for scores in floats */
    real *tail;                                /* [AMX_SIDE][row_reals] */
    real *row;                                 /* one row of anything */
    real *dq;                                  /* one panel of dQ; of Q or dO before */
    real *dq_t;                                /* dQ^T panel after panel, each [d][w] */
    real *dk, *dv;                             /* [sk][ldk], [sk][ldv]; only where there is one split */
};

static bwd_scratch scratch_carve(fgqa_arena *arena, const fgqa_problem *p, const bwd_shape *shape, int32_t splits)
{
    bwd_scratch s;
    const size_t panels = (size_t)shape->panels, lanes = panels * PANEL, d = (size_t)AMX_PAD(p->d), dv = (size_t)AMX_PAD(p->dv);
    const size_t cols = d > dv ? d : dv, reals = (size_t)row_reals(shape);
    s.panels = fgqa_arena_take(arena, panels, sizeof(bwd_panel));
    for (int32_t n = 0; n < shape->panels; n++) { bwd_panel_carve(s.panels ? &s.panels[n] : NULL, arena, p); }
    s.tiles = bwd_tiles_carve(arena, p);
    s.q_t = amx_take(arena, p, lanes * d);
    s.dout_t = amx_take(arena, p, lanes * dv);
    s.q = amx_take(arena, p, panels * (size_t)term_panel(p->d));
    s.dout = amx_take(arena, p, panels * (size_t)term_panel(p->dv));
    s.weight = amx_take(arena, p, panels * WEIGHT_PANEL);
    s.ds = amx_take(arena, p, panels * WEIGHT_PANEL);
    s.ds_t = amx_take(arena, p, PANEL * KEYS);
    s.k = amx_take(arena, p, AMX_BLOCK_ROWS * d);
    s.v = amx_take(arena, p, AMX_BLOCK_ROWS * dv);
    s.k_clean = amx_take(arena, p, AMX_BLOCK_ROWS * d);
    s.k_t = amx_take(arena, p, KEYS * d);
    s.k_t_clean = amx_take(arena, p, KEYS * d);
    s.rows = amx_take(arena, p, PANEL * cols);
    s.key_copy = fgqa_arena_take(arena, KEYS * reals, sizeof(real));
    s.tail = fgqa_arena_take(arena, AMX_SIDE * reals, sizeof(real));
    s.row = fgqa_arena_take(arena, reals, sizeof(real));
    s.dq = fgqa_arena_take(arena, PANEL * reals, sizeof(real));
    s.dq_t = fgqa_arena_take(arena, lanes * (size_t)shape->ldk, sizeof(real));
    s.dk = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldk, sizeof(real)) : NULL;
    s.dv = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldv, sizeof(real)) : NULL;
    return s;
}

_Static_assert(PANEL <= 32, "a bit for each lane");

/* Rows of a panel that are not finite: zeroed, and noted in `bad`. Returns them, a bit each. */
static uint32_t zero_bad_lanes(const amx_buffer *rows, int32_t cols, const tile_panel *panel, int32_t lane0, bad_lanes *bad)
{
    const int32_t ld = AMX_PAD(cols);
    uint32_t lanes = 0;
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        if (amx_row_is_finite(rows->at + lane * ld, ld)) { continue; }
        amx_zero_rows(rows->at + lane * ld, rows->low, 1, ld);
        bad->lane[bad->count++] = (int16_t)(lane0 + lane);
        lanes |= (uint32_t)1 << lane;
    }
    return lanes;
}

/* A panel's rows in `s->rows` as B: lanes as columns to `columns`, and without bad ones as
 * terms to `terms`. Returns the bad ones. */
static uint32_t pack_lanes(const bwd_scratch *s, const bwd_panel *bp, int32_t n, int32_t cols, const amx_buffer *columns, const amx_buffer *terms, bad_lanes *bad)
{
    const ptrdiff_t ld = AMX_PAD(cols), to_columns = n * PANEL * ld, to_terms = n * term_panel(cols);
    amx_pack_panel(columns->at + to_columns, s->rows.at, &bp->panel, cols);
    if (columns->low) { amx_pack_panel(columns->at + columns->low + to_columns, s->rows.at + s->rows.low, &bp->panel, cols); }
    const uint32_t lanes = zero_bad_lanes(&s->rows, cols, &bp->panel, n * PANEL, bad);
    amx_pack_pairs(terms->at + to_terms, s->rows.at, ld, amx_tiles(cols));
    if (terms->low) { amx_pack_pairs(terms->at + terms->low + to_terms, s->rows.at + s->rows.low, ld, amx_tiles(cols)); }
    return lanes;
}

/* A panel's Q as floats. */
static void load_float_q(const bwd_scratch *s, const tile_sequence *t, const bwd_panel *bp)
{
    const int32_t ld = ROUND_UP(t->p->d, VL);
    tile_pack_rows(s->dq, ld, t, &bp->panel, &t->p->view[FGQA_ARG_q], t->p->d, t->q_sign);
    tile_transpose_rows(bp->q_t, s->dq, ld, bp->panel.w, t->p->d);
}

static void load_float_dout(const bwd_scratch *s, const tile_sequence *t, const bwd_panel *bp)
{
    const int32_t ld = ROUND_UP(t->p->dv, VL);
    tile_pack_rows(s->dq, ld, t, &bp->panel, &t->p->view[FGQA_ARG_dout], t->p->dv, 1);
    tile_transpose_rows(bp->dout_t, s->dq, ld, bp->panel.w, t->p->dv);
}

/* Packs packed rows [r0, r1); returns the number of panels. */
static int32_t block_load(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int64_t r0, int64_t r1, bad_rows *bad)
{
    const fgqa_problem *p = t->p;
    const fgqa_view *q = &p->view[FGQA_ARG_q], *dout = &p->view[FGQA_ARG_dout];
    int32_t panels = 0;
    bad->q.count = bad->dout.count = 0;
    for (int64_t r = r0; r < r1; r += PANEL, panels++) {
        bwd_panel *const bp = &s->panels[panels];
        tile_panel_init(&bp->panel, t, r, r1);
        bwd_panel_lse(bp, t, r);
        if (bp->exact) {
            const stats_scratch stats = {s->tiles.s, s->tiles.add, s->tiles.rows, s->key_copy};
            load_float_q(s, t, bp);
            bwd_own_lse(bp, t, t, &stats);
        }
        amx_load_panel(s->rows.at, s->rows.low, t, &bp->panel, q, p->d, t->q_sign < 0);
        bp->special = pack_lanes(s, bp, panels, p->d, &s->q_t, &s->q, &bad->q);
        amx_load_panel(s->rows.at, s->rows.low, t, &bp->panel, dout, p->dv, 0);
        for (int32_t lane = 0; lane < bp->panel.rows; lane++) {
            row_load(s->dq, tile_packed_row(t, dout, r + lane), dout->dtype, dout->stride_d, p->dv);
            bp->delta[lane] = row_delta(job, t, r + lane, s->dq, s->row);
        }
        bp->special |= pack_lanes(s, bp, panels, p->dv, &s->dout_t, &s->dout, &bad->dout);
    }
    return panels;
}

/* Two vectors as one row of A; `split`: in parts. */
SIMD void amx_store_row(const int split, bf16 *to, ptrdiff_t low, const amx_split x[2])
{
    _mm512_store_si512(to, amx_narrow((__m512)x[0].high, (__m512)x[1].high));
    if (split) { _mm512_store_si512(to + low, amx_narrow((__m512)x[0].low, (__m512)x[1].low)); }
}

/* Where P^T and dS^T of a panel go: as A (weight, ds) and ds as B (ds_t). */
typedef struct { amx_buffer weight, ds, ds_t; } amx_grads;

/* P^T and dS^T of keys [begin, end), even numbers, from the scores and dP^T in `tiles`. */
SIMD void amx_weights(const bwd_panel *bp, const bwd_tiles *tiles, const int nv, int32_t begin, int32_t end, real scale, real keep_scale,
                      const bwd_flags flags, const amx_grads *to)
{
    vreal lse[NV], log_sum[NV], delta[NV];
    UNROLL(2)
    for (int v = 0; v < nv; v++) {
        lse[v] = v_load(bp->lse.top + v * VL);
        log_sum[v] = v_load(bp->lse.log_sum + v * VL);
        delta[v] = v_load(bp->delta + v * VL);
    }
    for (int32_t j = begin; j < end; j += 2) {
        amx_split weight[2][2], ds[2][2];      /* of the even and the odd key */
        UNROLL(2)
        for (int v = 0; v < 2; v++) {
            UNROLL(2)
            for (int odd = 0; odd < 2; odd++) {
                bwd_score x = {v_zero(), v_zero()};
                if (v < nv) { x = bwd_score_grad(tiles, ((ptrdiff_t)(j + odd) * nv + v) * VL, lse[v], log_sum[v], delta[v], scale, keep_scale, flags); }
                weight[odd][v] = flags.split ? amx_split_of(x.weight) : (amx_split){x.weight, v_zero()};
                ds[odd][v] = flags.split ? amx_split_of(x.ds) : (amx_split){x.ds, v_zero()};
            }
            if (v >= nv) { continue; }
            bf16 *const pairs = to->ds_t.at + (j / AMX_DEPTH * nv + v) * AMX_TILE + j % AMX_DEPTH * AMX_SIDE;
            _mm512_store_si512(pairs, amx_narrow_pairs(ds[0][v].high, ds[1][v].high));
            if (flags.split) { _mm512_store_si512(pairs + to->ds_t.low, amx_narrow_pairs(ds[0][v].low, ds[1][v].low)); }
        }
        UNROLL(2)
        for (int odd = 0; odd < 2; odd++) {
            amx_store_row(flags.split, to->weight.at + (j + odd) * PANEL, to->weight.low, weight[odd]);
            amx_store_row(flags.split, to->ds.at + (j + odd) * PANEL, to->ds.low, ds[odd]);
        }
    }
}

/* That of a panel whose lanes see the whole block, beside its products: of the strips of AMX_DEPTH keys that are there,
 * up to `end`, `rate` pairs of keys a step. */
typedef struct {
    const bwd_panel *bp;
    const bwd_tiles *tiles;
    real scale;
    amx_grads to;
    int32_t key, end, rate;
} amx_bwd_beside;

SIMD void amx_bwd_until(const int split, amx_bwd_beside *w, int32_t end)
{
    const bwd_flags plain = {0, 0, 0, 0, split};
    amx_weights(w->bp, w->tiles, 2, w->key, end, w->scale, 1, plain, &w->to);
    w->key = end;
}

SIMD void amx_bwd_share(const int split, amx_bwd_beside *w, int steps)
{
    const int32_t due = w->key + 2 * w->rate * steps;
    amx_bwd_until(split, w, due < w->end ? due : w->end);
}

SIMD void amx_bwd_share_one(void *w, int steps) { amx_bwd_share(0, w, steps); }
SIMD void amx_bwd_share_two(void *w, int steps) { amx_bwd_share(1, w, steps); }

/* S^T and dP^T of those, strip after strip, each beside the weights of the strip before. */
SIMD void amx_plain_strips(const int split, amx_bwd_beside *w, const amx_operand *k, const amx_operand *q, int32_t k_steps, const amx_operand *v,
                           const amx_operand *dout, int32_t v_steps)
{
    amx_operand keys = *k, values = *v;
    const int32_t steps = (k_steps + v_steps) * (split ? 3 : 1);     /* or more, for float16 */
    for (int32_t j = 0; j < KEYS; j += AMX_DEPTH) {
        real *const s = w->tiles->s + j * PANEL, *const dp = w->tiles->dp + j * PANEL;
        w->end = j;
        w->rate = (AMX_DEPTH / 2 + steps - 1) / steps;
        if (j) {
            amx_product_beside(0, 2, 2, k_steps, &keys, q, s, PANEL, split ? amx_bwd_share_two : amx_bwd_share_one, w);
            amx_product_beside(0, 2, 2, v_steps, &values, dout, dp, PANEL, split ? amx_bwd_share_two : amx_bwd_share_one, w);
            amx_bwd_until(split, w, j);
        } else {
            amx_product(0, 2, 2, k_steps, &keys, q, s, PANEL);
            amx_product(0, 2, 2, v_steps, &values, dout, dp, PANEL);
        }
        keys.data += keys.pair;
        values.data += values.pair;
    }
    amx_bwd_until(split, w, KEYS);
}

static void amx_plain_panel(amx_bwd_beside *w, const amx_operand *k, const amx_operand *q, int32_t k_steps, const amx_operand *v, const amx_operand *dout,
                            int32_t v_steps)
{
    if (w->to.ds.low) {
        amx_plain_strips(1, w, k, q, k_steps, v, dout, v_steps);
    } else {
        amx_plain_strips(0, w, k, q, k_steps, v, dout, v_steps);
    }
}

/* Weights of a panel's first `all` keys, whatever they are. */
SIMD void amx_any_weights(const int split, amx_bwd_beside *w, int32_t all, real keep_scale, bwd_flags flags)
{
    flags.split = split;
    if (w->bp->panel.nv == 1) {
        amx_weights(w->bp, w->tiles, 1, 0, all, w->scale, keep_scale, flags, &w->to);
    } else if (flags.partial || flags.capped || flags.dropped || flags.exact) {
        amx_weights(w->bp, w->tiles, 2, 0, all, w->scale, keep_scale, flags, &w->to);
    } else {
        amx_bwd_until(split, w, all);
    }
}

/* The block of keys at hand, rows of K and V; K^T without its bad rows is made when the first tile needs it. */
typedef struct {
    int32_t j0, j1, searched;
    int special;               /* K or V is not finite, where it has two parts */
    const bf16 *k, *v;
    ptrdiff_t ldk, ldv;
    tile_bad_rows bad;
} key_block;

/* Rows of a view: where they lie in memory if all that is read is there, rows behind the block's end among it, else copied. */
static const bf16 *block_rows(const amx_buffer *copy, ptrdiff_t *ld, const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols)
{
    if (!copy->low && view->stride_d == 1 && cols % AMX_DEPTH == 0 && view->stride_s % 1024 && t->seq.mask.sk - j0 >= AMX_BLOCK_ROWS) {
        *ld = (ptrdiff_t)view->stride_s;
        return view_at(view, t->b, t->kv_head, t->seq.k_row + j0);
    }
    amx_load_keys(copy->at, copy->low, t, view, j0, j1, cols);
    *ld = AMX_PAD(cols);
    return copy->at;
}

static int block_is_finite(const bf16 *rows, ptrdiff_t ld, int32_t n, int32_t cols)
{
    int bad = 0;
    for (int32_t j = 0; j < n && !bad; j++) { bad = !amx_row_is_finite(rows + j * ld, AMX_PAD(cols)); }
    return !bad;
}

static void pack_k_t(const amx_buffer *to, const bf16 *rows, ptrdiff_t low, ptrdiff_t ld, int32_t keys, int32_t d)
{
    amx_pack_keys(to->at, AMX_PAIR(KEYS), rows, ld, keys, d);
    if (low) { amx_pack_keys(to->at + to->low, AMX_PAIR(KEYS), rows + low, ld, keys, d); }
}

/* Whether K has bad rows; then there is k_t_clean. */
static int block_bad_keys(const bwd_scratch *s, const tile_sequence *t, key_block *block)
{
    const int32_t d = t->p->d;
    const int bad = block->searched ? block->bad.count > 0 : !block_is_finite(block->k, block->ldk, block->j1 - block->j0, d);
    if (bad && !block->searched) {
        amx_load_keys(s->k_clean.at, s->k_clean.low, t, &t->p->view[FGQA_ARG_k], block->j0, block->j1, d);
        amx_zero_bad_rows(&block->bad, s->k_clean.at, s->k_clean.low, amx_block_keys(block->j1), d);
        pack_k_t(&s->k_t_clean, s->k_clean.at, s->k_clean.low, AMX_PAD(d), amx_block_keys(block->j1), d);
    }
    block->searched = 1;
    return bad;
}

/* Whether a row that is not finite sees one of the keys. */
static int bad_lane_sees(const bwd_panel *bp, const real *add, int32_t j0, int32_t j1)
{
    for (int32_t lane = 0; lane < bp->panel.rows; lane++) {
        if (!(bp->special >> lane & 1)) { continue; }
        for (int32_t j = j0; j < j1; j++) {
            const int in_range = bp->panel.begin[lane] <= j && j < bp->panel.end[lane];
            if (in_range && (add == NULL || add[(ptrdiff_t)(j - j0) * bp->panel.w + lane] != -REAL_INF)) { return 1; }
        }
    }
    return 0;
}

/* Whether scores and dP of a panel and keys [j0, j1) have to be computed in floats: something that is not finite is seen. */
static int is_special(const bwd_scratch *s, const tile_sequence *t, const bwd_panel *bp, const key_block *block, int32_t j0, int32_t j1)
{
    const real *add;
    if (!s->k.low || block->special || !bp->special) { return s->k.low && block->special; }
    return tile_scores_begin(t, &bp->panel, j0, j1, s->tiles.add, s->tiles.rows, &add) != TILE_UNSEEN && bad_lane_sees(bp, add, j0, j1);
}

/* dbias of a panel from dS^T as ds_t has it, whose first key is j0 and last one before j1. */
static void store_dbias(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, const tile_panel *panel, int32_t j0, int32_t j1)
{
    _Alignas(64) bf16 rows[AMX_TILE];          /* [lane][key] */
    const int64_t stride = t->p->view[FGQA_ARG_dbias].stride_d;
    for (int32_t j = j0; j < j1; j += AMX_DEPTH) {
        const int32_t n = j1 - j < AMX_DEPTH ? j1 - j : AMX_DEPTH;
        for (int32_t v = 0; v < panel->nv; v++) {
            amx_transpose_pairs(rows, AMX_DEPTH, s->ds_t.at + ((j - j0) / AMX_DEPTH * panel->nv + v) * AMX_TILE, AMX_DEPTH);
            for (int32_t lane = 0; lane < VL && v * VL + lane < panel->rows; lane++) {
                void *const to = dbias_at(t, panel->r0 + v * VL + lane, j);
                const bf16 *const row = rows + lane * AMX_DEPTH;
                if (job->dbias.way == DBIAS_ADDED) {
                    for (int32_t k = 0; k < n; k++) { ((real *)to)[k] += float_from_bf16(row[k]); }
                } else if (stride == 1) {
                    memcpy(to, row, (size_t)n * sizeof(bf16));
                } else {
                    for (int32_t k = 0; k < n; k++) { ((bf16 *)to)[k * stride] = row[k]; }
                }
            }
        }
    }
}

/* Lanes without a row, in n rows of A: their scores with an infinite key are NaN. */
static void zero_idle_lanes(const amx_buffer *of, const tile_panel *panel, int32_t n)
{
    const size_t idle = (size_t)(PANEL - panel->rows) * sizeof(bf16);
    for (int32_t j = 0; idle && j < n; j++) {
        bf16 *const at = of->at + j * PANEL + panel->rows;
        memset(at, 0, idle);
        if (of->low) { memset(at + of->low, 0, idle); }
    }
}

/* P or dS of a lane of the block of rows and a key of that of keys. */
static real stored_score(const amx_buffer *of, int32_t lane, int32_t key)
{
    const bf16 *const at = of->at + (ptrdiff_t)(lane / PANEL) * WEIGHT_PANEL + key * PANEL + lane % PANEL;
    return float_from_bf16(at[0]) + (of->low ? float_from_bf16(at[of->low]) : 0);
}

static void lane_scores(const bwd_scratch *s, const bwd_shape *shape, int32_t lane, int32_t j0, int32_t j1, real *weight, real *ds)
{
    (void)shape;
    for (int32_t j = j0; j < j1; j++) {
        weight[j - j0] = stored_score(&s->weight, lane, j);
        ds[j - j0] = stored_score(&s->ds, lane, j);
    }
}

/* P^T and dS^T of panel n and keys [j0, j1) of the block; dQ^T += K^T dS^T. Returns the
 * rows of weight and ds that were written. */
static fgqa_range block_panel(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int32_t n, key_block *block, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    const bwd_panel *const bp = &s->panels[n];
    const int32_t w = bp->panel.w, nv = bp->panel.nv, ld = AMX_PAD(p->d), ldo = AMX_PAD(p->dv);
    const int32_t first = j0 - block->j0, before = first % AMX_DEPTH, from = first - before, all = AMX_PAD(before + j1 - j0);
    const fgqa_range nothing = {0, 0}, written = {from, from + all};
    const bwd_tiles tiles = s->tiles;
    real *const seen = tiles.s + before * w, *const dp = tiles.dp + before * w, *const tanh = tiles.tanh ? tiles.tanh + before * w : NULL;
    const int special = is_special(s, t, bp, block, j0, j1), in_floats = bp->exact || special;
    const real *add;
    real scale = 1;
    tile_kind kind;
    if (in_floats) {
        const tile_block k = tile_block_load(t, &p->view[FGQA_ARG_k], j0, j1, p->d, s->key_copy);
        if (!bp->exact) { load_float_q(s, t, bp); }
        kind = tile_scores(seen, t, &bp->panel, j0, j1, &k, bp->q_t, tiles.add, tiles.rows, tanh, &add, &scale);
        if (kind == TILE_UNSEEN) { return nothing; }
        if (bp->exact) { tile_scale(seen, (j1 - j0) * w, &scale); }
    } else {
        kind = tile_scores_begin(t, &bp->panel, j0, j1, tiles.add, tiles.rows, &add);
        if (kind == TILE_UNSEEN) { return nothing; }
    }
    const int partial = kind == TILE_PARTIAL || all != j1 - j0;
    const bwd_flags flags = {partial, p->softcap > 0, p->dropout_threshold != 0, bp->exact, s->k.low != 0};
    amx_buffer weight = s->weight, ds = s->ds;
    weight.at += (ptrdiff_t)n * WEIGHT_PANEL + from * PANEL;
    ds.at += (ptrdiff_t)n * WEIGHT_PANEL + from * PANEL;
    const amx_operand k = {block->k + first * block->ldk, AMX_DEPTH, AMX_SIDE * block->ldk, AMX_DEPTH * block->ldk, block->ldk, s->k.low, p->dtype == FGQA_F16};
    const amx_operand q = {s->q_t.at + n * PANEL * (ptrdiff_t)ld, nv * AMX_TILE, AMX_TILE, 0, 0, s->q_t.low, 0};
    const amx_operand v = {block->v + first * block->ldv, AMX_DEPTH, AMX_SIDE * block->ldv, AMX_DEPTH * block->ldv, block->ldv, s->v.low, 0};
    const amx_operand dout = {s->dout_t.at + n * PANEL * (ptrdiff_t)ldo, nv * AMX_TILE, AMX_TILE, 0, 0, s->dout_t.low, 0};
    amx_bwd_beside beside = {.bp = bp, .tiles = &tiles, .scale = t->score_scale, .to = {weight, ds, s->ds_t}};
    if (nv == 2 && j1 - j0 == KEYS && !partial && !t->needs_transform && !flags.dropped && !in_floats) {
        amx_plain_panel(&beside, &k, &q, ld / AMX_DEPTH, &v, &dout, ldo / AMX_DEPTH);
    } else {
        if (!in_floats) {
            amx_product(0, amx_tiles(j1 - j0), nv, ld / AMX_DEPTH, &k, &q, seen, w);
            scale = tile_scores_end(seen, t, &bp->panel, j0, j1, kind, add, tanh);
        }
        for (int32_t i = 0; i < before * w; i += VL) { v_store(tiles.s + i, v_set1(-REAL_INF)); }
        for (int32_t i = (before + j1 - j0) * w; i < all * w; i += VL) { v_store(tiles.s + i, v_set1(-REAL_INF)); }
        if (special) {
            const tile_block rows = tile_block_load(t, &p->view[FGQA_ARG_v], j0, j1, p->dv, s->key_copy);
            load_float_dout(s, t, bp);
            gemm_row_set(j1 - j0, nv, p->dv, rows.data, rows.stride, bp->dout_t, w, dp, w, NULL);
        } else {
            amx_product(0, amx_tiles(j1 - j0), nv, ldo / AMX_DEPTH, &v, &dout, dp, w);
        }
        if (flags.dropped) { tile_dropout(tiles.keep + before * w, t, &bp->panel, j0, j1); }
        beside.scale = scale;
        if (flags.split) {
            amx_any_weights(1, &beside, all, (real)fgqa_dropout_scale(p->dropout_threshold), flags);
        } else {
            amx_any_weights(0, &beside, all, (real)fgqa_dropout_scale(p->dropout_threshold), flags);
        }
    }
    if (job->dbias.way == DBIAS_STORED || job->dbias.way == DBIAS_ADDED) { store_dbias(job, s, t, &bp->panel, block->j0 + from, j1); }
    zero_idle_lanes(&weight, &bp->panel, all);
    zero_idle_lanes(&ds, &bp->panel, all);
    const int cleaned = partial && block_bad_keys(s, t, block);
    const amx_buffer *const columns = cleaned ? &s->k_t_clean : &s->k_t;
    const amx_operand k_t = {columns->at + AMX_PAIR(from), 2 * AMX_TILE, AMX_TILE, AMX_PAIR(KEYS), AMX_DEPTH, columns->low, 0};
    const amx_operand ds_t = {s->ds_t.at, nv * AMX_TILE, AMX_TILE, 0, 0, s->ds_t.low, 0};
    amx_product(1, amx_tiles(p->d), nv, all / AMX_DEPTH, &k_t, &ds_t, s->dq_t + n * PANEL * (ptrdiff_t)AMX_SIDE * amx_tiles(p->d), w);
    for (int32_t m = 0; cleaned && m < block->bad.count; m++) {
        const int32_t row = block->bad.row[m], j = block->j0 + row;
        const fgqa_view *const keys = &p->view[FGQA_ARG_k];
        real of_weight[PANEL], of_ds[PANEL];
        if (j < j0 || j >= j1) { continue; }
        for (int32_t lane = 0; lane < bp->panel.rows; lane++) {
            of_weight[lane] = stored_score(&s->weight, n * PANEL + lane, row);
            of_ds[lane] = stored_score(&s->ds, n * PANEL + lane, row);
        }
        row_load(s->row, view_at(keys, t->b, t->kv_head, t->seq.k_row + j), keys->dtype, keys->stride_d, p->d);
        add_bad_key(&bp->panel, of_weight, of_ds, s->row, p->d, s->dq_t + n * PANEL * (ptrdiff_t)AMX_SIDE * amx_tiles(p->d));
    }
    return written;
}

/* c[key][col] += sum over the lanes of panels [first, last): a is [WEIGHT_PANEL][KEYS][PANEL], `first_key` the number of the
 * first key in the block, b [term_panel][tile of columns]. Only n keys of c are touched. */
static void amx_accumulate(int32_t n, int32_t first_key, int32_t first, int32_t last, const amx_buffer *a, const amx_buffer *b, int32_t cols, real *c,
                           int32_t ldc, real *tail)
{
    const int32_t whole = n / AMX_SIDE, rest = n % AMX_SIDE, panels = last - first;
    const bf16 *const from = a->at + (ptrdiff_t)first * WEIGHT_PANEL + first_key * PANEL;
    const amx_operand keys = {from, WEIGHT_PANEL, AMX_TILE, 2 * AMX_TILE, PANEL, a->low, 0};
    const amx_operand lanes = {b->at + first * term_panel(cols), term_panel(cols), AMX_TILE, 0, PANEL, b->low, 0};
    amx_product(1, whole, amx_tiles(cols), panels, &keys, &lanes, c, ldc);
    if (!rest) { return; }
    const amx_operand last_keys = {from + whole * AMX_TILE, WEIGHT_PANEL, AMX_TILE, 0, PANEL, a->low, 0};
    amx_product(0, 1, amx_tiles(cols), panels, &last_keys, &lanes, tail, ldc);
    for (int32_t i = 0; i < rest * ldc; i += VL) {
        real *const to = c + (ptrdiff_t)whole * AMX_SIDE * ldc + i;
        v_store(to, v_load(to) + v_load(tail + i));
    }
}

static void zero_keys(const amx_buffer *of, int32_t panel, int32_t j0, int32_t j1)
{
    if (j0 < j1) { amx_zero_rows(of->at + (ptrdiff_t)panel * WEIGHT_PANEL + j0 * PANEL, of->low, j1 - j0, PANEL); }
}

/* Keys [j0, j1), one key block, against the block of rows in `s`. */
static void block_keys(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int32_t panels, int32_t j0, int32_t j1,
                       const bad_rows *bad, real *dk, real *dv)
{
    const fgqa_problem *p = job->p;
    const bwd_shape *shape = &job->shape;
    const tile_extent e = extent_of(s->panels, panels, j0, j1);
    if (e.first >= e.last) { return; }
    key_block block = {.j0 = j0, .j1 = j1};
    block.k = block_rows(&s->k, &block.ldk, t, &p->view[FGQA_ARG_k], j0, j1, p->d);
    block.v = block_rows(&s->v, &block.ldv, t, &p->view[FGQA_ARG_v], j0, j1, p->dv);
    block.special = s->k.low && !(block_is_finite(block.k, block.ldk, j1 - j0, p->d) && block_is_finite(block.v, block.ldv, j1 - j0, p->dv));
    pack_k_t(&s->k_t, block.k, s->k.low, block.ldk, amx_block_keys(j1), p->d);
    const int32_t begin = (e.j0 - j0) / AMX_SIDE * AMX_SIDE, end = ROUND_UP(e.j1 - j0, AMX_SIDE);
    for (int32_t n = e.first; n < e.last; n++) {
        const fgqa_range r = panel_keys(&s->panels[n].panel, j0, j1);
        fgqa_range written = {begin, begin};
        if (r.begin < r.end) { written = block_panel(job, s, t, n, &block, r.begin, r.end); }
        for (int i = 0; i < 2; i++) {
            const amx_buffer *const of = i ? &s->ds : &s->weight;
            zero_keys(of, n, begin, written.begin < end ? written.begin : end);
            zero_keys(of, n, written.end > begin ? written.end : begin, end);
        }
    }
    for (int32_t j = j0 + begin, next; j < j0 + end; j = next) {
        tile_extent step;
        next = step_end(s->panels, panels, j, j0 + end, &step);
        if (step.first >= step.last) { continue; }
        const int32_t keys = (next < t->seq.mask.sk ? next : t->seq.mask.sk) - j;
        amx_accumulate(keys, j - j0, step.first, step.last, &s->weight, &s->dout, p->dv, dv + (ptrdiff_t)j * shape->ldv, shape->ldv, s->tail);
        amx_accumulate(keys, j - j0, step.first, step.last, &s->ds, &s->q, p->d, dk + (ptrdiff_t)j * shape->ldk, shape->ldk, s->tail);
    }
    add_bad_lanes(s, shape, t, bad, e, j0, s->panels[0].panel.r0, s->row, dk, dv);
}

/* ---- scores in floats, as tiles have them ----
 * The LSE given is that of scores without low*low (amx.h), where the numbers are float32. dbias, which is computed in
 * floats, must do without it, too: where one weight of a row is nearly 1, the errors of score and LSE cancel. x*y is
 * then (high + low)*(high + low) - low*low. */

/* n numbers as high + low, as far as both have digits, and `sign` times low. */
static void amx_join(real *to, real *low, const real *from, int32_t n, real sign)
{
    for (int32_t i = 0; i < n; i += VL) {
        const vreal x = n - i < VL ? v_load_part(from + i, n - i) : v_load(from + i), high = amx_high(x), rest = amx_low(x, high);
        const __m256i narrow = _mm512_castsi512_si256(amx_narrow((__m512)rest, (__m512)rest));
        const vreal rounded = (vreal)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
        v_store(low + i, rounded * v_set1(sign));
        v_store(to + i, high + rounded);
    }
}

/* A block of n rows so, in `rows` and `low`, where it may lie already. */
static tile_block amx_join_rows(const tile_block *from, real *rows, real *low, int32_t n, int32_t cols)
{
    const tile_block to = {rows, ROUND_UP(cols, VL)};
    for (int32_t j = 0; j < n; j++) { amx_join(rows + j * to.stride, low + j * to.stride, from->data + j * from->stride, cols, 1); }
    return to;
}

#endif
