/* A device that is host memory, behind the interface of CANN's runtime.
 *
 * build.py appends a function that returns 0 for every other symbol that torch_npu links or looks up, and for each
 * aclnn kernel one that notes its arguments. So torch_npu's own host code runs: it binds, checks, allocates results
 * and chooses kernels. The kernels compute nothing; what they would have computed is filled in by load.py.
 *
 * Set from outside: SAGELLM_FAKE_DEVICES (1), SAGELLM_FAKE_SOC (Ascend910B3).
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef int Error;

/* Handles of streams, events and graphs are distinct addresses that nobody reads. */
static char handles[1];
static void *new_handle(void) {
    static long count = 4096;
    return (void *)(__sync_fetch_and_add(&count, 1) * 16);
}

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value ? value : otherwise;
}

/* What was called, one line each, until it is taken. */
typedef struct { char *text; size_t used, size; } Lines;
static Lines trace, order;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void append(Lines *lines, const char *text) {
    size_t length = strlen(text);
    if (lines->used + length + 1 > lines->size) {
        lines->size = 2 * (lines->used + length + 1) + 4096;
        lines->text = realloc(lines->text, lines->size);
    }
    memcpy(lines->text + lines->used, text, length + 1);
    lines->used += length;
}

static void clear(Lines *lines) {
    pthread_mutex_lock(&lock);
    lines->used = 0;
    if (lines->text) lines->text[0] = 0;
    pthread_mutex_unlock(&lock);
}

static void write_trace(const char *text) { append(&trace, text); }
static void note(const char *name) {
    pthread_mutex_lock(&lock);
    write_trace(name);
    write_trace("\n");
    pthread_mutex_unlock(&lock);
}
const char *sagellm_trace(void) { return trace.text ? trace.text : ""; }
void sagellm_trace_clear(void) { clear(&trace); }

/* What orders work on streams, and copies and collectives, each with its thread; order.py reads it. From the first time
 * that it is taken. */
static int ordering;
static void note_order(const char *form, ...) {
    char line[200];
    va_list values;
    if (!ordering) return;
    va_start(values, form);
    int at = snprintf(line, sizeof line, "%ld ", syscall(SYS_gettid));
    at += vsnprintf(line + at, sizeof line - at - 2, form, values);
    va_end(values);
    strcpy(line + at, "\n");
    pthread_mutex_lock(&lock);
    append(&order, line);
    pthread_mutex_unlock(&lock);
}
const char *sagellm_order(void) {
    ordering = 1;
    return order.text ? order.text : "";
}
void sagellm_order_clear(void) { clear(&order); }

/* Device */
Error aclInit(const char *config) { return 0; }
Error aclFinalize(void) { return 0; }
const char *aclrtGetSocName(void) { return setting("SAGELLM_FAKE_SOC", "Ascend910B3"); }
const char *aclGetRecentErrMsg(void) { return ""; }
Error aclrtGetDeviceCount(uint32_t *count) { *count = atoi(setting("SAGELLM_FAKE_DEVICES", "1")); return 0; }
static int current_device;
Error aclrtGetDevice(int32_t *device) { *device = current_device; return 0; }
Error aclrtSetDevice(int32_t device) { current_device = device; return 0; }
Error aclrtGetCurrentContext(void **context) { *context = handles; return 0; }
Error aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    if (active) *active = 1;
    return 0;
}
Error aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logical) { *logical = user; return 0; }
/* Attributes of aclrtGetDeviceInfo: 301 memory, 302 second-level cache, 101 and 102 cube cores, 201 vector cores. */
Error aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) {
    *value = what == 301 ? 64ll << 30 : what == 302 ? 192ll << 20 : what == 101 || what == 102 ? 20 : what == 201 ? 40 : 0;
    return 0;
}
Error aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { *value = 20; return 0; }
Error aclrtGetMemInfo(int what, size_t *free_, size_t *total) { *free_ = 60ull << 30; *total = 64ull << 30; return 0; }
Error aclrtGetStreamResLimit(void *stream, int what, uint32_t *value) { *value = 20; return 0; }
Error aclrtGetDeviceResLimit(int device, int what, uint32_t *value) { *value = 20; return 0; }
Error aclrtGetResInCurrentThread(int what, uint32_t *value) { *value = 20; return 0; }
Error aclrtGetStreamOverflowSwitch(void *stream, uint32_t *flag) { *flag = 0; return 0; }
Error aclsysGetCANNVersion(int name, void *version) { memset(version, 0, 100); strcpy(version, "9.1.0"); return 0; }
Error aclsysGetVersionStr(char *name, char *version) { strcpy(version, "9.1.0"); return 0; }
size_t aclGetCompileoptSize(int option) { return 256; }
Error aclGetCompileopt(int option, char *value, size_t size) { if (size) value[0] = 0; return 0; }

