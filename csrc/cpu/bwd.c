/* bwd.c - the backward pass: dq, dk, dv, dbias, dsink. Compiled once per row of isa.def and precision.
 *
 * Task = (split, batch, KV head). A split owns some blocks of packed query rows (up to MAX_BLOCK_PANELS panels) of its KV head:
 *
 *     for each block:        Q, dO packed both ways; delta; dQ^T = 0
 *         for each 128 keys:    bwd_block.h, on tiles amx_bwd.h
 *             for each panel:  P^T, dS^T (bwd_tile.h)      dQ^T += K^T dS^T
 *             dV += P^T dO     dK += dS^T Q                over all lanes of the block at once
 *         dQ = scale * dQ^T, written once, by its only owner
 *
 * dK and dV grow in a private buffer of the split, which all heads of the group share, so that the sum over the group
 * costs nothing. A second job adds the splits in order and converts. dbias is dS where one task has all of an element; where
 * heads or sequences share it, a third job adds what tasks have of it, or else recomputes its tiles, each task owning a part of
 * dbias. Every sum has one fixed order, given by the shape: the same bits for any number of threads.
 *
 * Rows with NaN or infinity must not reach others through 0 * NaN. They are zeroed in the products with P and dS, and added back
 * where the weight is not 0: under a soft cap an infinite score has one, and a dS of 0.
 */
#include "../core/workspace.h"
#include "bwd_tile.h"
#if FGQA_PAIRS
#include "amx_bwd.h"
#else
#include "bwd_block.h"
#endif
#include "threads.h"
#include <math.h>

#define FINISH_KEYS 64           /* keys of one task of the finishing job */

/* ---- shape ---- */

static int64_t blocks_of(const bwd_shape *shape, int64_t rows) { return (rows + shape->panels * PANEL - 1) / (shape->panels * PANEL); }

/* Enough tasks for 16 workers, for 32 where a split still has 8 blocks (its buffers must be cleared and added up); as long as
 * the buffers of dK and dV stay within about half of what q, out and their gradients take, or 256 MB. From the shape alone;
 * with batch_invariant from that of one sequence. */
static int32_t splits_of(const fgqa_problem *p, const bwd_shape *shape)
{
    const int64_t b = p->batch_invariant ? 1 : p->b, total_k = p->batch_invariant ? p->sk : p->total_k;
    const int64_t heads = b * p->hk, most = p->g + 2 > 8 ? p->g + 2 : 8;
    const double bytes = (double)total_k * p->hk * (shape->ldk + shape->ldv) * sizeof(real);
    const int64_t by_memory = (int64_t)(bytes > 0 ? 256e6 / bytes : 64), by_group = p->g / 2 + 1;
    const int64_t blocks = blocks_of(shape, (int64_t)p->sq * p->g);
    int64_t splits = 1;
    if (heads > 0) {
        const int64_t few = (16 + heads - 1) / heads, many = (32 + heads - 1) / heads;
        splits = many < blocks / 8 ? many : blocks / 8;
        if (splits < few) { splits = few; }
    }
    if (splits > most) { splits = most; }
    if (splits > by_memory && splits > by_group) { splits = by_memory > by_group ? by_memory : by_group; }
    if (splits > blocks) { splits = blocks; }
    return splits < 1 ? 1 : (int32_t)splits;
}

/* ---- memory ---- */

static bwd_workspace workspace_carve(fgqa_arena *arena, const fgqa_problem *p, const bwd_shape *shape, int32_t splits)
{
    const dbias_plan dbias = dbias_plan_of(p, splits);
    bwd_workspace w = {NULL, NULL, NULL, NULL};
    w.delta = fgqa_arena_take(arena, (size_t)p->hq * (size_t)p->total_q, sizeof(real));
    if (splits > 1) {
        const size_t rows = (size_t)splits * (size_t)p->hk * (size_t)p->total_k;
        w.dk = fgqa_arena_take(arena, rows * (size_t)shape->ldk, sizeof(real));
        w.dv = fgqa_arena_take(arena, rows * (size_t)shape->ldv, sizeof(real));
    }
    if (dbias.way == DBIAS_ADDED && !dbias.in_place) {
        w.dbias = fgqa_arena_take(arena, (size_t)dbias.parts * (size_t)p->hq * (size_t)p->sq * (size_t)p->sk, sizeof(real));
    }
    return w;
}

