/* test_threads_team.c - all of test_threads.c once more, of jobs on an OpenMP team of three, the last of which
 * comes late: two workers leave one of them without work, four leave one to the pool. Stands in for
 * csrc/cpu/openmp.c, with threads that sanitizers follow. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>
#include "../../csrc/cpu/openmp.h"

#define MEMBERS 3

static _Thread_local int32_t number, in_team;
static atomic_int runs;

typedef struct { void (*member)(void *); void *context; int32_t number; } start;

static void *member_main(void *argument)
{
    const start *const s = argument;
    number = s->number;
    in_team = 1;
    if (number == MEMBERS - 1) { usleep(2000); }
    s->member(s->context);
    return NULL;
}

const char *fgqa_openmp_runtime(void) { return "tests/c/test_threads_team.c"; }
int32_t fgqa_openmp_threads(void) { return in_team ? 1 : MEMBERS; }
int32_t fgqa_openmp_number(void) { return number; }
int32_t fgqa_openmp_members(void) { return MEMBERS; }

void fgqa_openmp_run(void (*member)(void *context), void *context)
{
    pthread_t thread[MEMBERS];
    static start s[MEMBERS];       /* one caller at a time has the pool; its thread may end inside, and its stack with it */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t n = 1; n < MEMBERS; n++) {
        s[n] = (start){member, context, n};
        if (pthread_create(&thread[n], NULL, member_main, &s[n]) != 0) { abort(); }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    atomic_fetch_add(&runs, 1);
    in_team = 1;
    member(context);
    in_team = 0;
    for (int32_t n = 1; n < MEMBERS; n++) { pthread_join(thread[n], NULL); }
}

#define main test_threads
#include "test_threads.c"
#undef main

int main(void)
{
    CHECK(test_threads() == 0);
    CHECK(atomic_load(&runs) > 150);
    return 0;
}
