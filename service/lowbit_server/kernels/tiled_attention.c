/* Attention of the tokens of a prompt by tiles (AMX), over the blocks of the KV cache. As in
   FlashAttention (Dao et al. 2022) no score is ever kept: softmax is running over chunks of keys.

   Scores are computed with keys as rows and queries as columns: keys are tiles as they lie in
   the cache, and a vector has one key's scores of 16 queries. A query's result depends on nothing
   but its place, since chunks begin at the same keys for all: who else is in its span, and where
   a chunk of the prompt began, change no bit. */

#include "attention.h"
#include "tiles.h"

#if defined(__x86_64__) && defined(__linux__)

#include <math.h>

enum {
    KEYS = 64, /* of a chunk: with their values they stay in the first cache */
    CHUNK_BLOCKS = KEYS / BLOCK_TOKENS,
    MAX_QUERIES = SPAN_NUMBERS / STEP,
};
static const float NEVER = -1e30f; /* the score of what is hidden */

/* What a thread keeps of one span and of one chunk of keys. */
struct working {
    __attribute__((aligned(64))) uint32_t queries[SPAN_NUMBERS / 2]; /* tiles (pairs, queries) */
    __attribute__((aligned(64))) float sums[SPAN_NUMBERS];           /* (queries, size) */
    __attribute__((aligned(64))) uint32_t values[KEYS / 2 * MAX_SIZE]; /* tiles (pairs, numbers) */
    __attribute__((aligned(64))) float scores[KEYS * LANES];         /* (keys, queries) */
    __attribute__((aligned(64))) uint32_t pairs[TILE], weights[CHUNK_BLOCKS * TILE];
    float most[MAX_QUERIES], total[MAX_QUERIES];
    int32_t last[MAX_QUERIES]; /* keys that queries see, the last one and the one before the first */
    int32_t before[MAX_QUERIES];
};

/* Takes the next 16 queries as tiles, with zeros behind the last one of the span. */
TILED static void take_queries(const struct batch *batch, const struct layer *layer,
                               const struct span *span, int64_t group, int64_t from,
                               struct working *work)
{
    __attribute__((aligned(64))) uint16_t rows[LANES * MAX_SIZE] = {0};
    int64_t sharing = batch->heads / batch->groups, size = batch->size;
    for (int64_t query = from; query < from + LANES; query++) {
        int64_t row = span->first + (query < span->count ? query : span->count - 1);
        int64_t token = row / sharing;
        float turned[MAX_SIZE];
        work->most[query] = NEVER;
        work->total[query] = 0;
        work->last[query] = (int32_t)batch->positions[token];
        work->before[query] = layer->window ? work->last[query] - (int32_t)layer->window : -1;
        if (query >= span->count)
            continue;
        turn(batch, layer, token, group * sharing + row % sharing, 1, turned);
        for (int64_t i = 0; i < size; i++)
            store(rows, (query - from) * size + i, turned[i], 1);
    }
    for (int64_t step = 0; step < size / STEP; step++)
        lowbit_transpose(rows + step * STEP, size / 2,
                         work->queries + from * size / 2 + step * TILE, LANES, LANES);
    memset(work->sums + from * size, 0, LANES * size * sizeof(float));
}

/* The values of a block, of which `count` are there, as tiles: two keys side by side. */
TILED static void take_values(const uint16_t *pool, int64_t count, int64_t size, uint32_t *out)
{
    static const uint16_t interleaved[2][STEP] = {
        {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63},
    };
    __m512i low = _mm512_loadu_si512(interleaved[0]), high = _mm512_loadu_si512(interleaved[1]);
    for (int64_t pair = 0; pair < BLOCK_TOKENS / 2; pair++)
        for (int64_t step = 0; step < size / STEP; step++) {
            const uint16_t *from = pool + 2 * pair * size + step * STEP;
            uint32_t *to = out + step * 2 * TILE + pair * LANES;
            /* Zeros behind the last: what was there before may be no numbers. */
            __mmask32 one = 2 * pair < count ? ~0u : 0, other = 2 * pair + 1 < count ? ~0u : 0;
            __m512i even = _mm512_maskz_loadu_epi16(one, from);
            __m512i odd = _mm512_maskz_loadu_epi16(other, from + size);
            _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
            _mm512_store_si512(to + TILE, _mm512_permutex2var_epi16(even, high, odd));
        }
}