/* ---- main job: dq, and dk, dv of each split ---- */

/* dQ = scale * dQ^T of a panel; of few rows: scale * dQ. */
static void store_dq(const bwd_scratch *s, const bwd_shape *shape, const tile_sequence *t, const bwd_panel *bp, const real *dq_t)
{
    const fgqa_view *dq = &t->p->view[FGQA_ARG_dq];
    const tile_panel *const panel = &bp->panel;
    const real scale = (real)t->p->scale;
    if (bp->few) {
        row_copy(s->dq, dq_t, panel->rows * shape->ldk);
    } else {
        tile_transpose_panel(s->dq, shape->ldk, dq_t, panel->w, t->p->d);
    }
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        real *const row = s->dq + (ptrdiff_t)lane * shape->ldk;
        for (int32_t c = 0; c < t->p->d; c++) { row[c] *= scale; }
        row_store(tile_packed_row(t, dq, panel->r0 + lane), dq->dtype, dq->stride_d, row, t->p->d);
    }
}

/* dk = |scale| * sum of splits (q carried the sign), dv = sum of splits, for keys [j0, j1) of sequence t; 0 for padding. */
static void store_dk_dv(const tile_sequence *t, const bwd_shape *shape, int32_t splits, const real *dk, const real *dv,
                        int64_t split_keys, int32_t j0, int32_t j1, real *restrict row)
{
    const fgqa_problem *p = t->p;
    for (int n = 0; n < 2; n++) {
        const fgqa_view *const to = &p->view[n ? FGQA_ARG_dv : FGQA_ARG_dk];
        const int32_t ld = n ? shape->ldv : shape->ldk, cols = n ? p->dv : p->d;
        const real factor = n ? 1 : (real)fabs(p->scale);
        for (int32_t j = j0; j < j1; j++) {
            const real *const from = (n ? dv : dk) + (ptrdiff_t)j * ld;
            const int32_t seen_splits = j < t->seq.mask.sk ? splits : 0;
            if (seen_splits == 1) {
                for (int32_t c = 0; c < cols; c++) { row[c] = (0 + from[c]) * factor; }    /* 0 +: as with several */
            } else {
                memset(row, 0, (size_t)cols * sizeof(real));
                for (int32_t split = 0; split < seen_splits; split++) {
                    for (int32_t c = 0; c < cols; c++) { row[c] += from[split * split_keys * ld + c]; }
                }
                for (int32_t c = 0; c < cols; c++) { row[c] *= factor; }
            }
            row_store(view_at(to, t->b, t->kv_head, t->seq.k_row + j), to->dtype, to->stride_d, row, cols);
        }
    }
}

/* dq of padded query rows. */
static void zero_padded_dq(const tile_sequence *t, real *row)
{
    const fgqa_problem *p = t->p;
    const fgqa_view *const dq = &p->view[FGQA_ARG_dq];
    memset(row, 0, (size_t)p->d * sizeof(real));
    for (int64_t r = t->rows; r < (int64_t)result_rows(p, &t->seq) * p->g; r++) {
        row_store(tile_packed_row(t, dq, r), dq->dtype, dq->stride_d, row, p->d);
    }
}

/* dbias of packed rows [r0, r1), before what rows see is stored. */
static void zero_dbias(const tile_sequence *t, int64_t r0, int64_t r1)
{
    const fgqa_view *const dbias = &t->p->view[FGQA_ARG_dbias];
    static const real zero[KEYS];
    for (int64_t r = r0; r < r1; r++) {
        for (int32_t j = 0; j < t->p->sk; j += KEYS) {
            row_store(dbias_at(t, r, j), dbias->dtype, dbias->stride_d, zero, t->p->sk - j < KEYS ? t->p->sk - j : KEYS);
        }
    }
}

