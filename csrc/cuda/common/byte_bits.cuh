/* byte_bits.cuh - boolean tensors, a byte an element, as bits. */
#pragma once
#include <stdint.h>

/* Four bytes, those that are not 0 as bits, in front of the bits of later ones. */
static __device__ __forceinline__ uint32_t bits_of_bytes(uint32_t x, uint32_t later)
{
    x = ((x & 0x7F7F7F7Fu) + 0x7F7F7F7Fu | x) & 0x80808080u;
    return __funnelshift_l(x * 0x00204081u, later, 4);
}
