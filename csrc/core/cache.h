/* cache.h - attention over a KV cache: what the caller asked for, and its lowering to a problem.
 *
 * The cache is contiguous, k_cache [rows, hk, slots, d], one row a sequence (that of batch_index if given), or paged,
 * k_cache [pages, hk, page_size, d] with page_table [b, pages of a sequence]. New keys and values go behind the
 * cache_lens[n] slots in use; then attention sees all of them. Problem.h (fgqa_cache) says what kernels get to see.
 */
#ifndef FGQA_CACHE_H
#define FGQA_CACHE_H
#include "problem.h"

/* Tensors beside those that any forward pass takes: the enum FGQA_CACHE_<name>, and the name users know it by. */
#define FGQA_CACHE_TENSORS(X) \
    X(k_cache) X(v_cache) X(k_new) X(v_new) X(cache_lens) X(new_lens) X(page_table) X(batch_index) X(left_pad) \
    X(rotary_cos) X(rotary_sin) X(rotary_offsets) X(k_scale) X(v_scale)

typedef enum {
#define FGQA_CACHE_ENUM(name) FGQA_CACHE_##name,
    FGQA_CACHE_TENSORS(FGQA_CACHE_ENUM)
#undef FGQA_CACHE_ENUM
    FGQA_CACHE_COUNT
} fgqa_cache_arg;

const char *fgqa_cache_arg_name(fgqa_cache_arg arg);

/* Unchecked. `base` holds q, alibi_slopes, sink, q_lens, out and the options; absent tensors are NULL. */
typedef struct {
    fgqa_request base;
    const fgqa_tensor *tensor[FGQA_CACHE_COUNT];
    int32_t rotary_interleaved;
} fgqa_cache_request;

/* Checks everything, contents of index arrays included (CPU; those on a GPU are not read, and sk is then what a sequence can
 * hold), and fills the problem; nothing has been written anywhere.
 * Of the problem, out and lse are bound as by fgqa_problem_init(). */
fgqa_status fgqa_cache_init(const fgqa_cache_request *request, fgqa_problem *problem);

#endif
