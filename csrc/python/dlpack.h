/* dlpack.h - the DLPack 1.3 structures that flashgqa reads and writes.
 *
 * Layouts, values and names are those of DLPack (https://github.com/dmlc/dlpack, Copyright (c) 2017 by its contributors,
 * Apache License 2.0); the text of this header is our own. Only a change of the major version may alter a layout.
 */
#ifndef FGQA_DLPACK_H
#define FGQA_DLPACK_H
#include <stdint.h>

#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 3

#define DLPACK_FLAG_BITMASK_READ_ONLY 1u
#define DLPACK_FLAG_BITMASK_IS_COPIED 2u

typedef struct { uint32_t major, minor; } DLPackVersion;

typedef enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLCUDAManaged = 13 } DLDeviceType;
typedef struct { DLDeviceType device_type; int32_t device_id; } DLDevice;

typedef enum {
    kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLOpaqueHandle = 3, kDLBfloat = 4, kDLComplex = 5, kDLBool = 6,
    kDLFloat8_e4m3fn = 10
} DLDataTypeCode;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides;        /* in elements; NULL: contiguous (producers before 1.2, or ndim 0) */
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);             /* may be NULL */
} DLManagedTensor;

/* Of a foreign major version only `deleter` may be touched. */
typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);    /* may be NULL */
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

/* type(x).__dlpack_c_exchange_api__ is a capsule "dlpack_exchange_api" that points to one of these. All functions return
 * 0, or -1 with a Python exception set (the allocator: after calling set_error). */
typedef struct DLPackExchangeAPIHeader {
    DLPackVersion version;
    struct DLPackExchangeAPIHeader *prev_api;
} DLPackExchangeAPIHeader;

typedef struct {
    DLPackExchangeAPIHeader header;
    int (*managed_tensor_allocator)(DLTensor *prototype, DLManagedTensorVersioned **out, void *error_context,
                                    void (*set_error)(void *error_context, const char *kind, const char *message));
    int (*managed_tensor_from_py_object_no_sync)(void *object, DLManagedTensorVersioned **out);
    int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned *tensor, void **object);   /* steals on success */
    int (*dltensor_from_py_object_no_sync)(void *object, DLTensor *out);                           /* may be NULL */
    int (*current_work_stream)(DLDeviceType type, int32_t id, void **stream);
} DLPackExchangeAPI;

#endif
