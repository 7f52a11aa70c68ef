/* dec_score.cuh - softcap and ALiBi in the decode kernels. Scores of q.k keep their units without them (dec_params.unit); with
 * softcap they come in units of the cap; with ALiBi, more rows than there are registers for it, or a cap or scale near an end of
 * float32, they become what the formula says, in natural units, before any mask. The host decides (dec_launch.cuh).
 */
#pragma once
#include "../common/softcap.cuh"
#include "../common/mask_tile.cuh"
#include "dec_split.cuh"

/* Of a packed row: the slot of its diagonal, and its head's slope. */
struct chain_row { int32_t diagonal; float slope; };

/* Fetched a segment ahead, like q. */
static __device__ __forceinline__ float slope_of(const dec_params &p, int32_t b, const pair_rows &rows, int32_t local)
{
    const fgqa_view &slopes = p.common.problem.view[FGQA_ARG_alibi_slopes];
    if (!p.chain || !slopes.data || local >= rows.valid) { return 0.0f; }
    return load_float(slopes.data, b * slopes.stride_b + (rows.kv_head * p.common.problem.g + rows.rows.h(local)) * slopes.stride_h, slopes.dtype);
}

static __device__ __forceinline__ int32_t diagonal_of(const fgqa_mask &mask, const dec_sequence &s, const pair_rows &rows, int32_t local)
{
    return s.first_slot + mask.diag + rows.rows.i(local);
}

static __device__ __forceinline__ float chain_score(const dec_params &p, const chain_row &row, int32_t slot, float qk)
{
    const score_row everything = {row.diagonal, 0, INT32_MAX, 0, row.slope, NULL, NULL};
    return score_chain(p.common, 0, everything, slot, qk);
}
