/* dec_launch.cuh - host side of the decode kernels: copies, constants, launches. */
#pragma once
#include "../any/dec_counters.h"
#include "../any/score_units.h"
#include "../common/launch.cuh"
#include "../cuda.h"
#include "../tensor_map.h"
#include "dec_combine.cuh"

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

/* K and V are read once. Records have to stay in L2 until they are merged: where blocks leave some, K and V are evict_first. Where they
 * leave none, evict_normal is up to 1% faster on an H100 (3.35 TB/s); on an H200 (4.9 TB/s) calls with it took 3 to 4% more time than
 * like ones with evict_first. Why is not known (LOG.md). */
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

/* COOPERATIVE: all blocks are resident. CLUSTERS: two at a time, and only those with work. */
enum dec_blocks { ANY, COOPERATIVE, CLUSTERS };

static cudaError_t launch_blocks(const void *kernel, const dec_params *p, int32_t shared_bytes, dec_blocks how, void *stream)
{
    cudaLaunchAttribute attribute = {};
    if (how == CLUSTERS) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = 2;
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
        attribute.id = cudaLaunchAttributeCooperative;
        attribute.val.cooperative = 1;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((uint32_t)(how == CLUSTERS ? p->split.blocks : p->layout.blocks));
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = (size_t)shared_bytes;
    config.stream = (cudaStream_t)stream;
    config.attrs = &attribute;
    config.numAttrs = how == ANY ? 0 : 1;
    void *arguments[] = {(void *)p};
    return cudaLaunchKernelExC(&config, kernel, arguments);
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
