/* fwd_pack.h - which query heads share a tile of the forward rows for Hopper, and how many tiles there are. C11 and CUDA. */
#ifndef FGQA_FWD_PACK_H
#define FGQA_FWD_PACK_H
#include "../any/fwd_split.h"

/* Forward rows for Hopper whose tiles are so few rows that a multiprocessor holds several blocks, for short sequences. They
 * have the plain kernel, and those below: each chain of scores costs as much of a build. */
#define FGQA_IS_SHORT(block_q) ((block_q) < 128)

/* Padded sequences of lengths that the host knows, not in a cache. */
static inline int fgqa_is_even(const fgqa_problem *p)
{
    return !p->varlen && !p->q_lens && !p->kv_lens && p->cache.page_size == 0;
}

/* Those that have a kernel for them, if their keys are not in parts. */
#define FGQA_HAS_EVEN(d, block_q) ((d) == 128 && (block_q) > 128)

/* Short rows hold all keys of a sequence at once where they are so few and the host knows all lengths (sm90/fwd_whole.cuh): a
 * kernel for each of these numbers. The answer is the same for every batch. */
#define FGQA_WHOLE_KEYS 32, 64, 80, 96, 112, 128

/* The least of them that serves; 0: none. */
static inline int32_t fgqa_whole_keys(const fgqa_problem *p)
{
    static const int32_t keys[] = {FGQA_WHOLE_KEYS};
    const int serves = fgqa_is_even(p) && p->sk > 0 && p->hq <= UINT16_MAX;      /* as wide as a grid is along y */
    for (size_t n = 0; serves && n < sizeof keys / sizeof keys[0]; n++) {
        if (p->sk <= keys[n]) { return keys[n]; }
    }
    return 0;
}

/* Those that have a kernel with softcap, and with ALiBi. */
#define FGQA_HAS_SOFTCAP(block_q) (!FGQA_IS_SHORT(block_q))
#define FGQA_HAS_ALIBI(d, block_q) (((d) == 64 || (d) == 128) && !FGQA_IS_SHORT(block_q))

/* Those that take a bias and a mask tensor, plain rows and those for dropout: a kernel each, too. */
#define FGQA_HAS_TERMS(d, block_k) (((d) == 64 || (d) == 128) && (block_k) == 128)

/* Those that take them by TMA where it can address them: so too. */
#define FGQA_HAS_TILED(d, block_k) (FGQA_HAS_TERMS(d, block_k) || (d) == 256)

/* Those of them that have another one for these beside softcap and ALiBi, in any mix. */
#define FGQA_HAS_TILED_ALL(d, block_k, dropout) (FGQA_HAS_TILED(d, block_k) && !(dropout))

/* Those that have a kernel for what others lack: softcap, ALiBi, a bias and a mask tensor, each or all together. */
#define FGQA_HAS_ALL(d, block_k) (FGQA_HAS_TERMS(d, block_k) || (d) == 256)

/* Those that take the scales of a float8 cache, of which they read a copy (any/cache_copy.h): so too. They serve any head dim. */
#define FGQA_HAS_SCALES(d, block_q) (((d) == 64 && !FGQA_IS_SHORT(block_q)) || (((d) == 128 || (d) == 256) && (block_q) == 128))

/* Those of which a kernel merges the parts of a tile's keys itself, if a block has one tile (sm90/fwd_merge.cuh). */
#define FGQA_HAS_MERGE(d, block_q) ((d) == 128 && (block_q) == 128)

/* Those with one in which two blocks bring keys for both (sm90/fwd_pair.cuh). Tall ones of d 128 lose 3% by it. */
#define FGQA_HAS_PAIRS(d) ((d) == 256)

/* Heads of a group that one copy can bring: the rows of a consumer warpgroup. */
enum { FGQA_MOST_PACKED = 64 };

/* log2 of the query heads of a group that share a tile of block_q packed rows: row r is row r >> pack of head r % 2^pack. 0 where
 * the rows of one head fill their tiles as well. Of packed sequences lengths are not known here, and on average the last tile of
 * each is half empty: 32 tokens of four heads are less than 128 of one. */
static inline int32_t fgqa_hopper_pack(const fgqa_problem *p, int32_t block_q)
{
    const int64_t rows = p->varlen ? p->total_q : p->sq;
    int32_t pack = 0;
    while (p->g % (2 << pack) == 0 && 2 << pack <= FGQA_MOST_PACKED) { pack++; }
    const int64_t usual = fgqa_usual_rows(p), alone = (usual + block_q - 1) / block_q << pack, shared = ((usual << pack) + block_q - 1) / block_q;
    return (alone <= shared && !p->varlen) || rows << pack > INT32_MAX / 2 ? 0 : pack;
}

/* Of packed sequences, at most so many. */
static inline int64_t fgqa_hopper_tiles(const fgqa_problem *p, int32_t block_q)
{
    const int32_t pack = fgqa_hopper_pack(p, block_q);
    const int64_t blocks = p->varlen ? (p->total_q << pack) / block_q + p->b : (((int64_t)p->sq << pack) + block_q - 1) / block_q * p->b;
    return blocks * (p->hq >> pack);
}

#endif
