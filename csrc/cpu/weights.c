/* weights.c - attention weights without the score matrix. Compiled once per row of isa.def and precision.
 *
 *     rows     weights [b, hq, rows, sk] of chosen query rows: scores go straight into the result, each row of which then
 *              becomes its own softmax in place
 *     keysum   weights summed over the query rows, [b, hq, sk]: one job leaves every row's maximum and sum in the workspace;
 *              then each task of a second one owns a block of keys of one head and adds its weights over the rows in order
 *
 * A sink counts in the denominator; dropout does not exist here. Rows behind the end of their sequence have weights 0.
 */
#include "../core/workspace.h"
#include "row_stats.h"
#include "threads.h"

/* ---- memory ---- */

typedef struct {
    tile_panel *panel;
    real *q, *q_t, *k_copy;                    /* [PANEL][ld], [d][PANEL], KEYS rows */
    real *s, *add, *rows;                      /* tiles; VL x KEYS */
    real *by_lane;                             /* rows: scores as [lane][KEYS]; keysum: sums as [key][PANEL] */
    row_stats *stats;
} weights_scratch;

static weights_scratch carve(fgqa_arena *arena, const fgqa_problem *p)
{
    const int has_add = p->view[FGQA_ARG_mask].data != NULL || p->view[FGQA_ARG_bias].data != NULL;
    const size_t ld = (size_t)ROUND_UP(p->d, VL);
    weights_scratch s;
    s.panel = fgqa_arena_take(arena, 1, sizeof(tile_panel));
    s.q = fgqa_arena_take(arena, PANEL * ld, sizeof(real));
    s.q_t = fgqa_arena_take(arena, PANEL * ld, sizeof(real));
    s.k_copy = fgqa_arena_take(arena, KEYS * ld, sizeof(real));
    s.s = fgqa_arena_take(arena, KEYS * PANEL, sizeof(real));
    s.add = fgqa_arena_take(arena, has_add ? KEYS * PANEL : 0, sizeof(real));
    s.rows = fgqa_arena_take(arena, has_add ? VL * KEYS : 0, sizeof(real));
    s.by_lane = fgqa_arena_take(arena, KEYS * PANEL, sizeof(real));
    s.stats = fgqa_arena_take(arena, 1, sizeof(row_stats));
    return s;
}

static size_t scratch_bytes_of(const fgqa_problem *p)
{
    fgqa_arena arena = fgqa_arena_begin(NULL);
    carve(&arena, p);
    return arena.used;
}

static void load_panel(const weights_scratch *s, const tile_sequence *t, int64_t r0, int64_t r1)
{
    const int32_t ld = ROUND_UP(t->p->d, VL);
    tile_panel_init(s->panel, t, r0, r1);
    tile_pack_rows(s->q, ld, t, s->panel, &t->p->view[FGQA_ARG_q], t->p->d, t->q_sign);
    tile_transpose_rows(s->q_t, s->q, ld, s->panel->w, t->p->d);
}

/* ---- rows ---- */

/* Query rows of one task: as many as fill a panel with all heads of the group. */
static int32_t chunk_rows(const fgqa_problem *p) { return p->g < PANEL ? PANEL / p->g : 1; }

static int64_t row_tasks(const fgqa_problem *p)
{
    return (int64_t)p->b * p->hk * ((p->n_rows + chunk_rows(p) - 1) / chunk_rows(p));
}

typedef struct { const fgqa_problem *p; } rows_job;

static real *weights_row(const tile_sequence *t, int32_t h, int64_t n)
{
    return view_at(&t->p->view[FGQA_ARG_weights], t->b, h, n);
}

SIMD vreal load_some(const real *x, int32_t n, real fill)
{
    real some[VL];
    for (int32_t i = 0; i < VL; i++) { some[i] = i < n ? x[i] : fill; }
    return v_load(some);
}

