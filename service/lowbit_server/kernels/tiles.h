/* Tiles of numbers and how the CPU is told their shapes (AMX). */

#ifndef LOWBIT_TILES_H
#define LOWBIT_TILES_H

#include "weights.h"

#if defined(__x86_64__) && defined(__linux__)

#define TILED \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")))
#define TILED_INLINE TILED static ALWAYS_INLINE

/* Tiles 0 to 3 are sums of four blocks, tile 4 tokens, the others weights. */
struct __attribute__((packed, aligned(64))) tile_shapes {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};
enum { WEIGHTS_TILES = 5, TILES = 8, TILE_ROWS = 16, TILE = TILE_ROWS * LANES };

/* Tiles are full but for tokens and their sums, which may have fewer rows. */
TILED static inline void shape_tiles(int64_t rows)
{
    struct tile_shapes shapes = {.palette = 1};
    for (int tile = 0; tile < TILES; tile++) {
        shapes.rows[tile] = tile < WEIGHTS_TILES ? (uint8_t)rows : TILE_ROWS;
        shapes.bytes[tile] = 64;
    }
    _tile_loadconfig(&shapes);
}

#endif

#endif
