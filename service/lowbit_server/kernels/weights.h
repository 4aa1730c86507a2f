/* Weights of codes as numbers, in vectors: what the products by vectors and by tiles share. */

#ifndef LOWBIT_WEIGHTS_H
#define LOWBIT_WEIGHTS_H

#include "numbers.h"
#include "products.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define FAST_INLINE FAST static ALWAYS_INLINE

enum {
    STEP = 32, /* bfloat16 in a vector, and columns in a tile */
    CHUNK = 8, /* columns whose 4-bit codes fill one vector for a block of outputs */
};

/* The pair of columns that begins at `column` of one token. */
static ALWAYS_INLINE uint32_t pair_of(const uint16_t *x, int64_t column)
{
    uint32_t pair;
    memcpy(&pair, x + column, sizeof pair);
    return pair;
}

/* Four pairs of columns, numbered from `column` on, of one block's codes as bfloat16: each
   lane has an output's two weights side by side. */
FAST_INLINE void decode(const struct product *product, __m512i table, int64_t block,
                        int64_t column, const int bits, __m512i pairs[CHUNK / 2])
{
    const uint8_t *from =
        (const uint8_t *)product->weights + (block * product->columns + column) * LANES * bits / 8;
    if (bits == 4) {
        __m512i words = _mm512_loadu_si512(from);
        pairs[0] = _mm512_permutexvar_epi16(words, table);
        pairs[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
        pairs[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
        pairs[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
        return;
    }
#pragma GCC unroll 4
    for (int pair = 0; pair < CHUNK / 2; pair++) {
        const __m128i *two = (const __m128i *)(from + pair * 2 * LANES);
        __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(two)));
        __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(two + 1)));
        pairs[pair] = _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                      _mm512_castps_si512(high));
    }
}

FAST_INLINE void decode_any(const struct product *product, __m512i table, int64_t block,
                            int64_t column, __m512i pairs[CHUNK / 2])
{
    if (product->bits == 4)
        decode(product, table, block, column, 4, pairs);
    else
        decode(product, table, block, column, 8, pairs);
}

/* An index of a word takes five bits, of which the fifth is a neighbour's: any will do. */
FAST_INLINE __m512i table_of(const struct product *product)
{
    if (product->bits != 4)
        return _mm512_setzero_si512();
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)product->meant));
}

/* One block's scales and points of a group. */
struct grid {
    __m512 scale, point;
};

FAST_INLINE struct grid grid_of(const struct product *product, int64_t group, int64_t block)
{
    int64_t place = group * product->rows + block * LANES;
    struct grid grid = {_mm512_loadu_ps(product->scales + place), _mm512_setzero_ps()};
    if (product->points)
        grid.point = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(
            _mm256_loadu_si256((const __m256i *)(product->points + place))));
    return grid;
}

/* Adds a group's sum to those of all: total + scale * (sum + point * sum of its inputs). */
FAST_INLINE __m512 scaled(struct grid grid, const float *inside, __m512 sum, __m512 total)
{
    if (inside)
        sum = _mm512_fmadd_ps(grid.point, _mm512_set1_ps(*inside), sum);
    return _mm512_fmadd_ps(grid.scale, sum, total);
}

/* The sum of a token's inputs in a group, or null where no point needs it. */
FAST_INLINE const float *inside_of(const struct product *product, const struct inputs *inputs,
                                   int64_t token, int64_t group)
{
    if (!inputs->sums)
        return NULL;
    return inputs->sums + token * (product->columns / product->group) + group;
}

/* The weights of a pair of columns, rounded to bfloat16 once: those of even and of odd columns. */
FAST_INLINE void weights_of(struct grid grid, __m512i pair, __m256i *even, __m256i *odd)
{
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
    __m512 high = _mm512_castsi512_ps(
        _mm512_and_si512(pair, _mm512_set1_epi32((int)0xffff0000)));
    low = _mm512_mul_ps(_mm512_add_ps(low, grid.point), grid.scale);
    high = _mm512_mul_ps(_mm512_add_ps(high, grid.point), grid.scale);
    *even = (__m256i)_mm512_cvtneps_pbh(low);
    *odd = (__m256i)_mm512_cvtneps_pbh(high);
}

/* The products of some tokens, MAX_TOKENS at most, with some blocks: float32 (tokens, SPAN). */
void lowbit_by_vectors(const struct product *product, const struct inputs *inputs, int64_t block,
                       int64_t blocks, float *out);
void lowbit_by_tiles(const struct product *product, const struct inputs *inputs, int64_t block,
                     int64_t blocks, float *out);

/* As lowbit_span, for many tokens: weights become tiles once, for all of them. */
int64_t lowbit_by_wide_tiles(const struct product *product, const struct inputs *inputs,
                             int64_t first, int64_t block, int64_t blocks, int part, float *out);

/* Whether this CPU has tiles, and Linux gives them to this process. */
int lowbit_has_tiles(void);

/* Writes a tile (16, 16) of 32-bit elements with its rows as columns, the first `rows` of them;
   strides are in elements. */
void lowbit_transpose(const void *tile, int64_t stride, void *out, int64_t out_stride,
                      int64_t rows);

#endif

#endif
