/* Attention of single tokens over the blocks of the KV cache (Kwon et al. 2023), with the rotary
   embedding (Su et al. 2021) before it. Softmax is kept running over the blocks (Milakov and
   Gimelshein 2018). Each head of each token is computed by itself, in one order: who else is
   in the batch, and the number of threads, change no bit. */

#include "numbers.h"

#include <math.h>

/* What `kernels/attention.py` lets through. */
enum { BLOCK_TOKENS = 32, MAX_SIZE = 256, MAX_SHARING = 16 };

/* What all layers share in one forward pass; `kernels/attention.py` has the same fields. */
struct batch {
    int64_t tokens, heads, groups, size, table_blocks, is_bf16, threads;
    const int64_t *positions; /* (tokens) in their sequences */
    const int64_t *rows;      /* (tokens) which table is theirs */
    const int64_t *tables;    /* (rows, table_blocks) */
    const void *cosine, *sine; /* (tokens, size) */
};

/* One layer: heads (tokens, heads + groups, size) of queries and keys and (tokens, groups, size)
   of values, strides in elements between tokens; pools (blocks, groups, BLOCK_TOKENS, size). */
struct layer {
    const void *turned, *values;
    int64_t turned_stride, values_stride;
    void *key_pool, *value_pool, *out;
    int64_t window, rotary; /* a window of 0 sees everything */
};

/* Turns one head to the angle of its token, rounded as the products and sums of tensors are. */
static ALWAYS_INLINE void turn(const struct batch *batch, const struct layer *layer,
                               int64_t token, int64_t head, int bf16, float *restrict out)
{
    int64_t size = batch->size, half = size / 2, table = token * size;
    int64_t from = token * layer->turned_stride + head * size;
    if (!layer->rotary) {
        for (int64_t i = 0; i < size; i++)
            out[i] = load(layer->turned, from + i, bf16);
        return;
    }
    for (int64_t i = 0; i < half; i++) {
        float low = load(layer->turned, from + i, bf16);
        float high = load(layer->turned, from + half + i, bf16);
        out[i] = rounded(rounded(high * load(batch->sine, table + i, bf16), bf16)
                             + rounded(low * load(batch->cosine, table + i, bf16), bf16), bf16);
        out[half + i] =
            rounded(rounded(low * load(batch->sine, table + half + i, bf16), bf16)
                        + rounded(high * load(batch->cosine, table + half + i, bf16), bf16), bf16);
    }
}

static ALWAYS_INLINE int64_t slot(const struct batch *batch, int64_t token, int64_t group,
                                  int64_t position)
{
    const int64_t *table = batch->tables + batch->rows[token] * batch->table_blocks;
    int64_t block = table[position / BLOCK_TOKENS];
    return ((block * batch->groups + group) * BLOCK_TOKENS + position % BLOCK_TOKENS)
           * batch->size;
}

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

/* What the queries of one token that share keys find: the next `sharing` heads. */
static ALWAYS_INLINE void attend(const struct batch *batch, const struct layer *layer,
                                 int64_t token, int64_t group, int bf16)
{
    int64_t size = batch->size, sharing = batch->heads / batch->groups;
    int64_t last = batch->positions[token], first = 0;
    float query[MAX_SHARING][MAX_SIZE], sums[MAX_SHARING][MAX_SIZE];
    float most[MAX_SHARING], total[MAX_SHARING], weights[MAX_SHARING][BLOCK_TOKENS];
    float one[MAX_SIZE], scale = 1.0f / sqrtf((float)size);
    if (layer->window && last >= layer->window)
        first = last - layer->window + 1;
    for (int64_t head = 0; head < sharing; head++) {
        turn(batch, layer, token, group * sharing + head, bf16, query[head]);
        most[head] = -INFINITY;
        total[head] = 0;
        for (int64_t i = 0; i < size; i++) {
            query[head][i] *= scale;
            sums[head][i] = 0;
        }
    }
    for (int64_t start = first; start <= last;) {
        int64_t end = (start / BLOCK_TOKENS + 1) * BLOCK_TOKENS;
        int64_t count = (end <= last + 1 ? end : last + 1) - start;
        int64_t place = slot(batch, token, group, start);
        for (int64_t seen = 0; seen < count; seen++) {
            for (int64_t i = 0; i < size; i++)
                one[i] = load(layer->key_pool, place + seen * size + i, bf16);
            for (int64_t head = 0; head < sharing; head++) {
                float score = 0;
#pragma omp simd reduction(+ : score)
                for (int64_t i = 0; i < size; i++)
                    score += query[head][i] * one[i];
                weights[head][seen] = score;
            }
        }
        for (int64_t head = 0; head < sharing; head++) {
            float greatest = most[head], sum = 0, shrink;
#pragma omp simd reduction(max : greatest)
            for (int64_t seen = 0; seen < count; seen++)
                greatest = weights[head][seen] > greatest ? weights[head][seen] : greatest;
            shrink = exponential(most[head] - greatest);
            most[head] = greatest;
#pragma omp simd reduction(+ : sum)
            for (int64_t seen = 0; seen < count; seen++) {
                weights[head][seen] = exponential(weights[head][seen] - greatest);
                sum += weights[head][seen];
            }
            total[head] = total[head] * shrink + sum;
            for (int64_t i = 0; i < size; i++)
                sums[head][i] *= shrink;
        }
        for (int64_t seen = 0; seen < count; seen++) {
            for (int64_t i = 0; i < size; i++)
                one[i] = load(layer->value_pool, place + seen * size + i, bf16);
            for (int64_t head = 0; head < sharing; head++) {
                float weight = weights[head][seen];
                for (int64_t i = 0; i < size; i++)
                    sums[head][i] += weight * one[i];
            }
        }
        start += count;
    }
    int64_t to = (token * batch->heads + group * sharing) * size;
    for (int64_t head = 0; head < sharing; head++)
        for (int64_t i = 0; i < size; i++)
            store(layer->out, to + head * size + i, sums[head][i] / total[head], bf16);
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
        attend(batch, layer, token, group, 1);
    else
        attend(batch, layer, token, group, 0);
}

void lowbit_attend(const struct batch *batch, const struct layer *layer)
{
    int64_t groups = batch->groups, tasks = batch->tokens * groups;
#pragma omp parallel num_threads(batch->threads)
    {
        /* All keys first: several tokens may be of one sequence. */
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++)
            keep_any(batch, layer, task / groups, task % groups);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; task++)
            attend_any(batch, layer, task / groups, task % groups);
    }
}
