/* launch.c - the CUDA backend's table of kernels, made from kernels.def: which row can run a
 * problem, in what tiles, and its launch. */
#include "device.h"
#include "kernel_table.h"
#include "tensor_map.h"
#include "tile_height.h"
#include "any/bwd_plan.h"
#include "any/cache_copy.h"
#include "any/fwd_split.h"
#include "any/score_units.h"
#include "any/term_copy.h"
#include "any/weights.h"
#include "sm90/bwd_short.h"
#include "sm90/dec_work.h"
#include "sm90/fwd_pack.h"

#include <cuda_runtime_api.h>
#include <float.h>
#include <math.h>

enum { HOPPER = 90, DECODE_ROWS = 128, CACHE_PAGE = 16, DECODE_KEYS = 256, STREAM_ROWS = 64, MOST_PARTS = 16,
       COPY_ROWS = 32, UNCOPIED_ROWS = 256, COPY_BYTES = 1 << 29 };

/* Of a copy of a bias or a mask. What it takes, as a memory stream and as a launch, in picoseconds. */
#define TERM_COPY_BYTES 2147483648.0
#define TERM_COPY_BYTE_PS 0.75
#define TERM_COPY_LAUNCH_PS 4e6

/* ---- the rows ---- */

typedef struct {
    fgqa_cuda_row row;
    int32_t variant;        /* FGQA_VARIANT_.. */
    fgqa_cuda_launch *launch;
    fgqa_cuda_smem *smem;
} cuda_kernel;

#define FGQA_KERNEL(pass, arch, dtype, d, dv, block_q, block_k, stages, warps, variant) \
    fgqa_cuda_launch FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant);                   \
    fgqa_cuda_smem FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _smem);
#include "kernels.def"
#undef FGQA_KERNEL

#define IS_GENERAL(variant) (FGQA_VARIANT_##variant == FGQA_VARIANT_general || FGQA_VARIANT_##variant == FGQA_VARIANT_cache)
#define IS_FLOAT8(variant) (FGQA_VARIANT_##variant == FGQA_VARIANT_decodef8 || FGQA_VARIANT_##variant == FGQA_VARIANT_decodewidef8)
#define IS_DECODE(variant) (FGQA_VARIANT_##variant == FGQA_VARIANT_decode || FGQA_VARIANT_##variant == FGQA_VARIANT_decodewide || IS_FLOAT8(variant))
#define READS_CACHE(pass, arch, variant) (FGQA_VARIANT_##variant == FGQA_VARIANT_cache || IS_FLOAT8(variant) ? FGQA_CACHE_ONLY \
    : FGQA_PASS_##pass == FGQA_PASS_FWD && arch == HOPPER && FGQA_VARIANT_##variant != FGQA_VARIANT_dropout && FGQA_VARIANT_##variant != FGQA_VARIANT_short \
    ? FGQA_CACHE_ALSO : FGQA_CACHE_NEVER)
#define FGQA_KERNEL(pass, arch, dtype, d, dv, block_q, block_k, stages, warps, variant)                                                        \
    {{FGQA_PASS_##pass, arch, FGQA_DTYPE_##dtype, d, dv, block_q, block_k, stages, warps, IS_GENERAL(variant), \
      IS_DECODE(variant) ? block_q : 0, READS_CACHE(pass, arch, variant), IS_FLOAT8(variant), \
      FGQA_VARIANT_##variant == FGQA_VARIANT_dropout}, FGQA_VARIANT_##variant, \
     FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _smem)},
static const cuda_kernel rows[] = {
#include "kernels.def"
};
#undef FGQA_KERNEL

/* Why a row that has them cannot serve a bias and a mask tensor. */
static const char *refuse_terms(const fgqa_problem *p)
{
    const fgqa_view *bias = &p->view[FGQA_ARG_bias];
    if (p->cache.page_size > 0) { return "bias or mask with a KV cache"; }
    return bias->data && bias->dtype != p->dtype && bias->dtype != FGQA_F32 ? "bias that is neither float32 nor of q's dtype" : NULL;
}

