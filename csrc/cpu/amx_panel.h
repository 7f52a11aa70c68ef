/* amx_panel.h - panels and blocks of keys (tile.h) as bfloat16 rows and operands of the tile unit.
 *
 * Blocks start at multiples of KEYS and steps of AMX_DEPTH keys at multiples of that, so that, as elsewhere, a row's bits
 * depend on its own sequence alone: where a panel's keys begin or end inside a step, the others take part with weight 0.
 */
#ifndef FGQA_AMX_PANEL_H
#define FGQA_AMX_PANEL_H
#include "amx.h"
#include "tile.h"

#define AMX_BLOCK_ROWS (KEYS + AMX_DEPTH)             /* rows of a block: those behind its end are read, never used */
#define AMX_PAIR(keys) ((keys) / AMX_DEPTH * 2 * AMX_TILE)   /* two tiles of columns of so many packed keys */

SIMD int32_t amx_tiles(int32_t n) { return (n + AMX_SIDE - 1) / AMX_SIDE; }

/* What is not bfloat16 becomes two parts (amx.h), the low ones `low` behind the high ones; `low` is 0 for bfloat16. */

/* Of a buffer of n numbers. */
SIMD ptrdiff_t amx_low_of(const fgqa_problem *p, ptrdiff_t n) { return !FGQA_TILES || p->dtype == FGQA_BF16 ? 0 : n; }
SIMD size_t amx_parts(const fgqa_problem *p) { return amx_low_of(p, 1) ? 2 : 1; }

/* A row of a view; `scratch`: as many reals. */
SIMD void amx_load_row(bf16 *to, ptrdiff_t low, const void *from, const fgqa_view *view, int32_t cols, real *scratch)
{
    if (low && is_own(view, cols)) {
        amx_row_split(to, low, from, cols);
    } else if (low) {
        row_load(scratch, from, view->dtype, view->stride_d, cols);
        amx_row_split(to, low, scratch, cols);
    } else {
        amx_row(to, from, view->stride_d, cols);
    }
}

SIMD void amx_zero_rows(bf16 *rows, ptrdiff_t low, int32_t n, int32_t ld)
{
    memset(rows, 0, (size_t)(n * ld) * sizeof(bf16));
    if (low) { memset(rows + low, 0, (size_t)(n * ld) * sizeof(bf16)); }
}

/* Keys of a block that ends with key j1, counted from its origin, in whole steps: what is packed of it. */
SIMD int32_t amx_block_keys(int32_t j1) { return AMX_PAD((j1 - 1) % KEYS + 1); }

/* Keys [j0, j1) of one block as rows [AMX_BLOCK_ROWS][AMX_PAD(cols)], zeros where their steps have no key. */
static void amx_load_keys(bf16 *to, ptrdiff_t low, const tile_sequence *t, const fgqa_view *view, int32_t j0, int32_t j1, int32_t cols)
{
    real row[AMX_PAD(FGQA_MAX_HEAD_DIM)];
    const int64_t step = view->stride_s * (int64_t)fgqa_dtype_bytes(view->dtype);
    const int32_t ld = AMX_PAD(cols), before = j0 % KEYS, s0 = (int32_t)t->seq.k_row + j0, s1 = s0 + j1 - j0;
    amx_zero_rows(to, low, before, ld);
    to += (ptrdiff_t)before * ld;
    tile_page page = {0};
    for (int32_t s = s0; s < s1; s += page.rows) {
        page = tile_page_at(t, view, s, s1);
        for (int32_t n = 0; n < page.rows; n++, to += ld) { amx_load_row(to, low, page.row + n * step, view, cols, row); }
    }
    amx_zero_rows(to, low, amx_block_keys(j1) - before - (j1 - j0), ld);
}

/* The first `keys` rows of a block to A with the keys as terms, in the order in which a product reads them:
 * [two tiles of columns][step][2]; the next two tiles are `pair` numbers apart. */
static void amx_pack_keys(bf16 *to, ptrdiff_t pair, const bf16 *rows, ptrdiff_t ld, int32_t keys, int32_t cols)
{
    for (int32_t j = 0; j < keys; j += AMX_DEPTH) {
        amx_pack_columns(to + AMX_PAIR(j), pair, rows + j * ld, ld, amx_tiles(cols));
    }
}

/* Zeroes those of the first `keys` rows of a block that hold a NaN or an infinity; counted from
 * its origin. Returns how many there are. */
static int32_t amx_zero_bad_rows(tile_bad_rows *bad, bf16 *rows, ptrdiff_t low, int32_t keys, int32_t cols)
{
    const int32_t ld = AMX_PAD(cols);
    bad->count = 0;
    for (int32_t j = 0; j < keys; j++) {
        if (amx_row_is_finite(rows + j * ld, ld)) { continue; }
        bad->row[bad->count++] = (int16_t)j;
        amx_zero_rows(rows + j * ld, low, 1, ld);
    }
    return bad->count;
}

/* Packed rows of a panel as [PANEL][AMX_PAD(cols)], lanes beyond them 0; `negate`: with the other sign. */
static void amx_load_panel(bf16 *rows, ptrdiff_t low, const tile_sequence *t, const tile_panel *panel, const fgqa_view *view, int32_t cols, int negate)
{
    real scratch[AMX_PAD(FGQA_MAX_HEAD_DIM)];
    const int32_t ld = AMX_PAD(cols);
    for (int32_t lane = 0; lane < panel->rows; lane++) {
        bf16 *const row = rows + lane * ld;
        amx_load_row(row, low, tile_packed_row(t, view, panel->r0 + lane), view, cols, scratch);
        for (int32_t c = 0; negate && c < cols; c++) { row[c] ^= 0x8000; }
        for (int32_t c = 0; negate && low && c < cols; c++) { row[low + c] ^= 0x8000; }
    }
    amx_zero_rows(rows + panel->rows * ld, low, PANEL - panel->rows, ld);
}

/* Such rows to B with the lanes as columns: [step][nv]. */
static void amx_pack_panel(bf16 *to, const bf16 *rows, const tile_panel *panel, int32_t cols)
{
    amx_pack_rows(to, rows, AMX_PAD(cols), panel->nv, AMX_PAD(cols) / AMX_DEPTH);
}

#endif