/* One split of sequence b and a KV head. `p` is the job's problem, whose dbias may lie elsewhere. */
static void split_head(const bwd_job *job, const fgqa_problem *p, int32_t split, int32_t b, int32_t kv_head, int clear_dbias, const fgqa_worker *worker)
{
    const bwd_shape *const shape = &job->shape;
    const tile_sequence t = tile_sequence_init(p, b, kv_head);
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    const bwd_scratch s = scratch_carve(&arena, p, shape, job->splits);

    const int64_t split_keys = (int64_t)p->hk * p->total_k;
    const int64_t key = split * split_keys + kv_head * p->total_k + first_key(p, &t.seq, b);
    real *const dk = job->splits == 1 ? s.dk : job->workspace.dk + key * shape->ldk;
    real *const dv = job->splits == 1 ? s.dv : job->workspace.dv + key * shape->ldv;
    memset(dk, 0, (size_t)t.seq.mask.sk * (size_t)shape->ldk * sizeof(real));
    memset(dv, 0, (size_t)t.seq.mask.sk * (size_t)shape->ldv * sizeof(real));

    const int64_t block_rows = (int64_t)shape->panels * PANEL, rows = clear_dbias ? (int64_t)p->sq * p->g : t.rows;   /* dbias has padding, too */
    for (int64_t n = 0; n < blocks_of(shape, rows); n++) {
        /* Dealt back and forth, 0 1 2 2 1 0 0 1 ...: the splits of a causal sequence get equal work. */
        const int64_t turn = n / job->splits, seat = n % job->splits;
        if ((turn % 2 ? job->splits - 1 - seat : seat) != split) { continue; }
        const int64_t r0 = n * block_rows, r1 = r0 + block_rows < t.rows ? r0 + block_rows : t.rows;
        if (clear_dbias) { zero_dbias(&t, r0, r0 + block_rows < rows ? r0 + block_rows : rows); }
        if (r0 >= t.rows) { continue; }
        bad_rows bad;
        const int32_t panels = block_load(job, &s, &t, r0, r1, &bad);
        memset(s.dq_t, 0, (size_t)panels * PANEL * (size_t)shape->ldk * sizeof(real));
        const fgqa_range keys = fgqa_kv_range(&t.seq.mask, s.panels[0].panel.i0, s.panels[panels - 1].panel.i1);
        for (int32_t j0 = keys.begin / KEYS * KEYS; j0 < keys.end; j0 += KEYS) {
            if (fgqa_poll(worker)) { return; }
            block_keys(job, &s, &t, panels, j0, j0 + KEYS < t.seq.mask.sk ? j0 + KEYS : t.seq.mask.sk, &bad, dk, dv);
        }
        for (int32_t panel = 0; panel < panels; panel++) {
            store_dq(&s, shape, &t, &s.panels[panel], s.dq_t + (ptrdiff_t)panel * PANEL * shape->ldk);
        }
    }
    if (split == 0) { zero_padded_dq(&t, s.row); }
    if (job->splits == 1) { store_dk_dv(&t, shape, 1, dk, dv, 0, 0, result_keys(p, &t.seq), s.row); }
}

/* Where a part of the batch is added up. */
static fgqa_view dbias_part(const bwd_job *job, int32_t part)
{
    const int64_t row = job->p->sk, head = row * job->p->sq;
    const fgqa_view view = {job->workspace.dbias + part * job->p->hq * head, FGQA_REAL_F64 ? FGQA_F64 : FGQA_F32, 0, head, row, 1};
    return view;
}

static void split_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const bwd_job *const job = context;
    const dbias_plan *const dbias = &job->dbias;
    const int32_t kv_head = (int32_t)(task % job->p->hk), part = (int32_t)(task / job->p->hk % dbias->parts);
    const int32_t split = (int32_t)(task / job->p->hk / dbias->parts), first = first_of_part(part, dbias->parts, job->p->b);
    fgqa_problem p = *job->p;
    if (dbias->way == DBIAS_ADDED && !dbias->in_place) { p.view[FGQA_ARG_dbias] = dbias_part(job, part); }
    for (int32_t b = first; b < first_of_part(part + 1, dbias->parts, p.b); b++) {
        const int clear_dbias = dbias->way == DBIAS_STORED || (dbias->way == DBIAS_ADDED && b == first);
        split_head(job, &p, split, b, kv_head, clear_dbias, worker);
    }
}

