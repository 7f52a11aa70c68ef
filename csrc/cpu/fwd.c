/* fwd.c - attention forward on the CPU:  o = softmax(x) v,  lse = log sum exp(x)  (x: semantics.h)
 *
 * Scores are computed transposed, S^T[key][lane], with the packed rows of a KV head (every query head of its group) as
 * lanes: maximum, sum and rescaling are vertical, and each row of K and V is loaded once for the whole group.
 *
 *     task     one KV head of one sequence, a superblock of packed rows, one part of the key range
 *     memory   Q^T and O^T of the superblock and one block of KEYS keys stay in L2, one tile of weights in L1
 *     loop     key blocks outside, panels inside:  s = K q;  p = 2^(s - m);  o = o*2^(m_old - m) + V^T p
 *
 * A sequence of a handful of rows (decode: one token, the heads of a group), and a handful left over by
 * panels, have tiles of their own (fwd_few.h).
 * Where a sequence has few rows its keys are split into parts; each writes (o, m, l) to the workspace, and a second
 * round of tasks combines them in the order of the parts. The parts follow from the shape of the sequence alone, so the
 * bits depend neither on the number of threads nor on the rest of the batch.
 */
#include "fwd_few.h"
#include "fwd_panel.h"
#include "rotary.h"
#include "threads.h"

/* Superblocks: enough tasks for 16 cores, within half of a 2 MB L2 (Q^T and O^T). */
#define WANTED_TASKS 32
#define SUPERBLOCK_BYTES (768 * 1024)
/* Parts: only for sequences of few packed rows, and never shorter than this many keys. */
#define SPLIT_MAX_ROWS 512
#define SPLIT_MIN_KEYS 512
#if FGQA_PAIRS
/* Tasks of a KV head from which on its keys are packed once for all: a few pack them
 * sooner than they get them from another core. */
static int shared_blocks(const fgqa_problem *p) { return amx_parts(p) == 2 ? 2 : FGQA_TILES ? 5 : 3; }
#endif
/* AMX tiles beat vectors along d from a full group of rows on. */
#define FEW_MOST (FGQA_TILES ? FEW_ROWS - 1 : FEW_ROWS)

/* ---- plan ---- */

typedef struct { int32_t count, begin, keys; } key_parts;   /* part n: keys begin + n*keys .. begin + (n+1)*keys */

static key_parts split_keys(const fgqa_problem *p, const fgqa_mask *mask)
{
    key_parts parts = {1, 0, mask->sk};
    const int64_t rows = (int64_t)mask->sq * p->g;
    if (rows == 0 || rows > SPLIT_MAX_ROWS) { return parts; }
    const fgqa_range range = fgqa_kv_range(mask, 0, mask->sq);
    const int32_t begin = range.begin / KEYS * KEYS, length = range.end - begin;
    const int64_t tasks = p->hk * ((rows + 63) / 64);
    int64_t count = WANTED_TASKS / tasks;
    if (count > length / SPLIT_MIN_KEYS) { count = length / SPLIT_MIN_KEYS; }
    if (count <= 1) { return parts; }
    parts.begin = begin;
    parts.keys = (int32_t)ROUND_UP((length + count - 1) / count, KEYS);
    parts.count = (length + parts.keys - 1) / parts.keys;
    return parts;
}

/* Lanes of the partial results of one part: the rows of the largest sequence that is split. */
static int32_t partial_lanes(const fgqa_problem *p)
{
    const int64_t rows = (int64_t)p->sq * p->g;
    return (int32_t)ROUND_UP(rows < SPLIT_MAX_ROWS ? rows : SPLIT_MAX_ROWS, VL);
}

static size_t partial_reals(const fgqa_problem *p) { return (size_t)partial_lanes(p) * (size_t)(columns(p->dv) + 2); }

void FGQA_ROW(fwd, tile)(const fgqa_problem *p, fgqa_plan *plan);
fgqa_status FGQA_ROW(fwd, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec);

