/* thread_count.c - how many threads a call may use: set by the user, else what the system grants. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include "threads.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_int threads_set;  /* fgqa_set_num_threads; 0: default */

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
    fgqa_threads_watch_forks();
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
