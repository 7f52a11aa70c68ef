/* cache_slot.cuh - where a slot of a cached sequence lies. A page that does not exist holds nothing: what is appended to it is
 * dropped, what is read from it is zeros (the decode rows of sm90/ get these from TMA, which reads zeros outside of a tensor).
 */
#pragma once
#include "../../core/cache_rules.h"
#include "../../core/problem.h"

struct slot_place { int64_t page; uint32_t slot; };      /* page -1: it does not exist */

/* `table`: of the sequence; slot: not negative. */
static __device__ __forceinline__ slot_place place_of_slot(const fgqa_cache &c, const int32_t *table, uint32_t slot)
{
    const uint32_t size = (uint32_t)c.page_size, column = slot / size;
    const int32_t page = table[column];
    const slot_place place = {fgqa_page_exists(page, c.pages) ? page : -1, slot - column * size};
    return place;
}
