/* memory.c - reference-counted aligned blocks: a 64-byte header in front of the data.
 *
 * The last workspace of at most KEPT_MOST bytes stays for the next call: of new memory the system clears every page at its first
 * touch, which took a tenth of a backward pass.
 */
#include "memory.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "../core/workspace.h"

#define KEPT_MOST ((size_t)64 << 20)

typedef struct {
    atomic_size_t references;
    size_t bytes;
    void *memory;                /* what malloc gave: less aligned, but in half the time of aligned_alloc */
} fgqa_header;

_Static_assert(sizeof(fgqa_header) <= FGQA_ALIGNMENT, "the header fits in front of the data");

static _Atomic(void *) kept;

static fgqa_header *header_of(void *block) { return (fgqa_header *)((char *)block - FGQA_ALIGNMENT); }

/* First touch of a large block costs a fault for each of its pages unless the kernel may use huge ones. */
static void ask_huge_pages(void *memory, size_t bytes)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), worth = (size_t)4 << 20;     /* 64 KiB with some kernels for aarch64 */
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
    const size_t whole = bytes + 2 * FGQA_ALIGNMENT;
    char *memory = malloc(whole);
    if (memory == NULL) { return NULL; }
    ask_huge_pages(memory, whole);
    char *block = memory + 2 * FGQA_ALIGNMENT - (uintptr_t)memory % FGQA_ALIGNMENT;
    header_of(block)->memory = memory;
    header_of(block)->bytes = bytes;
    atomic_init(&header_of(block)->references, 1);
    return block;
}

void fgqa_block_share(void *block) { atomic_fetch_add_explicit(&header_of(block)->references, 1, memory_order_relaxed); }

void fgqa_block_drop(void *block)
{
    if (block != NULL && atomic_fetch_sub_explicit(&header_of(block)->references, 1, memory_order_acq_rel) == 1) {
        free(header_of(block)->memory);
    }
}

void *fgqa_workspace_take(size_t bytes)
{
    void *const block = atomic_exchange(&kept, NULL);
    if (block != NULL && header_of(block)->bytes >= bytes) { return block; }
    fgqa_block_drop(block);
    return fgqa_block_new(bytes);
}

void fgqa_workspace_return(void *block)
{
    fgqa_block_drop(block != NULL && header_of(block)->bytes <= KEPT_MOST ? atomic_exchange(&kept, block) : block);
}
