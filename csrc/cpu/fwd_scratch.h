/* fwd_scratch.h - what a task of forward (fwd.c) works on: a worker's memory, and the block of keys at hand. */
#ifndef FGQA_FWD_SCRATCH_H
#define FGQA_FWD_SCRATCH_H
#include "../core/workspace.h"
#include "tile.h"
#if FGQA_PAIRS
#include "amx_fwd.h"
#endif

/* Keys that all panels attend to before the next. */
SIMD int32_t loop_keys(const fgqa_problem *p, int few)
{
#if FGQA_PAIRS
    return few ? KEYS : amx_span_keys(p);
#else
    (void)p, (void)few;
    return KEYS;
#endif
}

static int32_t columns(int32_t n) { return ROUND_UP(n, VL); }
/* Of packed q, in reals a lane: on tiles there is room for two bfloat16 numbers each. */
static int32_t q_columns(int32_t d) { return FGQA_PAIRS ? ROUND_UP(d, 32) : columns(d); }

/* A worker's memory; panels of a superblock one after the other. */
typedef struct {
    tile_panel *panel;
    real *q, *o;              /* [panel][d][PANEL], [panel][dv][PANEL] */
    real *m, *l;              /* [panel][PANEL]: running maximum (base 2) and sum */
    real *s, *add;            /* tiles */
    ireal *keep;
    real *factor;             /* [2][PANEL]: 2^(m_old - m); the second for what is made beside (amx_fwd.h) */
    real *rows;               /* [PANEL][max(d, dv)] rows being packed or stored; [VL][KEYS] of an additive tile; o before a tile */
    real *k, *v, *clean;      /* converted blocks, V without its bad rows */
    const void **k_list, **v_list;
#if FGQA_PAIRS
    real *ring;               /* scores of some strips (amx_weights.h) */
    int *q_special, *o_empty; /* [panel]: q has two parts and is not finite; o has not been written */
    int32_t *reached;         /* [panel]: the first key of the block that it has not attended to */
    const amx_shared *shared; /* or NULL: keys are packed by this task */
    amx_keys keys[AMX_BLOCKS];
#endif
} fwd_scratch;

static size_t carve(fwd_scratch *scratch, const fgqa_problem *p, int32_t block_q, void *base)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    const size_t panels = (size_t)(block_q / PANEL), lanes = (size_t)block_q, d = (size_t)columns(p->d), dv = (size_t)columns(p->dv);
    const int has_add = p->view[FGQA_ARG_mask].data || p->view[FGQA_ARG_bias].data;
    const size_t widest = d > dv ? d : dv;
    scratch->s = fgqa_arena_take(&arena, SCORE_KEYS * PANEL, sizeof(real));
    scratch->factor = fgqa_arena_take(&arena, 2 * PANEL, sizeof(real));
    scratch->panel = fgqa_arena_take(&arena, panels, sizeof(tile_panel));
    scratch->m = fgqa_arena_take(&arena, lanes, sizeof(real));
    scratch->l = fgqa_arena_take(&arena, lanes, sizeof(real));
    scratch->q = fgqa_arena_take(&arena, lanes * (size_t)q_columns(p->d), sizeof(real));
    scratch->o = fgqa_arena_take(&arena, lanes * dv, sizeof(real));
    scratch->rows = fgqa_arena_take(&arena, widest * PANEL > VL * KEYS ? widest * PANEL : VL * KEYS, sizeof(real));
    scratch->k = fgqa_arena_take(&arena, KEYS * d, sizeof(real));
    scratch->v = fgqa_arena_take(&arena, KEYS * dv, sizeof(real));
    scratch->clean = fgqa_arena_take(&arena, KEYS * dv, sizeof(real));
    scratch->k_list = fgqa_arena_take(&arena, KEYS + LIST_AHEAD, sizeof(const void *));
    scratch->v_list = fgqa_arena_take(&arena, KEYS + LIST_AHEAD, sizeof(const void *));
    scratch->add = fgqa_arena_take(&arena, has_add ? KEYS * PANEL : 0, sizeof(real));
    scratch->keep = fgqa_arena_take(&arena, p->dropout_threshold ? KEYS * PANEL : 0, sizeof(ireal));
#if FGQA_PAIRS
    scratch->ring = fgqa_arena_take(&arena, AMX_RING * AMX_STRIP, sizeof(real));
    scratch->q_special = fgqa_arena_take(&arena, panels, sizeof(int));
    scratch->o_empty = fgqa_arena_take(&arena, panels, sizeof(int));
    scratch->reached = fgqa_arena_take(&arena, panels, sizeof(int32_t));
    amx_keys_carve(scratch->keys, &arena, p);
#endif
    return arena.used;
}

/* The block of keys at hand. V is searched for bad rows when the first tile needs to know. */
typedef struct {
    int32_t j0, j1;
    tile_block k, v, clean;
    const void *const *k_list, *const *v_list;   /* addresses instead of k and v, or NULL */
    few_form form;          /* of what is listed */
    tile_bad_rows bad;
    int searched, stream;   /* stream: K and V lie in the caller's memory and only one panel reads them */
} key_block;

/* Not all of it is cleared: for a token or two that would take longer than the rest. */
SIMD void block_begin(key_block *block, int32_t j0, int32_t j1)
{
    const tile_block none = {NULL, 0};
    block->j0 = j0;
    block->j1 = j1;
    block->k = block->v = none;
    block->k_list = block->v_list = NULL;
    block->searched = block->stream = 0;
    block->bad.count = 0;
}

SIMD tile_block block_from(const tile_block *block, int32_t row)
{
    const tile_block rest = {block->data + row * block->stride, block->stride};
    return rest;
}

/* V of the block in floats, searched for bad rows; without these in block->clean. */
static void search_values(fwd_scratch *scratch, const tile_sequence *t, key_block *block)
{
    const int32_t keys = block->j1 - block->j0, dv = t->p->dv;
    if (block->v_list) {
        block->v = tile_block_load(t, &t->p->view[FGQA_ARG_v], block->j0, block->j1, dv, scratch->v);
        block->v_list = NULL;
    }
    if (block->searched) { return; }
    block->searched = 1;
    tile_find_bad_rows(&block->bad, &block->v, keys, dv);
    if (block->bad.count) { block->clean = tile_without_bad_rows(&block->bad, &block->v, keys, dv, scratch->clean); }
}

#endif