/* Scores of one block for 16 queries. */
TILED_INLINE void score(const uint16_t *keys, const uint32_t *queries, int64_t size, float *scores)
{
    const uint16_t *more = keys + LANES * size;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < size / STEP; step++) {
        _tile_loadd(2, queries + step * TILE, 64);
        _tile_loadd(3, keys + step * STEP, size * 2);
        _tile_loadd(4, more + step * STEP, size * 2);
        _tile_dpbf16ps(0, 3, 2);
        _tile_dpbf16ps(1, 4, 2);
    }
    _tile_stored(0, scores, 64);
    _tile_stored(1, scores + TILE, 64);
}

/* All bits set where a query sees the key at a place, none where it does not. As a number, since
   compilers make a branch of a choice. */
static ALWAYS_INLINE uint32_t seen(int32_t place, int32_t last, int32_t before)
{
    return (uint32_t)((last - place) >> 31 | (place - before - 1) >> 31) ^ ~0u;
}

/* Two keys' weights side by side, rounded to bfloat16. */
TILED_INLINE __m512i paired(const float *even, const float *odd)
{
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(even)));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(odd)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

/* Makes weights of the scores of 16 queries from `from` on for the keys from `start` on, as
   tiles, and shrinks what was found before. */
TILED_INLINE void weigh(struct working *work, int64_t from, int64_t start, int64_t blocks,
                        int64_t size, float scale, const int some_hidden)
{
    float *most = work->most + from, *total = work->total + from, *scores = work->scores;
    const int32_t *last = work->last + from, *before = work->before + from;
    float greatest[LANES], sum[LANES] = {0}, shrink[LANES];
    __attribute__((aligned(64))) float even[LANES], odd[LANES];
    uint32_t grown = 0;
    for (int64_t lane = 0; lane < LANES; lane++)
        greatest[lane] = NEVER;
    for (int64_t key = 0; key < blocks * BLOCK_TOKENS; key++)
#pragma omp simd
        for (int64_t lane = 0; lane < LANES; lane++) {
            float one = scores[key * LANES + lane];
            if (some_hidden) {
                one = seen((int32_t)(start + key), last[lane], before[lane]) ? one : NEVER;
                scores[key * LANES + lane] = one;
            }
            greatest[lane] = one > greatest[lane] ? one : greatest[lane];
        }
#pragma omp simd reduction(| : grown)
    for (int64_t lane = 0; lane < LANES; lane++) {
        float scaled = greatest[lane] * scale;
        greatest[lane] = scaled > most[lane] ? scaled : most[lane];
        shrink[lane] = exponential(most[lane] - greatest[lane]);
        grown |= to_bits(most[lane]) ^ to_bits(greatest[lane]);
        most[lane] = greatest[lane];
    }
    for (int64_t lane = 0; grown && lane < LANES; lane++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++)
            work->sums[(from + lane) * size + i] *= shrink[lane];
    for (int64_t block = 0; block < blocks; block++) {
        for (int64_t pair = 0; pair < BLOCK_TOKENS / 2; pair++) {
            const float *score = scores + (block * BLOCK_TOKENS + 2 * pair) * LANES;
            int32_t place = (int32_t)(start + block * BLOCK_TOKENS + 2 * pair);
#pragma omp simd
            for (int64_t lane = 0; lane < LANES; lane++) {
                float one = exponential(score[lane] * scale - greatest[lane]);
                float other = exponential(score[LANES + lane] * scale - greatest[lane]);
                if (some_hidden) { /* of a query that has seen nothing yet nothing counts */
                    one = from_bits(to_bits(one) & seen(place, last[lane], before[lane]));
                    other = from_bits(to_bits(other) & seen(place + 1, last[lane], before[lane]));
                }
                even[lane] = one;
                odd[lane] = other;
                sum[lane] += one + other;
            }
            _mm512_store_si512(work->pairs + pair * LANES, paired(even, odd));
        }
        lowbit_transpose(work->pairs, LANES, work->weights + block * TILE, LANES, LANES);
    }
#pragma omp simd
    for (int64_t lane = 0; lane < LANES; lane++)
        total[lane] = total[lane] * shrink[lane] + sum[lane];
}

