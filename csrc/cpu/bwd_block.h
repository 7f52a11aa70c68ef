/* bwd_block.h - the backward's products in floats: a block of packed rows against a block of keys (bwd.c; amx_bwd.h is the same
 * on tiles).
 *
 *     for each panel:   P^T, dS^T (bwd_tile.h)      dQ^T += K^T dS^T
 *     dV += P^T dO      dK += dS^T Q                over all lanes of the block at once
 *
 * A panel of a handful of rows, a whole sequence or what full panels leave over, has its scores and dQ by decode.h's products.
 */
#ifndef FGQA_BWD_BLOCK_H
#define FGQA_BWD_BLOCK_H
#include "bwd_shared.h"
#include "few_tile.h"

static bwd_shape shape_of(const fgqa_problem *p)
{
    bwd_shape shape = shape_of_lanes(p, (int32_t)sizeof(real) * (3 * p->d + 2 * p->dv + 2 * KEYS));
    shape.ldt = bwd_row_stride(shape.panels * PANEL);
    return shape;
}

struct bwd_scratch {
    bwd_panel *panels;                         /* [panels] */
    bwd_tiles tiles;
    real *q, *dout, *dq_t;                     /* [lane][ldq], [lane][ldo]; dQ^T panel after panel, each [d][w] */
    real *weight, *ds;                         /* P^T and dS^T of the block: [KEYS][ldt] */
    real *k_copy, *v_copy, *k_clean;           /* KEYS rows */
    real *row;                                 /* one row of anything */
    real *dq;                                  /* one panel of dQ */
    real *dk, *dv;                             /* [sk][ldk], [sk][ldv]; only where there is one split */
};

static bwd_scratch scratch_carve(fgqa_arena *arena, const fgqa_problem *p, const bwd_shape *shape, int32_t splits)
{
    bwd_scratch s;
    const size_t lanes = (size_t)shape->panels * PANEL;
    s.panels = fgqa_arena_take(arena, (size_t)shape->panels, sizeof(bwd_panel));
    for (int32_t n = 0; n < shape->panels; n++) { bwd_panel_carve(s.panels ? &s.panels[n] : NULL, arena, p); }
    s.tiles = bwd_tiles_carve(arena, p);
    s.q = fgqa_arena_take(arena, lanes * (size_t)shape->ldq, sizeof(real));
    s.dout = fgqa_arena_take(arena, lanes * (size_t)shape->ldo, sizeof(real));
    s.dq_t = fgqa_arena_take(arena, lanes * (size_t)shape->ldk, sizeof(real));
    s.weight = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldt, sizeof(real));
    s.ds = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldt, sizeof(real));
    s.k_copy = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldk, sizeof(real));
    s.v_copy = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldv, sizeof(real));
    s.k_clean = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldk, sizeof(real));
    s.row = fgqa_arena_take(arena, (size_t)row_reals(shape), sizeof(real));
    s.dq = fgqa_arena_take(arena, (size_t)PANEL * (size_t)shape->ldk, sizeof(real));
    s.dk = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldk, sizeof(real)) : NULL;
    s.dv = splits == 1 ? fgqa_arena_take(arena, (size_t)p->sk * (size_t)shape->ldv, sizeof(real)) : NULL;
    return s;
}

