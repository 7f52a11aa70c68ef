/* bwd_workspace.h - scratch memory of a backward pass, and the index arithmetic its kernels share. C11 and CUDA.
 *
 *   stats    [q_rows]          plain_stats or, of general kernels, general_stats; of tiled ones [q_tiles][2][block_q]: lse2, delta
 *                              of a tile's rows in the order of bwd_stats_slot(), rows past the sequence's last one among them
 *   dq       [q_tiles][block_q * d]   float32 sums, but of two passes; order inside a tile is the main kernel's own (its accumulators')
 *   turn     [q_tiles]         key tiles that have been added to the tile; with FGQA_BWD_DIRTY some row of the tile has an inf or
 *                              NaN in q or dO
 *            Of kernels with tiled statistics: the key tile whose turn it is, or how many have added (chain > 0); with FGQA_BWD_FRESH
 *            nothing has been added
 *   key_rows [b][sk] or [total_k]   of kernels with tiled statistics: query rows that see each key, where not all do
 *   poisoned [k_tiles]         of two passes, together with key_rows: whether the first has met an inf or NaN in the key tile
 *            With a soft cap then, of kernels with tiled statistics, [splits][k_tiles][block_k / 16]: whether bwd_poison.cu has to look at
 *            these 16 keys
 *   control  ticket of the next task; key tiles of a sequence, of kernels without tiled statistics the longest one; query tiles whose
 *            dQ is converted or about to be, of kernels with tiled statistics
 *   sequences, first_task [b], [b + 1]   of packed sequences, with tiled statistics: those with most rows first, and the tasks before each
 *   bases    [q_tiles][block_q], with a bias and tiled statistics: what is taken off scores of a row before lse2 is, in natural units;
 *            only of tiles whose word in `based` [q_tiles] is 1
 *   dk, dv   [splits][k_rows][d or dv]   float32, when the query rows of a KV head are split over blocks
 */
#ifndef FGQA_BWD_WORKSPACE_H
#define FGQA_BWD_WORKSPACE_H
#include "../../core/problem.h"
#include "../../core/workspace.h"

typedef struct { int64_t ticket, key_tiles, finished; } fgqa_bwd_control;

/* What the main kernel needs of a query row. P = 2^(s scale log2(e) - lse2) or 2^((x - top) log2(e) - log_sum); delta =
 * rowsum(dO O) - dLSE. lse2 and top are +inf for a row that sees nothing, so that its P is 0. top is the LSE and log_sum 0,
 * unless the LSE is so large that it does not hold the sum of the row: then top is its largest score and log_sum log2 of the
 * sum. */
typedef struct { float lse2, delta; } plain_stats;
typedef struct { float top, delta, log_sum, unused; } general_stats;

enum { FGQA_BWD_DIRTY = 1 << 30, FGQA_BWD_FRESH = 1 << 29 };
enum { FGQA_BWD_KEYS_A_WORD = 16 };       /* of those behind `poisoned` */

/* Layout of the statistics. */
enum { FGQA_BWD_PLAIN, FGQA_BWD_GENERAL, FGQA_BWD_TILED };

typedef struct {
    void *stats;
    float *dq, *dk, *dv;
    int32_t *turn;
    fgqa_range *key_rows;                 /* NULL: every row sees every key, and all key tiles are whole */
    int32_t *poisoned;
    fgqa_bwd_control *control;
    int64_t q_rows, k_rows, q_tiles;      /* over batch and heads */
    int64_t head_tiles, kv_head_tiles;    /* q or k tiles of one head: of one sequence, or of all when they are packed */
    int32_t block_q, block_k, splits, stats_kind;   /* of the main kernel's row */
    int32_t chain;                        /* order of the key tiles: bwd_key_tile_at() */
    int32_t *sequences;
    uint32_t *first_task;
    float *bases;
    int32_t *based;
} fgqa_bwd_workspace;

/* Whether some row of some tile may not see some key of it; with a soft cap, ALiBi, a bias, a mask tensor or dropout there is
 * no kernel for tiles without. */
