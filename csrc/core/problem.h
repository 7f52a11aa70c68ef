/* problem.h - one attention call as plain C data.
 *
 * A request is what the caller gave: tensors of any rank and layout, and options. fgqa_problem_init() checks all of it
 * (problem.c holds every check, with its sentence) and lowers it to a problem: views of [b, h, s, d], one mask rule,
 * no Python, no layout. From there on nothing can be wrong with the arguments; kernels read the problem only.
 */
#ifndef FGQA_PROBLEM_H
#define FGQA_PROBLEM_H
#include "semantics.h"
#include "status.h"
#include "tensor.h"

#define FGQA_MAX_HEAD_DIM 256   /* of q, k and of v */

typedef enum {
    FGQA_PASS_FWD,      /* q k v -> out, lse */
    FGQA_PASS_BWD,      /* dout q k v out lse (dlse) -> dq dk dv (dbias) (dsink) */
    FGQA_PASS_ROWS,     /* q k, rows -> weights [b, hq, rows, sk] of chosen query rows */
    FGQA_PASS_KEYSUM    /* q k -> weights summed over query rows, [b, hq, sk] */
} fgqa_pass;

/* Every tensor a call can carry: the enum FGQA_ARG_<name>, and the name users know it by. Inputs first, then results. */
#define FGQA_INPUTS(X) \
    X(q) X(k) X(v) X(mask) X(bias) X(alibi_slopes) X(sink) \
    X(q_lens) X(kv_lens) X(cu_seqlens_q) X(cu_seqlens_kv) X(seed) X(rows) \
    X(dout) X(dlse)
/* out and lse are results of FWD and inputs of BWD; weights is the result of ROWS and KEYSUM. */
#define FGQA_RESULTS(X) X(out) X(lse) X(dq) X(dk) X(dv) X(dbias) X(dsink) X(weights)

typedef enum {
#define FGQA_ARG_ENUM(name) FGQA_ARG_##name,
    FGQA_INPUTS(FGQA_ARG_ENUM)
    FGQA_RESULTS(FGQA_ARG_ENUM)
#undef FGQA_ARG_ENUM
    FGQA_ARG_COUNT
} fgqa_arg;

const char *fgqa_arg_name(fgqa_arg arg);

typedef enum { FGQA_LAYOUT_BHSD, FGQA_LAYOUT_BSHD } fgqa_layout;
typedef enum { FGQA_ALIGN_BOTTOM_RIGHT, FGQA_ALIGN_TOP_LEFT } fgqa_align;
typedef enum { FGQA_PRECISION_DEFAULT, FGQA_PRECISION_BF16X3 } fgqa_precision;

/* What the caller asked for, unchecked. Absent tensors are NULL. Zero-initialised, then the fields below set. */
typedef struct {
    fgqa_pass pass;
    const fgqa_tensor *tensor[FGQA_ARG_COUNT];
    int32_t causal;
    int64_t window_left, window_right;      /* FGQA_UNBOUNDED: no bound */
    fgqa_align align;
    int32_t has_chunk;                      /* the caller named a chunk: then 0 is an error, too */
    int64_t chunk;                          /* 0: off */
    int32_t has_scale, has_softcap;
    double scale, softcap;
    int64_t max_q, max_kv;                  /* varlen upper bounds; -1: not given */
    double dropout_p;
    int32_t has_seed;                       /* seed and offset given as integers (not the tensor) */
    uint64_t seed, offset;
    int32_t layout_given;                   /* whether the caller named a layout (an error with cu_seqlens) */
    fgqa_layout layout;
    fgqa_precision precision;
    int32_t want_lse, want_dbias, want_dsink;
    int32_t deterministic, batch_invariant, check;
} fgqa_request;

/* A tensor seen as [b, h, s, d] whatever its rank and layout; strides in elements, 0 where broadcast.
 * lse/dlse: stride_d unused. mask/bias/dbias: s = query row, d = key. alibi_slopes, sink, dsink: b and h only.
 * weights: s = n-th chosen row (KEYSUM: unused), d = key. Strides of axes of extent 1 are 0; so is
 * stride_d of mask, bias and dbias, while that of all others is 1 then.
 * With cu_seqlens stride_b is 0 and sequence b starts at row cu_seqlens[b]. data is NULL when absent. */
