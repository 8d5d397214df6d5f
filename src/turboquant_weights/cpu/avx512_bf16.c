/* Many tokens at once on processors with AVX512_BF16: rows are decoded to bfloat16 once per tile and multiplied with
 * `vdpbf16ps`, tokens in the lanes and pairs of columns broadcast, so that a decoded row needs no second layout.
 *
 * Levels times scales are rounded to bfloat16 and so is the rotated activation, as in the reference; sums are float32.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TURBOQUANT_AVX2
#define TURBOQUANT_AVX512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,gfni,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,gfni,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512bf16,prefer-vector-width=512")
#endif

#include "avx512.h"

enum { STRIP = 6 }; /* rows of the inner kernel: 6 x 4 accumulators */

static int available(void) { return tq_avx512.available() && __builtin_cpu_supports("avx512bf16"); }

/* Of 64 columns those with even numbers, then the others: as the nibbles of codes come out of their bytes. */
INLINE void even_order(const float *columns, float *out)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for (int half = 0; half < 2; half++) {
        const __m512 low = _mm512_loadu_ps(columns + 32 * half), high = _mm512_loadu_ps(columns + 32 * half + 16);
        _mm512_storeu_ps(out + 16 * half, _mm512_permutex2var_ps(low, even, high));
        _mm512_storeu_ps(out + 32 + 16 * half, _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high));
    }
}

/* Token t of the activation: pairs of columns [pair][t % 64] of 32 bits in the block of 64 tokens that t belongs to. */
static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    const int64_t columns = act->blocks * BLOCK;
    float *rotated = scratch;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    uint32_t *out = (uint32_t *)act->values + token / 64 * 32 * columns + token % 64;
    for (int64_t i = 0; i < columns; i += 64) {
        float ordered[64];
        uint32_t pairs[32];
        if (layer->book->residual_bits)
            exact_order(rotated + i, ordered);
        else if (layer->book->bits == 4)
            even_order(rotated + i, ordered);
        else
            memcpy(ordered, rotated + i, sizeof ordered);
        for (int half = 0; half < 2; half++) {
            const __m512 low = _mm512_loadu_ps(ordered + 32 * half), high = _mm512_loadu_ps(ordered + 32 * half + 16);
            _mm512_storeu_si512(pairs + 16 * half, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
        for (int pair = 0; pair < 32; pair++) out[(i / 2 + pair) * 64] = pairs[pair];
    }
}

/* Columns of blocks [block, end) of one row, rounded to bfloat16; `fours`: of 4 bits, in even_order. With 16 levels at most,
 * the levels are multiplied with the two scales of 64 columns before they are looked up. */
INLINE void decode_base_row(const tq_layer *layer, const decoding *how, int64_t row, int64_t block, int64_t end, uint16_t *out,
                            const int fours)
{
    const __m512i second_half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    const __m512 levels = _mm512_loadu_ps(layer->book->level);
    for (; block < end; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        const int64_t last = block + 16 < end ? block + 16 : end;
        __m512i lane = _mm512_setzero_si512();
        for (int64_t at = block; at < last; at += 2, out += 64) {
            const __m512 first = _mm512_mul_ps(levels, _mm512_permutexvar_ps(lane, own));
            const __m512 second = _mm512_mul_ps(levels, _mm512_permutexvar_ps(_mm512_add_epi32(lane, _mm512_set1_epi32(1)), own));
            const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            __m512i low, high;
            if (fours) { /* a byte in 16 bits: an even column's nibble and an odd one's */
                const __mmask32 there = layer->blocks - at >= 2 ? 0xffffffff : 0xffff;
                const __m512i both = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(there, codes + 16 * at));
                low = _mm512_ternarylogic_epi32(both, _mm512_set1_epi16(15), second_half, 0xea); /* (a & b) | c */
                high = _mm512_or_si512(_mm512_srli_epi16(both, 4), second_half);
            } else {
                const __m512i index = index64(codes, NULL, at, layer->blocks, how);
                low = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(index));
                high = _mm512_or_si512(_mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(index, 1)), _mm512_set1_epi16(16));
            }
            _mm512_storeu_si512(out, _mm512_permutexvar_epi16(low, table));
            _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(high, table));
            lane = _mm512_add_epi32(lane, _mm512_set1_epi32(2));
        }
    }
}

INLINE void decode_row(const tq_layer *layer, const decoding *how, int64_t row, int64_t block, int64_t end, uint16_t *out)
{
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = layer->book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    for (; block < end; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        const int64_t last = block + 16 < end ? block + 16 : end;
        for (int64_t at = block; at < last; at += 2, out += 64) {
            const __m512 first = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block)), own);
            const __m512 second = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block) + 1), own);
            __m512 level[4];
            levels64(index64(codes, residual, at, layer->blocks, how), how, level);
            const __m512bh one = _mm512_cvtne2ps_pbh(_mm512_mul_ps(level[1], first), _mm512_mul_ps(level[0], first));
            const __m512bh two = _mm512_cvtne2ps_pbh(_mm512_mul_ps(level[3], second), _mm512_mul_ps(level[2], second));
            _mm512_storeu_si512(out, (__m512i)one);
            _mm512_storeu_si512(out + 32, (__m512i)two);
        }
    }
}