/* Packs packed rows [r0, r1); returns the number of panels. */
static int32_t block_load(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int64_t r0, int64_t r1, bad_rows *bad)
{
    const bwd_shape *shape = &job->shape;
    int32_t panels = 0;
    bad->q.count = bad->dout.count = 0;
    for (int64_t r = r0; r < r1; r += PANEL, panels++) {
        bwd_panel *const bp = &s->panels[panels];
        real *const q = s->q + (ptrdiff_t)panels * PANEL * shape->ldq, *const dout = s->dout + (ptrdiff_t)panels * PANEL * shape->ldo;
        const bwd_rows to = {q, dout, shape->ldq, shape->ldo};
        const stats_scratch stats = {s->tiles.s, s->tiles.add, s->tiles.rows, s->k_copy};
        bwd_panel_load(bp, t, t, r, r1, &to, &stats, 1);
        for (int32_t lane = 0; lane < bp->panel.rows; lane++) {
            real *const q_row = q + (ptrdiff_t)lane * shape->ldq, *const dout_row = dout + (ptrdiff_t)lane * shape->ldo;
            bp->delta[lane] = row_delta(job, t, bp->panel.r0 + lane, dout_row, s->row);
            if (!row_is_finite(q_row, job->p->d)) {
                memset(q_row, 0, (size_t)job->p->d * sizeof(real));
                bad->q.lane[bad->q.count++] = (int16_t)(panels * PANEL + lane);
            }
            if (!row_is_finite(dout_row, job->p->dv)) {
                memset(dout_row, 0, (size_t)job->p->dv * sizeof(real));
                bad->dout.lane[bad->dout.count++] = (int16_t)(panels * PANEL + lane);
            }
        }
    }
    return panels;
}

/* C[m][cols] += sum over n < k of A[m][n] * B[n][cols], in strips of nearly equal width. */
static void accumulate(int32_t m, int32_t k, const real *a, ptrdiff_t lda, const real *b, ptrdiff_t ldb, real *c, int32_t ldc)
{
    const int32_t vectors = ldc / VL, strips = (vectors + NV - 1) / NV;
    for (int32_t n = 0; n < strips; n++) {
        const int32_t from = vectors * n / strips, to = vectors * (n + 1) / strips;
        gemm_row_add(m, to - from, k, a, lda, b + from * VL, ldb, c + from * VL, ldc, NULL);
    }
}

static void zero_rows(real *tile, int32_t ldt, int32_t j0, int32_t j1, int32_t w)
{
    for (int32_t j = j0; j < j1; j++) { memset(tile + (ptrdiff_t)j * ldt, 0, (size_t)w * sizeof(real)); }
}

/* dbias of packed row r and some keys from dS, which may be lost. */
static void store_dbias_row(const bwd_job *job, const tile_sequence *t, int64_t r, fgqa_range keys, real *ds)
{
    const fgqa_view *const dbias = &t->p->view[FGQA_ARG_dbias];
    const int32_t n = keys.end - keys.begin;
    real *const to = dbias_at(t, r, keys.begin);
    for (int32_t j = 0; job->dbias.way == DBIAS_ADDED && j < n; j++) { ds[j] += to[j * dbias->stride_d]; }
    row_store(to, dbias->dtype, dbias->stride_d, ds, n);
}

/* Of a panel and keys of the block that begins with key j0, whose dS^T is at `ds`. `rows`: VL x KEYS. */
static void store_dbias(const bwd_job *job, const tile_sequence *t, const tile_panel *panel, int32_t j0, fgqa_range keys, const real *ds, real *rows)
{
    const int32_t first = keys.begin - j0, n = keys.end - keys.begin, ldt = job->shape.ldt;
    for (int32_t lane0 = 0; lane0 < panel->rows; lane0 += VL) {
        for (int32_t j = first / VL * VL; j < first + n; j += VL) { v_transpose(rows + j, KEYS, ds + (ptrdiff_t)j * ldt + lane0, ldt); }
        for (int32_t lane = 0; lane < VL && lane0 + lane < panel->rows; lane++) {
            store_dbias_row(job, t, panel->r0 + lane0 + lane, keys, rows + lane * KEYS + first);
        }
    }
}