/* ---- finishing job: the sum over splits ---- */

static void finish_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const bwd_job *const job = context;
    const fgqa_problem *const p = job->p;
    const int64_t chunks = (p->sk + FINISH_KEYS - 1) / FINISH_KEYS;
    const int32_t b = (int32_t)(task / chunks / p->hk), kv_head = (int32_t)(task / chunks % p->hk);
    const tile_sequence t = tile_sequence_init(p, b, kv_head);
    const int32_t j0 = (int32_t)(task % chunks) * FINISH_KEYS, keys = result_keys(p, &t.seq);
    const int32_t j1 = j0 + FINISH_KEYS < keys ? j0 + FINISH_KEYS : keys;
    const int64_t key = kv_head * p->total_k + first_key(p, &t.seq, b);
    store_dk_dv(&t, &job->shape, job->splits, job->workspace.dk + key * job->shape.ldk, job->workspace.dv + key * job->shape.ldv,
                (int64_t)p->hk * p->total_k, j0, j1, worker->scratch);
}

/* dsink[h] = -sum over batch and rows of exp(sink - lse) * delta; in double, rows in order. */
static void sink_task(void *context, int64_t h, const fgqa_worker *worker)
{
    const bwd_job *const job = context;
    const fgqa_problem *const p = job->p;
    const fgqa_view *const dsink = &p->view[FGQA_ARG_dsink], *const lse = &p->view[FGQA_ARG_lse];
    double sum = 0;
    for (int32_t b = 0; b < p->b && !fgqa_poll(worker); b++) {
        const tile_sequence t = tile_sequence_init(p, b, fgqa_kv_head((int32_t)h, p->g));
        const real sink = tile_head_value(&t, FGQA_ARG_sink, h % p->g);
        for (int32_t i = 0; i < t.seq.mask.sq; i++) {
            const int64_t r = (int64_t)i * p->g + h % p->g;
            const real x = tile_lse_load(&t, lse, r);
            if (x != -REAL_INF) { sum -= exp(FGQA_SINK_EXPONENT((double)sink, (double)x)) * (double)*delta_at(job, &t, r); }
        }
    }
    const real result = (real)sum;
    row_store(view_at(dsink, 0, h, 0), dsink->dtype, 1, &result, 1);
}

/* ---- dbias job: the sum over parts ----
 * Task = (batch, head, SUM_ROWS rows) of dbias. */

#define SUM_ROWS 16

static int64_t bias_sum_tasks(const fgqa_problem *p) { return (int64_t)p->bias_shape[0] * p->bias_shape[1] * ((p->sq + SUM_ROWS - 1) / SUM_ROWS); }

static void bias_sum_row(const bwd_job *job, int32_t own_b, int32_t own_h, int32_t i)
{
    const fgqa_problem *const p = job->p;
    const fgqa_view *const dbias = &p->view[FGQA_ARG_dbias];
    const int all_b = p->bias_shape[0] == 1, all_h = p->bias_shape[1] == 1;
    char *const to = view_at(dbias, own_b, own_h, i);
    real sum[KEYS];
    for (int32_t j = 0; j < p->sk; j += KEYS) {
        const int32_t n = p->sk - j < KEYS ? p->sk - j : KEYS;
        memset(sum, 0, sizeof sum);
        for (int32_t part = all_b ? 0 : own_b; part < (all_b ? job->dbias.parts : own_b + 1); part++) {
            const fgqa_view from = dbias_part(job, part);
            for (int32_t h = all_h ? 0 : own_h; h < (all_h ? p->hq : own_h + 1); h++) {
                const real *const row = (const real *)view_at(&from, 0, h, i) + j;
                for (int32_t c = 0; c < n; c++) { sum[c] += row[c]; }
            }
        }
        row_store(to + j * dbias->stride_d * (int64_t)fgqa_dtype_bytes(dbias->dtype), dbias->dtype, dbias->stride_d, sum, n);
    }
}

