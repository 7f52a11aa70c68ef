/* rows.h - what query rows attention_weights may be asked for. */
#ifndef FGQA_ROWS_H
#define FGQA_ROWS_H
#include "problem.h"

/* rows[n_rows], on the host: of a call on the CPU the problem's own, of one on a GPU those that were copied there. */
fgqa_status fgqa_check_rows(const fgqa_problem *problem, const int64_t *rows);

#endif
