/* threads.c - the thread pool, and how many threads it may have.
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
 * Fork: only the forking thread lives on in the child. Its handler forgets the pool (the child starts its own at first
 * use) and counts `fork_epoch`, by which a call that was itself forked, from inside its interrupt callback, sees that
 * its workers are gone.
 *
 * Exit: a thread may end inside its interrupt callback (Python ends threads that ask for the GIL while it shuts down, until 3.13).
 * Its job lies on its stack: a clean-up handler lets the workers leave first.
 */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "threads.h"
#include "../core/workspace.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
    int shared;                 /* pool threads take part */
    _Atomic int64_t next;       /* first task nobody has taken */
    atomic_int stop;
} job_state;

typedef struct { void *memory; size_t bytes; } scratch_block;

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    atomic_uint generation;     /* written under mutex, spun upon without */
    atomic_int running;         /* pool threads inside the job; written under mutex */
    job_state *job;             /* NULL: closed. Under mutex */
    int32_t seats;              /* pool threads 1 .. seats may join the job. Under mutex */
    int32_t started;            /* pool threads alive: 1 .. started. Owner of the pool only */
    scratch_block scratch[FGQA_MAX_THREADS];
} pool_state;

static pool_state *pool;
static atomic_flag pool_taken = ATOMIC_FLAG_INIT;
static atomic_uint fork_epoch;
static atomic_int threads_set;  /* fgqa_set_num_threads; 0: default */

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
            run_tasks(job, start.index, p->scratch[start.index].memory);
            pthread_mutex_lock(&p->mutex);
            if (atomic_fetch_sub(&p->running, 1) == 1) {
                pthread_cond_signal(&p->done);
            }
            pthread_mutex_unlock(&p->mutex);
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
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_fork_handler);
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
    }
    if (job->owner) { atomic_flag_clear(&pool_taken); }
}

