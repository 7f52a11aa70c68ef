/* stream_slot.h - a number per CUDA stream, for words of device memory that launches on one stream hand on to each other. */
#ifndef FGQA_STREAM_SLOT_H
#define FGQA_STREAM_SLOT_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FGQA_STREAM_SLOTS = 256 };

/* The stream's own slot, for good; -1 where there is none: the stream records a graph, whose launches may run beside those of
 * any stream, or the process has had more streams than slots. */
int32_t fgqa_stream_slot(void *stream);

#ifdef __cplusplus
}
#endif
#endif
