/* cache_tile.cuh - keys and values of a KV cache for the forward pass: their way into a tile.
 *
 * Where a sequence has one page, that page is looked up once. Float8 elements become T on the way, exactly; their scale goes to
 * the scores and to the output, where it is exact, too. Slots that hold no key of the sequence, or lie on a page that does not
 * exist, are not read: they are zeros in the tile.
 */
#pragma once
#include "../common/cache_slot.cuh"
#include "../common/tile_io.cuh"

/* What a block keeps of its sequence's cache. Kernels without one keep nothing. */
template <bool CACHE> struct cache_task {};

template <> struct cache_task<true> {
    const int32_t *table;       /* of the sequence; NULL: one page, which exists */
    int64_t page;               /* that one, or 0 */
    float k_scale, v_scale;
};

template <int NB> static __device__ __forceinline__ void scale_scores(float (&)[NB][4], const cache_task<false> &) {}

template <int NB> static __device__ __forceinline__ void scale_scores(float (&s)[NB][4], const cache_task<true> &task)
{
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
        for (int r = 0; r < 4; r++) { s[n][r] *= task.k_scale; }
    }
}

static __device__ __forceinline__ float scale_of_values(const cache_task<false> &) { return 1.0f; }
static __device__ __forceinline__ float scale_of_values(const cache_task<true> &task) { return task.v_scale; }

static __device__ __forceinline__ int cache_bytes(const fgqa_view &view) { return view.dtype == FGQA_F8E4M3 ? 1 : view.dtype == FGQA_F32 ? 4 : 2; }

static __device__ __forceinline__ float cache_scale(const fgqa_view &scale, int32_t b, int32_t h)
{
    return scale.data ? *(const float *)fgqa_row_address(scale, sizeof(float), b, h, 0) : 1.0f;
}

/* This and what follows is instantiated with CACHE alone. */
template <bool CACHE> static __device__ __forceinline__ void begin_cache(cache_task<CACHE> *task, const fgqa_problem &p, int32_t b, int32_t kv_head)
{
    const fgqa_cache &c = p.cache;
    const int32_t *table = c.table ? c.table + b * c.table_stride : NULL;
    const bool one_page = c.capacity <= c.page_size && (!table || c.capacity == 0 || fgqa_page_exists(table[0], c.pages));
    task->table = one_page ? NULL : table;
    task->page = !one_page ? 0 : table && c.capacity > 0 ? table[0] : b;
    task->k_scale = cache_scale(c.k_scale, b, kv_head);
    task->v_scale = cache_scale(c.v_scale, b, kv_head);
}

/* Slot 0 of the head in page `page`. */
template <bool CACHE> static __device__ __forceinline__ const char *cache_head(const fgqa_problem &p, fgqa_arg arg, const cache_task<CACHE> &task, int32_t kv_head)
{
    return fgqa_row_address(p.view[arg], cache_bytes(p.view[arg]), task.page, kv_head, 0);
}

/* e4m3 has 4 exponent bits of bias 7: in a float's place they make a number 2^120 too small, subnormals included. */
static __device__ __forceinline__ float float8_value(uint32_t x)
{
    const float size = __uint_as_float((x & 0x7F) << 20) * 0x1p120f;
    return (x & 0x7F) == 0x7F ? NAN : x & 0x80 ? -size : size;
}

static __device__ __forceinline__ void store_words(uint32_t address, const uint32_t (&word)[4])
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]) : "memory");
}

/* The words of one 16-byte piece of the tile, from `count` elements of 1, 2 or 4 bytes that are `stride` apart. */
template <typename E> static __device__ __forceinline__ void gather_words(uint32_t (&word)[4], const char *src, int64_t stride, int count, bool float8, E)
{
#pragma unroll
    for (int n = 0; n < 4; n++) {
        float x[2] = {0.0f, 0.0f};
        uint32_t bits[2] = {0, 0};
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int c = 2 * n + e;
            if (c >= count) { continue; }
            if (float8) { x[e] = float8_value(((const uint8_t *)src)[c * stride]); } else { bits[e] = ((const uint16_t *)src)[c * stride]; }
        }
        word[n] = float8 ? pack2(x[0], x[1], E()) : bits[0] | bits[1] << 16;
    }
}

