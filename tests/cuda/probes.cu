/* probes.cu - what the kernels for Hopper are built of, each by itself, for tests/test_probes.py: tensor maps
 * and what a copy by them leaves in shared memory, descriptors of tiles both ways, accumulators as the operand
 * of the next product. One element type a build.
 */
#include "../../csrc/core/semantics.h"
#include "../../csrc/cuda/common/ptx_ldmatrix.cuh"
#include "../../csrc/cuda/common/ptx_tma.cuh"
#include "../../csrc/cuda/common/softmax.cuh"
#include "../../csrc/cuda/sm90/bwd_wgmma.cuh"
#include "../../csrc/cuda/sm90/warpgroup.cuh"
#include "../../csrc/cuda/tensor_map.h"

typedef FGQA_DTYPE T;

struct probe {
    CUtensorMap q, k, v;
    int32_t heads, head, row, batch, kv_head, k_row;             /* of q: how many share a tile; the first; its row and sequence */
    uint16_t *tile;                                              /* Q as it lies in shared memory */
    float *scores, *out, *columns, *rows;
};

/* D of 64 rows x N columns -> memory. */
template <int N> static __device__ void store(float *to, const float (&d)[N / 2])
{
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < N / 2; i++) { to[(row + i / 2 % 2 * 8) * N + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i]; }
}

/* scores = Q K^T, out = scores V, of 64 rows and N keys. Of the first 64 columns and rows of Q and K alone, as the backward pass
 * has its tiles, if there are so many keys: rows = Q K^T, columns = Q^T K. */