/* x[0..n): base 2 scores, -inf where not seen, to weights. */
static void softmax_row(real *x, int32_t n, const real *sink)
{
    vreal tops = v_set1(-REAL_INF), sums = v_zero();
    for (int32_t j = 0; j < n; j += VL) { tops = v_max(j + VL <= n ? v_load(x + j) : load_some(x + j, n - j, -REAL_INF), tops); }
    real top = -REAL_INF;
    for (int32_t i = 0; i < VL; i++) { top = tops[i] > top ? tops[i] : top; }
    if (sink && *sink > top) { top = *sink; }
    const real shift = top == -REAL_INF ? 0 : top;
    for (int32_t j = 0; j < n; j += VL) { sums += v_exp2((j + VL <= n ? v_load(x + j) : load_some(x + j, n - j, -REAL_INF)) - v_set1(shift)); }
    double sum = sink ? exp2(FGQA_SINK_EXPONENT((double)*sink, (double)shift)) : 0;
    for (int32_t i = 0; i < VL; i++) { sum += (double)sums[i]; }
    const real factor = sum == 0 ? 0 : (real)(1 / sum);
    for (int32_t j = 0; j < n; j += VL) {
        const vreal s = j + VL <= n ? v_load(x + j) : load_some(x + j, n - j, -REAL_INF);
        const vreal p = v_select(m_eq(s, v_set1(-REAL_INF)), v_zero(), v_exp2(s - v_set1(shift)) * v_set1(factor));
        if (j + VL <= n) {
            v_store(x + j, p);
        } else {
            for (int32_t i = 0; i < n - j; i++) { x[j + i] = p[i]; }
        }
    }
}

/* Chosen rows [n, n + count), which follow one another in the sequence: packed rows [r0, r1) of one panel. */
static void write_scores(const weights_scratch *s, const tile_sequence *t, int64_t r0, int64_t r1, int32_t n)
{
    const fgqa_problem *p = t->p;
    load_panel(s, t, r0, r1);
    const fgqa_range keys = s->panel->keys;
    for (int32_t j0 = keys.begin / KEYS * KEYS; j0 < keys.end; j0 += KEYS) {
        const int32_t begin = j0 > keys.begin ? j0 : keys.begin, end = j0 + KEYS < keys.end ? j0 + KEYS : keys.end;
        const tile_block k = tile_block_load(t, &p->view[FGQA_ARG_k], begin, end, p->d, s->k_copy);
        const real *add;
        real scale;
        if (tile_scores(s->s, t, s->panel, begin, end, &k, s->q_t, s->add, s->rows, NULL, &add, &scale) == TILE_UNSEEN) { continue; }
        tile_transpose_panel(s->by_lane, KEYS, s->s, s->panel->w, end - begin);
        for (int32_t lane = 0; lane < s->panel->rows; lane++) {
            const int64_t r = r0 + lane;
            const int32_t h = fgqa_packed_row_head(r, t->kv_head, p->g), i = fgqa_packed_row_q(r, p->g);
            real *const to = weights_row(t, h, n + i - fgqa_packed_row_q(r0, p->g)) + begin;
            for (int32_t j = 0; j < end - begin; j++) { to[j] = s->by_lane[(ptrdiff_t)lane * KEYS + j] * scale; }
        }
    }
}

static void rows_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const fgqa_problem *const p = ((const rows_job *)context)->p;
    const int64_t chunks = (p->n_rows + chunk_rows(p) - 1) / chunk_rows(p);
    const tile_sequence t = tile_sequence_init(p, (int32_t)(task / chunks / p->hk), (int32_t)(task / chunks % p->hk));
    const int32_t n0 = (int32_t)(task % chunks) * chunk_rows(p), n1 = p->n_rows - n0 < chunk_rows(p) ? p->n_rows : n0 + chunk_rows(p);
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    const weights_scratch s = carve(&arena, p);
    for (int32_t n = n0; n < n1; n++) {
        for (int32_t h = t.kv_head * p->g; h < (t.kv_head + 1) * p->g; h++) {
            real *const row = weights_row(&t, h, n);
            for (int32_t j = 0; j < p->sk; j++) { row[j] = -REAL_INF; }
        }
    }
    for (int32_t n = n0, count; n < n1 && !fgqa_poll(worker); n += count) {
        for (count = 1; n + count < n1 && p->rows[n + count] == p->rows[n] + count; count++) {}
        const int64_t r0 = p->rows[n] * p->g, end = (p->rows[n] + count) * p->g, r1 = end < t.rows ? end : t.rows;
        for (int64_t r = r0; r < r1; r += PANEL) { write_scores(&s, &t, r, r1, n + (int32_t)((r - r0) / p->g)); }
    }
    for (int32_t n = n0; n < n1; n++) {
        for (int32_t h = t.kv_head * p->g; h < (t.kv_head + 1) * p->g; h++) {
            const real sink = p->view[FGQA_ARG_sink].data ? tile_head_value(&t, FGQA_ARG_sink, h % p->g) * (real)FGQA_LOG2E : 0;
            softmax_row(weights_row(&t, h, n), p->sk, p->view[FGQA_ARG_sink].data ? &sink : NULL);
        }
    }
}

