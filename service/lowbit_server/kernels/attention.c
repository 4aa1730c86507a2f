/* Attention of single tokens over the blocks of the KV cache (Kwon et al. 2023), with the rotary
   embedding (Su et al. 2021) before it. Softmax is kept running over the blocks (Milakov and
   Gimelshein 2018). Each head of each token is computed by itself, in one order: who else is
   in the batch, and the number of threads, change no bit. */

#include "attention.h"

#include <math.h>

/* Puts one head of one token's keys and values into the cache. */
static ALWAYS_INLINE void keep(const struct batch *batch, const struct layer *layer,
                               int64_t token, int64_t group, int bf16)
{
    float key[MAX_SIZE];
    int64_t size = batch->size, to = slot(batch, token, group, batch->positions[token]);
    int64_t from = token * layer->values_stride + group * size;
    turn(batch, layer, token, batch->heads + group, bf16, key);
    for (int64_t i = 0; i < size; i++) {
        store(layer->key_pool, to + i, key[i], bf16);
        store(layer->value_pool, to + i, load(layer->values, from + i, bf16), bf16);
    }
}

/* Numbers of one block as float32. */
static ALWAYS_INLINE void widen(const void *pool, int64_t place, int64_t count, int bf16,
                                float *restrict out)
{
    for (int64_t i = 0; i < count; i++)
        out[i] = load(pool, place + i, bf16);
}

static ALWAYS_INLINE float dot(const float *restrict one, const float *restrict other,
                               int64_t size)
{
    float lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            lanes[lane] += one[i + lane] * other[i + lane];
    for (int64_t lane = 0; i + lane < size; lane++)
        lanes[lane] += one[i + lane] * other[i + lane];
    for (int64_t half = LANES / 2; half; half /= 2)
        for (int64_t lane = 0; lane < half; lane++)
            lanes[lane] += lanes[lane + half];
    return lanes[0];
}

/* Weighs the scores of one head for some keys by the softmax so far; returns by how much what
   was found before must shrink. */
static ALWAYS_INLINE float weigh(float *scores, int64_t count, float *most, float *total)
{
    float greatest = *most, sum = 0, shrink;
    for (int64_t seen = 0; seen < count; seen++)
        greatest = scores[seen] > greatest ? scores[seen] : greatest;
    shrink = exponential(*most - greatest);
    for (int64_t seen = 0; seen < count; seen++)
        scores[seen] = exponential(scores[seen] - greatest);
    for (int64_t seen = 0; seen < count; seen++)
        sum += scores[seen];
    *most = greatest;
    *total = *total * shrink + sum;
    return shrink;
}

/* What the queries of one token that share keys find: the next `sharing` heads. */
static ALWAYS_INLINE void attend(const struct batch *batch, const struct layer *layer,
                                 int64_t token, int64_t group, int bf16, int64_t size)
{
    int64_t sharing = batch->heads / batch->groups;
    int64_t last = batch->positions[token], first = 0;
    float query[MAX_SHARING][MAX_SIZE], sums[MAX_SHARING][MAX_SIZE];
    float most[MAX_SHARING], total[MAX_SHARING], weights[BLOCK_TOKENS];
    float keys[BLOCK_TOKENS * MAX_SIZE], values[BLOCK_TOKENS * MAX_SIZE];
    float scale = 1.0f / sqrtf((float)size);
    if (layer->window && last >= layer->window)
        first = last - layer->window + 1;
    for (int64_t head = 0; head < sharing; head++) {
        turn(batch, layer, token, group * sharing + head, bf16, query[head]);
        most[head] = -1e30f;
        total[head] = 0;
        for (int64_t i = 0; i < size; i++) {
            query[head][i] *= scale;
            sums[head][i] = 0;
        }
    }
    for (int64_t start = first, count; start <= last; start += count) {
        int64_t end = (start / BLOCK_TOKENS + 1) * BLOCK_TOKENS;
        int64_t place = slot(batch, token, group, start);
        count = (end <= last + 1 ? end : last + 1) - start;
        widen(layer->key_pool, place, count * size, bf16, keys);
        widen(layer->value_pool, place, count * size, bf16, values);
        for (int64_t head = 0; head < sharing; head++) {
            float shrink, sum[MAX_SIZE];
            for (int64_t seen = 0; seen < count; seen++)
                weights[seen] = dot(query[head], keys + seen * size, size);
            shrink = weigh(weights, count, most + head, total + head);
            for (int64_t i = 0; i < size; i++)
                sum[i] = sums[head][i] * shrink;
            for (int64_t seen = 0; seen < count; seen++)
                for (int64_t i = 0; i < size; i++)
                    sum[i] += weights[seen] * values[seen * size + i];
            for (int64_t i = 0; i < size; i++)
                sums[head][i] = sum[i];
        }
    }
    int64_t to = (token * batch->heads + group * sharing) * size;
    for (int64_t head = 0; head < sharing; head++)
        for (int64_t i = 0; i < size; i++)
            store(layer->out, to + head * size + i, sums[head][i] / total[head], bf16);
}

/* With the usual sizes of heads as constants. */
static ALWAYS_INLINE void attend_sized(const struct batch *batch, const struct layer *layer,
                                       int64_t token, int64_t group, int bf16)
{
    if (batch->size == 64)
        attend(batch, layer, token, group, bf16, 64);
    else if (batch->size == 128)
        attend(batch, layer, token, group, bf16, 128);
    else
        attend(batch, layer, token, group, bf16, batch->size);
}

MULTIVERSION static void keep_any(const struct batch *batch, const struct layer *layer,
                                  int64_t token, int64_t group)
{
    if (batch->is_bf16)
        keep(batch, layer, token, group, 1);
    else
        keep(batch, layer, token, group, 0);
}

MULTIVERSION static void attend_any(const struct batch *batch, const struct layer *layer,
                                    int64_t token, int64_t group)
{
    if (batch->is_bf16)
        attend_sized(batch, layer, token, group, 1);
    else
        attend_sized(batch, layer, token, group, 0);
}

void lowbit_attend_together(const struct batch *batch, const struct layer *layer)
{
    int64_t groups = batch->groups;
    /* All keys first: several tokens may be of one sequence. */
#pragma omp for schedule(static)
    for (int64_t task = 0; task < batch->tokens * groups; task++)
        keep_any(batch, layer, task / groups, task % groups);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < batch->span_count * groups; task++) {
        const struct span *span = batch->spans + task / groups;
        if (span->count > 0)
            lowbit_attend_by_tiles(batch, layer, span, task % groups);
        else
            attend_any(batch, layer, span->first / (batch->heads / groups), task % groups);
    }
}

void lowbit_attend(const struct batch *batch, const struct layer *layer)
{
#pragma omp parallel num_threads(batch->threads)
    lowbit_attend_together(batch, layer);
}
