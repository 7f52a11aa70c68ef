/* problem_cache.c - checks of a call with a KV cache but for the contents of its index arrays (problem_cache_contents.c), and
 * its lowering. What any forward pass has, problem.c checks.
 */
#include "cache.h"
#include "problem_check.h"

#include <string.h>

enum { B, H, S, D };

const char *fgqa_cache_arg_name(fgqa_cache_arg arg)
{
    static const char *const names[FGQA_CACHE_COUNT] = {
#define FGQA_CACHE_NAME(name) #name,
        FGQA_CACHE_TENSORS(FGQA_CACHE_NAME)
#undef FGQA_CACHE_NAME
    };
    return (unsigned)arg < FGQA_CACHE_COUNT ? names[arg] : "?";
}

/* The axes of q, cache and new keys, all of rank 4. */
typedef struct {
    const fgqa_cache_request *r;
    const fgqa_tensor *q, *k_cache, *v_cache, *k_new, *v_new;
    int axis[4];
    int paged;
    int64_t b, hq, hk, d, dv, slots, pages, n_new;
} call_form;

#define TENSOR(name) (f->r->tensor[FGQA_CACHE_##name])

static int64_t extent(const call_form *f, const fgqa_tensor *t, int letter) { return t->shape[f->axis[letter]]; }

/* ---- what may come together ---- */

static fgqa_status fail_alone(const char *given, const char *missing, const char *why)
{
    return fgqa_fail(FGQA_ERROR_VALUE, "%s is given without %s: %s", given, missing, why);
}

static fgqa_status check_together(const call_form *f)
{
    if ((f->k_new != NULL) != (f->v_new != NULL)) {
        return fail_alone(f->k_new ? "k_new" : "v_new", f->k_new ? "v_new" : "k_new", "keys and values are appended together; give both, or neither");
    }
    if (TENSOR(new_lens) && !f->k_new) { return fail_alone("new_lens", "k_new", "it counts the rows of k_new; leave it out"); }
    if (f->k_new && !TENSOR(cache_lens)) {
        return fail_alone("k_new", "cache_lens", "new keys go behind the slots in use; give their number, int32 [b]");
    }
    if (TENSOR(page_table) && !TENSOR(cache_lens)) {
        return fail_alone("page_table", "cache_lens", "a page table says where slots are, not how many are in use; give int32 [b]");
    }
    if (TENSOR(page_table) && TENSOR(batch_index)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "batch_index is given together with page_table: the table says already which pages a sequence "
                         "has; leave batch_index out, or index the rows of page_table with it");
    }
    if ((TENSOR(rotary_cos) != NULL) != (TENSOR(rotary_sin) != NULL)) {
        return fail_alone(TENSOR(rotary_cos) ? "rotary cos" : "rotary sin", TENSOR(rotary_cos) ? "sin" : "cos", "give (cos, sin)");
    }
    if (TENSOR(rotary_offsets) && !TENSOR(rotary_cos)) { return fail_alone("rotary_offsets", "rotary", "give rotary=(cos, sin), or leave it out"); }
    return FGQA_OK;
}

static fgqa_status check_array(const call_form *f, const fgqa_tensor *t, const char *name)
{
    if (t == NULL) { return FGQA_OK; }
    FGQA_TRY(fgqa_check_extents(t, name));
    if (t->device.type != f->q->device.type || t->device.index != f->q->device.index) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is on %s but q is on %s: all arrays of a call must be on one device; move %s to %s", name,
                         fgqa_device_text(t->device).s, fgqa_device_text(f->q->device).s, name, fgqa_device_text(f->q->device).s);
    }
    return FGQA_OK;
}

/* ---- q, cache, new keys ---- */

static const char *cache_axes(const call_form *f)
{
    static const char *const text[2][2] = {{"[b, hk, slots, d]", "[b, slots, hk, d]"}, {"[pages, hk, page_size, d]", "[pages, page_size, hk, d]"}};
    return text[f->paged][f->r->base.layout == FGQA_LAYOUT_BSHD];
}

