/* Attention of a few tokens, one head at a time. */

#ifndef LOWBIT_ATTENTION_H
#define LOWBIT_ATTENTION_H

#include <stdint.h>

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

/* Puts one head of one token's keys and values into the cache. */
void lowbit_keep(const struct batch *batch, const struct layer *layer, int64_t token,
                 int64_t group);

/* Computes what the queries of one token that share keys find, all keys being in the cache. */
void lowbit_find(const struct batch *batch, const struct layer *layer, int64_t token,
                 int64_t group);

#endif