static int64_t superblocks(const fgqa_plan *plan, const fgqa_problem *p)
{
    return ((int64_t)p->sq * p->g + plan->block_q - 1) / plan->block_q;
}

static size_t partial_bytes(const fgqa_plan *plan, const fgqa_problem *p)
{
    const size_t parts = plan->splits > 1 ? (size_t)p->b * (size_t)p->hk * (size_t)plan->splits : 0;
    return ROUND_UP(parts * partial_reals(p) * sizeof(real), FGQA_ALIGNMENT);
}

void FGQA_ROW(fwd, tile)(const fgqa_problem *p, fgqa_plan *plan)
{
    const int64_t rows = (int64_t)p->sq * p->g, heads = (int64_t)p->b * p->hk;
    const int64_t lane_bytes = (int64_t)(columns(p->d) + columns(p->dv)) * (int64_t)sizeof(real);
    int64_t most = SUPERBLOCK_BYTES / lane_bytes / PANEL * PANEL;
    if (most < PANEL) { most = PANEL; }
    int64_t blocks = (rows + most - 1) / most;
    if (heads > 0 && blocks * heads < WANTED_TASKS) {
        const int64_t pairs = (rows + 2 * PANEL - 1) / (2 * PANEL), wanted = (WANTED_TASKS + heads - 1) / heads;
        blocks = pairs < wanted ? pairs : wanted;
    }
    plan->block_q = blocks > 0 ? (int32_t)ROUND_UP((rows + blocks - 1) / blocks, PANEL) : PANEL;
    plan->block_k = KEYS;
    plan->splits = 1;
    for (int32_t b = 0; b < p->b; b++) {
        const fgqa_sequence seq = fgqa_problem_sequence(p, b);
        const int32_t count = split_keys(p, &seq.mask).count;
        if (count > plan->splits) { plan->splits = count; }
    }
    plan->tasks = heads * superblocks(plan, p) * plan->splits;
    fwd_scratch unused;
    plan->scratch_bytes = carve(&unused, p, plan->block_q, NULL);
    plan->workspace_bytes = partial_bytes(plan, p);
#if FGQA_PAIRS
    if (superblocks(plan, p) >= shared_blocks(p)) { plan->workspace_bytes += amx_shared_bytes(p); }
#endif
    plan->threads = tile_threads(plan, (double)heads * p->sk * (p->d + p->dv) * (double)fgqa_dtype_bytes(p->dtype));
}

/* ---- one tile ---- */

SIMD void load_keys(fwd_scratch *scratch, const tile_sequence *t, key_block *block, int32_t panels)
{
    const fgqa_problem *p = t->p;
#if FGQA_PAIRS
    if (!scratch->panel->few && scratch->shared) {
        const int32_t span = amx_span_keys(p);
        block->j0 = block->j0 / span * span;
        block->j1 = t->seq.mask.sk - block->j0 < span ? t->seq.mask.sk : block->j0 + span;
        amx_keys_use(scratch->keys, scratch->shared, t, block->j0, block->j1);
        return;
    }
    if (!scratch->panel->few) {
        for (int32_t j = block->j0, end; j < block->j1; j = end) {
            end = (j / KEYS + 1) * KEYS < block->j1 ? (j / KEYS + 1) * KEYS : block->j1;
            amx_keys_load(&scratch->keys[j % amx_span_keys(p) / KEYS], t, j, end);
        }
        return;
    }
#endif
    /* Pages are read in place where only one panel reads them, and they fill the rows of the micro-kernel. */
    const few_form form = tile_list_form(p);
    const int list = scratch->panel->few ? form != FEW_BLOCK : form == FEW_LIST && panels == 1 && p->cache.page_size >= MR;
    if (list && tile_block_list(scratch->k_list, form, t, &p->view[FGQA_ARG_k], block->j0, block->j1, p->d)
        && tile_block_list(scratch->v_list, form, t, &p->view[FGQA_ARG_v], block->j0, block->j1, p->dv)) {
        block->k_list = scratch->k_list;
        block->v_list = scratch->v_list;
        block->form = form;
    } else {
        block->k = tile_block_load(t, &p->view[FGQA_ARG_k], block->j0, block->j1, p->d, scratch->k);
        block->v = tile_block_load(t, &p->view[FGQA_ARG_v], block->j0, block->j1, p->dv, scratch->v);
    }
    block->stream = panels == 1 && !block->k_list && block->k.data != scratch->k && block->v.data != scratch->v;
}

