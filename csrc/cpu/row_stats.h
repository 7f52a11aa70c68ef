/* row_stats.h - the two halves of a row's LSE: its largest score and the logarithm of its sum.
 *
 *     top = max s        log_sum = log2(sum 2^(s - top), the sink among them)        weight = 2^((s - top) - log_sum)
 *
 * top + log_sum is the LSE in base 2, but one number cannot hold it where the scores are huge: a row whose keys all carry
 * the lowest float as bias has uniform weights 1/n, of which lse, the lowest float again, knows nothing.
 */
#ifndef FGQA_ROW_STATS_H
#define FGQA_ROW_STATS_H
#include "tile.h"
#include <math.h>

/* Both base 2, one lane a row. top is +inf, which makes every weight 0, for idle lanes and rows that see nothing. */
typedef struct { _Alignas(64) real top[PANEL], log_sum[PANEL]; } row_stats;

/* Tiles as tile_scores wants them; `k_copy`: KEYS rows. */
typedef struct { real *s, *add, *rows, *k_copy; } stats_scratch;

/* `kv` is the sequence that says where K lies; another than `t` where lanes belong to one query head. */
FGQA_SHARED void row_stats_of(row_stats *stats, const tile_sequence *t, const tile_sequence *kv, const tile_panel *panel,
                              const real *q_t, const stats_scratch *scratch)
{
    const fgqa_problem *p = kv->p;
    for (int32_t v = 0; v < panel->nv; v++) {
        v_store(stats->top + v * VL, v_set1(-REAL_INF));
        v_store(stats->log_sum + v * VL, v_zero());            /* the sum itself until the end */
    }
    for (int32_t block = panel->keys.begin / KEYS * KEYS; block < panel->keys.end; block += KEYS) {
        const int32_t j0 = block > panel->keys.begin ? block : panel->keys.begin;
        const int32_t j1 = block + KEYS < panel->keys.end ? block + KEYS : panel->keys.end;
        const tile_block k = tile_block_load(kv, &p->view[FGQA_ARG_k], j0, j1, p->d, scratch->k_copy);
        const real *add;
        real scale;
        if (tile_scores(scratch->s, t, panel, j0, j1, &k, q_t, scratch->add, scratch->rows, NULL, &add, &scale) == TILE_UNSEEN) { continue; }
        vreal top[NV];
        for (int32_t v = 0; v < panel->nv; v++) {
            const real *const s = scratch->s + v * VL;
            top[v] = v_set1(-REAL_INF);
            for (int32_t j = 0; j < j1 - j0; j++) { top[v] = v_max(v_load(s + (ptrdiff_t)j * panel->w), top[v]); }
            top[v] = v_max(top[v] * v_set1(scale), v_load(stats->top + v * VL));
        }
        tile_scale_huge(panel->nv, scratch->s, j1 - j0, &scale, top);
        for (int32_t v = 0; v < panel->nv; v++) {
            const real *const s = scratch->s + v * VL;
            const vreal shift = v_select(m_eq(top[v], v_set1(-REAL_INF)), v_zero(), top[v]);
            vreal sum = v_zero();
            for (int32_t j = 0; j < j1 - j0; j++) { sum += v_exp2(v_load(s + (ptrdiff_t)j * panel->w) * v_set1(scale) - shift); }
            v_store(stats->log_sum + v * VL, v_load(stats->log_sum + v * VL) * v_exp2(v_load(stats->top + v * VL) - shift) + sum);
            v_store(stats->top + v * VL, top[v]);
        }
    }
    for (int32_t lane = 0; lane < panel->w; lane++) {
        double top = stats->top[lane], sum = stats->log_sum[lane];
        if (lane < panel->rows && top != -INFINITY && p->view[FGQA_ARG_sink].data) {
            const double sink = (double)tile_head_value(t, FGQA_ARG_sink, panel->r0 + lane) * FGQA_LOG2E;
            const double both = sink > top ? sink : top;
            sum = sum * exp2(top - both) + exp2(FGQA_SINK_EXPONENT(sink, both));
            top = both;
        }
        const int empty = lane >= panel->rows || top == -INFINITY;
        stats->top[lane] = empty ? REAL_INF : (real)top;
        stats->log_sum[lane] = empty ? 0 : (real)log2(sum);
    }
}

#endif