/* Memory. 107002 is the runtime's code of a bad argument. */
static Error allocate(void **address, size_t size) {
    *address = 0;
    return posix_memalign(address, 512, size ? size : 1) ? 107002 : 0;
}
Error aclrtMalloc(void **p, size_t n, int kind) { return allocate(p, n); }
Error aclrtMallocAlign32(void **p, size_t n, int kind) { return allocate(p, n); }
Error aclrtMallocHost(void **p, size_t n) { return allocate(p, n); }
Error aclrtMallocHostWithCfg(void **p, uint64_t n, void *config) { return allocate(p, n); }
Error aclrtReserveMemAddress(void **p, size_t n, size_t align, void *at, uint64_t flags) { return allocate(p, 1); }
Error aclrtMallocPhysical(void **handle, size_t n, const void *how, uint64_t flags) { *handle = new_handle(); return 0; }
Error aclrtFree(void *p) { free(p); return 0; }
Error aclrtFreeHost(void *p) { free(p); return 0; }
static Error copy(void *to, const void *from, size_t n, void *stream) {
    note_order("copy %ld %ld %ld %ld", (long)stream, (long)from, (long)to, (long)n);
    memmove(to, from, n);
    return 0;
}
Error aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { return copy(to, from, n, 0); }
Error aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    return copy(to, from, n, stream);
}
Error aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    return copy(to, from, n, stream);
}
Error aclrtMemset(void *to, size_t room, int value, size_t n) { memset(to, value, n); return 0; }
Error aclrtMemsetAsync(void *to, size_t room, int value, size_t n, void *stream) { memset(to, value, n); return 0; }
Error aclrtPointerGetAttributes(const void *p, void *attributes) {
    memset(attributes, 0, 32);
    ((int *)attributes)[1] = 1;
    return 0;
}

/* Streams and events: everything is done when it is asked for; what order it would have is noted. */
Error aclrtCreateStream(void **stream) { *stream = new_handle(); return 0; }
Error aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { *stream = new_handle(); return 0; }
Error aclrtStreamQuery(void *stream, int *status) {
    note_order("stream %ld", (long)stream);
    *status = 0;
    return 0;
}
Error aclrtStreamGetId(void *stream, int32_t *id) { *id = (int)((long)stream / 16); return 0; }
Error aclrtSynchronizeDevice(void) { note_order("device"); return 0; }
Error aclrtSynchronizeDeviceWithTimeout(int32_t ms) { note_order("device"); return 0; }
Error aclrtSynchronizeStream(void *stream) { note_order("stream %ld", (long)stream); return 0; }
Error aclrtSynchronizeStreamWithTimeout(void *stream, int32_t ms) {
    note_order("stream %ld", (long)stream);
    return 0;
}
Error aclrtCreateEventExWithFlag(void **event, uint32_t flags) { *event = new_handle(); return 0; }
Error aclrtCreateEventWithFlag(void **event, uint32_t flags) { *event = new_handle(); return 0; }
Error aclrtRecordEvent(void *event, void *stream) {
    note_order("record %ld %ld", (long)stream, (long)event);
    return 0;
}
Error aclrtStreamWaitEvent(void *stream, void *event) {
    note_order("wait %ld %ld", (long)stream, (long)event);
    return 0;
}
Error aclrtSynchronizeEvent(void *event) { note_order("event %ld", (long)event); return 0; }
Error aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return 0; }
Error aclrtEventGetTimestamp(void *event, uint64_t *time) { *time = 0; return 0; }
static Error query(void *event, int *status, int done) {
    note_order("event %ld", (long)event);
    *status = done;
    return 0;
}
Error aclrtQueryEventStatus(void *event, int *status) { return query(event, status, 1); }
Error aclQueryEventRecordedStatus(void *event, int *status) { return query(event, status, 1); }
Error aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return 0; }
Error aclQueryEventWaitStatus(void *event, int *status) { *status = 0; return 0; }

