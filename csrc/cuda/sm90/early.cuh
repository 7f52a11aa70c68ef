/* early.cuh - launches that begin ahead of the end of the one before them (programmatic dependent launch): for kernels all of
 * whose blocks are resident. Every warp waits before it looks at memory; what it may do before is to ask for what it will need to
 * be brought to L2, where later writes are seen, too.
 */
#pragma once
#include "../common/ptx_tma.cuh"

#include <cuda_runtime_api.h>

/* Waits for the launches before this one; what they wrote is seen then. And lets the launch behind this one begin, if that
 * waits likewise. */
PTX_FN void launches_before_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
PTX_FN void launch_behind_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/* Launches that are recorded in a graph take what lets them begin early since 12.3. */
static inline bool may_begin_early(void)
{
    static int32_t version;
    if (version == 0 && cudaDriverGetVersion(&version) != cudaSuccess) { version = -1; }
    return version >= 12030;
}