static fgqa_status check_rank(const call_form *f, const fgqa_tensor *t, const char *name, int is_cache)
{
    if (t == NULL || t->ndim == 4) { return FGQA_OK; }
    const char *axes = is_cache ? cache_axes(f) : f->r->base.layout == FGQA_LAYOUT_BSHD ? "[b, s, h, d]" : "[b, h, s, d]";
    return fgqa_fail(FGQA_ERROR_VALUE, "%s has %d dimension%s, shape %s: it must have 4, %s; add or merge axes", name, (int)t->ndim,
                     t->ndim == 1 ? "" : "s", fgqa_shape_text(t).s, axes);
}

static fgqa_status check_dtype(const fgqa_tensor *t, const char *name, fgqa_dtype wanted, const char *why)
{
    if (t == NULL || t->dtype == wanted) { return FGQA_OK; }
    return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s: %s it must be %s; convert %s", name, fgqa_dtype_name(t->dtype), why,
                     fgqa_dtype_name(wanted), name);
}

static fgqa_status check_dtypes(const call_form *f)
{
    const fgqa_dtype q = f->q->dtype, k = f->k_cache->dtype;
    if (k != FGQA_F8E4M3 && k != q) {
        return fgqa_fail(FGQA_ERROR_TYPE, "k_cache has dtype %s but q has %s: a cache has the dtype of q, or is float8_e4m3; convert q, or "
                         "allocate the cache as %s", fgqa_dtype_name(k), fgqa_dtype_name(q), fgqa_dtype_name(q));
    }
    FGQA_TRY(check_dtype(f->v_cache, "v_cache", k, "like k_cache"));
    FGQA_TRY(check_dtype(f->k_new, "k_new", q, "like q"));
    return check_dtype(f->v_new, "v_new", q, "like q");
}

static fgqa_status check_same(const call_form *f, const fgqa_tensor *t, const char *name, int letter, const char *what, const char *other, int64_t wanted)
{
    if (t == NULL || extent(f, t, letter) == wanted) { return FGQA_OK; }
    return fgqa_fail(FGQA_ERROR_VALUE, "%s has %s %lld but %s has %lld: they must be equal; %s has shape %s, read with layout \"%s\"; slice or "
                     "transpose %s", name, what, (long long)extent(f, t, letter), other, (long long)wanted, name, fgqa_shape_text(t).s,
                     f->r->base.layout == FGQA_LAYOUT_BSHD ? "bshd" : "bhsd", name);
}

static fgqa_status check_heads(const call_form *f)
{
    if (f->hq < 1 || f->hk < 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has 0 heads: at least 1 is needed; tensors are read with layout \"%s\"", f->hq < 1 ? "q" : "k_cache",
                         f->r->base.layout == FGQA_LAYOUT_BSHD ? "bshd" : "bhsd");
    }
    if (f->hq % f->hk != 0) {
        return fgqa_fail(FGQA_ERROR_VALUE, "k_cache has %lld heads but q has %lld: query heads must be a multiple of KV heads (q heads %lld %% "
                         "k_cache heads %lld != 0); repeat or drop heads, or say layout=\"%s\" if axes are in that order", (long long)f->hk,
                         (long long)f->hq, (long long)f->hq, (long long)f->hk, f->r->base.layout == FGQA_LAYOUT_BSHD ? "bhsd" : "bshd");
    }
    return FGQA_OK;
}

