/* dec_launch.cuh - host side of the decode kernels: copies, constants, launches. */
#pragma once
#include "../any/dec_counters.h"
#include "../any/score_units.h"
#include "../common/launch.cuh"
#include "../cuda.h"
#include "../tensor_map.h"
#include "dec_combine.cuh"
#include "dec_join.cuh"

/* Largest N <= blocks for which every block has one pair's part or whole pairs; `blocks` if that leaves a tenth of them idle.
 * Memory is the limit: a few idle SMs cost nothing, and a second segment or a record costs microseconds. */
static int32_t aligned_blocks(int64_t pairs, int32_t blocks)
{
    for (int32_t n = blocks; 10 * n >= 9 * blocks; n--) {
        if (n % pairs == 0 || pairs % n == 0) { return n; }
    }
    return blocks;
}

/* A copy is 128 bytes wide and, where the head dim fills the tile, all chunks deep. */
static int make_tile_map(CUtensorMap *map, int32_t *boxes, const fgqa_problem *p, fgqa_arg arg, int32_t columns, bool deep_pieces)
{
    const int32_t chunks = TILE_BYTES / CHUNK_BYTES, pieces = has_pieces(p->cache), deep = chunks > 1 && columns == D && (!pieces || deep_pieces);
    *boxes = deep ? 1 : chunks;
    return fgqa_cache_map(map, p, arg, pieces ? PIECE : GRANULE, deep ? chunks : 1);
}

/* Whether kernels can count scores in it: as a power of two it is a float32 number, and so are LAZY of them. */
static bool is_unit(double unit) { return unit * FGQA_LOG2E <= FLT_MAX && LAZY <= FLT_MAX * (unit * FGQA_LOG2E); }

/* K and V are read once. Records have to stay in L2 until they are merged: where blocks leave some, K and V are evict_first.
 * Where they leave none, evict_normal is up to 1% faster on an H100 (3.35 TB/s); on an H200 (4.9 TB/s) calls with it took 3 to
 * 4% more time than like ones with evict_first. Why is not known (LOG.md). */
static bool has_slow_memory(int32_t device)
{
    fgqa_cuda_properties properties;
    return fgqa_cuda_device_properties(device, &properties) == FGQA_OK && properties.memory_gbs < 4000;
}

/* deep_pieces: of a tile in pieces, the chunks of one follow each other. joins_halves: the kernel can, of 17 rows or more. */
static int make_params(dec_params *p, const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec, bool deep_pieces, bool joins_halves)
{
    p->common = fgqa_params_make(problem);
    fgqa_dec_layout_make(problem, BLOCK_Q, GRANULE, DV, (int32_t)plan->tasks, workspace, &p->layout);
    const fgqa_cache &cache = problem->cache;
    const int32_t sk = cache.page_size ? (int32_t)fgqa_clamp((int64_t)cache.slots + cache.new_max, 0, cache.capacity) : problem->sk;     /* where they are uniform */
    const fgqa_mask mask = {problem->sq, sk, problem->align == FGQA_ALIGN_BOTTOM_RIGHT ? sk - problem->sq : 0, problem->left, problem->right, problem->chunk};
    const int64_t pairs = (int64_t)problem->b * p->layout.heads;
    p->uniform = fgqa_dec_is_uniform(problem);
    p->span = fgqa_dec_span_of(&mask, 0, GRANULE);
    p->blocks_aligned = aligned_blocks(pairs, p->layout.blocks);
    p->units = units_of(*p, p->span.count);
    p->by_units = fast_div_make(p->units);
    p->by_heads = fast_div_make(p->layout.heads);
    p->by_row_blocks = fast_div_make(p->layout.row_blocks);
    p->by_page_size = fast_div_make(problem->cache.page_size);
    p->split = split_of(*p, p->uniform ? (int32_t)pairs * p->units : 1, true);
    const bool even = p->uniform && p->layout.chunk == 0 && p->split.longer == 0;
    p->halves = even && joins_halves && p->layout.tile_rows >= 32 && 2 * p->split.share == p->units;
    p->parts = 0;
    p->counters = fgqa_dec_counters(problem->device.index, p->layout.blocks, exec->stream);
    p->folds = BLOCK_Q > 8 && p->counters && p->layout.chunk && p->layout.tile_rows <= FOLD_ROWS && pairs >= p->blocks_aligned;      /* blocks may have whole pairs */
    const bool whole_pairs = leaves_no_records(*p, p->split, p->units);
    p->evict_normal = (whole_pairs || !p->uniform) && has_slow_memory(problem->device.index);
    p->b_step = p->uniform && whole_pairs && p->split.share > p->units ? b_step_of(*p, p->split) : 0;
    const int ends = problem->align == FGQA_ALIGN_BOTTOM_RIGHT && problem->right >= 0;       /* the last row sees the last key */
    p->lengths = {problem->q_lens, problem->kv_lens, problem->b, problem->sq, problem->sk, problem->left, problem->right, problem->chunk, problem->align,
                  problem->left == FGQA_UNBOUNDED && problem->chunk <= 0 && (problem->right == FGQA_UNBOUNDED || ends),
                  cache.page_size, cache.slots, cache.new_max, cache.capacity, cache.lens, cache.left_pad, cache.new_lens};
    p->table = cache.table;
    p->table_stride = cache.table_stride;
    p->plain = p->uniform && !p->table;
    p->page_size = problem->cache.page_size;
    p->pieces = has_pieces(problem->cache);
    p->chunk_pitch = p->pieces && deep_pieces ? PIECE * 128 : CHUNK_BYTES;
    p->piece_pitch = p->pieces && deep_pieces ? PIECE * 128 * (TILE_BYTES / CHUNK_BYTES) : PIECE * 128;
    p->sequence.first_slot = 0;
    p->sequence.sk = mask.sk;
    p->sequence.sq = mask.sq;
    p->sequence.span = p->span;
    p->one_query = p->uniform && mask.sq == 1;
    p->keys = fgqa_kv_range(&mask, 0, mask.sq);
    const bool capped = problem->softcap != 0.0, slopes = problem->view[FGQA_ARG_alibi_slopes].data != NULL;
    p->cap_ratio = !slopes && p->layout.tile_rows <= 32 && is_unit(problem->softcap) ? fgqa_in_caps(problem) : 0.0f;
    p->chain = slopes || (capped ? p->cap_ratio == 0.0f : !is_unit(problem->scale));
    p->unit = p->chain ? 1.0f : p->cap_ratio != 0.0f ? (float)problem->softcap : p->common.scale;
    p->scale_log2 = p->unit * (float)FGQA_LOG2E;
    const int error = make_tile_map(&p->k_map, &p->k_boxes, problem, FGQA_ARG_k, problem->d, deep_pieces);
    return error != cudaSuccess ? error : make_tile_map(&p->v_map, &p->v_boxes, problem, FGQA_ARG_v, problem->dv, deep_pieces);
}

