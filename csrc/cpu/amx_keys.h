/* amx_keys.h - K and V^T as forward's products on tiles take them: a span of keys at a time, of
 * one task or shared by all tasks of a KV head.
 *
 * Where a KV head has several tasks, a job of its own packs each span once, before them, into the workspace: one copy of K and V
 * as tiles. It is bounded: heads are taken in waves of at most SHARED_BYTES, or one head. What is packed, and so every bit of the
 * results, is the same either way.
 */
#ifndef FGQA_AMX_KEYS_H
#define FGQA_AMX_KEYS_H
#include "../core/workspace.h"
#include "amx_panel.h"
#include "threads.h"

#define AMX_SPAN (2 * KEYS)      /* keys of a span; of narrow heads AMX_WIDEST */
#define AMX_WIDEST (4 * KEYS)
#define AMX_BLOCKS (AMX_WIDEST / KEYS)
#define SHARED_BYTES ((size_t)64 << 20)

/* A block of KEYS keys at `origin`, one of those of a span, which follow each other in k and alternate in v_t. */
typedef struct {
    bf16 *k;                  /* A: [two tiles of keys][step][2] */
    bf16 *rows, *v;           /* rows of K, until they are packed, and of V */
    bf16 *v_t, *v_t_clean;    /* A: [two tiles of columns][span/AMX_DEPTH][2]; without the rows that hold a NaN or an infinity */
    bf16 *p;                  /* B: [span/AMX_DEPTH][nv], of the panel at hand; twice */
    ptrdiff_t v_pair;         /* from two tiles of columns of v_t to the next */
    ptrdiff_t k_low, rows_low, v_low, v_t_low, p_low;   /* from the high parts of each */
    tile_bad_rows bad_keys;   /* of K, where there are two parts, counted from origin */
    tile_bad_rows bad;        /* of V */
    int32_t origin, end, searched, unread;   /* end: of its keys; unread: v is not filled */
} amx_keys;

/* Where K and V^T of a span leave room for it in the caches, a longer one: O is read and written once a span. */
SIMD int32_t amx_span_keys(const fgqa_problem *p)
{
    return FGQA_TILES && amx_parts(p) == 1 && AMX_PAD(p->d) + AMX_PAD(p->dv) <= 128 ? AMX_WIDEST : AMX_SPAN;
}

static void amx_keys_carve(amx_keys *keys, fgqa_arena *arena, const fgqa_problem *p)
{
    const int32_t span = amx_span_keys(p);
    const size_t d = (size_t)AMX_PAD(p->d), dv = (size_t)AMX_PAD(p->dv), parts = amx_parts(p);
    amx_keys all = {0};
    all.k = fgqa_arena_take(arena, parts * (size_t)span * d, sizeof(bf16));
    all.rows = fgqa_arena_take(arena, parts * AMX_BLOCK_ROWS * d, sizeof(bf16));
    all.v_t = fgqa_arena_take(arena, parts * (size_t)span * dv, sizeof(bf16));
    all.v_t_clean = fgqa_arena_take(arena, parts * (size_t)span * dv, sizeof(bf16));
    all.p = fgqa_arena_take(arena, 2 * parts * (size_t)span * PANEL, sizeof(bf16));
    all.v_pair = AMX_PAIR(span);
    all.k_low = amx_low_of(p, AMX_SPAN * (ptrdiff_t)d);
    all.rows_low = amx_low_of(p, AMX_BLOCK_ROWS * (ptrdiff_t)d);
    all.v_low = amx_low_of(p, AMX_BLOCK_ROWS * (ptrdiff_t)dv);
    all.v_t_low = amx_low_of(p, AMX_SPAN * (ptrdiff_t)dv);
    all.p_low = amx_low_of(p, AMX_SPAN * PANEL);
    for (int32_t n = 0; n < span / KEYS; n++) {
        bf16 *const v = fgqa_arena_take(arena, parts * AMX_BLOCK_ROWS * dv, sizeof(bf16));
        if (!all.k) { continue; }
        keys[n] = all;
        keys[n].v = v;
        keys[n].k += n * KEYS * (ptrdiff_t)d;
        keys[n].v_t += n * AMX_PAIR(KEYS);
        keys[n].v_t_clean += n * AMX_PAIR(KEYS);
    }
}

