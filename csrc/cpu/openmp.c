/* openmp.c - finds PyTorch's OpenMP runtime in this process. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "openmp.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* GNU's entry points. LLVM's and Intel's runtimes have them too: either may stand in for the one that PyTorch was built with. */
static struct {
    void (*parallel)(void (*member)(void *context), void *context, unsigned threads, unsigned flags);
    int (*max_threads)(void);
    int (*in_parallel)(void);
    int (*number)(void);
    int (*members)(void);
    const char *file;
} runtime;

enum { NOT_SEEN, NONE, FOUND };

/* Whether this process is a fork that has started no program since: the kernel's flag PF_FORKNOEXEC, in
 * the seventh word after the program's name. */
static int is_fork(void)
{
    char text[1024];
    unsigned flags;
    FILE *const file = fopen("/proc/self/stat", "r");
    if (!file) {
        return 1;
    }
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    const char *const name_end = strrchr(text, ')');
    return !name_end || sscanf(name_end, ") %*c %*d %*d %*d %*d %*d %u", &flags) != 1 || (flags & 0x40) != 0;
}

static int is_torch(struct dl_phdr_info *info, size_t bytes, void *found)
{
    const char *const slash = strrchr(info->dlpi_name, '/');
    (void)bytes;
    if (!slash || strncmp(slash, "/libtorch_cpu.so", 16) != 0) {
        return 0;
    }
    snprintf(found, 4096, "%s", info->dlpi_name);
    return 1;
}

/* As the dynamic linker has done for libtorch_cpu: among what everybody sees, then in what it is linked to. */
static int find_entry(void *torch, const char *name, void *entry)
{
    void *address = dlsym(RTLD_DEFAULT, name);
    if (!address) { address = dlsym(torch, name); }
    memcpy(entry, &address, sizeof address);
    return address != NULL;
}

/* NOT_SEEN: PyTorch is not loaded, and may be later. */
static int find_runtime(void)
{
    char path[4096];
    Dl_info where;
    if (!dl_iterate_phdr(is_torch, path)) {
        return NOT_SEEN;
    }
    void *const torch = is_fork() ? NULL : dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!torch || !find_entry(torch, "GOMP_parallel", &runtime.parallel) || !find_entry(torch, "omp_in_parallel", &runtime.in_parallel) ||
        !find_entry(torch, "omp_get_max_threads", &runtime.max_threads) || !find_entry(torch, "omp_get_thread_num", &runtime.number) ||
        !find_entry(torch, "omp_get_num_threads", &runtime.members) || !dladdr((void *)(uintptr_t)runtime.parallel, &where)) {
        return NONE;
    }
    runtime.file = where.dli_fname;
    return FOUND;
}

static int found(void)
{
    static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    static atomic_int state;
    int now = atomic_load(&state);
    if (now == NOT_SEEN) {
        pthread_mutex_lock(&mutex);
        now = atomic_load(&state);
        if (now == NOT_SEEN) {
            now = find_runtime();
            atomic_store(&state, now);
        }
        pthread_mutex_unlock(&mutex);
    }
    return now == FOUND;
}

const char *fgqa_openmp_runtime(void) { return found() ? runtime.file : NULL; }

/* ---- the team of the calling thread ---- */

#define SAMPLES 2           /* reading a clock takes 0.2 to 0.8 us */

/* CPU time of a thread, which passes only while it has a CPU. */
typedef struct { clockid_t clock; int64_t read_ns; } cpu_clock;

/* What the last job on the team left: nothing else says whether it spins. */
static _Thread_local struct {
    int asked, members;                 /* 0: there was none */
    cpu_clock clock[SAMPLES];           /* of members 1, 2, ... */
} team;

/* Whether time has passed since it was last asked; 0 too if there is no such thread any more (*ended). */
static int has_run(cpu_clock *c, int *ended)
{
    const int64_t before_ns = c->read_ns;
    struct timespec t;
    *ended = clock_gettime(c->clock, &t) != 0;
    if (!*ended) { c->read_ns = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec; }
    return c->read_ns != before_ns;
}

int32_t fgqa_openmp_threads(void)
{
    if (!found() || runtime.in_parallel()) {
        return 1;
    }
    const int threads = runtime.max_threads();
    if (threads != team.asked) {
        return threads;
    }
    for (int n = 0; n < SAMPLES && n < team.members - 1; n++) {
        int ended;
        if (!has_run(&team.clock[n], &ended) || !has_run(&team.clock[n], &ended)) {
            return ended ? threads : 1;
        }
    }
    return team.members;
}

typedef struct { void (*member)(void *context); void *context; cpu_clock *clock; } team_job;

static void team_main(void *argument)
{
    const team_job *const job = argument;
    const int number = runtime.number();
    if (number == 0) {
        team.members = runtime.members();
    } else if (number <= SAMPLES) {
        pthread_getcpuclockid(pthread_self(), &job->clock[number - 1].clock);
    }
    job->member(job->context);
}

/* As many threads as the runtime has set (0), as PyTorch asks for: it would end those that a smaller team leaves out. */
void fgqa_openmp_run(void (*member)(void *context), void *context)
{
    team_job job = {member, context, team.clock};
    team.asked = runtime.max_threads();
    runtime.parallel(team_main, &job, 0, 0);
}

int32_t fgqa_openmp_number(void) { return runtime.number(); }
int32_t fgqa_openmp_members(void) { return runtime.members(); }

#else

const char *fgqa_openmp_runtime(void) { return NULL; }
int32_t fgqa_openmp_threads(void) { return 1; }
int32_t fgqa_openmp_number(void) { return 0; }
int32_t fgqa_openmp_members(void) { return 1; }
void fgqa_openmp_run(void (*member)(void *context), void *context) { member(context); }

#endif
