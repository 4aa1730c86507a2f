/* Products of a few and of many tokens by tiles (AMX). */

#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

/* Linux gives tiles to a process that asks (arch/x86/include/uapi/asm). */
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

int lowbit_has_tiles(void)
{
    static int known = -1;
    if (known < 0)
        known = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16")
                && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return known;
}

#define ZERO_TILES() \
    do { \
        _tile_zero(0); \
        _tile_zero(1); \
        _tile_zero(2); \
        _tile_zero(3); \
    } while (0)
#define STORE_TILES(to) \
    do { \
        _tile_stored(0, to, 64); \
        _tile_stored(1, to + TILE, 64); \
        _tile_stored(2, to + 2 * TILE, 64); \
        _tile_stored(3, to + 3 * TILE, 64); \
    } while (0)

/* Four blocks of codes, of which `blocks` exist, by tiles (tokens, outputs). */
TILED_INLINE void tiled_codes(const struct product *product, const struct inputs *inputs,
                              int64_t block, int64_t blocks, const int bits, float *out)
{
    enum { MOST = 4 }; /* steps whose weights stay decoded in the first cache */
    static const int64_t line = 64;
    __attribute__((aligned(64))) uint32_t weights[SPAN_BLOCKS][MOST][TILE];
    __attribute__((aligned(64))) float found[SPAN_BLOCKS * TILE];
    int64_t columns = product->columns, group = product->group, count = inputs->count;
    int64_t rows = count < TILE_ROWS ? count : TILE_ROWS;
    __m512i table = table_of(product);
    memset(out, 0, count * SPAN * sizeof *out);
    shape_tiles(rows);
    for (int64_t start = 0, steps; start < columns; start += steps * STEP) {
        int64_t left = (group - start % group) / STEP;
        int first_of_group = start % group == 0;
        steps = left < MOST ? left : MOST;
        for (int64_t b = 0; b < blocks; b++)
            for (int64_t column = 0; column < steps * STEP; column += CHUNK) {
                __m512i pairs[CHUNK / 2];
                uint32_t *to = weights[b][column / STEP] + column % STEP / 2 * LANES;
                decode(product, table, block + b, start + column, bits, pairs);
#pragma GCC unroll 4
                for (int pair = 0; pair < CHUNK / 2; pair++)
                    _mm512_store_si512(to + pair * LANES, pairs[pair]);
            }
        /* The last tokens share a full tile with some that are done. */
        for (int64_t done = 0; done < count; done += TILE_ROWS) {
            int64_t first = done + rows <= count ? done : count - rows;
            const uint16_t *x = inputs->x + first * columns + start;
            ZERO_TILES();
            for (int64_t step = 0; step < steps; step++) {
                _tile_loadd(4, x + step * STEP, columns * 2);
                _tile_loadd(5, weights[0][step], line);
                _tile_dpbf16ps(0, 4, 5);
                _tile_loadd(6, weights[1][step], line);
                _tile_dpbf16ps(1, 4, 6);
                _tile_loadd(7, weights[2][step], line);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, weights[3][step], line);
                _tile_dpbf16ps(3, 4, 5);
            }
            STORE_TILES(found);
            for (int64_t b = 0; b < blocks; b++) {
                struct grid grid = grid_of(product, start / group, block + b);
                for (int64_t token = done; token < first + rows; token++) {
                    float *to = out + token * SPAN + b * LANES;
                    __m512 sum = _mm512_load_ps(found + b * TILE + (token - first) * LANES);
                    const float *inside = inside_of(product, inputs, token, start / group);
                    sum = scaled(grid, first_of_group ? inside : NULL, sum, _mm512_loadu_ps(to));
                    _mm512_storeu_ps(to, sum);
                }
            }
        }
    }
}

/* Four blocks of bfloat16, of which `blocks` exist, by tiles (outputs, tokens). */
TILED static void tiled_dense(const struct product *product, const struct inputs *inputs,
                              int64_t block, int64_t blocks, float *out)
{
    __attribute__((aligned(64))) float found[SPAN_BLOCKS * TILE];
    int64_t columns = product->columns, stride = columns * 2;
    const uint16_t *w[SPAN_BLOCKS];
    for (int64_t b = 0; b < SPAN_BLOCKS; b++)
        w[b] = (const uint16_t *)product->weights
               + (block + (b < blocks ? b : 0)) * LANES * columns;
    shape_tiles(TILE_ROWS);
    for (int64_t first = 0; first < inputs->count; first += TILE_ROWS) {
        const uint32_t *pairs = inputs->pairs + first * columns / 2;
        int64_t left = inputs->count - first;
        ZERO_TILES();
        for (int64_t column = 0; column < columns; column += STEP) {
            _tile_loadd(4, pairs + column / 2 * LANES, 64);
            _tile_loadd(5, w[0] + column, stride);
            _tile_dpbf16ps(0, 5, 4);
            _tile_loadd(6, w[1] + column, stride);
            _tile_dpbf16ps(1, 6, 4);
            _tile_loadd(7, w[2] + column, stride);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(5, w[3] + column, stride);
            _tile_dpbf16ps(3, 5, 4);
        }
        STORE_TILES(found);
        for (int64_t b = 0; b < blocks; b++)
            lowbit_transpose(found + b * TILE, LANES, out + first * SPAN + b * LANES, SPAN,
                      left < TILE_ROWS ? left : TILE_ROWS);
    }
}

