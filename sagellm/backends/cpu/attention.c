/* Attention of a step's decode rows over the paged cache, read in place.
 *
 * A part is some decode rows, a block table and a range of positions: one row over all it has cached, or all rows of
 * a cohort over the beginning that they share, where each key and value is loaded once for all of them. A part gives
 * a normalised result and the log of its softmax's denominator, from which `merge` joins a row's parts exactly
 * (online softmax, Milakov & Gimelshein 2018; shared beginnings: Hydragen, Juravsky et al. 2024).
 *
 * The nodes of a tree of guesses are a part too: they share the context, and behind it each sees its ancestors, wherever
 * these lie. Keys come in the order and in the tiles that a plain row has them in, and no lane knows of the others, so a
 * node has the plain row's result bit for bit.
 *
 * Queries lie in the lanes of vectors: a tile of keys times a tile of queries is then a matrix product of outer
 * products, and the softmax needs no sum across lanes. All arithmetic is float32.
 */
#ifndef T
#include "native.h"

#define KEYS 48 /* of a tile: these and their values fit into the first-level cache; a multiple of 6 and 8 */
#define QUERIES 128 /* of a unit of work, at most */
#define PARTS 6 /* columns of the table of parts */

/* Lanes of the tiles for so many queries. */
static inline long width(long count) { return count <= 4 ? 4 : count <= 8 ? 8 : 16; }

/* s [n][w] becomes exp(s - max); o [d][w], sum and max are brought to the new maximum. */
static inline void softmax(float *restrict s, float *restrict o, float *restrict max, float *restrict sum, long n,
                           long d, const int w) {
    float before[16];
    memcpy(before, max, w * sizeof(float));
    for (long i = 0; i < n * w; i += w)
#pragma omp simd
        for (int j = 0; j < w; j++) max[j] = s[i + j] > max[j] ? s[i + j] : max[j];
    if (memcmp(before, max, w * sizeof(float))) {
#pragma omp simd
        for (int j = 0; j < w; j++) sum[j] *= before[j] = exponential(before[j] - max[j]);
        for (long e = 0; e < d * w; e += w)
#pragma omp simd
            for (int j = 0; j < w; j++) o[e + j] *= before[j];
    }
    for (long i = 0; i < n * w; i += w)
#pragma omp simd
        for (int j = 0; j < w; j++) sum[j] += s[i + j] = exponential(s[i + j] - max[j]);
}

