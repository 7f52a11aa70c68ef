/* tile_height.h - which height of tiles serves best: why a row for Hopper is passed over for one behind it, NULL if it is not. */
#ifndef FGQA_TILE_HEIGHT_H
#define FGQA_TILE_HEIGHT_H
#include "kernel_table.h"

/* Where tall tiles are emptier than plain ones by more than they are faster. Under a mask the heavy tiles come first, so that
 * many leave no gap at the end. What has to be the same in every batch must not depend on it. */
const char *fgqa_pass_over_tall(const fgqa_cuda_row *tall, const fgqa_cuda_row *plain, const fgqa_problem *problem);

/* Where taller tiles are nearly as full: they read keys less often. Measured with as many keys as query rows. With
 * batch_invariant the choice of padded sequences is the same in every batch; else tiles are counted. Tiles that hold all keys at
 * once are faster whatever the number of rows, but for wide heads with many keys. */
const char *fgqa_pass_over_short(const fgqa_cuda_row *own, const fgqa_cuda_row *tall, const fgqa_cuda_row *plain,
                                 const fgqa_problem *problem, char why[128]);

#endif
