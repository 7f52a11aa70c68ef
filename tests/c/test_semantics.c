/* test_semantics.c - the interval masks by brute force: every small length, window, chunk and alignment, every tile, against
 * the mask in its textbook form; then lengths at the edge of 32 bits, the head map and the dropout numbers. */
#include "../../csrc/core/semantics.h"
#include "check.h"

#define MOST 11

/* ---- the textbook: row i, key j, one by one, from the sentences of the documentation ---- */

typedef struct { int sq, sk, left, right, chunk, top_left; } textbook;

/* n with n*size <= x < (n+1)*size, found by walking. */
static int block_of(int x, int size)
{
    int n = 0;
    while (n * size > x) { n--; }
    while ((n + 1) * size <= x) { n++; }
    return n;
}

static int sees(const textbook *t, int i, int j)
{
    const int position = t->top_left ? i : i + t->sk - t->sq;
    if (t->left >= 0 && j < position - t->left) { return 0; }
    if (t->right >= 0 && j > position + t->right) { return 0; }
    return t->chunk == 0 || block_of(j, t->chunk) == block_of(position, t->chunk);
}

static fgqa_mask mask_of(const textbook *t)
{
    const fgqa_mask m = {t->sq, t->sk, t->top_left ? 0 : t->sk - t->sq, t->left < 0 ? FGQA_UNBOUNDED : t->left,
                         t->right < 0 ? FGQA_UNBOUNDED : t->right, t->chunk};
    return m;
}

#define SAY "sq %d sk %d left %d right %d chunk %d top-left %d", t->sq, t->sk, t->left, t->right, t->chunk, t->top_left
#define CHECK_T(condition) CHECK_FOR(condition, SAY)

static void check_rows(const textbook *t, const fgqa_mask *m)
{
    for (int i = 0; i < t->sq; i++) {
        const int begin = fgqa_kv_begin(m, i), end = fgqa_kv_end(m, i);
        CHECK_T(0 <= begin && begin <= end && end <= t->sk);
        if (i > 0) { CHECK_T(fgqa_kv_begin(m, i - 1) <= begin && fgqa_kv_end(m, i - 1) <= end); }
        for (int j = 0; j < t->sk; j++) { CHECK_T(fgqa_visible(m, i, j) == sees(t, i, j)); }
    }
}

/* Visible scores in rows [0, i) x keys [0, j). */
typedef int table[MOST + 1][MOST + 1];

static int count(table sum, int i0, int i1, int j0, int j1) { return sum[i1][j1] - sum[i0][j1] - sum[i1][j0] + sum[i0][j0]; }

static void check_tiles(const textbook *t, const fgqa_mask *m)
{
    table sum = {{0}};
    int no_row_is_empty = 1;
    for (int i = 0; i < t->sq; i++) {
        for (int j = 0; j < t->sk; j++) { sum[i + 1][j + 1] = sum[i][j + 1] + sum[i + 1][j] - sum[i][j] + sees(t, i, j); }
        no_row_is_empty &= sum[i + 1][t->sk] > sum[i][t->sk];
    }
    /* Forward: the range of rows [i0, i1) holds every key that one of them sees; it is the tightest if their first and
     * last row see something. */
    for (int i0 = 0; i0 < t->sq; i0++) {
        for (int i1 = i0 + 1; i1 <= t->sq; i1++) {
            const fgqa_range r = fgqa_kv_range(m, i0, i1);
            CHECK_T(0 <= r.begin && r.begin <= r.end && r.end <= t->sk);
            CHECK_T(count(sum, i0, i1, 0, r.begin) == 0 && count(sum, i0, i1, r.end, t->sk) == 0);
            if (no_row_is_empty) { CHECK_T(sees(t, i0, r.begin) && sees(t, i1 - 1, r.end - 1)); }
        }
    }
    /* Backward: the range of keys [j0, j1) holds every row that sees one of them; tightest likewise. */
    for (int j0 = 0; j0 < t->sk; j0++) {
        for (int j1 = j0 + 1; j1 <= t->sk; j1++) {
            const fgqa_range r = fgqa_q_range(m, j0, j1);
            CHECK_T(0 <= r.begin && r.begin <= r.end && r.end <= t->sq);
            CHECK_T(count(sum, 0, r.begin, j0, j1) == 0 && count(sum, r.end, t->sq, j0, j1) == 0);
            if (no_row_is_empty && r.begin < r.end) {
                CHECK_T(count(sum, r.begin, r.begin + 1, j0, j1) > 0 && count(sum, r.end - 1, r.end, j0, j1) > 0);
            }
            for (int i0 = 0; i0 < t->sq; i0++) {
                for (int i1 = i0 + 1; i1 <= t->sq; i1++) {
                    const int full = count(sum, i0, i1, j0, j1) == (i1 - i0) * (j1 - j0);
                    CHECK_T(fgqa_tile_is_full(m, i0, i1, j0, j1) == full);
                }
            }
        }
    }
}

