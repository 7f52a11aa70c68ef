/* fwd_score.cuh - what ALiBi makes of a block's scores, for fwd.cu. S counts in units of the scale here, or in natural ones.
 *
 *     s <- s - slope / unit |diag(i) - j|
 */
#pragma once
#include <float.h>

#include "../common/mask_tile.cuh"

/* Of a lane's two rows: slopes of their heads; the diagonal's key of the first, counted from this lane's first column. */
struct alibi_rows { float slope[2]; int32_t diagonal; };

/* Slopes in those units that less_alibi() serves: no product of one overflows. All others become NaN: the tile is done again. */
static __device__ __forceinline__ float moderate_slope(float slope) { return slope >= 0.0f && slope <= 0x1p60f ? slope : NAN; }

/* Two instructions and one rounding, whatever the slope: distances below 2^24 are exact, so one of 0 leaves the score as it
 * is. `first`: the diagonal, counted from the lane's first column of the block. */
static __device__ __forceinline__ float less_alibi(float s, float slope, float first, int column)
{
    return fmaf(-slope, fabsf(first - (float)column), s);
}

/* Moderate slopes, or NaN. The diagonal of the second row is `further` than that of the first. */
template <int N> static __device__ __forceinline__ void add_alibi(float (&s)[N], const alibi_rows &rows, int32_t further, int32_t j0)
{
    const float first[2] = {(float)(rows.diagonal - j0), (float)(rows.diagonal + further - j0)};
#pragma unroll
    for (int n = 0; n < N; n++) { s[n] = less_alibi(s[n], rows.slope[n / 2 % 2], first[n / 2 % 2], 8 * (n / 4) + n % 2); }
}

/* The careful pass: any slopes, as they are given. Moderate ones give the bits of add_alibi(); with others a score that leaves
 * float32 is the least there is. HIDDEN: -inf stays what a bias has made so. */
template <bool HIDDEN, int N>
static __device__ __forceinline__ void add_any_alibi(float (&s)[N], const alibi_rows &rows, int32_t further, int32_t j0, float inv_unit)
{
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int r = n / 2 % 2, column = 8 * (n / 4) + n % 2, first = rows.diagonal + (r ? further : 0) - j0;
        const float slope = moderate_slope(rows.slope[r] * inv_unit);
        if (slope == slope) {
            s[n] = less_alibi(s[n], slope, (float)first, column);
        } else if (!HIDDEN || s[n] != -INFINITY) {
            const float x = fmaf(FGQA_ALIBI(rows.slope[r], fabsf((float)(first - column))), inv_unit, s[n]);
            s[n] = x < -FLT_MAX ? -FLT_MAX : x;
        }
    }
}