static inline int fgqa_bwd_hides(const fgqa_problem *p, int32_t block_k)
{
    return p->varlen || p->q_lens || p->kv_lens || p->left != FGQA_UNBOUNDED || p->right != FGQA_UNBOUNDED || p->chunk > 0 || p->softcap > 0.0 || p->view[FGQA_ARG_alibi_slopes].data
        || p->view[FGQA_ARG_bias].data || p->view[FGQA_ARG_mask].data || p->dropout_threshold != 0 || p->sk % block_k != 0;
}

/* Whether dQ is made by a kernel of its own, which does all of a query tile: bwd_queries.cuh. */
static inline int fgqa_bwd_two_passes(int32_t stats_kind, int32_t d) { return stats_kind == FGQA_BWD_TILED && d > 128; }

FGQA_FN int64_t fgqa_bwd_k_tiles(const fgqa_problem *p, const fgqa_bwd_workspace *w) { return (p->varlen ? p->hk : (int64_t)p->b * p->hk) * w->kv_head_tiles; }

/* Carves, or with base NULL measures. */
static inline size_t fgqa_bwd_workspace_take(const fgqa_problem *p, int32_t block_q, int32_t block_k, int32_t d, int32_t dv,
                                             int32_t splits, int32_t stats_kind, void *base, fgqa_bwd_workspace *w)
{
    fgqa_arena arena = fgqa_arena_begin(base);
    const fgqa_bwd_workspace zero = {0};
    *w = zero;
    w->block_q = block_q;
    w->block_k = block_k;
    w->splits = splits;
    w->stats_kind = stats_kind;
    w->q_rows = p->varlen ? (int64_t)p->hq * p->total_q : (int64_t)p->b * p->hq * p->sq;
    w->k_rows = p->varlen ? (int64_t)p->hk * p->total_k : (int64_t)p->b * p->hk * p->sk;
    /* packed: sequence b starts at tile floor(its first row / block_q) + b, which leaves room for every sequence's last tile */
    w->head_tiles = p->varlen ? p->total_q / block_q + p->b + 1 : ((int64_t)p->sq + block_q - 1) / block_q;
    w->kv_head_tiles = p->varlen ? p->total_k / block_k + p->b + 1 : ((int64_t)p->sk + block_k - 1) / block_k;
    w->q_tiles = p->varlen ? p->hq * w->head_tiles : (int64_t)p->b * p->hq * w->head_tiles;
    /* First what comes in multiples of 128 bytes, so that it begins on a line of the caches, as the workspace does: where
     * tiles of dQ began in the middle of one, adding to them made a pass up to 9% longer. */
    if (!fgqa_bwd_two_passes(stats_kind, d)) { w->dq = (float *)fgqa_arena_take(&arena, (size_t)w->q_tiles * (size_t)(block_q * d), sizeof(float)); }
    if (splits > 1) {
        w->dk = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)w->k_rows * (size_t)d, sizeof(float));
        w->dv = (float *)fgqa_arena_take(&arena, (size_t)splits * (size_t)w->k_rows * (size_t)dv, sizeof(float));
    }
    if (stats_kind == FGQA_BWD_TILED) {
        w->stats = fgqa_arena_take(&arena, (size_t)w->q_tiles * (size_t)block_q, sizeof(plain_stats));
    } else {
        w->stats = fgqa_arena_take(&arena, (size_t)w->q_rows, stats_kind == FGQA_BWD_GENERAL ? sizeof(general_stats) : sizeof(plain_stats));
    }
    w->turn = (int32_t *)fgqa_arena_take(&arena, (size_t)w->q_tiles, sizeof(int32_t));
    w->control = (fgqa_bwd_control *)fgqa_arena_take(&arena, 1, sizeof(fgqa_bwd_control));
    if (stats_kind == FGQA_BWD_TILED && fgqa_bwd_hides(p, block_k)) {
        w->key_rows = (fgqa_range *)fgqa_arena_take(&arena, p->varlen ? (size_t)p->total_k : (size_t)p->b * (size_t)p->sk, sizeof(fgqa_range));
        const size_t tiles = (size_t)fgqa_bwd_k_tiles(p, w), words = p->softcap > 0.0 ? (size_t)splits * tiles * (size_t)(block_k / FGQA_BWD_KEYS_A_WORD) : 0;
        w->poisoned = (int32_t *)fgqa_arena_take(&arena, (fgqa_bwd_two_passes(stats_kind, d) ? tiles : 0) + words, sizeof(int32_t));
    }
    if (stats_kind == FGQA_BWD_TILED && p->varlen) {
        w->sequences = (int32_t *)fgqa_arena_take(&arena, (size_t)p->b, sizeof(int32_t));
        w->first_task = (uint32_t *)fgqa_arena_take(&arena, (size_t)p->b + 1, sizeof(uint32_t));
    }
    if (stats_kind == FGQA_BWD_TILED && p->view[FGQA_ARG_bias].data) {
        w->bases = (float *)fgqa_arena_take(&arena, (size_t)w->q_tiles * (size_t)block_q, sizeof(float));
        w->based = (int32_t *)fgqa_arena_take(&arena, (size_t)w->q_tiles, sizeof(int32_t));
    }
    return arena.used;
}