static long brute_force(void)
{
    static const int sides[] = {-1, 0, 1, 2, 4, 9}, chunks[] = {0, 1, 2, 3, 5, 8, 20};
    enum { SIDES = sizeof sides / sizeof *sides, CHUNKS = sizeof chunks / sizeof *chunks };
    long masks = 0;
    textbook t;
    for (t.sq = 0; t.sq <= MOST; t.sq++) {
        for (t.sk = 0; t.sk <= MOST; t.sk++) {
            for (int rule = 0; rule < SIDES * SIDES * CHUNKS * 2; rule++) {
                t.left = sides[rule % SIDES];
                t.right = sides[rule / SIDES % SIDES];
                t.chunk = chunks[rule / (SIDES * SIDES) % CHUNKS];
                t.top_left = rule / (SIDES * SIDES * CHUNKS);
                const fgqa_mask m = mask_of(&t);
                check_rows(&t, &m);
                check_tiles(&t, &m);
                masks++;
            }
        }
    }
    return masks;
}

/* Lengths, windows and chunks at the edge of int32: no intermediate overflows (the sanitizer run sees to that). */
static void edges(void)
{
    const int32_t most = INT32_MAX;
    const fgqa_mask causal = {most, most, 0, FGQA_UNBOUNDED, 0, 0};
    CHECK(fgqa_kv_begin(&causal, most - 1) == 0 && fgqa_kv_end(&causal, most - 1) == most && fgqa_kv_end(&causal, 0) == 1);
    const fgqa_range rows = fgqa_q_range(&causal, most - 5, most);
    CHECK(rows.begin == most - 5 && rows.end == most);

    const fgqa_mask wide = {most, most, 0, most - 1, most - 1, most};
    CHECK(fgqa_kv_begin(&wide, most - 1) == 0 && fgqa_kv_end(&wide, most - 1) == most && fgqa_kv_end(&wide, 0) == most);
    CHECK(fgqa_tile_is_full(&wide, 0, most, 0, most));

    const fgqa_mask long_q = {most, 1, 1 - most, 0, 0, 0};
    CHECK(fgqa_kv_end(&long_q, most - 2) == 0 && fgqa_kv_end(&long_q, most - 1) == 1 && fgqa_kv_begin(&long_q, most - 1) == 0);
    const fgqa_mask one_row = {1, most, most - 1, 2, 0, most - 1};
    CHECK(fgqa_kv_begin(&one_row, 0) == most - 1 && fgqa_kv_end(&one_row, 0) == most);
}

static void head_map(void)
{
    for (int32_t hk = 1; hk <= 5; hk++) {
        for (int32_t g = 1; g <= 7; g++) {
            for (int32_t h = 0; h < hk * g; h++) { CHECK(fgqa_kv_head(h, g) == h / (hk * g / hk)); }
            for (int64_t r = 0; r < 12 * g; r++) {
                const int32_t head = fgqa_packed_row_head(r, hk - 1, g);
                CHECK(fgqa_kv_head(head, g) == hk - 1);
                CHECK((int64_t)fgqa_packed_row_q(r, g) * g + head - (hk - 1) * g == r);
            }
        }
    }
    CHECK(fgqa_packed_row_q((int64_t)INT32_MAX * 8 - 1, 8) == INT32_MAX - 1);
}

static void dropout_numbers(void)
{
    CHECK(fgqa_dropout_threshold(0.0) == 0 && fgqa_dropout_threshold(1.0) == 65536 && fgqa_dropout_threshold(0.5) == 32768);
    CHECK(fgqa_dropout_threshold(0.1) == 6554);                      /* 6553.6 */
    CHECK(fgqa_dropout_threshold(0.5 / 65536) == 0 && fgqa_dropout_threshold(1.5 / 65536) == 2);
    CHECK(fgqa_dropout_threshold(2.5 / 65536) == 2 && fgqa_dropout_threshold(1 - 1e-9) == 65536);
    CHECK(fgqa_dropout_scale(0) == 1.0 && fgqa_dropout_scale(32768) == 2.0 && fgqa_dropout_scale(65536) == 0.0);
    CHECK(fgqa_dropout_keeps(0, 0) && !fgqa_dropout_keeps(0, 1) && fgqa_dropout_keeps(65535, 65535) && !fgqa_dropout_keeps(65535, 65536));
}

static void floor_div(void)
{
    for (int a = -30; a <= 30; a++) {
        for (int b = 1; b <= 8; b++) { CHECK(fgqa_floor_div(a, b) == block_of(a, b)); }
    }
}

int main(void)
{
    floor_div();
    const long masks = brute_force();
    edges();
    head_map();
    dropout_numbers();
    printf("%ld masks\n", masks);
    return checks_passed("test_semantics");
}
