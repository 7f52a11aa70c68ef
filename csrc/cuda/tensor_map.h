/* tensor_map.h - TMA descriptors of the problem's tensors: dims (column, head, row, batch), 16-bit elements, 128-byte swizzle. */
#ifndef FGQA_TENSOR_MAP_H
#define FGQA_TENSOR_MAP_H
#include "../core/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What one copy moves: columns x rows of one head. */
typedef struct { int32_t columns, rows; } fgqa_map_box;

/* Fills the CUtensorMap `map` for q, k, v or out. Returns a cudaError_t. The encoder is the driver's, found when first needed. */
int fgqa_tensor_map(void *map, const fgqa_problem *problem, fgqa_arg arg, fgqa_map_box box);

/* Why TMA cannot address q, k, v or out; NULL if it can. */
const char *fgqa_tensor_map_refuse(const fgqa_problem *problem, fgqa_arg arg);

#ifdef __cplusplus
}
#endif
#endif