/* The same in the backward: of rows that read a bias by TMA, and of those that read any. */
static const char *refuse_bias(const fgqa_problem *p, int any)
{
    const char *reason = refuse_terms(p);
    if (reason) { return reason; }
    if (!any && p->view[FGQA_ARG_bias].stride_d != 1) { return "bias whose keys are not side by side"; }
    const int own = p->bias_shape[2] == p->sq && p->bias_shape[3] == p->sk;
    return p->want_dbias && !own ? "gradient of a bias that query rows or keys share" : NULL;
}

/* What rows have that are not general, beside masks by interval, lengths and sinks. */
typedef struct {
    int softcap, alibi;     /* in the forward each, not both */
    int all;                /* forward: softcap, ALiBi, a bias and a mask tensor in any mix */
    int keys_mask;          /* a mask tensor that all query rows share */
    int bits;               /* dropout; backward, a mask tensor, too, beside whatever else */
    int bias;               /* backward, by TMA */
    int any_bias;           /* backward, wherever its elements lie */
    int natural;            /* decode: softcap and ALiBi, each or both, scores in natural units */
} row_options;

/* Why a row with these cannot serve; NULL if it can. */
static const char *refuse_options(const fgqa_problem *p, row_options has)
{
    if (p->view[FGQA_ARG_mask].data || p->view[FGQA_ARG_bias].data) {
        const char *reason = has.all ? refuse_terms(p) : p->view[FGQA_ARG_mask].data && !has.bits && !(has.keys_mask && p->view[FGQA_ARG_mask].stride_s == 0) ? "mask"
            : !p->view[FGQA_ARG_bias].data ? NULL : has.bias || has.any_bias ? refuse_bias(p, has.any_bias) : "bias";
        if (reason) { return reason; }
    }
    if (p->view[FGQA_ARG_alibi_slopes].data && !has.natural && !has.all) {
        if (!has.alibi) { return "alibi_slopes"; }
        if (p->softcap != 0.0 && p->pass == FGQA_PASS_FWD) { return "alibi_slopes with softcap"; }
    }
    if (p->softcap != 0.0 && !has.softcap && !has.natural) { return "softcap"; }
    if (p->softcap != 0.0 && !has.natural && fgqa_in_caps(p) == 0.0f) { return "softcap whose ratio to the scale, or double, leaves float32"; }
    if (p->dropout_threshold != 0 && !has.bits) { return "dropout"; }
    if (!(p->scale >= FLT_MIN && p->scale <= FLT_MAX)) { return "a scale that is not positive"; }
    return NULL;
}

static int is_vector(const fgqa_problem *p, fgqa_arg arg)
{
    const fgqa_view *v = &p->view[arg];
    const int64_t bytes = v->dtype == FGQA_F8E4M3 ? 1 : (int64_t)fgqa_dtype_bytes(p->dtype);
    return (uintptr_t)v->data % 16 == 0 && v->stride_b * bytes % 16 == 0 && v->stride_h * bytes % 16 == 0 && v->stride_s * bytes % 16 == 0;
}

/* Why a row cannot run on this device, whatever the problem. */
static const char *refuse_device(const cuda_kernel *k, int32_t index, char why[128])
{
    fgqa_cuda_properties device;
    if (fgqa_cuda_device_properties(index, &device) != FGQA_OK) {
        return fgqa_reason(why, "%.127s", fgqa_message());
    }
    const int own = k->row.arch == HOPPER;         /* wgmma exists on 9.0 alone */
    if (own ? device.capability != k->row.arch : device.capability < k->row.arch) {
        return fgqa_reason(why, "needs compute capability %d.%d", k->row.arch / 10, k->row.arch % 10);
    }
    const int32_t smem = k->smem();
    if (smem < 0) {
        return fgqa_reason(why, "this build has no code for compute capability %d.%d", k->row.arch / 10, k->row.arch % 10);
    }
    if (smem > device.smem_per_block) {
        return fgqa_reason(why, "needs %d bytes of shared memory a block, the device has %d", smem, device.smem_per_block);
    }
    return NULL;
}

static int is_paged(const fgqa_problem *p) { return p->cache.table != NULL && p->cache.page_size < p->cache.capacity; }

static int is_hopper_forward(const cuda_kernel *k) { return k->row.arch == HOPPER && k->row.pass == FGQA_PASS_FWD && !k->row.most_rows; }