static void bias_sum_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const bwd_job *const job = context;
    const fgqa_problem *const p = job->p;
    const int64_t steps = (p->sq + SUM_ROWS - 1) / SUM_ROWS, head = task / steps;
    const int32_t i0 = (int32_t)(task % steps) * SUM_ROWS, i1 = i0 + SUM_ROWS < p->sq ? i0 + SUM_ROWS : p->sq;
    for (int32_t i = i0; i < i1 && !fgqa_poll(worker); i++) {
        bias_sum_row(job, (int32_t)(head / p->bias_shape[1]), (int32_t)(head % p->bias_shape[1]), i);
    }
}

/* ---- dbias job: dS once more ----
 * Task = (batch, head, PANEL rows, KEYS keys) of dbias, each only where bias has that axis; it walks what bias is
 * broadcast over in order. Here every query head is a group of its own, so that lanes are rows of one head. */

typedef struct {
    bwd_panel *panel;
    bwd_tiles tiles;
    real *q, *dout, *ds, *sum;                 /* ds, sum: KEYS x PANEL */
    real *k_copy, *v_copy, *row;
    real *k_low, *q_low;                       /* KEYS x ldk, [d][w]; only where numbers are two parts (amx_bwd.h) */
} bias_scratch;

static bias_scratch bias_scratch_carve(fgqa_arena *arena, const fgqa_problem *p, const bwd_shape *shape)
{
    bias_scratch s;
    s.panel = fgqa_arena_take(arena, 1, sizeof(bwd_panel));
    bwd_panel_carve(s.panel, arena, p);
    s.tiles = bwd_tiles_carve(arena, p);
    s.q = fgqa_arena_take(arena, (size_t)PANEL * (size_t)shape->ldq, sizeof(real));
    s.dout = fgqa_arena_take(arena, (size_t)PANEL * (size_t)shape->ldo, sizeof(real));
    s.ds = fgqa_arena_take(arena, KEYS * PANEL, sizeof(real));
    s.sum = fgqa_arena_take(arena, KEYS * PANEL, sizeof(real));
    s.k_copy = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldk, sizeof(real));
    s.v_copy = fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldv, sizeof(real));
    s.row = fgqa_arena_take(arena, KEYS, sizeof(real));
    const int in_parts = FGQA_TILES && p->dtype == FGQA_F32;
    s.k_low = in_parts ? fgqa_arena_take(arena, (size_t)KEYS * (size_t)shape->ldk, sizeof(real)) : NULL;
    s.q_low = in_parts ? fgqa_arena_take(arena, (size_t)PANEL * (size_t)shape->ldk, sizeof(real)) : NULL;
    return s;
}

/* Which part of an axis of dbias a task owns: all of it where bias is broadcast over it. */
typedef struct { int32_t parts, size, broadcast; } bias_axis;

static bias_axis bias_axis_of(int32_t extent, int32_t full, int32_t size)
{
    const bias_axis axis = {extent == 1 ? 1 : (full + size - 1) / size, extent == 1 ? full : size, extent == 1};
    return axis;
}

static fgqa_range bias_part(const bias_axis *axis, int64_t part, int32_t full)
{
    const int64_t begin = part * axis->size, end = begin + axis->size;
    const fgqa_range r = {(int32_t)begin, end < full ? (int32_t)end : full};
    return r;
}

static int64_t bias_tasks(const fgqa_problem *p)
{
    const bias_axis rows = bias_axis_of(p->bias_shape[2], p->sq, PANEL), keys = bias_axis_of(p->bias_shape[3], p->sk, KEYS);
    return (int64_t)p->bias_shape[0] * p->bias_shape[1] * rows.parts * keys.parts;
}

