/* workspace.h - one arithmetic that both sizes and carves scratch memory.
 *
 *     fgqa_arena a = fgqa_arena_begin(base);           base NULL: only measures
 *     float *s = fgqa_arena_take(&a, n, sizeof *s);
 *     ... a.used is the size
 *
 * The same function of a kernel is called once with NULL by its planner and once with memory by its runner, so size and
 * layout cannot disagree.
 */
#ifndef FGQA_WORKSPACE_H
#define FGQA_WORKSPACE_H
#include <stddef.h>
#include <stdint.h>

#define FGQA_ALIGNMENT 64

typedef struct { char *base; size_t used; } fgqa_arena;

static inline fgqa_arena fgqa_arena_begin(void *base)
{
    fgqa_arena arena = {(char *)base, 0};
    return arena;
}

/* `count` elements of `bytes` each, 64-byte aligned; NULL while measuring. */
static inline void *fgqa_arena_take(fgqa_arena *arena, size_t count, size_t bytes)
{
    const size_t offset = (arena->used + FGQA_ALIGNMENT - 1) / FGQA_ALIGNMENT * FGQA_ALIGNMENT;
    arena->used = offset + count * bytes;
    return arena->base ? arena->base + offset : NULL;
}

#endif
