/* What the native kernels share: two types of numbers, and the exponential that a compiler vectorises. */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define SCALE 4 /* bytes of a scale, a float behind the int8 numbers of a head */

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

/* 2^k * p(r): relative error below 2e-7 over the range that float can hold. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x; /* two statements, which compilers make a maximum and a minimum of */
    x = x > 88.0f ? 88.0f : x;
    float k = __builtin_rintf(x * 1.44269504f);
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.0f + r * (1.0f + r * (0.5f + r * (0.166666657f + r * (0.0416657962f + r * (0.00833345205f + r * 0.00139171742f)))));
    int32_t scale = ((int32_t)k + 127) << 23;
    float s;
    memcpy(&s, &scale, 4);
    return p * s;
}
