/* threads.c - the thread pool.
 *
 * The caller is worker 0; pool threads 1, 2, ... sleep between jobs. Who may touch the pool is decided by one flag,
 * `pool_taken`: the thread that sets it owns pool, workers and scratch until it clears it; everybody else runs inline.
 *
 *   caller                                            pool thread
 *   publish job, ++generation, broadcast wake         spin, then wait for generation to change
 *                                                     job still open and a seat free: ++running, join
 *   take tasks until none is left                     take tasks until none is left
 *   close job (late sleepers find none)               --running; the last one signals done
 *   wait for running == 0, asking exec->interrupted
 *
 * Of a job of PyTorch's the caller's OpenMP team (openmp.h) are workers 0, 1, ..., pool threads those that it
 * lacks. Each of the team runs team_member(), which the caller does not leave before all tasks are done:
 * inside it can be interrupted while it waits.
 *
 * Fork: only the forking thread lives on in the child. Its handler forgets the pool (the child starts its own at first
 * use) and counts `fork_epoch`, by which a call that was itself forked, from inside its interrupt callback, sees that
 * its workers are gone.
 *
 * Exit: a thread may end inside its interrupt callback (Python ends threads that ask for the GIL while it shuts down, until
 * 3.13). Its job lies on its stack: a clean-up handler lets the workers leave first.
 */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "threads.h"
#include "openmp.h"
#include "../core/workspace.h"
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <fenv.h>
#endif

#define SPIN_NS 20000           /* about a futex wake-up: spinning longer than sleeping would cost gains nothing */
#define POLL_NS 50000000        /* Ctrl-C must be seen within 200 ms; taking the GIL more often disturbs other threads */

/* How a thread rounds, traps and treats subnormal numbers. */
#if defined(__x86_64__)
typedef unsigned fp_mode;       /* MXCSR */
static fp_mode fp_mode_get(void) { return _mm_getcsr(); }
static void fp_mode_set(fp_mode mode) { _mm_setcsr(mode); }
static void fp_mode_set_for_tasks(void) { _mm_setcsr(_MM_MASK_MASK | _MM_ROUND_NEAREST | _MM_FLUSH_ZERO_ON); }
#elif defined(__aarch64__)
typedef struct { uint64_t control, status; } fp_mode;       /* FPCR, of which fesetenv leaves some bits alone, and FPSR */
static fp_mode fp_mode_get(void)
{
    fp_mode mode;
    __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(mode.control), "=r"(mode.status));
    return mode;
}
static void fp_mode_set(fp_mode mode) { __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" : : "r"(mode.control), "r"(mode.status)); }
static void fp_mode_set_for_tasks(void) { fp_mode_set((fp_mode){0, 0}); }
#else
typedef fenv_t fp_mode;
static fp_mode fp_mode_get(void)
{
    fp_mode mode;
    fegetenv(&mode);
    return mode;
}
static void fp_mode_set(fp_mode mode) { fesetenv(&mode); }
static void fp_mode_set_for_tasks(void) { fesetenv(FE_DFL_ENV); }
#endif

typedef struct {
    fgqa_task *task;
    void *context;
    int64_t tasks;
    const fgqa_exec *exec;      /* may be NULL */
    int64_t next_poll_ns;       /* of the calling thread alone */
    fp_mode callers;
    unsigned epoch;             /* fork_epoch at the start */
    int owner;                  /* of the pool: pool_taken is this call's */
    int shared;                 /* other threads take part */
    int32_t team;               /* workers 0 .. team-1 are threads of the caller's OpenMP team; 1: the caller alone */
    int32_t members;            /* of the team, those without a part in the job too. Caller only, from inside */
    atomic_int returned;        /* members that have no more to do with the job */
    jmp_buf forked;             /* out of the team, in a child that has none */
    _Atomic int64_t next;       /* first task nobody has taken */
    atomic_int stop;
} job_state;

typedef struct { void *memory; size_t bytes; } scratch_block;

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_uint generation;     /* written under mutex, spun upon without */
    atomic_int running;         /* threads inside the job beside the caller; lowered under mutex */
    job_state *job;             /* NULL: closed. Under mutex */
    int32_t seats;              /* pool threads 1 .. seats may join the job, as workers behind the team. Under mutex */
    int32_t started;            /* pool threads alive: 1 .. started. Owner of the pool only */
    scratch_block scratch[FGQA_MAX_THREADS];
} pool_state;

