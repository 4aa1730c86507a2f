/* Products of a few tokens with bfloat16, 8-bit and 4-bit weights, on CPUs that multiply
   bfloat16 themselves: AVX512-BF16, and AMX for more than a few tokens where there is one.

   Codes stand for numbers that bfloat16 holds exactly, so products are those of the codes with
   the inputs, summed in float32; scales come after them, once a group. */

#include "products.h"
#include "numbers.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FAST __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define TILED \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define FAST_INLINE FAST static ALWAYS_INLINE
#define TILED_INLINE TILED static ALWAYS_INLINE

enum {
    STEP = 32,     /* bfloat16 in a vector, and columns in a tile */
    CHUNK = 8,     /* columns whose 4-bit codes fill one vector for a block of outputs */
    FEW = 8,       /* tokens whose sums stay in registers */
    /* Tokens from which tiles are faster. */
    DENSE_TILES_FROM = 2,
    CODE_TILES_FROM = 3,
    WIDE_FROM = 49, /* tokens for which weights are made tiles of first */
};

/* From here, tiles. Linux gives them to a process that asks (arch/x86/include/uapi/asm). */
enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };

static int has_tiles(void)
{
    static int known = -1;
    if (known < 0)
        known = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-bf16")
                && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return known;
}

int lowbit_has_products(void)
{
    return has_tiles() ? 2 : __builtin_cpu_supports("avx512bf16") != 0;
}

static int takes_tiles(const struct product *product, int64_t count)
{
    int from = product->bits == 16 ? DENSE_TILES_FROM : CODE_TILES_FROM;
    return count >= from && product->group % STEP == 0 && has_tiles();
}

static int is_wide(const struct product *product, int64_t count)
{
    return count >= WIDE_FROM && product->columns % STEP == 0 && has_tiles();
}

int64_t lowbit_inputs_bytes(int64_t count, int64_t columns)
{
    int64_t padded = (count + LANES - 1) / LANES * LANES;
    int64_t tiles = 2 * SPAN * columns * 2, pairs = padded * columns * 2;
    int64_t sums = count * (columns / CHUNK + 1) * 4, most = tiles > pairs ? tiles : pairs;
    return most > sums ? most : sums;
}

/* The pair of columns that begins at `column` of one token. */
static ALWAYS_INLINE uint32_t pair_of(const uint16_t *x, int64_t column)
{
    uint32_t pair;
    memcpy(&pair, x + column, sizeof pair);
    return pair;
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

FAST static void vectors(const struct product *product, const struct inputs *inputs,
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

/* Tiles 0 to 3 are sums of four blocks, tile 4 tokens, the others weights. */
struct __attribute__((packed, aligned(64))) tile_shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
enum { WEIGHTS_TILES = 5, TILES = 8, TILE_ROWS = 16, TILE = TILE_ROWS * LANES };

/* Tiles are full but for tokens and their sums, which may have fewer rows. */
TILED static void shape_tiles(int64_t rows)
{
    struct tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        shapes.rows[tile] = tile < WEIGHTS_TILES ? (uint8_t)rows : TILE_ROWS;
        shapes.bytes[tile] = 64;
    }
    _tile_loadconfig(&shapes);
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

/* Writes a tile (16, 16) of 32-bit elements with its rows as columns, the first `rows` of them;
   strides are in elements. */
FAST static void transpose(const void *tile, int64_t stride, void *out, int64_t out_stride,
                           int64_t rows)
{
    __m512i v[TILE_ROWS], w[TILE_ROWS];
    for (int i = 0; i < TILE_ROWS; i++)
        v[i] = _mm512_loadu_si512((const uint32_t *)tile + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < TILE_ROWS; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILE_ROWS; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    /* v[4 i + j] has, of rows 4 i to 4 i + 3, columns j, 4 + j, 8 + j and 12 + j. */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44);
        __m512i high = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee);
        __m512i more_low = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
        __m512i more_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
        w[j] = _mm512_shuffle_i32x4(low, more_low, 0x88);
        w[4 + j] = _mm512_shuffle_i32x4(low, more_low, 0xdd);
        w[8 + j] = _mm512_shuffle_i32x4(high, more_high, 0x88);
        w[12 + j] = _mm512_shuffle_i32x4(high, more_high, 0xdd);
    }
    for (int64_t i = 0; i < rows; i++)
        _mm512_storeu_si512((uint32_t *)out + i * out_stride, w[i]);
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
            transpose(found + b * TILE, LANES, out + first * SPAN + b * LANES, SPAN,
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
            transpose(w + column, columns / 2, out, LANES, TILE_ROWS);
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

/* Many tokens: weights become tiles once, for all of them. */
TILED static int64_t wide(const struct product *product, const struct inputs *inputs,
                          int64_t first, int64_t block, int64_t blocks, int part, float *out)
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

FAST static void add_bias(const struct product *product, int64_t count, int64_t block,
                          int64_t blocks, float *out)
{
    if (product->bias)
        for (int64_t token = 0; token < count; token++)
            for (int64_t row = 0; row < blocks * LANES; row++)
                out[token * SPAN + row] += load(product->bias, block * LANES + row, 1);
}

TILED int64_t lowbit_span(const struct product *product, const struct inputs *inputs,
                          int64_t first, int64_t block, int64_t blocks, int part, float *out)
{
    int64_t columns = inputs->columns, left = inputs->count - first;
    if (inputs->tiles) {
        int64_t done = wide(product, inputs, first, block, blocks, part, out);
        add_bias(product, done, block, blocks, out);
        return done;
    }
    struct inputs some = {left < MAX_TOKENS ? left : MAX_TOKENS, columns,
                          inputs->x + first * columns, NULL, NULL, NULL};
    if (inputs->sums)
        some.sums = inputs->sums + first * (columns / product->group);
    if (inputs->pairs)
        some.pairs = inputs->pairs + first * columns / 2;
    if (!takes_tiles(product, inputs->count))
        vectors(product, &some, block, blocks, out);
    else if (product->bits == 16)
        tiled_dense(product, &some, block, blocks, out);
    else if (product->bits == 4)
        tiled_codes(product, &some, block, blocks, 4, out);
    else
        tiled_codes(product, &some, block, blocks, 8, out);
    add_bias(product, some.count, block, blocks, out);
    return some.count;
}

TILED static void release_tiles(void)
{
    _tile_release();
}

void lowbit_release(void)
{
    if (has_tiles())
        release_tiles();
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
    int64_t bytes = (lowbit_inputs_bytes(count, columns) + 63) / 64 * 64;
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
