/* kernel_table.h - names and columns of kernels.def. C11 and CUDA. */
#ifndef FGQA_KERNEL_TABLE_H
#define FGQA_KERNEL_TABLE_H
#include "../core/plan.h"

/* A compiled kernel's constants, as its row gives them. */
typedef struct {
    fgqa_pass pass;
    int32_t arch;                       /* least compute capability x 10 */
    fgqa_dtype dtype;
    int32_t d, dv;                      /* largest head dims it serves */
    int32_t block_q, block_k, stages, warps;
    int32_t general;                    /* 1: every option of the contract; 0: what refuse_options() of launch.c lets through */
    int32_t most_rows;                  /* packed query rows of a KV head that share a block of a decode row; 0: not one */
    int32_t cached;                     /* FGQA_CACHE_..: whether it reads KV caches */
    int32_t float8;                     /* 1: those of float8 elements, and nothing else */
    int32_t dropout;                    /* 1: calls with dropout, and nothing else */
} fgqa_cuda_row;

enum { FGQA_CACHE_NEVER, FGQA_CACHE_ONLY, FGQA_CACHE_ALSO };

/* Launches the row's kernel on exec's stream, on the current device. Returns a cudaError_t. */
typedef int fgqa_cuda_launch(const fgqa_plan *plan, const fgqa_problem *problem, void *workspace, const fgqa_exec *exec);
/* Shared memory of one block, bytes. */
typedef int32_t fgqa_cuda_smem(void);

#define FGQA_PASS_fwd FGQA_PASS_FWD
#define FGQA_PASS_bwd FGQA_PASS_BWD
#define FGQA_DTYPE_f16 FGQA_F16
#define FGQA_DTYPE_bf16 FGQA_BF16
#define FGQA_DTYPE_f32 FGQA_F32
#define FGQA_VARIANT_plain 0
#define FGQA_VARIANT_general 1
#define FGQA_VARIANT_decode 2
#define FGQA_VARIANT_decodewide 3
#define FGQA_VARIANT_cache 4
#define FGQA_VARIANT_decodef8 5
#define FGQA_VARIANT_decodewidef8 6
#define FGQA_VARIANT_tall 7
#define FGQA_VARIANT_dropout 8
#define FGQA_VARIANT_short 9

/* fgqa_fwd_sm80_bf16_d128_dv128_plain: the symbol of a row, and the stem of every name that belongs to it. */
#define FGQA_ROW_CAT_(pass, arch, dtype, d, dv, variant) fgqa_##pass##_sm##arch##_##dtype##_d##d##_dv##dv##_##variant
#define FGQA_ROW_CAT(pass, arch, dtype, d, dv, variant) FGQA_ROW_CAT_(pass, arch, dtype, d, dv, variant)
#define FGQA_SUFFIX_(name, suffix) name##suffix
#define FGQA_SUFFIX(name, suffix) FGQA_SUFFIX_(name, suffix)

#endif