/* Weighted values of R columns from e on: sums o [R][N * W] go on over the n keys. */
#define VALUES(NAME, W, N, R)                                                                                        \
    {                                                                                                               \
        lanes##NAME t[R][N];                                                                                        \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int c = 0; c < N; c++) t[r][c] = ((lanes##NAME *)(o + (e + r) * N * W))[c];                        \
        for (long i = 0; i < n; i++) {                                                                              \
            const lanes##NAME *x = (const lanes##NAME *)(s + i * N * W);                                            \
            const float *y = v[i] + e;                                                                              \
            for (int r = 0; r < R; r++)                                                                             \
                for (int c = 0; c < N; c++) t[r][c] += x[c] * y[r];                                                 \
        }                                                                                                           \
        for (int r = 0; r < R; r++)                                                                                 \
            for (int c = 0; c < N; c++) ((lanes##NAME *)(o + (e + r) * N * W))[c] = t[r][c];                        \
    }

/* A tile of n keys for N vectors of W queries: scores, softmax so far, weighted values.
 * q, o [d][N * W]; max, sum [N * W]; k, v: one pointer a key. R * N sums at a time hide the latency and fill the
 * registers; Q columns at a time are taken first where d is no multiple of R. */
#define TILE(NAME, W, N, R, Q)                                                                                       \
    typedef float lanes##NAME __attribute__((vector_size(4 * W), aligned(4), may_alias));                           \
    static void tile##NAME(const float *q, const float *const *k, const float *const *v, float *o, float *max,      \
                           float *sum, long n, long d) {                                                            \
        float s[KEYS * N * W];                                                                                     \
        for (long i = 0; i < n; i += R) {                                                                           \
            lanes##NAME t[R][N];                                                                                    \
            for (int r = 0; r < R; r++)                                                                             \
                for (int c = 0; c < N; c++) t[r][c] = (lanes##NAME){0};                                             \
            for (long e = 0; e < d; e++) {                                                                          \
                const lanes##NAME *x = (const lanes##NAME *)(q + e * N * W);                                        \
                for (int r = 0; r < R; r++)                                                                         \
                    for (int c = 0; c < N; c++) t[r][c] += x[c] * k[i + r][e];                                      \
            }                                                                                                       \
            for (int r = 0; r < R; r++)                                                                             \
                for (int c = 0; c < N; c++) ((lanes##NAME *)(s + (i + r) * N * W))[c] = t[r][c];                    \
        }                                                                                                           \
        softmax(s, o, max, sum, n, d, N * W);                                                                       \
        long e = 0;                                                                                                 \
        for (; (d - e) % R && e + Q <= d; e += Q) VALUES(NAME, W, N, Q)                                             \
        for (; e + R <= d; e += R) VALUES(NAME, W, N, R)                                                            \
        for (; e < d; e++)                                                                                          \
            for (long i = 0; i < n; i++)                                                                            \
                for (long j = 0; j < N * W; j++) o[e * N * W + j] += s[i * N * W + j] * v[i][e];                    \
    }

TILE(4, 4, 1, 8, 4)
TILE(8, 8, 1, 8, 4)
#ifdef __AVX512F__
TILE(16, 16, 1, 8, 4)
#else
TILE(16, 8, 2, 6, 4)
#endif

/* The d numbers of a head in an int8 cache. */
static inline void widen(const char *packed, float *out, long d) {
    float scale;
    memcpy(&scale, packed + d, SCALE);
    for (long e = 0; e < d; e++) out[e] = ((const int8_t *)packed)[e] * scale;
}

#define T float
#define NAME(f) f##_f32
#define UP up_f32
#define DOWN down_f32
#define DIRECT 1
#include "attention.c"
#undef T
#undef NAME
#undef UP
#undef DOWN
#undef DIRECT
#define T bf16
#define NAME(f) f##_bf16
#define UP up_bf16
#define DOWN down_bf16
#define DIRECT 0
#include "attention.c"

#else

/* `all` queries, in tiles of m, over the positions from .. to; from `context` on, `path` says where each lies. */
static void NAME(walk)(const float *wide, float *o, float *max, float *sum, long all, long m, const char *keys,
                       const char *values, const int64_t *table, long from, long to, long context,
                       const int64_t *path, long head, long heads, long d, long block, long int8) {
    void (*tile)(const float *, const float *const *, const float *const *, float *, float *, float *, long, long) =
        m == 4 ? tile4 : m == 8 ? tile8 : tile16;
    /* Many queries read each key many times: then a copy of the tile, in one piece, stays in the first-level cache.
     * In place, one head's keys lie as far apart as all heads take, and use a part of that cache's sets. */
    int direct = DIRECT && !int8 && all == m;
    long each = int8 ? d + SCALE : d * (long)sizeof(T);
    float kept[2][direct ? 1 : KEYS * d];
    for (long at = from; at < to; at += KEYS) {
        const float *k[KEYS], *v[KEYS];
        long n = to - at < KEYS ? to - at : KEYS, ahead = to - at < 2 * KEYS ? to - at : 2 * KEYS;
        for (long i = 0; i < ahead; i++) {
            long place = at + i < context ? at + i : path[at + i - context];
            long line = ((table[place / block] * block + place % block) * heads + head) * each;
            const char *key = keys + line, *value = values + line;
            if (i >= n) { /* the next tile: the processor does not guess what lies across blocks */
                for (long e = 0; e < each; e += 64) {
                    __builtin_prefetch(key + e);
                    __builtin_prefetch(value + e);
                }
                continue;
            }
            k[i] = (const float *)key, v[i] = (const float *)value;
            if (direct) continue;
            k[i] = kept[0] + i * d, v[i] = kept[1] + i * d;
            if (int8) {
                widen(key, kept[0] + i * d, d);
                widen(value, kept[1] + i * d, d);
                continue;
            }
            for (long e = 0; e < d; e++) kept[0][i * d + e] = UP(((const T *)key)[e]);
            for (long e = 0; e < d; e++) kept[1][i * d + e] = UP(((const T *)value)[e]);
        }
        for (long i = n; i < KEYS; i++) k[i] = k[0]; /* scores of these are not read */
        for (long j = 0; j < all; j += m) tile(wide + j * d, k, v, o + j * d, max + j, sum + j, n, d);
    }
}

/* Queries first .. first + count of a part (query number: member * group + head of the group) over its positions. In a
 * tree (context >= 0) the members share the whole tiles of the context, and each sees behind them what `paths` says. */
static void NAME(unit)(const T *q, long stride, const char *keys, const char *values, const int64_t *members,
                       const int64_t *table, long from, long to, long context, const int64_t *paths, long longest,
                       long first, long count, long head, long heads, long group, long d, long block, long int8,
                       float scale, float *out, float *lse) {
    long m = width(count), all = (count + m - 1) / m * m;
    float wide[d * all], o[d * all], max[QUERIES], sum[QUERIES]; /* [all / m][d][m] */
    for (long j = 0; j < all; j++) {
        long query = first + j, at = j / m * d * m + j % m;
        const T *x = j < count ? q + members[query / group] * stride + (head * group + query % group) * d : q;
        max[j] = -INFINITY, sum[j] = 0;
        for (long e = 0; e < d; e++) wide[at + e * m] = UP(x[e]) * scale, o[at + e * m] = 0;
    }
    long shared = context < 0 ? to : context < from ? from : from + (context - from) / KEYS * KEYS;
    NAME(walk)(wide, o, max, sum, all, m, keys, values, table, from, shared, shared, 0, head, heads, d, block,
               int8);
    for (long j = 0, n; context >= 0 && j < count; j += n) { /* the queries of one member */
        long own = group - (first + j) % group;
        n = own < count - j ? own : count - j;
        long w = width(n), some = (n + w - 1) / w * w;
        const int64_t *path = paths + (first + j) / group * longest;
        float x[d * some], y[d * some], top[QUERIES], total[QUERIES];
        for (long i = 0; i < some; i++) {
            long here = (j + i) / m * d * m + (j + i) % m, at = i / w * d * w + i % w;
            top[i] = i < n ? max[j + i] : -INFINITY, total[i] = i < n ? sum[j + i] : 0;
            for (long e = 0; e < d; e++) {
                x[at + e * w] = i < n ? wide[here + e * m] : 0;
                y[at + e * w] = i < n ? o[here + e * m] : 0;
            }
        }
        NAME(walk)(x, y, top, total, some, w, keys, values, table, shared, path[0], context, path + 1, head, heads, d,
                   block, int8);
        for (long i = 0; i < n; i++) {
            long here = (j + i) / m * d * m + (j + i) % m, at = i / w * d * w + i % w;
            max[j + i] = top[i], sum[j + i] = total[i];
            for (long e = 0; e < d; e++) o[here + e * m] = y[at + e * w];
        }
    }
    for (long j = 0; j < count; j++) {
        long query = ((first + j) / group * heads + head) * group + (first + j) % group;
        lse[query] = max[j] + logf(sum[j]);
        for (long e = 0; e < d; e++) out[query * d + e] = o[j / m * d * m + e * m + j % m] / sum[j];
    }
}

/* For every part, results `out` [members, heads * group, d] and `lse` [members, heads * group], float.
 * q: rows `stride` apart; the cache holds T, or int8 with scales. parts [n][PARTS]: first member, members, row of the
 * block table, positions from, to, and of a tree its context, else -1; tables [rows, width]; paths [members, longest]:
 * of a tree's node, the keys it sees, and where those behind the context lie. */
void NAME(attend)(const T *q, long stride, const char *keys, const char *values, const int64_t *members,
                  const int64_t *tables, long width, const int64_t *parts, const int64_t *paths, long longest, long n,
                  long heads, long group, long d, long block, long int8, float scale, float *out, float *lse) {
    long tiles = 0, work = 0, first[n + 1];
    for (long p = 0; p < n; p++) {
        long queries = parts[p * PARTS + 1] * group;
        first[p] = tiles;
        tiles += (queries + QUERIES - 1) / QUERIES;
        work += queries * (parts[p * PARTS + 4] - parts[p * PARTS + 3]);
    }
    first[n] = tiles;
#pragma omp parallel for schedule(dynamic, 1) if (work * heads * d > 100000)
    for (long u = 0; u < tiles * heads; u++) {
        long tile = u / heads, head = u % heads, low = 0, high = n;
        while (high - low > 1) { /* the part that holds the tile */
            long middle = (low + high) / 2;
            if (first[middle] <= tile) low = middle;
            else high = middle;
        }
        const int64_t *p = parts + low * PARTS;
        long begin = (tile - first[low]) * QUERIES, count = p[1] * group - begin;
        NAME(unit)(q, stride, keys, values, members + p[0], tables + p[2] * width, p[3], p[4], p[5],
                   paths + p[0] * longest, longest, begin, count < QUERIES ? count : QUERIES, head, heads, group, d, block,
                   int8, scale, out + p[0] * heads * group * d, lse + p[0] * heads * group);
    }
}

/* y [n, heads, d]: for row r its part r of `out`, joined with part other[r] where that is not -1. */
void NAME(merge)(const float *out, const float *lse, const int64_t *other, T *y, long n, long heads, long d) {
    for (long r = 0; r < n; r++)
        for (long h = 0; h < heads; h++) {
            const float *a = out + (r * heads + h) * d;
            T *to = y + (r * heads + h) * d;
            if (other[r] < 0) {
                for (long e = 0; e < d; e++) to[e] = DOWN(a[e]);
                continue;
            }
            long b = other[r] * heads + h;
            float share = 1.0f / (1.0f + expf(lse[b] - lse[r * heads + h])); /* of part r in the whole denominator */
            for (long e = 0; e < d; e++) to[e] = DOWN(a[e] * share + out[b * d + e] * (1.0f - share));
        }
}

#endif