static fgqa_status check_shapes(call_form *f)
{
    FGQA_TRY(check_rank(f, f->q, "q", 0));
    FGQA_TRY(check_rank(f, f->k_cache, "k_cache", 1));
    FGQA_TRY(check_rank(f, f->v_cache, "v_cache", 1));
    FGQA_TRY(check_rank(f, f->k_new, "k_new", 0));
    FGQA_TRY(check_rank(f, f->v_new, "v_new", 0));
    f->b = extent(f, f->q, B);
    f->hq = extent(f, f->q, H);
    f->d = extent(f, f->q, D);
    f->pages = extent(f, f->k_cache, B);
    f->hk = extent(f, f->k_cache, H);
    f->slots = extent(f, f->k_cache, S);
    f->dv = extent(f, f->v_cache, D);
    f->n_new = f->k_new ? extent(f, f->k_new, S) : 0;
    FGQA_TRY(fgqa_check_head_dim("q", f->d, "d"));
    FGQA_TRY(check_same(f, f->k_cache, "k_cache", D, "head dim", "q", f->d));
    FGQA_TRY(fgqa_check_head_dim("v_cache", f->dv, "dv"));
    FGQA_TRY(check_heads(f));
    FGQA_TRY(check_same(f, f->v_cache, "v_cache", B, f->paged ? "number of pages" : "batch size", "k_cache", f->pages));
    FGQA_TRY(check_same(f, f->v_cache, "v_cache", H, "head count", "k_cache", f->hk));
    FGQA_TRY(check_same(f, f->v_cache, "v_cache", S, f->paged ? "page size" : "length", "k_cache", f->slots));
    FGQA_TRY(check_same(f, f->k_new, "k_new", B, "batch size", "q", f->b));
    FGQA_TRY(check_same(f, f->k_new, "k_new", H, "head count", "k_cache", f->hk));
    FGQA_TRY(check_same(f, f->k_new, "k_new", D, "head dim", "k_cache", f->d));
    FGQA_TRY(check_same(f, f->v_new, "v_new", B, "batch size", "q", f->b));
    FGQA_TRY(check_same(f, f->v_new, "v_new", H, "head count", "v_cache", f->hk));
    FGQA_TRY(check_same(f, f->v_new, "v_new", S, "length", "k_new", f->n_new));
    FGQA_TRY(check_same(f, f->v_new, "v_new", D, "head dim", "v_cache", f->dv));
    if (f->paged && f->slots < 1) {
        return fgqa_fail(FGQA_ERROR_VALUE, "k_cache has page size 0, shape %s: a page must have at least 1 slot; tensors are read as %s",
                         fgqa_shape_text(f->k_cache).s, cache_axes(f));
    }
    if (!f->paged && !TENSOR(batch_index) && f->pages != f->b) {
        return fgqa_fail(FGQA_ERROR_VALUE, "k_cache has batch size %lld but q has %lld: they must be equal; slice k_cache and v_cache, or say "
                         "with batch_index which row of the cache each sequence has", (long long)f->pages, (long long)f->b);
    }
    return FGQA_OK;
}

/* ---- memory that is written ---- */

/* Whether k_cache and v_cache share an element. Their spans may intersect where both are slices of one array. */
static int caches_intersect(const fgqa_tensor *k, const fgqa_tensor *v)
{
    int64_t shape[5], stride[5];
    if (!fgqa_tensors_overlap(k, v)) { return 0; }
    const int64_t bytes = (char *)v->data - (char *)k->data, size = (int64_t)fgqa_dtype_bytes(k->dtype);
    for (int axis = 0; axis < 4; axis++) {
        shape[axis] = k->shape[axis] > v->shape[axis] ? k->shape[axis] : v->shape[axis];
        stride[axis] = k->stride[axis];
        if (shape[axis] > 1 && k->stride[axis] != v->stride[axis]) { return 1; }
    }
    shape[4] = 2;
    stride[4] = bytes / size;
    return bytes % size != 0 || fgqa_strides_overlap(5, shape, stride);
}

static fgqa_status check_no_overlap(const fgqa_tensor *cache, const char *name, const fgqa_tensor *other, const char *other_name)
{
    if (other == NULL || !fgqa_tensors_overlap(cache, other)) { return FGQA_OK; }
    return fgqa_fail(FGQA_ERROR_VALUE, "%s overlaps %s (their address ranges intersect): the cache is written while %s is in use; give %s memory "
                     "of its own", name, other_name, other_name, other_name);
}

