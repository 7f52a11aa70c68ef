/* handler.h - attention as custom calls of XLA: what flashgqa/jax.py puts into a compiled program, and what XLA then calls. */
#ifndef FGQA_XLA_HANDLER_H
#define FGQA_XLA_HANDLER_H
#include "../core/problem.h"
#include "xla_ffi.h"

/* The plain fields of a request, which travel as attributes of their names: integers as int64, numbers as float64. */
#define FGQA_XLA_INTEGERS(X) \
    X(pass) X(causal) X(window_left) X(window_right) X(align) X(has_chunk) X(chunk) X(has_scale) X(has_softcap) X(max_q) X(max_kv) \
    X(has_seed) X(seed) X(layout_given) X(layout) X(precision) X(want_lse) X(want_dbias) X(want_dsink) X(deterministic) \
    X(batch_invariant)
#define FGQA_XLA_NUMBERS(X) X(scale) X(softcap) X(dropout_p)

/* Two strings beside them: the names of the arguments in their order, a space after each, and a kernel's name or
 * nothing. `rank` is that of q: further axes in front, of all arguments alike and of extent 1 where an argument
 * is the same for all, are those of vmap. */
#define FGQA_XLA_ARGUMENTS "arguments"
#define FGQA_XLA_KERNEL "kernel"
#define FGQA_XLA_RANK "rank"

xla_error *fgqa_xla_cpu(xla_call *call);
xla_error *fgqa_xla_cuda(xla_call *call);

#endif
