/* xla_ffi.h - what this library uses of the binary interface between XLA and custom calls (XLA FFI, API 0.x), in its own words,
 * so that neither building nor running needs jaxlib. Structures begin with their size, by which either side sees how much of them
 * the other knows; fields are only ever added at their ends.
 */
#ifndef FGQA_XLA_FFI_H
#define FGQA_XLA_FFI_H
#include <stddef.h>
#include <stdint.h>

enum { XLA_API_MAJOR = 0, XLA_API_MINOR = 1 };

/* Codes of absl::Status. */
typedef enum {
    XLA_INVALID_ARGUMENT = 3, XLA_RESOURCE_EXHAUSTED = 8, XLA_UNIMPLEMENTED = 12, XLA_INTERNAL = 13
} xla_code;

/* Numbers of xla::PrimitiveType. */
typedef enum {
    XLA_PRED = 1, XLA_S32 = 4, XLA_S64 = 5, XLA_U32 = 8, XLA_F16 = 10, XLA_F32 = 11, XLA_F64 = 12, XLA_BF16 = 16, XLA_F8E4M3FN = 20
} xla_dtype;

typedef enum { XLA_STAGE_EXECUTE = 3 } xla_stage;
typedef enum { XLA_EXTENSION_METADATA = 1 } xla_extension_type;
typedef enum { XLA_ATTRIBUTE_SCALAR = 3, XLA_ATTRIBUTE_STRING = 4 } xla_attribute_type;

typedef struct xla_error xla_error;            /* NULL: success */
typedef struct xla_context xla_context;

typedef struct xla_extension {
    size_t size;
    xla_extension_type type;
    struct xla_extension *next;
} xla_extension;

#define XLA_HEADER size_t size; xla_extension *extensions

typedef struct { XLA_HEADER; int major, minor; } xla_version;

/* A handler that is called with this extension says which version it was written for, and computes nothing. */
typedef struct { size_t size; xla_version version; uint32_t traits; } xla_metadata;
typedef struct { xla_extension base; xla_metadata *metadata; } xla_metadata_extension;

/* A dense array, last axis fastest. */
typedef struct { XLA_HEADER; xla_dtype dtype; void *data; int64_t rank; int64_t *shape; } xla_buffer;

typedef struct { const char *text; size_t length; } xla_text;      /* not terminated */
typedef struct { xla_dtype dtype; void *value; } xla_scalar;

typedef struct { XLA_HEADER; int64_t count; const int *types; xla_buffer **buffers; } xla_buffers;
typedef struct { XLA_HEADER; int64_t count; const xla_attribute_type *types; const xla_text **names; void **values; } xla_attributes;

typedef struct { XLA_HEADER; const char *message; xla_code code; } xla_error_create;
typedef struct { XLA_HEADER; xla_error *error; const char *message; } xla_error_message;
typedef struct { XLA_HEADER; xla_error *error; } xla_error_destroy;
typedef struct { XLA_HEADER; xla_context *context; void *stream; } xla_stream_get;
typedef struct { XLA_HEADER; xla_context *context; size_t bytes, alignment; void *data; } xla_memory_allocate;
typedef struct { XLA_HEADER; xla_context *context; size_t bytes; void *data; } xla_memory_free;
typedef struct { XLA_HEADER; xla_context *context; int32_t ordinal; } xla_device_get;

/* XLA's functions, in its order; those that nobody calls here are `unused`. */
typedef void (*xla_unused)(void);
typedef struct {
    XLA_HEADER;
    xla_version version;
    const void *internal;
    xla_error *(*error_create)(xla_error_create *);
    void (*error_message)(xla_error_message *);
    void (*error_destroy)(xla_error_destroy *);
    xla_unused handler_register;
    xla_error *(*stream_get)(xla_stream_get *);
    xla_unused types_and_states[4];
    xla_error *(*memory_allocate)(xla_memory_allocate *);
    xla_error *(*memory_free)(xla_memory_free *);
    xla_unused threads_futures_run[6];
    xla_error *(*device_get)(xla_device_get *);
} xla_api;

typedef struct {
    XLA_HEADER;
    const xla_api *api;
    xla_context *context;
    xla_stage stage;
    xla_buffers arguments, results;
    xla_attributes attributes;
} xla_call;

#endif