void FGQA_ROW(rows, tile)(const fgqa_problem *p, fgqa_plan *plan);
fgqa_status FGQA_ROW(rows, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec);

void FGQA_ROW(rows, tile)(const fgqa_problem *p, fgqa_plan *plan)
{
    plan->block_q = chunk_rows(p) * p->g;
    plan->block_k = KEYS;
    plan->tasks = row_tasks(p);
    plan->threads = tile_threads(plan, 0);
    plan->scratch_bytes = scratch_bytes_of(p);
}

fgqa_status FGQA_ROW(rows, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    (void)workspace;
    rows_job job = {p};
    return fgqa_parallel(rows_task, &job, plan->tasks, plan->threads, plan->scratch_bytes, exec);
}

/* ---- keysum ---- */

typedef struct {
    const fgqa_problem *p;
    fgqa_problem by_head;                      /* every query head is a group of its own: lanes are rows of one head */
    real *top, *log_sum;                       /* [hq][total_q], see row_stats.h */
} keysum_job;

static size_t keysum_carve(keysum_job *job, const fgqa_problem *p, void *memory)
{
    fgqa_arena arena = fgqa_arena_begin(memory);
    const size_t rows = (size_t)p->hq * (size_t)p->total_q;
    job->top = fgqa_arena_take(&arena, rows, sizeof(real));
    job->log_sum = fgqa_arena_take(&arena, rows, sizeof(real));
    return arena.used;
}

static int64_t stats_row(const tile_sequence *t, int64_t r)
{
    const fgqa_problem *p = t->p;
    const int64_t first = p->varlen ? t->seq.q_row : (int64_t)t->b * p->sq;
    return fgqa_packed_row_head(r, t->kv_head, p->g) * p->total_q + first + fgqa_packed_row_q(r, p->g);
}

static int64_t stats_panels(const fgqa_problem *p) { return ((int64_t)p->sq * p->g + PANEL - 1) / PANEL; }

/* One panel of a KV head: a few hundred microseconds at 10,000 keys. */
static void stats_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const keysum_job *const job = context;
    const fgqa_problem *const p = job->p;
    const int64_t panels = stats_panels(p), r0 = task % panels * PANEL;
    const tile_sequence t = tile_sequence_init(p, (int32_t)(task / panels / p->hk), (int32_t)(task / panels % p->hk));
    if (r0 >= t.rows || fgqa_poll(worker)) { return; }
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    const weights_scratch s = carve(&arena, p);
    const stats_scratch scratch = {s.s, s.add, s.rows, s.k_copy};
    load_panel(&s, &t, r0, t.rows);
    row_stats_of(s.stats, &t, &t, s.panel, s.q_t, &scratch);
    for (int32_t lane = 0; lane < s.panel->rows; lane++) {
        job->top[stats_row(&t, r0 + lane)] = s.stats->top[lane];
        job->log_sum[stats_row(&t, r0 + lane)] = s.stats->log_sum[lane];
    }
}

