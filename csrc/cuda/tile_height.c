/* tile_height.c - where taller or shorter tiles of the forward rows for Hopper are faster, measured on an H100: LOG.md. */
#include "tile_height.h"

#include "cuda.h"
#include "sm90/fwd_pack.h"

#include <math.h>

/* Keys that tiles of wide heads hold at once; where rows begin in the middle of a sector of memory, of so many elements,
 * fewer. */
enum { SECTOR = 16, WIDE_KEYS = 96, WIDE_KEYS_OFF_SECTORS = 64 };

static double round_up(int64_t n, int32_t step) { return (double)((n + step - 1) / step * step); }

/* Query rows that a multiprocessor passes through, padding included: of packed sequences half a tile each. `even`: none waits at
 * the end for others. */
static double rows_passed(const fgqa_problem *p, int32_t block_q, int32_t multiprocessors, int even)
{
    const int32_t pack = fgqa_hopper_pack(p, block_q);
    if (p->varlen) {
        return (double)p->b * (double)(p->hq >> pack) * ((double)(fgqa_usual_rows(p) << pack) + 0.5 * block_q) / multiprocessors;
    }
    const double rounds = (double)fgqa_hopper_tiles(p, block_q) / multiprocessors;
    return block_q * (even ? rounds : ceil(rounds));
}

/* How much faster a tall tile passes through a row than a plain one. `many`: with a mask or in packed sequences, where tiles have
 * fewer keys. ALiBi takes registers that tall tiles have not left. */
static double tall_gain(const fgqa_cuda_row *tall, const fgqa_problem *p, int many)
{
    const int alibi = p->view[FGQA_ARG_alibi_slopes].data != NULL;
    if (tall->d <= 64) { return alibi ? many ? 0.95 : 0.9 : many ? 1.15 : 1.02; }
    return many ? 1.13 : alibi ? 1.0 : 1.04;
}

const char *fgqa_pass_over_tall(const fgqa_cuda_row *tall, const fgqa_cuda_row *plain, const fgqa_problem *p)
{
    fgqa_cuda_properties device;
    const int masked = p->right != FGQA_UNBOUNDED || p->left != FGQA_UNBOUNDED || p->chunk > 0;
    const int64_t tiles = fgqa_hopper_tiles(p, tall->block_q);
    if (p->batch_invariant) { return "the choice would depend on the batch"; }
    if (fgqa_cuda_device_properties(p->device.index, &device) != FGQA_OK) { return NULL; }
    if (5 * tiles < 4 * (int64_t)device.multiprocessors) { return "few tiles, whose keys are shared out"; }
    const int many = p->varlen || (masked && tiles > 4 * (int64_t)device.multiprocessors);
    const double own = rows_passed(p, tall->block_q, device.multiprocessors, many);
    const double others = rows_passed(p, plain->block_q, device.multiprocessors, many);
    if (own <= tall_gain(tall, p, many) * others) { return NULL; }
    return own > others ? "its tiles would be emptier than shorter ones" : "shorter tiles are faster with ALiBi";
}

/* Keys up to which short tiles are a choice: where it is the same in every batch, with half of the keys hidden; where tiles are
 * counted. */
enum { SHORT_KEYS = 224, SHORT_KEYS_CAUSAL = 384, SHORT_KEYS_COUNTED = 512 };

/* What a launch of taller tiles takes longer if some wait for others, in query rows times keys that a multiprocessor does
 * meanwhile. */
enum { SHORT_GAIN = 15000 };

/* Tiles of 64 rows a multiprocessor that hold up to 128 keys of wide heads at once, where reading keys often does not count
 * yet. */
enum { WIDE_TILES = 8, WIDE_TILES_OFF_SECTORS = 4 };

/* How much longer a query row and a key take in short tiles than in those behind, which are tall or not. `skips`: half of the
 * keys are hidden, in finer steps, as fine in tall tiles that heads share. */
static double short_loss(int32_t d, const fgqa_problem *p, int is_tall, int32_t tall_rows, int skips)
{
    if (d > 64) { return is_tall ? 1.7 : 1.5; }
    if (skips) { return !is_tall ? 0.95 : fgqa_hopper_pack(p, tall_rows) > 0 ? 1.15 : 1.0; }
    const int is_full = fgqa_usual_rows(p) % tall_rows == 0;     /* if all are as long */
    return p->varlen ? (is_tall ? is_full ? 1.5 : 1.25 : 1.12) : is_tall ? 1.13 : 1.08;
}

const char *fgqa_pass_over_short(const fgqa_cuda_row *own, const fgqa_cuda_row *tall, const fgqa_cuda_row *plain,
                                 const fgqa_problem *p, char why[128])
{
    fgqa_cuda_properties device;
    const int64_t keys = fgqa_usual_keys(p), tiles = fgqa_hopper_tiles(p, own->block_q);
    const int32_t whole = fgqa_whole_keys(p);
    const int wide = own->d > 64, on_sectors = p->d % SECTOR == 0;
    if (whole > 0 && (!wide || whole <= (on_sectors ? WIDE_KEYS : WIDE_KEYS_OFF_SECTORS))) { return NULL; }
    if (p->batch_invariant && p->varlen) { return "the choice would depend on the batch"; }
    const int known = !p->batch_invariant && fgqa_cuda_device_properties(p->device.index, &device) == FGQA_OK;
    const int64_t multiprocessors = known ? device.multiprocessors : 1;
    if (known && whole > 0 && tiles <= (on_sectors ? WIDE_TILES : WIDE_TILES_OFF_SECTORS) * multiprocessors) { return NULL; }
    const int none_waits = known && !p->varlen && tiles <= multiprocessors;
    if (none_waits && keys <= SHORT_KEYS_COUNTED) { return NULL; }
    const int counts = known && !wide, skips = !wide && !p->varlen && p->right != FGQA_UNBOUNDED && p->sk <= p->sq;
    if (keys > (counts ? SHORT_KEYS_COUNTED : skips ? SHORT_KEYS_CAUSAL : SHORT_KEYS)) {
        return fgqa_reason(why, "%lld keys: taller tiles read them less often", (long long)keys);
    }
    const int is_tall = !fgqa_pass_over_tall(tall, plain, p);
    const fgqa_cuda_row *behind = is_tall ? tall : plain;
    const int32_t among = counts ? (int32_t)multiprocessors : 1, even = !counts || p->varlen;
    const int waits = counts && !p->varlen && fgqa_hopper_tiles(p, behind->block_q) > multiprocessors;
    const int rounds_keys = !wide && !p->varlen && !skips;
    const double own_keys = rounds_keys ? round_up(keys, own->block_k) : (double)keys;
    const double keys_behind = rounds_keys ? round_up(keys, behind->block_k) : (double)keys;
    const double loss = short_loss(own->d, p, is_tall, tall->block_q, skips);
    const double time_behind = rows_passed(p, behind->block_q, among, even) * keys_behind + (waits ? SHORT_GAIN : 0);
    return loss * rows_passed(p, own->block_q, among, even) * own_keys <= time_behind ? NULL : "taller tiles are nearly as full";
}