/* Captured graphs */
static int capturing;
static void *captured;
int sagellm_capturing(void) { return capturing; }
static int updating;
int sagellm_updating(void) { return updating; }
Error aclmdlRICaptureGetInfo(void *stream, int *status, void **graph) {
    if (status) *status = capturing;
    if (graph) *graph = captured;
    return 0;
}
Error aclmdlRICaptureBegin(void *stream, int mode) {
    capturing = 1;
    captured = new_handle();
    note("aclmdlRICaptureBegin");
    return 0;
}
Error aclmdlRICaptureEnd(void *stream, void **graph) {
    capturing = 0;
    *graph = captured ? captured : new_handle();
    note("aclmdlRICaptureEnd");
    return 0;
}
Error aclmdlRIExecuteAsync(void *graph, void *stream) { note("aclmdlRIExecuteAsync"); return 0; }
Error aclmdlRIDestroy(void *graph) { return 0; }
Error aclmdlRICaptureThreadExchangeMode(int *mode) { return 0; }
Error aclmdlRICaptureTaskGrpBegin(void *stream) { note("aclmdlRICaptureTaskGrpBegin"); return 0; }
Error aclmdlRICaptureTaskGrpEnd(void *stream, void **handle) {
    *handle = new_handle();
    note("aclmdlRICaptureTaskGrpEnd");
    return 0;
}
Error aclmdlRICaptureTaskUpdateBegin(void *stream, void *handle) {
    updating = 1;
    note("aclmdlRICaptureTaskUpdateBegin");
    return 0;
}
Error aclmdlRICaptureTaskUpdateEnd(void *stream) {
    updating = 0;
    note("aclmdlRICaptureTaskUpdateEnd");
    return 0;
}

/* Arguments of kernels: what aclCreate* gives out is remembered, so that a kernel tells which of its words are such. */
enum { TENSOR = 1, LIST, INTEGERS, SCALAR };
typedef struct { int kind, dims, dtype, format; int64_t sizes[10]; uint64_t count; void **items; int64_t *values; } Argument;

#define KNOWN 65536
static void *known[KNOWN];
#define GONE ((void *)1)
static uint64_t slot_of(void *p) { return ((uint64_t)p >> 4) % KNOWN; }

static Argument *remember(int kind) {
    Argument *a = calloc(1, sizeof *a);
    a->kind = kind;
    pthread_mutex_lock(&lock);
    uint64_t i = slot_of(a);
    while (known[i] && known[i] != GONE) i = (i + 1) % KNOWN;
    known[i] = a;
    pthread_mutex_unlock(&lock);
    return a;
}

static int64_t find(void *p) {
    if ((uint64_t)p < 4096 || (uint64_t)p & 15) return -1;
    uint64_t i = slot_of(p);
    for (int tried = 0; known[i] && tried < KNOWN; tried++, i = (i + 1) % KNOWN)
        if (known[i] == p) return i;
    return -1;
}

static void forget(void *p) {
    pthread_mutex_lock(&lock);
    int64_t i = find(p);
    if (i >= 0) {
        known[i] = GONE;
        free(((Argument *)p)->items);
        free(((Argument *)p)->values);
        free(p);
    }
    pthread_mutex_unlock(&lock);
}