static pool_state *pool;
static atomic_flag pool_taken = ATOMIC_FLAG_INIT;
static atomic_uint fork_epoch;
static _Thread_local int team_wanted;

/* Whether a fork took this job's other workers away. */
static int workers_lost(const job_state *job)
{
    return job->shared && atomic_load_explicit(&fork_epoch, memory_order_relaxed) != job->epoch;
}

static int64_t ns_of(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t now_ns(void) { return ns_of(CLOCK_MONOTONIC); }

/* That of the last tick of the system, a few ms ago: read in a fifth of the time, which counts where a task takes 200 ns. */
#if defined(CLOCK_MONOTONIC_COARSE)
static int64_t recent_ns(void) { return ns_of(CLOCK_MONOTONIC_COARSE); }
#else
static int64_t recent_ns(void) { return now_ns(); }
#endif

static void cpu_relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* ---- running tasks ---- */

static void leave_job(void *argument);

static int ask_owner(job_state *job)
{
    volatile int interrupted;
    const fp_mode own = fp_mode_get();
    fp_mode_set(job->callers);
    pthread_cleanup_push(leave_job, job);
    interrupted = job->exec->interrupted(job->exec->context);
    pthread_cleanup_pop(0);
    fp_mode_set(own);
    return interrupted;
}

/* Whether the job shall stop; on the calling thread also asks its owner, if 50 ms have passed. */
static int poll_job(job_state *job, int calling_thread)
{
    if (atomic_load_explicit(&job->stop, memory_order_relaxed)) {
        return 1;
    }
    if (!calling_thread || !job->exec || !job->exec->interrupted) {
        return 0;
    }
    if (recent_ns() < job->next_poll_ns) {
        return 0;
    }
    const int interrupted = ask_owner(job);
    job->next_poll_ns = now_ns() + POLL_NS;
    if (interrupted || workers_lost(job)) {
        atomic_store_explicit(&job->stop, 1, memory_order_relaxed);
        return 1;
    }
    return 0;
}

int fgqa_poll(const fgqa_worker *worker) { return poll_job((job_state *)worker->job, worker->worker == 0); }

static void run_tasks(job_state *job, int32_t index, void *scratch)
{
    const fgqa_worker worker = {scratch, index, job};
    const fp_mode before = fp_mode_get();
    fp_mode_set_for_tasks();
    while (!poll_job(job, index == 0)) {
        const int64_t task = atomic_fetch_add_explicit(&job->next, 1, memory_order_relaxed);
        if (task >= job->tasks) {
            break;
        }
        job->task(job->context, task, &worker);
    }
    fp_mode_set(before);
}

static fgqa_status job_result(const job_state *job)
{
    if (workers_lost(job)) {
        return fgqa_fail(FGQA_ERROR_RUNTIME, "the process was forked inside a running call (by a signal handler); "
                                             "in the child the call cannot finish: make it again");
    }
    if (atomic_load(&job->stop)) {
        return fgqa_fail(FGQA_ERROR_INTERRUPTED, "interrupted");
    }
    return FGQA_OK;
}

/* ---- scratch ---- */

static fgqa_status scratch_grow(scratch_block *block, size_t bytes)
{
    if (bytes <= block->bytes) {
        return FGQA_OK;
    }
    free(block->memory);
    block->bytes = 0;
    bytes = (bytes + FGQA_ALIGNMENT - 1) / FGQA_ALIGNMENT * FGQA_ALIGNMENT;
    block->memory = aligned_alloc(FGQA_ALIGNMENT, bytes);
    if (!block->memory) {
        return fgqa_fail(FGQA_ERROR_MEMORY, "cannot allocate %zu bytes of scratch memory for one thread", bytes);
    }
    block->bytes = bytes;
    return FGQA_OK;
}

static fgqa_status run_inline(job_state *job, size_t scratch_bytes)
{
    scratch_block block = {NULL, 0};
    FGQA_TRY(scratch_grow(&block, scratch_bytes));
    run_tasks(job, 0, block.memory);
    free(block.memory);
    return job_result(job);
}

/* ---- pool ---- */

static void forget_pool_after_fork(void)
{
    /* The old pool's memory stays allocated: its locks may be held by threads that no longer exist. */
    pool = NULL;
    atomic_flag_clear(&pool_taken);
    atomic_fetch_add(&fork_epoch, 1);
}

static void register_fork_handler(void) { pthread_atfork(NULL, NULL, forget_pool_after_fork); }

void fgqa_threads_watch_forks(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
}

static void condition_init(pthread_cond_t *condition)
{
#if defined(__APPLE__)
    pthread_cond_init(condition, NULL);
#else
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
#endif
}

static void condition_wait(pthread_cond_t *condition, pthread_mutex_t *mutex, int64_t ns)
{
#if defined(__APPLE__)
    const struct timespec t = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    pthread_cond_timedwait_relative_np(condition, mutex, &t);
#else
    const int64_t until = now_ns() + ns;
    const struct timespec t = {(time_t)(until / 1000000000), (long)(until % 1000000000)};
    pthread_cond_timedwait(condition, mutex, &t);
#endif
}

/* As another thread than the caller, counted in `running`. */
static void help(pool_state *p, job_state *job, int32_t worker)
{
    run_tasks(job, worker, p->scratch[worker].memory);
    pthread_mutex_lock(&p->mutex);
    if (atomic_fetch_sub(&p->running, 1) == 1) {
        pthread_cond_signal(&p->done);
    }
    pthread_mutex_unlock(&p->mutex);
}

typedef struct { pool_state *pool; int32_t index; unsigned seen; } worker_start;

static void *worker_main(void *argument)
{
    const worker_start start = *(worker_start *)argument;
    free(argument);
    pool_state *const p = start.pool;
    unsigned seen = start.seen;
    for (;;) {
        const int64_t spin_until = now_ns() + SPIN_NS;
        while (atomic_load_explicit(&p->generation, memory_order_relaxed) == seen && now_ns() < spin_until) {
            for (int n = 0; n < 16; n++) { cpu_relax(); }
        }
        pthread_mutex_lock(&p->mutex);
        while (atomic_load_explicit(&p->generation, memory_order_relaxed) == seen) {
            pthread_cond_wait(&p->wake, &p->mutex);
        }
        seen = atomic_load_explicit(&p->generation, memory_order_relaxed);
        job_state *const job = start.index <= p->seats ? p->job : NULL;
        if (job) {
            atomic_fetch_add(&p->running, 1);
        }
        pthread_mutex_unlock(&p->mutex);
        if (job) {
            help(p, job, job->team - 1 + start.index);
        }
    }
    return NULL;
}

/* Pool threads 1 .. wanted, as far as the system grants them: fewer threads change the speed, never the result. */
static void start_workers(pool_state *p, int32_t wanted)
{
    if (p->started >= wanted) {
        return;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);      /* threads inherit it: signals stay with the caller's threads */
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (p->started < wanted) {
        worker_start *const start = malloc(sizeof *start);
        if (!start) {
            break;
        }
        start->pool = p;
        start->index = p->started + 1;
        start->seen = atomic_load(&p->generation);
        pthread_t thread;
        if (pthread_create(&thread, &attributes, worker_main, start) != 0) {
            free(start);
            break;
        }
        p->started++;
    }
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static fgqa_status pool_start(void)
{
    fgqa_threads_watch_forks();
    if (pool) {
        return FGQA_OK;
    }
    pool_state *const p = calloc(1, sizeof *p);
    if (!p) {
        return fgqa_fail(FGQA_ERROR_MEMORY, "cannot allocate the thread pool (%zu bytes)", sizeof *p);
    }
    pthread_mutex_init(&p->mutex, NULL);
    condition_init(&p->wake);
    condition_init(&p->done);
    pool = p;
    return FGQA_OK;
}

static void wait_for_workers(pool_state *p, job_state *job)
{
    const int64_t spin_until = now_ns() + SPIN_NS;
    while (atomic_load(&p->running) != 0 && now_ns() < spin_until) {
        for (int n = 0; n < 16; n++) { cpu_relax(); }
    }
    while (atomic_load(&p->running) != 0) {
        pthread_mutex_lock(&p->mutex);
        if (atomic_load(&p->running) != 0) {
            condition_wait(&p->done, &p->mutex, POLL_NS / 2);
        }
        pthread_mutex_unlock(&p->mutex);
        poll_job(job, 1);
        if (workers_lost(job)) {
            return;
        }
    }
}

static void close_job(pool_state *p)
{
    pthread_mutex_lock(&p->mutex);
    p->job = NULL;
    pthread_mutex_unlock(&p->mutex);
}

/* The calling thread ends. */
static void leave_job(void *argument)
{
    job_state *const job = argument;
    if (workers_lost(job)) {
        return;
    }
    atomic_store(&job->stop, 1);
    if (job->shared) {
        close_job(pool);
        pthread_mutex_lock(&pool->mutex);
        while (atomic_load(&pool->running) != 0) { pthread_cond_wait(&pool->done, &pool->mutex); }
        pthread_mutex_unlock(&pool->mutex);
        while (atomic_load(&job->returned) < job->members - 1) { usleep(100); }     /* those that have yet to come */
    }
    if (job->owner) { atomic_flag_clear(&pool_taken); }
}

static void open_job(pool_state *p, job_state *job, int32_t seats)
{
    pthread_mutex_lock(&p->mutex);
    p->job = job;
    p->seats = seats;
    atomic_fetch_add(&p->generation, 1);
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

/* The calling thread's part of a job. */
static void lead(pool_state *p, job_state *job)
{
    run_tasks(job, 0, p->scratch[0].memory);
    if (job->shared && !workers_lost(job)) {
        close_job(p);
        wait_for_workers(p, job);
    }
}

/* The runtime lets nobody go before all have returned: a member that comes when all is done finds no task, but finds the job. */
static void team_member(void *argument)
{
    job_state *const job = argument;
    const int32_t number = fgqa_openmp_number();
    if (number == 0) {
        job->members = fgqa_openmp_members();
        lead(pool, job);
        if (workers_lost(job)) { longjmp(job->forked, 1); }
        return;
    }
    if (number < job->team) {
        atomic_fetch_add(&pool->running, 1);
        help(pool, job, number);
    }
    atomic_fetch_add(&job->returned, 1);
}

static void lead_team(job_state *job)
{
    if (setjmp(job->forked) == 0) { fgqa_openmp_run(team_member, job); }
}

/* How many workers are threads of the caller's OpenMP team. One of more threads than a call may use (`allowed`) is
 * left alone: they would all have to come. */
static int32_t team_for(int32_t workers, int32_t allowed)
{
    if (workers == 1 || !team_wanted || atomic_load(&fork_epoch) != 0) {
        return 1;
    }
    const int32_t team = fgqa_openmp_threads();
    return team > allowed ? 1 : team < workers ? team : workers;
}

/* The pool is ours (pool_taken). */
static fgqa_status run_on_pool(job_state *job, int32_t workers, int32_t allowed, size_t scratch_bytes)
{
    FGQA_TRY(pool_start());
    pool_state *const p = pool;
    for (int32_t w = 0; w < workers; w++) {
        FGQA_TRY(scratch_grow(&p->scratch[w], scratch_bytes));
    }
    job->shared = workers > 1;
    job->team = team_for(workers, allowed);
    if (workers > job->team) {
        start_workers(p, workers - job->team);
        open_job(p, job, workers - job->team);
    }
    if (job->team > 1) {
        lead_team(job);
    } else {
        lead(p, job);
    }
    return job_result(job);
}

fgqa_status fgqa_parallel(fgqa_task *task, void *context, int64_t tasks, int32_t max_threads, size_t scratch_bytes,
                          const fgqa_exec *exec)
{
    if (tasks <= 0) {
        return FGQA_OK;
    }
    job_state job = {.task = task, .context = context, .tasks = tasks, .exec = exec, .next_poll_ns = now_ns() + POLL_NS,
                     .callers = fp_mode_get(), .epoch = atomic_load(&fork_epoch)};
    if (atomic_flag_test_and_set(&pool_taken)) {
        return run_inline(&job, scratch_bytes);
    }
    job.owner = 1;
    const int32_t allowed = fgqa_get_num_threads();
    int32_t workers = allowed;
    if (workers > max_threads) { workers = max_threads < 1 ? 1 : max_threads; }
    if (workers > tasks) { workers = (int32_t)tasks; }
    const fgqa_status status = run_on_pool(&job, workers, allowed, scratch_bytes);
    if (atomic_load(&fork_epoch) == job.epoch) {       /* in a forked child the handler has already let go */
        atomic_flag_clear(&pool_taken);
    }
    return status;
}

void fgqa_threads_of_team(int wanted) { team_wanted = wanted; }

const char *fgqa_threads_team_runtime(void) { return atomic_load(&fork_epoch) == 0 ? fgqa_openmp_runtime() : NULL; }