/* A row whose blocks share a multiprocessor, for short sequences. */
static int is_short(const cuda_kernel *k) { return k->variant == FGQA_VARIANT_short; }

static row_options options_of(const cuda_kernel *k)
{
    const fgqa_cuda_row *row = &k->row;
    const int whole = fgqa_bwd_is_whole(row), backward = row->arch == HOPPER && row->pass == FGQA_PASS_BWD && !whole, forward = is_hopper_forward(k);
    return (row_options){.softcap = backward || (forward && FGQA_HAS_SOFTCAP(row->block_q)), .alibi = backward || (forward && FGQA_HAS_ALIBI(row->d, row->block_q)),
                         .all = forward && FGQA_HAS_ALL(row->d, row->block_k), .keys_mask = whole, .bits = backward || row->dropout, .bias = backward && FGQA_BWD_HAS_BIAS(row->d),
                         .any_bias = backward && !FGQA_BWD_HAS_BIAS(row->d), .natural = row->most_rows > 0};
}

/* Whether a plain row for Hopper reads a copy of the cache, which TMA can address, in q's dtype. */
static int copies_cache(const cuda_kernel *k, const fgqa_problem *p)
{
    if (!is_hopper_forward(k) || p->cache.page_size == 0) { return 0; }
    const int float8 = p->view[FGQA_ARG_k].dtype == FGQA_F8E4M3 || p->view[FGQA_ARG_v].dtype == FGQA_F8E4M3;
    return float8 || (is_paged(p) && (p->cache.page_size % CACHE_PAGE != 0 || p->cache.left_pad));
}

/* What reading rows on 16 bytes saves of a score, in picoseconds of an H100: LOG.md. A bias that TMA does not
 * bring is not for a backward row at all. */
static double saved_by_term_copy(const cuda_kernel *k, const fgqa_problem *p, int which)
{
    if (which == FGQA_COPY_MASK) { return p->pass == FGQA_PASS_BWD ? 0.3 : 2.3; }
    return p->pass == FGQA_PASS_BWD ? HUGE_VAL : k->row.d <= 64 ? 0.9 : k->row.d <= 128 ? 0.6 : 1.8;
}

/* Which of a bias and a mask are copied to rows on 16 bytes (any/term_copy.h). What has to be the same in every batch must not
 * depend on the memory that a copy takes. */
static int copies_terms(const cuda_kernel *k, const fgqa_problem *p)
{
    const row_options has = options_of(k);
    const int backward = p->pass == FGQA_PASS_BWD;
    int which = 0;
    if (k->row.arch != HOPPER || p->cache.page_size > 0 || p->batch_invariant) { return 0; }
    for (int of = FGQA_COPY_BIAS; of <= FGQA_COPY_MASK; of *= 2) {
        const fgqa_arg arg = fgqa_copied_term(of);
        if (!(backward ? of == FGQA_COPY_BIAS ? has.bias : has.bits : has.all) || !fgqa_term_is_off(&p->view[arg], backward && of == FGQA_COPY_MASK ? 8 : 16)) { continue; }
        const double bytes = fgqa_term_copy_bytes(p, arg), rows = p->varlen ? (double)p->total_q : (double)p->b * p->sq;
        const double scores = rows * p->hq * p->sk * (p->right != FGQA_UNBOUNDED || p->left != FGQA_UNBOUNDED || p->chunk > 0 ? 0.5 : 1.0);
        if (bytes <= TERM_COPY_BYTES && saved_by_term_copy(k, p, of) * scores > TERM_COPY_BYTE_PS * bytes + TERM_COPY_LAUNCH_PS) { which |= of; }
    }
    return which;
}

