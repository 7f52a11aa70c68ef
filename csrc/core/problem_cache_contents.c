/* problem_cache_contents.c - what the index arrays of a KV cache say: lengths, page numbers, positions, and that no slot is
 * written which another sequence writes or reads in the same call. A sentence names the row and the value.
 */
#include "cache_rules.h"
#include "problem_check.h"

#include <stdlib.h>

/* What each sequence may hold: slots of its pages, of which only those in use must exist. */
typedef struct {
    const fgqa_problem *p;
    const fgqa_cache *c;
    int64_t pages, slots;
    const char *table, *page;      /* how the caller calls them */
} contents;

static fgqa_cache_use use_of(const contents *x, int32_t n)
{
    return (fgqa_cache_use){fgqa_cache_before(x->c, n), fgqa_cache_new(x->c, n), fgqa_cache_pad(x->c, n)};
}

/* ---- lengths ---- */

static fgqa_status check_lengths(const contents *x, int32_t n)
{
    const fgqa_cache *c = x->c;
    const fgqa_cache_use u = use_of(x, n);
    const int before = (int)u.before, added = (int)u.added;
    switch (fgqa_check_use(u, x->slots, c->new_max)) {
    case FGQA_USE_LENS:
        return fgqa_fail(FGQA_ERROR_VALUE, "cache_lens[%d] is %d: with this cache it must be 0 to %lld slots; is it the length before new keys are "
                         "appended?", (int)n, before, (long long)x->slots);
    case FGQA_USE_NEW_LENS:
        return fgqa_fail(FGQA_ERROR_VALUE, "new_lens[%d] is %d but k_new has %d rows: lengths must be 0 to %d; clip it, or pad k_new and v_new",
                         (int)n, added, (int)c->new_max, (int)c->new_max);
    case FGQA_USE_FULL:
        return fgqa_fail(FGQA_ERROR_VALUE, "cache_lens[%d] is %d and %d new keys are appended: %lld do not fit into the %lld slots of a sequence; "
                         "use a larger cache%s", (int)n, before, added, (long long)(u.before + u.added), (long long)x->slots,
                         x->page[0] == 'p' ? ", or more columns of page_table" : "");
    case FGQA_USE_TOO_LONG:
        return fgqa_fail(FGQA_ERROR_VALUE, "cache_lens[%d] is %d and %d new keys are appended: a sequence has less than 2^31 keys", (int)n, before,
                         added);
    case FGQA_USE_LEFT_PAD:
        return fgqa_fail(FGQA_ERROR_VALUE, "left_pad[%d] is %d: it must be 0 to %lld, the slots of the sequence once new keys are appended", (int)n,
                         (int)u.pad, (long long)(u.before + u.added));
    default:
        return FGQA_OK;
    }
}

/* ---- page numbers ---- */

static fgqa_status check_pages(const contents *x, int32_t n)
{
    const fgqa_cache *c = x->c;
    const fgqa_slots needed = fgqa_slots_needed(use_of(x, n), c->new_max);
    if (!c->table || needed.end <= needed.begin) { return FGQA_OK; }
    for (int64_t column = needed.begin / c->page_size; column <= (needed.end - 1) / c->page_size; column++) {
        const int32_t page = c->table[n * c->table_stride + column];
        if (fgqa_page_exists(page, x->pages)) { continue; }
        if (x->page[0] == 'p') {
            return fgqa_fail(FGQA_ERROR_VALUE, "page_table[%d, %lld] is %d but k_cache has %lld pages: page numbers must be 0 to %lld; slots %lld to "
                             "%lld of sequence %d need it", (int)n, (long long)column, (int)page, (long long)x->pages, (long long)x->pages - 1,
                             (long long)column * c->page_size, (long long)(column + 1) * c->page_size - 1, (int)n);
        }
        return fgqa_fail(FGQA_ERROR_VALUE, "batch_index[%d] is %d but k_cache has %lld rows: it must be 0 to %lld", (int)n, (int)page,
                         (long long)x->pages, (long long)x->pages - 1);
    }
    return FGQA_OK;
}

/* ---- positions ---- */

static fgqa_status check_positions(const contents *x, int32_t n)
{
    const fgqa_cache *c = x->c;
    const fgqa_slots turned = fgqa_slots_turned(use_of(x, n), fgqa_problem_sequence(x->p, n).mask.sq);
    if (turned.begin == turned.end) { return FGQA_OK; }
    const int64_t low = fgqa_rotary_position(c, n, turned.begin), high = fgqa_rotary_position(c, n, turned.end - 1);
    if (low >= 0 && high < c->rotary.positions) { return FGQA_OK; }
    return fgqa_fail(FGQA_ERROR_VALUE, "rotary has %lld positions but sequence %d needs %lld to %lld (%s%d): give cos and sin of more positions%s",
                     (long long)c->rotary.positions, (int)n, (long long)low, (long long)high,
                     c->rotary.offsets ? "rotary_offsets is " : "cache_lens is ",
                     (int)(c->rotary.offsets ? c->rotary.offsets[n] : fgqa_cache_before(c, n)), low < 0 ? ", or fewer query rows" : "");
}

/* ---- scales ---- */

