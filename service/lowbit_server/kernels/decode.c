/* All layers of a decoder of the Llama family for a few tokens in bfloat16, in one parallel
   region: a step of a small model is bound by what happens between its products.

   Numbers are rounded where the tensors of `models/fused.py` are. Each thread computes its
   share of a product's outputs; what every share needs (norms) each thread computes itself. */

#include "attention.h"
#include "numbers.h"
#include "products.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>

/* `kernels/decoder.py` has the same fields. */
struct decoder_layer {
    struct product qkv, output, gate_up, down; /* gates first, and as many */
    const uint16_t *norm, *mlp_norm;           /* (hidden) */
    const uint16_t *head_norms;                /* (heads + groups, size), or null */
    int64_t window, rotary;
};

struct decoder {
    int64_t layers, hidden, inner;
    double epsilon;
    const struct decoder_layer *of;
};

#if defined(__x86_64__) && defined(__linux__)

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")

/* The RMS norm (Zhang and Sennrich 2019), rounded before it is weighted. */
static void normalize(const uint16_t *x, const uint16_t *weight, int64_t size, float epsilon,
                      uint16_t *out)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) {
        float one = load(x, i, 1);
        sum += one * one;
    }
    float factor = 1 / sqrtf(sum / (float)size + epsilon);
    for (int64_t i = 0; i < size; i++)
        out[i] = to_bf16(rounded(load(x, i, 1) * factor, 1) * load(weight, i, 1));
}

/* gate * sigmoid(gate) * up, rounded twice. */
static ALWAYS_INLINE uint16_t gated(float gate, float up)
{
    float small = exponential(-fabsf(gate));
    float share = (gate > 0 ? 1.0f : small) / (1.0f + small);
    return to_bf16(rounded(gate * share, 1) * up);
}

/* What one thread works with. */
struct worker {
    const struct decoder *decoder;
    const struct batch *batch;
    uint16_t *normal; /* (tokens, hidden) */
    void *memory;
    float found[2][MAX_TOKENS * SPAN];
};

/* Writes a product of tokens (tokens, columns) to out (tokens, rows), added to what is there
   where a residual stream is. */
static void multiply(struct worker *worker, const struct product *product, const uint16_t *x,
                     uint16_t *restrict out, int residual)
{
    struct part part = lowbit_part(product->rows / LANES);
    struct inputs inputs;
    int64_t tokens = worker->batch->tokens, rows = product->rows;
    lowbit_prepare(product, tokens, x, worker->memory, &inputs);
    for (int64_t block = part.first, next; block < part.end; block = next) {
        next = lowbit_next(part, block);
        for (int64_t first = 0, done; first < tokens; first += done) {
            done = lowbit_span(product, &inputs, first, block, next - block, worker->found[0]);
            for (int64_t token = 0; token < done; token++) {
                const float *from = worker->found[0] + token * SPAN;
                uint16_t *to = out + (first + token) * rows + block * LANES;
#pragma omp simd
                for (int64_t row = 0; row < (next - block) * LANES; row++) {
                    float before = residual ? load(to, row, 1) : 0;
                    to[row] = to_bf16(before + rounded(from[row], 1));
                }
            }
        }
    }
}

/* Writes what gates let through to out (tokens, inner). */
static void multiply_gated(struct worker *worker, const struct product *product,
                           const uint16_t *x, uint16_t *out)
{
    int64_t tokens = worker->batch->tokens, inner = worker->decoder->inner;
    struct part part = lowbit_part(inner / LANES);
    struct inputs inputs;
    lowbit_prepare(product, tokens, x, worker->memory, &inputs);
    for (int64_t block = part.first, next; block < part.end; block = next) {
        next = lowbit_next(part, block);
        for (int64_t first = 0, done; first < tokens; first += done) {
            done = lowbit_span(product, &inputs, first, block, next - block, worker->found[0]);
            lowbit_span(product, &inputs, first, block + inner / LANES, next - block,
                        worker->found[1]);
            for (int64_t token = 0; token < done; token++) {
                const float *gates = worker->found[0] + token * SPAN;
                const float *ups = worker->found[1] + token * SPAN;
                uint16_t *to = out + (first + token) * inner + block * LANES;
#pragma omp simd
                for (int64_t row = 0; row < (next - block) * LANES; row++)
                    to[row] = gated(rounded(gates[row], 1), rounded(ups[row], 1));
            }
        }
    }
}