typedef struct {
    void *data;
    fgqa_dtype dtype;
    int64_t stride_b, stride_h, stride_s, stride_d;
} fgqa_view;

/* Rotary embedding of q and of new keys: pair n of a row at position t turns by the angle whose cosine is cos[t][n]. */
typedef struct {
    int32_t pairs;                          /* 0: none */
    int32_t interleaved;
    fgqa_view cos, sin;                     /* s = position, d = pair */
    int64_t positions;                      /* rows of cos and sin */
    const int32_t *offsets;                 /* [b] position of the first new token; NULL: the number of keys before it */
} fgqa_rotary;

/* A KV cache. k and v of the problem are then views of pages, [page, hk, slot, d], and slot s of sequence n is slot
 * s % page_size of page table[n*table_stride + s/page_size]. A contiguous cache is one page a sequence.
 * Of a sequence, keys j = 0.. are the slots from left_pad on, up to all that are in the cache once the new ones are. */
typedef struct {
    int32_t page_size;                      /* 0: no cache */
    const int32_t *table;                   /* NULL: sequence n is page n */
    int64_t table_stride;
    const int32_t *lens;                    /* [b] slots in use before the append; NULL: `slots` */
    int32_t slots;                          /* of a sequence of a contiguous cache */
    int32_t pages;                          /* in all: what an entry of the table must be below */
    int32_t capacity;                       /* slots that a sequence can have */
    const int32_t *left_pad;                /* [b] slots at the beginning that hold nothing; NULL: none */
    const int32_t *new_lens;                /* [b]; NULL: new_max for all */
    int32_t new_max;                        /* rows of k_new and v_new; 0: nothing is appended */
    fgqa_view k_new, v_new;
    fgqa_view k_scale, v_scale;             /* float32, b and h only: cached value = element * scale. data NULL: 1 */
    fgqa_rotary rotary;
} fgqa_cache;

typedef struct {
    fgqa_pass pass;
    fgqa_dtype dtype;                       /* of q, k, v and their gradients */
    fgqa_dtype lse_dtype;                   /* float32, or float64 for float64 inputs */
    fgqa_device device;
    int32_t b, hq, hk, g;                   /* g = hq / hk */
    int32_t sq, sk;                         /* padded lengths; with cu_seqlens the largest ones (or max_q, max_kv) */
    int32_t d, dv;
    int32_t rank;                           /* 3 or 4, as the caller's */
    fgqa_layout layout;
    int32_t varlen;                         /* cu_seqlens given: tensors are [total, h, d] */
    int64_t total_q, total_k;               /* rows of q and of k over the whole batch */
    int32_t n_rows;                         /* ROWS: how many query rows */

    fgqa_view view[FGQA_ARG_COUNT];         /* indexed by fgqa_arg; lengths and rows are read through the fields below */

    const int32_t *q_lens, *kv_lens;        /* [b] or NULL */
    const int32_t *cu_seqlens_q, *cu_seqlens_kv;   /* [b+1] or NULL */
    const int64_t *rows;                    /* [n_rows], ROWS only */

    int32_t left, right, chunk;             /* the mask rule; causal is already folded into right */
    fgqa_align align;
    double scale;                           /* the default 1/sqrt(d) already filled in */
    double softcap;                         /* 0: off */
    uint32_t dropout_threshold;             /* round(65536*p); 0: no dropout */
    uint64_t seed, offset;
    const int64_t *seed_on_device;          /* int64[2] read by the kernel instead of seed/offset; NULL on the CPU */
    fgqa_precision precision;
    int32_t want_lse, want_dbias, want_dsink, deterministic, batch_invariant, check;

    /* dbias is reduced over the dimensions in which bias is broadcast (its extent is 1 there): */
    int32_t bias_shape[4];                  /* extents of [b, hq, sq, sk] in bias: 1 or full */
    int32_t bias_rank;                      /* 2, 3 or 4: the last axes of [b, hq, sq, sk] are the caller's; 0: no bias */

    fgqa_cache cache;                       /* made by fgqa_cache_init() (cache.h) only */
} fgqa_problem;