/* What the backward rows for Hopper cannot address. */
static const char *refuse_hopper_backward(const cuda_kernel *k, const fgqa_problem *p, char why[128])
{
    static const fgqa_arg tensors[] = {FGQA_ARG_q, FGQA_ARG_k, FGQA_ARG_v, FGQA_ARG_dout, FGQA_ARG_bias};
    for (int n = 0; n < 5; n++) {
        const int skips = tensors[n] == FGQA_ARG_bias && (!p->view[FGQA_ARG_bias].data || !FGQA_BWD_HAS_BIAS(k->row.d) || copies_terms(k, p) & FGQA_COPY_BIAS);
        const char *reason = skips ? NULL : fgqa_tensor_map_refuse(p, tensors[n]);
        if (reason) {
            return fgqa_reason(why, "%s: %s", fgqa_arg_name(tensors[n]), reason);
        }
    }
    /* Tasks are counted in 32 bits. Of packed sequences the longest is not known here, all
     * together are. Splits: if they are few. */
    const double sections = (double)p->b * p->hk + 2048, key_tiles = (double)(p->varlen ? p->total_k : p->sk) / k->row.block_k + 1;
    const double query_tiles = (double)p->b * p->hq * ((double)p->sq / k->row.block_q + 1);
    return sections * key_tiles > INT32_MAX || query_tiles > INT32_MAX ? "too many tiles" : NULL;
}

/* Scales of a float8 cache are not in its copy, where they would be rounded with every element: they go to scores and results. */
static int has_scales(const fgqa_problem *p) { return p->cache.k_scale.data || p->cache.v_scale.data; }

/* Why there can be no copy that a row reads: options that no row has together, and memory that nobody expects a call to take. */
static const char *refuse_copy(const fgqa_problem *p)
{
    fgqa_problem copy;
    if (p->sk < 1) { return "a cache without slots"; }
    if (p->view[FGQA_ARG_k].stride_d != 1 || p->view[FGQA_ARG_v].stride_d != 1) { return "elements of a row are not side by side"; }
    if (has_scales(p) && p->softcap != 0.0) { return "has no softcap with k_scale or v_scale"; }
    if (has_scales(p) && p->view[FGQA_ARG_alibi_slopes].data) { return "has no alibi_slopes with k_scale or v_scale"; }
    return (double)p->b * p->hk * p->sk > COPY_BYTES || fgqa_cache_copy(p, NULL, &copy) > COPY_BYTES ? "a copy of the cache would take more than 512 MiB" : NULL;
}

/* Where rows that read the cache as it is serve better: few query rows; and what must not
 * depend on the batch, as the copy's size does. */
static const char *pass_over_copy(const fgqa_problem *p, char why[128])
{
    if (p->batch_invariant) { return "whether the cache can be copied would depend on the batch"; }
    return (int64_t)p->sq * p->g <= COPY_ROWS ? fgqa_reason(why, "%d query rows: too few to copy the cache for", p->sq) : NULL;
}

/* What TMA cannot address of a cache. */
static const char *refuse_cache(const cuda_kernel *k, const fgqa_problem *p, char why[128])
{
    static const fgqa_arg tensors[] = {FGQA_ARG_k, FGQA_ARG_v};
    if (p->sk < 1) { return "a cache without slots"; }
    if (is_paged(p) && p->cache.page_size % CACHE_PAGE != 0) {
        return fgqa_reason(why, "pages of a multiple of %d slots", CACHE_PAGE);
    }
    for (int n = 0; n < 2; n++) {
        const char *reason = p->view[tensors[n]].dtype != (k->row.float8 ? FGQA_F8E4M3 : p->dtype) ? "another dtype than q"
            : p->view[tensors[n]].stride_d != 1 ? "elements of a row are not side by side" : fgqa_tensor_map_refuse(p, tensors[n]);
        if (reason) {
            return fgqa_reason(why, "%s: %s", fgqa_arg_name(tensors[n]), reason);
        }
    }
    return NULL;
}

/* What TMA cannot address. A result that is still to be allocated will do. */
static const char *refuse_tensors(const cuda_kernel *k, const fgqa_problem *p, char why[128])
{
    static const fgqa_arg tensors[] = {FGQA_ARG_q, FGQA_ARG_out, FGQA_ARG_k, FGQA_ARG_v};
    const int copies = copies_cache(k, p);
    if (p->cache.page_size > 0) {
        const char *reason = copies ? refuse_copy(p) : refuse_cache(k, p, why);
        if (reason) { return reason; }
        if (has_scales(p) && !FGQA_HAS_SCALES(k->row.d, k->row.block_q)) { return "has no k_scale or v_scale"; }
    }
    for (int n = 0; n < (copies ? 2 : 4); n++) {
        const char *reason = tensors[n] == FGQA_ARG_out && p->view[FGQA_ARG_out].data == NULL ? NULL : fgqa_tensor_map_refuse(p, tensors[n]);
        if (reason) {
            return fgqa_reason(why, "%s: %s", fgqa_arg_name(tensors[n]), reason);
        }
    }
    if (p->dv % 8 != 0) { return "stores results whose head dim is a multiple of 8"; }
    return fgqa_hopper_tiles(p, k->row.block_q) > INT32_MAX / 2 ? "too many tiles" : NULL;
}

