/* amx_product.h - packing and product of csrc/cpu/amx.h against plain loops, in small integers, which bfloat16 and float32 hold
 * exactly; on tiles (test_amx.c) or by vectors (test_amx_dot.c). */
#ifndef FGQA_AMX_PRODUCT_H
#define FGQA_AMX_PRODUCT_H
#include "../../csrc/cpu/amx.h"
#include "check.h"
#include <stdlib.h>

#define M 48                 /* three tiles: a pair and a single one */
#define M_PAIRS 64           /* the single one with room for a second */
#define N 48
#define K 64                 /* two steps */
#define LD 96                /* of rows in memory: longer than they are */

static _Alignas(64) bf16 a[M][LD], a_columns[K][LD], b_rows[N][LD], b_pairs[K][LD];
static _Alignas(64) bf16 packed_a[M_PAIRS * K], packed_b[N * K];
static _Alignas(64) float c[M][N], want[M][N];

static bf16 bf16_of(int x)
{
    const float value = (float)x;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bf16)(bits >> 16);
}

/* a[m][k] and b[k][n], each as rows of terms and as columns of terms. */
static void fill(void)
{
    static int left[M][K], right[K][N];
    for (int k = 0; k < K; k++) {
        for (int m = 0; m < M; m++) {
            left[m][k] = rand() % 17 - 8;
            a[m][k] = a_columns[k][m] = bf16_of(left[m][k]);
        }
        for (int n = 0; n < N; n++) {
            right[k][n] = rand() % 17 - 8;
            b_pairs[k][n] = b_rows[n][k] = bf16_of(right[k][n]);
        }
    }
    for (int m = 0; m < M; m++) {
        for (int n = 0; n < N; n++) {
            int sum = 0;
            for (int k = 0; k < K; k++) { sum += left[m][k] * right[k][n]; }
            want[m][n] = (float)sum;
        }
    }
}

static void check_product(int add, int m, int n, const amx_operand *left, const amx_operand *right)
{
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) { c[i][j] = 1000; }
    }
    amx_product(add, m, n, K / AMX_DEPTH, left, right, &c[0][0], N);
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            const int inside = i < m * AMX_SIDE && j < n * AMX_SIDE;
            CHECK(c[i][j] == (inside ? want[i][j] + (add ? 1000 : 0) : 1000));
        }
    }
}

static void check_packing_and_product(void)
{
    fill();
    for (int tiles = 1; tiles <= 3; tiles++) {
        const amx_operand natural = {&a[0][0], AMX_DEPTH, AMX_SIDE * LD, 2 * AMX_SIDE * LD, LD, 0, 0};
        const amx_operand columns = {packed_a, 2 * AMX_TILE, AMX_TILE, K / AMX_DEPTH * 2 * AMX_TILE, AMX_DEPTH, 0, 0};
        const amx_operand right = {packed_b, tiles * AMX_TILE, AMX_TILE, 0, 0, 0, 0};
        for (int k = 0; k < K; k += AMX_DEPTH) {
            amx_pack_columns(packed_a + k / AMX_DEPTH * columns.step, columns.pair, &a_columns[k][0], LD, M / AMX_SIDE);
        }
        for (int pairs = 0; pairs < 2; pairs++) {
            if (pairs) {
                for (int k = 0; k < K; k += AMX_DEPTH) { amx_pack_pairs(packed_b + k / AMX_DEPTH * right.step, &b_pairs[k][0], LD, tiles); }
            } else {
                amx_pack_rows(packed_b, &b_rows[0][0], LD, tiles, K / AMX_DEPTH);
            }
            for (int m = 1; m <= 3; m++) {
                check_product(0, m, tiles, &natural, &right);
                check_product(1, m, tiles, &columns, &right);
            }
        }
    }
    _Alignas(64) bf16 row[64];
    amx_row(row, &a[0][0], 1, 37);
    for (int i = 0; i < 64; i++) { CHECK(row[i] == (i < 37 ? a[0][i] : 0)); }
    amx_row(row, &a[0][0], 2, 21);
    for (int i = 0; i < 32; i++) { CHECK(row[i] == (i < 21 ? a[0][2 * i] : 0)); }
    CHECK(amx_row_is_finite(row, 32));
    row[20] = 0x7F80;
    CHECK(!amx_row_is_finite(row, 32));
    row[20] = 0xFFC0;
    CHECK(!amx_row_is_finite(row, 32));
}

#endif