static fgqa_status check_written(const call_form *f, const fgqa_tensor *cache, const char *name)
{
    if (cache->readonly) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is read-only: new keys and values are written into it; pass a writable NumPy array or torch tensor "
                         "(JAX arrays cannot be written)", name);
    }
    if (fgqa_strides_overlap(4, cache->shape, cache->stride)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has overlapping elements (a broadcast or stride-tricked view of shape %s): each slot needs memory "
                         "of its own; pass a copy", name, fgqa_shape_text(cache).s);
    }
    FGQA_TRY(check_no_overlap(cache, name, f->q, "q"));
    FGQA_TRY(check_no_overlap(cache, name, f->k_new, "k_new"));
    FGQA_TRY(check_no_overlap(cache, name, f->v_new, "v_new"));
    for (int n = FGQA_CACHE_cache_lens; n < FGQA_CACHE_COUNT; n++) {
        FGQA_TRY(check_no_overlap(cache, name, f->r->tensor[n], fgqa_cache_arg_name((fgqa_cache_arg)n)));
    }
    for (int n = FGQA_ARG_alibi_slopes; n <= FGQA_ARG_q_lens; n++) {
        FGQA_TRY(check_no_overlap(cache, name, f->r->base.tensor[n], fgqa_arg_name((fgqa_arg)n)));
    }
    return FGQA_OK;
}

static fgqa_status check_append(const call_form *f)
{
    if (!f->k_new) { return FGQA_OK; }
    FGQA_TRY(check_written(f, f->k_cache, "k_cache"));
    FGQA_TRY(check_written(f, f->v_cache, "v_cache"));
    if (caches_intersect(f->k_cache, f->v_cache)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "v_cache overlaps k_cache: both are written; give each memory of its own");
    }
    return FGQA_OK;
}

static fgqa_status check_out(const call_form *f)
{
    const fgqa_tensor *out = f->r->base.tensor[FGQA_ARG_out];
    for (int n = 0; out && n < FGQA_CACHE_COUNT; n++) {
        if (f->r->tensor[n] && fgqa_tensors_overlap(out, f->r->tensor[n])) {
            const char *name = fgqa_cache_arg_name((fgqa_cache_arg)n);
            return fgqa_fail(FGQA_ERROR_VALUE, "out overlaps %s (their address ranges intersect): out is written while %s is in use; give out "
                             "memory of its own", name, name);
        }
    }
    return FGQA_OK;
}

/* ---- index arrays, rotary, scales ---- */

static fgqa_status read_vector(const call_form *f, fgqa_cache_arg arg, const char *fix, const int32_t **vector)
{
    const fgqa_tensor *t = f->r->tensor[arg];
    if (t == NULL) { return FGQA_OK; }
    FGQA_TRY(fgqa_check_vector(t, fgqa_cache_arg_name(arg), FGQA_I32, f->b, "[b]", fix));
    *vector = t->data;
    return FGQA_OK;
}

static fgqa_status read_table(const call_form *f, fgqa_cache *c)
{
    const fgqa_tensor *t = TENSOR(page_table);
    if (t == NULL) {
        c->table_stride = 1;
        return read_vector(f, FGQA_CACHE_batch_index, "give the row of the cache that each sequence has", &c->table);
    }
    if (t->dtype != FGQA_I32) {
        return fgqa_fail(FGQA_ERROR_TYPE, "page_table has dtype %s: it must be int32; convert it to int32", fgqa_dtype_name(t->dtype));
    }
    if (t->ndim != 2 || t->shape[0] != f->b) {
        return fgqa_fail(FGQA_ERROR_VALUE, "page_table has shape %s: it must be [b, pages of a sequence] = (%lld, any); give a row of page numbers "
                         "for each sequence", fgqa_shape_text(t).s, (long long)f->b);
    }
    c->table = t->data;
    c->table_stride = t->shape[1];      /* read contiguous */
    return FGQA_OK;
}

static int is_float(fgqa_dtype dtype) { return dtype == FGQA_F64 || dtype == FGQA_F32 || dtype == FGQA_F16 || dtype == FGQA_BF16; }