/* Rows of q as they are packed, [lane][ld], at the positions of the keys on their diagonals. */
static void rotate_rows(real *q, int32_t ld, const tile_sequence *t, const tile_panel *panel)
{
    const fgqa_rotary *rotary = &t->p->cache.rotary;
    rotary_angles angles;
    int32_t loaded = -1;
    if (rotary->pairs == 0 || t->seq.mask.sk == 0) { return; }     /* without keys, positions need not exist */
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        const int32_t i = fgqa_packed_row_q(panel->r0 + lane, t->p->g);
        if (i != loaded) { rotary_load(&angles, rotary, fgqa_rotary_position(&t->p->cache, t->b, t->seq.k_row + t->seq.mask.diag + i)); }
        loaded = i;
        rotary_turn(q + (ptrdiff_t)lane * ld, &angles, rotary);
    }
}

/* Rows of panel n as the second operand of the scores. */
#if FGQA_PAIRS
SIMD bf16 *packed_q(const fwd_scratch *scratch, const tile_sequence *t, int32_t n)
{
    return (bf16 *)(void *)(scratch->q + (size_t)n * PANEL * (size_t)q_columns(t->p->d));
}

SIMD void pack_q(const fwd_scratch *scratch, const tile_sequence *t, int32_t n)
{
    const fgqa_problem *p = t->p;
    const tile_panel *const panel = &scratch->panel[n];
    bf16 *const rows = (bf16 *)(void *)scratch->k;
    const int32_t ld = AMX_PAD(p->d);
    const ptrdiff_t low = amx_low_of(p, PANEL * (ptrdiff_t)ld);
    if (p->cache.rotary.pairs == 0) {
        amx_load_panel(rows, low, t, panel, &p->view[FGQA_ARG_q], p->d, t->q_sign < 0);
    } else {
        const int32_t d = columns(p->d);
        tile_pack_rows(scratch->rows, d, t, panel, &p->view[FGQA_ARG_q], p->d, t->q_sign);
        rotate_rows(scratch->rows, d, t, panel);
        amx_zero_rows(rows, low, PANEL, ld);
        for (int32_t lane = 0; lane < panel->rows; lane++) {
            if (low) {
                amx_row_split(rows + lane * ld, low, scratch->rows + lane * d, p->d);
            } else {
                row_store(rows + lane * ld, FGQA_BF16, 1, scratch->rows + lane * d, p->d);
            }
        }
    }
    amx_pack_panel(packed_q(scratch, t, n), rows, panel, p->d);
    scratch->q_special[n] = 0;
    scratch->o_empty[n] = 1;
    if (low) {
        amx_pack_panel(packed_q(scratch, t, n) + low, rows + low, panel, p->d);
        for (int32_t lane = 0; lane < panel->rows; lane++) { scratch->q_special[n] |= !amx_row_is_finite(rows + lane * ld, ld); }
    }
}
#else
SIMD void pack_q(const fwd_scratch *scratch, const tile_sequence *t, int32_t n)
{
    const fgqa_problem *p = t->p;
    const int32_t d = columns(p->d);
    tile_pack_rows(scratch->rows, d, t, &scratch->panel[n], &p->view[FGQA_ARG_q], p->d, t->q_sign);
    rotate_rows(scratch->rows, d, t, &scratch->panel[n]);
    tile_transpose_rows(scratch->q + (size_t)n * PANEL * (size_t)d, scratch->rows, d, scratch->panel[n].w, p->d);
}
#endif

