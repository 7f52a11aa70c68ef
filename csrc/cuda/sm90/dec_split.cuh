/* dec_split.cuh - device side of dec_work.h: which granules of which pair a block of threads works on. */
#pragma once
#include "../common/params.cuh"
#include "../common/ptx_tma.cuh"
#include "dec_ptx.cuh"
#include "dec_work.h"

/* A tile: GRANULE keys in chunks of 128 bytes a row, one or two a column. */
static constexpr int CHUNK_BYTES = GRANULE * 128, TILE_BYTES = D / (FLOAT8 ? 128 : 64) * CHUNK_BYTES;

static constexpr float LAZY = 8.0f;     /* o and l are rescaled only when a score exceeds m by that, in powers of two */

/* Pages that do not hold whole granules: these come in pieces. Keys of a piece: */
static constexpr int32_t PIECE = 16, PIECES = GRANULE / PIECE;
static __host__ __device__ __forceinline__ bool has_pieces(const fgqa_cache &cache)
{
    return cache.table && cache.page_size % GRANULE != 0 && cache.page_size < cache.capacity;
}

/* Exact a / d for 0 <= a < 2^31 by one multiplication; magic 0 stands for d = 1. */
struct fast_div {
    uint64_t magic;
    __host__ __device__ __forceinline__ int32_t operator()(int32_t a) const
    {
#ifdef __CUDA_ARCH__
        return magic ? (int32_t)__umul64hi((uint64_t)(uint32_t)a, magic) : a;
#else
        return magic ? (int32_t)((unsigned __int128)(uint32_t)a * magic >> 64) : a;
#endif
    }
};
static inline fast_div fast_div_make(int32_t d)
{
    const fast_div division = {d <= 1 ? 0 : UINT64_MAX / (uint64_t)d + 1};
    return division;
}

/* Block k has units [begin(k), begin(k + 1)): equal shares, the first ones one unit longer. */
struct work_split {
    int32_t blocks, share, longer;
    __device__ __forceinline__ int32_t begin(int32_t k) const { return k * share + min(k, longer); }
    __device__ __forceinline__ int32_t block_of(int32_t unit) const
    {
        const int32_t first_short = longer * (share + 1);
        return unit < first_short ? unit / (share + 1) : longer + (unit - first_short) / share;
    }
};

static constexpr int FEW_PARTS = 8, FOLD_ROWS = 32;     /* so many chunks of so many rows may be added up in registers (dec_combine.cuh) */

/* What a block needs to know of a sequence. Keys are slots: key j is slot first_slot + j. */
struct dec_sequence { int32_t first_slot, sk, sq; fgqa_dec_span span; };

/* Fields of the problem that tell how long sequences are. Side by side: each line of the constant cache is a miss of its own. */
struct dec_lengths {
    const int32_t *q_lens, *kv_lens;
    int32_t b, sq, sk, left, right, chunk;
    fgqa_align align;
    int32_t whole;                  /* some row sees the first key, some the last one: spans of slots are all that there are */
    int32_t page_size, slots, new_max, capacity;
    const int32_t *lens, *left_pad, *new_lens;
};

/* What the first copy waits for comes first: each line of the constant cache is a miss of its own. */
struct dec_params {
    int32_t plain;                  /* uniform, and no table */
    work_split split;
    fgqa_dec_span span;
    fast_div by_units, by_heads, by_row_blocks;
    int32_t units;                  /* of a pair, where they are equal */
    int32_t evict_normal;           /* K and V in L2, instead of evict_first; with lengths on the device, where blocks have several whole pairs */
    int32_t b_step;                 /* pairs of a block are of one head, that many sequences apart; 0: they follow each other. Uniform only */
    int32_t folds;                  /* chunks of a pair that one block has are added up in registers, if they are few */
    int32_t halves;                 /* uniform, each block has half of a pair and its cluster the whole: no records (dec_wide_end.cuh) */
    int32_t uniform;                /* all sequences have the span and the split above */
    fgqa_dec_layout layout;
    fast_div by_page_size;
    const int32_t *table;
    int64_t table_stride;
    int32_t page_size, pieces;      /* whether copies are of pieces */
    int32_t chunk_pitch, piece_pitch;   /* of a tile: bytes from one chunk, from one 16 keys to the next */
    int32_t k_boxes, v_boxes;       /* copies across the head dim of a tile */
    dec_lengths lengths;
    int32_t parts;                  /* not 0: a cluster of so many blocks has a pair, a part each: no records (dec_join.cuh) */
    fast_div by_parts;
    int32_t fills_ring;             /* and blocks are few: all of a ring under way */
    int32_t releases;               /* and the launch behind this one may begin ahead of its end */
    int32_t blocks_aligned;         /* as layout.blocks, where all pairs are equal: blocks then have whole pairs, or parts of one */
    dec_sequence sequence;          /* each of them, where they are uniform */
    int32_t one_query;              /* uniform, and one query: all rows see these slots */
    fgqa_range keys;
    float unit, scale_log2;         /* of scores: in natural units, and as a power of two */
    float cap_ratio;                /* of q.k, to scores in units of the cap; 0: they are not (dec_score.cuh) */
    int32_t chain;                  /* or scores are in natural units, by the whole score chain (dec_score.cuh) */
    uint32_t *counters;             /* one a block, zero between launches; NULL: a second kernel merges */
    CUtensorMap k_map, v_map;
    fgqa_params common;
};