void *aclCreateTensor(const int64_t *sizes, uint64_t dims, int dtype, const int64_t *strides, int64_t offset, int format,
                      const int64_t *storage, uint64_t storage_dims, void *data) {
    Argument *a = remember(TENSOR);
    a->dims = dims < 10 ? dims : 10;
    a->dtype = dtype;
    a->format = format;
    memcpy(a->sizes, sizes, 8 * a->dims);
    return a;
}
void *aclCreateTensorList(void *const *items, uint64_t count) {
    Argument *a = remember(LIST);
    a->count = count;
    a->items = calloc(count + 1, 8);
    memcpy(a->items, items, 8 * count);
    return a;
}
void *aclCreateScalarList(void *const *items, uint64_t count) { return aclCreateTensorList(items, count); }
void *aclCreateIntArray(const int64_t *values, uint64_t count) {
    Argument *a = remember(INTEGERS);
    a->count = count;
    a->values = calloc(count + 1, 8);
    memcpy(a->values, values, 8 * count);
    return a;
}
void *aclCreateBoolArray(const void *values, uint64_t count) { Argument *a = remember(SCALAR); return a; }
void *aclCreateFloatArray(const float *values, uint64_t count) { Argument *a = remember(SCALAR); return a; }
void *aclCreateScalar(void *value, int dtype) { return remember(SCALAR); }
Error aclDestroyTensor(void *p) { forget(p); return 0; }
Error aclDestroyScalar(void *p) { forget(p); return 0; }
Error aclDestroyIntArray(void *p) { forget(p); return 0; }
Error aclDestroyFloatArray(void *p) { forget(p); return 0; }
Error aclDestroyBoolArray(void *p) { forget(p); return 0; }
Error aclDestroyTensorList(void *p) {
    Argument *list = p;
    for (uint64_t i = 0; i < list->count; i++) forget(list->items[i]);
    forget(p);
    return 0;
}
Error aclDestroyScalarList(void *p) { return aclDestroyTensorList(p); }

static const char *type_name(int dtype) {
    static const char *names[] = {"f32", "f16", "i8", "i32", "u8", "?", "i16", "u16", "u32", "i64", "u64", "f64", "bool"};
    return dtype >= 0 && dtype < 13 ? names[dtype] : dtype == 27 ? "bf16" : dtype == 36 ? "f8e4m3" : "other";
}

static void describe(Argument *a, char **at, char *end) {
#define SAY(...) if (*at < end) *at += snprintf(*at, end - *at, __VA_ARGS__)
    if (a->kind == TENSOR) {
        SAY("%s[", type_name(a->dtype));
        for (int i = 0; i < a->dims; i++) SAY(i ? ",%ld" : "%ld", (long)a->sizes[i]);
        SAY("]");
    } else if (a->kind == LIST) {
        SAY("(");
        for (uint64_t i = 0; i < a->count && i < 8; i++) {
            if (i) SAY(" ");
            if (find(a->items[i]) >= 0) describe(a->items[i], at, end);
        }
        SAY(")");
    } else if (a->kind == INTEGERS) {
        SAY("{");
        for (uint64_t i = 0; i < a->count && i < 32; i++) SAY(i ? ",%ld" : "%ld", (long)a->values[i]);
        SAY("}");
    } else {
        SAY("scalar");
    }
}

/* A kernel's words come in six registers and then on the stack; its own arguments end where one is seen again. */
static Error note_kernel(const char *name, long *registers, long *stack) {
    char line[4096], *at = line, *end = line + sizeof line - 2;
    pthread_mutex_lock(&lock);
    at += snprintf(at, end - at, "%s", name);
    void *seen[80];
    int count = 0;
    for (int i = 0; i < 70; i++) {
        void *word = (void *)(i < 6 ? registers[i] : stack[i - 6]);
        if (find(word) < 0) continue;
        int again = 0;
        for (int k = 0; k < count; k++) again |= seen[k] == word;
        if (again) break;
        seen[count++] = word;
        if (at < end) *at++ = ' ';
        describe(word, &at, end);
    }
    *(at < end ? at : end) = 0;
    write_trace(line);
    write_trace("\n");
    pthread_mutex_unlock(&lock);
    return 0;
}
#define KERNEL(name)                                                                                   \
    Error name##GetWorkspaceSize(long a, long b, long c, long d, long e, long f, long stack) {         \
        long registers[6] = {a, b, c, d, e, f};                                                        \
        return note_kernel(#name, registers, &stack);                                                  \
    }                                                                                                  \
    Error name(void *workspace, uint64_t size, void *executor, void *stream) { return 0; }