template <int D, int N, int DV> static __global__ void __launch_bounds__(128) products(const __grid_constant__ probe p)
{
    extern __shared__ __align__(1024) unsigned char memory[];
    __shared__ uint64_t barrier;
    constexpr int K_CHUNKS = (D + CHUNK - 1) / CHUNK, V_CHUNKS = (DV + CHUNK - 1) / CHUNK, Q_BYTES = WG_ROWS * 128, BYTES = N * 128;
    const uint32_t q = smem_address(memory), k = q + K_CHUNKS * Q_BYTES, v = k + K_CHUNKS * BYTES, bar = smem_address(&barrier);
    if (threadIdx.x == 0) {
        mbarrier_init(bar, 1);
        fence_mbarrier_init();
        mbarrier_arrive_expect_tx(bar, K_CHUNKS * (Q_BYTES + BYTES) + V_CHUNKS * BYTES);
        const uint64_t policy = createpolicy_evict_normal();
        for (int c = 0; c < K_CHUNKS; c++) {
            tma_load_4d(q + c * Q_BYTES, &p.q, bar, policy, CHUNK * c, p.head, p.row, p.batch);
            tma_load_4d(k + c * BYTES, &p.k, bar, policy, CHUNK * c, p.kv_head, p.k_row, p.batch);
        }
        for (int c = 0; c < V_CHUNKS; c++) { tma_load_4d(v + c * BYTES, &p.v, bar, policy, CHUNK * c, p.kv_head, p.k_row, p.batch); }
    }
    __syncthreads();
    mbarrier_wait(bar, 0);
    for (int i = threadIdx.x; i < K_CHUNKS * Q_BYTES / 2; i += 128) { p.tile[i] = ((const uint16_t *)memory)[i]; }

    float s[N / 2], o[DV / 2];
    uint32_t pairs[N / 4];
    wgmma_fence();
    qk_wgmma<D, N>(s, wgmma_desc_sw128(q, 0, 1024), desc_of(desc_low(k, 0)));
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
    store<N>(p.scores, s);
    pack_weights<T>(pairs, s);
    wgmma_fence();
    pv_wgmma<DV, N>(o, pairs, desc_of(desc_low(v, BYTES)), 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(o);
    store<DV>(p.out, o);

    if constexpr (N >= 64) {
        float part[32];
        wgmma_fence();
        for (int i = 0; i < 4; i++) { wgmma64<0>(part, wgmma_desc_sw128(q, 0, 1024) + 2 * i, wgmma_desc_sw128(k, 0, 1024) + 2 * i, i == 0); }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(part);
        store<64>(p.rows, part);
        wgmma_fence();
        for (int i = 0; i < 4; i++) { wgmma64<1>(part, wgmma_desc_sw128(q, Q_BYTES, 1024) + 128 * i, wgmma_desc_sw128(k, BYTES, 1024) + 128 * i, i == 0); }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_pin(part);
        store<64>(p.columns, part);
    }
}

template <int D, int N, int DV> static int run(const probe &p)
{
    const int bytes = (D + CHUNK - 1) / CHUNK * (WG_ROWS + N) * 128 + (DV + CHUNK - 1) / CHUNK * N * 128;
    const cudaError_t error = cudaFuncSetAttribute(products<D, N, DV>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) { return error; }
    products<D, N, DV><<<1, 128, bytes>>>(p);
    return cudaDeviceSynchronize();
}

static fgqa_view view_of(void *data, int32_t heads, int64_t length, int32_t d)
{
    fgqa_view view = {};
    view.data = data;
    view.stride_b = heads * length * d;
    view.stride_h = length * d;
    view.stride_s = d;
    view.stride_d = 1;
    return view;
}

/* q, k, v: [b, h, s, d], contiguous. A cudaError_t; -1: no such tile. */
extern "C" int fgqa_probe(void *q, void *k, void *v, int32_t b, int32_t hq, int32_t hk, int32_t sq, int32_t sk, int32_t d, int32_t n, int32_t dv, int32_t bf16,
                          int32_t heads, int32_t head, int32_t row, int32_t k_row, uint16_t *tile, float *scores, float *out, float *columns, float *rows)
{
    fgqa_problem problem = {};
    problem.dtype = bf16 ? FGQA_BF16 : FGQA_F16;
    problem.b = b;
    problem.hq = hq;
    problem.hk = hk;
    problem.g = hq / hk;
    problem.sq = sq;
    problem.sk = sk;
    problem.d = d;
    problem.dv = dv;
    problem.view[FGQA_ARG_q] = view_of(q, hq, sq, d);
    problem.view[FGQA_ARG_k] = view_of(k, hk, sk, d);
    problem.view[FGQA_ARG_v] = view_of(v, hk, sk, dv);
    for (int arg = FGQA_ARG_q; arg <= FGQA_ARG_v; arg++) { problem.view[arg].dtype = problem.dtype; }
    probe p = {};
    const fgqa_map_box q_box = {CHUNK, heads, WG_ROWS / heads}, box = {CHUNK, 1, n};
    int error = fgqa_tensor_map(&p.q, &problem, FGQA_ARG_q, q_box);
    if (error == 0) { error = fgqa_tensor_map(&p.k, &problem, FGQA_ARG_k, box); }
    if (error == 0) { error = fgqa_tensor_map(&p.v, &problem, FGQA_ARG_v, box); }
    if (error != 0) { return error; }
    p.heads = heads;
    p.head = head;
    p.row = row;
    p.batch = b - 1;
    p.kv_head = head / problem.g;
    p.k_row = k_row;
    p.tile = tile;
    p.scores = scores;
    p.out = out;
    p.columns = columns;
    p.rows = rows;
#define PROBE(D, N, DV) if (d == D && n == N && dv == DV) { return run<D, N, DV>(p); }
    PROBE(64, 32, 64)
    PROBE(64, 64, 64)
    PROBE(64, 128, 64)
    PROBE(64, 192, 64)
    PROBE(64, 256, 64)
    PROBE(96, 96, 96)
    PROBE(128, 64, 128)
    PROBE(128, 128, 128)
    PROBE(192, 112, 192)
    PROBE(256, 64, 256)
    PROBE(256, 80, 256)
    return -1;
}
