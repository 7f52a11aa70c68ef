/* bwd_bias.cuh - part of bwd.cu, head dims 64 and 128: a bias tensor, of q's dtype or float32.
 *
 *     x = scale S + bias    P = 2^(log2(e) (x - base) - lse2)
 *
 * The producer loads it in tiles of 64 rows x 64 keys (bias_tile()); ldmatrix transposes them, float32 ones are read word by
 * word. Rows whose LSE is so large that it holds no digits of their sum have a base other than 0, from which lse2 counts
 * (bwd_delta_tiled.cu); x is rounded as it was in the forward pass. Tiles without such rows do not ask.
 * The gradient of one of q's dtype, if it is asked for and not shared, takes the tile's place: dS as it is rounded for dK and dQ,
 * transposed once more, and stored by TMA. Tiles that nobody sees are cleared before. Of others, and beside a soft cap or slopes,
 * bwd_dbias.cuh makes it.
 * A bias of -inf hides a key whatever its score is. Of finite numbers that is arithmetic; where dO, Q, K or V hold others,
 * weights and dS of such keys are set to 0 once more.
 */
#pragma once

static constexpr uint32_t HIDDEN = __is_same(T, bf16) ? 0xFF80FF80u : 0xFC00FC00u;      /* twice -inf */
static constexpr uint32_t WIDE_HIDDEN = 0xFF800000u;

/* Takes the bases of 64 rows off scores. */
static __device__ __forceinline__ void lower_scores(float (&s)[32], const float *bases)
{
    const float *of_lane = bases + thread_index() % 4 * 2;
#pragma unroll
    for (int n = 0; n < 32; n++) { s[n] -= of_lane[n / 4 * 8 + n % 2]; }
}

/* Of registers 2 n and 2 n + 1 of scores. */
PTX_FN float2 bias_pair(const uint32_t (&pairs)[16], int n) { return unpack2(pairs[n], T()); }
PTX_FN float2 bias_pair(const uint32_t (&words)[32], int n) { return make_float2(__uint_as_float(words[2 * n]), __uint_as_float(words[2 * n + 1])); }

/* Whether weights and dS have to be hidden once more. */
static __device__ __forceinline__ bool hides_by_bias(uint32_t state) { return state & (CARE_POISON | VALUES_POISONED); }

#if FGQA_BWD_HAS_BIAS(FGQA_D)

enum { OF_CONSUMER_TILE = 2 };                                       /* named barriers, and the next: a consumer has changed its tile */

/* For ldmatrix: of 16 rows from `tile` on, the lane's address. */
static __device__ __forceinline__ uint32_t bias_of_lane(uint32_t tile)
{
    const uint32_t here = thread_index() & 127, piece = here / 32 * 2 + (here >> 3 & 1);
    return tile + ((here >> 4 & 1) * 8 + (here & 7)) * 128 + ((piece ^ (here & 7)) << 4);
}

/* Pair 2 n + half: rows 8 n + 2 (lane % 4) + {0, 1} of the lane's key, or the one 8 further. */
static __device__ __forceinline__ void read_bias(uint32_t (&pairs)[16], uint32_t tile)
{
    const uint32_t from = bias_of_lane(tile);
#pragma unroll
    for (int n = 0; n < 4; n++) { ldmatrix_x4_trans((uint32_t (&)[4])pairs[4 * n], from + 2048 * n); }
}

/* float32: word 4 n + 2 half + e is that of register 4 n + 2 half + e of scores. Rows are 128 bytes, so that lanes meet
 * different banks. */
PTX_FN uint32_t wide_bias_of_lane(uint32_t tile)
{
    const uint32_t here = thread_index() & 127, warp = here / 32, key = here / 4 % 8, row = here % 4 * 2;
    return tile + warp / 2 * 8192 + row * 128 + ((warp % 2 * 4 + key / 4 ^ row) << 4) + key % 4 * 4;
}

PTX_FN uint32_t read_word(uint32_t of_lane, int n, int half, int e)
{
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"((of_lane ^ (32 * half + 16 * e)) + 1024 * n + 128 * e) : "memory");
    return x;
}

static __device__ __forceinline__ void read_bias(uint32_t (&words)[32], uint32_t tile)
{
    const uint32_t from = wide_bias_of_lane(tile);
#pragma unroll
    for (int n = 0; n < 32; n++) { words[n] = read_word(from, n / 4, n / 2 % 2, n % 2); }
}

/* S -> scores in natural units. */
template <int WORDS> static __device__ __forceinline__ void add_bias(float (&s)[32], const uint32_t (&bias)[WORDS], float scale)
{
#pragma unroll
    for (int n = 0; n < 16; n++) {
        const float2 pair = bias_pair(bias, n);
        s[2 * n] = fmaf(s[2 * n], scale, pair.x);
        s[2 * n + 1] = fmaf(s[2 * n + 1], scale, pair.y);
    }
}