/* Tiles of the weights of some blocks for all columns, (blocks, steps, TILE), as they are or
   rounded to bfloat16 once. */
FAST static void dense_tiles(const struct product *product, int64_t block, int64_t blocks,
                             uint32_t *out)
{
    int64_t columns = product->columns;
    const uint16_t *w = (const uint16_t *)product->weights + block * LANES * columns;
    for (int64_t b = 0; b < blocks; b++, w += LANES * columns)
        for (int64_t column = 0; column < columns; column += STEP, out += TILE)
            lowbit_transpose(w + column, columns / 2, out, LANES, TILE_ROWS);
}

FAST static void code_tiles(const struct product *product, int64_t block, int64_t blocks,
                            uint32_t *out)
{
    __m512i table = table_of(product), pairs[CHUNK / 2];
    for (int64_t b = block; b < block + blocks; b++)
        for (int64_t column = 0; column < product->columns; column += CHUNK) {
            struct grid grid = grid_of(product, column / product->group, b);
            decode_any(product, table, b, column, pairs);
#pragma GCC unroll 4
            for (int pair = 0; pair < CHUNK / 2; pair++, out += LANES) {
                __m256i even, odd;
                weights_of(grid, pairs[pair], &even, &odd);
                _mm512_store_si512(
                    out, _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
            }
        }
}

/* 32 tokens times two blocks of tiles: float32 (32, SPAN). */
TILED static void wide_pair(const uint16_t *x, int64_t columns, const uint32_t *weights,
                            float *out)
{
    const uint16_t *more = x + TILE_ROWS * columns;
    const uint32_t *next = weights + columns / STEP * TILE;
    ZERO_TILES();
    for (int64_t column = 0; column < columns; column += STEP, weights += TILE, next += TILE) {
        _tile_loadd(4, x + column, columns * 2);
        _tile_loadd(5, more + column, columns * 2);
        _tile_loadd(6, weights, 64);
        _tile_loadd(7, next, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, out, SPAN * 4);
    _tile_stored(1, out + LANES, SPAN * 4);
    _tile_stored(2, out + TILE_ROWS * SPAN, SPAN * 4);
    _tile_stored(3, out + TILE_ROWS * SPAN + LANES, SPAN * 4);
}

TILED int64_t lowbit_by_wide_tiles(const struct product *product, const struct inputs *inputs,
                                   int64_t first, int64_t block, int64_t blocks, int part,
                                   float *out)
{
    int64_t columns = inputs->columns, left = inputs->count - first;
    uint32_t *tiles = inputs->tiles + part * SPAN * columns / 2;
    /* The last tokens share full tiles with some that are done. */
    int64_t from = left < MAX_TOKENS ? inputs->count - MAX_TOKENS : first;
    if (first == 0 && product->bits == 16)
        dense_tiles(product, block, blocks, tiles);
    else if (first == 0)
        code_tiles(product, block, blocks, tiles);
    shape_tiles(TILE_ROWS);
    for (int64_t b = 0; b < blocks; b += 2)
        wide_pair(inputs->x + from * columns, columns, tiles + b * columns / STEP * TILE,
                  out + b * LANES);
    if (from < first)
        memmove(out, out + (first - from) * SPAN, left * SPAN * sizeof *out);
    return left < MAX_TOKENS ? left : MAX_TOKENS;
}

TILED void lowbit_by_tiles(const struct product *product, const struct inputs *inputs,
                           int64_t block, int64_t blocks, float *out)
{
    if (product->bits == 16)
        tiled_dense(product, inputs, block, blocks, out);
    else if (product->bits == 4)
        tiled_codes(product, inputs, block, blocks, 4, out);
    else
        tiled_codes(product, inputs, block, blocks, 8, out);
}

TILED static void release_tiles(void)
{
    _tile_release();
}

void lowbit_release(void)
{
    if (lowbit_has_tiles())
        release_tiles();
}

#endif
