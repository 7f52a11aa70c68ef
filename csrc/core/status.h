/* status.h - how the C core reports failure: a code, and one sentence kept per thread.
 *
 * Every function that can fail returns fgqa_status and says why with fgqa_fail(); the core
 * never prints and never exits. python/errors.c is the only place that turns a status into
 * a Python exception.
 */
#ifndef FGQA_STATUS_H
#define FGQA_STATUS_H

typedef enum {
    FGQA_OK = 0,
    FGQA_ERROR_TYPE,             /* TypeError: wrong kind of object or dtype */
    FGQA_ERROR_VALUE,            /* ValueError: shape, range, contents */
    FGQA_ERROR_BUFFER,           /* BufferError: a DLPack exporter or capsule misbehaves */
    FGQA_ERROR_NOT_IMPLEMENTED,  /* NotImplementedError: valid, but no kernel serves it */
    FGQA_ERROR_MEMORY,           /* MemoryError */
    FGQA_ERROR_RUNTIME,          /* RuntimeError: CUDA call and code, pool failures */
    FGQA_ERROR_INTERRUPTED       /* the interrupt callback asked to stop; Python's exception is already set */
} fgqa_status;

#if defined(__GNUC__)
#define FGQA_PRINTF(at, first) __attribute__((format(printf, at, first)))
#else
#define FGQA_PRINTF(at, first)
#endif

/* Stores the sentence for this thread and returns `code`: `return fgqa_fail(FGQA_ERROR_VALUE, "...")`. */
fgqa_status fgqa_fail(fgqa_status code, const char *format, ...) FGQA_PRINTF(2, 3);

/* The last sentence stored by this thread; "" if none. */
const char *fgqa_message(void);

/* Leaves the enclosing function with the callee's status. */
#define FGQA_TRY(call)                            \
    do {                                          \
        const fgqa_status status_ = (call);       \
        if (status_ != FGQA_OK) { return status_; } \
    } while (0)

#endif
