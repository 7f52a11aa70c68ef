/* threads.h - the CPU backend's own thread pool.
 *
 * Started at first use, one per process, rebuilt after fork. A second caller at the same time (or a call from inside a
 * task) runs its tasks inline on its own thread: never a deadlock, never oversubscription. Results do not depend on
 * which worker runs which task.
 *
 * Tasks round to nearest and never trap, whatever the caller does (fesetround, torch.set_flush_denormal): pool threads
 * do not know its mode, and results would depend on who runs what. On x86 they flush results to zero (a denormal
 * weight costs ~150 cycles an instruction and is worth nothing); denormal inputs count. The caller's own mode holds
 * again in exec->interrupted and afterwards.
 */
#ifndef FGQA_THREADS_H
#define FGQA_THREADS_H
#include "../core/plan.h"

/* One worker's view of a running job. */
typedef struct {
    void *scratch;          /* scratch_bytes, 64-byte aligned, this worker's own; kept warm between calls */
    int32_t worker;         /* 0 is the calling thread */
    const void *job;        /* opaque, for fgqa_poll */
} fgqa_worker;

typedef void fgqa_task(void *context, int64_t task, const fgqa_worker *worker);

/* Runs task 0 .. tasks-1, handed out in that order by an atomic counter, on at most max_threads workers, the caller among
 * them. Returns when all are done. FGQA_ERROR_INTERRUPTED: exec->interrupted asked to stop, remaining tasks were dropped. */
fgqa_status fgqa_parallel(fgqa_task *task, void *context, int64_t tasks, int32_t max_threads, size_t scratch_bytes,
                          const fgqa_exec *exec);

/* Whether the running task should return early. Cheap (one relaxed load); on the calling thread it also asks
 * exec->interrupted, at most every 50 ms. Kernels call it about once per 0.1-10 ms of work. */
int fgqa_poll(const fgqa_worker *worker);

/* Whether jobs that this thread starts from now on may run on its OpenMP team, which they should where they come from PyTorch:
 * openmp.h. 0 to begin with. Not in a child of fork. */
void fgqa_threads_of_team(int wanted);

/* The file of the runtime whose team that is, or NULL: there is none. */
const char *fgqa_threads_team_runtime(void);

/* From here on forks are noticed, as from the first job on. */
void fgqa_threads_watch_forks(void);

#define FGQA_MAX_THREADS 1024

/* FGQA_ERROR_VALUE if FLASHGQA_NUM_THREADS is not an integer from 1 to that: called once at import, by fgqa_cpu_init(). */
fgqa_status fgqa_threads_init(void);

/* FLASHGQA_NUM_THREADS, else OMP_NUM_THREADS, else the lower of CPU affinity and cgroup quota. set: 1 to FGQA_MAX_THREADS
 * overrides, 0 restores the default. */
int32_t fgqa_get_num_threads(void);
void fgqa_set_num_threads(int32_t n);

#endif