static fgqa_status check_scales(const fgqa_view *view, const char *name, int32_t b, int32_t hk)
{
    for (int32_t n = 0; n < (view->stride_b ? b : 1) && view->data; n++) {
        for (int32_t h = 0; h < hk; h++) {
            const float scale = ((const float *)view->data)[n * view->stride_b + h * view->stride_h];
            if (!fgqa_scale_is_usable(scale)) {
                return fgqa_fail(FGQA_ERROR_VALUE, "%s of KV head %d is %g: it must be a finite number greater than 0", name, (int)h, (double)scale);
            }
        }
    }
    return FGQA_OK;
}

/* ---- slots that are written ---- */

/* Slots [begin, end) of a page, which sequence n appends to. */
typedef struct { fgqa_page_part at; int32_t n; } target;

static int by_place(const void *a, const void *b)
{
    const fgqa_page_part *x = &((const target *)a)->at, *y = &((const target *)b)->at;
    return x->page != y->page ? (x->page < y->page ? -1 : 1) : (x->begin > y->begin) - (x->begin < y->begin);
}

static target slots_in_page(const contents *x, int32_t n, int64_t begin, int64_t end)
{
    return (target){fgqa_first_page_part(fgqa_cache_page(x->c, n, (int32_t)begin), begin, end, x->c->page_size), n};
}

/* Fills `targets` in order of place, if it is not NULL; returns their number. */
static size_t list_targets(const contents *x, target *targets)
{
    size_t count = 0;
    for (int32_t n = 0; n < x->p->b; n++) {
        const int64_t end = (int64_t)fgqa_cache_before(x->c, n) + fgqa_cache_new(x->c, n);
        for (int64_t slot = fgqa_cache_before(x->c, n); slot < end;) {
            const target next = slots_in_page(x, n, slot, end);
            if (targets) { targets[count] = next; }
            count++;
            slot += next.at.end - next.at.begin;
        }
    }
    if (targets) { qsort(targets, count, sizeof *targets, by_place); }
    return count;
}

static fgqa_status fail_written_twice(const contents *x, const target *a, const target *b)
{
    return fgqa_fail(FGQA_ERROR_VALUE, "%s gives slot %d of %s %d to the new keys of sequence %d and of sequence %d: each must be written once; give "
                     "each sequence %ss of its own", x->table, (int)b->at.begin, x->page, (int)b->at.page, (int)a->n, (int)b->n, x->page);
}

/* The first target in the page that ends behind `begin`. */
static const target *find_target(const target *targets, size_t count, int64_t page, int32_t begin)
{
    size_t low = 0, high = count;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        const fgqa_page_part *t = &targets[middle].at;
        if (t->page < page || (t->page == page && t->end <= begin)) { low = middle + 1; } else { high = middle; }
    }
    return low < count && targets[low].at.page == page ? &targets[low] : NULL;
}

/* Keys of the cache that the call reads must not be among those it writes. */
static fgqa_status check_reads(const contents *x, const target *targets, size_t count)
{
    for (int32_t n = 0; n < x->p->b; n++) {
        const int64_t end = fgqa_cache_before(x->c, n);
        for (int64_t slot = fgqa_cache_pad(x->c, n); slot < end;) {
            const target read = slots_in_page(x, n, slot, end);
            const target *written = find_target(targets, count, read.at.page, read.at.begin);
            if (written && fgqa_parts_meet(written->at, read.at)) {
                return fgqa_fail(FGQA_ERROR_VALUE, "%s gives slot %d of %s %d to the new keys of sequence %d, but sequence %d has keys there: shared "
                                 "%ss must not be written; copy the %s first", x->table,
                                 (int)(written->at.begin > read.at.begin ? written->at.begin : read.at.begin), x->page, (int)read.at.page,
                                 (int)written->n, (int)n,
                                 x->page, x->page);
            }
            slot += read.at.end - read.at.begin;
        }
    }
    return FGQA_OK;
}

static fgqa_status check_targets(const contents *x)
{
    if (!x->c->table || x->c->new_max == 0) { return FGQA_OK; }     /* without a table each sequence has its own page */
    const size_t count = list_targets(x, NULL);
    if (count == 0) { return FGQA_OK; }
    target *targets = malloc(count * sizeof *targets);
    if (targets == NULL) { return fgqa_fail(FGQA_ERROR_MEMORY, "a list of %zu pages to be written does not fit into memory", count); }
    list_targets(x, targets);
    fgqa_status status = FGQA_OK;
    for (size_t k = 1; k < count && status == FGQA_OK; k++) {
        if (fgqa_parts_meet(targets[k - 1].at, targets[k].at)) {
            status = fail_written_twice(x, &targets[k - 1], &targets[k]);
        }
    }
    if (status == FGQA_OK) { status = check_reads(x, targets, count); }
    free(targets);
    return status;
}

fgqa_status fgqa_check_cache_contents(const fgqa_problem *p, int64_t pages, int64_t slots, int paged)
{
    const contents x = {p, &p->cache, pages, slots, paged ? "page_table" : "batch_index", paged ? "page" : "row"};
    for (int32_t n = 0; n < p->b; n++) {
        FGQA_TRY(check_lengths(&x, n));
        FGQA_TRY(check_pages(&x, n));
        if (p->cache.rotary.pairs) { FGQA_TRY(check_positions(&x, n)); }
    }
    FGQA_TRY(check_scales(&p->cache.k_scale, "k_scale", p->b, p->hk));
    FGQA_TRY(check_scales(&p->cache.v_scale, "v_scale", p->b, p->hk));
    return check_targets(&x);
}