/* Adds values, weighted, to the sums of 16 queries. */
TILED_INLINE void add_values(const struct working *work, int64_t blocks, int64_t size, float *sums)
{
    for (int64_t step = 0; step < size / STEP; step++) {
        float *to = sums + step * STEP;
        _tile_loadd(0, to, size * 4);
        _tile_loadd(1, to + LANES, size * 4);
        for (int64_t block = 0; block < blocks; block++) {
            const uint32_t *values = work->values + (block * size / LANES + 2 * step) * TILE;
            _tile_loadd(2, work->weights + block * TILE, 64);
            _tile_loadd(3, values, 64);
            _tile_loadd(4, values + TILE, 64);
            _tile_dpbf16ps(0, 2, 3);
            _tile_dpbf16ps(1, 2, 4);
        }
        _tile_stored(0, to, size * 4);
        _tile_stored(1, to + LANES, size * 4);
    }
}

TILED_INLINE void attend(const struct batch *batch, const struct layer *layer,
                         const struct span *span, int64_t group, int64_t size)
{
    struct working work;
    int64_t sharing = batch->heads / batch->groups, queries = span->count;
    int64_t token = span->first / sharing, first = batch->positions[token];
    int64_t last = batch->positions[(span->first + queries - 1) / sharing];
    float scale = 1.0f / sqrtf((float)size);
    for (int64_t from = 0; from < queries; from += LANES)
        take_queries(batch, layer, span, group, from, &work);
    first = layer->window && first >= layer->window ? first - layer->window + 1 : 0;
    for (int64_t start = first / KEYS * KEYS; start <= last; start += KEYS) {
        int64_t left = last + 1 - start, places[CHUNK_BLOCKS];
        int64_t blocks = left < KEYS ? (left + BLOCK_TOKENS - 1) / BLOCK_TOKENS : CHUNK_BLOCKS;
        for (int64_t block = 0; block < blocks; block++, left -= BLOCK_TOKENS) {
            places[block] = slot(batch, token, group, start + block * BLOCK_TOKENS);
            take_values((const uint16_t *)layer->value_pool + places[block], left, size,
                        work.values + block * size / LANES * TILE);
        }
        for (int64_t from = 0; from < queries; from += LANES) {
            /* The positions of queries grow. */
            int32_t sees = work.last[from + LANES - 1], end = (int32_t)(start + blocks * BLOCK_TOKENS);
            if (sees < start || work.before[from] >= end - 1)
                continue;
            for (int64_t block = 0; block < blocks; block++)
                score((const uint16_t *)layer->key_pool + places[block],
                      work.queries + from * size / 2, size,
                      work.scores + block * BLOCK_TOKENS * LANES);
            if (work.last[from] >= end - 1 && work.before[from + LANES - 1] < start)
                weigh(&work, from, start, blocks, size, scale, 0);
            else
                weigh(&work, from, start, blocks, size, scale, 1);
            add_values(&work, blocks, size, work.sums + from * size);
        }
    }
    for (int64_t query = 0; query < queries; query++) {
        int64_t row = span->first + query, head = group * sharing + row % sharing;
        int64_t to = (row / sharing * batch->heads + head) * size;
        float share = 1 / work.total[query];
        for (int64_t i = 0; i < size; i++)
            store(layer->out, to + i, work.sums[query * size + i] * share, 1);
    }
}

TILED void lowbit_attend_by_tiles(const struct batch *batch, const struct layer *layer,
                                  const struct span *span, int64_t group)
{
    shape_tiles(TILE_ROWS);
    if (batch->size == 64)
        attend(batch, layer, span, group, 64);
    else if (batch->size == 128)
        attend(batch, layer, span, group, 128);
    else
        attend(batch, layer, span, group, batch->size);
}

#else

void lowbit_attend_by_tiles(const struct batch *batch, const struct layer *layer,
                            const struct span *span, int64_t group)
{
}

#endif
