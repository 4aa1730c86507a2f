/* Attention over the blocks of the KV cache. */

#ifndef LOWBIT_ATTENTION_H
#define LOWBIT_ATTENTION_H

#include "numbers.h"

#include <stdint.h>

/* What `kernels/attention.py` lets through. SPAN_NUMBERS are those of the queries of a span that
   share keys. */
enum { BLOCK_TOKENS = 32, MAX_SIZE = 256, MAX_SHARING = 16, SPAN_NUMBERS = 8192 };

/* Queries that are computed at once, of those that share keys, token after token: `count` of one
   sequence by tiles, or, where that is 0, those of one token by vectors. */
struct span {
    int64_t first, count;
};

/* What all layers share in one forward pass; `kernels/attention.py` has the same fields. */
struct batch {
    int64_t tokens, heads, groups, size, table_blocks, is_bf16, threads;
    const int64_t *positions; /* (tokens) in their sequences */
    const int64_t *rows;      /* (tokens) which table is theirs */
    const int64_t *tables;    /* (rows, table_blocks) */
    const void *cosine, *sine; /* (tokens, size) */
    const struct span *spans;  /* all queries that share keys */
    int64_t span_count;
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

/* What the queries of a span that share keys find, in bfloat16; all keys must be there. */
void lowbit_attend_by_tiles(const struct batch *batch, const struct layer *layer,
                            const struct span *span, int64_t group);

/* Stores the keys and values of all tokens, then finds what their queries see: the share of this
   thread of a parallel region. Ends with all threads together. */
void lowbit_attend_together(const struct batch *batch, const struct layer *layer);

#endif
