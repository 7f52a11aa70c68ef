/* bwd_plan.c - how a backward pass is cut into tasks, and in which order they are taken. */
#include "any/bwd_plan.h"

static int32_t stats_kind(const fgqa_cuda_row *row)
{
    return row->general ? FGQA_BWD_GENERAL : row->arch == 90 ? FGQA_BWD_TILED : FGQA_BWD_PLAIN;
}

/* Length of the chains of the folded order (bwd_key_tile_at()), or 0 where key tiles are taken one after the other. There,
 * blocks of a causal pass that take neighbours are two query tiles of all heads apart, and what one has read has left the L2
 * cache before the next one wants it. Members of a chain share it, but wait for each other's turns at dQ, the more the longer
 * the chain; without a group that costs more than it brings, but for the shortest chains. Chains of all sections (parts of KV
 * heads of sequences) must occupy the multiprocessors. All pairs of a front and a back tile take equally long: the last round
 * of blocks must not be nearly empty. Packed sequences of all lengths follow each other and have no rounds; without dQ in
 * memory there are no turns, and what is read stays in the cache. Where runs (takes()) do as well without a chain's waits,
 * there is none: few and very many key tiles, but of one or two sections of large groups, whose blocks would be apart the
 * most. All limits are measured: LOG.md. */
static int32_t chain_of(const fgqa_problem *p, int32_t row_d, int32_t block_k, int32_t splits, int32_t multiprocessors, int any_order)
{
    const int64_t tiles = ((int64_t)p->sk + block_k - 1) / block_k, half = (tiles + 1) / 2, sections = (int64_t)p->b * p->hk * splits;
    const int64_t pairs = sections * half, rounds = (pairs + multiprocessors - 1) / multiprocessors;
    const int few_blocks = !p->batch_invariant && 5 * pairs < 3 * rounds * multiprocessors;
    if (!fgqa_bwd_causal(p) || few_blocks || p->varlen || fgqa_bwd_two_passes(FGQA_BWD_TILED, row_d) || half < 1 || sections < 1) { return 0; }
    if (p->g < 2 * splits) { return p->d > 64 && p->g == 1 && half == 4 ? 4 : 0; }
    const int few_long = !p->batch_invariant && p->g >= 16 * splits && tiles > 2 * FGQA_BWD_LONG && sections * FGQA_BWD_LONG <= multiprocessors;
    if (p->d > 64 && ((!any_order && tiles > FGQA_BWD_LONG && !few_long) || (splits == 1 && tiles <= 16))) { return 0; }
    if (p->d <= 64 && !any_order && p->g < 8 * splits && tiles > 16) { return 0; }
    int64_t chain = 64;
    if (!any_order && !p->batch_invariant) {
        const int64_t shortest = p->d <= 64 ? 8 : p->d <= 128 ? 16 : 64, enough = multiprocessors / sections;
        chain = enough > shortest ? enough : shortest;
    }
    return (int32_t)(half < chain ? half : chain);
}

/* Sections in work at once and how many key tiles of one follow each other (find_task() of sm90/bwd_tasks.cuh), for a chain.
 * By whether a walk is long or short in query tiles and heads: blocks on long ones drift apart, those on short ones wait for
 * turns. */
static fgqa_bwd_order takes(const fgqa_problem *p, int32_t row_d, int32_t block_k, int32_t splits, int32_t multiprocessors, int any_order)
{
    const int64_t tiles = p->sk > block_k ? ((int64_t)p->sk + block_k - 1) / block_k : 1, fair = multiprocessors / tiles;
    fgqa_bwd_order order = {chain_of(p, row_d, block_k, splits, multiprocessors, any_order), 1, 1, any_order, {0, 0}};
    int64_t band = fair < 4 ? 4 : fair < 8 ? fair : 8;
    if (fgqa_bwd_causal(p)) {
        band = 16;
        if (p->g >= 2 * splits) {
            if (tiles > 16) { order.run = 8; } else { band = p->g > 8 ? 4 : 32 / p->g; }
        }
    }
    if (p->d <= 64) {
        /* Half the bytes: enough that turns do not wait, few enough that Q, dO and sums of dQ of a pass stay in the L2 cache
         * or 8 share them. */
        const int64_t cached = ((int64_t)32 << 20) * splits / ((int64_t)p->sq * p->g * 512 + 1), eighth = multiprocessors / 8 + 1, most = (4 * multiprocessors + tiles - 1) / tiles;
        band = cached > eighth ? cached : eighth;
        if (band > most) { band = most; }
        if (fgqa_bwd_causal(p) && (p->g == 1 || tiles > FGQA_BWD_LONG) && band < 16) { band = tiles > FGQA_BWD_LONG ? 32 : 16; }
        order.run = 1;
    }
    if (fgqa_bwd_two_passes(FGQA_BWD_TILED, row_d)) {
        band = fair < 16 ? fair : 16;                            /* twice the bytes a product: shared by more */
        order.run = 1;
    }
    if (p->varlen) { band = multiprocessors / 16; order.run = 1; }
    if (order.chain > 0) { band = multiprocessors / order.chain; order.run = 1; }
    order.band = band > 1 ? (int32_t)band : 1;
    return order;
}

