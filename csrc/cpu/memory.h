/* memory.h - 64-byte aligned memory with an atomic reference count, so that its last owner may be any library on any
 * thread, with or without the GIL, even after the interpreter has ended.
 */
#ifndef FGQA_MEMORY_H
#define FGQA_MEMORY_H
#include <stddef.h>

/* Memory of at least `bytes` with one reference; NULL if there is none. 0 bytes give a valid pointer. */
void *fgqa_block_new(size_t bytes);
void fgqa_block_share(void *block);
void fgqa_block_drop(void *block);   /* NULL is allowed */

/* A block of at least so many bytes for one call, and its end; NULL is allowed there. */
void *fgqa_workspace_take(size_t bytes);
void fgqa_workspace_return(void *block);

#endif
