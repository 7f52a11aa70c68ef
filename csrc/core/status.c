/* status.c - the sentence of the last failure, one per thread. */
#include "status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char message[8192];       /* names of all kernels, or the reasons against them */

fgqa_status fgqa_fail(fgqa_status code, const char *format, ...)
{
    /* Formatted aside first: an argument may be fgqa_message() itself. */
    char text[sizeof message];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    memcpy(message, text, strlen(text) + 1);
    return code;
}

const char *fgqa_message(void) { return message; }