/* Rows of panel n attend to keys [j0, j1). */
static void attend(fwd_scratch *scratch, const tile_sequence *t, int32_t n, key_block *block, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    tile_panel *panel = &scratch->panel[n];
    const int32_t keys = j1 - j0, w = panel->w, first = j0 - block->j0;
    real *o = scratch->o + (size_t)n * PANEL * (size_t)columns(p->dv), *s = scratch->s;
    const real *q = scratch->q + (size_t)n * PANEL * (size_t)columns(p->d), *add;
    real scale;
    const tile_block k = block_from(&block->k, first);
    panel->k_list = block->k_list ? block->k_list + first : NULL;
    panel->v_list = block->v_list ? block->v_list + first : NULL;
    if (block->stream) {
        const tile_block values = block_from(&block->v, first);
        panel->ahead = values.data;
        panel->ld_ahead = values.stride;
    }
    const tile_kind kind = tile_scores(s, t, panel, j0, j1, &k, q, scratch->add, scratch->rows, NULL, &add, &scale);
    if (kind == TILE_UNSEEN) { return; }
    softmax_tile(panel->nv, s, keys, scale, scratch->m + n * PANEL, scratch->l + n * PANEL, scratch->factor);
    if (p->dropout_threshold) {
        tile_dropout(scratch->keep, t, panel, j0, j1);
        ireal *weight = (ireal *)(void *)s;
        for (int32_t i = 0; i < keys * w; i += VL) { *(vint_any *)(weight + i) &= v_load_int(scratch->keep + i); }
    }
    if (block->v_list) {
        block->v = tile_block_load(t, &p->view[FGQA_ARG_v], block->j0, block->j1, p->dv, scratch->v);
        block->v_list = NULL;
    }
    if (kind == TILE_PARTIAL) { search_values(scratch, t, block); }
    const int dirty = kind == TILE_PARTIAL && block->bad.count;
    const tile_block v = block_from(dirty ? &block->clean : &block->v, first);
    gemm_col_scale(p->dv, panel->nv, keys, v.data, v.stride, s, w, o, w, scratch->factor);
    for (int32_t i = 0; dirty && i < block->bad.count; i++) {
        const int32_t j = block->j0 + block->bad.row[i];
        if (j < j0 || j >= j1) { continue; }
        const real *bad = block->v.data + block->bad.row[i] * block->v.stride, *weight = s + (ptrdiff_t)(j - j0) * w;
        tile_add_bad_row(panel, add ? add + (ptrdiff_t)(j - j0) * w : NULL, j, weight, bad, p->dv, o);
    }
}

/* The keys of a block that panel n sees. */
SIMD fgqa_range panel_block(const fwd_scratch *scratch, int32_t n, const key_block *block)
{
    const fgqa_range keys = scratch->panel[n].keys;
    const fgqa_range range = {keys.begin > block->j0 ? keys.begin : block->j0, keys.end < block->j1 ? keys.end : block->j1};
    return range;
}

#if FGQA_PAIRS
/* Panels attend on tiles. All begin with their plain tiles, one after the other; then those with others, which a mask's edge
 * leaves behind, go on. Where masks or biases are read, the second part alone: whether a tile is plain is not known before. */
static void attend_on_tiles(fwd_scratch *scratch, const tile_sequence *t, int32_t panels, const key_block *block)
{
    const amx_scratch tiles = {scratch->s, scratch->ring, scratch->factor, scratch->add, scratch->rows, scratch->keep};
    const fgqa_problem *const p = t->p;
    const int read = p->view[FGQA_ARG_mask].data || p->view[FGQA_ARG_bias].data;
    amx_line line = {.has_at = 0};
    for (int plain = !read; plain >= 0; plain--) {
        for (int32_t n = 0; n < panels; n++) {
            const fgqa_range range = panel_block(scratch, n, block);
            const int32_t begin = plain || read || range.begin >= range.end ? range.begin : scratch->reached[n];
            if (begin >= range.end) { continue; }
            const amx_rows rows = {&scratch->panel[n], packed_q(scratch, t, n), amx_low_of(p, PANEL * (ptrdiff_t)AMX_PAD(p->d)), scratch->q_special[n],
                                   &scratch->o_empty[n], scratch->o + (size_t)n * PANEL * (size_t)columns(p->dv), scratch->m + n * PANEL, scratch->l + n * PANEL};
            scratch->reached[n] = amx_attend(&line, &tiles, t, &rows, scratch->keys, begin, range.end, block->j1, plain);
        }
        amx_line_step(&line, NULL, &tiles, t);
    }
}
#endif