/* Adds dS of one head, rows [r.begin, r.end), keys of `own_keys`, into sum[key][lane]. */
static void bias_add_head(const bwd_job *job, const bias_scratch *s, const tile_sequence *head, const tile_sequence *kv,
                          fgqa_range rows, fgqa_range own_keys, int one_key, const fgqa_worker *worker)
{
    const fgqa_problem *p = job->p;
    bwd_panel *const bp = s->panel;
    const bwd_rows to = {s->q, s->dout, job->shape.ldq, job->shape.ldo};
    const stats_scratch stats = {s->tiles.s, s->tiles.add, s->tiles.rows, s->k_copy};
    for (int32_t r0 = rows.begin; r0 < rows.end && r0 < head->rows; r0 += PANEL) {
        if (fgqa_poll(worker)) { return; }
        const int64_t r1 = rows.end < head->rows ? rows.end : head->rows;
        bwd_panel_load(bp, head, kv, r0, r1, &to, &stats, 0);
        bwd_tiles tiles = s->tiles;
#if FGQA_PAIRS
        if (s->k_low && !bp->exact) {
            tiles.k_low = s->k_low;
            tiles.q_low = s->q_low;
            tiles.ld_low = job->shape.ldk;
            amx_join(bp->q_t, s->q_low, bp->q_t, p->d * bp->panel.w, -1);
        }
#endif
        for (int32_t lane = 0; lane < bp->panel.rows; lane++) { bp->delta[lane] = *delta_at(job, head, r0 + lane); }
        const fgqa_range seen = panel_keys(&bp->panel, own_keys.begin, own_keys.end);
        for (int32_t block = seen.begin / KEYS * KEYS; block < seen.end; block += KEYS) {
            const fgqa_range j = panel_keys(&bp->panel, block > seen.begin ? block : seen.begin, block + KEYS < seen.end ? block + KEYS : seen.end);
            tile_block k = tile_block_load(kv, &p->view[FGQA_ARG_k], j.begin, j.end, p->d, s->k_copy);
#if FGQA_PAIRS
            if (tiles.k_low) { k = amx_join_rows(&k, s->k_copy, s->k_low, j.end - j.begin, p->d); }
#endif
            const tile_block v = tile_block_load(kv, &p->view[FGQA_ARG_v], j.begin, j.end, p->dv, s->v_copy);
            const tile_kind kind = bwd_tile(&tiles, head, bp, j.begin, j.end, &k, &v, 1, NULL, s->ds, PANEL);
            for (int32_t key = j.begin; kind != TILE_UNSEEN && key < j.end; key++) {
                real *const sum = s->sum + (ptrdiff_t)(one_key ? 0 : key - own_keys.begin) * PANEL;
                const real *const from = s->ds + (ptrdiff_t)(key - j.begin) * PANEL;
                for (int32_t v_lane = 0; v_lane < bp->panel.w; v_lane += VL) { v_store(sum + v_lane, v_load(sum + v_lane) + v_load(from + v_lane)); }
            }
        }
    }
}

static void bias_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const bwd_job *const job = context;
    const fgqa_problem *const p = job->p;
    const fgqa_view *const dbias = &p->view[FGQA_ARG_dbias];
    const bias_axis row_axis = bias_axis_of(p->bias_shape[2], p->sq, PANEL), key_axis = bias_axis_of(p->bias_shape[3], p->sk, KEYS);
    const fgqa_range rows = bias_part(&row_axis, task / key_axis.parts % row_axis.parts, p->sq);
    const fgqa_range keys = bias_part(&key_axis, task % key_axis.parts, p->sk);
    const int64_t head = task / key_axis.parts / row_axis.parts;
    const int32_t own_h = (int32_t)(head % p->bias_shape[1]), own_b = (int32_t)(head / p->bias_shape[1]);
    const int all_b = p->bias_shape[0] == 1, all_h = p->bias_shape[1] == 1;
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    const bias_scratch s = bias_scratch_carve(&arena, p, &job->shape);
    fgqa_problem by_head = *p;
    by_head.g = 1;
    by_head.hk = p->hq;

    memset(s.sum, 0, KEYS * PANEL * sizeof(real));
    for (int32_t b = all_b ? 0 : own_b; b < (all_b ? p->b : own_b + 1); b++) {
        for (int32_t h = all_h ? 0 : own_h; h < (all_h ? p->hq : own_h + 1); h++) {
            const tile_sequence head_sequence = tile_sequence_init(&by_head, b, h);
            const tile_sequence kv_sequence = tile_sequence_init(p, b, fgqa_kv_head(h, p->g));
            bias_add_head(job, &s, &head_sequence, &kv_sequence, rows, keys, key_axis.broadcast, worker);
        }
    }
    const int32_t n_rows = row_axis.broadcast ? 1 : rows.end - rows.begin, n_keys = key_axis.broadcast ? 1 : keys.end - keys.begin;
    for (int32_t i = 0; i < n_rows; i++) {
        for (int32_t j = 0; j < n_keys; j++) {
            const real *const from = s.sum + (ptrdiff_t)j * PANEL;
            s.row[j] = from[i];
            for (int32_t lane = 1; row_axis.broadcast && lane < PANEL; lane++) { s.row[j] += from[lane]; }
        }
        char *const to = view_at(dbias, own_b, own_h, row_axis.broadcast ? 0 : rows.begin + i);
        const int64_t first = key_axis.broadcast ? 0 : keys.begin * dbias->stride_d;
        row_store(to + first * (int64_t)fgqa_dtype_bytes(dbias->dtype), dbias->dtype, dbias->stride_d, s.row, n_keys);
    }
}

