/* Attention of a few tokens. */

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

/* Stores the keys and values of all tokens, then finds what their queries see: the share of this
   thread of a parallel region. Ends with all threads together. */
void lowbit_attend_together(const struct batch *batch, const struct layer *layer);

#endif
