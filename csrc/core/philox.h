/* philox.h - Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3),
 * and how attention dropout indexes it. C11 and CUDA; the same bits everywhere.
 */
#ifndef FGQA_PHILOX_H
#define FGQA_PHILOX_H
#include "semantics.h"

#define FGQA_PHILOX_ROUNDS 10
#define FGQA_PHILOX_M0 0xD2511F53u   /* multipliers of words 0 and 2 */
#define FGQA_PHILOX_M1 0xCD9E8D57u
#define FGQA_PHILOX_W0 0x9E3779B9u   /* added to the key's words after each round */
#define FGQA_PHILOX_W1 0xBB67AE85u

typedef struct { uint32_t x[4]; } fgqa_philox_block;

FGQA_FN fgqa_philox_block fgqa_philox(uint64_t key, fgqa_philox_block counter)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < FGQA_PHILOX_ROUNDS; round++) {
        const uint64_t a = (uint64_t)FGQA_PHILOX_M0 * counter.x[0];
        const uint64_t b = (uint64_t)FGQA_PHILOX_M1 * counter.x[2];
        const fgqa_philox_block next = {{(uint32_t)(b >> 32) ^ counter.x[1] ^ k0, (uint32_t)b,
                                         (uint32_t)(a >> 32) ^ counter.x[3] ^ k1, (uint32_t)a}};
        counter = next;
        k0 += FGQA_PHILOX_W0;
        k1 += FGQA_PHILOX_W1;
    }
    return counter;
}

/* The 128 bits that decide keys 8*key_block .. 8*key_block+7 of query row i: key = seed,
 * counter = (key_block, i, batch*hq + head, offset). Key 8*key_block + n is decided by half n:
 * word n/2, low 16 bits for even n, high 16 bits for odd n. */
FGQA_FN fgqa_philox_block fgqa_dropout_bits(uint64_t seed, uint64_t offset, uint32_t key_block, uint32_t i, uint32_t batch_head)
{
    const fgqa_philox_block counter = {{key_block, i, batch_head, (uint32_t)offset}};
    return fgqa_philox(seed, counter);
}

FGQA_FN uint32_t fgqa_dropout_half(const fgqa_philox_block *bits, int n) { return (bits->x[n >> 1] >> (16 * (n & 1))) & 0xFFFFu; }

#endif