/* What has 64-bit divisions, those of chunks, is out of line, and only what has some: a block waits for each instruction that
 * comes from L2, a microsecond for a place in the code that nothing led to. */
static __device__ __noinline__ fgqa_range keys_in_chunks(fgqa_mask mask, int32_t i0, int32_t i1) { return fgqa_kv_range(&mask, i0, i1); }
static __device__ __forceinline__ fgqa_range keys_of_rows(fgqa_mask mask, int32_t i0, int32_t i1)
{
    if (mask.chunk > 0) { return keys_in_chunks(mask, i0, i1); }
    mask.chunk = 0;
    return fgqa_kv_range(&mask, i0, i1);
}
static __device__ __noinline__ fgqa_dec_span span_of(fgqa_mask mask, int32_t first_slot) { return fgqa_dec_span_of(&mask, first_slot, GRANULE); }

static __device__ __forceinline__ dec_sequence dec_sequence_at(const dec_params &p, int32_t b)
{
    const dec_lengths &l = p.lengths;
    fgqa_problem problem;           /* in registers: what is looked at here */
    problem.cu_seqlens_q = NULL;
    problem.q_lens = l.q_lens;
    problem.kv_lens = l.kv_lens;
    problem.sq = l.sq;
    problem.sk = l.sk;
    problem.left = l.left;
    problem.right = l.right;
    problem.chunk = l.chunk;
    problem.align = l.align;
    problem.cache.page_size = l.page_size;
    problem.cache.slots = l.slots;
    problem.cache.new_max = l.new_max;
    problem.cache.capacity = l.capacity;
    problem.cache.lens = l.lens;
    problem.cache.left_pad = l.left_pad;
    problem.cache.new_lens = l.new_lens;
    int32_t rows;
    const fgqa_sequence s = fgqa_device_sequence(problem, b, &rows);
    const int32_t first = (int32_t)s.k_row;
    dec_sequence sequence = {first, s.mask.sk, s.mask.sq, {first / GRANULE, (first + s.mask.sk - 1) / GRANULE + 1 - first / GRANULE}};
    if (!l.whole || s.mask.sq <= 0 || s.mask.sk <= 0) { sequence.span = span_of(s.mask, first); }
    return sequence;
}

static __host__ __device__ __forceinline__ int32_t units_of(const dec_params &p, int32_t granules)
{
    return p.layout.chunk ? (granules + p.layout.chunk - 1) / p.layout.chunk : granules;
}

/* Where a unit lies. pair_unit: number of the first unit of its pair. */
struct dec_place { int32_t b, h, units, pair_unit; fgqa_dec_span span; };

static __host__ __device__ __forceinline__ work_split split_of(const dec_params &p, int32_t units, bool equal)
{
    const int32_t least = p.layout.chunk ? 1 : FGQA_DEC_MIN_KEYS / GRANULE, wanted = (units + least - 1) / least;
    const int32_t most = equal ? p.blocks_aligned : p.layout.blocks;
    work_split split;
    split.blocks = wanted < 1 ? 1 : wanted < most ? wanted : most;
    split.share = units / split.blocks;
    split.longer = units - split.blocks * split.share;
    return split;
}

