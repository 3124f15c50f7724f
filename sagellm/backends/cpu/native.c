/* Element-wise kernels of the CPU backend, fused: what stock torch does in five to ten calls each.
 *
 * Rows are independent; all arithmetic is float32 whatever the type. Compiled twice, for float and for bfloat16,
 * by including itself with T set. Plain C that a compiler vectorises: `cc -O3 -march=native -fopenmp-simd`.
 */
#ifndef T
#include "native.h"

/* y = w @ x + bias for one row x [k], by the threads of torch's own pool. w [n, k] is packed as oneDNN packs it for
 * 16 rows: blocks of 64 outputs; in a block, for every input (float) or pair of inputs (bfloat16), 64 of them side by
 * side. One pass over the weights from first to last byte: what the memory gives is the limit. n is a multiple of 64. */
typedef float lanes __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));

static void finish(const lanes *sum, float *out) { memcpy(out, sum, 4 * sizeof(lanes)); }

void gemv_f32(const float *x, const float *w, const float *bias, float *y, long n, long k) {
#pragma omp parallel for schedule(static)
    for (long block = 0; block < n / 64; block++) {
        const lanes *p = (const lanes *)(w + block * 64 * k);
        lanes a = {0}, b = {0}, c = {0}, d = {0};
        for (long i = 0; i < k; i++, p += 4) {
            a += p[0] * x[i];
            b += p[1] * x[i];
            c += p[2] * x[i];
            d += p[3] * x[i];
        }
        lanes sum[4] = {a, b, c, d};
        float out[64];
        finish(sum, out);
        for (long j = 0; j < 64; j++) y[block * 64 + j] = out[j] + (bias ? bias[block * 64 + j] : 0.0f);
    }
}

void gemv_bf16(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, long n, long k) {
    float wide[k];
    for (long i = 0; i < k; i++) wide[i] = up_bf16(x[i]);
#pragma omp parallel for schedule(static)
    for (long block = 0; block < n / 64; block++) {
        const words *p = (const words *)(w + block * 64 * k);
        lanes a = {0}, b = {0}, c = {0}, d = {0};
        for (long i = 0; i < k; i += 2, p += 4) {
            float even = wide[i], odd = wide[i + 1];
            a += (lanes)(p[0] << 16) * even + (lanes)(p[0] & 0xffff0000u) * odd;
            b += (lanes)(p[1] << 16) * even + (lanes)(p[1] & 0xffff0000u) * odd;
            c += (lanes)(p[2] << 16) * even + (lanes)(p[2] & 0xffff0000u) * odd;
            d += (lanes)(p[3] << 16) * even + (lanes)(p[3] & 0xffff0000u) * odd;
        }
        lanes sum[4] = {a, b, c, d};
        float out[64];
        finish(sum, out);
        for (long j = 0; j < 64; j++)
            y[block * 64 + j] = down_bf16(out[j] + (bias ? up_bf16(bias[block * 64 + j]) : 0.0f));
    }
}

#define T float
#define NAME(f) f##_f32
#define UP up_f32
#define DOWN down_f32
#include "native.c"
#undef T
#undef NAME
#undef UP
#undef DOWN
#define T bf16
#define NAME(f) f##_bf16
#define UP up_bf16
#define DOWN down_bf16
#include "native.c"

#else

/* y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * w, for rows x heads vectors of n; rows of x are `stride` apart. */
void NAME(rms_norm)(const T *x, long stride, const T *w, T *y, long rows, long heads, long n, float eps) {
    for (long r = 0; r < rows; r++)
        for (long h = 0; h < heads; h++) {
            const T *in = x + r * stride + h * n;
            T *out = y + (r * heads + h) * n;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < n; i++) sum += UP(in[i]) * UP(in[i]);
            float scale = 1.0f / sqrtf(sum / n + eps);
#pragma omp simd
            for (long i = 0; i < n; i++) out[i] = DOWN(UP(in[i]) * scale * UP(w[i]));
        }
}

/* total = x + y, rounded to the type; normed = rms_norm(total). All contiguous [rows, n]. */
void NAME(add_rms_norm)(const T *x, const T *y, const T *w, T *total, T *normed, long rows, long n, float eps) {
    for (long r = 0; r < rows; r++) {
        const T *a = x + r * n, *b = y + r * n;
        T *t = total + r * n, *out = normed + r * n;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < n; i++) {
            t[i] = DOWN(UP(a[i]) + UP(b[i]));
            sum += UP(t[i]) * UP(t[i]);
        }
        float scale = 1.0f / sqrtf(sum / n + eps);
#pragma omp simd
        for (long i = 0; i < n; i++) out[i] = DOWN(UP(t[i]) * scale * UP(w[i]));
    }
}

