/* dec_counters.h - counters with which the blocks of one decode launch wait for each other (sm90/dec_combine.cuh). */
#ifndef FGQA_DEC_COUNTERS_H
#define FGQA_DEC_COUNTERS_H
#include <stdint.h>

#ifdef __cplusplus
extern "C"
#endif
/* `count` words on the current device, number `device`, zero whenever a launch on the stream begins that leaves them zero; NULL
 * where there are none. A launch that is recorded in a graph has its own for good. */
uint32_t *fgqa_dec_counters(int32_t device, int32_t count, void *stream);

#endif