static __device__ __forceinline__ void gather_words(uint32_t (&word)[4], const char *src, int64_t stride, int count, bool float8, f32)
{
#pragma unroll
    for (int n = 0; n < 4; n++) {
        word[n] = n >= count ? 0 : float8 ? __float_as_uint(float8_value(((const uint8_t *)src)[n * stride])) : ((const uint32_t *)src)[n * stride];
    }
}

/* Four float8 elements, one a byte, as two pairs. Exponent and mantissa move to their place in the wider type, which makes a
 * number that is too small by a power of two. Its NaN is the one number that then is wrong. */
static __device__ __forceinline__ void widen_pairs(uint32_t (&pair)[2], uint32_t x, f16)
{
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const uint32_t high = __byte_perm(x, 0, n ? 0x3424 : 0x1404), bits = (high & 0x80008000u) | (high >> 1 & 0x3F803F80u);
        asm("mul.f16x2 %0, %1, %2;" : "=r"(pair[n]) : "r"(bits), "r"(0x5C005C00u));                 /* 2^8 */
    }
}

static __device__ __forceinline__ void widen_pairs(uint32_t (&pair)[2], uint32_t x, bf16)
{
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const uint32_t high = __byte_perm(x, 0, n ? 0x3424 : 0x1404), bits = (high & 0x80008000u) | (high >> 4 & 0x07F007F0u);
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair[n]) : "r"(bits), "r"(0x7B807B80u), "r"(0x80008000u));    /* 2^120, - 0 */
    }
}

/* The same from PIECE float8 elements side by side in shared memory, where the piece itself goes. */
template <typename E> static __device__ __forceinline__ void widen_piece(uint32_t address, E)
{
    uint32_t x[2], word[4];
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address) : "memory");
    const bool nan = ((((x[0] & 0x7F7F7F7Fu) + 0x01010101u) | ((x[1] & 0x7F7F7F7Fu) + 0x01010101u)) & 0x80808080u) != 0;
#pragma unroll
    for (int n = 0; n < 2; n++) {
        uint32_t pair[2];
        widen_pairs(pair, x[n], E());
        word[2 * n] = pair[0];
        word[2 * n + 1] = pair[1];
    }
    if (nan) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            const uint32_t two = x[n / 2] >> 16 * (n % 2);
            word[n] = pack2(float8_value(two), float8_value(two >> 8), E());
        }
    }
    store_words(address, word);
}

static __device__ __forceinline__ void widen_piece(uint32_t address, f32)
{
    uint32_t x, word[4];
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
#pragma unroll
    for (int n = 0; n < 4; n++) { word[n] = __float_as_uint(float8_value(x >> 8 * n)); }
    store_words(address, word);
}

/* 16 bytes of `T` elements as float8: 4 or 8 bytes. Group and wait as for cp_async_16(). */
template <typename T> static __device__ __forceinline__ void cp_async_narrow(uint32_t dst, const void *src)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst), "l"(src), "n"(16 / sizeof(T)) : "memory");
}

/* After load_slots() of the tile with the first `valid` keys, when the copies have arrived: each thread widens the pieces of
 * float8 elements that it has copied itself, where they are. Then a barrier. */
