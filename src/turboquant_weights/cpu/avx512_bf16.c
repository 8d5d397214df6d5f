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

/* Of 128 columns, in the same way, as the bytes of 4 + 4 bits come out of decode_nested_row: of each half of a block's 16. */
INLINE void nested_order(const float *columns, float *out)
{
    float apart[64];
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++, out += 16) {
        even_order(columns + 64 * half, apart);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            const __m512 one = _mm512_loadu_ps(apart + 32 * odd), two = _mm512_loadu_ps(apart + 32 * odd + 16);
            _mm512_storeu_ps(out + 64 * odd, _mm512_shuffle_f32x4(one, two, 0x44));
            _mm512_storeu_ps(out + 64 * odd + 32, _mm512_shuffle_f32x4(one, two, 0xee));
        }
    }
}

INLINE int is_fours_fours(const tq_codebook *book) { return book->bits == 4 && book->residual_bits == 4; }

/* Lane i of vector j becomes lane j of vector i. */
INLINE void transpose16(__m512i v[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* lanes i, i + 4, ... of vectors 0-3, 4-7, ... are in vectors i, i + 4, ... */
        const __m512i even = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), odd = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        const __m512i evens = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        const __m512i odds = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        v[i] = _mm512_shuffle_i32x4(even, evens, 0x88);
        v[i + 4] = _mm512_shuffle_i32x4(odd, odds, 0x88);
        v[i + 8] = _mm512_shuffle_i32x4(even, evens, 0xdd);
        v[i + 12] = _mm512_shuffle_i32x4(odd, odds, 0xdd);
    }
}

enum { STEP_COLUMNS = 128 }; /* of the preparation: whole blocks of the rotation */

/* Columns [first, first + 128) of a token, rotated, in the order of decoded rows, as pairs of bfloat16. */
INLINE void prepare_columns(const tq_layer *layer, const char *x, int type, int64_t first, float shift, uint32_t *pairs)
{
    const int64_t k = layer->in_features - first, columns = layer->blocks * BLOCK - first;
    const int64_t there = k < STEP_COLUMNS ? k : STEP_COLUMNS, width = columns < STEP_COLUMNS ? columns : STEP_COLUMNS;
    float rotated[STEP_COLUMNS], ordered[STEP_COLUMNS];
    memset(rotated, 0, sizeof rotated);
    read_token(x + first * (type == FLOAT32 ? 4 : 2), type, there, rotated);
    for (int64_t i = 0; i < width; i++) rotated[i] *= layer->signs[first + i] * shift;
    for (int64_t i = 0; i < width; i += layer->rotation) hadamard(rotated + i, layer->rotation);
    const int nested = is_fours_fours(layer->book) && width > 64;
    if (nested) nested_order(rotated, ordered);
#pragma GCC unroll 2
    for (int i = 0; i < STEP_COLUMNS && !nested; i += 64)
        if (layer->book->residual_bits)
            exact_order(rotated + i, ordered + i);
        else if (layer->book->bits == 4)
            even_order(rotated + i, ordered + i);
        else
            memcpy(ordered + i, rotated + i, 256);
#pragma GCC unroll 4
    for (int i = 0; i < STEP_COLUMNS; i += 32) {
        const __m512 low = _mm512_loadu_ps(ordered + i), high = _mm512_loadu_ps(ordered + i + 16);
        _mm512_storeu_si512(pairs + i / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* Tokens become pairs of columns [pair][t % 64] of 32 bits in the block of 64 tokens that they belong to; token is a multiple of
 * 16. Of lanes without a token nobody looks at the sums. */
static void prepare(const tq_layer *layer, const tq_activations *act, const char *x, int64_t x_stride, int type, int64_t token,
                    int64_t count, void *scratch)
{
    const int64_t k = layer->in_features, columns = layer->blocks * BLOCK;
    float shift[STEP_TOKENS];
    for (int64_t t = 0; t < count; t++) {
        uint32_t largest = 0;
        if (type == BFLOAT16) {
            uint16_t bits = 0;
            for (int64_t i = 0; i < k; i++) {
                const uint16_t one = ((const uint16_t *)(x + t * x_stride))[i] & 0x7fff;
                bits = one > bits ? one : bits;
            }
            largest = (uint32_t)bits << 16;
        } else {
            read_token(x + t * x_stride, type, k, scratch);
            largest = largest_magnitude(scratch, k);
        }
        shift[t] = shift_of(layer, largest, act->token_scale + token + t);
    }
    uint32_t pairs[STEP_TOKENS][STEP_COLUMNS / 2];
    memset(pairs, 0, sizeof pairs);
    uint32_t *out = (uint32_t *)act->values + token / 64 * 32 * act->blocks * BLOCK + token % 64;
    for (int64_t first = 0; first < columns; first += STEP_COLUMNS, out += STEP_COLUMNS / 2 * 64) {
        for (int64_t t = 0; t < count; t++) prepare_columns(layer, x + t * x_stride, type, first, shift[t], pairs[t]);
        for (int i = 0; i < STEP_COLUMNS / 2; i += 16) {
            __m512i v[16];
#pragma GCC unroll 16
            for (int t = 0; t < 16; t++) v[t] = _mm512_loadu_si512(pairs[t] + i);
            transpose16(v);
#pragma GCC unroll 16
            for (int pair = 0; pair < 16; pair++) _mm512_store_si512(out + (i + pair) * 64, v[pair]);
        }
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

/* The same for 4 + 4 bits and steps of 128 columns, in nested_order: nibbles of even columns and then those of odd ones, and of
 * either a block in each 128 bits. */
INLINE void decode_nested_row(const tq_layer *layer, const decoding *how, int64_t row, int64_t block, int64_t end, uint16_t *out)
{
    const __m512i nibble = _mm512_set1_epi8(15), magnitude = _mm512_set1_epi8(0x7f);
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = row_of(layer->residual, layer->residual_stride, row);
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    for (; block < end; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        const int64_t last = block + 16 < end ? block + 16 : end;
        __m512i lanes = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(1), 1);
        for (int64_t at = block; at < last; at += 4, out += 128) {
            const int64_t left = layer->blocks - at;
            const __mmask64 there = left >= 4 ? ~(__mmask64)0 : ((__mmask64)1 << 16 * left) - 1;
            const __m512i base = _mm512_maskz_loadu_epi8(there, codes + 16 * at);
            const __m512i rest = _mm512_maskz_loadu_epi8(there, residual + 16 * at);
            const __m512i index[2] = {select_bits(nibble, rest, _mm512_slli_epi16(base, 4)),
                                      select_bits(nibble, _mm512_srli_epi16(rest, 4), base)};
            const __m512 first = _mm512_permutexvar_ps(lanes, own);
            const __m512 second = _mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(2)), own);
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; odd++) { /* 256 levels: those of the upper half are the others' with the sign changed */
                const __m512i folded = _mm512_gf2p8affine_epi64_epi8(index[odd], _mm512_set1_epi64((long long)0x8182848890a0c000), 0);
                const __m512i low = _mm512_permutex2var_epi8(how->low[0], folded, how->low[1]);
                const __m512i high = _mm512_ternarylogic_epi32(
                    magnitude, _mm512_permutex2var_epi8(how->high[0], folded, how->high[1]), index[odd], 0xc5); /* a ? b : ~c */
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++) {
                    const __m512i halves = half ? _mm512_unpackhi_epi8(low, high) : _mm512_unpacklo_epi8(low, high);
                    const __m512 one = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), first);
                    const __m512 two = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), second);
                    _mm512_storeu_si512(out + 64 * odd + 32 * half, (__m512i)_mm512_cvtne2ps_pbh(two, one));
                }
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(4));
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
    /* Of 4 + 4 bits up to 64 columns behind the last 128 are decoded like other planes. */
    const int64_t over = (end - block) % 4, whole = !is_fours_fours(layer->book) ? block : over == 3 ? end : end - over;
    for (int64_t r = 0; r < rows; r++)
        if (layer->book->residual_bits) {
            uint16_t *out = tile + r * TILE_COLUMNS;
            if (whole > block) decode_nested_row(layer, how, row + r, block, whole, out);
            if (whole < end) decode_row(layer, how, row + r, whole, end, out + (whole - block) * BLOCK);
        } else if (layer->book->bits == 4)
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