#if defined(__CUDACC__)
static __device__ __forceinline__ int64_t bwd_q_row(const fgqa_problem &p, int32_t b, int32_t h, int64_t q_row, int32_t i)
{
    return p.varlen ? (int64_t)h * p.total_q + q_row + i : ((int64_t)b * p.hq + h) * p.sq + i;
}

static __device__ __forceinline__ int64_t bwd_k_row(const fgqa_problem &p, int32_t b, int32_t kv_head, int64_t k_row, int32_t j)
{
    return p.varlen ? (int64_t)kv_head * p.total_k + k_row + j : ((int64_t)b * p.hk + kv_head) * p.sk + j;
}

static __device__ __forceinline__ int64_t bwd_q_tile(const fgqa_problem &p, const fgqa_bwd_workspace &w, int32_t b, int32_t h, int64_t q_row, int32_t tile)
{
    return p.varlen ? h * w.head_tiles + q_row / w.block_q + b + tile : ((int64_t)b * p.hq + h) * w.head_tiles + tile;
}

/* The packed sequence that owns tile `tile` of a head (KEYS: of a KV head), where sequence b begins at tile floor(its first
 * row / rows) + b. */
template <bool KEYS = false> static __device__ __forceinline__ int32_t bwd_packed_sequence(const fgqa_problem &p, int32_t rows, int32_t tile)
{
    int32_t b = 0, above = p.b;
    while (above - b > 1) {
        const int32_t middle = b + (above - b) / 2;
        const int32_t first = (int32_t)max((int64_t)0, KEYS ? min(p.total_k, (int64_t)p.cu_seqlens_kv[middle]) : min(p.total_q, (int64_t)p.cu_seqlens_q[middle]));
        if (first / rows + middle <= tile) { b = middle; } else { above = middle; }
    }
    return b;
}

static __device__ __forceinline__ int64_t bwd_k_tile(const fgqa_problem &p, const fgqa_bwd_workspace &w, int32_t b, int32_t kv_head, int64_t k_row, int32_t tile)
{
    return p.varlen ? kv_head * w.kv_head_tiles + k_row / w.block_k + b + tile : ((int64_t)b * p.hk + kv_head) * w.kv_head_tiles + tile;
}

/* With a soft cap: the words of a part's key tile that say where bwd_poison.cu has to look. */
static __device__ __forceinline__ int32_t *bwd_poisoned_keys(const fgqa_problem &p, const fgqa_bwd_workspace &w, int32_t part, int64_t k_tile)
{
    const int64_t tiles = fgqa_bwd_k_tiles(&p, &w);
    return w.poisoned + (w.dq ? 0 : tiles) + (part * tiles + k_tile) * (w.block_k / FGQA_BWD_KEYS_A_WORD);
}

/* Of tiled statistics with ALiBi, in base 2: P = 2^(bwd_less_alibi() - lse2). Slope times log2(e). */
static __device__ __forceinline__ float bwd_less_alibi(float s, float scale_log2, float slope_log2, float distance)
{
    return fmaf(s, scale_log2, -(slope_log2 * fabsf(distance)));
}

/* Rows 8 n + 2 c + {0, 1}, n = 0 .., of a tile belong to lane c of four (fragments.cuh): four of them make 16 bytes. */
static __device__ __forceinline__ int bwd_stats_slot(int row) { return row / 16 * 16 + row / 2 % 4 * 4 + row / 8 % 2 * 2 + row % 2; }