/* Where row j of a block's K begins in such tiles; its next AMX_DEPTH columns two tiles on. */
SIMD bf16 *amx_key_row(bf16 *to, int32_t j, int32_t ld)
{
    return to + (ptrdiff_t)(j / AMX_DEPTH) * AMX_DEPTH * ld + j / AMX_SIDE % 2 * AMX_TILE + j % AMX_SIDE * AMX_DEPTH;
}

static void amx_pack_key_rows(bf16 *to, const bf16 *rows, int32_t keys, int32_t cols)
{
    const int32_t ld = AMX_PAD(cols);
    for (int32_t j = 0; j < keys; j++, rows += ld) {
        bf16 *const at = amx_key_row(to, j, ld);
        for (int32_t c = 0; c < ld; c += AMX_DEPTH) { _mm512_store_si512(at + c / AMX_DEPTH * 2 * AMX_TILE, _mm512_load_si512(rows + c)); }
    }
}

/* The same for keys [j0, j1) of one block of bfloat16 rows as they lie in memory. */
static void amx_load_key_tiles(bf16 *to, const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols)
{
    const int32_t ld = AMX_PAD(cols), s0 = (int32_t)t->seq.k_row + j0, s1 = s0 + j1 - j0;
    const __mmask32 last = 0xFFFFFFFFu >> (ld - cols);
    int32_t j = j0 % KEYS;
    tile_page page = {0};
    if (j1 - j0 < KEYS) { memset(to, 0, (size_t)(amx_block_keys(j1) * ld) * sizeof(bf16)); }
    for (int32_t s = s0; s < s1; s += page.rows) {
        page = tile_page_at(t, view, s, s1);
        const bf16 *row = (const bf16 *)(const void *)page.row;
        for (int32_t n = 0; n < page.rows; n++, j++, row += view->stride_s) {
            bf16 *const at = amx_key_row(to, j, ld);
            for (int32_t c = 0; c < ld; c += AMX_DEPTH) {
                _mm512_store_si512(at + c / AMX_DEPTH * 2 * AMX_TILE, _mm512_maskz_loadu_epi16(c + AMX_DEPTH < ld ? 0xFFFFFFFFu : last, row + c));
            }
        }
    }
}

/* V^T of the rows of V, all parts. */
static void amx_pack_values(const amx_keys *keys, bf16 *to, int32_t dv)
{
    const int32_t n = amx_block_keys(keys->end);
    amx_pack_keys(to, keys->v_pair, keys->v, AMX_PAD(dv), n, dv);
    if (keys->v_low) { amx_pack_keys(to + keys->v_t_low, keys->v_pair, keys->v + keys->v_low, AMX_PAD(dv), n, dv); }
}

/* The block of V as it lies in memory, if it can be packed from there; else NULL. Rows 4 KB apart would evict each other. */
static const bf16 *amx_values_in_place(const tile_sequence *t, const fgqa_view *v, int32_t j0, int32_t j1)
{
    const int32_t s0 = (int32_t)t->seq.k_row + j0;
    const int whole = v->dtype == FGQA_BF16 && v->stride_d == 1 && t->p->dv % AMX_SIDE == 0 && v->stride_s % 1024 && j1 - j0 == KEYS;
    const tile_page page = tile_page_at(t, v, s0, s0 + j1 - j0);
    return whole && page.rows == KEYS ? (const bf16 *)(const void *)page.row : NULL;
}