/* What a decode row cannot address. */
static const char *refuse_decode(const cuda_kernel *k, const fgqa_problem *p, char why[128])
{
    const int64_t rows = (int64_t)p->sq * p->g, granules = ((int64_t)p->sk + k->row.block_k - 1) / k->row.block_k + 1;
    if (p->varlen) { return "has no packed sequences"; }
    if (k->row.most_rows < DECODE_ROWS && rows > k->row.most_rows) {
        return fgqa_reason(why, "up to %d query rows of a KV head", k->row.most_rows);
    }
    const char *reason = refuse_cache(k, p, why);
    if (reason) { return reason; }
    /* counted in 32 bits, slots of the last granule included */
    return (double)(rows / k->row.block_q + 1) * p->hk * p->b * (double)granules > INT32_MAX / 2 || p->sk > INT32_MAX - 4096 ? "too many keys" : NULL;
}

/* Whether query rows leave tiles of block_q mostly empty: tiles shared by groups of any
 * size, not by powers of two, would be fuller. */
static int leaves_tiles_empty(const fgqa_problem *p, int32_t block_q)
{
    const int32_t pack = fgqa_hopper_pack(p, block_q);
    const int64_t usual = fgqa_usual_rows(p), own = ((usual << pack) + block_q - 1) / block_q * (p->g >> pack);
    return own > 2 * ((usual * p->g + block_q - 1) / block_q);
}

/* Whether blocks of the tiles' row merge the parts of their keys themselves, however many, and
 * there is a part for every multiprocessor. */
static int merges_many_parts(const cuda_kernel *k, const fgqa_problem *p, int32_t multiprocessors)
{
    const int64_t parts = p->sk / (FGQA_MIN_TILES_PER_SPLIT * DECODE_ROWS);
    return FGQA_HAS_MERGE(k->row.d, DECODE_ROWS) && p->softcap == 0.0 && !p->view[FGQA_ARG_alibi_slopes].data && p->left == FGQA_UNBOUNDED
        && parts * p->b * p->hk >= multiprocessors;
}

/* Where other rows are faster than a decode row. */
static const char *pass_over_decode(const cuda_kernel *k, const fgqa_problem *p, char why[128])
{
    fgqa_cuda_properties device;
    const int takes_options = !refuse_options(p, (row_options){.softcap = 1, .alibi = 1, .all = 1});      /* rows for many query rows */
    const int tiles_serve = takes_options && !k->row.float8 && !(is_paged(p) && p->cache.left_pad) && !p->batch_invariant
        && p->g >> fgqa_hopper_pack(p, DECODE_ROWS) == 1;
    const int64_t heads = (int64_t)p->b * p->hk, rows = (int64_t)p->sq * p->g;
    if (tiles_serve && rows >= STREAM_ROWS && fgqa_cuda_device_properties(p->device.index, &device) == FGQA_OK
        && (rows > STREAM_ROWS ? merges_many_parts(k, p, device.multiprocessors) || MOST_PARTS * heads >= device.multiprocessors
            : k->row.d > 64 && 3 * heads >= 2 * (int64_t)device.multiprocessors)) {
        return fgqa_reason(why, "%d query rows: tiles hold them, their keys in few parts or merged in place", p->sq);
    }
    if (rows > (k->row.float8 ? UNCOPIED_ROWS : DECODE_ROWS)) {
        const int copy_serves = takes_options && !refuse_copy(p) && !pass_over_copy(p, NULL) && !leaves_tiles_empty(p, DECODE_ROWS);
        if (!k->row.float8 || copy_serves) { return fgqa_reason(why, "%d query rows: more than a memory stream can serve", p->sq); }
    }
    if (p->sk < DECODE_KEYS) {
        return fgqa_reason(why, "%d keys: too few to be streamed", p->sk);
    }
    return NULL;
}