/* Of pairs of equal units: whether each block has whole ones, and makes their results without records. */
static __host__ __device__ __forceinline__ bool leaves_no_records(const dec_params &p, const work_split &split, int32_t units)
{
    return (p.layout.chunk == 0 || units == 1 || (p.folds && units <= FEW_PARTS)) && split.longer == 0 && split.share % units == 0;
}

/* Where blocks have several whole pairs each, of equal spans, block k has the pairs k, k + blocks, ...: heads of a sequence
 * are read at the same time by neighbours, not head after head by one block, which finds more of small pages in open rows of
 * memory and has blocks less far apart in contiguous caches. The next pair is then of the same head, so many sequences
 * further; 0: pairs follow each other. */
static __host__ __device__ __forceinline__ int32_t b_step_of(const dec_params &p, const work_split &split)
{
    const int32_t step = p.by_heads(split.blocks);
    return step * p.layout.heads == split.blocks ? step : 0;
}

static __device__ __forceinline__ dec_place place_of_pair(const dec_params &p, int32_t pair)
{
    const int32_t b = p.by_heads(pair);
    const dec_place at = {b, pair - b * p.layout.heads, p.units, pair * p.units, p.span};
    return at;
}

/* Of uniform lengths: the place of this block's first unit, `begin`. With b_step, units are counted as the block comes to them. */
static __device__ __forceinline__ dec_place first_place(const dec_params &p, int32_t begin)
{
    dec_place at = place_of_pair(p, p.b_step ? (int32_t)blockIdx.x : p.by_units(begin));
    if (p.b_step) { at.pair_unit = begin; }
    return at;
}

static __device__ __forceinline__ int32_t warp_scan(int32_t x, int lane)
{
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int32_t up = __shfl_up_sync(0xFFFFFFFFu, x, d);
        if (lane >= d) { x += up; }
    }
    return x;
}

/* Lengths on the device: a warp looks at 32 sequences at a time. */
struct length_scan {
    const dec_params &p;
    int lane;
    fgqa_dec_span first;            /* of sequence `lane`: most batches need no other */

    __device__ __forceinline__ length_scan(const dec_params &params, int lane) : p(params), lane(lane)
    {
        first = span(0, false);
    }
    __device__ __forceinline__ fgqa_dec_span span(int32_t b0, bool kept = true) const
    {
        if (b0 == 0 && kept) { return first; }
        fgqa_dec_span s = {0, 0};
        if (b0 + lane < p.lengths.b) { s = dec_sequence_at(p, b0 + lane).span; }
        return s;
    }
    /* Units in all, whether all sequences have equally many granules, and whether these are the same ones. */
    __device__ __forceinline__ int32_t total(bool *equal, bool *same) const
    {
        int32_t sum = 0, least = INT32_MAX, most = 0, begin = __shfl_sync(0xFFFFFFFFu, first.first, 0);
        bool differs = false;
        for (int32_t b0 = 0; b0 < p.lengths.b; b0 += 32) {
            const fgqa_dec_span own = span(b0);
            const int32_t count = own.count;
            sum += units_of(p, count);
            if (count > 0) {
                least = min(least, count);
                differs |= own.first != begin;
            }
            most = max(most, count);
        }
        *equal = __reduce_min_sync(0xFFFFFFFFu, least) == __reduce_max_sync(0xFFFFFFFFu, most);
        *same = *equal && !__any_sync(0xFFFFFFFFu, differs);
        return __reduce_add_sync(0xFFFFFFFFu, sum) * p.layout.heads;
    }
    __device__ __forceinline__ dec_place locate(int32_t unit) const
    {
        dec_place at = {0, 0, 1, 0, {0, 1}};
        int32_t before = 0;
        for (int32_t b0 = 0; b0 < p.lengths.b; b0 += 32) {
            const fgqa_dec_span own = span(b0);
            const int32_t units = units_of(p, own.count), after = before + warp_scan(units * p.layout.heads, lane);
            const uint32_t past = __ballot_sync(0xFFFFFFFFu, after > unit);
            if (past) {
                const int from = __ffs((int)past) - 1;
                at.b = b0 + from;
                at.units = __shfl_sync(0xFFFFFFFFu, units, from);
                at.span.first = __shfl_sync(0xFFFFFFFFu, own.first, from);
                at.span.count = __shfl_sync(0xFFFFFFFFu, own.count, from);
                const int32_t begin = __shfl_sync(0xFFFFFFFFu, after, from) - at.units * p.layout.heads;
                at.h = (unit - begin) / at.units;
                at.pair_unit = begin + at.h * at.units;
                return at;
            }
            before = __shfl_sync(0xFFFFFFFFu, after, 31);
        }
        return at;
    }
    __device__ __forceinline__ dec_place pair(int32_t b, int32_t h) const
    {
        dec_place at = {b, h, 1, 0, {0, 1}};
        int32_t sum = 0;
        for (int32_t b0 = 0; b0 <= b; b0 += 32) {
            const fgqa_dec_span own = span(b0);
            if (b0 + lane < b) { sum += units_of(p, own.count); }
            at.span.first = __shfl_sync(0xFFFFFFFFu, own.first, b & 31);
            at.span.count = __shfl_sync(0xFFFFFFFFu, own.count, b & 31);
        }
        at.units = units_of(p, at.span.count);
        at.pair_unit = __reduce_add_sync(0xFFFFFFFFu, sum) * p.layout.heads + h * at.units;
        return at;
    }
};