/* Of a kernel that joins parts. */
static cudaError_t allow_clusters(const void *kernel, int32_t bytes, int32_t device, launch_state *state)
{
    if (state->ready[device]) { return cudaSuccess; }
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error != cudaSuccess ? error : allow_shared_memory(kernel, bytes, device, state);
}

/* COOPERATIVE: all blocks are resident. CLUSTERS: two at a time, or as many as have parts of a pair, and only those with work. */
enum dec_blocks { ANY, COOPERATIVE, CLUSTERS };

struct dec_launch_config {
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config;

    dec_launch_config(uint32_t blocks, uint32_t cluster, int32_t shared_bytes)
    {
        memset(this, 0, sizeof *this);
        config.gridDim = dim3(blocks);
        config.blockDim = dim3(THREADS);
        config.dynamicSmemBytes = (size_t)shared_bytes;
        config.attrs = attributes;
        if (cluster > 1) {
            attributes[0].id = cudaLaunchAttributeClusterDimension;
            attributes[0].val.clusterDim.x = cluster;
            attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
            config.numAttrs = 1;
        }
    }
    cudaLaunchAttribute *add() { return &attributes[config.numAttrs++]; }
};

/* Where all blocks are resident, a launch begins ahead of the end of the one before it, and waits for that before it looks at
 * memory. */
static cudaError_t launch_blocks(const void *kernel, const dec_params *p, int32_t shared_bytes, dec_blocks how, void *stream)
{
    dec_launch_config launch((uint32_t)(how == CLUSTERS ? p->split.blocks : p->layout.blocks), how != CLUSTERS ? 1 : p->parts ? (uint32_t)p->parts : 2, shared_bytes);
    launch.config.stream = (cudaStream_t)stream;
    if (how == COOPERATIVE) {
        cudaLaunchAttribute *cooperative = launch.add();
        cooperative->id = cudaLaunchAttributeCooperative;
        cooperative->val.cooperative = 1;
    }
    if (how != ANY && may_begin_early()) {
        cudaLaunchAttribute *early = launch.add();
        early->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        early->val.programmaticStreamSerializationAllowed = 1;
    }
    void *arguments[] = {(void *)p};
    return cudaLaunchKernelExC(&launch.config, kernel, arguments);
}