/* Keys [j0, j1) of one block. */
static void amx_keys_load(amx_keys *keys, const tile_sequence *t, int32_t j0, int32_t j1)
{
    const fgqa_problem *p = t->p;
    const fgqa_view *const k = &p->view[FGQA_ARG_k], *const v = &p->view[FGQA_ARG_v];
    const bf16 *const in_place = amx_values_in_place(t, v, j0, j1);
    const int32_t n = amx_block_keys(j1);
    keys->origin = j0 / KEYS * KEYS;
    keys->end = j1;
    keys->searched = 0;
    keys->unread = in_place != NULL;
    keys->bad_keys.count = 0;
    if (k->dtype == FGQA_BF16 && k->stride_d == 1) {
        amx_load_key_tiles(keys->k, t, k, j0, j1, p->d);
    } else {
        amx_load_keys(keys->rows, keys->rows_low, t, k, j0, j1, p->d);
        if (keys->k_low) { amx_zero_bad_rows(&keys->bad_keys, keys->rows, keys->rows_low, n, p->d); }
        amx_pack_key_rows(keys->k, keys->rows, n, p->d);
        if (keys->k_low) { amx_pack_key_rows(keys->k + keys->k_low, keys->rows + keys->rows_low, n, p->d); }
    }
    if (in_place) {
        amx_pack_keys(keys->v_t, keys->v_pair, in_place, v->stride_s, KEYS, p->dv);
    } else {
        amx_load_keys(keys->v, keys->v_low, t, v, j0, j1, p->dv);
        amx_pack_values(keys, keys->v_t, p->dv);
    }
}

/* The block's bad rows of V, found when first asked for; then they are zeroed and the block is transposed again. */
static int32_t amx_bad_values(amx_keys *keys, const tile_sequence *t)
{
    const int32_t dv = t->p->dv;
    if (!keys->searched && keys->unread) { amx_load_keys(keys->v, keys->v_low, t, &t->p->view[FGQA_ARG_v], keys->origin, keys->end, dv); }
    if (!keys->searched && amx_zero_bad_rows(&keys->bad, keys->v, keys->v_low, amx_block_keys(keys->end), dv)) { amx_pack_values(keys, keys->v_t_clean, dv); }
    keys->searched = 1;
    return keys->bad.count;
}

/* ---- shared ---- */

typedef struct { bf16 *k, *v_t; tile_bad_rows *bad_keys; } amx_span;

/* Of a wave, which begins with head `first`; head n is KV head n % hk of sequence n / hk. */
typedef struct { const fgqa_problem *p; char *spans; int64_t first; } amx_shared;

SIMD int64_t amx_spans(const fgqa_problem *p) { return ((int64_t)p->sk + amx_span_keys(p) - 1) / amx_span_keys(p); }   /* of a KV head */

static size_t amx_span_carve(amx_span *span, const fgqa_problem *p, void *base)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    const size_t keys = amx_parts(p) * (size_t)amx_span_keys(p);
    span->k = fgqa_arena_take(&arena, keys * (size_t)AMX_PAD(p->d), sizeof(bf16));
    span->v_t = fgqa_arena_take(&arena, keys * (size_t)AMX_PAD(p->dv), sizeof(bf16));
    span->bad_keys = fgqa_arena_take(&arena, amx_parts(p) > 1 ? AMX_SPAN / KEYS : 0, sizeof(tile_bad_rows));
    return ROUND_UP(arena.used, FGQA_ALIGNMENT);
}

/* Spans of all heads before head n, or a few more: of packed sequences each may begin a span before the last one ends. */
static int64_t amx_spans_before(const fgqa_problem *p, int64_t n)
{
    const int64_t b = n / p->hk, kv_head = n % p->hk, span = amx_span_keys(p);
    if (!p->varlen) { return n * amx_spans(p); }
    const int64_t first = p->cu_seqlens_kv[b] / span + b;
    return first * p->hk + (kv_head ? kv_head * (p->cu_seqlens_kv[b + 1] / span + b + 1 - first) : 0);
}

