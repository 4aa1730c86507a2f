/* Products of tokens with bfloat16, 8-bit and 4-bit weights, on CPUs that multiply bfloat16
   themselves: AVX512-BF16, and AMX for more than a few tokens where there is one.

   Codes stand for numbers that bfloat16 holds exactly, so products are those of the codes with
   the inputs, summed in float32; scales come after them, once a group. Only with many tokens
   weights are rounded first. */

#include "products.h"
#include "weights.h"

#if defined(__x86_64__) && defined(__linux__)

#include <stdlib.h>

/* Tokens from which tiles are faster than vectors, and are made of all weights first. */
enum { DENSE_TILES_FROM = 2, CODE_TILES_FROM = 3, WIDE_FROM = 49 };

int lowbit_has_products(void)
{
    return lowbit_has_tiles() ? 2 : __builtin_cpu_supports("avx512bf16") != 0;
}

static int takes_tiles(const struct product *product, int64_t count)
{
    int from = product->bits == 16 ? DENSE_TILES_FROM : CODE_TILES_FROM;
    return count >= from && product->group % STEP == 0 && lowbit_has_tiles();
}

static int is_wide(const struct product *product, int64_t count)
{
    return count >= WIDE_FROM && product->columns % STEP == 0 && lowbit_has_tiles();
}

int64_t lowbit_inputs_bytes(int64_t count, int64_t columns)
{
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    int64_t tiles = 2 * SPAN * columns * 2, pairs = padded * columns * 2;
    int64_t sums = count * (columns / CHUNK + 1) * 4, most = tiles > pairs ? tiles : pairs;
    return most > sums ? most : sums;
}

FAST void lowbit_prepare(const struct product *product, int64_t count, const uint16_t *x,
                         void *memory, struct inputs *inputs)
{
    int64_t columns = product->columns, group = product->group;
    *inputs = (struct inputs){count, columns, x, NULL, NULL, NULL};
    if (is_wide(product, count)) {
        inputs->tiles = memory;
        return;
    }
    if (product->bits == 16 && takes_tiles(product, count)) {
        inputs->pairs = memory;
        for (int64_t first = 0; first < count; first += LANES)
            for (int64_t token = 0; token < LANES; token++) {
                uint32_t *to = inputs->pairs + first * columns / 2 + token;
                const uint16_t *from = x + (first + token) * columns;
                for (int64_t pair = 0; pair < columns / 2; pair++)
                    to[pair * LANES] = first + token < count ? pair_of(from, 2 * pair) : 0;
            }
    }
    if (product->points) {
        inputs->sums = memory;
        for (int64_t token = 0; token < count; token++)
            for (int64_t first = 0; first < columns; first += group) {
                const uint16_t *from = x + token * columns + first;
                __m512 sum = _mm512_setzero_ps();
                for (int64_t column = 0; column < group; column += LANES) {
                    int64_t left = group - column;
                    __mmask16 mask = left >= LANES ? 0xffff : (1u << left) - 1;
                    __m512i wide =
                        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + column));
                    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
                }
                inputs->sums[token * (columns / group) + first / group] =
                    _mm512_reduce_add_ps(sum);
            }
    }
}

FAST static void add_bias(const struct product *product, int64_t count, int64_t block,
                          int64_t blocks, float *out)
{
    if (product->bias)
        for (int64_t token = 0; token < count; token++)
            for (int64_t row = 0; row < blocks * LANES; row++)
                out[token * SPAN + row] += load(product->bias, block * LANES + row, 1);
}

int64_t lowbit_span(const struct product *product, const struct inputs *inputs, int64_t first,
                    int64_t block, int64_t blocks, int part, float *out)
{
    int64_t columns = inputs->columns, left = inputs->count - first;
    if (inputs->tiles) {
        int64_t done =
            lowbit_by_wide_tiles(product, inputs, first, block, blocks, part, out);
        add_bias(product, done, block, blocks, out);
        return done;
    }
    struct inputs some = {left < MAX_TOKENS ? left : MAX_TOKENS, columns,
                          inputs->x + first * columns, NULL, NULL, NULL};
    if (inputs->sums)
        some.sums = inputs->sums + first * (columns / product->group);
    if (inputs->pairs)
        some.pairs = inputs->pairs + first * columns / 2;
    if (takes_tiles(product, inputs->count))
        lowbit_by_tiles(product, &some, block, blocks, out);
    else
        lowbit_by_vectors(product, &some, block, blocks, out);
    add_bias(product, some.count, block, blocks, out);
    return some.count;
}

/* Writes the weights that codes stand for, bfloat16 (columns, rows), each rounded once. */
FAST int lowbit_unpack(const struct product *product, uint16_t *out, int64_t threads)
{
    int64_t columns = product->columns, rows = product->rows;
#pragma omp parallel for num_threads(threads)
    for (int64_t block = 0; block < rows / LANES; block++) {
        __m512i table = table_of(product), pairs[CHUNK / 2];
        for (int64_t column = 0; column < columns; column += CHUNK) {
            struct grid grid = grid_of(product, column / product->group, block);
            decode_any(product, table, block, column, pairs);
            for (int pair = 0; pair < CHUNK / 2; pair++) {
                uint16_t *to = out + (column + 2 * pair) * rows + block * LANES;
                weights_of(grid, pairs[pair], (__m256i *)to, (__m256i *)(to + rows));
            }
        }
    }
    return 1;
}

/* Writes y (count, rows) of x (count, columns), both bfloat16. Returns 0 without memory. */
FAST int lowbit_product(const struct product *product, int64_t count, const uint16_t *x,
                        uint16_t *out, int64_t threads)
{
    int64_t columns = product->columns, rows = product->rows;
    int64_t bytes = aligned(lowbit_inputs_bytes(count, columns));
    char *memory = aligned_alloc(64, bytes * threads);
    if (!memory)
        return 0;
#pragma omp parallel num_threads(threads)
    {
        struct part part = lowbit_part(rows / LANES);
        float found[MAX_TOKENS * SPAN];
        struct inputs inputs;
        lowbit_prepare(product, count, x, memory + omp_get_thread_num() * bytes, &inputs);
        for (int64_t block = part.first, next; block < part.end; block = next) {
            next = lowbit_next(part, block);
            for (int64_t first = 0, done; first < count; first += done) {
                done = lowbit_span(product, &inputs, first, block, next - block, 0, found);
                for (int64_t token = 0; token < done; token++) {
                    uint16_t *to = out + (first + token) * rows + block * LANES;
                    for (int64_t row = 0; row < (next - block) * LANES; row++)
                        to[row] = to_bf16(found[token * SPAN + row]);
                }
            }
        }
        lowbit_release();
    }
    free(memory);
    return 1;
}

#else

int lowbit_has_products(void)
{
    return 0;
}

#endif
