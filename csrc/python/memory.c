/* memory.c - reference-counted aligned blocks: a 64-byte header in front of the data. */
#include "memory.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../core/workspace.h"

typedef struct { atomic_size_t references; } fgqa_header;

static fgqa_header *header_of(void *block) { return (fgqa_header *)((char *)block - FGQA_ALIGNMENT); }

/* First touch of a large block costs a page fault every 4 KiB unless the kernel may use huge pages. */
static void ask_huge_pages(void *memory, size_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t page = 4096, worth = (size_t)4 << 20;
    if (bytes >= worth) {
        const uintptr_t begin = ((uintptr_t)memory + page - 1) / page * page;
        madvise((void *)begin, ((uintptr_t)memory + bytes - begin) / page * page, MADV_HUGEPAGE);
    }
#else
    (void)memory;
    (void)bytes;
#endif
}

void *fgqa_block_new(size_t bytes)
{
    if (bytes > SIZE_MAX / 2) { return NULL; }
    const size_t whole = (bytes + 2 * FGQA_ALIGNMENT - 1) / FGQA_ALIGNMENT * FGQA_ALIGNMENT;
    char *memory = aligned_alloc(FGQA_ALIGNMENT, whole);
    if (memory == NULL) { return NULL; }
    ask_huge_pages(memory, whole);
    atomic_init(&((fgqa_header *)memory)->references, 1);
    return memory + FGQA_ALIGNMENT;
}

void fgqa_block_share(void *block) { atomic_fetch_add_explicit(&header_of(block)->references, 1, memory_order_relaxed); }

void fgqa_block_drop(void *block)
{
    if (block != NULL && atomic_fetch_sub_explicit(&header_of(block)->references, 1, memory_order_acq_rel) == 1) {
        free(header_of(block));
    }
}
