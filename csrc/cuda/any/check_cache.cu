/* check_cache.cu - the index arrays of a KV cache against core/cache_rules.h, on the device: what core/problem_cache_contents.c
 * does on the CPU, which has the sentences. Only whether there is fault comes back.
 *
 * Items are the parts of pages that sequences write or read, `items_each` of a sequence: first those its new keys may fall on,
 * `writes_each`, then one for each entry of its row of the table. Each is held against all that are written, of which a block has
 * as many in shared memory as it has threads. No part is written twice, or written and read.
 */
#include "check_cache.h"

#include "../../core/cache_rules.h"
#include "../common/launch.cuh"
#include "../common/params.cuh"

static constexpr int THREADS = 256;

struct check_job {
    fgqa_problem problem;
    int64_t slots;
    int64_t writes_each, items_each;    /* 0: nothing can be written twice */
    int32_t *fault;
};

static __device__ __forceinline__ fgqa_cache_use use_of(const fgqa_cache &c, int64_t n)
{
    const fgqa_cache_use use = {c.lens ? c.lens[n] : c.slots, c.new_lens ? c.new_lens[n] : c.new_max, c.left_pad ? c.left_pad[n] : 0};
    return use;
}

/* Lengths, positions, page numbers of sequence n; `of`: this thread's share of the page numbers, every `step`-th. */
static __device__ bool sequence_is_sound(const check_job &job, int64_t n, int64_t of, int64_t step)
{
    const fgqa_problem &p = job.problem;
    const fgqa_cache &c = p.cache;
    const fgqa_cache_use use = use_of(c, n);
    if (fgqa_check_use(use, job.slots, c.new_max) != FGQA_USE_FITS) { return false; }
    const int64_t sq = p.q_lens ? p.q_lens[n] : p.sq;
    if (sq < 0 || sq > p.sq) { return false; }
    const fgqa_slots turned = fgqa_slots_turned(use, sq), needed = fgqa_slots_needed(use, c.new_max);
    if (c.rotary.pairs > 0 && turned.begin != turned.end) {
        const int64_t shift = c.rotary.offsets ? c.rotary.offsets[n] - use.before : 0;
        if (turned.begin + shift < 0 || turned.end - 1 + shift >= c.rotary.positions) { return false; }
    }
    if (!c.table || needed.end <= needed.begin) { return true; }
    bool sound = true;
    for (int64_t column = needed.begin / c.page_size + of; column <= (needed.end - 1) / c.page_size; column += step) {
        sound = sound && fgqa_page_exists(c.table[n * c.table_stride + column], c.pages);
    }
    return sound;
}

static __device__ bool scales_are_usable(const fgqa_view &view, int64_t count, int32_t hk)
{
    bool usable = true;
    for (int64_t n = (int64_t)blockIdx.x * THREADS + threadIdx.x; view.data && n < count * hk; n += (int64_t)gridDim.x * THREADS) {
        usable = usable && fgqa_scale_is_usable(*(const float *)fgqa_row_address(view, sizeof(float), n / hk, n % hk, 0));
    }
    return usable;
}

/* The k-th part of a page that sequence n writes (k < writes_each) or reads; empty if there is none, or if its lengths are wrong. */
static __device__ fgqa_page_part part_of(const check_job &job, int64_t n, int64_t k)
{
    const fgqa_cache &c = job.problem.cache;
    const fgqa_page_part none = {-1, 0, 0};
    const fgqa_cache_use use = use_of(c, n);
    if (fgqa_check_use(use, job.slots, c.new_max) != FGQA_USE_FITS) { return none; }
    const bool writes = k < job.writes_each;
    const int64_t column = writes ? use.before / c.page_size + k : k - job.writes_each;
    const int64_t begin = max(column * c.page_size, writes ? use.before : use.pad), end = writes ? use.before + use.added : use.before;
    if (begin >= end || begin / c.page_size > column) { return none; }      /* all of it is left out */
    return fgqa_first_page_part(c.table[n * c.table_stride + column], begin, end, c.page_size);
}

/* Items [first, first + THREADS) against all that are written. All threads of the block. */
static __device__ bool parts_are_apart(const check_job &job, int64_t first)
{
    __shared__ fgqa_page_part written[THREADS];
    const int64_t b = job.problem.b, item = first + threadIdx.x, targets = b * job.writes_each;
    fgqa_page_part own = {-1, 0, 0};
    if (item < b * job.items_each) { own = part_of(job, item / job.items_each, item % job.items_each); }
    /* of a written item, its number among those: it is not held against itself */
    const int64_t own_target = item % job.items_each < job.writes_each ? item / job.items_each * job.writes_each + item % job.items_each : -1;
    bool apart = true;
    for (int64_t t0 = 0; t0 < targets; t0 += THREADS) {
        const int64_t target = t0 + threadIdx.x;
        __syncthreads();
        if (target < targets) { written[threadIdx.x] = part_of(job, target / job.writes_each, target % job.writes_each); }
        __syncthreads();
        const int count = (int)min((int64_t)THREADS, targets - t0);
        for (int n = 0; own.begin < own.end && n < count; n++) { apart = apart && (t0 + n == own_target || !fgqa_parts_meet(own, written[n])); }
    }
    return apart;
}

extern "C" __global__ void __launch_bounds__(THREADS) fgqa_check_cache_kernel(const __grid_constant__ check_job job)
{
    const fgqa_problem &p = job.problem;
    const fgqa_cache &c = p.cache;
    bool sound = scales_are_usable(c.k_scale, c.k_scale.stride_b ? p.b : 1, p.hk) && scales_are_usable(c.v_scale, c.v_scale.stride_b ? p.b : 1, p.hk);
    for (int64_t n = blockIdx.x; n < p.b; n += gridDim.x) { sound = sound && sequence_is_sound(job, n, threadIdx.x, THREADS); }
    for (int64_t first = (int64_t)blockIdx.x * THREADS; first < p.b * job.items_each; first += (int64_t)gridDim.x * THREADS) {
        sound = parts_are_apart(job, first) && sound;
    }
    if (!sound) { *job.fault = 1; }
}

extern "C" int fgqa_check_cache_launch(const fgqa_problem *p, int64_t slots, int32_t *fault, void *stream)
{
    const fgqa_cache *c = &p->cache;
    check_job job = {*p, slots, 0, 0, fault};
    if (c->table && c->new_max > 0) {
        job.writes_each = ((int64_t)c->new_max + c->page_size - 1) / c->page_size + 1;
        job.items_each = job.writes_each + c->table_stride;
    }
    const cudaError_t error = cudaMemsetAsync(fault, 0, sizeof *fault, (cudaStream_t)stream);
    if (error != cudaSuccess || p->b == 0) { return error; }
    const int64_t tiles = (p->b * job.items_each + THREADS - 1) / THREADS, blocks = tiles > p->b ? tiles : p->b;
    return launch_kernel(fgqa_check_cache_kernel, (uint32_t)(blocks < 4096 ? blocks : 4096), THREADS, 0, stream, job);
}