/* bwd_tile() for a panel of few rows; weight and dS stay in the scratch's s and dp, [row][KEYS], too. */
static tile_kind few_tile(const bwd_tiles *tiles, const tile_sequence *t, const bwd_panel *bp, int32_t j0, int32_t j1, const tile_block *k,
                          const tile_block *v, real *weight, real *ds, ptrdiff_t ld)
{
    const fgqa_problem *const p = t->p;
    const few_source keys = {k->data, k->stride, NULL, FEW_BLOCK}, values = {v->data, v->stride, NULL, FEW_BLOCK};
    const int32_t n = j1 - j0;
    const real *used_add;
    real scale;
    const tile_kind kind = few_tile_scores(tiles->s, tiles->add, t, &bp->panel, j0, j1, &keys, bp->q_t, &used_add, &scale);
    if (kind == TILE_UNSEEN) { return kind; }
    few_scores(bp->panel.rows, n, p->dv, &values, bp->dout_t, ROUND_UP(p->dv, VL), tiles->dp, KEYS);
    const bwd_flags flags = {kind == TILE_PARTIAL, 0, 0, 0, 0};
    for (int32_t r = 0; r < bp->panel.rows; r++) {
        const vreal lse = v_set1(bp->lse.top[r]), delta = v_set1(bp->delta[r]);
        for (int32_t j = 0; j < n; j += VL) {
            const ptrdiff_t at = r * KEYS + j;
            const bwd_score x = bwd_score_grad(tiles, at, lse, v_zero(), delta, scale, 1, flags);
            v_store(tiles->s + at, x.weight);
            v_store(tiles->dp + at, x.ds);
        }
        for (int32_t j = 0; j < n; j++) {
            weight[j * ld + r] = tiles->s[r * KEYS + j];
            ds[j * ld + r] = tiles->dp[r * KEYS + j];
        }
    }
    return kind;
}

/* dQ of such a panel from those, and dbias. */
static void few_grads(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, const bwd_panel *bp, fgqa_range keys, const tile_block *k, real *dq)
{
    const few_source rows = {k->data, k->stride, NULL, FEW_BLOCK};
    const int at_once = few_keys(bp->panel.rows, t->p->d, FEW_BLOCK);
    few_accumulate(bp->panel.rows, keys.end - keys.begin, t->p->d, at_once, s->tiles.dp, KEYS, &rows, dq, job->shape.ldk, NULL);
    for (int32_t r = 0; r < bp->panel.rows && (job->dbias.way == DBIAS_STORED || job->dbias.way == DBIAS_ADDED); r++) {
        store_dbias_row(job, t, bp->panel.r0 + r, keys, s->tiles.dp + r * KEYS);
    }
}

static void lane_scores(const bwd_scratch *s, const bwd_shape *shape, int32_t lane, int32_t j0, int32_t j1, real *weight, real *ds)
{
    for (int32_t j = j0; j < j1; j++) {
        weight[j - j0] = s->weight[(ptrdiff_t)j * shape->ldt + lane];
        ds[j - j0] = s->ds[(ptrdiff_t)j * shape->ldt + lane];
    }
}

