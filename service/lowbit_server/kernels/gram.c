/* Sums of X^T X for bfloat16 X, on CPUs that multiply bfloat16 themselves (AVX512-BF16). */

#include <stdint.h>

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdlib.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

/* The instruction adds products of two tokens at once, so tokens go in pairs. A tile of
   ROWS x PANEL sums stays in 24 registers. The pairs of a panel of columns take 18 KiB and
   stay in the first cache, those of 2000 columns in the second. */
enum { LANES = 16, VECTORS = 3, PANEL = LANES * VECTORS, ROWS = 8, PAIRS = 96 };

/* Packs a panel of columns as (pairs, PANEL), PAIRS of them at most: a column's two tokens
   side by side, with zeros where X ends. */
TARGET static void pack(const uint16_t *x, int64_t tokens, int64_t width, int64_t stride,
                        uint32_t *packed)
{
    for (int64_t token = 0; token < tokens && token < 2 * PAIRS; token += 2, x += 2 * stride)
        for (int64_t column = 0; column < PANEL; column += LANES, packed += LANES) {
            int64_t left = width - column;
            __mmask16 here = left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            __mmask16 next = token + 1 < tokens ? here : 0;
            __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x + column));
            __m512i high =
                _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(next, x + stride + column));
            _mm512_store_si512(packed, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
}

/* Adds to a tile of sums, of which the first `rows` and `width` exist. */
TARGET static void tile(const uint32_t *left, const uint32_t *right, int64_t pairs, int64_t rows,
                        int64_t width, float *sums, int64_t stride)
{
    __m512 sum[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            sum[row][v] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++, left += PANEL, right += PANEL) {
        __m512i columns[VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++)
            columns[v] = _mm512_load_si512(right + v * LANES);
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++) {
            __m512i one = _mm512_set1_epi32(left[row]);
#pragma GCC unroll 3
            for (int v = 0; v < VECTORS; v++)
                sum[row][v] = _mm512_dpbf16_ps(sum[row][v], (__m512bh)one, (__m512bh)columns[v]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
        for (int v = 0; v < VECTORS; v++) {
            int64_t more = row < rows ? width - v * LANES : 0;
            __mmask16 mask = more >= LANES ? 0xffff : more > 0 ? (1u << more) - 1 : 0;
            float *place = sums + row * stride + v * LANES;
            __m512 before = _mm512_maskz_loadu_ps(mask, place);
            _mm512_mask_storeu_ps(place, mask, _mm512_add_ps(before, sum[row][v]));
        }
}

/* Every sum is one thread's, added in the order of the tokens: their number changes no bit. */
static int add(const uint16_t *x, int64_t tokens, int64_t columns, float *sums, int threads)
{
    int64_t panels = (columns + PANEL - 1) / PANEL;
    int64_t blocks = (tokens + 2 * PAIRS - 1) / (2 * PAIRS);
    int64_t size = PAIRS * PANEL;
    uint32_t *packed = aligned_alloc(64, blocks * panels * size * sizeof *packed);
    if (!packed)
        return 0;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t panel = 0; panel < panels; panel++)
                pack(x + block * 2 * PAIRS * columns + panel * PANEL, tokens - block * 2 * PAIRS,
                     columns - panel * PANEL, columns, packed + (block * panels + panel) * size);
        /* The longest first, so that the threads end together. */
#pragma omp for schedule(dynamic)
        for (int64_t right = panels - 1; right >= 0; right--)
            for (int64_t block = 0; block < blocks; block++) {
                const uint32_t *all = packed + block * panels * size;
                int64_t pairs = (tokens + 1) / 2 - block * PAIRS;
                for (int64_t row = 0; row < columns && row < (right + 1) * PANEL; row += ROWS)
                    tile(all + row / PANEL * size + row % PANEL, all + right * size,
                         pairs < PAIRS ? pairs : PAIRS, columns - row, columns - right * PANEL,
                         sums + row * columns + right * PANEL, columns);
            }
    }
    free(packed);
    return 1;
}

#endif

/* Adds X^T X of x (tokens, columns) to sums (columns, columns), both row by row: the upper
   triangle; what lies below holds nothing of use. Returns 0, and adds nothing, where the CPU
   lacks the instruction or there is no memory. */
int lowbit_gram(const uint16_t *x, int64_t tokens, int64_t columns, float *sums, int threads)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16"))
        return add(x, tokens, columns, sums, threads);
#endif
    return 0;
}