/* Sequence n of a cache, host pointers: slots in use before the append, slots appended, slots left out. */
static inline int32_t fgqa_cache_before(const fgqa_cache *c, int32_t n) { return c->lens ? c->lens[n] : c->slots; }
static inline int32_t fgqa_cache_new(const fgqa_cache *c, int32_t n) { return c->new_lens ? c->new_lens[n] : c->new_max; }
static inline int32_t fgqa_cache_pad(const fgqa_cache *c, int32_t n) { return c->left_pad ? c->left_pad[n] : 0; }

static inline int64_t fgqa_cache_page(const fgqa_cache *c, int32_t n, int32_t slot)
{
    return c->table ? c->table[n * c->table_stride + slot / c->page_size] : n;
}

/* Position of the token in slot `slot` of sequence n for the rotary embedding: consecutive, also before the first new one. */
static inline int64_t fgqa_rotary_position(const fgqa_cache *c, int32_t n, int64_t slot)
{
    return c->rotary.offsets ? c->rotary.offsets[n] + slot - fgqa_cache_before(c, n) : slot;
}

/* Where one sequence of the batch lies and what it sees. q_row/k_row are offsets in rows (units of stride_s); of a cache, k_row
 * is a slot. */
typedef struct { int64_t q_row, k_row; fgqa_mask mask; } fgqa_sequence;

/* Sequence b of the batch. Host pointers only (the CPU backend); CUDA kernels do the same from device memory. */
static inline fgqa_sequence fgqa_problem_sequence(const fgqa_problem *p, int32_t b)
{
    fgqa_sequence s = {0, 0, {p->sq, p->sk, 0, p->left, p->right, p->chunk}};
    if (p->cu_seqlens_q) {
        s.q_row = p->cu_seqlens_q[b];
        s.k_row = p->cu_seqlens_kv[b];
        s.mask.sq = p->cu_seqlens_q[b + 1] - p->cu_seqlens_q[b];
        s.mask.sk = p->cu_seqlens_kv[b + 1] - p->cu_seqlens_kv[b];
    }
    if (p->q_lens) { s.mask.sq = p->q_lens[b]; }
    if (p->kv_lens) { s.mask.sk = p->kv_lens[b]; }
    if (p->cache.page_size) {
        s.k_row = fgqa_cache_pad(&p->cache, b);
        s.mask.sk = (int32_t)(fgqa_cache_before(&p->cache, b) + fgqa_cache_new(&p->cache, b) - s.k_row);
    }
    s.mask.diag = p->align == FGQA_ALIGN_BOTTOM_RIGHT ? s.mask.sk - s.mask.sq : 0;
    return s;
}

/* Checks the request and fills the problem. Results present in the request (out= and the out, lse of BWD) are checked
 * and bound; absent ones are described by fgqa_problem_result() and bound by fgqa_problem_bind().
 * On failure the message names argument, value, rule and fix; nothing has been written anywhere. */
fgqa_status fgqa_problem_init(const fgqa_request *request, fgqa_problem *problem);

/* Of mask or bias, which are as wide as the longest sequence: their extent in the axis `from_end`; 0 if they are not there, or
 * are broadcast. */
int64_t fgqa_score_extent(const fgqa_request *request, int32_t from_end);

/* Fills dtype, device, ndim, shape and contiguous strides of a result of this pass, in the caller's rank and layout.
 * Returns 0 (spec untouched) if this pass does not produce it: no lse wanted, no bias, ... */
int fgqa_problem_result(const fgqa_problem *problem, fgqa_arg result, fgqa_tensor *spec);

/* Points the problem's view of a result at storage that matches its spec (any strides). */
void fgqa_problem_bind(fgqa_problem *problem, fgqa_arg result, const fgqa_tensor *storage);

#endif
