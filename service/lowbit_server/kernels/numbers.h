/* Numbers of tensors in bfloat16 or float32, computed with in float32. */

#ifndef LOWBIT_NUMBERS_H
#define LOWBIT_NUMBERS_H

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))

/* Compiled for each level of the instruction set; the loader picks the CPU's. */
#if defined(__x86_64__) && defined(__linux__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif

enum { LANES = 16 }; /* float32 in the longest vector */

static ALWAYS_INLINE float from_bits(uint32_t bits)
{
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

static ALWAYS_INLINE uint32_t to_bits(float number)
{
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits;
}

/* The upper half of a float32 that is nearest, ties to even; NaN stays NaN. */
static ALWAYS_INLINE uint16_t to_bf16(float number)
{
    uint32_t bits = to_bits(number), quiet = bits | 0x400000;
    uint32_t nearest = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)(((bits & 0x7fffffff) > 0x7f800000 ? quiet : nearest) >> 16);
}

static ALWAYS_INLINE float load(const void *tensor, int64_t index, int bf16)
{
    if (bf16)
        return from_bits((uint32_t)((const uint16_t *)tensor)[index] << 16);
    return ((const float *)tensor)[index];
}

static ALWAYS_INLINE void store(void *tensor, int64_t index, float number, int bf16)
{
    if (bf16)
        ((uint16_t *)tensor)[index] = to_bf16(number);
    else
        ((float *)tensor)[index] = number;
}

/* The number as a tensor keeps it. */
static ALWAYS_INLINE float rounded(float number, int bf16)
{
    return bf16 ? from_bits((uint32_t)to_bf16(number) << 16) : number;
}

/* e^x for finite x <= 0 within 2 units in the last place, no less than e^-87; else NaN. 2^n by its
   bits, the rest by the Taylor series of degree 6 on [-ln 2 / 2, ln 2 / 2]. */
static ALWAYS_INLINE float exponential(float x)
{
    /* As integers, since compilers make a branch of a bound on floats. */
    uint32_t bits = to_bits(x), least = 0xc2ae0000; /* -87 */
    float bounded = from_bits(bits < least ? bits : least);
    float n = (float)(int32_t)(bounded * 1.44269504f - 0.5f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float power = 1.0f / 720;
    power = power * r + 1.0f / 120;
    power = power * r + 1.0f / 24;
    power = power * r + 1.0f / 6;
    power = power * r + 0.5f;
    power = power * r + 1.0f;
    power = power * r + 1.0f;
    return power * from_bits((uint32_t)((int32_t)n + 127) << 23) + 0.0f * x;
}

#endif