template <typename T, int ROWS, int D, int THREADS>
static __device__ __forceinline__ void widen_slots(uint32_t tile, const fgqa_view &view, int valid, int d, bool vector)
{
    using shape = tile_shape<T, D, THREADS>;
    if (view.dtype != FGQA_F8E4M3 || !vector) { return; }
    const int row0 = thread_index() / shape::LANES, piece0 = thread_index() % shape::LANES;
    const uint32_t dst = tile + swizzle<shape::ROW_BYTES>(row0, piece0);
#pragma unroll
    for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
        if (row0 + r >= valid) { break; }
#pragma unroll
        for (int step = 0; step < shape::STEPS; step++) {
            const int end = (piece0 + step * shape::LANES + 1) * shape::PIECE;
            if (end <= d) { widen_piece(dst + r * shape::ROW_BYTES + step * shape::LANES * 16, T()); }
        }
    }
}

/* Keys [j0, j0 + ROWS) of the sequence into a tile, as load_tile() does it; vector: pieces can be read whole. */
template <typename T, int ROWS, int D, int THREADS, bool CACHE>
static __device__ __forceinline__ void load_slots(uint32_t tile, const fgqa_cache &c, const fgqa_view &view, const cache_task<CACHE> &task, const char *head,
                                                  int32_t j0, const fgqa_sequence &sequence, int d, bool vector)
{
    using shape = tile_shape<T, D, THREADS>;
    static_assert(ROWS % shape::ROWS_AT_ONCE == 0 && shape::ROWS_AT_ONCE % 8 == 0, "threads cover whole groups of rows");
    const int row0 = thread_index() / shape::LANES, piece0 = thread_index() % shape::LANES, bytes = cache_bytes(view);
    const bool float8 = view.dtype == FGQA_F8E4M3;
    const uint32_t dst = tile + swizzle<shape::ROW_BYTES>(row0, piece0);
    const int valid = sequence.mask.sk - j0;
#pragma unroll 1
    for (int r = 0; r < ROWS; r += shape::ROWS_AT_ONCE) {
        bool exists = row0 + r < valid;
        const uint32_t slot = exists ? (uint32_t)(sequence.k_row + j0 + row0 + r) : 0;
        const char *row = head;
        if (exists && task.table) {
            const slot_place at = place_of_slot(c, task.table, slot);
            exists = at.page >= 0;
            if (exists) { row += bytes * (at.page * view.stride_b + at.slot * view.stride_s); }
        } else {
            row += bytes * (int64_t)slot * view.stride_s;
        }
#pragma unroll
        for (int step = 0; step < shape::STEPS; step++) {
            const int piece = piece0 + step * shape::LANES, first = piece * shape::PIECE;
            const int count = exists ? max(0, min(shape::PIECE, d - first)) : 0;
            const uint32_t to = dst + r * shape::ROW_BYTES + step * shape::LANES * 16;
            const char *from = row + bytes * first * view.stride_d;
            if (vector && !float8) {
                cp_async_16(to, count > 0 ? from : head, count * (int)sizeof(T));
                continue;
            }
            if (vector && count == shape::PIECE) {
                cp_async_narrow<T>(to, from);      /* widen_slots() does the rest */
                continue;
            }
            uint32_t word[4];
            gather_words(word, from, view.stride_d, count, float8, T());
            store_words(to, word);
        }
    }
}

/* Whether every piece of every slot can be read at once. */
template <typename T> static inline void find_vector_access(fgqa_params *params)
{
    const fgqa_problem *p = &params->problem;
    for (int n = 0; n < 2; n++) {
        const fgqa_view *view = &p->view[n == 0 ? FGQA_ARG_k : FGQA_ARG_v];
        const int float8 = view->dtype == FGQA_F8E4M3;
        const int64_t size = float8 ? 1 : (int64_t)sizeof(T), unit = float8 ? 16 / (int64_t)sizeof(T) : 16;
        const int32_t vector = view->stride_d == 1 && (uintptr_t)view->data % (uintptr_t)unit == 0 && view->stride_s * size % unit == 0
            && view->stride_b * size % unit == 0 && view->stride_h * size % unit == 0;
        if (n == 0) { params->vector_k = vector; } else { params->vector_v = vector; }
    }
}
