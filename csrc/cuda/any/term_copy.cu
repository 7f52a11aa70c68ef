/* term_copy.cu - rows of a bias or a mask tensor copied to rows that start on 16 bytes.
 *
 * A thread makes 16 bytes of a row at a time, of the five aligned words that hold them: what is behind the last key is of the
 * next row, or garbage, and nobody reads it. Only where words would reach out of the tensor it goes byte by byte.
 */
#include "term_copy.h"

#include "../common/launch.cuh"

static constexpr int THREADS = 256, ROUNDS = 4, AT_ONCE = THREADS * ROUNDS, MOST_BLOCKS = 16384;

struct copy_job {
    const char *from, *end;     /* the tensor's first byte, and the one behind its last */
    char *to;
    int64_t stride_b, stride_h, stride_s;      /* bytes */
    uint32_t heads, row_pieces, pieces;        /* pieces of a row, and of all rows of a head */
    uint32_t blocks;                           /* of a head */
};

static __device__ __forceinline__ uint4 load_piece(const char *at, const char *begin, const char *end)
{
    const uint32_t over = (uint32_t)(uintptr_t)at % 4;
    const char *const first = at - over, *const last = first + (over ? 16 : 12);
    if (first >= begin && last + 4 <= end) {
        const uint32_t *const x = (const uint32_t *)first;
        const uint32_t a = x[0], b = x[1], c = x[2], d = x[3], e = *(const uint32_t *)last;
        return make_uint4(__funnelshift_r(a, b, 8 * over), __funnelshift_r(b, c, 8 * over), __funnelshift_r(c, d, 8 * over), __funnelshift_r(d, e, 8 * over));
    }
    uint32_t words[4] = {};
#pragma unroll
    for (int n = 0; n < 16; n++) {
        if (at + n < end) { words[n / 4] |= (uint32_t)*(const uint8_t *)(at + n) << 8 * (n % 4); }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(THREADS) fgqa_term_copy_rows(const __grid_constant__ copy_job job)
{
    const uint32_t part = blockIdx.x % job.blocks, plane = blockIdx.x / job.blocks;
    const char *const from = job.from + plane / job.heads * job.stride_b + plane % job.heads * job.stride_h;
    uint4 *const to = (uint4 *)job.to + (uint64_t)plane * job.pieces;
    for (uint32_t first = part * AT_ONCE + threadIdx.x; first < job.pieces; first += job.blocks * AT_ONCE) {
        uint4 x[ROUNDS];
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            const uint32_t piece = first + n * THREADS, row = piece / job.row_pieces;
            if (piece < job.pieces) { x[n] = load_piece(from + row * job.stride_s + 16 * (piece - row * job.row_pieces), job.from, job.end); }
        }
#pragma unroll
        for (int n = 0; n < ROUNDS; n++) {
            if (first + n * THREADS < job.pieces) { to[first + n * THREADS] = x[n]; }
        }
    }
}

static int copy_term(const fgqa_problem *p, const fgqa_problem *copy, fgqa_arg arg, void *stream)
{
    const fgqa_view &from = p->view[arg];
    const fgqa_term_extent x = fgqa_term_extent_of(p, arg);
    const int64_t bytes = fgqa_term_bytes(&from), planes = x.batch * x.heads, row_pieces = x.row_bytes / 16, pieces = row_pieces * x.rows;
    const int64_t reach = (x.batch - 1) * from.stride_b + (x.heads - 1) * from.stride_h + (x.rows - 1) * from.stride_s + p->sk;
    const int64_t wanted = (pieces + AT_ONCE - 1) / AT_ONCE, room = MOST_BLOCKS / planes, blocks = wanted < room ? wanted : room > 0 ? room : 1;
    if (planes * pieces == 0) { return cudaSuccess; }
    const copy_job job = {(const char *)from.data, (const char *)from.data + reach * bytes, (char *)copy->view[arg].data, from.stride_b * bytes, from.stride_h * bytes,
                          from.stride_s * bytes, (uint32_t)x.heads, (uint32_t)row_pieces, (uint32_t)pieces, (uint32_t)blocks};
    return launch_kernel(fgqa_term_copy_rows, (uint32_t)(planes * blocks), THREADS, 0, stream, job);
}

extern "C" int fgqa_term_copy_launch(const fgqa_problem *problem, const fgqa_problem *copy, int which, void *stream)
{
    int error = cudaSuccess;
    for (int of = FGQA_COPY_BIAS; of <= FGQA_COPY_MASK && error == cudaSuccess; of *= 2) {
        if (which & of) { error = copy_term(problem, copy, fgqa_copied_term(of), stream); }
    }
    return error;
}
