/* Products for a handful of rows, in floats. */
#if defined(__x86_64__)
#define FGQA_ISA portable
#else
#define FGQA_ISA neon
#endif
#define FGQA_REAL_F64 0
#include "few_products.h"

int main(void)
{
    check_few_products();
    return checks_passed("test_few");
}