/* All panels attend to the keys of a block that they see. */
static void attend_all(fwd_scratch *scratch, const tile_sequence *t, int32_t panels, key_block *block)
{
#if FGQA_PAIRS
    if (!scratch->panel->few) {
        attend_on_tiles(scratch, t, panels, block);
        return;
    }
#endif
    for (int32_t n = 0; n < panels; n++) {
        const fgqa_range range = panel_block(scratch, n, block);
        if (range.begin >= range.end) { continue; }
        if (scratch->panel[n].few) {
            attend_few(scratch, t, n, block, range.begin, range.end);
        } else {
            attend(scratch, t, n, block, range.begin, range.end);
        }
    }
}

static void clear_o(const fwd_scratch *scratch, int32_t n, int32_t dv)
{
    const tile_panel *const panel = &scratch->panel[n];
    memset(scratch->o + (size_t)n * PANEL * (size_t)dv, 0, (size_t)((panel->few ? few_lanes(panel->rows) : panel->w) * dv) * sizeof(real));
}

/* ---- tasks ---- */

typedef struct {
    const fgqa_plan *plan;
    const fgqa_problem *p;
    real *partial;
    int64_t first, end;       /* heads of the tasks: KV head n % hk of sequence n / hk */
#if FGQA_PAIRS
    const amx_shared *shared;
#endif
} fwd_job;

/* Where part n of a KV head keeps its results: m[lanes], l[lanes], then o[panel][dv][w]. */
static real *partial_at(const fwd_job *job, int32_t b, int32_t kv_head, int32_t part)
{
    return job->partial + (((size_t)b * (size_t)job->p->hk + (size_t)kv_head) * (size_t)job->plan->splits + (size_t)part) * partial_reals(job->p);
}

typedef struct { int32_t b, kv_head, part; int64_t r0, r1; } fwd_place;

static fwd_place task_place(const fwd_job *job, int64_t task)
{
    const fgqa_problem *p = job->p;
    const int64_t blocks = superblocks(job->plan, p), heads = job->end - job->first;
    fwd_place at;
    int64_t block, head = job->first;
    at.part = (int32_t)(task % job->plan->splits);
    task /= job->plan->splits;
    if (p->right != FGQA_UNBOUNDED) {   /* later rows see more keys: all heads' longest tasks first */
        head += task % heads;
        block = blocks - 1 - task / heads;
    } else {
        head += task / blocks;
        block = task % blocks;
    }
    at.kv_head = (int32_t)(head % p->hk);
    at.b = (int32_t)(head / p->hk);
    at.r0 = block * job->plan->block_q;
    at.r1 = at.r0 + job->plan->block_q;
    if (at.r1 > (int64_t)p->sq * p->g) { at.r1 = (int64_t)p->sq * p->g; }
    return at;
}

/* Whether a panel is computed by fwd_few.h: all rows of a sequence, or the rest of them behind full panels, for which a vector of
 * lanes would do as much as for VL rows. On tiles, and by pairs, a rest has a whole panel's products for less. */
SIMD int is_few(const tile_sequence *t, const tile_panel *panel, const key_parts *parts)
{
    return t->rows <= FEW_MOST || (!FGQA_PAIRS && parts->count == 1 && panel->rows <= FEW_ROWS);
}

static void forward_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const fwd_job *job = context;
    const fgqa_problem *p = job->p;
    const fwd_place at = task_place(job, task);
    const tile_sequence t = tile_sequence_init(p, at.b, at.kv_head);
    const key_parts parts = split_keys(p, &t.seq.mask);
    const int64_t r1 = at.r1 < t.rows ? at.r1 : t.rows;
    fwd_scratch scratch;
    carve(&scratch, p, job->plan->block_q, worker->scratch);