/* ---- the kernel ---- */

static size_t scratch_bytes_of(const fgqa_problem *p, const bwd_shape *shape, int32_t splits)
{
    fgqa_arena arena = fgqa_arena_begin(NULL), bias = fgqa_arena_begin(NULL);
    scratch_carve(&arena, p, shape, splits);
    bias_scratch_carve(&bias, p, shape);
    return arena.used > bias.used ? arena.used : bias.used;
}

void FGQA_ROW(bwd, tile)(const fgqa_problem *p, fgqa_plan *plan);
fgqa_status FGQA_ROW(bwd, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec);

void FGQA_ROW(bwd, tile)(const fgqa_problem *p, fgqa_plan *plan)
{
    const bwd_shape shape = shape_of(p);
    fgqa_arena workspace = fgqa_arena_begin(NULL);
    plan->block_q = shape.panels * PANEL;
    plan->block_k = KEYS;
    plan->splits = splits_of(p, &shape);
    plan->tasks = (int64_t)plan->splits * dbias_plan_of(p, plan->splits).parts * p->hk;
    plan->threads = tile_threads(plan, 0);
    plan->scratch_bytes = scratch_bytes_of(p, &shape, plan->splits);
    workspace_carve(&workspace, p, &shape, plan->splits);
    plan->workspace_bytes = workspace.used;
}

#if FGQA_TILES
static void split_on_tiles(void *context, int64_t task, const fgqa_worker *worker)
{
    amx_begin();
    split_task(context, task, worker);
    amx_release();
}
#else
#define split_on_tiles split_task
#endif

fgqa_status FGQA_ROW(bwd, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    bwd_job job = {.p = p, .shape = shape_of(p), .splits = plan->splits};
    fgqa_arena arena = fgqa_arena_begin(workspace);
    job.workspace = workspace_carve(&arena, p, &job.shape, job.splits);
    job.dbias = dbias_plan_of(p, job.splits);
    FGQA_TRY(fgqa_parallel(split_on_tiles, &job, plan->tasks, plan->threads, plan->scratch_bytes, exec));
    if (job.splits > 1) {
        const int64_t chunks = (p->sk + FINISH_KEYS - 1) / FINISH_KEYS;
        FGQA_TRY(fgqa_parallel(finish_task, &job, chunks * p->b * p->hk, plan->threads, plan->scratch_bytes, exec));
    }
    if (p->want_dsink) { FGQA_TRY(fgqa_parallel(sink_task, &job, p->hq, plan->threads, 0, exec)); }
    if (job.workspace.dbias) { FGQA_TRY(fgqa_parallel(bias_sum_task, &job, bias_sum_tasks(p), plan->threads, 0, exec)); }
    if (job.dbias.way == DBIAS_AGAIN) { FGQA_TRY(fgqa_parallel(bias_task, &job, bias_tasks(p), plan->threads, plan->scratch_bytes, exec)); }
    return FGQA_OK;
}