/* sums [STRIP][stride] += weights [STRIP][width] times x [pairs][64], for 16 V tokens. Of what comes next a cache line is
 * prefetched for every other pair. */
INLINE void inner(const uint16_t *weights, int64_t width, const uint32_t *x, int64_t pairs, const char *next, float *sums,
                  int64_t stride, const int V)
{
    __m512 sum[STRIP][4];
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_loadu_ps(sums + r * stride + 16 * v);
    for (int64_t pair = 0; pair < pairs; pair += 2, x += 128, next += 64) {
        _mm_prefetch(next, _MM_HINT_T1);
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512bh token[4];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) token[v] = (__m512bh)_mm512_load_si512(x + 64 * half + 16 * v);
#pragma GCC unroll 6
            for (int r = 0; r < STRIP; r++) {
                int32_t two;
                memcpy(&two, weights + r * width + 2 * (pair + half), 4);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], token[v], weight);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < STRIP; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_storeu_ps(sums + r * stride + 16 * v, sum[r][v]);
}

typedef void inner_function(const uint16_t *, const uint32_t *, int64_t pairs, const char *next, float *sums, int64_t stride);

/* Functions of their own: among other code the accumulators would not stay in registers. */
#define INNER(V)                                                                                                            \
    static __attribute__((noinline)) void inner##V(const uint16_t *weights, const uint32_t *x, int64_t pairs,               \
                                                   const char *next, float *sums, int64_t stride)                           \
    {                                                                                                                       \
        inner(weights, TILE_COLUMNS, x, pairs, next, sums, stride, V);                                                      \
    }
INNER(1)
INNER(2)
INNER(3)
INNER(4)

/* Blocks [block, end) of rows to a tile. */
INLINE void decode_tile(const tq_layer *layer, const decoding *how, int64_t row, int64_t rows, int64_t block, int64_t end,
                        uint16_t *tile)
{
    for (int64_t r = 0; r < rows; r++)
        if (layer->book->residual_bits)
            decode_row(layer, how, row + r, block, end, tile + r * TILE_COLUMNS);
        else if (layer->book->bits == 4)
            decode_base_row(layer, how, row + r, block, end, tile + r * TILE_COLUMNS, 1);
        else
            decode_base_row(layer, how, row + r, block, end, tile + r * TILE_COLUMNS, 0);
}

INLINE void prefetch_bytes(const uint8_t *from, int64_t count)
{
    for (int64_t i = 0; i < count; i += 64) _mm_prefetch((const char *)from + i, _MM_HINT_T1);
}

/* Fetches what decode_tile will read of a strip of rows. */
INLINE void prefetch_strip(const tq_layer *layer, int64_t row, int64_t block)
{
    const int width = layer->book->bits, rest = layer->book->residual_bits;
    for (int64_t r = row; r < row + STRIP; r++) {
        prefetch_bytes(row_of(layer->codes, layer->codes_stride, r) + 4 * width * block, TILE_COLUMNS / 8 * width);
        if (rest) prefetch_bytes(row_of(layer->residual, layer->residual_stride, r) + 4 * rest * block, TILE_COLUMNS / 8 * rest);
        prefetch_bytes(row_of(layer->scales, layer->scales_stride, r) + block, TILE_COLUMNS / BLOCK);
    }
}

static void multiply(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t tokens, float *sums,
                     uint16_t *tile)
{
    static inner_function *const inners[] = {inner1, inner2, inner3, inner4};
    const tq_codebook *book = layer->book;
    const decoding how = decoding_of(book, book->half_high, book->half_low);
    const int64_t stride = (tokens + 15) / 16 * 16, columns = act->blocks * BLOCK;
    memset(sums, 0, (size_t)(TILE_ROWS * stride) * 4);
    for (int64_t block = 0; block < layer->blocks; block += TILE_COLUMNS / BLOCK) {
        const int64_t rest = layer->blocks - block;
        const int64_t end = rest < TILE_COLUMNS / BLOCK ? layer->blocks : block + TILE_COLUMNS / BLOCK;
        const int64_t pairs = (end - block + 1) / 2 * 32; /* whole steps of 64 columns */
        decode_tile(layer, &how, row, rows, block, end, tile);
        for (int64_t first = 0; first < tokens; first += 64) {
            const uint32_t *x = (const uint32_t *)act->values + first / 64 * 32 * columns + block * (BLOCK / 2) * 64;
            const int64_t left = (tokens - first + 15) / 16;
            const int last = end >= layer->blocks;
            /* While these tokens are multiplied, the columns of the next 64 come to the L2 cache, or the next columns of the
             * first 64. */
            const uint32_t *after = (const uint32_t *)act->values + (last ? 0 : end) * (BLOCK / 2) * 64;
            const char *next = (const char *)(first + 64 < tokens ? x + 32 * columns : after);
            for (int64_t r = 0; r < rows; r += STRIP) { /* the last strip may reach below: those sums are ignored */
                float *to = sums + r * stride + first;
                if (first == 0) prefetch_strip(layer, last ? row + rows + r : row + r, last ? 0 : end);
                inners[left < 4 ? left - 1 : 3](tile + r * TILE_COLUMNS, x, pairs, next, to, stride);
                next += 32 * pairs;
            }
        }
    }
}

const tq_tiled tq_avx512_bf16 = {available, prepare, multiply};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
