/* y = x @ w.T + bias, w in panels: 16 outputs side by side for each input, so one pass reads it from first to last byte.
 *
 * For processors without the products that oneDNN packs for: with AVX2 it is as fast as those in float32, and several
 * times faster than torch in bfloat16. Arithmetic is float32 whatever the type. Compiled twice, for float and for
 * bfloat16, by including itself with T set. The vectors are the compiler's own, of 8 floats.
 */
#ifndef T
#include "native.h"

typedef float lanes __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

#define LOAD_bf16(v, p)                                                                                                \
    {                                                                                                                  \
        halves h;                                                                                                      \
        memcpy(&h, p, sizeof h);                                                                                       \
        v = (lanes)(__builtin_convertvector(h, words) << 16);                                                          \
    }
#define LOAD_f32(v, p) memcpy(&v, p, sizeof v);

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, S)
#define LOAD JOIN(LOAD, S)
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; i++)
#define PANEL 16
#define GROUP 4 /* panels that one thread takes at a time */
#define BLOCK 120 /* rows of x that stay in the cache while all panels pass; a multiple of 6 */

#define T float
#define S f32
#include "linear.c"
#undef T
#undef S
#define T bf16
#define S bf16
#include "linear.c"
#else

/* R rows of x [R, k] against P panels that begin at the output `first` of n. Each sum runs over the inputs in their order,
 * whatever R and P are: a row's result does not depend on the rows beside it. Few rows take several panels at once, as
 * their sums hide each other's latency. */
#define ROWS(R, P)                                                                                                     \
    static void NAME(rows##R##x##P)(const float *x, const T *w, const T *bias, T *y, long n, long k, long first) {     \
        lanes low[P][R], high[P][R], a, b;                                                                             \
        EACH(p, P) EACH(r, R) low[p][r] = high[p][r] = (lanes){0};                                                     \
        for (long i = 0; i < k; i++) EACH(p, P) {                                                                      \
            LOAD(a, w + (p * k + i) * PANEL)                                                                           \
            LOAD(b, w + (p * k + i) * PANEL + 8)                                                                       \
            EACH(r, R) {                                                                                               \
                float v = x[r * k + i];                                                                                \
                low[p][r] += a * v;                                                                                    \
                high[p][r] += b * v;                                                                                   \
            }                                                                                                          \
        }                                                                                                              \
        EACH(p, P) EACH(r, R) {                                                                                        \
            long from = first + p * PANEL, wide = n - from < PANEL ? n - from : PANEL;                                 \
            float sum[PANEL];                                                                                          \
            memcpy(sum, &low[p][r], 32);                                                                               \
            memcpy(sum + 8, &high[p][r], 32);                                                                          \
            for (long j = 0; j < wide; j++)                                                                            \
                y[r * n + from + j] = NAME(down)(sum[j] + (bias ? NAME(up)(bias[from + j]) : 0.0f));                   \
        }                                                                                                              \
    }
ROWS(1, 4)
ROWS(1, 1)
ROWS(2, 2)
ROWS(2, 1)
ROWS(3, 2)
ROWS(3, 1)
ROWS(4, 1)
ROWS(5, 1)
ROWS(6, 1)
#undef ROWS

#define CALL(R, P) NAME(rows##R##x##P)(x + r * k, panel, bias, y + r * n, n, k, at)
/* The rows left over, P panels at a time, then one at a time. */
#define LEFT(R, P)                                                                                                     \
    case R:                                                                                                            \
        for (; at + P * PANEL <= last; at += P * PANEL, panel += P * PANEL * k) CALL(R, P);                            \
        for (; at < last; at += PANEL, panel += PANEL * k) CALL(R, 1);                                                 \
        break;

/* x float [rows, k], w [panels, k, 16], bias [n] or none, y [rows, n]; all contiguous. */
void NAME(linear)(const float *x, const T *w, const T *bias, T *y, long rows, long n, long k) {
    for (long block = 0; block < rows; block += BLOCK) {
        long end = block + BLOCK < rows ? block + BLOCK : rows;
#pragma omp parallel for schedule(static)
        for (long first = 0; first < n; first += GROUP * PANEL) {
            long last = first + GROUP * PANEL < n ? first + GROUP * PANEL : n, r;
            for (long at = first; at < last; at += PANEL) {
                const T *panel = w + at * k;
                for (r = block; r + 6 <= end; r += 6) CALL(6, 1);
            }
            long at = first;
            const T *panel = w + at * k;
            r = end - (end - block) % 6;
            switch (end - r) {
                LEFT(5, 1)
                LEFT(4, 1)
                LEFT(3, 2)
                LEFT(2, 2)
                LEFT(1, 4)
            }
        }
    }
}
#undef CALL
#undef LEFT
#endif
