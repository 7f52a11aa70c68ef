/* amx_tile.h - the tile instructions: eight tiles of 16 rows of 64 bytes. Without them (amx_dot.h) only their shapes.
 *
 * Statements of our own, because gcc 12's intrinsics do not tell the compiler that they read and write memory. Tile numbers
 * are literals. Configuration is a thread's own: set at the start of a task, released at its end, since live tiles make every
 * switch of threads save 8 KB.
 *
 *     amx_dot(c, a, b)    c[m][n] += sum over pairs k of a[m][2k]*b[k][2n] + a[m][2k+1]*b[k][2n+1]
 *
 * a and b hold bfloat16, c float32; subnormal numbers count as 0.
 *
 * FGQA_AMX_EMULATED names a header with the same statements in plain C (tests/c/amx_emulated.h): the kernels' logic then runs
 * on any processor with AVX-512.
 */
#ifndef FGQA_AMX_TILE_H
#define FGQA_AMX_TILE_H
#include <immintrin.h>
#include <stdint.h>
#include "simd.h"

#define AMX_DEPTH 32                 /* terms of a step */
#define AMX_SIDE 16                  /* rows and columns of a tile of C */
#define AMX_TILE 512                 /* bfloat16 numbers in a tile of A or B */
#define AMX_PAD(n) (((n) + AMX_DEPTH - 1) / AMX_DEPTH * AMX_DEPTH)

typedef uint16_t bf16;

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_config;

#if !defined(FGQA_AMX_EMULATED) || !FGQA_TILES
#define amx_load(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((intptr_t)(stride)) : "memory")
/* For what is read once in a while: leaves the first-level cache to others. */
#define amx_load_stream(tile, from, stride) \
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile : : "r"(from), "r"((intptr_t)(stride)) : "memory")
#define amx_store(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" : : "r"(to), "r"((intptr_t)(stride)) : "memory")
#define amx_zero(tile) __asm__ volatile("tilezero %%tmm" #tile : : : "memory")
#define amx_dot(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")
#define amx_configure(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(config)) : "memory")
#define amx_release() __asm__ volatile("tilerelease" : : : "memory")
/* Two vectors as 32 bfloat16 numbers, `low` first; rounded to nearest even, subnormal numbers count as 0. */
#define amx_narrow(low, high) ((__m512i)_mm512_cvtne2ps_pbh(high, low))
#else
#include FGQA_AMX_EMULATED
#endif

/* All tiles at full size. */
static inline void amx_begin(void)
{
    amx_config config = {.palette = 1};
    for (int n = 0; n < 8; n++) {
        config.row_bytes[n] = 64;
        config.rows[n] = 16;
    }
    amx_configure(&config);
}

#endif
