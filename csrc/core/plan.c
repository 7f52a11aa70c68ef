/* plan.c - chooses the kernel of a problem, counts its work, and says both in words. */
#include "plan.h"

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* ---- work ---- */

typedef int32_t limit(const fgqa_mask *m, int32_t i);

static int32_t kv_begin(const fgqa_mask *m, int32_t i) { return fgqa_kv_begin(m, i); }
static int32_t kv_end(const fgqa_mask *m, int32_t i) { return fgqa_kv_end(m, i); }

/* Sum of a limit over rows [i0, i1), i0 < i1, whose diagonals lie in one chunk: there it moves by 0 or 1 a row, so equal ends
 * mean a constant, ends as far apart as the rows a ramp, and anything else has a kink somewhere in between. */
static int64_t sum_limit(limit *f, const fgqa_mask *m, int32_t i0, int32_t i1)
{
    const int64_t n = i1 - i0, first = f(m, i0), last = f(m, i1 - 1);
    if (last == first || last - first == n - 1) { return (first + last) * n / 2; }
    const int32_t middle = i0 + (int32_t)(n / 2);
    return sum_limit(f, m, i0, middle) + sum_limit(f, m, middle, i1);
}

/* O(log sq) a chunk instead of O(sq): plans of long sequences must not take longer than a kernel's launch. */
static double visible_of(const fgqa_mask *m)
{
    int64_t sum = 0;
    for (int32_t i0 = 0, i1; i0 < m->sq; i0 = i1) {
        i1 = m->sq;
        if (m->chunk > 0) {
            const int64_t diag = (int64_t)i0 + m->diag;
            const int64_t next = (fgqa_floor_div(diag, m->chunk) + 1) * m->chunk - m->diag;   /* first row of the next chunk */
            if (next < i1) { i1 = (int32_t)next; }
        }
        sum += sum_limit(kv_end, m, i0, i1) - sum_limit(kv_begin, m, i0, i1);
    }
    return (double)sum;
}

/* Scores of sequence n if its lengths can be read here, else of the padded shape. */
static fgqa_mask readable_mask(const fgqa_problem *p, int32_t n)
{
    if (p->device.type == FGQA_CPU) { return fgqa_problem_sequence(p, n).mask; }
    const fgqa_mask padded = {p->sq, p->sk, p->align == FGQA_ALIGN_BOTTOM_RIGHT ? p->sk - p->sq : 0, p->left, p->right, p->chunk};
    return padded;
}

double fgqa_problem_visible_scores(const fgqa_problem *p)
{
    const int own_lengths = p->device.type == FGQA_CPU && (p->varlen || p->q_lens || p->kv_lens || p->cache.page_size);
    double sum = 0, last = 0;
    fgqa_mask previous = {-1, -1, 0, 0, 0, 0};
    if (p->b > 0 && !own_lengths) {
        const fgqa_mask m = readable_mask(p, 0);
        return visible_of(&m) * p->b * p->hq;
    }
    for (int32_t n = 0; n < p->b; n++) {
        const fgqa_mask m = readable_mask(p, n);
        if (m.sq != previous.sq || m.sk != previous.sk) { last = visible_of(&m); }   /* equal lengths see equal masks */
        previous = m;
        sum += last;
    }
    return sum * p->hq;
}

/* Multiply-adds count as two. Forward: QK', PV. Backward: S, dQ, dK over d; dP, dV over dv. */
static double flops_of(const fgqa_problem *p)
{
    const double d = p->d, dv = p->dv;
    switch (p->pass) {
    case FGQA_PASS_FWD:    return 2 * (d + dv) * fgqa_problem_visible_scores(p);
    case FGQA_PASS_BWD:    return 2 * (3 * d + 2 * dv) * fgqa_problem_visible_scores(p);
    case FGQA_PASS_KEYSUM: return 2 * 2 * d * fgqa_problem_visible_scores(p);   /* once for the LSE, once for the sums */
    case FGQA_PASS_ROWS:   break;
    }
    double visible = 0;
    for (int32_t n = 0; n < p->b; n++) {
        const fgqa_mask m = readable_mask(p, n);
        for (int32_t r = 0; r < p->n_rows; r++) {
            const int on_host = p->device.type == FGQA_CPU;
            if (!on_host) {
                visible += m.sk;
            } else if (p->rows[r] < m.sq) {
                visible += fgqa_kv_end(&m, (int32_t)p->rows[r]) - fgqa_kv_begin(&m, (int32_t)p->rows[r]);
            }
        }
    }
    return 2 * d * visible * p->hq;
}

/* ---- choice ---- */

static const char *pass_name(fgqa_pass pass)
{
    switch (pass) {
    case FGQA_PASS_FWD:    return "forward";
    case FGQA_PASS_BWD:    return "backward";
    case FGQA_PASS_ROWS:   return "weights-by-row";
    case FGQA_PASS_KEYSUM: return "weights-by-key";
    }
    return "?";
}

