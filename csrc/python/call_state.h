/* call_state.h - one attention call while it lasts; what call*.c share. */
#ifndef FGQA_CALL_STATE_H
#define FGQA_CALL_STATE_H
#include "../core/cache.h"
#include "args.h"
#include "tensor_out.h"

enum { FGQA_SCRATCH = FGQA_ARG_COUNT + FGQA_CACHE_COUNT + 3 };      /* a copy of each argument, a check's result, rotated queries, a workspace */

typedef struct {
    fgqa_state *state;
    fgqa_request request;
    fgqa_extras extras;
    fgqa_place place;
    fgqa_problem problem;
    fgqa_plan plan;
    int plan_only;                         /* explain: nothing is copied or computed */
    int staged;                            /* NumPy arrays that are computed on a GPU */
    int repeats;                           /* problem and plan are those of an earlier call */
    PyObject *const *options;              /* of a call that may be repeated, else NULL */
    uint32_t imported;                     /* bit per fgqa_arg: in[] holds something */
    uint32_t allocated;                    /* bit per fgqa_arg: result[] holds something */
    fgqa_import in[FGQA_ARG_COUNT];
    fgqa_result result[FGQA_ARG_COUNT];
    void *workspace;                       /* on the device of the call */
    void *block;                           /* owns it on the CPU */
    fgqa_result scratch[FGQA_SCRATCH];     /* device memory from q's library; .object and .managed NULL: tensor.data is our own */
    int32_t n_scratch;
    fgqa_tensor host[FGQA_ARG_COUNT];      /* staged: the caller's arrays */
    const int64_t *host_rows;              /* rows of a call on a GPU that came from the host; NULL: none did */
} fgqa_call;

_Static_assert(FGQA_ARG_COUNT <= 32, "one bit for each argument");

/* ---- call.c ---- */

/* `stream`: the option of that name. Whatever follows, the call is ended. */
void fgqa_call_begin(fgqa_call *call, PyObject *module, fgqa_pass pass, PyObject *stream);
void fgqa_call_end(fgqa_call *call);

/* Arguments into the request: one; those among the options, whose other values are read as well. */
int fgqa_call_import(fgqa_call *call, fgqa_arg arg, PyObject *object);
int fgqa_call_import_options(fgqa_call *call, PyObject *const *options);

/* fgqa_import_own() of all of them, where q is on the CPU. */
int fgqa_call_own(fgqa_call *call, const fgqa_tensor *const *written, int n);

/* How many arguments a function of the module was given. */
int fgqa_call_check_count(const char *name, Py_ssize_t n, Py_ssize_t wanted);

/* device= and stream= against where q is. */
int fgqa_call_check_place(fgqa_call *call);

/* The plan of the problem; memory of its workspace and of every result that the caller did not bring. */
int fgqa_call_make_plan(fgqa_call *call);
int fgqa_call_allocate(fgqa_call *call);

/* The plan as a dict. */
PyObject *fgqa_call_plan_data(const fgqa_call *call);

/* The object of a result, `given` if the caller brought it, None if this pass has none. New reference. */
PyObject *fgqa_call_take(fgqa_call *call, fgqa_arg arg, PyObject *given);

/* out or (out, lse) of a forward pass, `given` being the caller's out. New reference. */
PyObject *fgqa_call_take_forward(fgqa_call *call, PyObject *given);

/* ---- call_repeat.c ---- */

/* Once the arrays are imported and before the options are read: whether an earlier call had all of this but the addresses and
 * contents of its arrays. Then problem and plan are made. */
int fgqa_call_repeats(fgqa_call *call, PyObject *const *options);

/* For the above, once they are made without it. */
void fgqa_call_keep(const fgqa_call *call);

/* ---- call_cuda.c ---- */

/* Tensors on a GPU that kernels cannot read in place are replaced by copies (plan_only: by their description). */
int fgqa_call_gather(fgqa_call *call);

/* One tensor, if need be: FGQA_IN_* flags say what a kernel can read. 1 if it was copied, -1 if that failed. */
int fgqa_call_gather_tensor(fgqa_call *call, fgqa_tensor *tensor, unsigned flags);

/* device="cuda" with NumPy arrays: the request is turned into one of arrays on that device that do not exist yet. */
int fgqa_call_place_arrays(fgqa_call *call);

/* Their memory, not yet filled. The problem has to be made anew. */
int fgqa_call_stage(fgqa_call *call);

/* The arrays there, the computation, the results back into host memory. */
int fgqa_call_run_staged(fgqa_call *call);

/* check=True: the contents of index arrays, by the checks that arrays on the CPU go through. */
int fgqa_call_check_contents(fgqa_call *call);

/* What they begin with: refused while the stream records a graph. */
int fgqa_call_check_begin(const fgqa_call *call);

/* Contiguous device memory into a new block, complete on return. */
int fgqa_call_fetch(const fgqa_call *call, const fgqa_tensor *tensor, void **block);

/* Device memory until the call ends, in the order of its stream. */
int fgqa_call_scratch(fgqa_call *call, size_t bytes, void **memory);

void fgqa_call_drop_scratch(fgqa_call *call);

#endif
