/* dec_work.h - how a decode pass is cut, for the host that plans it and the kernels that run it.
 *
 * A pair is one KV head of one sequence with one block of its packed rows. Its keys are counted in granules: so many slots of the
 * cache (keys of a tensor) as one copy brings, aligned in the cache. All granules of all pairs, in the order (sequence, head, row
 * block, slot), are dealt out in equal runs to as many blocks of threads as there are SMs; what one block has of a pair is a
 * segment. With batch_invariant the unit is a chunk of granules instead, which is a segment of its own. Blocks that have several
 * whole pairs each may have them in another order (b_step_of, dec_split.cuh). Of short caches each pair is dealt out by itself,
 * to a cluster (dec_join.cuh).
 *
 * A segment that is not a whole pair leaves a record, unless blocks of a cluster have all of one (dec_join.cuh,
 * dec_wide_end.cuh): o of all rows of a tile, not normalised and relative to m, in the order in which the kernel's threads have
 * them (items, dec_combine.cuh), then of each row m, the reference maximum in units of q.k, and l, the sum of 2^(c (s - m)) with
 * c = scale log2(e).
 */
#ifndef FGQA_DEC_WORK_H
#define FGQA_DEC_WORK_H
#include "../../core/plan.h"
#include "../../core/workspace.h"

enum {
    FGQA_DEC_MIN_KEYS = 128,        /* of a block; fewer do not pay */
    FGQA_DEC_CHUNK_KEYS = 1024      /* of a chunk, with batch_invariant */
};

typedef struct { int32_t first, count; } fgqa_dec_span;

/* Granules with a slot that some row sees; where there is none, one that is masked, so that every row has an owner. */
FGQA_FN fgqa_dec_span fgqa_dec_span_of(const fgqa_mask *mask, int32_t first_slot, int32_t granule)
{
    fgqa_dec_span span = {0, 1};
    if (mask->sq > 0) {
        const fgqa_range keys = fgqa_kv_range(mask, 0, mask->sq);
        if (keys.begin < keys.end) {
            span.first = (first_slot + keys.begin) / granule;
            span.count = (first_slot + keys.end - 1) / granule + 1 - span.first;
        }
    }
    return span;
}

typedef struct {
    int32_t row_blocks, rows;       /* of a KV head; packed rows of a block, of the last one maybe fewer */
    int32_t heads;                  /* hk * row_blocks */
    int32_t chunk;                  /* granules of a unit; 0: units are granules */
    int32_t blocks;                 /* of threads, at most */
    int32_t tile_rows;              /* of a record: `rows` and those that fill the kernel's tile */
    int64_t records;
    float *record;
} fgqa_dec_layout;

/* Whether all sequences have the lengths of the padded shape. */
static inline int fgqa_dec_is_uniform(const fgqa_problem *p)
{
    return !p->kv_lens && !p->q_lens && !(p->cache.page_size && (p->cache.lens || p->cache.new_lens || p->cache.left_pad));
}

/* block_q: most packed rows of a block; granule: block_k; dv: the row's, not the problem's: records have whole tiles. Carves, or
 * with base NULL measures, the workspace. */
static inline size_t fgqa_dec_layout_make(const fgqa_problem *p, int32_t block_q, int32_t granule, int32_t dv, int32_t multiprocessors,
                                          void *base, fgqa_dec_layout *layout)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    const int64_t rows = (int64_t)p->sq * p->g;
    const int64_t granules = ((int64_t)p->sk + granule - 1) / granule + 1;      /* of a pair, at most: keys need not begin with a granule */
    layout->row_blocks = (int32_t)((rows + block_q - 1) / block_q);
    layout->rows = (int32_t)((rows + layout->row_blocks - 1) / layout->row_blocks);
    layout->heads = p->hk * layout->row_blocks;
    layout->tile_rows = block_q > 8 ? 16 : 8;
    while (layout->tile_rows < layout->rows) { layout->tile_rows *= 2; }
    layout->chunk = p->batch_invariant ? FGQA_DEC_CHUNK_KEYS / granule : 0;
    const int64_t pairs = (int64_t)p->b * layout->heads, units = layout->chunk ? (granules + layout->chunk - 1) / layout->chunk : granules;
    const int64_t least = layout->chunk ? 1 : FGQA_DEC_MIN_KEYS / granule, wanted = (pairs * units + least - 1) / least;
    layout->blocks = wanted < multiprocessors ? (int32_t)wanted : multiprocessors;
    layout->records = layout->chunk ? (units > 1 ? pairs * units : 0) : 2 * (int64_t)layout->blocks;
    layout->record = NULL;
    if (layout->records > 0) {
        layout->record = (float *)fgqa_arena_take(&arena, (size_t)layout->records * (size_t)layout->tile_rows * (size_t)(dv + 2), sizeof(float));
    }
    return arena.used;
}

/* block_q and block_k are set. A task is a block of threads, at most one a multiprocessor. */
static inline void fgqa_dec_tile(const fgqa_problem *p, fgqa_plan *plan, int32_t dv, int32_t multiprocessors)
{
    fgqa_dec_layout layout;
    const int64_t pairs = (int64_t)p->b * p->hk;
    if (pairs == 0 || p->sq == 0) {
        plan->tasks = 0;
        return;
    }
    plan->workspace_bytes = fgqa_dec_layout_make(p, plan->block_q, plan->block_k, dv, multiprocessors, NULL, &layout);
    plan->tasks = layout.blocks;
    plan->splits = layout.blocks > pairs * layout.row_blocks ? (int32_t)(layout.blocks / (pairs * layout.row_blocks)) : 1;
}

#endif
