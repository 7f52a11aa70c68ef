/* tile_io.cuh - rows of global memory to and from a swizzled tile of shared memory.
 *
 * A tile is ROWS rows x D elements of T (swizzle.cuh). Rows past `valid` and elements past `d` are zero: zero keys and values
 * meet weights that are exactly 0, and garbage there could be NaN. All THREADS threads of the block take part.
 */
#pragma once
#include "fragments.cuh"
#include "numeric.cuh"
#include "params.cuh"
#include "ptx_cp_async.cuh"
#include "ptx_ldmatrix.cuh"
#include "swizzle.cuh"

/* How the threads share a tile: LANES neighbours copy one row, 16 bytes each, in steps of LANES pieces. */
template <typename T, int D, int THREADS> struct tile_shape {
    static constexpr int ROW_BYTES = D * (int)sizeof(T);
    static constexpr int LANES = ROW_BYTES % 128 == 0 ? 8 : 4;
    static constexpr int STEPS = ROW_BYTES / 16 / LANES;
    static constexpr int ROWS_AT_ONCE = THREADS / LANES;
    static constexpr int PIECE = 16 / (int)sizeof(T);         /* elements of one piece */
};

/* Bytes from the start of piece `piece` to the end of a row of d elements: not positive for pieces past the end. Compared as
 * it is, not clamped to 0..16 first: ptxas 13.0 mistakes "clamped == 16" for sm_90. */
template <typename T> static __device__ __forceinline__ int bytes_left(int piece, int d) { return d * (int)sizeof(T) - 16 * piece; }

/* One piece without alignment: element by element. */
template <typename T> static __device__ __forceinline__ void copy_piece(uint32_t dst, const char *src, int bytes)
{
    uint32_t word[4] = {0, 0, 0, 0};
    if (sizeof(T) == 4) {
#pragma unroll
        for (int n = 0; n < 4; n++) { if (4 * n < bytes) { word[n] = ((const uint32_t *)src)[n]; } }
    } else {
#pragma unroll
        for (int n = 0; n < 8; n++) { if (2 * n < bytes) { word[n / 2] |= (uint32_t)((const uint16_t *)src)[n] << 16 * (n % 2); } }
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

template <typename T>
static __device__ __forceinline__ void load_piece(uint32_t dst, const char *src, bool row_exists, int piece, int d, bool vector)
{
    const int bytes = row_exists ? bytes_left<T>(piece, d) : 0;
    if (vector) {
        cp_async_16(dst, src, bytes <= 0 ? 0 : min(bytes, 16));
    } else {
        copy_piece<T>(dst, src, bytes);
    }
}

/* Rows 0, 1, .. of `row_bytes` stride at `src`. With `vector` (rows start on 16 bytes) the copies are only issued: commit and
 * wait. Then, in any case, a barrier before other threads read. */
template <typename T, int ROWS, int D, int THREADS>
static __device__ __forceinline__ void load_tile(uint32_t tile, const char *src, int64_t row_bytes, int valid, int d, bool vector)
{
    using shape = tile_shape<T, D, THREADS>;
    static_assert(ROWS % shape::ROWS_AT_ONCE == 0 && shape::ROWS_AT_ONCE % 8 == 0, "threads cover whole groups of rows");
    const int row0 = thread_index() / shape::LANES, piece0 = thread_index() % shape::LANES;
    const uint32_t dst = tile + swizzle<shape::ROW_BYTES>(row0, piece0);
    const char *const first = src + 16 * piece0;
    src = first + row0 * row_bytes;
    if (vector && valid >= ROWS && d == D) {
#pragma unroll
        for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
#pragma unroll
            for (int c = 0; c < shape::STEPS; c++) { cp_async_16(dst + r * shape::ROW_BYTES + c * shape::LANES * 16, src + c * shape::LANES * 16); }
            src += shape::ROWS_AT_ONCE * row_bytes;
        }
        return;
    }
#pragma unroll 1
    for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
        const char *row = row0 + r < valid ? src : first;      /* nothing of it is read, but no address past the end is named */
#pragma unroll
        for (int c = 0; c < shape::STEPS; c++) {
            load_piece<T>(dst + r * shape::ROW_BYTES + c * shape::LANES * 16, row + c * shape::LANES * 16, row0 + r < valid, piece0 + c * shape::LANES, d, vector);
        }
        src += shape::ROWS_AT_ONCE * row_bytes;
    }
}