/* Of 16 tokens the results of a row, rounded to bfloat16 as to_bfloat of engine.c does, in the upper halves of the lanes. */
INLINE __m512i results(const float *sums, __m512 scale, float factor, float bias)
{
    const __m512 value = _mm512_fmadd_ps(_mm512_loadu_ps(sums), _mm512_mul_ps(scale, _mm512_set1_ps(factor)), _mm512_set1_ps(bias));
    const __m512i word = _mm512_castps_si512(value);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(word, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
    return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}

static int finish(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t tokens, const float *sums,
                  uint16_t *y)
{
    enum { STEP = 32 };          /* rows, whose results of a token are a vector */
    const int64_t stride = (tokens + 15) / 16 * 16;
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    float factor[TILE_ROWS], bias[TILE_ROWS] = {0};
    int safe = 1;
    for (int64_t t = 0; t < tokens; t++) safe &= act->token_scale[t] > 0x1p-60 && act->token_scale[t] < 0x1p60;
    for (int64_t i = 0; i < rows; i++) {
        const int exponent = layer->exponents[row + i];
        safe &= exponent > -60 && exponent < 60;
        factor[i] = ldexpf(1.0f, 19 + exponent);
        if (layer->bias) bias[i] = value_of(layer->bias, layer->bias_type, row + i);
    }
    if (!safe) return 0;
    for (int64_t first = 0; first < tokens; first += 16) {
        const double *scales = act->token_scale + first;
        const __m512 scale = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(scales))),
                                                _mm512_cvtpd_ps(_mm512_loadu_pd(scales + 8)), 1);
        for (int64_t from = 0; from < rows; from += STEP) {
            const int64_t left = rows - from < STEP ? rows - from : STEP;
            __m512i v[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                const int64_t r = from + 2 * i;
                __m512i low = _mm512_setzero_si512(), high = low;
                if (2 * i < left) low = results(sums + r * stride + first, scale, factor[r], bias[r]);
                if (2 * i + 1 < left) high = results(sums + (r + 1) * stride + first, scale, factor[r + 1], bias[r + 1]);
                v[i] = select_bits(upper, high, _mm512_srli_epi32(low, 16));
            }
            transpose16(v);
            const __mmask32 there = ~(__mmask32)0 >> (STEP - left);
            uint16_t *out = y + first * layer->rows + row + from;
#pragma GCC unroll 16
            for (int t = 0; t < 16; t++)
                if (first + t < tokens) _mm512_mask_storeu_epi16(out + t * layer->rows, there, v[t]);
        }
    }
    return 1;
}

const tq_tiled tq_avx512_bf16 = {available, prepare, multiply, finish};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
