/* place.h - where a call runs: the device of its tensors and the stream of their library.
 *
 * A call starts on the CPU; its first tensor on a GPU decides the device, makes it current until the call ends, and settles
 * the stream: that of stream=, else the current one of the tensor's library, else the legacy default stream.
 */
#ifndef FGQA_PLACE_H
#define FGQA_PLACE_H
#include "pymodule.h"

typedef struct {
    PyObject *given;         /* stream=, borrowed; NULL: none */
    fgqa_device device;      /* of the first tensor on a GPU; FGQA_CPU: there is none yet */
    const char *first;       /* that tensor's name */
    void *stream;            /* cudaStream_t */
    int32_t before;          /* current device outside of the call */
    const DLTensor *plain;   /* of the torch tensor that is imported now, if fgqa_torch_is_plain() says so; or NULL */
    PyObject *context;       /* the library's own context of a given stream, so that it allocates for that stream; or NULL */
} fgqa_place;

void fgqa_place_begin(fgqa_place *place, PyObject *given);   /* given: None for no stream */
void fgqa_place_end(fgqa_place *place);                      /* keeps a pending exception */

/* An argument of this type lives on a GPU; a second device is a ValueError. place NULL: the function knows no GPU. */
int fgqa_place_enter(fgqa_place *place, const char *name, const fgqa_type *type, int32_t device);

#endif
