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

/* a * b in halves. On a GPU one instruction; of the product in 64 bits nvcc makes sums of 64 bits, too. */
FGQA_FN void fgqa_wide_product(uint32_t a, uint32_t b, uint32_t *high, uint32_t *low)
{
#if defined(__CUDA_ARCH__)
    asm("{\n\t.reg .b64 x;\n\tmul.wide.u32 x, %2, %3;\n\tmov.b64 {%0, %1}, x;\n\t}" : "=r"(*low), "=r"(*high) : "r"(a), "r"(b));
#else
    const uint64_t x = (uint64_t)a * b;
    *high = (uint32_t)(x >> 32);
    *low = (uint32_t)x;
#endif
}

FGQA_FN fgqa_philox_block fgqa_philox(uint64_t key, fgqa_philox_block counter)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < FGQA_PHILOX_ROUNDS; round++) {
        uint32_t a[2], b[2];            /* high halves first */
        fgqa_wide_product(FGQA_PHILOX_M0, counter.x[0], &a[0], &a[1]);
        fgqa_wide_product(FGQA_PHILOX_M1, counter.x[2], &b[0], &b[1]);
        const fgqa_philox_block next = {{b[0] ^ counter.x[1] ^ k0, b[1], a[0] ^ counter.x[3] ^ k1, a[1]}};
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