/* The row of a variant for the pass, dtype and head dims of row k, behind which it stands (tests/test_layering.py): the first row
 * that serves runs. Short rows have a tall and a plain one, tall rows a plain one. */
static const cuda_kernel *row_behind(const cuda_kernel *k, int32_t variant)
{
    for (const cuda_kernel *other = k + 1; other < rows + sizeof rows / sizeof rows[0]; other++) {
        if (other->variant == variant && other->row.pass == k->row.pass && other->row.arch == k->row.arch && other->row.dtype == k->row.dtype
            && other->row.d == k->row.d && other->row.dv == k->row.dv) {
            return other;
        }
    }
    return NULL;
}

/* Where the rows of sm80/, at about half of Hopper's speed, gain more: tiles are shared by
 * groups of any size, not by powers of two. */
static const char *pass_over(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    const cuda_kernel *k = kernel->row;
    if (k->row.arch != HOPPER || k->row.pass != FGQA_PASS_FWD) { return NULL; }
    if (k->row.most_rows) { return pass_over_decode(k, p, why); }
    if (is_short(k)) {
        const cuda_kernel *tall = row_behind(k, FGQA_VARIANT_tall), *plain = row_behind(k, FGQA_VARIANT_plain);
        const char *reason = fgqa_pass_over_short(&k->row, &tall->row, &plain->row, p, why);
        if (reason) { return reason; }
    }
    if (k->variant == FGQA_VARIANT_tall) {
        const char *reason = fgqa_pass_over_tall(&k->row, &row_behind(k, FGQA_VARIANT_plain)->row, p);
        if (reason) { return reason; }
    }
    if (copies_cache(k, p)) {
        const char *reason = pass_over_copy(p, why);
        if (reason) { return reason; }
    }
    if (!k->row.dropout && leaves_tiles_empty(p, k->row.block_q)) {
        return fgqa_reason(why, "%d query rows leave its tiles of %d mostly empty; tiles shared by a whole group are fuller", (int)fgqa_usual_rows(p), k->row.block_q);
    }
    return NULL;
}

static const char *refuse(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    static const fgqa_arg tensors[] = {FGQA_ARG_q, FGQA_ARG_k, FGQA_ARG_v, FGQA_ARG_out, FGQA_ARG_dout};
    const cuda_kernel *k = kernel->row;
    if (p->precision != FGQA_PRECISION_DEFAULT) { return "precision=\"bf16x3\" is for CPUs with AMX: GPUs multiply float32 numbers as they are; leave precision out"; }
    if (p->dtype != k->row.dtype) {      /* of most rows: a call should not wait for the text */
        return k->row.dtype == FGQA_F32 ? "computes float32" : k->row.dtype == FGQA_F16 ? "computes float16" : "computes bfloat16";
    }
    if (p->d > k->row.d || p->dv > k->row.dv) {
        return fgqa_reason(why, "head dims up to %d, %d", k->row.d, k->row.dv);
    }
    const char *reason = refuse_device(k, p->device.index, why);
    if (reason) { return reason; }
    if (k->row.cached == FGQA_CACHE_ONLY && p->cache.page_size == 0) { return "for KV caches only"; }
    if (k->row.cached == FGQA_CACHE_NEVER && p->cache.page_size > 0) { return "reads no KV cache"; }
    if (k->row.dropout && p->dropout_threshold == 0) { return "for dropout only"; }
    if (k->row.float8 && p->view[FGQA_ARG_k].dtype != FGQA_F8E4M3) { return "for float8 KV caches only"; }
    if (!k->row.general) {
        const int32_t piece = 16 / (int32_t)fgqa_dtype_bytes(p->dtype);
        const char *option = refuse_options(p, options_of(k));
        if (option) {
            return fgqa_reason(why, "has no %s", option);
        }
        if (p->d % piece != 0 || p->dv % piece != 0) {
            return fgqa_reason(why, "head dims must be multiples of %d", piece);
        }
        for (int n = 0; n < (k->row.pass == FGQA_PASS_BWD ? 5 : 4); n++) {
            if (!is_vector(p, tensors[n])) { return fgqa_reason(why, "%s: rows must start on 16 bytes", fgqa_arg_name(tensors[n])); }
        }
        if (fgqa_bwd_is_whole(&k->row)) {
            const char *shape = fgqa_bwd_refuse_whole(&k->row, p, why);
            if (shape) { return shape; }
        }
        if (k->row.pass == FGQA_PASS_BWD && k->row.arch == HOPPER) { return refuse_hopper_backward(k, p, why); }
    }
    if (k->row.most_rows) { return refuse_decode(k, p, why); }
    return is_hopper_forward(k) ? refuse_tensors(k, p, why) : NULL;
}