#if FGQA_PAIRS
    scratch.shared = job->shared;
#endif
    if (at.part == 0 && !p->varlen && at.r1 > t.rows) { clear_rows(&t, at.r0 > t.rows ? at.r0 : t.rows, at.r1, scratch.rows); }
    if (at.part >= parts.count || at.r0 >= r1) { return; }

    const int32_t panels = (int32_t)((r1 - at.r0 + PANEL - 1) / PANEL), d = columns(p->d), dv = columns(p->dv);
    fgqa_range range = {INT32_MAX, 0};
    for (int32_t n = 0; n < panels; n++) {
        tile_panel *panel = &scratch.panel[n];
        tile_panel_init(panel, &t, at.r0 + (int64_t)n * PANEL, r1);
        if (is_few(&t, panel, &parts)) {
            real *const q = scratch.q + (size_t)n * PANEL * (size_t)d;
            panel->few = 1;
            tile_pack_rows(q, d, &t, panel, &p->view[FGQA_ARG_q], p->d, t.q_sign);
            rotate_rows(q, d, &t, panel);
        } else {
            pack_q(&scratch, &t, n);
        }
        if (!FGQA_PAIRS || panel->few) { clear_o(&scratch, n, dv); }
        for (int32_t lane = 0; lane < panel->w; lane++) {
            scratch.m[n * PANEL + lane] = -REAL_INF;
            scratch.l[n * PANEL + lane] = 0;
        }
        if (parts.count > 1) {
            const int32_t begin = parts.begin + at.part * parts.keys, end = begin + parts.keys;
            panel->keys.begin = panel->keys.begin > begin ? panel->keys.begin : begin;
            panel->keys.end = panel->keys.end < end ? panel->keys.end : end;
        }
        if (panel->keys.begin >= panel->keys.end) { continue; }
        range.begin = panel->keys.begin < range.begin ? panel->keys.begin : range.begin;
        range.end = panel->keys.end > range.end ? panel->keys.end : range.end;
    }

    const int32_t step = loop_keys(p, scratch.panel->few);
    for (int32_t j0 = range.begin < range.end ? range.begin / step * step : range.end; j0 < range.end; j0 += step) {
        if (fgqa_poll(worker)) { return; }
        key_block block;
        block_begin(&block, j0 > range.begin ? j0 : range.begin, range.end - j0 < step ? range.end : j0 + step);
        load_keys(&scratch, &t, &block, panels);
        attend_all(&scratch, &t, panels, &block);
    }

    real *partial = parts.count > 1 ? partial_at(job, at.b, at.kv_head, at.part) : NULL;
    if (scratch.panel->few && partial) {
        const int32_t used = few_lanes(scratch.panel->rows) * dv;
        memcpy(scratch.rows, scratch.o, (size_t)used * sizeof(real));
        memset(scratch.rows + used, 0, (size_t)(VL * dv - used) * sizeof(real));
        tile_transpose_rows(scratch.o, scratch.rows, dv, VL, p->dv);
    }
    const int32_t lanes = partial_lanes(p);
    for (int32_t n = 0; n < panels; n++) {
        const tile_panel *panel = &scratch.panel[n];
#if FGQA_PAIRS
        if (!panel->few && scratch.o_empty[n]) { clear_o(&scratch, n, dv); }
#endif
        real *const o = scratch.o + (size_t)n * PANEL * (size_t)dv;
        const real *m = scratch.m + n * PANEL, *l = scratch.l + n * PANEL;
        if (!partial) {
            finish_panel(&t, panel, panel->few ? NULL : o, m, l, panel->few ? o : scratch.rows);
            continue;
        }
        memcpy(partial + panel->r0, m, (size_t)panel->w * sizeof(real));
        memcpy(partial + lanes + panel->r0, l, (size_t)panel->w * sizeof(real));
        memcpy(partial + (2 * lanes + panel->r0 * dv), o, (size_t)(panel->w * dv) * sizeof(real));
    }
}

