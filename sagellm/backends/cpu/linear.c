/* y = x @ w.T + bias, w in panels: 16 outputs side by side for each input, so one pass reads it from first to last byte.
 *
 * For processors without the products that oneDNN packs for: with AVX2 it is as fast as those in float32, and several
 * times faster than torch in bfloat16. Arithmetic is float32 whatever the type. Compiled twice, for float and for
 * bfloat16, by including itself with T set. The vectors are the compiler's own, of 8 floats.
 */
#ifndef T
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef float lanes __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef uint16_t halves __attribute__((vector_size(16)));

static inline float up_bf16(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 down_bf16(float f) { /* round to nearest even; NaN stays NaN */
    uint32_t bits;
    memcpy(&bits, &f, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bf16)rounded;
}

static inline float up_f32(float v) { return v; }
static inline float down_f32(float v) { return v; }

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

/* R rows of x [R, k] against one panel, whose first output is `first` of n. U partial sums hide the latency of additions. */
#define ROWS(R, U)                                                                                                     \
    static void NAME(rows##R)(const float *x, const T *w, const T *bias, T *y, long n, long k, long first) {           \
        lanes low[U][R], high[U][R], a, b;                                                                             \
        EACH(u, U) EACH(r, R) low[u][r] = high[u][r] = (lanes){0};                                                     \
        long i = 0;                                                                                                    \
        for (; i + U <= k; i += U) EACH(u, U) {                                                                        \
            LOAD(a, w + (i + u) * PANEL)                                                                               \
            LOAD(b, w + (i + u) * PANEL + 8)                                                                           \
            EACH(r, R) {                                                                                               \
                float v = x[r * k + i + u];                                                                            \
                low[u][r] += a * v;                                                                                    \
                high[u][r] += b * v;                                                                                   \
            }                                                                                                          \
        }                                                                                                              \
        for (; i < k; i++) {                                                                                           \
            LOAD(a, w + i * PANEL)                                                                                     \
            LOAD(b, w + i * PANEL + 8)                                                                                 \
            EACH(r, R) {                                                                                               \
                low[0][r] += a * x[r * k + i];                                                                         \
                high[0][r] += b * x[r * k + i];                                                                        \
            }                                                                                                          \
        }                                                                                                              \
        long wide = n - first < PANEL ? n - first : PANEL;                                                             \
        EACH(r, R) {                                                                                                   \
            for (int u = 1; u < U; u++) low[0][r] += low[u][r], high[0][r] += high[u][r];                              \
            float sum[PANEL];                                                                                          \
            memcpy(sum, &low[0][r], 32);                                                                               \
            memcpy(sum + 8, &high[0][r], 32);                                                                          \
            for (long j = 0; j < wide; j++)                                                                            \
                y[r * n + first + j] = NAME(down)(sum[j] + (bias ? NAME(up)(bias[first + j]) : 0.0f));                 \
        }                                                                                                              \
    }
ROWS(1, 4)
ROWS(2, 2)
ROWS(3, 2)
ROWS(4, 1)
ROWS(5, 1)
ROWS(6, 1)
#undef ROWS

/* x float [rows, k], w [panels, k, 16], bias [n] or none, y [rows, n]; all contiguous. */
void NAME(linear)(const float *x, const T *w, const T *bias, T *y, long rows, long n, long k) {
    for (long block = 0; block < rows; block += BLOCK) {
        long end = block + BLOCK < rows ? block + BLOCK : rows;
#pragma omp parallel for schedule(static)
        for (long first = 0; first < n; first += PANEL) {
            const T *panel = w + first * k;
            long r = block;
            for (; r + 6 <= end; r += 6) NAME(rows6)(x + r * k, panel, bias, y + r * n, n, k, first);
            switch (end - r) {
            case 5: NAME(rows5)(x + r * k, panel, bias, y + r * n, n, k, first); break;
            case 4: NAME(rows4)(x + r * k, panel, bias, y + r * n, n, k, first); break;
            case 3: NAME(rows3)(x + r * k, panel, bias, y + r * n, n, k, first); break;
            case 2: NAME(rows2)(x + r * k, panel, bias, y + r * n, n, k, first); break;
            case 1: NAME(rows1)(x + r * k, panel, bias, y + r * n, n, k, first); break;
            }
        }
    }
}
#endif
