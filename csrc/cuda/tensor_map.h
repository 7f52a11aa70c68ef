/* tensor_map.h - TMA descriptors of the problem's tensors: dims (column, head, row, batch), 128-byte swizzle. Columns of a
 * bias are keys; it may repeat along the other three. */
#ifndef FGQA_TENSOR_MAP_H
#define FGQA_TENSOR_MAP_H
#include "../core/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What one copy moves: columns x heads x rows. */
typedef struct { int32_t columns, heads, rows; } fgqa_map_box;

/* Fills the CUtensorMap `map` for q, k, v, out, dout, or bias or dbias. Returns a cudaError_t. The encoder is the driver's,
 * found when first needed. */
int fgqa_tensor_map(void *map, const fgqa_problem *problem, fgqa_arg arg, fgqa_map_box box);

/* k or v, of a cache (pages as the outermost axis; its elements may be float8) or not, as dims (column, row, chunk of 128
 * bytes, head, sequence or page): a box is a chunk's columns x `rows` x `chunks`. More than one chunk: only where they fill
 * the head dim. */
int fgqa_cache_map(void *map, const fgqa_problem *problem, fgqa_arg arg, int32_t rows, int32_t chunks);

/* Why TMA cannot address one of them; NULL if it can. */
const char *fgqa_tensor_map_refuse(const fgqa_problem *problem, fgqa_arg arg);

/* bias or mask, of whatever dtype, as dims of which those that share it have extent 1; and why TMA cannot address it. */
int fgqa_term_map(void *map, const fgqa_problem *problem, fgqa_arg arg, fgqa_map_box box);
const char *fgqa_term_map_refuse(const fgqa_problem *problem, fgqa_arg arg);

#ifdef __cplusplus
}
#endif
#endif