/* Combines the parts of one panel of one KV head: o = sum o_n 2^(m_n - m), l = sum l_n 2^(m_n - m), n in order. */
static void combine_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const fwd_job *job = context;
    const fgqa_problem *p = job->p;
    const tile_sequence t = tile_sequence_init(p, (int32_t)(task / p->hk), (int32_t)(task % p->hk));
    const key_parts parts = split_keys(p, &t.seq.mask);
    if (parts.count <= 1) { return; }
    const int32_t lanes = partial_lanes(p), dv = columns(p->dv);
    fwd_scratch scratch;
    carve(&scratch, p, PANEL, worker->scratch);
    tile_panel *panel = scratch.panel;
    for (int64_t r0 = 0; r0 < t.rows; r0 += PANEL) {
        tile_panel_init(panel, &t, r0, t.rows);
        for (int32_t v = 0; v < panel->nv; v++) {
            vreal m = v_set1(-REAL_INF), l = v_zero();
            for (int32_t n = 0; n < parts.count; n++) { m = v_max(v_load(partial_at(job, t.b, t.kv_head, n) + r0 + v * VL), m); }
            const vreal shift = v_select(m_eq(m, v_set1(-REAL_INF)), v_zero(), m);
            v_store(scratch.m + v * VL, m);
            for (int32_t n = 0; n < parts.count; n++) {
                const real *part = partial_at(job, t.b, t.kv_head, n);
                const vreal factor = v_exp2(v_load(part + r0 + v * VL) - shift);
                l += v_load(part + lanes + r0 + v * VL) * factor;
                const real *from = part + 2 * lanes + r0 * dv + v * VL;
                for (int32_t c = 0; c < p->dv; c++) {
                    real *to = scratch.o + (ptrdiff_t)c * panel->w + v * VL;
                    const vreal before = n ? v_load(to) : v_zero();
                    v_store(to, before + v_load(from + (ptrdiff_t)c * panel->w) * factor);
                }
            }
            v_store(scratch.l + v * VL, l);
        }
        finish_panel(&t, panel, scratch.o, scratch.m, scratch.l, scratch.rows);
    }
}

#if FGQA_TILES
static void forward_on_tiles(void *context, int64_t task, const fgqa_worker *worker)
{
    amx_begin();
    forward_task(context, task, worker);
    amx_release();
}
#else
#define forward_on_tiles forward_task
#endif

#if FGQA_PAIRS
/* All tasks, the keys of each wave of heads packed before them. */
static fgqa_status run_waves(const fwd_job *all, char *spans, const fgqa_exec *exec)
{
    const fgqa_plan *const plan = all->plan;
    const fgqa_problem *const p = all->p;
    amx_shared shared = {.p = p, .spans = spans};
    for (int64_t first = all->first, end; first < all->end; first = end) {
        end = amx_wave_end(p, first);
        shared.first = first;
        fwd_job job = {plan, p, all->partial, first, end, &shared};
        const int64_t wave = end - first;
        FGQA_TRY(fgqa_parallel(amx_share_task, &shared, wave * amx_spans(p), plan->threads, plan->scratch_bytes, exec));
        FGQA_TRY(fgqa_parallel(forward_on_tiles, &job, wave * superblocks(plan, p) * plan->splits, plan->threads, plan->scratch_bytes, exec));
    }
    return FGQA_OK;
}
#endif

fgqa_status FGQA_ROW(fwd, run)(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    fwd_job job = {.plan = plan, .p = p, .partial = workspace, .end = (int64_t)p->b * p->hk};
#if FGQA_PAIRS
    if (superblocks(plan, p) >= shared_blocks(p)) {
        FGQA_TRY(run_waves(&job, (char *)workspace + partial_bytes(plan, p), exec));
    } else
#endif
    {
        FGQA_TRY(fgqa_parallel(forward_on_tiles, &job, plan->tasks, plan->threads, plan->scratch_bytes, exec));
    }
    if (plan->splits <= 1) { return FGQA_OK; }
    return fgqa_parallel(combine_task, &job, (int64_t)p->b * p->hk, plan->threads, plan->scratch_bytes, exec);
}