/* Format 29 is FRACTAL_NZ: tiles of 16 rows and 32 bytes. */
Error aclnnNpuFormatCastCalculateSizeAndFormat(void *tensor, int format, int extra, int64_t **sizes, uint64_t *dims,
                                               int *actual) {
    Argument *a = tensor;
    int n = a->dims, tile = a->dtype == 2 || a->dtype == 4 ? 32 : 16;
    int64_t *out = calloc(12, 8);
    memcpy(out, a->sizes, 8 * n);
    if (format == 29 && n >= 2) {
        out[n - 2] = (a->sizes[n - 1] + tile - 1) / tile;
        out[n - 1] = (a->sizes[n - 2] + 15) / 16;
        out[n] = 16;
        out[n + 1] = tile;
        n += 2;
    }
    *sizes = out;
    *dims = n;
    *actual = format;
    return 0;
}

/* Collectives: the other ranks bring nothing. So those of one rank are copies. Sizes of HCCL's types, by number. */
static const int type_size[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2, 8, 1, 1, 1, 1};
static uint32_t ranks_met = 1;
static Error collective(const char *name, void *from, void *to, uint64_t sent, uint64_t received, int dtype, void *stream) {
    uint64_t size = type_size[dtype];
    note(name);
    note_order("collective %ld %ld %ld %ld %ld", (long)stream, (long)from, (long)to, (long)(sent * size),
               (long)(received * size));
    if (from != to) memmove(to, from, (sent < received ? sent : received) * size);
    return 0;
}
Error HcclGetRootInfo(void *info) { memset(info, 1, 64); return 0; }
Error HcclCommInitRootInfo(uint32_t ranks, const void *info, uint32_t rank, void **comm) {
    ranks_met = ranks;
    *comm = new_handle();
    return 0;
}
Error HcclCommInitRootInfoConfig(uint32_t ranks, const void *info, uint32_t rank, const void *config, void **comm) {
    return HcclCommInitRootInfo(ranks, info, rank, comm);
}
Error HcclGetCommName(void *comm, char *name) { strcpy(name, "fake"); return 0; }
Error HcclGetCommAsyncError(void *comm, int *error) { *error = 0; return 0; }
Error HcclAllReduce(void *from, void *to, uint64_t n, int dtype, int op, void *comm, void *stream) {
    return collective("HcclAllReduce", from, to, n, n, dtype, stream);
}
Error HcclAllGather(void *from, void *to, uint64_t n, int dtype, void *comm, void *stream) {
    return collective("HcclAllGather", from, to, n, n * ranks_met, dtype, stream);
}
Error HcclReduceScatter(void *from, void *to, uint64_t n, int dtype, int op, void *comm, void *stream) {
    return collective("HcclReduceScatter", from, to, n * ranks_met, n, dtype, stream);
}
Error HcclBroadcast(void *data, uint64_t n, int dtype, uint32_t root, void *comm, void *stream) {
    note("HcclBroadcast");
    return 0;
}

/* ATB is an interface of C++ classes: one object whose virtual functions return 0 serves for all. */
static int nothing(void) { return 0; }
#define EIGHT (void *)nothing, (void *)nothing, (void *)nothing, (void *)nothing, (void *)nothing, (void *)nothing, (void *)nothing, (void *)nothing
static void *virtual_functions[] = {EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT, EIGHT};
static struct { void *table; void *room[64]; } object = {virtual_functions + 2};
#define ATB_OPERATION(number, symbol, name)                                                            \
    Error atb_##number(const void *how, void **operation) __asm__(symbol);                             \
    Error atb_##number(const void *how, void **operation) { *operation = &object; note(name); return 0; }
#define ATB_CONTEXT(number, symbol)                                                                    \
    Error atb_##number(void **context) __asm__(symbol);                                                \
    Error atb_##number(void **context) { *context = &object; return 0; }
#define ATB_OTHER(number, symbol)                                                                      \
    Error atb_##number(void) __asm__(symbol);                                                          \
    Error atb_##number(void) { return 0; }
#define OTHER(name) Error name(void) { return 0; }
#define OTHER_NOTED(name) Error name(void) { note(#name); return 0; }