static fgqa_status read_angles(const call_form *f, fgqa_cache_arg arg, const char *name, fgqa_view *view)
{
    const fgqa_tensor *t = f->r->tensor[arg], *cos = TENSOR(rotary_cos);
    if (!is_float(t->dtype)) {
        return fgqa_fail(FGQA_ERROR_TYPE, "%s has dtype %s: it must be float16, bfloat16, float32 or float64; convert it to float32", name,
                         fgqa_dtype_name(t->dtype));
    }
    if (t->ndim != 2) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: it must have 2 dimensions, [positions, pairs]; give one row a position, one column a "
                         "rotated pair", name, fgqa_shape_text(t).s);
    }
    if (t->shape[1] < 1 || 2 * t->shape[1] > f->d) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s, %lld pairs: 1 to d / 2 = %lld can be rotated; give cos and sin once for each pair, not "
                         "once for each element", name, fgqa_shape_text(t).s, (long long)t->shape[1], (long long)f->d / 2);
    }
    if (t->shape[0] != cos->shape[0] || t->shape[1] != cos->shape[1]) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s but rotary[0] has %s: cos and sin must have one shape", name, fgqa_shape_text(t).s,
                         fgqa_shape_text(cos).s);
    }
    *view = (fgqa_view){t->data, t->dtype, 0, 0, t->shape[0] > 1 ? t->stride[0] : 0, t->shape[1] > 1 ? t->stride[1] : 1};
    return FGQA_OK;
}

static fgqa_status read_rotary(const call_form *f, fgqa_rotary *rotary)
{
    if (!TENSOR(rotary_cos)) { return FGQA_OK; }
    FGQA_TRY(read_angles(f, FGQA_CACHE_rotary_cos, "rotary[0] (cos)", &rotary->cos));
    FGQA_TRY(read_angles(f, FGQA_CACHE_rotary_sin, "rotary[1] (sin)", &rotary->sin));
    rotary->pairs = (int32_t)TENSOR(rotary_cos)->shape[1];
    rotary->positions = TENSOR(rotary_cos)->shape[0];
    rotary->interleaved = f->r->rotary_interleaved;
    return read_vector(f, FGQA_CACHE_rotary_offsets, "give the position of each sequence's first new token", &rotary->offsets);
}

static fgqa_status read_scale(const call_form *f, fgqa_cache_arg arg, fgqa_view *view)
{
    const fgqa_tensor *t = f->r->tensor[arg];
    const char *name = fgqa_cache_arg_name(arg);
    if (t == NULL) { return FGQA_OK; }
    if (f->k_cache->dtype != FGQA_F8E4M3) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s is given but the cache has dtype %s: scales belong to float8_e4m3 caches; leave it out", name,
                         fgqa_dtype_name(f->k_cache->dtype));
    }
    FGQA_TRY(check_dtype(t, name, FGQA_F32, "like every scale"));
    const int has_b = t->ndim == 2;
    if (!(t->ndim == 1 || has_b) || t->shape[t->ndim - 1] != f->hk || (has_b && t->shape[0] != f->b)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "%s has shape %s: it must be [hk] = (%lld,) or [b, hk] = (%lld, %lld); give one scale a KV head", name,
                         fgqa_shape_text(t).s, (long long)f->hk, (long long)f->b, (long long)f->hk);
    }
    *view = (fgqa_view){t->data, t->dtype, has_b && f->b > 1 ? t->stride[0] : 0, f->hk > 1 ? t->stride[t->ndim - 1] : 0, 0, 0};
    return FGQA_OK;
}

static fgqa_status read_cache(const call_form *f, fgqa_cache *c)
{
    memset(c, 0, sizeof *c);
    c->page_size = f->slots > 0 ? (int32_t)f->slots : 1;
    c->slots = (int32_t)f->slots;
    c->new_max = (int32_t)f->n_new;
    c->pages = (int32_t)f->pages;
    FGQA_TRY(read_table(f, c));
    c->capacity = f->pages > 0 ? fgqa_clamp(f->paged ? f->slots * TENSOR(page_table)->shape[1] : f->slots, 0, INT32_MAX) : 0;
    FGQA_TRY(read_vector(f, FGQA_CACHE_cache_lens, "give the number of slots in use of each sequence", &c->lens));
    FGQA_TRY(read_vector(f, FGQA_CACHE_new_lens, "give the number of new keys of each sequence", &c->new_lens));
    FGQA_TRY(read_vector(f, FGQA_CACHE_left_pad, "give the number of empty slots before each sequence", &c->left_pad));
    FGQA_TRY(read_rotary(f, &c->rotary));
    FGQA_TRY(read_scale(f, FGQA_CACHE_k_scale, &c->k_scale));
    return read_scale(f, FGQA_CACHE_v_scale, &c->v_scale);
}