static const char *device_name(fgqa_device_type type) { return type == FGQA_CPU ? "CPU" : "CUDA"; }

static void append(char *text, size_t size, const char *first, const char *second, const char *end)
{
    const char *const parts[] = {first, second, end};
    size_t used = strlen(text);
    for (int n = 0; n < 3; n++) {
        const size_t length = strlen(parts[n]), room = size - 1 - used;
        memcpy(text + used, parts[n], length < room ? length : room);
        used += length < room ? length : room;
    }
    text[used] = '\0';
}

static int serves(const fgqa_kernel *kernel, const fgqa_problem *p)
{
    return kernel->pass == p->pass && kernel->device == p->device.type;
}

static fgqa_status fail_unknown(const fgqa_problem *p, const fgqa_kernel *kernels, int32_t n, const char *forced)
{
    char names[6144] = "";
    for (int32_t k = 0; k < n; k++) {
        if (serves(&kernels[k], p)) { append(names, sizeof names, names[0] ? ", " : "", kernels[k].name, ""); }
    }
    return fgqa_fail(FGQA_ERROR_VALUE, "kernel is \"%s\": no %s kernel for %s has that name; %s%s%s", forced, pass_name(p->pass),
                     device_name(p->device.type), names[0] ? "choose one of " : "this build has none", names,
                     names[0] ? ", or None" : "");
}

const char *fgqa_reason(char why[128], const char *format, ...)
{
    va_list list;
    if (why == NULL) { return "?"; }
    va_start(list, format);
    vsnprintf(why, 128, format, list);
    va_end(list);
    return why;
}

/* Why the kernel is not the one to take; NULL if it is. */
static const char *reason_against(const fgqa_kernel *kernel, const fgqa_problem *p, const char *forced, char why[128])
{
    const char *reason = kernel->refuse(kernel, p, why);
    return reason == NULL && forced == NULL && kernel->pass_over ? kernel->pass_over(kernel, p, why) : reason;
}

static int is_candidate(const fgqa_kernel *kernel, const fgqa_problem *p, const char *forced)
{
    return serves(kernel, p) && (forced == NULL || strcmp(forced, kernel->name) == 0);
}

/* "name: reason\n" for each kernel ahead of `taken`. once: of kernels with one reason the first alone, as an error says it. */
static void list_reasons(const fgqa_problem *p, const fgqa_kernel *kernels, int32_t n, const char *forced, const fgqa_kernel *taken,
                         int once, char *text, size_t size)
{
    text[0] = '\0';
    for (int32_t k = 0; k < n && &kernels[k] != taken; k++) {
        char why[128], said[256] = "";
        if (!is_candidate(&kernels[k], p, forced)) { continue; }
        append(said, sizeof said, ": ", reason_against(&kernels[k], p, forced, why), "\n");
        if (!once || strstr(text, said) == NULL) { append(text, size, kernels[k].name, said, ""); }
    }
}

void fgqa_plan_reasons(const fgqa_problem *p, const fgqa_kernel *kernels, int32_t n, const char *forced, fgqa_plan *plan)
{
    list_reasons(p, kernels, n, forced, plan->kernel, 0, plan->refused, sizeof plan->refused);
}

fgqa_status fgqa_plan_make(const fgqa_problem *p, const fgqa_kernel *kernels, int32_t n, const char *forced, fgqa_plan *plan)
{
    char reasons[6144];
    int named = 0;
    memset(plan, 0, offsetof(fgqa_plan, refused));
    plan->refused[0] = '\0';
    for (int32_t k = 0; k < n; k++) {
        if (!is_candidate(&kernels[k], p, forced)) { continue; }
        named = 1;
        if (reason_against(&kernels[k], p, forced, NULL) == NULL) {
            plan->kernel = &kernels[k];
            plan->splits = 1;
            plan->threads = 1;
            plan->flops = flops_of(p);
            kernels[k].tile(&kernels[k], p, plan);
            return FGQA_OK;
        }
    }
    if (forced && !named) { return fail_unknown(p, kernels, n, forced); }
    if (!named) {
        return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "this build has no %s kernel for %s%s", pass_name(p->pass),
                         device_name(p->device.type), p->device.type == FGQA_CPU ? "" : "; move the tensors to the CPU");
    }
    list_reasons(p, kernels, n, forced, NULL, 1, reasons, sizeof reasons);
    return fgqa_fail(FGQA_ERROR_NOT_IMPLEMENTED, "no %s kernel for %s serves this call:\n%s%s", pass_name(p->pass),
                     device_name(p->device.type), reasons,
                     forced ? "leave kernel out to let the plan choose" : "change what the reasons name");
}

/* ---- words ---- */

