/* test_philox.c - Philox4x32-10 against the known answers published with Random123 (kat_vectors), and how dropout reads it. */
#include "../../csrc/core/philox.h"
#include "check.h"

typedef struct { uint32_t counter[4], key[2], answer[4]; } known_answer;

static const known_answer known[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
    {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
    {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
};

static void known_answers(void)
{
    for (size_t n = 0; n < sizeof known / sizeof *known; n++) {
        const known_answer *a = &known[n];
        fgqa_philox_block counter;
        memcpy(counter.x, a->counter, sizeof counter.x);
        const fgqa_philox_block got = fgqa_philox((uint64_t)a->key[1] << 32 | a->key[0], counter);
        for (int w = 0; w < 4; w++) { CHECK_FOR(got.x[w] == a->answer[w], "vector %zu word %d", n, w); }
    }
}

/* Counter = (key block, row, batch*hq + head, offset), key = seed: the third vector through the dropout function. */
static void dropout_counter(void)
{
    const known_answer *a = &known[2];
    const uint64_t seed = (uint64_t)a->key[1] << 32 | a->key[0];
    const fgqa_philox_block bits = fgqa_dropout_bits(seed, a->counter[3], a->counter[0], a->counter[1], a->counter[2]);
    static const uint32_t halves[8] = {0xfe09, 0xd16c, 0xcceb, 0x94fd, 0xe420, 0x5001, 0x6ea1, 0x2412};
    for (int n = 0; n < 8; n++) { CHECK_FOR(fgqa_dropout_half(&bits, n) == halves[n], "half %d", n); }
}

/* Rate of dropped weights: within 5 standard deviations for 2^18 draws. */
static void dropout_rate(void)
{
    static const double rates[] = {0.1, 0.25, 0.5, 0.9};
    for (size_t r = 0; r < sizeof rates / sizeof *rates; r++) {
        const uint32_t threshold = fgqa_dropout_threshold(rates[r]);
        const int draws = 1 << 18;
        int dropped = 0;
        for (int block = 0; block < draws / 8; block++) {
            const fgqa_philox_block bits = fgqa_dropout_bits(2026, 0, (uint32_t)block % 64, (uint32_t)block / 64, 3);
            for (int n = 0; n < 8; n++) { dropped += !fgqa_dropout_keeps(fgqa_dropout_half(&bits, n), threshold); }
        }
        const double off = dropped - rates[r] * draws;
        CHECK_FOR(off * off < 25 * rates[r] * (1 - rates[r]) * draws, "p %g: %d of %d dropped", rates[r], dropped, draws);
    }
}

int main(void)
{
    known_answers();
    dropout_counter();
    dropout_rate();
    return checks_passed("test_philox");
}