static amx_span amx_shared_span(const amx_shared *shared, int64_t head, int32_t j0)
{
    amx_span span;
    const size_t bytes = amx_span_carve(&span, shared->p, NULL);
    const int64_t n = amx_spans_before(shared->p, head) - amx_spans_before(shared->p, shared->first) + j0 / amx_span_keys(shared->p);
    amx_span_carve(&span, shared->p, shared->spans + (size_t)n * bytes);
    return span;
}

/* The end of the wave that begins with head `first`. */
static int64_t amx_wave_end(const fgqa_problem *p, int64_t first)
{
    amx_span unused;
    const int64_t most = (int64_t)(SHARED_BYTES / amx_span_carve(&unused, p, NULL)), heads = (int64_t)p->b * p->hk;
    int64_t end = first + 1;
    while (end < heads && amx_spans_before(p, end + 1) - amx_spans_before(p, first) <= most) { end++; }
    return end;
}

/* Of the largest wave. */
static size_t amx_shared_bytes(const fgqa_problem *p)
{
    amx_span unused;
    const int64_t bytes = (int64_t)amx_span_carve(&unused, p, NULL), all = amx_spans_before(p, (int64_t)p->b * p->hk);
    int64_t most = (int64_t)SHARED_BYTES / bytes;
    if (most < amx_spans(p) + 1) { most = amx_spans(p) + 1; }
    return (size_t)((all < most ? all : most) * bytes);
}

/* Packs one span of one head of a wave. */
static void amx_share_task(void *context, int64_t task, const fgqa_worker *worker)
{
    const amx_shared *const shared = context;
    const fgqa_problem *const p = shared->p;
    const int64_t head = shared->first + task / amx_spans(p);
    const int32_t span_keys = amx_span_keys(p), j0 = (int32_t)(task % amx_spans(p)) * span_keys;
    const tile_sequence t = tile_sequence_init(p, (int32_t)(head / p->hk), (int32_t)(head % p->hk));
    const fgqa_range seen = fgqa_kv_range(&t.seq.mask, 0, t.seq.mask.sq);
    const int32_t j1 = t.seq.mask.sk - j0 < span_keys ? t.seq.mask.sk : j0 + span_keys;
    if (t.rows == 0 || j0 >= seen.end || j1 <= seen.begin) { return; }
    const amx_span span = amx_shared_span(shared, head, j0);
    amx_keys keys[AMX_BLOCKS];
    fgqa_arena arena = fgqa_arena_begin(worker->scratch);
    amx_keys_carve(keys, &arena, p);
    for (int32_t n = 0, j = j0; j < j1; n++, j += KEYS) {
        keys[n].k = span.k + n * KEYS * (ptrdiff_t)AMX_PAD(p->d);
        keys[n].v_t = span.v_t + n * AMX_PAIR(KEYS);
        amx_keys_load(&keys[n], &t, j, j1 - j < KEYS ? j1 : j + KEYS);
        if (keys[n].k_low) { span.bad_keys[n] = keys[n].bad_keys; }
    }
}

/* Keys [j0, j1), those of one span, as they were packed. */
static void amx_keys_use(amx_keys *keys, const amx_shared *shared, const tile_sequence *t, int32_t j0, int32_t j1)
{
    const fgqa_problem *const p = t->p;
    const amx_span span = amx_shared_span(shared, (int64_t)t->b * p->hk + t->kv_head, j0);
    for (int32_t n = 0, j = j0; j < j1; n++, j += KEYS) {
        keys[n].k = span.k + n * KEYS * (ptrdiff_t)AMX_PAD(p->d);
        keys[n].v_t = span.v_t + n * AMX_PAIR(KEYS);
        keys[n].origin = j;
        keys[n].end = j1 - j < KEYS ? j1 : j + KEYS;
        keys[n].searched = 0;
        keys[n].unread = 1;
        if (keys[n].k_low) { keys[n].bad_keys = span.bad_keys[n]; }
    }
}

#endif
