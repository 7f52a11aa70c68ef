/* dropout.cuh - what decides which weights a kernel drops: the key of a call, and the test of two keys' bits at once. */
#pragma once
#include "../../core/philox.h"
#include "../../core/problem.h"

struct dropout_key { uint64_t seed, offset; uint32_t threshold; };

static __device__ __forceinline__ dropout_key dropout_key_make(const fgqa_problem &p)
{
    dropout_key key = {p.seed, p.offset, p.dropout_threshold};
    if (p.seed_on_device) {
        key.seed = (uint64_t)p.seed_on_device[0];
        key.offset = (uint64_t)p.seed_on_device[1];
    }
    return key;
}

/* fgqa_dropout_keeps() of both halves of a word, a threshold above 0: bits 0 and 16, all others are 0. Two instructions of
 * Hopper's. */
static __device__ __forceinline__ uint32_t dropout_keeps_halves(uint32_t word, uint32_t threshold)
{
    const uint32_t most_dropped = (threshold - 1) * 0x00010001u;
    return __viaddmin_u16x2(__vmaxu2(word, most_dropped), __vneg2(most_dropped), 0x00010001u);
}