/* Adds the weights of keys [keys.begin, keys.end) of the rows from r0 on into by_lane[key][lane]. */
static void add_panel(const keysum_job *job, const weights_scratch *s, const tile_sequence *head, const tile_block *block, int64_t r0,
                      fgqa_range keys)
{
    load_panel(s, head, r0, head->rows);
    const tile_panel *panel = s->panel;
    const int32_t begin = panel->keys.begin > keys.begin ? panel->keys.begin : keys.begin;
    const int32_t end = panel->keys.end < keys.end ? panel->keys.end : keys.end;
    if (begin >= end) { return; }
    for (int32_t lane = 0; lane < panel->w; lane++) {
        s->stats->top[lane] = lane < panel->rows ? job->top[stats_row(head, r0 + lane)] : REAL_INF;
        s->stats->log_sum[lane] = lane < panel->rows ? job->log_sum[stats_row(head, r0 + lane)] : 0;
    }
    const tile_block k = {block->data + (begin - keys.begin) * block->stride, block->stride};
    const real *add;
    real scale;
    if (tile_scores(s->s, head, panel, begin, end, &k, s->q_t, s->add, s->rows, NULL, &add, &scale) == TILE_UNSEEN) { return; }
    for (int32_t j = begin; j < end; j++) {
        for (int32_t v = 0; v < panel->nv; v++) {
            const vreal x = v_load(s->s + (ptrdiff_t)(j - begin) * panel->w + v * VL);
            const vreal over = x * v_set1(scale) - v_load(s->stats->top + v * VL);
            const vreal p = v_select(m_eq(x, v_set1(-REAL_INF)), v_zero(), v_exp2(over - v_load(s->stats->log_sum + v * VL)));
            real *const to = s->by_lane + (ptrdiff_t)(j - keys.begin) * PANEL + v * VL;
            v_store(to, v_load(to) + p);
        }
    }
}

static void keysum_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const keysum_job *const job = context;
    const fgqa_problem *const p = job->p;
    const int64_t blocks = (p->sk + KEYS - 1) / KEYS;
    const int32_t b = (int32_t)(task / blocks / p->hq), h = (int32_t)(task / blocks % p->hq), j0 = (int32_t)(task % blocks) * KEYS;
    const tile_sequence head = tile_sequence_init(&job->by_head, b, h), kv = tile_sequence_init(p, b, fgqa_kv_head(h, p->g));
    const fgqa_mask *const mask = &head.seq.mask;
    const fgqa_range keys = {j0, j0 + KEYS < mask->sk ? j0 + KEYS : mask->sk};
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    const weights_scratch s = carve(&arena, p);
    memset(s.by_lane, 0, KEYS * PANEL * sizeof(real));
    if (keys.begin < keys.end) {
        const tile_block block = tile_block_load(&kv, &p->view[FGQA_ARG_k], keys.begin, keys.end, p->d, s.k_copy);
        const fgqa_range rows = fgqa_q_range(mask, keys.begin, keys.end);
        for (int64_t r = rows.begin / PANEL * PANEL; r < rows.end && !fgqa_poll(worker); r += PANEL) { add_panel(job, &s, &head, &block, r, keys); }
    }
    real *const to = view_at(&p->view[FGQA_ARG_weights], b, h, 0);
    for (int32_t j = j0; j < j0 + KEYS && j < p->sk; j++) {
        real sum = 0;
        for (int32_t lane = 0; lane < PANEL; lane++) { sum += s.by_lane[(ptrdiff_t)(j - j0) * PANEL + lane]; }
        to[j] = sum;
    }
}

void FGQA_ROW(keysum, tile)(const fgqa_problem *p, fgqa_plan *plan);
fgqa_status FGQA_ROW(keysum, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec);

void FGQA_ROW(keysum, tile)(const fgqa_problem *p, fgqa_plan *plan)
{
    keysum_job job;
    plan->block_q = PANEL;
    plan->block_k = KEYS;
    plan->tasks = (int64_t)p->b * p->hq * ((p->sk + KEYS - 1) / KEYS);
    plan->threads = tile_threads(plan, 0);
    plan->scratch_bytes = scratch_bytes_of(p);
    plan->workspace_bytes = keysum_carve(&job, p, NULL);
}

fgqa_status FGQA_ROW(keysum, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    keysum_job job = {.p = p, .by_head = *p};
    job.by_head.g = 1;
    job.by_head.hk = p->hq;
    keysum_carve(&job, p, workspace);
    FGQA_TRY(fgqa_parallel(stats_task, &job, stats_panels(p) * p->b * p->hk, plan->threads, plan->scratch_bytes, exec));
    return fgqa_parallel(keysum_task, &job, plan->tasks, plan->threads, plan->scratch_bytes, exec);
}
