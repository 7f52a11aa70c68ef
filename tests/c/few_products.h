/* few_products.h - the products for a handful of rows (csrc/cpu/decode.h) against plain sums, by the vectors that every
 * processor of this architecture has: 16 bytes, where groups of keys and rows come in other sizes than in the suite's calls.
 * Other instruction sets are tested by these. */
#include "../../csrc/core/tensor.h"
#include "../../csrc/cpu/decode.h"
#include "../../csrc/cpu/rows.h"
#include "check.h"
#include <math.h>

#define FEW_ERROR (FGQA_REAL_F64 ? 1e-14 : 1e-6)
enum { FEW_MOST_KEYS = 70, FEW_ALL = FEW_MOST_KEYS + LIST_AHEAD, FEW_DIM = 140, FEW_LD = 160, FEW_LDS = 128 };

typedef struct {
    real k[FEW_ALL * FEW_DIM], q[FEW_ROWS * FEW_LD], s[FEW_ROWS * FEW_LDS], p[FEW_ROWS * FEW_LDS], o[FEW_ROWS * FEW_LD], before[FEW_ROWS * FEW_LD];
    uint16_t half[FEW_ALL * FEW_DIM];
    const void *list[FEW_ALL];
} few_case;

static real few_random(void)
{
    static uint32_t x = 1;
    x = x * 1664525u + 1013904223u;
    return (real)(x >> 8) / (1 << 24) - (real)0.5;
}

static void few_fill(few_case *c, few_form form)
{
    for (int i = 0; i < FEW_ALL * FEW_DIM; i++) {
        c->k[i] = few_random();
#if !FGQA_REAL_F64
        if (form == FEW_LIST_BF16) { c->k[i] = float_from_bf16(c->half[i] = bf16_from_real(c->k[i])); }
#endif
    }
    for (int j = 0; j < FEW_ALL; j++) { c->list[j] = form == FEW_LIST_BF16 ? (const void *)(c->half + j * FEW_DIM) : (const void *)(c->k + j * FEW_DIM); }
}

static void check_scores(few_case *c, const few_source *k, int rows, int n, int d)
{
    for (int i = 0; i < FEW_ROWS * FEW_LD; i++) { c->q[i] = i / FEW_LD < rows && i % FEW_LD < d ? few_random() : 0; }
    few_scores(rows, n, d, k, c->q, FEW_LD, c->s, FEW_LDS);
    for (int r = 0; r < rows; r++) {
        for (int j = 0; j < n; j++) {
            double want = 0;
            for (int i = 0; i < d; i++) { want += (double)c->q[r * FEW_LD + i] * (double)c->k[j * FEW_DIM + i]; }
            const double error = fabs((double)c->s[r * FEW_LDS + j] - want);
            CHECK_FOR(error < FEW_ERROR * sqrt(d), "form %d, %d rows, %d keys, d %d: row %d, key %d", k->form, rows, n, d, r, j);
        }
    }
}

static void check_accumulated(few_case *c, const few_source *v, int rows, int n, int d)
{
    real factor[FEW_ROWS];
    for (int r = 0; r < FEW_ROWS; r++) {
        factor[r] = few_random();
        for (int j = 0; j < FEW_LDS; j++) { c->p[r * FEW_LDS + j] = r < rows && j < n ? few_random() : 0; }
    }
    for (int i = 0; i < FEW_ROWS * FEW_LD; i++) { c->o[i] = c->before[i] = few_random(); }
    few_accumulate(rows, n, d, few_keys(rows, d, v->form), c->p, FEW_LDS, v, c->o, FEW_LD, factor);
    const int ld = (d + VL - 1) / VL * VL;
    for (int r = 0; r < FEW_ROWS; r++) {
        for (int i = 0; i < FEW_LD; i++) {
            const real got = c->o[r * FEW_LD + i], old = c->before[r * FEW_LD + i];
            if (r >= few_lanes(rows) || i >= ld) { CHECK_FOR(got == old, "%d rows, d %d: row %d, column %d written", rows, d, r, i); }
            if (r >= rows || i >= d) { continue; }
            double want = (double)old * (double)factor[r];
            for (int j = 0; j < n; j++) { want += (double)c->p[r * FEW_LDS + j] * (double)c->k[j * FEW_DIM + i]; }
            CHECK_FOR(fabs((double)got - want) < FEW_ERROR * sqrt(n + 1), "form %d, %d rows, %d keys, d %d: row %d, column %d", v->form, rows, n, d, r, i);
        }
    }
}

static void check_few_products(void)
{
    static few_case c;
    static const few_form forms[] = {FEW_BLOCK, FEW_LIST, FEW_LIST_BF16};
    static const int dims[] = {1, 2, 3, 5, 8, 15, 16, 31, 33, 64, 80, 96, 128, 136}, keys[] = {1, 2, 3, 4, 5, 8, 17, 32, 33, 70};
    for (size_t f = 0; f < sizeof forms / sizeof *forms; f++) {
        if (forms[f] == FEW_LIST_BF16 && FGQA_REAL_F64) { continue; }
        few_fill(&c, forms[f]);
        const few_source source = {c.k, FEW_DIM, c.list, forms[f]};
        for (int rows = 1; rows <= FEW_ROWS; rows++) {
            for (size_t i = 0; i < sizeof dims / sizeof *dims; i++) {
                for (size_t j = 0; j < sizeof keys / sizeof *keys; j++) {
                    check_scores(&c, &source, rows, keys[j], dims[i]);
                    check_accumulated(&c, &source, rows, keys[j], dims[i]);
                }
            }
        }
    }
}
