/* problem_check.h - what the checks of problem*.c share: the form every tensor of a problem must have, and its wording.
 * Private to these files.
 */
#ifndef FGQA_PROBLEM_CHECK_H
#define FGQA_PROBLEM_CHECK_H
#include "problem.h"

/* A piece of a sentence, returned by value so that several fit into one fgqa_fail(). */
typedef struct { char s[192]; } fgqa_text;

fgqa_text fgqa_shape_text(const fgqa_tensor *tensor);    /* "(2, 16, 128, 64)" */
fgqa_text fgqa_device_text(fgqa_device device);          /* "cpu", "cuda:0" */

/* Extents below 2^31 (kernels count rows in 32 bits) and every element's byte offset within 63 bits. */
fgqa_status fgqa_check_extents(const fgqa_tensor *t, const char *name);

/* A contiguous vector; `length` -1: any. */
fgqa_status fgqa_check_vector(const fgqa_tensor *t, const char *name, fgqa_dtype dtype, int64_t length, const char *form, const char *fix);

/* 1 to the largest that kernels take; `letter`: "d" or "dv". */
fgqa_status fgqa_check_head_dim(const char *name, int64_t extent, const char *letter);

/* Whether two indices of an array of n axes may name the same element: each axis, from the smallest stride up, must step
 * over all that the smaller ones span. */
int fgqa_strides_overlap(int32_t n, const int64_t *shape, const int64_t *stride);

/* What a tensor must look like: for each letter of b h s d the caller's axis (-1: none), its extent and its name. */
typedef struct {
    fgqa_dtype dtype;
    int32_t ndim;
    int8_t axis[4];
    int64_t extent[4];
    const char *name[4];
} fgqa_form;

/* Axes of q, k, v and their like. */
fgqa_form fgqa_tensor_form(const fgqa_problem *p);

/* The form of any q-, k-, v-, out-, lse-like argument or of a result; 0 if this problem has no such tensor. */
int fgqa_problem_form(const fgqa_problem *p, fgqa_arg arg, fgqa_form *form);
fgqa_text fgqa_form_text(const fgqa_form *form);         /* "[b, hq, sq] = (2, 16, 128)" */

/* The tensor as a view; it has the form already. */
fgqa_view fgqa_form_view(const fgqa_form *form, const fgqa_tensor *tensor);

/* Dtype and shape of an argument against its form, and its view. */
fgqa_status fgqa_check_form(const fgqa_request *r, fgqa_problem *p, fgqa_arg arg);

/* mask, bias, alibi_slopes and sink, into views. */
fgqa_status fgqa_check_score_tensors(const fgqa_request *r, fgqa_problem *p);

/* Results that the caller brought: form, writability and overlap. */
fgqa_status fgqa_check_results(const fgqa_request *r, fgqa_problem *p);

/* problem_cache_contents.c: lengths, page table, slots written twice, positions, on the CPU. `pages` exist; a sequence has
 * `slots`; `paged`: the table is the caller's page_table, else his batch_index. */
fgqa_status fgqa_check_cache_contents(const fgqa_problem *p, int64_t pages, int64_t slots, int paged);

#endif
