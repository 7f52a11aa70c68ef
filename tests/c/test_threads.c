/* test_threads.c - the pool: every task once, nested and concurrent calls, interrupts, fork, scratch, signals, limits. All
 * callers would run on an OpenMP team; there is none but in test_threads_team.c.
 * Sanitizers need TSAN_OPTIONS="die_after_fork=0 allocator_may_return_null=1", ASAN_OPTIONS=allocator_may_return_null=1. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "../../csrc/cpu/threads.h"
#include <fenv.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                          \
    do {                                                                          \
        if (!(condition)) {                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);       \
            exit(1);                                                              \
        }                                                                         \
    } while (0)

#define TASKS 1000

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct { atomic_int runs[TASKS]; atomic_int workers; } counts;

static void count_task(void *context, int64_t task, const fgqa_worker *worker)
{
    counts *const c = context;
    atomic_fetch_add(&c->runs[task], 1);
    atomic_fetch_or(&c->workers, 1 << (worker->worker & 15));
    for (volatile int n = 0; n < 2000; n++) {}
    if (worker->scratch) {
        CHECK((uintptr_t)worker->scratch % 64 == 0);
        memset(worker->scratch, worker->worker, 1000);
        for (int n = 0; n < 1000; n++) { CHECK(((char *)worker->scratch)[n] == (char)worker->worker); }
    }
}

static void run_counted(int threads, size_t scratch)
{
    counts *const c = calloc(1, sizeof *c);
    CHECK(fgqa_parallel(count_task, c, TASKS, threads, scratch, NULL) == FGQA_OK);
    for (int n = 0; n < TASKS; n++) { CHECK(atomic_load(&c->runs[n]) == 1); }
    CHECK(threads > 1 || atomic_load(&c->workers) == 1);
    free(c);
}

static void test_every_task_runs_once(void)
{
    for (int threads = 1; threads <= 4; threads++) {
        for (int repeat = 0; repeat < 50; repeat++) { run_counted(threads, repeat % 2 ? 1000 + (size_t)repeat * 64 : 0); }
    }
    CHECK(fgqa_parallel(count_task, NULL, 0, 4, 0, NULL) == FGQA_OK);
}

static void nested_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context; (void)task; (void)worker;
    run_counted(4, 2000);
}

static void *nested_caller(void *unused)
{
    (void)unused;
    fgqa_threads_of_team(1);
    CHECK(fgqa_parallel(nested_task, NULL, 4, 4, 100, NULL) == FGQA_OK);
    return NULL;
}

static void test_nested_and_concurrent_calls_finish(void)
{
    pthread_t threads[3];
    for (int n = 0; n < 3; n++) { CHECK(pthread_create(&threads[n], NULL, nested_caller, NULL) == 0); }
    nested_caller(NULL);
    for (int n = 0; n < 3; n++) { pthread_join(threads[n], NULL); }
}

typedef struct { pthread_t caller; double asked; int polls; int answer; } interrupt_state;

static int interrupt_callback(void *context)
{
    interrupt_state *const state = context;
    CHECK(pthread_equal(state->caller, pthread_self()));
    state->polls++;
    return seconds() > state->asked ? state->answer : 0;
}

static void endless_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context;
    /* Task 0 ends at once if a pool thread has the others: the caller must ask also while it only waits. */
    const double until = seconds() + (task == 0 ? 0.0 : 10.0);
    while (seconds() < until && !fgqa_poll(worker)) {
        for (volatile int n = 0; n < 1000; n++) {}
    }
}

static void test_interrupt_stops_within_200_ms(void)
{
    for (int threads = 1; threads <= 2; threads++) {
        for (int64_t tasks = 2; tasks <= 3; tasks++) {
            interrupt_state state = {pthread_self(), seconds() + 0.5, 0, 1};
            const fgqa_exec exec = {NULL, interrupt_callback, &state};
            CHECK(fgqa_parallel(endless_task, NULL, tasks, threads, 0, &exec) == FGQA_ERROR_INTERRUPTED);
            CHECK(seconds() - state.asked < 0.2);
            CHECK(state.polls >= 3 && state.polls <= 14);     /* 10 on an idle machine */
        }
    }
}