/* lse2 of row i of a query tile in tiled statistics; delta is block_q floats behind. */
static __device__ __forceinline__ float *bwd_tiled_stats(const fgqa_bwd_workspace &w, int64_t q_tile, int32_t i)
{
    return (float *)w.stats + q_tile * 2 * w.block_q + bwd_stats_slot(i % w.block_q);
}

static __device__ __forceinline__ fgqa_range *bwd_key_rows(const fgqa_problem &p, const fgqa_bwd_workspace &w, int32_t b, int64_t k_row)
{
    return w.key_rows + (p.varlen ? k_row : (int64_t)b * p.sk);
}

/* Key tiles that add to dQ of the rows [i0, i1) of a tile, in the order in which they do. Any tile with a visible score is in. */
static __device__ __forceinline__ fgqa_range bwd_key_tiles(const fgqa_mask &mask, int32_t block_k, int32_t i0, int32_t i1)
{
    fgqa_range r = {fgqa_kv_begin(&mask, i0) / block_k, 0};
    const int32_t end = fgqa_kv_end(&mask, i1 - 1);
    r.end = (int32_t)(((int64_t)end + block_k - 1) / block_k);
    if (r.end < r.begin || fgqa_kv_begin(&mask, i0) >= mask.sk) { r.end = r.begin; }
    return r;
}

/* Order in which the N key tiles of a sequence are taken and add to dQ: 0, 1, .. or, with a chain of C, folded. Under a causal
 * mask key tile n meets fewer query tiles the larger n is. The folded order takes C from the front, C - 1 down to 0, which
 * walk from the last query tile down to their diagonal, then C from the back, N - C .. N - 1, which walk from their diagonal
 * up; then the same with what is left. Blocks that take tiles in this order are all at the same query tile at the same time
 * and share what they read: front tile m is followed by N - 1 - m, which begins where the others have just come by. */
static __device__ __forceinline__ int32_t bwd_key_tiles_of(const fgqa_bwd_workspace &w, const fgqa_mask &mask) { return (mask.sk + w.block_k - 1) / w.block_k; }
static __device__ __forceinline__ bool bwd_in_front(int32_t n, int32_t tiles) { return 2 * n < tiles; }

/* The key tile of a place in the order. Places from `tiles` on (padding) stay as they are. */
static __device__ __forceinline__ int32_t bwd_key_tile_at(int32_t chain, int32_t tiles, int32_t place)
{
    if (chain == 0 || place >= tiles) { return place; }
    const int32_t taken = place / (2 * chain) * chain, within = place % (2 * chain), left = tiles - 2 * taken;
    const int32_t front = min(chain, (left + 1) / 2), back = min(chain, left - front);
    return within < front ? taken + front - 1 - within : tiles - taken - back + within - front;
}

/* A key tile's turn at a query tile that sees the key tiles before `end`: base + max(0, end - limit) + min(end, cap). In the
 * folded order it is how many of those come before it: all in front of its chain, those behind it that were taken already, those
 * of its chain that come first. */
typedef struct { int32_t base, limit, cap; } bwd_turn;

static __device__ __forceinline__ bwd_turn bwd_turn_of(int32_t chain, int32_t tiles, int32_t n)
{
    bwd_turn turn = {n, INT32_MAX, 0};
    if (chain > 0) {
        const bool in_front = bwd_in_front(n, tiles);
        const int32_t taken = (in_front ? n : tiles - 1 - n) / chain * chain, left = tiles - 2 * taken;
        const int32_t front = min(chain, (left + 1) / 2), back = min(chain, left - front);
        turn.base = in_front ? taken - 1 - n : taken + front + n - (tiles - taken - back);
        turn.limit = tiles - taken;
        turn.cap = in_front ? taken + front : 0;
    }
    return turn;
}
#endif

#ifdef __cplusplus
extern "C" {
#endif
/* Kernels around the main one; each returns a cudaError_t. `stream` is a cudaStream_t. */
int fgqa_bwd_delta(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream);
int fgqa_bwd_delta_tiled(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream);
int fgqa_bwd_reduce(const fgqa_problem *problem, const fgqa_bwd_workspace *w, int32_t dk_width, int32_t dv_width, void *stream);
int fgqa_bwd_poison(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream);
int fgqa_bwd_dsink(const fgqa_problem *problem, const fgqa_bwd_workspace *w, void *stream);
#ifdef __cplusplus
}
#endif
#endif
