/* rotary.h - rotary embedding of one row (semantics.h): of q while it is packed, of new keys while they are cached. */
#ifndef FGQA_ROTARY_H
#define FGQA_ROTARY_H
#include "../core/problem.h"
#include "rows.h"

typedef struct { real cos[FGQA_MAX_HEAD_DIM / 2], sin[FGQA_MAX_HEAD_DIM / 2]; } rotary_angles;

FGQA_SHARED void rotary_load(rotary_angles *angles, const fgqa_rotary *rotary, int64_t position)
{
    const fgqa_view *const views[2] = {&rotary->cos, &rotary->sin};
    real *const to[2] = {angles->cos, angles->sin};
    for (int n = 0; n < 2; n++) {
        const char *row = (const char *)views[n]->data + position * views[n]->stride_s * (int64_t)fgqa_dtype_bytes(views[n]->dtype);
        row_load(to[n], row, views[n]->dtype, views[n]->stride_d, rotary->pairs);
    }
}

FGQA_SHARED void rotary_turn(real *x, const rotary_angles *angles, const fgqa_rotary *rotary)
{
    for (int32_t n = 0; n < rotary->pairs; n++) {
        real *a = x + fgqa_rotary_a(n, rotary->interleaved), *b = x + fgqa_rotary_b(n, rotary->pairs, rotary->interleaved);
        const real first = FGQA_ROTARY_A(*a, *b, angles->cos[n], angles->sin[n]);
        *b = FGQA_ROTARY_B(*a, *b, angles->cos[n], angles->sin[n]);
        *a = first;
    }
}

#endif