static void normalize_all(struct worker *worker, const uint16_t *hidden, const uint16_t *weight)
{
    int64_t size = worker->decoder->hidden;
    for (int64_t token = 0; token < worker->batch->tokens; token++)
        normalize(hidden + token * size, weight, size, (float)worker->decoder->epsilon,
                  worker->normal + token * size);
}

/* Attention of one layer, from queries, keys and values to what was found; ends as it began,
   with all threads together. */
static void attend(struct worker *worker, const struct decoder_layer *layer,
                   const struct layer *heads, uint16_t *qkv)
{
    const struct batch *batch = worker->batch;
    int64_t groups = batch->groups, turned = batch->heads + groups, size = batch->size;
    if (layer->head_norms) {
#pragma omp for schedule(static) collapse(2)
        for (int64_t token = 0; token < batch->tokens; token++)
            for (int64_t head = 0; head < turned; head++) {
                uint16_t *one = qkv + token * heads->turned_stride + head * size;
                normalize(one, layer->head_norms + head * size, size,
                          (float)worker->decoder->epsilon, one);
            }
    }
    /* All keys first: several tokens may be of one sequence. */
#pragma omp for schedule(static) collapse(2)
    for (int64_t token = 0; token < batch->tokens; token++)
        for (int64_t group = 0; group < groups; group++)
            lowbit_keep(batch, heads, token, group);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t token = 0; token < batch->tokens; token++)
        for (int64_t group = 0; group < groups; group++)
            lowbit_find(batch, heads, token, group);
}

static int64_t aligned(int64_t bytes)
{
    return (bytes + 63) / 64 * 64;
}

/* Adds what all layers find to hidden states (tokens, hidden), in place. Returns 0, and changes
   nothing, without memory. */
int lowbit_decode(const struct decoder *decoder, const struct batch *batch,
                  void *const *key_pools, void *const *value_pools, uint16_t *hidden)
{
    int64_t tokens = batch->tokens, threads = batch->threads, size = batch->size;
    int64_t width = decoder->hidden > decoder->inner ? decoder->hidden : decoder->inner;
    int64_t queries = batch->heads * size, all = queries + 2 * batch->groups * size;
    if (queries > width)
        width = queries;
    int64_t qkv_bytes = aligned(tokens * all * 2), found_bytes = aligned(tokens * queries * 2);
    int64_t gated_bytes = aligned(tokens * decoder->inner * 2);
    int64_t normal_bytes = aligned(tokens * decoder->hidden * 2);
    int64_t inputs_bytes = aligned(lowbit_inputs_bytes(tokens, width));
    char *memory = aligned_alloc(64, qkv_bytes + found_bytes + gated_bytes
                                         + threads * (normal_bytes + inputs_bytes));
    if (!memory)
        return 0;
    uint16_t *qkv = (uint16_t *)memory, *found = (uint16_t *)(memory + qkv_bytes);
    uint16_t *through = (uint16_t *)(memory + qkv_bytes + found_bytes);
    char *own = memory + qkv_bytes + found_bytes + gated_bytes;
#pragma omp parallel num_threads(threads)
    {
        char *mine = own + omp_get_thread_num() * (normal_bytes + inputs_bytes);
        struct worker worker = {decoder, batch, (uint16_t *)mine, mine + normal_bytes, {{0}}};
        for (int64_t number = 0; number < decoder->layers; number++) {
            const struct decoder_layer *layer = decoder->of + number;
            struct layer heads = {
                qkv, qkv + all - batch->groups * size, all, all, key_pools[number],
                value_pools[number], found, layer->window, layer->rotary,
            };
            normalize_all(&worker, hidden, layer->norm);
            multiply(&worker, &layer->qkv, worker.normal, qkv, 0);
#pragma omp barrier
            attend(&worker, layer, &heads, qkv);
            multiply(&worker, &layer->output, found, hidden, 1);
#pragma omp barrier
            normalize_all(&worker, hidden, layer->mlp_norm);
            multiply_gated(&worker, &layer->gate_up, worker.normal, through);
#pragma omp barrier
            multiply(&worker, &layer->down, through, hidden, 1);
#pragma omp barrier
        }
        lowbit_release();
    }
    free(memory);
    return 1;
}

#endif