/* How work is dealt out, with lengths on the device. */
struct dec_cut {
    work_split split;
    int32_t b_step;
    bool whole_pairs;               /* several a block */
    int32_t begin, end;             /* units of this block; none if it has no work */
    bool same;
    int32_t of_pair;                /* units, where all have the same span */
    dec_place head;

    __device__ __forceinline__ dec_cut(const dec_params &p, const length_scan &scan)
    {
        bool equal;
        const int32_t block = (int32_t)blockIdx.x, units = scan.total(&equal, &same);
        of_pair = units_of(p, __shfl_sync(0xFFFFFFFFu, scan.first.count, 0));
        split = split_of(p, units, equal);
        whole_pairs = equal && split.share > of_pair && leaves_no_records(p, split, of_pair);
        b_step = whole_pairs && same ? b_step_of(p, split) : 0;
        begin = split.begin(block);
        end = block < split.blocks ? split.begin(block + 1) : begin;
        head = place(p, scan, b_step ? min(block, split.blocks - 1) * of_pair : begin);
        if (b_step) { head.pair_unit = begin; }
    }
    __device__ __forceinline__ dec_place place(const dec_params &p, const length_scan &scan, int32_t unit) const
    {
        if (!same) { return scan.locate(unit); }
        const int32_t pair = unit / of_pair, b = min(p.by_heads(pair), p.lengths.b - 1);       /* behind the last unit: of a block without work */
        const dec_place at = {b, pair - b * p.layout.heads, of_pair, pair * of_pair,
                              {__shfl_sync(0xFFFFFFFFu, scan.first.first, 0), __shfl_sync(0xFFFFFFFFu, scan.first.count, 0)}};
        return at;
    }
};

/* The parts of a pair that is split: part n has left record(n). */
struct dec_parts {
    int32_t count, first, offset;
    int32_t chunked;
    __device__ __forceinline__ int64_t record(int32_t n) const
    {
        return chunked ? first + n : 2 * (int64_t)(first + n) + (n == 0 ? offset : 0);
    }
};

/* A share of the merge of one pair: groups of items first, first + step, ... of all its rows. step 0: nothing. */
struct dec_share { int32_t b, h, sq, first, step; dec_parts parts; int32_t first_block; };

/* A block's part of the work, made by one warp for all. */
enum { CACHED_SEQUENCES = 16 };
struct dec_schedule {
    work_split split;
    int32_t begin, end;             /* units */
    dec_place head, tail;           /* of the first and of the last of them, if pairs follow each other */
    int32_t b_step;
    dec_share share[2];             /* of the merge of their pairs; made a little later */
    dec_sequence cached[CACHED_SEQUENCES];      /* sequence head.b and the next ones */
};

