/* openmp.h - the threads that PyTorch's OpenMP runtime keeps.
 *
 * After each of PyTorch's parallel operations the threads of its team spin for milliseconds, in wait of the next, and
 * keep the CPUs from everybody else's. A job that comes then runs on them instead. A team belongs to the thread that
 * calls: the runtime makes one for each. A job on a team ends when all its threads have come, which takes long where
 * they sleep or other processes have their CPUs: it is for teams that spin. Nothing is compiled with OpenMP, which
 * would load a runtime with threads of its own.
 */
#ifndef FGQA_OPENMP_H
#define FGQA_OPENMP_H
#include <stdint.h>

/* The file of the runtime that PyTorch calls, or NULL: PyTorch is not loaded, its runtime cannot be called, or this process
 * is a fork. A child of fork has the runtime's notes of a team but not its threads, and would wait for them for ever; forks
 * after the first call the caller must notice. */
const char *fgqa_openmp_runtime(void);

/* Threads of the calling thread's team, itself among them, if they spin or nothing is known of them yet. 1: nobody spins, there
 * is no runtime, or the thread is in a parallel region already. */
int32_t fgqa_openmp_threads(void);

/* Calls member(context) on each thread of the team at once, the calling one is number 0, and returns when all have returned.
 * There may be fewer than fgqa_openmp_threads(). A child forked inside of member 0 must leave by longjmp. */
void fgqa_openmp_run(void (*member)(void *context), void *context);

/* Inside of a member: its number, and how many there are. */
int32_t fgqa_openmp_number(void);
int32_t fgqa_openmp_members(void);

#endif