/* ---- lowering ---- */

/* As [b or page, h, s, d]; strides of axes of extent 1 as fgqa_view wants them. */
static fgqa_view view_of(const call_form *f, const fgqa_tensor *t)
{
    int64_t stride[4];
    if (t == NULL) { return (fgqa_view){0}; }
    for (int n = 0; n < 4; n++) { stride[n] = extent(f, t, n) == 1 ? n == D : t->stride[f->axis[n]]; }
    return (fgqa_view){t->data, t->dtype, stride[B], stride[H], stride[S], stride[D]};
}

/* q and what any forward pass has, over keys and values of the right form that take no memory of their own. */
static fgqa_status init_forward(const call_form *f, fgqa_problem *p)
{
    fgqa_request base = f->r->base;
    fgqa_tensor k = *f->q, v;
    for (int n = 0; n < 4; n++) { k.stride[n] = 0; }
    k.shape[f->axis[H]] = f->hk;
    k.shape[f->axis[S]] = 1;
    v = k;
    v.shape[f->axis[D]] = f->dv;
    base.pass = FGQA_PASS_FWD;
    base.tensor[FGQA_ARG_k] = &k;
    base.tensor[FGQA_ARG_v] = &v;
    return fgqa_problem_init(&base, p);
}

static void count_keys(fgqa_problem *p)
{
    p->sk = 0;
    p->total_k = 0;
    for (int32_t n = 0; n < p->b; n++) {
        const int32_t keys = fgqa_problem_sequence(p, n).mask.sk;
        p->sk = keys > p->sk ? keys : p->sk;
        p->total_k += keys;
    }
}

fgqa_status fgqa_cache_init(const fgqa_cache_request *r, fgqa_problem *problem)
{
    const int bshd = r->base.layout == FGQA_LAYOUT_BSHD;
    call_form form = {.r = r, .q = r->base.tensor[FGQA_ARG_q], .k_cache = r->tensor[FGQA_CACHE_k_cache], .v_cache = r->tensor[FGQA_CACHE_v_cache],
                      .k_new = r->tensor[FGQA_CACHE_k_new], .v_new = r->tensor[FGQA_CACHE_v_new],
                      .axis = {0, bshd ? 2 : 1, bshd ? 1 : 2, 3}, .paged = r->tensor[FGQA_CACHE_page_table] != NULL};
    call_form *f = &form;
    fgqa_problem p;
    fgqa_cache cache;
    FGQA_TRY(fgqa_check_extents(f->q, "q"));
    FGQA_TRY(check_together(f));
    for (int n = 0; n < FGQA_CACHE_COUNT; n++) { FGQA_TRY(check_array(f, r->tensor[n], fgqa_cache_arg_name((fgqa_cache_arg)n))); }
    FGQA_TRY(check_shapes(f));
    FGQA_TRY(read_cache(f, &cache));
    FGQA_TRY(init_forward(f, &p));
    FGQA_TRY(check_dtypes(f));
    FGQA_TRY(check_append(f));
    FGQA_TRY(check_out(f));
    cache.k_new = view_of(f, f->k_new);
    cache.v_new = view_of(f, f->v_new);
    p.cache = cache;
    p.view[FGQA_ARG_k] = view_of(f, f->k_cache);
    p.view[FGQA_ARG_v] = view_of(f, f->v_cache);
    if (p.device.type == FGQA_CPU) {
        FGQA_TRY(fgqa_check_cache_contents(&p, f->pages, f->paged ? f->slots * TENSOR(page_table)->shape[1] : f->slots, f->paged));
        count_keys(&p);
    } else {      /* lengths are on the device: as many keys as there can be */
        if (cache.rotary.pairs > 0 && cache.rotary.positions < 1) {
            return fgqa_fail(FGQA_ERROR_VALUE, "rotary has 0 positions: give one row of cos and sin for each position a key or query can have");
        }
        p.sk = p.cache.capacity;
        p.total_k = (int64_t)p.b * p.sk;
    }
    *problem = p;
    return FGQA_OK;
}
