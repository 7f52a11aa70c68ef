/* test_backward_shift.c - walks of a backward pass that begin apart: every key tile has its turn at each place of its walk, waits for earlier
 * ones alone, and what is left out at first has sums to go to. */
#include "../../csrc/cuda/any/bwd_plan.h"
#include "check.h"

enum { MOST = 4096, H100 = 132 };       /* steps of a walk; multiprocessors */

/* Takes the steps of one key tile after the other, as a single block would. words: of the query tiles by place; seen: key tiles that meet each. */
static void check_turns(fgqa_bwd_shift shift, int32_t tiles, const int32_t *steps)
{
    static int32_t words[MOST], seen[MOST];
    memset(words, 0, sizeof(words));
    memset(seen, 0, sizeof(seen));
    for (int32_t n = 0; n < tiles; n++) {
        for (int32_t place = 0; place < steps[n]; place++) { seen[place]++; }
    }
    for (int32_t taken = 0; taken < tiles; taken++) {
        const int32_t n = fgqa_bwd_shifted_at(&shift, taken), begin = fgqa_bwd_begin(&shift, n);
        CHECK_FOR(begin == 0 || begin < steps[n], "key tile %d begins at %d of %d", n, begin, steps[n]);
        for (int32_t step = 0; step < steps[n]; step++) {
            const fgqa_bwd_at at = fgqa_bwd_at_step(begin, steps[n], step);
            const int32_t one = at.late ? FGQA_BWD_LATE : 1, bits = (FGQA_BWD_LATE - 1) * one;
            CHECK(at.place == (begin + step) % steps[n] && at.late == (at.place < begin) && (!at.late || at.place < fgqa_bwd_late_places(&shift)));
            CHECK_FOR((words[at.place] & bits) == fgqa_bwd_shifted_turn(&shift, n, at, seen[at.place]), "key tile %d of %d at %d", n, tiles, at.place);
            words[at.place] += one;
        }
    }
    for (int32_t place = 0; place < steps[0]; place++) { CHECK(words[place] == fgqa_bwd_shifted_complete(&shift, place, seen[place])); }
}

static int check_problem(fgqa_problem *p, int32_t block_q, int32_t splits, int32_t multiprocessors)
{
    enum { BLOCK_K = 128 };
    static int32_t steps[MOST];
    const fgqa_bwd_shift shift = fgqa_bwd_order_of(p, p->d, block_q, BLOCK_K, splits, multiprocessors).shift;
    const fgqa_mask mask = fgqa_problem_sequence(p, 0).mask;
    const int32_t tiles = (p->sk + BLOCK_K - 1) / BLOCK_K;
    for (int32_t n = 0; n < tiles; n++) {
        const fgqa_range rows = fgqa_q_range(&mask, n * BLOCK_K, n * BLOCK_K + BLOCK_K < p->sk ? n * BLOCK_K + BLOCK_K : p->sk);
        steps[n] = rows.begin < rows.end ? ((rows.end + block_q - 1) / block_q - rows.begin / block_q) * p->g / splits : 0;
    }
    if (shift.tiles == 0) { return 0; }
    check_turns(shift, tiles, steps);
    fgqa_bwd_workspace w;
    float *late;
    char *const memory = (char *)128;
    const size_t size = fgqa_bwd_shifted_take(p, block_q, BLOCK_K, p->d, p->d, splits, FGQA_BWD_TILED, shift, memory, &w, &late);
    const size_t before = fgqa_bwd_workspace_take(p, block_q, BLOCK_K, p->d, p->d, splits, FGQA_BWD_TILED, memory, &w);
    CHECK((uintptr_t)late % 128 == 0 && (char *)late >= memory + before && (char *)late < memory + size);
    const size_t tile = (size_t)block_q * (size_t)p->d * sizeof(float), half = (size_t)w.q_tiles * tile / 2, more = (size_t)(memory + size - (char *)late);
    CHECK(more <= half || more <= 2 * (size_t)multiprocessors * tile);
    return 1;
}

static uint32_t below(uint32_t end)
{
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (state >> 8) % end;
}

/* Lengths, groups and parts that nobody chose, on devices of any size, their parts as they are planned. */
static int check_any(void)
{
    const int32_t d = below(2) ? 64 : 128;
    const fgqa_cuda_row row = {.arch = 90, .d = d, .dv = d, .block_q = d == 64 ? 128 : 64, .block_k = 128};
    fgqa_problem p = {0};
    p.sk = 1024 + (int32_t)below(7000);
    p.sq = below(2) ? p.sk : 1 + (int32_t)below(8000);
    p.d = p.dv = d;
    p.left = FGQA_UNBOUNDED;
    p.right = below(3) == 0 ? FGQA_UNBOUNDED : below(2) ? 0 : (int32_t)below(500);
    p.align = below(3) ? FGQA_ALIGN_BOTTOM_RIGHT : FGQA_ALIGN_TOP_LEFT;
    p.g = 1 + (int32_t)below(12);
    p.hk = 1 + (int32_t)below(4);
    p.hq = p.g * p.hk;
    p.b = 1 + (int32_t)below(3);
    p.deterministic = 1;
    const int32_t multiprocessors = below(2) ? H100 : 1 + (int32_t)below(160);
    fgqa_plan plan = {0};
    fgqa_bwd_tile(&row, &p, &plan, multiprocessors);
    return check_problem(&p, row.block_q, plan.splits, multiprocessors);
}

int main(void)
{
    static const int32_t lengths[] = {1, 127, 1000, 1024, 2048, 4096, 5001, 8192, 16384};
    int32_t shifted = 0;
    for (size_t n = 0; n < sizeof(lengths) / sizeof(lengths[0]) * sizeof(lengths) / sizeof(lengths[0]); n++) {
        for (int32_t form = 0; form < 2 * 2 * 3 * 3 * 3; form++) {
            fgqa_problem p = {0};
            p.sq = lengths[n / 9];
            p.sk = lengths[n % 9];
            p.d = p.dv = form % 2 ? 64 : 128;
            p.left = FGQA_UNBOUNDED;
            p.right = form / 2 % 2 ? 0 : FGQA_UNBOUNDED;
            p.g = form / 4 % 3 == 0 ? 1 : form / 4 % 3 == 1 ? 3 : 16;
            p.hk = form / 12 % 3 == 0 ? 1 : form / 12 % 3 == 1 ? 4 : 16;
            p.hq = p.g * p.hk;
            p.b = form / 36 == 2 ? 7 : 1;
            p.deterministic = 1;
            shifted += check_problem(&p, p.d == 64 ? 128 : 64, 1 << form / 36, H100);
            p.batch_invariant = 1;
            CHECK(!check_problem(&p, 64, 1, H100));
        }
    }
    CHECK(shifted > 100);
    for (int32_t n = shifted = 0; n < 2000; n++) { shifted += check_any(); }
    CHECK(shifted > 200);
    return checks_passed("backward_shift");
}
