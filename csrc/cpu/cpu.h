/* cpu.h - the CPU backend as the rest of the program sees it. */
#ifndef FGQA_CPU_H
#define FGQA_CPU_H
#include "../core/plan.h"

/* The kernels of this processor, best instruction set first, those it lacks (or FLASHGQA_CPU_ISA rules out) left out. */
const fgqa_kernel *fgqa_cpu_kernels(int32_t *count);

/* The row of isa.def in use, e.g. "avx512". */
const char *fgqa_cpu_isa(void);

/* FGQA_ERROR_VALUE if FLASHGQA_CPU_ISA names no row, or one this processor lacks: called once at import. */
fgqa_status fgqa_cpu_init(void);

/* Rows of isa.def, 0 <= n < count: name, whether it was compiled in and whether this processor has it. */
int32_t fgqa_cpu_isa_count(void);
const char *fgqa_cpu_isa_name(int32_t n, int32_t *compiled, int32_t *supported);

/* merge of partial results over disjoint keys: out [rows, dv] and lse [rows] of n parts (any strides in views), base e. */
fgqa_status fgqa_cpu_merge(int32_t n, const fgqa_view *outs, const fgqa_view *lses, const fgqa_view *out, const fgqa_view *lse,
                           const int64_t shape[4], const fgqa_exec *exec);

/* k_new and v_new of a problem with a KV cache into their slots. What was there goes into `kept`, fgqa_cpu_append_bytes(), and
 * back from there where the call fails later. */
size_t fgqa_cpu_append_bytes(const fgqa_problem *problem);
fgqa_status fgqa_cpu_append(const fgqa_problem *problem, void *kept);
fgqa_status fgqa_cpu_append_undo(const fgqa_problem *problem, void *kept);

/* The dropout mask of the contract as bool [b, hq, sq, sk], contiguous. */
fgqa_status fgqa_cpu_dropout_mask(uint8_t *keep, int32_t b, int32_t hq, int32_t sq, int32_t sk, uint32_t threshold,
                                  uint64_t seed, uint64_t offset, const fgqa_exec *exec);

#endif