/* Pairs of weights or dS of keys whose bias is -inf become 0, whatever they are. */
template <score_kind KIND> static __device__ __forceinline__ void hide_by_bias(uint32_t (&pairs)[16], uint32_t tile)
{
    if constexpr (WIDE_BIAS<KIND>) {
        const uint32_t words = wide_bias_of_lane(tile);
#pragma unroll
        for (int n = 0; n < 16; n++) {
            const bool first = read_word(words, n / 2, n % 2, 0) != WIDE_HIDDEN, second = read_word(words, n / 2, n % 2, 1) != WIDE_HIDDEN;
            pairs[n] &= (first ? 0x0000FFFFu : 0) | (second ? 0xFFFF0000u : 0);
        }
    } else {
        const uint32_t from = bias_of_lane(tile);
#pragma unroll
        for (int n = 0; n < 4; n++) {
            uint32_t bias[4];
            ldmatrix_x4_trans(bias, from + 2048 * n);
#pragma unroll
            for (int m = 0; m < 4; m++) { pairs[4 * n + m] &= __vcmpne2(bias[m], HIDDEN); }
        }
    }
}

/* Those of the rows of a step. */
static __device__ __forceinline__ const float *bases_of(const bwd_params &p, const shared &sm, uint32_t stage) { return p.w.bases + (int64_t)sm.q_tile[stage] * BLOCK_Q; }

/* Shared `src` -> box at (c0, c1, c2, c3), in this thread's bulk group; what is out of range is left out. */
PTX_FN void tma_store_4d(const CUtensorMap *map, uint32_t src, int c0, int c1, int c2, int c3)
{
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"((uint64_t)map), "r"(src),
                 "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}

PTX_FN void stmatrix_x4_trans_if(bool yes, uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3)
{
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %0, 0;\n\t@p stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%1], {%2, %3, %4, %5};\n\t}"
                 ::"r"((int)yes), "r"(address), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

/* dS -> dbias in a consumer's tile, and from there to `at`: key, row, head, sequence. The tile is free then (`empty`), but for
 * the thread that still has to wait for its store. */
template <score_kind KIND> static __device__ __forceinline__ void store_dbias(const bwd_params &p, uint32_t tile, uint64_t *empty, const int4 &at, const uint32_t (&gradients)[16], int consumer)
{
    const uint32_t to = bias_of_lane(tile), here = thread_index() & 127;
    const bool wanted = p.some_dbias;
#pragma unroll
    for (int n = 0; n < 4; n++) {
        uint32_t x[4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            x[m] = gradients[4 * n + m];
            if (DROPS<KIND>) {
                const float2 pair = unpack2(x[m], T());
                x[m] = pack2(pair.x * p.dbias_scale, pair.y * p.dbias_scale, T());
            }
        }
        stmatrix_x4_trans_if(wanted, to + 2048 * n, x[0], x[1], x[2], x[3]);
    }
    if (wanted) {
        fence_proxy_async();
        bar_sync(OF_CONSUMER_TILE + consumer, CONSUMERS / 2);
        if (here == 0) {
            tma_store_4d(&p.dbias_map, tile, at.x, at.z, at.y, at.w);
            tma_store_commit();
        }
    }
    __syncwarp();
    if (here % 32 == 0 && !(wanted && here == 0)) { mbarrier_arrive(smem_address(empty)); }
}

/* By the thread that stored it, some time later. */
static __device__ __forceinline__ void free_dbias(const bwd_params &p, uint64_t *empty)
{
    if (!p.some_dbias) { return; }
    tma_store_wait_read();
    mbarrier_arrive(smem_address(empty));
}

/* By a warp that has read a tile, and put nothing in its place. */
static __device__ __forceinline__ void free_bias(uint64_t *empty)
{
    fence_proxy_async();                                             /* what has been read before what TMA writes */
    __syncwarp();
    if (thread_index() % 32 == 0) { mbarrier_arrive(smem_address(empty)); }
}

/* Waits for the tile of half a step (head dim 64) or a step, and reads it. */
template <score_kind KIND, int WORDS> static __device__ __forceinline__ void take_bias(uint32_t (&words)[WORDS], shared &sm, const ring2 &r, uint32_t half, int consumer, uint32_t state)
{
    const uint32_t slot = bias_slot<KIND>(half, r.stage, consumer);
    mbarrier_wait(smem_address(&sm.bias_full[slot]), bias_parity<KIND>(half, r));
    read_bias(words, bias_tile<KIND>(sm, slot, consumer));
    if (WIDE_BIAS<KIND> && !hides_by_bias(state)) { free_bias(&sm.bias_empty[slot]); }
}
#endif

/* Whether row i of a query head of the group sees key `key` of the task's tile as far as the bias says. */
template <bool WIDE> static __device__ __forceinline__ bool bias_shows(const bwd_params &p, const task &t, int32_t head, int32_t i, int32_t key)
{
    const fgqa_problem &problem = p.common.problem;
    const fgqa_view &bias = problem.view[FGQA_ARG_bias];
    if (D == 256) { return load_float(bias.data, t.b * bias.stride_b + (t.kv_head * problem.g + head) * bias.stride_h + i * bias.stride_s + (t.n * BLOCK_K + key) * bias.stride_d, bias.dtype) != -INFINITY; }
    const char *row = fgqa_row_address(bias, WIDE ? sizeof(float) : sizeof(T), t.b, t.kv_head * problem.g + head, i);
    if (WIDE) { return ((const float *)row)[t.n * BLOCK_K + key] != -INFINITY; }
    return to_float(((const T *)row)[t.n * BLOCK_K + key]) != -INFINITY;
}