/* Of a kernel that joins parts: how many clusters of so many blocks there is room for at once, + 1; 0: not known yet. */
struct cluster_room { volatile int32_t known[MAX_DEVICES][MOST_JOINED + 1]; };

static int32_t clusters_at_once(const void *kernel, int32_t blocks, int32_t shared_bytes, int32_t device, cluster_room *room)
{
    if (room->known[device][blocks] == 0) {
        const dec_launch_config launch((uint32_t)blocks, (uint32_t)blocks, shared_bytes);
        int clusters = 0;
        if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
            cudaGetLastError();
            clusters = 0;
        }
        room->known[device][blocks] = clusters + 1;
    }
    return room->known[device][blocks] - 1;
}

/* Whether clusters are to have a pair each, of as many blocks as there is room for; then params say so. Measured on an H100
 * (LOG.md): a block takes in 65 bytes a nanosecond, all together 3,200, 5% fewer if they leave multiprocessors idle, and
 * records take 2 us, 3.5 with lengths on the device, of which all but one may be 0. */
static bool join_pays(dec_params *p, const void *kernel, int32_t shared_bytes, cluster_room *room)
{
    const fgqa_problem *problem = &p->common.problem;
    const int32_t device = problem->device.index;
    const int64_t pairs = (int64_t)problem->b * p->layout.heads;
    const int32_t units = p->uniform ? p->units : (problem->sk + GRANULE - 1) / GRANULE;
    fgqa_cuda_properties properties;
    int32_t parts = MOST_JOINED;
    if (p->layout.chunk || pairs > INT32_MAX / MOST_JOINED || fgqa_cuda_device_properties(device, &properties) != FGQA_OK) { return false; }
    while (parts > 1 && clusters_at_once(kernel, parts, shared_bytes, device, room) < pairs) { parts = parts > PORTABLE_JOINED ? PORTABLE_JOINED : parts - 1; }
    const int32_t share = (units + parts - 1) / parts, blocks = (int32_t)pairs * parts, multiprocessors = properties.multiprocessors;
    const double pair_bytes = 2.0 * TILE_BYTES * units, of_block = 2.0 * TILE_BYTES * share / 65, of_all = pair_bytes * (double)(p->uniform ? pairs : p->layout.heads) / 3200;
    const double joined = fmax(of_block, 10 * blocks < 9 * multiprocessors ? 1.05 * of_all : of_all);
    if (parts < 2 || units < 2 || joined - of_all > (p->uniform ? 2000 : 3500)) { return false; }
    p->parts = p->uniform ? (units + share - 1) / share : parts;
    p->by_parts = fast_div_make(p->parts);
    p->counters = NULL;
    p->split = {(int32_t)pairs * p->parts, share, 0};
    p->fills_ring = 2 * p->split.blocks <= multiprocessors;
    /* Both at once on one half of the multiprocessors each, blocks of two launches share their ways to memory unevenly. */
    p->releases = share <= 2 || 3 * p->split.blocks <= multiprocessors || 3 * p->split.blocks >= 2 * multiprocessors;
    p->evict_normal = has_slow_memory(device);
    return true;
}

/* The kernel, and the one that merges where blocks do not. Clusters join halves themselves. */
static cudaError_t launch_decode(const void *kernel, dec_params *p, int32_t shared_bytes, void *stream)
{
    cudaError_t error = cudaErrorCooperativeLaunchTooLarge;
    if (p->halves) {
        p->counters = NULL;
        return launch_blocks(kernel, p, shared_bytes, CLUSTERS, stream);
    }
    if (p->counters) {
        error = launch_blocks(kernel, p, shared_bytes, COOPERATIVE, stream);
        if (error == cudaErrorCooperativeLaunchTooLarge) { cudaGetLastError(); }      /* part of the device: a green context */
    }
    if (error != cudaErrorCooperativeLaunchTooLarge) { return error; }
    p->counters = NULL;
    p->folds = p->b_step = 0;                   /* records of chunks are in the order of pairs */
    error = launch_blocks(kernel, p, shared_bytes, ANY, stream);
    if (error != cudaSuccess || p->layout.records == 0) { return error; }
    const int64_t pairs = (int64_t)p->common.problem.b * p->layout.heads, groups = p->layout.tile_rows * ITEMS_OF_ROW / 8, wanted = 2 * p->layout.blocks / pairs;
    const int32_t step = (int32_t)(wanted < 1 ? 1 : wanted > groups ? groups : wanted);
    return launch_kernel(FGQA_SUFFIX(FGQA_ROW, _combine), (uint32_t)(pairs * step), 32 * CONSUMERS, 0, stream, *p, step);
}