static __device__ __forceinline__ void make_schedule(const dec_params &p, dec_schedule &schedule, int lane)
{
    work_split split = p.split;
    dec_place head, tail;
    int32_t begin, end, b_step = 0;
    if (p.uniform) {
        begin = split.begin((int32_t)blockIdx.x);
        end = split.begin((int32_t)blockIdx.x + 1);
        head = first_place(p, begin);
        tail = p.b_step ? head : place_of_pair(p, p.by_units(max(begin, end - 1)));
        b_step = p.b_step;
    } else {
        const length_scan scan(p, lane);
        const dec_cut cut(p, scan);
        split = cut.split;
        begin = cut.begin;
        end = cut.end;
        head = tail = cut.head;
        b_step = cut.b_step;
        if (b_step == 0) { tail = cut.place(p, scan, max(begin, end - 1)); }
    }
    if ((int32_t)blockIdx.x >= split.blocks) { end = begin; }
    if (lane == 0) {
        schedule.split = split;
        schedule.begin = begin;
        schedule.end = end;
        schedule.head = head;
        schedule.tail = tail;
        schedule.b_step = b_step;
    }
    if (!p.uniform && lane < CACHED_SEQUENCES) {
        const int32_t b = head.b + lane * max(b_step, 1);
        if (b_step ? b < p.lengths.b : b <= tail.b) { schedule.cached[lane] = dec_sequence_at(p, b); }
    }
    __syncwarp();
}

/* First unit. */
static __device__ __forceinline__ int32_t begin_of_block(const dec_params &p, const dec_schedule &schedule)
{
    return p.uniform ? p.split.begin((int32_t)blockIdx.x) : schedule.begin;
}

static __device__ __forceinline__ dec_sequence sequence_of(const dec_params &p, const dec_schedule &schedule, int32_t b)
{
    if (p.uniform) { return p.sequence; }
    const int32_t n = schedule.b_step ? (b - schedule.head.b) / schedule.b_step : b - schedule.head.b;
    return n < CACHED_SEQUENCES ? schedule.cached[n] : dec_sequence_at(p, b);
}

/* A walk over the segments of a block. */
struct dec_segment {
    int32_t b, h;
    fgqa_dec_span span;             /* of the pair */
    int32_t g0, g1;                 /* granules of the span, [g0, g1) */
    int32_t left;                   /* units after this segment; -1: there is no segment any more */
    int32_t b_step;

    __device__ __forceinline__ bool valid() const { return left >= 0; }
    __device__ __forceinline__ void clip(const dec_params &p)
    {
        if (left <= 0) {
            left = -1;
            g1 = g0;
            return;
        }
        g1 = min(span.count, g0 + (p.layout.chunk ? p.layout.chunk : left));
        left -= p.layout.chunk ? 1 : g1 - g0;
    }
    /* schedule NULL: from memory, for a warp that does not wait for it. uniform: p.uniform, where it is known. */
    __device__ __forceinline__ void next(const dec_params &p, const dec_schedule *schedule, bool uniform = false)
    {
        g0 = g1;
        if (g0 == span.count && left > 0) {
            g0 = 0;
            if (b_step) {
                b += b_step;
            } else if (++h == p.layout.heads) {
                h = 0;
                b++;
                if (!uniform && !p.uniform) { span = (schedule ? sequence_of(p, *schedule, b) : dec_sequence_at(p, b)).span; }
            }
        }
        clip(p);
    }
    __device__ __forceinline__ bool whole() const { return g0 == 0 && g1 == span.count; }
    /* Of a pair's first chunk: whether the block has all of them, more than one and few. */
    __device__ __forceinline__ bool folds(const dec_params &p) const
    {
        const int32_t units = units_of(p, span.count);
        return p.folds && !whole() && units <= FEW_PARTS && units <= left + 1;
    }
};

static __device__ __forceinline__ dec_segment first_segment(const dec_params &p, const dec_place &head, int32_t begin, int32_t end, int32_t b_step)
{
    dec_segment s = {head.b, head.h, head.span, (begin - head.pair_unit) * (p.layout.chunk ? p.layout.chunk : 1), 0, end - begin, b_step};
    s.clip(p);
    return s;
}

static __device__ __forceinline__ dec_segment first_segment(const dec_params &p, const dec_schedule &schedule)
{
    return first_segment(p, schedule.head, schedule.begin, schedule.end, schedule.b_step);
}

/* The same without the schedule, so that the first copies need not wait for it. Whole warp. *evict_normal: whether this launch
 * reads K and V so. */