static int fork_once_callback(void *context)
{
    int *const pid = context;
    if (*pid < 0) {
        *pid = fork();
    }
    return 0;
}

static void short_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context; (void)task;
    const double until = seconds() + 0.15;
    while (seconds() < until && !fgqa_poll(worker)) {}
}

static void wait_child(int pid)
{
    int status = -1;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void *busy_caller(void *unused)
{
    (void)unused;
    fgqa_threads_of_team(1);
    CHECK(fgqa_parallel(short_task, NULL, 8, 4, 5000, NULL) == FGQA_OK);
    return NULL;
}

static void test_child_of_fork_has_its_own_pool(void)
{
    run_counted(4, 3000);
    pthread_t thread;
    for (int busy = 0; busy < 2; busy++) {
        if (busy) {
            CHECK(pthread_create(&thread, NULL, busy_caller, NULL) == 0);
            usleep(50000);
        }
        const int pid = fork();
        if (pid == 0) {
            run_counted(4, 8000);
            _exit(0);
        }
        CHECK(pid > 0);
        wait_child(pid);
    }
    pthread_join(thread, NULL);
    run_counted(4, 3000);
}

static void test_call_forked_from_its_callback_fails_in_the_child_only(void)
{
    for (int threads = 1; threads <= 2; threads++) {
        int pid = -1;
        const fgqa_exec exec = {NULL, fork_once_callback, &pid};
        const fgqa_status status = fgqa_parallel(short_task, NULL, 4, threads, 0, &exec);
        if (pid == 0) {
            CHECK(status == (threads == 1 ? FGQA_OK : FGQA_ERROR_RUNTIME));
            run_counted(4, 8000);
            _exit(0);
        }
        CHECK(pid > 0 && status == FGQA_OK);
        wait_child(pid);
    }
}

typedef struct { atomic_int inside; int threads; } exit_state;

static void inside_task(void *context, int64_t task, const fgqa_worker *worker)
{
    exit_state *const state = context;
    (void)task;
    atomic_fetch_add(&state->inside, 1);
    const double until = seconds() + 10;
    while (seconds() < until && !(worker->worker == 0 ? fgqa_poll(worker) : (usleep(20000), fgqa_poll(worker)))) {}
    atomic_fetch_sub(&state->inside, 1);
}

static int exit_callback(void *context)
{
    exit_state *const state = context;
    atomic_fetch_sub(&state->inside, 1);    /* the task that asks does not come back */
    pthread_exit(NULL);
}

static void *exiting_caller(void *argument)
{
    exit_state *const state = argument;
    fgqa_threads_of_team(1);
    const fgqa_exec exec = {NULL, exit_callback, state};
    (void)fgqa_parallel(inside_task, state, 8, state->threads, 5000, &exec);
    CHECK(0);
    return NULL;
}

static void test_a_thread_that_ends_in_its_callback_leaves_nobody_behind(void)
{
    for (int threads = 3; threads >= 1; threads--) {
        exit_state state = {.threads = threads};
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, exiting_caller, &state) == 0);
        pthread_join(thread, NULL);
        CHECK(atomic_load(&state.inside) == 0);
        run_counted(4, 3000);
    }
}

static void test_scratch_failure_runs_nothing(void)
{
    counts *const c = calloc(1, sizeof *c);
    CHECK(fgqa_parallel(count_task, c, TASKS, 2, (size_t)1 << 62, NULL) == FGQA_ERROR_MEMORY);
    CHECK(strstr(fgqa_message(), "scratch") != NULL);
    CHECK(atomic_load(&c->workers) == 0);
    free(c);
    run_counted(2, 3000);
}

static void signal_mask_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context; (void)task;
    sigset_t mask;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    CHECK(sigismember(&mask, SIGINT) == (worker->worker != 0));
    usleep(1000);
}

