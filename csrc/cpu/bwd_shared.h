/* bwd_shared.h - what bwd.c and its products (bwd_block.h, amx_bwd.h) know together. */
#ifndef FGQA_BWD_SHARED_H
#define FGQA_BWD_SHARED_H
#include "bwd_tile.h"

#define MAX_BLOCK_PANELS (FGQA_PAIRS ? 16 : 8)
#if FGQA_TILES
#define BLOCK_BYTES (1056 * 1024) /* dK and dV come from farther once a block, slower than products go: 704 KB take 1.07 times as long */
#else
#define BLOCK_BYTES (704 * 1024)  /* of Q, dO (both ways), dQ, P, dS; 512 KB to 1 MB measured alike, above slower */
#endif
#define EDGE_KEYS 16             /* keys of a step where a mask's edge crosses the block */

typedef struct {
    int32_t panels;              /* of a full block */
    int32_t ldk, ldv;            /* reals between keys of the dK and dV buffers */
    int32_t ldq, ldo;            /* between lanes of the packed Q and dO */
    int32_t ldt;                 /* between keys of the block's P^T and dS^T */
} bwd_shape;

/* All but ldt: as many panels as leave room in the second-level cache for K, V, dK, dV of a few key blocks. */
static bwd_shape shape_of_lanes(const fgqa_problem *p, int32_t lane_bytes)
{
    bwd_shape shape = {0, ROUND_UP(p->d, VL), ROUND_UP(p->dv, VL), bwd_row_stride(p->d), bwd_row_stride(p->dv), 0};
    const int32_t panels = BLOCK_BYTES / (lane_bytes * PANEL);
    shape.panels = panels < 1 ? 1 : panels > MAX_BLOCK_PANELS ? MAX_BLOCK_PANELS : panels;
    return shape;
}

static int32_t row_reals(const bwd_shape *shape) { return shape->ldk > shape->ldv ? shape->ldk : shape->ldv; }

/* How dbias is made. DBIAS_STORED: of each of its elements one task has dS, and stores it. DBIAS_ADDED: several have it, heads or
 * sequences that share a bias; each adds what it has of a part of the batch, and a job of its own adds the parts. Else that job
 * computes dS again. */
typedef enum { DBIAS_NONE, DBIAS_STORED, DBIAS_ADDED, DBIAS_AGAIN } dbias_way;
typedef struct {
    dbias_way way;
    int32_t parts;               /* of the batch: tasks of a split and a KV head */
    int in_place;                /* DBIAS_ADDED: the only part is dbias itself, else [parts][hq][sq][sk] in the workspace */
} dbias_plan;

#define ADDED_TASKS 8            /* fewer would leave too many workers idle */
#define ADDED_BYTES (64 << 20)   /* of the parts */

static int32_t first_of_part(int32_t part, int32_t parts, int32_t b) { return (int32_t)((int64_t)b * part / parts); }

/* A part for every sequence where each has its own bias, else one, or where that makes few
 * tasks enough for 16; from the shape alone. */
static dbias_plan dbias_plan_of(const fgqa_problem *p, int32_t splits)
{
    const fgqa_dtype dtype = p->view[FGQA_ARG_bias].dtype;     /* and that of dbias, which need not be there yet */
    const int32_t *const shape = p->bias_shape;
    const dbias_plan none = {DBIAS_NONE, p->b, 0}, stored = {DBIAS_STORED, p->b, 0}, again = {DBIAS_AGAIN, p->b, 0};
    if (!p->want_dbias) { return none; }
    if (p->b == 0 || shape[2] != p->sq || shape[3] != p->sk || p->softcap > 0) { return again; }   /* softcap: dS is not by the score */
    if (FGQA_PAIRS && (p->dtype != FGQA_BF16 || dtype != FGQA_BF16)) { return again; }      /* dS is rounded */
    if (shape[0] == p->b && shape[1] == p->hq) { return stored; }
    const int64_t heads = (int64_t)splits * p->hk, wanted = heads < ADDED_TASKS ? (16 + heads - 1) / heads : 1;
    const double bytes = (double)p->hq * p->sq * p->sk * sizeof(real);
    dbias_plan added = {DBIAS_ADDED, shape[0] == p->b || wanted > p->b ? p->b : (int32_t)wanted, 0};
    added.in_place = added.parts == 1 && shape[1] == p->hq && dtype == (FGQA_REAL_F64 ? FGQA_F64 : FGQA_F32);
    if (shape[0] == 1 && !added.in_place && added.parts * bytes > ADDED_BYTES) { added.parts = (int32_t)(ADDED_BYTES / bytes); }
    const int enough = added.parts == p->b || heads * added.parts >= ADDED_TASKS;
    return added.parts > 0 && enough && (added.in_place || added.parts * bytes <= ADDED_BYTES) ? added : again;
}