/* By measurements a pass whose blocks begin in order and alike gets longer by the share of the steps that the last one waits:
 * worth what it takes to avoid it from here on. Folded chains begin apart anyway; windows and lengths are faster in order. */
static int begins_wait(const fgqa_problem *p, const fgqa_bwd_order *order, int32_t row_d, int32_t block_q, int32_t block_k, int32_t splits, int32_t multiprocessors)
{
    const int hides = p->varlen || p->q_lens || p->kv_lens || p->chunk > 0 || p->left != FGQA_UNBOUNDED;
    if (hides || fgqa_bwd_two_passes(FGQA_BWD_TILED, row_d) || p->sk < 1024 || order->chain > 0) { return 0; }
    const int64_t sections = (int64_t)p->b * p->hk * splits, at_once = sections < order->band ? sections : order->band;
    const int64_t tiles = ((int64_t)p->sk + block_k - 1) / block_k, most = at_once > 0 ? multiprocessors / at_once : 0;
    const double walk = (double)p->sq / block_q * p->g / splits * (fgqa_bwd_causal(p) ? 0.5 : 1.0);
    const double rounds = (double)(sections * tiles) / multiprocessors, steps = rounds > 1.0 ? rounds * walk : walk;
    return (double)(most < tiles ? most : tiles) > steps * (1.0 / 128 + 110.0 / p->sk);
}

/* Steps of the walk of key tile n, or one less. */
static int64_t steps_of(const fgqa_problem *p, int32_t block_q, int32_t block_k, int32_t splits, int64_t n)
{
    const fgqa_mask mask = fgqa_problem_sequence(p, 0).mask;
    const int64_t behind = (n + 1) * block_k;
    const fgqa_range rows = fgqa_q_range(&mask, (int32_t)(n * block_k), behind < p->sk ? (int32_t)behind : p->sk);
    return rows.begin < rows.end ? (((int64_t)rows.end + block_q - 1) / block_q - rows.begin / block_q) * p->g / splits : 0;
}

/* Two steps apart, so that blocks do not wait if an addition takes longer than one; or one, and as many as walks have steps
 * and sums of what they end with find room: half of all sums where there are no parts, or two tiles a multiprocessor. All key
 * tiles of a section if possible; under a causal mask those of its first round, no more, as the longest walk is taken last:
 * later ones begin when walks of other lengths end. */
static fgqa_bwd_shift shift_of(const fgqa_problem *p, int64_t at_once, int32_t block_q, int32_t block_k, int32_t splits, int32_t multiprocessors)
{
    const int64_t all = ((int64_t)p->sk + block_k - 1) / block_k, fair = multiprocessors / at_once;
    const int64_t round = fair > 1 ? fair : 1, wanted = fgqa_bwd_causal(p) && round < all ? round : all;
    const int64_t half = (int64_t)p->b * p->hq * (((int64_t)p->sq + block_q - 1) / block_q) / 2, few = 2 * (int64_t)multiprocessors;
    const int64_t most = (splits == 1 && half > few ? half : few) / ((int64_t)p->b * p->hk * splits);
    const fgqa_bwd_shift none = {0, 0};
    fgqa_bwd_shift shift = {(int32_t)wanted, 2};
    if (all >= FGQA_BWD_LATE) { return none; }
    if (shift.apart == 2 && (steps_of(p, block_q, block_k, splits, wanted - 1) <= 2 * (wanted - 1) || 2 * (wanted - 1) > most)) { shift.apart = 1; }
    if (shift.apart == 1) {
        int64_t fits = 0, above = (wanted - 1 < most ? wanted : most + 1) + 1;
        while (above - fits > 1) {
            const int64_t middle = fits + (above - fits) / 2;
            if (steps_of(p, block_q, block_k, splits, middle - 1) > middle - 1) { fits = middle; } else { above = middle; }
        }
        shift.tiles = (int32_t)fits;
    }
    return shift.tiles > 1 ? shift : none;
}

