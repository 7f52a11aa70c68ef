/* cache_rules.h - what the index arrays of a KV cache may say of one sequence, as numbers. For the check on the CPU, which has
 * the sentences (problem_cache_contents.c), and for the one on a GPU (cuda/any/check_cache.cu).
 */
#ifndef FGQA_CACHE_RULES_H
#define FGQA_CACHE_RULES_H
#include <float.h>

#include "semantics.h"

/* Slots in use before the append, slots appended, slots at the beginning that hold nothing. */
typedef struct { int64_t before, added, pad; } fgqa_cache_use;

typedef enum {
    FGQA_USE_FITS,
    FGQA_USE_LENS,          /* cache_lens is no number of slots */
    FGQA_USE_NEW_LENS,      /* new_lens is no number of new keys */
    FGQA_USE_FULL,          /* both together are more than there are slots */
    FGQA_USE_TOO_LONG,      /* or more than can be counted */
    FGQA_USE_LEFT_PAD       /* left_pad is more than there are keys */
} fgqa_use_fault;

/* Against a sequence's slots and the rows of k_new. */
FGQA_FN fgqa_use_fault fgqa_check_use(fgqa_cache_use u, int64_t slots, int64_t new_max)
{
    if (u.before < 0 || u.before > slots) { return FGQA_USE_LENS; }
    if (u.added < 0 || u.added > new_max) { return FGQA_USE_NEW_LENS; }
    if (u.before + u.added > slots) { return FGQA_USE_FULL; }
    if (u.before + u.added > INT32_MAX) { return FGQA_USE_TOO_LONG; }
    return u.pad < 0 || u.pad > u.before + u.added ? FGQA_USE_LEFT_PAD : FGQA_USE_FITS;
}

/* Half-open; empty where end <= begin. */
typedef struct { int64_t begin, end; } fgqa_slots;

/* Slots that are read or written: their pages must exist, others may be anything. */
FGQA_FN fgqa_slots fgqa_slots_needed(fgqa_cache_use u, int64_t new_max)
{
    const fgqa_slots needed = {new_max > 0 && u.before < u.pad ? u.before : u.pad, u.before + u.added};
    return needed;
}

FGQA_FN int fgqa_page_exists(int64_t page, int64_t pages) { return page >= 0 && page < pages; }

/* Slots whose positions the rotary embedding needs: of new keys, and of the query rows, the last of which sits at the last slot;
 * where there is no key, rows of q do not matter. */
FGQA_FN fgqa_slots fgqa_slots_turned(fgqa_cache_use u, int64_t sq)
{
    const int64_t end = u.before + u.added;
    fgqa_slots turned = {u.added > 0 ? u.before : end, end};
    if (end > u.pad && end - sq < turned.begin) { turned.begin = end - sq; }
    return turned;
}

FGQA_FN int fgqa_scale_is_usable(float scale) { return scale > 0.0f && scale <= FLT_MAX; }

/* A part of a page: slots [begin, end) of it. */
typedef struct { int64_t page; int32_t begin, end; } fgqa_page_part;

/* The first page of slots [begin, end) of a sequence, as far as they are on it. */
FGQA_FN fgqa_page_part fgqa_first_page_part(int64_t page, int64_t begin, int64_t end, int32_t page_size)
{
    const int32_t first = (int32_t)(begin % page_size), room = page_size - first;
    const fgqa_page_part part = {page, first, first + (end - begin < room ? (int32_t)(end - begin) : room)};
    return part;
}

FGQA_FN int fgqa_parts_meet(fgqa_page_part a, fgqa_page_part b) { return a.page == b.page && a.begin < b.end && b.begin < a.end; }

#endif