/* dbias of packed row r, key j. */
static void *dbias_at(const tile_sequence *t, int64_t r, int32_t j)
{
    const fgqa_view *const dbias = &t->p->view[FGQA_ARG_dbias];
    char *const row = view_at(dbias, t->p->bias_shape[0] == 1 ? 0 : t->b, fgqa_packed_row_head(r, t->kv_head, t->p->g), fgqa_packed_row_q(r, t->p->g));
    return row + j * dbias->stride_d * (int64_t)fgqa_dtype_bytes(dbias->dtype);
}

typedef struct {
    real *delta;                               /* [hq][total_q] */
    real *dk, *dv;                             /* [splits][hk][total_k][ldk or ldv]; only where there are several */
    real *dbias;                               /* [parts][hq][sq][sk]; dbias_plan */
} bwd_workspace;

typedef struct {
    const fgqa_problem *p;
    bwd_shape shape;
    bwd_workspace workspace;
    int32_t splits;
    dbias_plan dbias;
} bwd_job;

/* Rows before sequence b in buffers that hold the whole batch. */
static int64_t first_row(const fgqa_problem *p, const fgqa_sequence *seq, int32_t b) { return p->varlen ? seq->q_row : (int64_t)b * p->sq; }
static int64_t first_key(const fgqa_problem *p, const fgqa_sequence *seq, int32_t b) { return p->varlen ? seq->k_row : (int64_t)b * p->sk; }

/* Rows and keys of sequence b that its results have, padding included. */
static int32_t result_rows(const fgqa_problem *p, const fgqa_sequence *seq) { return p->varlen ? seq->mask.sq : p->sq; }
static int32_t result_keys(const fgqa_problem *p, const fgqa_sequence *seq) { return p->varlen ? seq->mask.sk : p->sk; }

static real *delta_at(const bwd_job *job, const tile_sequence *t, int64_t r)
{
    const int32_t h = fgqa_packed_row_head(r, t->kv_head, t->p->g), i = fgqa_packed_row_q(r, t->p->g);
    return job->workspace.delta + (int64_t)h * job->p->total_q + first_row(job->p, &t->seq, t->b) + i;
}

static int all_zero(const real *row, int32_t n)
{
    int32_t c = 0;
    while (c < n && row[c] == 0) { c++; }
    return c == n;
}

/* delta = rowsum(dO*O) - dLSE of packed row r, kept for dsink and dbias. `row`: room for a row of O. Where all of O is 0, as in a
 * row that sees no key, dO does not matter, not even NaN. */
static real row_delta(const bwd_job *job, const tile_sequence *t, int64_t r, const real *dout, real *row)
{
    const fgqa_problem *p = job->p;
    const fgqa_view *out = &p->view[FGQA_ARG_out], *dlse = &p->view[FGQA_ARG_dlse];
    vreal sums = v_zero();
    real sum = 0;
    int32_t c = 0;
    row_load(row, tile_packed_row(t, out, r), out->dtype, out->stride_d, p->dv);
    for (; c + VL <= p->dv; c += VL) { sums += v_load(dout + c) * v_load(row + c); }
    for (; c < p->dv; c++) { sum += dout[c] * row[c]; }
    sum += v_sum(sums);
    if (sum != sum && all_zero(row, p->dv)) { sum = 0; }
    if (dlse->data) { sum -= tile_lse_load(t, dlse, r); }
    *delta_at(job, t, r) = sum;
    return sum;
}

/* Lanes of a block whose q or dO is not finite. */
typedef struct { int32_t count; int16_t lane[MAX_BLOCK_PANELS * PANEL]; } bad_lanes;
typedef struct { bad_lanes q, dout; } bad_rows;

/* The part of a block of keys that some panel sees: tile rows [j0, j1) of panels [first, last). */
typedef struct { int32_t j0, j1, first, last; } tile_extent;

static fgqa_range panel_keys(const tile_panel *panel, int32_t j0, int32_t j1)
{
    fgqa_range r = {panel->keys.begin > j0 ? panel->keys.begin : j0, panel->keys.end < j1 ? panel->keys.end : j1};
    if (r.end < r.begin) { r.end = r.begin; }
    return r;
}

