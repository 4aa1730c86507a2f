/* Products of a few tokens by vectors (AVX512-BF16). */

#include "weights.h"

#if defined(__x86_64__) && defined(__linux__)

enum { FEW = 8 }; /* tokens whose sums stay in registers */

/* `blocks` blocks of outputs of `count` tokens, from token `first`, by vectors of outputs. */
FAST_INLINE void codes(const struct product *product, const struct inputs *inputs, int64_t first,
                       int64_t block, const int bits, const int count, const int blocks,
                       float *out)
{
    __m512 total[FEW][SPAN_BLOCKS], sum[FEW][SPAN_BLOCKS];
    __m512i table = table_of(product);
    int64_t columns = product->columns, group = product->group;
    const uint16_t *x = inputs->x + first * columns;
    for (int m = 0; m < count; m++)
        for (int b = 0; b < blocks; b++)
            total[m][b] = _mm512_setzero_ps();
    for (int64_t start = 0; start < columns; start += group) {
        for (int m = 0; m < count; m++)
            for (int b = 0; b < blocks; b++)
                sum[m][b] = _mm512_setzero_ps();
        for (int64_t column = start; column < start + group; column += CHUNK)
            for (int b = 0; b < blocks; b++) {
                __m512i pairs[CHUNK / 2];
                decode(product, table, block + b, column, bits, pairs);
#pragma GCC unroll 4
                for (int pair = 0; pair < CHUNK / 2; pair++)
                    for (int m = 0; m < count; m++) {
                        uint32_t one = pair_of(x + m * columns, column + 2 * pair);
                        sum[m][b] = _mm512_dpbf16_ps(sum[m][b], (__m512bh)pairs[pair],
                                                     (__m512bh)_mm512_set1_epi32((int)one));
                    }
            }
        for (int b = 0; b < blocks; b++) {
            struct grid grid = grid_of(product, start / group, block + b);
            for (int m = 0; m < count; m++)
                total[m][b] = scaled(grid, inside_of(product, inputs, first + m, start / group),
                                     sum[m][b], total[m][b]);
        }
    }
    for (int m = 0; m < count; m++)
        for (int b = 0; b < blocks; b++)
            _mm512_storeu_ps(out + (first + m) * SPAN + b * LANES, total[m][b]);
}

/* The sums of the lanes of 16 vectors, in their order. */
FAST_INLINE __m512 sums_of(const __m512 *v)
{
    __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                               _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
        four[i] = _mm512_add_ps(
            _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(two[2 * i]),
                                                _mm512_castps_pd(two[2 * i + 1]))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(two[2 * i]),
                                                _mm512_castps_pd(two[2 * i + 1]))));
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                         _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}

/* One block of outputs of `count` tokens, from token `first`, by vectors of columns. */
FAST_INLINE void dense(const struct product *product, const struct inputs *inputs, int64_t first,
                       int64_t block, const int count, float *out)
{
    int64_t columns = product->columns;
    const int rows = LANES / count;
    const uint16_t *x = inputs->x + first * columns;
    for (int from = 0; from < LANES; from += rows) {
        const uint16_t *w = (const uint16_t *)product->weights + (block * LANES + from) * columns;
        __m512 sum[LANES];
        float sums[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            sum[i] = _mm512_setzero_ps();
        for (int64_t column = 0; column < columns; column += STEP) {
            __m512bh token[4];
#pragma GCC unroll 4
            for (int m = 0; m < count; m++)
                token[m] = (__m512bh)_mm512_loadu_si512(x + m * columns + column);
#pragma GCC unroll 16
            for (int row = 0; row < rows; row++) {
                __m512bh weight = (__m512bh)_mm512_loadu_si512(w + row * columns + column);
#pragma GCC unroll 4
                for (int m = 0; m < count; m++)
                    sum[m * rows + row] =
                        _mm512_dpbf16_ps(sum[m * rows + row], weight, token[m]);
            }
        }
        _mm512_storeu_ps(sums, sums_of(sum));
        for (int m = 0; m < count; m++)
            for (int row = 0; row < rows; row++)
                out[(first + m) * SPAN + from + row] = sums[m * rows + row];
    }
}

/* Codes of a constant number of tokens, in as many blocks at once as registers allow. */
#define CODES(bits, count, most) \
    case count: \
        for (; blocks >= most; blocks -= most, block += most, out += most * LANES) \
            codes(product, inputs, first, block, bits, count, most, out); \
        for (; blocks; blocks--, block++, out += LANES) \
            codes(product, inputs, first, block, bits, count, 1, out); \
        break;

#define ALL_CODES(bits) \
    CODES(bits, 1, 4) CODES(bits, 2, 4) CODES(bits, 3, 2) CODES(bits, 4, 2) \
    CODES(bits, 5, 1) CODES(bits, 6, 1) CODES(bits, 7, 1) CODES(bits, 8, 1)

FAST static void few(const struct product *product, const struct inputs *inputs, int64_t first,
                     int64_t count, int64_t block, int64_t blocks, float *out)
{
    if (product->bits == 4)
        switch (count) { ALL_CODES(4) }
    else
        switch (count) { ALL_CODES(8) }
}

FAST void lowbit_by_vectors(const struct product *product, const struct inputs *inputs,
                            int64_t block, int64_t blocks, float *out)
{
    int64_t count = inputs->count;
    if (product->bits != 16) {
        for (int64_t first = 0; first < count; first += FEW)
            few(product, inputs, first, count - first < FEW ? count - first : FEW, block, blocks,
                out);
        return;
    }
    for (int64_t b = 0; b < blocks; b++) {
        int64_t first = 0;
        for (; first + 4 <= count; first += 4)
            dense(product, inputs, first, block + b, 4, out + b * LANES);
        for (; first + 2 <= count; first += 2)
            dense(product, inputs, first, block + b, 2, out + b * LANES);
        for (; first < count; first++)
            dense(product, inputs, first, block + b, 1, out + b * LANES);
    }
}

#endif