/* The pool is ours (pool_taken). */
static fgqa_status run_on_pool(job_state *job, int32_t workers, size_t scratch_bytes)
{
    FGQA_TRY(pool_start());
    pool_state *const p = pool;
    for (int32_t w = 0; w < workers; w++) {
        FGQA_TRY(scratch_grow(&p->scratch[w], scratch_bytes));
    }
    job->shared = workers > 1;
    if (job->shared) {
        start_workers(p, workers - 1);
        pthread_mutex_lock(&p->mutex);
        p->job = job;
        p->seats = workers - 1;
        atomic_fetch_add(&p->generation, 1);
        pthread_cond_broadcast(&p->wake);
        pthread_mutex_unlock(&p->mutex);
    }
    run_tasks(job, 0, p->scratch[0].memory);
    if (job->shared && !workers_lost(job)) {
        close_job(p);
        wait_for_workers(p, job);
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
    int32_t workers = fgqa_get_num_threads();
    if (workers > max_threads) { workers = max_threads < 1 ? 1 : max_threads; }
    if (workers > tasks) { workers = (int32_t)tasks; }
    const fgqa_status status = run_on_pool(&job, workers, scratch_bytes);
    if (atomic_load(&fork_epoch) == job.epoch) {       /* in a forked child the handler has already let go */
        atomic_flag_clear(&pool_taken);
    }
    return status;
}

/* ---- how many threads ---- */

static int affinity_count(void)
{
#if defined(__linux__)
    for (int cpus = CPU_SETSIZE; cpus <= 1 << 16; cpus *= 2) {
        cpu_set_t *const set = CPU_ALLOC((size_t)cpus);
        if (!set) {
            break;
        }
        const size_t bytes = CPU_ALLOC_SIZE((size_t)cpus);
        const int failed = sched_getaffinity(0, bytes, set);
        const int too_small = failed && errno == EINVAL;
        const int count = failed ? 0 : CPU_COUNT_S(bytes, set);
        CPU_FREE(set);
        if (count > 0) {
            return count;
        }
        if (!too_small) {
            break;
        }
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

#if defined(__linux__)
/* CPUs' worth of time a cgroup directory grants, rounded up; FGQA_MAX_THREADS if it sets no limit or is not there. */
static int quota_of_directory(const char *directory, int version)
{
    char path[4400], text[64];
    long long quota = -1, period = 0;
    const char *const files[2] = {version == 2 ? "cpu.max" : "cpu.cfs_quota_us", version == 2 ? NULL : "cpu.cfs_period_us"};
    for (int n = 0; n < 2 && files[n]; n++) {
        snprintf(path, sizeof path, "%s/%s", directory, files[n]);
        FILE *const file = fopen(path, "r");
        if (!file) {
            return FGQA_MAX_THREADS;
        }
        const int read = fgets(text, sizeof text, file) != NULL;
        fclose(file);
        if (!read) {
            return FGQA_MAX_THREADS;
        }
        if (version == 2) {                            /* "max 100000" or "150000 100000" */
            if (sscanf(text, "%lld %lld", &quota, &period) != 2) { return FGQA_MAX_THREADS; }
        } else if (sscanf(text, "%lld", n == 0 ? &quota : &period) != 1) {
            return FGQA_MAX_THREADS;
        }
    }
    if (quota <= 0 || period <= 0) {
        return FGQA_MAX_THREADS;
    }
    const long long cpus = (quota + period - 1) / period;
    return cpus > FGQA_MAX_THREADS ? FGQA_MAX_THREADS : (int)cpus;
}

/* The lowest quota from a cgroup up to the root; a limit set on an ancestor binds too. */
static int quota_of_hierarchy(const char *mount, const char *group, int version)
{
    char directory[4200];
    snprintf(directory, sizeof directory, "%s%s", mount, group);
    int lowest = FGQA_MAX_THREADS;
    for (;;) {
        const int quota = quota_of_directory(directory, version);
        if (quota < lowest) { lowest = quota; }
        char *const slash = strrchr(directory, '/');
        if (!slash || strlen(directory) <= strlen(mount)) {
            return lowest;
        }
        *slash = '\0';
    }
}

static int cgroup_quota(void)
{
    FILE *const file = fopen("/proc/self/cgroup", "r");
    if (!file) {
        return FGQA_MAX_THREADS;
    }
    int lowest = FGQA_MAX_THREADS;
    char line[4096];
    while (fgets(line, sizeof line, file)) {           /* "0::/group" (v2) or "4:cpu,cpuacct:/group" (v1) */
        line[strcspn(line, "\n")] = '\0';
        char *const controllers = strchr(line, ':');
        char *const group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group) {
            continue;
        }
        *group = '\0';
        const char *const path = strcmp(group + 1, "/") == 0 ? "" : group + 1;
        int quota = FGQA_MAX_THREADS;
        if (controllers[1] == '\0') {
            quota = quota_of_hierarchy("/sys/fs/cgroup", path, 2);
        } else if (strcmp(controllers + 1, "cpu") == 0 || strncmp(controllers + 1, "cpu,", 4) == 0 ||
                   strstr(controllers + 1, ",cpu,")) {
            quota = quota_of_hierarchy("/sys/fs/cgroup/cpu", path, 1);
        }
        if (quota < lowest) { lowest = quota; }
    }
    fclose(file);
    return lowest;
}
#else
static int cgroup_quota(void) { return FGQA_MAX_THREADS; }
#endif

/* 1 .. FGQA_MAX_THREADS, or 0 if the text is no such number. `list`: "8,2" is read as 8, as OpenMP means it. */
static int parse_threads(const char *text, int list)
{
    char *end;
    errno = 0;
    const long n = strtol(text, &end, 10);
    const int complete = end != text && (*end == '\0' || (list && *end == ','));
    return complete && errno == 0 && n >= 1 && n <= FGQA_MAX_THREADS ? (int)n : 0;
}

static int threads_environment, threads_quota;

static void read_limits(void)
{
    const char *const own = getenv("FLASHGQA_NUM_THREADS"), *const openmp = getenv("OMP_NUM_THREADS");
    threads_environment = own && *own ? parse_threads(own, 0) : openmp ? parse_threads(openmp, 1) : 0;
    threads_quota = cgroup_quota();
}

fgqa_status fgqa_threads_init(void)
{
    const char *const text = getenv("FLASHGQA_NUM_THREADS");
    if (text && *text && !parse_threads(text, 0)) {
        return fgqa_fail(FGQA_ERROR_VALUE, "FLASHGQA_NUM_THREADS is \"%.40s\"; it must be an integer from 1 to %d", text,
                         FGQA_MAX_THREADS);
    }
    return FGQA_OK;
}

int32_t fgqa_get_num_threads(void)
{
    const int set = atomic_load_explicit(&threads_set, memory_order_relaxed);
    if (set > 0) {
        return set;
    }
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, read_limits);
    if (threads_environment > 0) {
        return threads_environment;
    }
    const int cpus = affinity_count();                 /* asked each time: processes change it after the import */
    return cpus < threads_quota ? cpus : threads_quota;
}

void fgqa_set_num_threads(int32_t n) { atomic_store(&threads_set, n); }
