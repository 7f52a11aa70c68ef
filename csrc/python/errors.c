/* errors.c - the only place where a status becomes a Python exception. */
#include "pymodule.h"

int fgqa_raise(fgqa_status status)
{
    PyObject *type = NULL;
    switch (status) {
    case FGQA_OK:                    return 0;
    case FGQA_ERROR_INTERRUPTED:     return -1;   /* set by the signal handler */
    case FGQA_ERROR_TYPE:            type = PyExc_TypeError; break;
    case FGQA_ERROR_VALUE:           type = PyExc_ValueError; break;
    case FGQA_ERROR_BUFFER:          type = PyExc_BufferError; break;
    case FGQA_ERROR_NOT_IMPLEMENTED: type = PyExc_NotImplementedError; break;
    case FGQA_ERROR_MEMORY:          type = PyExc_MemoryError; break;
    case FGQA_ERROR_RUNTIME:         type = PyExc_RuntimeError; break;
    }
    PyErr_SetString(type, fgqa_message());
    return -1;
}