typedef struct { char *text; size_t size, used; } writer;

static void put(writer *w, const char *format, ...) FGQA_PRINTF(2, 3);

static void put(writer *w, const char *format, ...)
{
    const size_t at = w->used < w->size ? w->used : w->size;
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(w->size > at ? w->text + at : NULL, w->size - at, format, arguments);
    va_end(arguments);
    w->used += n > 0 ? (size_t)n : 0;
}

static void put_bytes(writer *w, size_t bytes)
{
    const double b = (double)bytes;
    if (bytes < 1024) {
        put(w, "%zu B", bytes);
    } else if (bytes < (size_t)1 << 20) {
        put(w, "%.1f KiB", b / 1024);
    } else if (bytes < (size_t)1 << 30) {
        put(w, "%.1f MiB", b / (1 << 20));
    } else {
        put(w, "%.2f GiB", b / (1 << 30));
    }
}

static void put_bound(writer *w, int32_t bound)
{
    if (bound == FGQA_UNBOUNDED) { put(w, "None"); } else { put(w, "%d", (int)bound); }
}

static void put_options(writer *w, const fgqa_problem *p)
{
    put(w, "options   scale %.6g", p->scale);
    if (p->left != FGQA_UNBOUNDED || p->right != FGQA_UNBOUNDED) {
        put(w, ", window (");
        put_bound(w, p->left);
        put(w, ", ");
        put_bound(w, p->right);
        put(w, ")%s", p->left == FGQA_UNBOUNDED && p->right == 0 ? " = causal" : "");
    }
    if (p->chunk > 0) { put(w, ", chunk %d", (int)p->chunk); }
    if (p->align == FGQA_ALIGN_TOP_LEFT) { put(w, ", align top-left"); }
    if (p->softcap > 0) { put(w, ", softcap %g", p->softcap); }
    for (int arg = FGQA_ARG_mask; arg <= FGQA_ARG_sink; arg++) {
        if (p->view[arg].data) { put(w, ", %s", fgqa_arg_name((fgqa_arg)arg)); }
    }
    if (p->q_lens) { put(w, ", q_lens"); }
    if (p->kv_lens) { put(w, ", kv_lens"); }
    if (p->dropout_threshold) { put(w, ", dropout %u/65536", (unsigned)p->dropout_threshold); }
    if (p->precision == FGQA_PRECISION_BF16X3) { put(w, ", precision bf16x3"); }
    if (!p->deterministic) { put(w, ", deterministic False"); }
    if (p->batch_invariant) { put(w, ", batch_invariant"); }
    put(w, "\n");
}

int fgqa_plan_print(const fgqa_plan *plan, const fgqa_problem *p, char *text, size_t size)
{
    writer w = {text, size, 0};
    if (size > 0) { text[0] = '\0'; }
    put(&w, "problem   %s, %s, b %d, hq %d, hk %d (%d query head%s a KV head), sq %d, sk %d, d %d", pass_name(p->pass),
        fgqa_dtype_name(p->dtype), (int)p->b, (int)p->hq, (int)p->hk, (int)p->g, p->g == 1 ? "" : "s", (int)p->sq, (int)p->sk, (int)p->d);
    if (p->dv > 0) { put(&w, ", dv %d", (int)p->dv); }
    if (p->cache.page_size) { put(&w, ", KV cache of %s, pages of %d, %d new", fgqa_dtype_name(p->view[FGQA_ARG_k].dtype), (int)p->cache.page_size, (int)p->cache.new_max); }
    if (p->varlen) { put(&w, ", packed: %lld rows of q, %lld of k", (long long)p->total_q, (long long)p->total_k); }
    if (p->pass == FGQA_PASS_ROWS) { put(&w, ", %d rows", (int)p->n_rows); }
    put(&w, "\n");
    put_options(&w, p);
    put(&w, "kernel    %s on %s\n", plan->kernel ? plan->kernel->name : "none", device_name(p->device.type));
    put(&w, "tiles     %d query rows x %d keys, %d split%s, %lld task%s, at most %d thread%s\n", (int)plan->block_q, (int)plan->block_k,
        (int)plan->splits, plan->splits == 1 ? "" : "s", (long long)plan->tasks, plan->tasks == 1 ? "" : "s", (int)plan->threads,
        plan->threads == 1 ? "" : "s");
    put(&w, "memory    ");
    put_bytes(&w, plan->scratch_bytes);
    put(&w, " scratch a thread, ");
    put_bytes(&w, plan->workspace_bytes);
    put(&w, " workspace\n");
    put(&w, "work      %.6g GFLOP of visible scores\n", plan->flops * 1e-9);
    for (const char *line = plan->refused; *line;) {
        const size_t length = strcspn(line, "\n");
        put(&w, "passed    %.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
    }
    return (int)w.used;
}
