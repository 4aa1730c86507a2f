/* Tiles with rows and columns exchanged. */

#include "weights.h"

#if defined(__x86_64__) && defined(__linux__)

FAST void lowbit_transpose(const void *tile, int64_t stride, void *out, int64_t out_stride,
                           int64_t rows)
{
    __m512i v[LANES], w[LANES];
    for (int i = 0; i < LANES; i++)
        v[i] = _mm512_loadu_si512((const uint32_t *)tile + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4) {
        v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
    }
    /* v[4 i + j] has, of rows 4 i to 4 i + 3, columns j, 4 + j, 8 + j and 12 + j. */
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512i low = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44);
        __m512i high = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee);
        __m512i more_low = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
        __m512i more_high = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
        w[j] = _mm512_shuffle_i32x4(low, more_low, 0x88);
        w[4 + j] = _mm512_shuffle_i32x4(low, more_low, 0xdd);
        w[8 + j] = _mm512_shuffle_i32x4(high, more_high, 0x88);
        w[12 + j] = _mm512_shuffle_i32x4(high, more_high, 0xdd);
    }
    for (int64_t i = 0; i < rows; i++)
        _mm512_storeu_si512((uint32_t *)out + i * out_stride, w[i]);
}

#endif