static void tile(const fgqa_kernel *kernel, const fgqa_problem *p, fgqa_plan *plan)
{
    const cuda_kernel *k = kernel->row;
    fgqa_cuda_properties device = {80, 108, 0, 0, 0};
    fgqa_problem copy;
    const int terms = copies_terms(k, p);
    plan->block_q = k->row.block_q;
    plan->block_k = k->row.block_k;
    plan->threads = 1;
    (void)fgqa_cuda_device_properties(p->device.index, &device);      /* refuse() has read it already */
    if (fgqa_bwd_is_whole(&k->row)) {
        fgqa_bwd_tile_whole(p, plan);
        return;
    }
    if (k->row.pass == FGQA_PASS_BWD) {
        fgqa_bwd_tile(&k->row, p, plan, device.multiprocessors);
        if (terms) { plan->workspace_bytes += fgqa_term_copy(p, terms, NULL, &copy); }
        return;
    }
    if (k->row.most_rows) {
        fgqa_dec_tile(p, plan, k->row.dv, device.multiprocessors);
        return;
    }
    if (k->row.arch == HOPPER) {
        plan->tasks = fgqa_hopper_tiles(p, k->row.block_q);
        if (is_short(k)) {
            plan->splits = 1;
            return;
        }
        fgqa_fwd_share(p, plan, plan->tasks, device.multiprocessors, plan->tasks == p->b * (int64_t)(p->hq >> fgqa_hopper_pack(p, k->row.block_q)));
        if (copies_cache(k, p)) { plan->workspace_bytes += fgqa_cache_copy(p, NULL, &copy); }
        if (terms) { plan->workspace_bytes += fgqa_term_copy(p, terms, NULL, &copy); }
        return;
    }
    const int32_t by_smem = device.smem_per_multiprocessor / (k->smem() + 1024), by_registers = 8 / k->row.warps;
    const int32_t resident = by_smem < by_registers ? by_smem : by_registers;
    fgqa_fwd_tile(p, plan, device.multiprocessors * (resident > 0 ? resident : 1));
}

/* One kernel serves every dtype and option: there is no float64 on a GPU. */
static const char *refuse_weights(const fgqa_kernel *kernel, const fgqa_problem *p, char why[128])
{
    return refuse_device(kernel->row, p->device.index, why);
}

static void tile_weights(const fgqa_kernel *kernel, const fgqa_problem *p, fgqa_plan *plan)
{
    (void)kernel;
    fgqa_weights_tile(p, plan);
}

#define WEIGHTS(pass) {pass, 80, FGQA_F32, FGQA_MAX_HEAD_DIM, 0, FGQA_WEIGHTS_ROWS, FGQA_WEIGHTS_KEYS, 1, FGQA_WEIGHTS_THREADS / 32, 1, 0, 0, 0, 0}
static const cuda_kernel weights_rows = {WEIGHTS(FGQA_PASS_ROWS), FGQA_VARIANT_general, fgqa_weights_rows, fgqa_weights_smem};
static const cuda_kernel weights_keysum = {WEIGHTS(FGQA_PASS_KEYSUM), FGQA_VARIANT_general, fgqa_weights_keysum, fgqa_weights_smem};
#undef WEIGHTS

