/* Products of a few tokens with the weights of a linear layer. */

#ifndef LOWBIT_PRODUCTS_H
#define LOWBIT_PRODUCTS_H

#include "numbers.h"

#include <omp.h>
#include <stdint.h>

enum {
    SPAN_BLOCKS = 4, /* blocks of LANES outputs that are computed at once at most */
    SPAN = SPAN_BLOCKS * LANES,
    MAX_TOKENS = 32, /* tokens that are computed at once at most */
};

/* y = sum over groups g of scales[g] * (x_g . meant(codes_g) + points[g] * sum of x_g) + bias.
   `kernels/products.py` has the same fields and says how weights are laid out. */
struct product {
    int64_t bits; /* of a weight: 4 or 8 for codes, 16 for bfloat16 itself */
    int64_t rows, columns, group;
    const void *weights;
    const float *scales;    /* (columns / group, rows) */
    const int16_t *points;  /* (columns / group, rows), or null for zeros */
    const uint16_t *meant;  /* bfloat16 (16): what 4-bit codes stand for */
    const uint16_t *bias;   /* bfloat16 (rows), or null */
};

/* Tokens as the products of one thread take them. */
struct inputs {
    int64_t count, columns;
    const uint16_t *x; /* bfloat16 (count, columns) */
    float *sums;       /* (count, groups) */
    uint32_t *pairs;   /* (tiles of 16 tokens, columns / 2, 16): two columns side by side */
    uint32_t *tiles;   /* where weights become tiles, two spans of outputs */
};

/* Bytes of memory that inputs of so many tokens and columns need besides x. */
int64_t lowbit_inputs_bytes(int64_t count, int64_t columns);

/* Rounds bytes up to whole lines of the cache, as aligned_alloc wants them. */
static inline int64_t aligned(int64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* Prepares inputs for a product, in such memory. */
void lowbit_prepare(const struct product *product, int64_t count, const uint16_t *x, void *memory,
                    struct inputs *inputs);

/* Computes some blocks of outputs for MAX_TOKENS tokens at most, from the token `first` on,
   with their bias: float32 (tokens, SPAN). Returns how many tokens it has done. Must be called
   for all tokens in their order; two parts of the outputs, 0 and 1, may take turns. */
int64_t lowbit_span(const struct product *product, const struct inputs *inputs, int64_t first,
                    int64_t block, int64_t blocks, int part, float *out);

/* Must follow a thread's last span, for what others compute on it. */
void lowbit_release(void);

/* The blocks of a product that are this thread's. */
struct part {
    int64_t first, end;
};

static inline struct part lowbit_part(int64_t blocks)
{
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return (struct part){blocks * thread / threads, blocks * (thread + 1) / threads};
}

/* Where the span that begins at a block ends. */
static inline int64_t lowbit_next(struct part part, int64_t block)
{
    return block + SPAN_BLOCKS < part.end ? block + SPAN_BLOCKS : part.end;
}

/* Whether this CPU multiplies bfloat16 itself: 1 by vectors (AVX512-BF16), 2 by tiles too (AMX),
   which are fast for any number of tokens. */
int lowbit_has_products(void);

#endif