template <bool UNIFORM> static __device__ __forceinline__ dec_segment first_segment_early(const dec_params &p, bool *evict_normal)
{
    if (UNIFORM || p.uniform) {
        const int32_t block = (int32_t)blockIdx.x, begin = p.split.begin(block), end = block < p.split.blocks ? p.split.begin(block + 1) : begin;
        *evict_normal = p.evict_normal;
        return first_segment(p, first_place(p, begin), begin, end, p.b_step);
    }
    const length_scan scan(p, (int)thread_index() % 32);
    const dec_cut cut(p, scan);
    *evict_normal = p.evict_normal && cut.whole_pairs;
    return first_segment(p, cut.head, cut.begin, cut.end, cut.b_step);
}

/* Of a pair, `at`, that a cluster has, the part of this block, which may be empty. */
static __device__ __forceinline__ dec_segment part_of_pair(const dec_params &p, const dec_place &at, const dec_sequence &sequence)
{
    const int32_t units = sequence.span.count, share = p.uniform ? p.split.share : p.by_parts(units + p.parts - 1), begin = min((int32_t)cluster_rank() * share, units);
    const dec_segment part = {at.b, at.h, sequence.span, begin, min(begin + share, units), 0, 0};
    return part;
}

/* Without chunks part n is that of block first + n: its first segment, or for n = 0 maybe its last. */
static __device__ __forceinline__ dec_parts parts_of(const dec_params &p, const work_split &split, const dec_place &at)
{
    if (p.layout.chunk) {
        const dec_parts chunks = {at.units, at.pair_unit, 0, 1};
        return chunks;
    }
    const int32_t first = split.block_of(at.pair_unit), last = split.block_of(at.pair_unit + at.units - 1);
    const dec_parts parts = {last - first + 1, first, at.pair_unit != split.begin(first), 0};
    return parts;
}

/* The packed rows of a pair. */
struct pair_rows { packed_rows rows; int32_t kv_head, valid; };

static __device__ __forceinline__ pair_rows pair_rows_of(const dec_params &p, int32_t h)
{
    const int32_t kv_head = p.by_row_blocks(h), first = (h - kv_head * p.layout.row_blocks) * p.layout.rows;
    const pair_rows rows = {packed_rows_at(first, p.common.problem.g), kv_head, min(p.layout.rows, p.common.problem.sq * p.common.problem.g - first)};
    return rows;
}

static __device__ __forceinline__ fgqa_mask mask_of(const dec_params &p, const dec_sequence &s)
{
    const dec_lengths &l = p.lengths;
    const fgqa_mask mask = {s.sq, s.sk, l.align == FGQA_ALIGN_BOTTOM_RIGHT ? s.sk - s.sq : 0, l.left, l.right, l.chunk};
    return mask;
}

/* Slots that packed row `local` sees; none for rows that do not exist or are padding. */
static __device__ __forceinline__ fgqa_range slots_of_row(const dec_params &p, const fgqa_mask &mask, const dec_sequence &s, const pair_rows &rows, int32_t local)
{
    fgqa_range seen = {0, 0};
    if (p.one_query) { return local < rows.valid ? p.keys : seen; }
    const int32_t i = rows.rows.i(local);
    if (local < rows.valid && i < mask.sq) {
        const fgqa_range keys = keys_of_rows(mask, i, i + 1);
        seen.begin = s.first_slot + keys.begin;
        seen.end = s.first_slot + keys.end;
    }
    return seen;
}

/* Slots that some row of the pair sees, and those that all of them see. */
struct pair_slots { fgqa_range seen, full; };

static __device__ __forceinline__ pair_slots pair_slots_of(const dec_params &p, const fgqa_mask &mask, const dec_sequence &s, const pair_rows &rows)
{
    pair_slots slots = {p.keys, p.keys};
    if (p.one_query) { return slots; }
    slots.seen.begin = slots.seen.end = slots.full.begin = slots.full.end = 0;
    const int32_t i = rows.rows.i(0), last = rows.rows.i(rows.valid - 1);
    if (i < mask.sq) {
        const fgqa_range keys = keys_of_rows(mask, i, min(last, mask.sq - 1) + 1);
        slots.seen.begin = s.first_slot + keys.begin;
        slots.seen.end = s.first_slot + keys.end;
    }
    if (last < mask.sq) {
        slots.full.begin = s.first_slot + keys_of_rows(mask, last, last + 1).begin;
        slots.full.end = s.first_slot + keys_of_rows(mask, i, i + 1).end;
    }
    return slots;
}