/* Keys [j0, j1), one key block, against the block of rows in `s`. */
static void block_keys(const bwd_job *job, const bwd_scratch *s, const tile_sequence *t, int32_t panels, int32_t j0, int32_t j1,
                       const bad_rows *bad, real *dk, real *dv)
{
    const fgqa_problem *p = job->p;
    const bwd_shape *shape = &job->shape;
    const tile_extent e = extent_of(s->panels, panels, j0, j1);
    if (e.first >= e.last) { return; }
    const tile_block k = tile_block_load(t, &p->view[FGQA_ARG_k], j0, j1, p->d, s->k_copy);
    const tile_block v = tile_block_load(t, &p->view[FGQA_ARG_v], j0, j1, p->dv, s->v_copy);
    tile_block k_dq = k;
    tile_bad_rows bad_keys = {.count = 0};
    int k_checked = 0;
    for (int32_t n = e.first; n < e.last; n++) {
        const bwd_panel *const bp = &s->panels[n];
        const int32_t w = bp->panel.w;
        fgqa_range r = panel_keys(&bp->panel, j0, j1);
        real *const weight = s->weight + n * PANEL, *const ds = s->ds + n * PANEL;
        if (r.begin == r.end) { r.begin = r.end = e.j1; }
        const ptrdiff_t at = (ptrdiff_t)(r.begin - j0) * shape->ldt;
        if (r.begin < r.end) {
            const tile_block k_part = {k.data + (r.begin - j0) * k.stride, k.stride}, v_part = {v.data + (r.begin - j0) * v.stride, v.stride};
            const tile_kind kind = bp->few ? few_tile(&s->tiles, t, bp, r.begin, r.end, &k_part, &v_part, weight + at, ds + at, shape->ldt)
                                           : bwd_tile(&s->tiles, t, bp, r.begin, r.end, &k_part, &v_part, 0, weight + at, ds + at, shape->ldt);
            if (kind == TILE_UNSEEN) { r.end = r.begin; }
            if (kind == TILE_PARTIAL && !k_checked) {
                tile_find_bad_rows(&bad_keys, &k, j1 - j0, p->d);
                if (bad_keys.count) { k_dq = tile_without_bad_rows(&bad_keys, &k, j1 - j0, p->d, s->k_clean); }
                k_checked = 1;
            }
        }
        const tile_block k_seen = {k_dq.data + (r.begin - j0) * k_dq.stride, k_dq.stride};
        real *const dq = s->dq_t + (ptrdiff_t)n * PANEL * shape->ldk;
        if (bp->few && r.begin < r.end) {
            few_grads(job, s, t, bp, r, &k_seen, dq);
        } else if (r.begin < r.end && (job->dbias.way == DBIAS_STORED || job->dbias.way == DBIAS_ADDED)) {
            store_dbias(job, t, &bp->panel, j0, r, ds, s->tiles.rows);
        }
        zero_rows(weight, shape->ldt, e.j0 - j0, r.begin - j0, w);
        zero_rows(ds, shape->ldt, e.j0 - j0, r.begin - j0, w);
        zero_rows(weight, shape->ldt, r.end - j0, e.j1 - j0, w);
        zero_rows(ds, shape->ldt, r.end - j0, e.j1 - j0, w);
        if (bp->few) { continue; }
        gemm_col_add(p->d, bp->panel.nv, r.end - r.begin, k_seen.data, k_seen.stride, ds + at, shape->ldt, dq, w, NULL);
        for (int32_t m = 0; m < bad_keys.count; m++) {
            const int32_t row = bad_keys.row[m];
            if (j0 + row < r.begin || j0 + row >= r.end) { continue; }
            add_bad_key(&bp->panel, weight + (ptrdiff_t)row * shape->ldt, ds + (ptrdiff_t)row * shape->ldt, k.data + row * k.stride, p->d, dq);
        }
    }
    for (int32_t j = e.j0, end; j < e.j1; j = end) {
        tile_extent step;
        end = step_end(s->panels, panels, j, e.j1, &step);
        if (step.first >= step.last) { continue; }
        /* not those without a row, whose scores with an infinite key are NaN */
        const int32_t lanes = (step.last - step.first - 1) * PANEL + s->panels[step.last - 1].panel.rows, lane0 = step.first * PANEL;
        const ptrdiff_t at = (ptrdiff_t)(j - j0) * shape->ldt + lane0;
        accumulate(end - j, lanes, s->weight + at, shape->ldt, s->dout + (ptrdiff_t)lane0 * shape->ldo, shape->ldo,
                   dv + (ptrdiff_t)j * shape->ldv, shape->ldv);
        accumulate(end - j, lanes, s->ds + at, shape->ldt, s->q + (ptrdiff_t)lane0 * shape->ldq, shape->ldq,
                   dk + (ptrdiff_t)j * shape->ldk, shape->ldk);
    }
    add_bad_lanes(s, shape, t, bad, e, j0, s->panels[0].panel.r0, s->row, dk, dv);
}

#endif