/* Any order where the bits may change, walks that begin apart where they may not; with batch_invariant neither, as how many
 * blocks there are for a section depends on the batch, nor in runs, whose first round has not as many of each section. */
fgqa_bwd_order fgqa_bwd_order_of(const fgqa_problem *p, int32_t row_d, int32_t block_q, int32_t block_k, int32_t splits, int32_t multiprocessors)
{
    fgqa_bwd_order order = takes(p, row_d, block_k, splits, multiprocessors, 0);
    const int64_t sections = (int64_t)p->b * p->hk * splits;
    if (!begins_wait(p, &order, row_d, block_q, block_k, splits, multiprocessors)) { return order; }
    if (!p->deterministic) { return takes(p, row_d, block_k, splits, multiprocessors, 1); }
    if (!p->batch_invariant && order.run == 1) { order.shift = shift_of(p, sections < order.band ? sections : order.band, block_q, block_k, splits, multiprocessors); }
    return order;
}

/* Whether tasks of equal length leave hardly a multiprocessor without one in their last round. */
static int fills(int64_t tasks, int64_t multiprocessors) { return 20 * tasks >= 19 * ((tasks + multiprocessors - 1) / multiprocessors) * multiprocessors; }

/* A task is a key tile of a KV head. Too few for the multiprocessors (MQA, short batches): the query rows of each are shared
 * out to up to four blocks, whose dK and dV are float32 parts added in order. Tasks of equal length need four rounds to come
 * out even, unless they just fill fewer, those of a masked problem, longest first, two; but so do the long ones of a causal
 * one with too many key tiles for a chain, the first of which would last as long as all of a multiprocessor's work (only of
 * large groups, where the parts are at most half of the sums of dQ). With batch_invariant nothing is split. */
void fgqa_bwd_tile(const fgqa_cuda_row *row, const fgqa_problem *p, fgqa_plan *plan, int32_t multiprocessors)
{
    const int64_t tasks = (int64_t)p->b * p->hk * (((int64_t)p->sk + row->block_k - 1) / row->block_k);
    const int64_t steps = (((int64_t)p->sq + row->block_q - 1) / row->block_q) * p->g;
    const int masked = p->left != FGQA_UNBOUNDED || p->right != FGQA_UNBOUNDED || p->chunk > 0;
    const int equal = row->arch == 90 && !masked && !p->varlen && !p->q_lens && !p->kv_lens;      /* other kernels have several blocks a multiprocessor */
    const int long_walks = row->arch == 90 && row->d <= 128 && fgqa_bwd_causal(p) && p->g >= 4 * FGQA_BWD_MAX_SPLITS && p->sk / row->block_k > FGQA_BWD_LONG && !p->varlen;
    const int64_t enough = (int64_t)multiprocessors * (masked && !long_walks ? 2 : 4) * 7 / 8;
    fgqa_bwd_workspace w;
    float *late;
    plan->splits = 1;
    while (!p->batch_invariant && plan->splits < FGQA_BWD_MAX_SPLITS && tasks * plan->splits < enough && steps >= 8 * plan->splits
           && !(equal && fills(tasks * plan->splits, multiprocessors))) {
        plan->splits *= 2;
    }
    plan->tasks = p->b > 0 && p->hq > 0 && (p->sq > 0 || p->sk > 0) ? (tasks > 0 ? tasks * plan->splits : 1) : 0;
    const fgqa_bwd_shift none = {0, 0}, shift = row->arch == 90 ? fgqa_bwd_order_of(p, row->d, row->block_q, row->block_k, plan->splits, multiprocessors).shift : none;
    plan->workspace_bytes = fgqa_bwd_shifted_take(p, row->block_q, row->block_k, row->d, row->dv, plan->splits, stats_kind(row), shift, NULL, &w, &late);
}

