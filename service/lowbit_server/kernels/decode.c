/* The layers of a decoder of the Llama family in bfloat16, all of them in one parallel region: a
   step of a small model is bound by what happens between its products.

   Numbers are rounded where the tensors of `models/fused.py` are. Each thread computes its
   share of a product's outputs. */

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
    int64_t head_size, turned; /* heads of queries and keys */
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
    int64_t tokens;
    uint16_t *normal; /* (tokens, hidden), of all threads */
    uint16_t *gated;  /* (tokens, inner), of all threads */
    void *memory;
    float found[2][MAX_TOKENS * SPAN];
};

/* Writes a product of tokens (tokens, columns) to out (tokens, rows), added to what is there
   where a residual stream is. Ends with all threads together. */
static void multiply(struct worker *worker, const struct product *product, const uint16_t *x,
                     uint16_t *restrict out, int residual)
{
    struct part part = lowbit_part(product->rows / LANES);
    struct inputs inputs;
    int64_t tokens = worker->tokens, rows = product->rows;
    lowbit_prepare(product, tokens, x, worker->memory, &inputs);
    for (int64_t block = part.first, next; block < part.end; block = next) {
        next = lowbit_next(part, block);
        for (int64_t first = 0, done; first < tokens; first += done) {
            done = lowbit_span(product, &inputs, first, block, next - block, 0, worker->found[0]);
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
#pragma omp barrier
}

/* Writes what gates let through. Ends with all threads together. */
static void multiply_gated(struct worker *worker, const struct product *product)
{
    int64_t tokens = worker->tokens, inner = worker->decoder->inner;
    struct part part = lowbit_part(inner / LANES);
    struct inputs inputs;
    lowbit_prepare(product, tokens, worker->normal, worker->memory, &inputs);
    for (int64_t block = part.first, next; block < part.end; block = next) {
        next = lowbit_next(part, block);
        for (int64_t first = 0, done; first < tokens; first += done) {
            done = lowbit_span(product, &inputs, first, block, next - block, 0, worker->found[0]);
            lowbit_span(product, &inputs, first, block + inner / LANES, next - block, 1,
                        worker->found[1]);
            for (int64_t token = 0; token < done; token++) {
                const float *gates = worker->found[0] + token * SPAN;
                const float *ups = worker->found[1] + token * SPAN;
                uint16_t *to = worker->gated + (first + token) * inner + block * LANES;
#pragma omp simd
                for (int64_t row = 0; row < (next - block) * LANES; row++)
                    to[row] = gated(rounded(gates[row], 1), rounded(ups[row], 1));
            }
        }
    }
#pragma omp barrier
}

static void normalize_all(struct worker *worker, const uint16_t *hidden, const uint16_t *weight)
{
    int64_t size = worker->decoder->hidden;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < worker->tokens; token++)
        normalize(hidden + token * size, weight, size, (float)worker->decoder->epsilon,
                  worker->normal + token * size);
}

/* Writes queries, keys and values (tokens, rows of the product). */
static void project(struct worker *worker, const struct decoder_layer *layer,
                    const uint16_t *hidden, uint16_t *qkv)
{
    int64_t stride = layer->qkv.rows, size = worker->decoder->head_size;
    normalize_all(worker, hidden, layer->norm);
    multiply(worker, &layer->qkv, worker->normal, qkv, 0);
    if (!layer->head_norms)
        return;
#pragma omp for schedule(static) collapse(2)
    for (int64_t token = 0; token < worker->tokens; token++)
        for (int64_t head = 0; head < worker->decoder->turned; head++) {
            uint16_t *one = qkv + token * stride + head * size;
            normalize(one, layer->head_norms + head * size, size,
                      (float)worker->decoder->epsilon, one);
        }
}

/* Adds to hidden states what follows from what attention has found. */
static void conclude(struct worker *worker, const struct decoder_layer *layer,
                     const uint16_t *found, uint16_t *hidden)
{
    multiply(worker, &layer->output, found, hidden, 1);
    normalize_all(worker, hidden, layer->mlp_norm);
    multiply_gated(worker, &layer->gate_up);
    multiply(worker, &layer->down, worker->gated, hidden, 1);
}

/* The memory of all threads, and of each. */
struct memory {
    char *all;
    int64_t normal, gated, inputs;
};

static int64_t greater(int64_t one, int64_t other)
{
    return one > other ? one : other;
}

/* Its `all` is null where there is none. */
static struct memory memory_for(const struct decoder *decoder, int64_t tokens, int64_t threads)
{
    int64_t columns = greater(decoder->of->output.columns,
                              greater(decoder->hidden, decoder->inner));
    struct memory memory = {
        NULL,
        aligned(tokens * decoder->hidden * 2),
        aligned(tokens * decoder->inner * 2),
        aligned(lowbit_inputs_bytes(tokens, columns)),
    };
    memory.all = aligned_alloc(64, memory.normal + memory.gated + threads * memory.inputs);
    return memory;
}

static void begin(struct worker *worker, const struct decoder *decoder, int64_t tokens,
                  struct memory memory)
{
    worker->decoder = decoder;
    worker->tokens = tokens;
    worker->normal = (uint16_t *)memory.all;
    worker->gated = (uint16_t *)(memory.all + memory.normal);
    worker->memory = memory.all + memory.normal + memory.gated
                     + omp_get_thread_num() * memory.inputs;
}

/* What became of a pass; `kernels/decoder.py` has the same. */
enum { NO_MEMORY, DONE, INTERRUPTED };

/* Adds what all layers find to hidden states (tokens, hidden), in place. Returns DONE; NO_MEMORY,
   with nothing changed; or INTERRUPTED, where another thread made `interrupt` other than 0 while
   fewer than half of the layers were done. */
int lowbit_decode(const struct decoder *decoder, const struct batch *batch,
                  void *const *key_pools, void *const *value_pools, uint16_t *hidden,
                  const volatile int *interrupt)
{
    int64_t tokens = batch->tokens, groups = batch->groups, threads = batch->threads;
    int64_t queries = decoder->of->output.columns, all = decoder->of->qkv.rows;
    struct memory memory = memory_for(decoder, tokens, threads);
    uint16_t *qkv = aligned_alloc(64, aligned(tokens * (all + queries) * 2));
    if (!memory.all || !qkv) {
        free(memory.all);
        free(qkv);
        return NO_MEMORY;
    }
    uint16_t *found = qkv + tokens * all;
    int interrupted = 0;
#pragma omp parallel num_threads(threads)
    {
        struct worker worker;
        begin(&worker, decoder, tokens, memory);
        for (int64_t number = 0; number < decoder->layers; number++) {
            if (interrupt && 2 * number < decoder->layers) {
#pragma omp single
                interrupted = *interrupt;
                if (interrupted)
                    break;
            }
            const struct decoder_layer *layer = decoder->of + number;
            struct layer heads = {
                qkv, qkv + all - groups * batch->size, all, all, key_pools[number],
                value_pools[number], found, layer->window, layer->rotary,
            };
            project(&worker, layer, hidden, qkv);
            lowbit_attend_together(batch, &heads);
            conclude(&worker, layer, found, hidden);
        }
        lowbit_release();
    }
    free(memory.all);
    free(qkv);
    return interrupted ? INTERRUPTED : DONE;
}

#endif