/* Bytes from (first head of the group, first row of the sequence) to a packed row. */
template <typename T> static __device__ __forceinline__ int64_t packed_offset(const fgqa_view &view, packed_rows rows, int local)
{
    return (int64_t)sizeof(T) * (rows.i(local) * view.stride_s + rows.h(local) * view.stride_h);
}

static __device__ __forceinline__ uint4 shared_piece(uint32_t address)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}

/* The same for packed rows (query row x head of the group): `view` at (b, first head of the group, first row of the sequence). */
template <typename T, int ROWS, int D, int THREADS>
static __device__ __forceinline__ void load_packed_tile(uint32_t tile, const char *src, const fgqa_view &view, packed_rows rows, int valid, int d, bool vector)
{
    using shape = tile_shape<T, D, THREADS>;
    static_assert(ROWS % shape::ROWS_AT_ONCE == 0 && shape::ROWS_AT_ONCE % 8 == 0, "threads cover whole groups of rows");
    const int row0 = thread_index() / shape::LANES, piece0 = thread_index() % shape::LANES;
    const uint32_t dst = tile + swizzle<shape::ROW_BYTES>(row0, piece0);
    src += 16 * piece0;
    if (vector && valid >= ROWS && d == D) {
#pragma unroll
        for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
            const char *row = src + packed_offset<T>(view, rows, row0 + r);
#pragma unroll
            for (int c = 0; c < shape::STEPS; c++) { cp_async_16(dst + r * shape::ROW_BYTES + c * shape::LANES * 16, row + c * shape::LANES * 16); }
        }
        return;
    }
#pragma unroll 1
    for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
        const char *row = src + packed_offset<T>(view, rows, row0 + r < valid ? row0 + r : 0);
#pragma unroll
        for (int c = 0; c < shape::STEPS; c++) {
            load_piece<T>(dst + r * shape::ROW_BYTES + c * shape::LANES * 16, row + c * shape::LANES * 16, row0 + r < valid, piece0 + c * shape::LANES, d, vector);
        }
    }
}

/* Tile rows to packed rows of global memory; the first `valid` rows and d elements of each are written, nothing else. */
template <typename T, int ROWS, int D, int THREADS>
static __device__ __forceinline__ void store_packed_tile(uint32_t tile, char *dst, const fgqa_view &view, packed_rows rows, int valid, int d, bool vector)
{
    using shape = tile_shape<T, D, THREADS>;
    const int row0 = thread_index() / shape::LANES, piece0 = thread_index() % shape::LANES;
    const uint32_t from = tile + swizzle<shape::ROW_BYTES>(row0, piece0);
    dst += 16 * piece0;
    if (vector && valid >= ROWS && d == D) {
#pragma unroll
        for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
            char *row = dst + packed_offset<T>(view, rows, row0 + r);
#pragma unroll
            for (int c = 0; c < shape::STEPS; c++) { *(uint4 *)(row + c * shape::LANES * 16) = shared_piece(from + r * shape::ROW_BYTES + c * shape::LANES * 16); }
        }
        return;
    }
#pragma unroll 1
    for (int r = 0; r < ROWS && row0 + r < valid; r += shape::ROWS_AT_ONCE) {
        char *row = dst + packed_offset<T>(view, rows, row0 + r);
#pragma unroll
        for (int c = 0; c < shape::STEPS; c++) {
            const int bytes = bytes_left<T>(piece0 + c * shape::LANES, d);
            const uint4 piece = shared_piece(from + r * shape::ROW_BYTES + c * shape::LANES * 16);
            const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
            char *to = row + c * shape::LANES * 16;
            if (vector && bytes >= 16) {
                *(uint4 *)to = piece;
            } else if (sizeof(T) == 4) {
#pragma unroll
                for (int n = 0; n < 4; n++) { if (4 * n < bytes) { ((uint32_t *)to)[n] = word[n]; } }
            } else {
#pragma unroll
                for (int n = 0; n < 8; n++) { if (2 * n < bytes) { ((uint16_t *)to)[n] = (uint16_t)(word[n / 2] >> 16 * (n % 2)); } }
            }
        }
    }
}
