/* test_workspace.c - measuring and carving agree, blocks are aligned and do not overlap; what a backward pass on a GPU moves
 * in bulk begins on a line of the caches. */
#include "../../csrc/core/workspace.h"
#include "../../csrc/cuda/any/bwd_workspace.h"
#include "check.h"

enum { BLOCKS = 6 };
static const size_t counts[BLOCKS] = {3, 0, 64, 1, 1000, 7}, bytes[BLOCKS] = {4, 8, 1, 64, 2, 8};

/* What a kernel's planner and runner share. */
static size_t carve(void *base, char *blocks[BLOCKS])
{
    fgqa_arena arena = fgqa_arena_begin(base);
    for (int n = 0; n < BLOCKS; n++) { blocks[n] = fgqa_arena_take(&arena, counts[n], bytes[n]); }
    return arena.used;
}

static void check_backward(void)
{
    enum { LINE = 128 };
    static char *const memory = (char *)LINE;
    for (int32_t n = 0; n < 3 * 3 * 4 * 2; n++) {
        fgqa_problem p = {0};
        fgqa_bwd_workspace measured, w;
        const int32_t d = 64 << n % 3, splits = 1 << n / 3 % 3, tiled = n / 36;
        p.b = 3;
        p.hq = 5;
        p.hk = p.g = 1;
        p.sq = p.sk = 1 + 67 * (n / 9 % 4);
        p.d = p.dv = d;
        p.left = 0;
        const size_t size = fgqa_bwd_workspace_take(&p, 64, 128, d, d, splits, tiled ? FGQA_BWD_TILED : FGQA_BWD_PLAIN, NULL, &measured);
        CHECK(fgqa_bwd_workspace_take(&p, 64, 128, d, d, splits, tiled ? FGQA_BWD_TILED : FGQA_BWD_PLAIN, memory, &w) == size);
        CHECK((uintptr_t)w.dq % LINE == 0 && (uintptr_t)w.dk % LINE == 0 && (uintptr_t)w.dv % LINE == 0 && (uintptr_t)w.stats % LINE == 0);
        CHECK((w.dq == NULL) == (tiled && d > 128) && (w.dk == NULL) == (splits == 1) && (w.key_rows == NULL) == !tiled);
        CHECK((char *)(w.control + 1) <= memory + size && (char *)(w.turn + w.q_tiles) <= (char *)w.control);
    }
}

int main(void)
{
    check_backward();
    char *blocks[BLOCKS];
    const size_t size = carve(NULL, blocks);
    for (int n = 0; n < BLOCKS; n++) { CHECK(blocks[n] == NULL); }
    char *memory = aligned_alloc(FGQA_ALIGNMENT, (size + FGQA_ALIGNMENT - 1) / FGQA_ALIGNMENT * FGQA_ALIGNMENT);
    CHECK(memory != NULL && carve(memory, blocks) == size);
    for (int n = 0; n < BLOCKS; n++) {
        CHECK((uintptr_t)blocks[n] % FGQA_ALIGNMENT == 0);
        CHECK(blocks[n] + counts[n] * bytes[n] <= memory + size);
        if (n + 1 < BLOCKS) { CHECK(blocks[n] + counts[n] * bytes[n] <= blocks[n + 1]); }
        memset(blocks[n], n, counts[n] * bytes[n]);
    }
    CHECK(blocks[BLOCKS - 1] + counts[BLOCKS - 1] * bytes[BLOCKS - 1] == memory + size);
    fgqa_arena empty = fgqa_arena_begin(memory);
    CHECK(empty.used == 0 && fgqa_arena_take(&empty, 0, 8) == memory && empty.used == 0);
    fgqa_arena large = fgqa_arena_begin(NULL);
    fgqa_arena_take(&large, (size_t)3 << 31, 4);
    CHECK(large.used == (size_t)3 << 33);
    free(memory);
    return checks_passed("test_workspace");
}
