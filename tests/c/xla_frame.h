/* xla_frame.h - a call of XLA that tests put together, and the part of XLA's interface that makes, reads and drops errors. */
#ifndef FGQA_TESTS_XLA_FRAME_H
#define FGQA_TESTS_XLA_FRAME_H
#include "../../csrc/xla/handler.h"

#include <stdio.h>
#include <string.h>

/* ---- errors: there is one, which is what every failure becomes ---- */

struct xla_error { xla_code code; char message[512]; };

static struct xla_error failure;

static xla_error *error_create(xla_error_create *args)
{
    failure.code = args->code;
    snprintf(failure.message, sizeof failure.message, "%s", args->message);
    return &failure;
}

static const xla_api api = {.size = sizeof api, .error_create = error_create};

static int runs;        /* of a kernel, since begin() */

enum { MOST = 40 };

typedef struct {
    xla_call call;
    xla_buffer buffer[8];
    int64_t shape[8][8];
    xla_buffer *arguments[8], *results[8];
    xla_attribute_type types[MOST];
    xla_text text[MOST];
    const xla_text *names[MOST];
    void *values[MOST];
    xla_scalar scalars[MOST];
    int64_t integers[MOST];
    double numbers[MOST];
    xla_text texts[MOST];
} frame;

static int next_attribute(frame *f, const char *name, xla_attribute_type type)
{
    const int n = (int)f->call.attributes.count++;
    f->text[n] = (xla_text){name, strlen(name)};
    f->names[n] = &f->text[n];
    f->types[n] = type;
    return n;
}

static void add_integer(frame *f, const char *name, int64_t value)
{
    const int n = next_attribute(f, name, XLA_ATTRIBUTE_SCALAR);
    f->integers[n] = value;
    f->scalars[n] = (xla_scalar){XLA_S64, &f->integers[n]};
    f->values[n] = &f->scalars[n];
}

static void add_number(frame *f, const char *name, double value)
{
    const int n = next_attribute(f, name, XLA_ATTRIBUTE_SCALAR);
    f->numbers[n] = value;
    f->scalars[n] = (xla_scalar){XLA_F64, &f->numbers[n]};
    f->values[n] = &f->scalars[n];
}

static void add_text(frame *f, const char *name, const char *value)
{
    const int n = next_attribute(f, name, XLA_ATTRIBUTE_STRING);
    f->texts[n] = (xla_text){value, strlen(value)};
    f->values[n] = &f->texts[n];
}

static int64_t attribute_of(const char *name)
{
    if (strcmp(name, "window_left") == 0 || strcmp(name, "window_right") == 0) { return FGQA_UNBOUNDED; }
    return strncmp(name, "max_", 4) == 0 ? -1 : 0;
}

/* A forward call whose q has `rank` axes beside those of vmap. */
static void begin(frame *f, const char *names, int64_t rank, double dropout, double softcap)
{
    memset(f, 0, sizeof *f);
    f->call = (xla_call){.size = sizeof f->call, .api = &api, .stage = XLA_STAGE_EXECUTE};
    f->call.arguments.buffers = f->arguments;
    f->call.results.buffers = f->results;
    f->call.attributes = (xla_attributes){.types = f->types, .names = f->names, .values = f->values};
#define ADD_INTEGER(name) add_integer(f, #name, strcmp(#name, "has_softcap") == 0 ? softcap != 0 : attribute_of(#name));
    FGQA_XLA_INTEGERS(ADD_INTEGER)
#undef ADD_INTEGER
    add_number(f, "scale", 0);
    add_number(f, "softcap", softcap);
    add_number(f, "dropout_p", dropout);
    add_text(f, FGQA_XLA_ARGUMENTS, names);
    add_text(f, FGQA_XLA_KERNEL, "");
    add_integer(f, FGQA_XLA_RANK, rank);
    runs = 0;
}

static void add_buffer(frame *f, int is_result, xla_dtype dtype, void *data, int64_t rank, const int64_t *shape)
{
    const int64_t n = f->call.arguments.count + f->call.results.count;
    memcpy(f->shape[n], shape, (size_t)rank * sizeof *shape);
    f->buffer[n] = (xla_buffer){.size = sizeof f->buffer[n], .dtype = dtype, .data = data, .rank = rank, .shape = f->shape[n]};
    xla_buffers *list = is_result ? &f->call.results : &f->call.arguments;
    list->buffers[list->count++] = &f->buffer[n];
}

#define IN(frame, data, ...) add_buffer(frame, 0, XLA_F32, data, sizeof((int64_t[]){__VA_ARGS__}) / 8, (const int64_t[]){__VA_ARGS__})
#define OUT(frame, data, ...) add_buffer(frame, 1, XLA_F32, data, sizeof((int64_t[]){__VA_ARGS__}) / 8, (const int64_t[]){__VA_ARGS__})

#endif