static tile_extent extent_of(const bwd_panel *panel, int32_t panels, int32_t j0, int32_t j1)
{
    tile_extent e = {j1, j0, panels, 0};
    for (int32_t n = 0; n < panels; n++) {
        const fgqa_range r = panel_keys(&panel[n].panel, j0, j1);
        if (r.begin == r.end) { continue; }
        if (r.begin < e.j0) { e.j0 = r.begin; }
        if (r.end > e.j1) { e.j1 = r.end; }
        if (n < e.first) { e.first = n; }
        e.last = n + 1;
    }
    return e;
}

/* sums[j] += factor[j] * packed row r of q or dO, which is not finite, for those of n keys
 * whose weight is not 0. `row`: room for it. */
static void add_bad_lane(const tile_sequence *t, fgqa_arg arg, int32_t cols, int64_t r, const real *weight, const real *factor, int32_t n,
                         real *sums, int32_t ld, real *row)
{
    const fgqa_view *view = &t->p->view[arg];
    row_load(row, tile_packed_row(t, view, r), view->dtype, view->stride_d, cols);
    for (int32_t j = 0; j < n; j++) {
        if (weight[j] == 0) { continue; }
        for (int32_t c = 0; c < cols; c++) { sums[(ptrdiff_t)j * ld + c] += factor[j] * row[c]; }
    }
}

/* P and dS of a lane of the block of rows and keys [j0, j1) of that of keys, which bwd_block.h
 * and amx_bwd.h keep each in its own way. */
typedef struct bwd_scratch bwd_scratch;
static void lane_scores(const bwd_scratch *s, const bwd_shape *shape, int32_t lane, int32_t j0, int32_t j1, real *weight, real *ds);

/* What lanes that are not finite add to dK and dV of the keys of extent e. j0: the block's first key; r0: the row of lane 0. */
static void add_bad_lanes(const bwd_scratch *s, const bwd_shape *shape, const tile_sequence *t, const bad_rows *bad, tile_extent e, int32_t j0, int64_t r0,
                          real *row, real *dk, real *dv)
{
    const int32_t keys = e.j1 - e.j0;
    for (int which = 0; which < 2; which++) {
        const bad_lanes *const lanes = which ? &bad->dout : &bad->q;
        for (int32_t n = 0; n < lanes->count; n++) {
            const int32_t lane = lanes->lane[n];
            real weight[KEYS], ds[KEYS];
            if (lane < e.first * PANEL || lane >= e.last * PANEL) { continue; }
            lane_scores(s, shape, lane, e.j0 - j0, e.j1 - j0, weight, ds);
            if (which) {
                add_bad_lane(t, FGQA_ARG_dout, t->p->dv, r0 + lane, weight, weight, keys, dv + (ptrdiff_t)e.j0 * shape->ldv, shape->ldv, row);
            } else {
                add_bad_lane(t, FGQA_ARG_q, t->p->d, r0 + lane, weight, ds, keys, dk + (ptrdiff_t)e.j0 * shape->ldk, shape->ldk, row);
            }
        }
    }
}

/* dq_t[c][lane] += ds[lane] * key[c] of a key that is not finite, for the lanes of a panel whose weight is not 0. */
static void add_bad_key(const tile_panel *panel, const real *weight, const real *ds, const real *key, int32_t cols, real *dq_t)
{
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        if (weight[lane] == 0) { continue; }
        for (int32_t c = 0; c < cols; c++) { dq_t[(ptrdiff_t)c * panel->w + lane] += ds[lane] * key[c]; }
    }
}

/* The end of a step from key j of an extent on: near a mask's edge the panels that see the keys differ from step to step; equal
 * steps become one product. *step: the panels. */
static int32_t step_end(const bwd_panel *panel, int32_t panels, int32_t j, int32_t j1, tile_extent *step)
{
    int32_t end = j + EDGE_KEYS;
    *step = extent_of(panel, panels, j, end < j1 ? end : j1);
    for (; end < j1; end += EDGE_KEYS) {
        const tile_extent next = extent_of(panel, panels, end, end + EDGE_KEYS < j1 ? end + EDGE_KEYS : j1);
        if (next.first != step->first || next.last != step->last) { break; }
    }
    return end < j1 ? end : j1;
}

#endif
