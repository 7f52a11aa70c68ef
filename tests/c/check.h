/* check.h - assertions of the C unit tests: the first failure prints its place and ends the program with status 1. */
#ifndef FGQA_TESTS_CHECK_H
#define FGQA_TESTS_CHECK_H
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long checks_done;

#define CHECK_FOR(condition, ...)                                                     \
    do {                                                                              \
        checks_done++;                                                                \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s; ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                             \
            fprintf(stderr, "\n");                                                    \
            exit(1);                                                                  \
        }                                                                             \
    } while (0)
#define CHECK(condition) CHECK_FOR(condition, "%s", "")

static inline int checks_passed(const char *name)
{
    printf("%s: %ld checks\n", name, checks_done);
    return 0;
}

#endif