/* y[r] = silu(x[r][:n]) * x[r][n:]; x contiguous [rows, 2 n]. */
void NAME(silu_mul)(const T *x, T *y, long rows, long n) {
    for (long r = 0; r < rows; r++) {
        const T *gate = x + r * 2 * n, *up = gate + n;
        T *out = y + r * n;
#pragma omp simd
        for (long i = 0; i < n; i++) {
            float g = UP(gate[i]);
            out[i] = DOWN(g / (1.0f + exponential(-g)) * UP(up[i]));
        }
    }
}

/* Rotate the halves of each head; angles [rows, d]: cos, then sin. Rows of x are `stride` apart, y contiguous. */
void NAME(rope)(const T *x, long stride, const float *angles, T *y, long rows, long heads, long d) {
    long half = d / 2;
    for (long r = 0; r < rows; r++) {
        const float *cosine = angles + r * d, *sine = cosine + half;
        for (long h = 0; h < heads; h++) {
            const T *in = x + r * stride + h * d;
            T *out = y + (r * heads + h) * d;
#pragma omp simd
            for (long i = 0; i < half; i++) {
                float low = UP(in[i]), high = UP(in[i + half]);
                out[i] = DOWN(low * cosine[i] - high * sine[i]);
                out[i + half] = DOWN(high * cosine[i] + low * sine[i]);
            }
        }
    }
}

/* One head: normalised if there are weights w, then rotated; d numbers. */
static void NAME(turned)(const T *in, const T *w, float eps, const float *angles, T *out, long d) {
    long half = d / 2;
    float sum = 0, wide[d];
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < d; i++) {
        wide[i] = UP(in[i]);
        sum += wide[i] * wide[i];
    }
    float scale = 1.0f / sqrtf(sum / d + eps);
    if (w)
        for (long i = 0; i < d; i++) wide[i] *= scale * UP(w[i]);
#pragma omp simd
    for (long i = 0; i < half; i++) {
        out[i] = DOWN(wide[i] * angles[i] - wide[i + half] * angles[i + half]);
        out[i + half] = DOWN(wide[i + half] * angles[i] + wide[i] * angles[i + half]);
    }
}

/* The d numbers of a head as int8, and behind them their scale, which is the greatest magnitude / 127. */
static void NAME(quantize)(const T *x, char *out, long d) {
    uint32_t most = 0; /* as bits, in whose order NaN is the greatest */
#pragma omp simd reduction(max : most)
    for (long i = 0; i < d; i++) {
        float f = UP(x[i]);
        uint32_t bits;
        memcpy(&bits, &f, 4);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float scale;
    memcpy(&scale, &most, 4);
    scale /= 127;
    float divisor = scale < FLT_MIN ? FLT_MIN : scale;
#pragma omp simd
    for (long i = 0; i < d; i++) out[i] = (int8_t)(int32_t)__builtin_rintf(UP(x[i]) / divisor);
    memcpy(out + d, &scale, 4);
}

/* cache[slots[r]] = x[r]; rows of x are `stride` apart. The cache holds T, or int8 with scales. */
void NAME(kv_write)(const T *x, long stride, char *cache, const int64_t *slots, long rows, long heads, long d,
                    long int8) {
    long n = heads * (int8 ? d + SCALE : d * (long)sizeof(T));
    for (long r = 0; r < rows; r++) {
        char *to = cache + slots[r] * n;
        if (!int8) memcpy(to, x + r * stride, n);
        for (long h = 0; int8 && h < heads; h++) NAME(quantize)(x + r * stride + h * d, to + h * (d + SCALE), d);
    }
}

/* y = rotated q, contiguous; rotated k and v go to slots of the cache, which holds T, or int8 with scales. Behind the
 * rows' own slots, `copies` others get what the row source[r] wrote. Norms may be null. */
void NAME(rope_kv_write)(const T *q, long q_stride, const T *k, long k_stride, const T *v, long v_stride,
                         const float *angles, const T *q_norm, const T *k_norm, float eps, T *y, char *keys,
                         char *values, const int64_t *slots, const int64_t *source, long rows, long copies, long heads,
                         long kv_heads, long d, long int8) {
    long each = int8 ? d + SCALE : d * (long)sizeof(T), n = kv_heads * each;
    for (long r = 0; r < rows; r++) {
        for (long h = 0; h < heads; h++)
            NAME(turned)(q + r * q_stride + h * d, q_norm, eps, angles + r * d, y + (r * heads + h) * d, d);
        T row[d];
        for (long h = 0; h < kv_heads; h++) {
            char *key = keys + slots[r] * n + h * each;
            NAME(turned)(k + r * k_stride + h * d, k_norm, eps, angles + r * d, int8 ? row : (T *)key, d);
            if (int8) NAME(quantize)(row, key, d);
        }
        NAME(kv_write)(v + r * v_stride, 0, values, slots + r, 1, kv_heads, d, int8);
    }
    for (long r = rows; r < rows + copies; r++) {
        memcpy(keys + slots[r] * n, keys + slots[source[r]] * n, n);
        memcpy(values + slots[r] * n, values + slots[source[r]] * n, n);
    }
}

#endif