/* Without a batch the gradients that have no batch dimension are 0. They are contiguous. */
static int run_empty(const fgqa_problem *p, cudaStream_t stream)
{
    const fgqa_view *dbias = &p->view[FGQA_ARG_dbias], *dsink = &p->view[FGQA_ARG_dsink];
    size_t bytes = fgqa_dtype_bytes(dbias->dtype);
    cudaError_t error = cudaSuccess;
    for (int n = 0; n < 4; n++) { bytes *= (size_t)p->bias_shape[n]; }
    if (dbias->data && bytes > 0) { error = cudaMemsetAsync(dbias->data, 0, bytes, stream); }
    if (dsink->data && error == cudaSuccess) { error = cudaMemsetAsync(dsink->data, 0, (size_t)p->hq * fgqa_dtype_bytes(dsink->dtype), stream); }
    return error;
}

/* Over a copy of the cache, or of a bias and a mask, which comes first in the workspace. */
static int run_copied(const cuda_kernel *k, const fgqa_plan *plan, const fgqa_problem *p, int terms, void *workspace, const fgqa_exec *exec)
{
    fgqa_problem copy;
    const size_t bytes = terms ? fgqa_term_copy(p, terms, workspace, &copy) : fgqa_cache_copy(p, workspace, &copy);
    const int error = terms ? fgqa_term_copy_launch(p, &copy, terms, exec->stream) : fgqa_cache_copy_launch(p, &copy, exec->stream);
    return error != cudaSuccess ? error : k->launch(plan, &copy, (char *)workspace + bytes, exec);
}

/* The problem's device is the current one. */
static fgqa_status run(const fgqa_plan *plan, const fgqa_problem *p, void *workspace, const fgqa_exec *exec)
{
    const cuda_kernel *k = plan->kernel->row;
    if (plan->tasks == 0 && p->pass != FGQA_PASS_BWD) { return FGQA_OK; }
    const int terms = copies_terms(k, p);
    const int error = plan->tasks == 0 ? run_empty(p, exec->stream)
        : terms || copies_cache(k, p) ? run_copied(k, plan, p, terms, workspace, exec) : k->launch(plan, p, workspace, exec);
    if (error != cudaSuccess) { cudaGetLastError(); }      /* the runtime keeps it, too: it is reported once */
    return fgqa_cuda_check(error, plan->kernel->name);
}

enum {
#define FGQA_KERNEL(pass, arch, dtype, d, dv, block_q, block_k, stages, warps, variant) FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _index),
#include "kernels.def"
#undef FGQA_KERNEL
};

#define FGQA_KERNEL(pass, arch, dtype, d, dv, block_q, block_k, stages, warps, variant)                          \
    {#pass "_sm" #arch "_" #dtype "_d" #d "_dv" #dv "_" #variant, FGQA_PASS_##pass, FGQA_CUDA, refuse, tile, run, \
     &rows[FGQA_SUFFIX(FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant), _index)], pass_over},
static const fgqa_kernel kernels[] = {
#include "kernels.def"
    {"rows_any", FGQA_PASS_ROWS, FGQA_CUDA, refuse_weights, tile_weights, run, &weights_rows, NULL},
    {"keysum_any", FGQA_PASS_KEYSUM, FGQA_CUDA, refuse_weights, tile_weights, run, &weights_keysum, NULL},
};
#undef FGQA_KERNEL

const fgqa_kernel *fgqa_cuda_kernels(int32_t *count)
{
    *count = (int32_t)(sizeof kernels / sizeof kernels[0]);
    return kernels;
}

const char *fgqa_cuda_refuse(const fgqa_kernel *kernel, int32_t device, char why[128])
{
    return refuse_device(kernel->row, device, why);
}

int fgqa_cuda_any_order(const fgqa_plan *plan, const fgqa_problem *problem)
{
    const cuda_kernel *k = plan->kernel->row;
    fgqa_cuda_properties device = {0, 0, 0, 0, 0};
    if (problem->pass != FGQA_PASS_BWD || k->row.arch != HOPPER) { return 0; }
    (void)fgqa_cuda_device_properties(problem->device.index, &device);      /* refuse() has read it already */
    return fgqa_bwd_order_of(problem, k->row.d, k->row.block_q, k->row.block_k, plan->splits, device.multiprocessors).any_order;
}

int32_t fgqa_cuda_shared_memory(const fgqa_kernel *kernel) { return ((const cuda_kernel *)kernel->row)->smem(); }