static void test_pool_threads_block_signals(void)
{
    CHECK(fgqa_parallel(signal_mask_task, NULL, 32, 4, 0, NULL) == FGQA_OK);
}

/* 1 / 3 as the mode of this thread rounds it. To nearest is up. */
static float third(void)
{
    volatile float one = 1.0f, three = 3.0f;
    return one / three;
}

static float nearest;

static void rounding_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context; (void)task;
    const double until = seconds() + 0.03;
    while (seconds() < until && !fgqa_poll(worker)) { CHECK(third() == nearest); }
}

static int rounding_callback(void *context)
{
    int *const asked = context;
    CHECK(third() < nearest);
    *asked = 1;
    return 0;
}

static void test_tasks_round_to_nearest_and_callers_as_they_like(void)
{
    nearest = third();
    for (int threads = 1; threads <= 3; threads++) {
        int asked = 0;
        const fgqa_exec exec = {NULL, rounding_callback, &asked};
        CHECK(fesetround(FE_DOWNWARD) == 0);
        CHECK(fgqa_parallel(rounding_task, NULL, 8, threads, 0, &exec) == FGQA_OK);
        CHECK(third() < nearest && fgqa_parallel(rounding_task, NULL, 1, 1, 0, NULL) == FGQA_OK && third() < nearest);
        CHECK(fesetround(FE_TONEAREST) == 0);
        CHECK(asked);
    }
}

#if defined(__aarch64__)
static uint64_t fpcr(void)
{
    uint64_t mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}

static void fpcr_task(void *context, int64_t task, const fgqa_worker *worker)
{
    (void)context; (void)task; (void)worker;
    CHECK(fpcr() == 0);
}

/* Alternative half precision, one NaN for all, flush to zero: bits that fesetenv knows, and such as it does not. */
static void test_tasks_know_no_bit_of_the_callers_mode(void)
{
    const uint64_t mode = 0x07000000;
    for (int threads = 1; threads <= 3; threads++) {
        __asm__ volatile("msr fpcr, %0" : : "r"(mode));
        CHECK(fgqa_parallel(fpcr_task, NULL, 8, threads, 0, NULL) == FGQA_OK);
        CHECK(fpcr() == mode);
        __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    }
}
#endif

static void test_thread_count(void)
{
    static const char *const bad[] = {"0", "-1", "four", "4x", "4,2", "1025", "99999999999999999999"};
    for (size_t n = 0; n < sizeof bad / sizeof *bad; n++) {
        setenv("FLASHGQA_NUM_THREADS", bad[n], 1);
        CHECK(fgqa_threads_init() == FGQA_ERROR_VALUE);
        CHECK(strstr(fgqa_message(), bad[n]) != NULL);
    }
    setenv("OMP_NUM_THREADS", "7,2", 1);
    setenv("FLASHGQA_NUM_THREADS", "4", 1);
    CHECK(fgqa_threads_init() == FGQA_OK);
    CHECK(fgqa_get_num_threads() == 4);
    fgqa_set_num_threads(3);
    CHECK(fgqa_get_num_threads() == 3);
    fgqa_set_num_threads(0);
    CHECK(fgqa_get_num_threads() == 4);
}

int main(void)
{
    fgqa_threads_of_team(1);
    test_thread_count();
    test_every_task_runs_once();
    test_nested_and_concurrent_calls_finish();
    test_interrupt_stops_within_200_ms();
    test_child_of_fork_has_its_own_pool();
    test_call_forked_from_its_callback_fails_in_the_child_only();
    test_a_thread_that_ends_in_its_callback_leaves_nobody_behind();
    test_scratch_failure_runs_nothing();
    test_pool_threads_block_signals();
    test_tasks_round_to_nearest_and_callers_as_they_like();
#if defined(__aarch64__)
    test_tasks_know_no_bit_of_the_callers_mode();
#endif
    printf("test_threads: ok\n");
    return 0;
}
