/* bwd_shift.h - walks of a backward pass that begin apart. C11 and CUDA.
 *
 * Blocks that take neighbouring key tiles of a section (KV head of a sequence x part) at once and walk alike meet at every query
 * tile, where each waits for its first turn at dQ a step longer than the one before. Shifted walks end with the places that they
 * left out at first. What they come to then is summed by itself, `late`: with one sum, an order that keeps all busy has blocks
 * wait for later tasks, which may never begin while they do. In either sum key tiles add in the order in which they are taken, so
 * that none waits but for earlier ones.
 */
#ifndef FGQA_BWD_SHIFT_H
#define FGQA_BWD_SHIFT_H
#include "bwd_workspace.h"

/* Of the first `tiles` key tiles of a section each begins `apart` places behind the one before it. The last of them is taken
 * first. tiles 0: all walks begin at their first place. */
typedef struct { int32_t tiles, apart; } fgqa_bwd_shift;

/* One late addition in the word of a query tile (`turn` of bwd_workspace.h), above those to dQ itself. */
enum { FGQA_BWD_LATE = 1 << 14 };

FGQA_FN int32_t fgqa_bwd_begin(const fgqa_bwd_shift *shift, int32_t n) { return n < shift->tiles ? shift->apart * n : 0; }

/* The key tile that is taken as number `place`. */
FGQA_FN int32_t fgqa_bwd_shifted_at(const fgqa_bwd_shift *shift, int32_t place) { return place < shift->tiles ? shift->tiles - 1 - place : place; }

/* Places from which on nothing is left out. */
FGQA_FN int32_t fgqa_bwd_late_places(const fgqa_bwd_shift *shift) { return shift->tiles > 0 ? shift->apart * (shift->tiles - 1) : 0; }

/* Where a walk of `steps` is in its step `step`, and whether that is one of those in the end. */
typedef struct { int32_t place, late; } fgqa_bwd_at;

FGQA_FN fgqa_bwd_at fgqa_bwd_at_step(int32_t begin, int32_t steps, int32_t step)
{
    const int32_t late = step >= steps - begin;
    const fgqa_bwd_at at = {late ? step - (steps - begin) : step + begin, late};
    return at;
}

/* Of the shifted key tiles before `end`, which are all that meet a query tile, how many come to it at first, those before: its
 * place. */
FGQA_FN int32_t fgqa_bwd_early(const fgqa_bwd_shift *shift, int32_t place, int32_t end)
{
    const int32_t begun = place / shift->apart + 1, most = end < shift->tiles ? end : shift->tiles;
    return begun < most ? begun : most;
}

/* What a query tile's word says when it is the turn of key tile n, in its bits for what comes at first or (late) in the end. */
FGQA_FN int32_t fgqa_bwd_shifted_turn(const fgqa_bwd_shift *shift, int32_t n, fgqa_bwd_at at, int32_t end)
{
    const int32_t early = fgqa_bwd_early(shift, at.place, end);
    return at.late ? (shift->tiles - 1 - n) * FGQA_BWD_LATE : n < shift->tiles ? early - 1 - n : early + n - shift->tiles;
}

/* What it says when all have added. */
FGQA_FN int32_t fgqa_bwd_shifted_complete(const fgqa_bwd_shift *shift, int32_t place, int32_t end)
{
    const int32_t early = fgqa_bwd_early(shift, place, end), others = end > shift->tiles ? end - shift->tiles : 0;
    return early + others + (end - others - early) * FGQA_BWD_LATE;
}

/* The workspace, with late sums behind it: [b][hk][splits][fgqa_bwd_late_places()][block_q * d], on a line of the caches. */
static inline size_t fgqa_bwd_shifted_take(const fgqa_problem *p, int32_t block_q, int32_t block_k, int32_t d, int32_t dv, int32_t splits, int32_t stats_kind,
                                           fgqa_bwd_shift shift, void *base, fgqa_bwd_workspace *w, float **late)
{
    enum { LINE = 128 };
    const size_t used = fgqa_bwd_workspace_take(p, block_q, block_k, d, dv, splits, stats_kind, base, w), begin = (used + LINE - 1) / LINE * LINE;
    const size_t places = (size_t)p->b * (size_t)p->hk * (size_t)splits * (size_t)fgqa_bwd_late_places(&shift);
    *late = base && places > 0 ? (float *)((char *)base + begin) : NULL;
    return places > 0 ? begin + places * (size_t)(block_q * d) * sizeof(float) : used;
}

#endif
