/* AVX2 with FMA and F16C (Haswell and later).
 *
 * Integers are 16 bits wide here: `vpmaddwd` takes 16 weights at a time and needs no second byte of the activation. Base
 * levels come from `vpshufb`. There is no table for 256 levels, so nested ones are computed, as on a GPU: the polynomial of
 * FORMAT.md section 6 in 16-bit fixed point, 1e-4 of a standard deviation off at most; the exact path reads a table.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TURBOQUANT_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#include "prepare.h"

#define INLINE static inline __attribute__((always_inline))
/* A lane adds 4 products of at most 2^15 times this. */
enum { LIMIT = 16383 };
enum { AHEAD = 4096 }; /* bytes that a plane is prefetched ahead */

static int available(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* 8 scales of a row, times 2^-19; `left` are there. */
INLINE __m256 scales8(const uint8_t *scales, int64_t left)
{
    uint64_t bytes = 0;
    if (left >= 8)
        memcpy(&bytes, scales, 8);
    else
        for (int64_t i = 0; i < left; i++) bytes |= (uint64_t)scales[i] << (8 * i);
    return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(_mm_cvtsi64_si128((long long)bytes)), 5));
}

INLINE float sum_of(__m256 v)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

/* How 32 fields of a plane become two vectors of 16 words, in their order: fetch the two bytes a field lies in, push what
 * stands above it out of the word, pull it down. */
typedef struct {
    __m256i fetch[2], push[2];
    __m128i pull;
    int width;
} unpacking;

INLINE unpacking unpacking_of(int width)
{
    unpacking how;
    for (int half = 0; half < 2; half++) {
        uint8_t fetch[32];
        int16_t push[16];
        for (int i = 0; i < 16; i++) {
            const int bit = (16 * half + i) * width, next = bit / 8 + 1;
            fetch[2 * i] = (uint8_t)(bit / 8);
            fetch[2 * i + 1] = (uint8_t)(next < 4 * width ? next : 0x80);
            push[i] = (int16_t)(1 << (16 - width - bit % 8));
        }
        how.fetch[half] = _mm256_loadu_si256((const __m256i *)fetch);
        how.push[half] = _mm256_loadu_si256((const __m256i *)push);
    }
    how.pull = _mm_cvtsi32_si128(16 - width);
    how.width = width;
    return how;
}

INLINE void unpack32(const uint8_t *bytes, const unpacking *how, __m256i out[2])
{
    uint64_t low = 0, high = 0;
    switch (how->width) {
    case 1: memcpy(&low, bytes, 4); break;
    case 2: memcpy(&low, bytes, 8); break;
    case 3: memcpy(&low, bytes, 8), memcpy(&high, bytes + 8, 4); break;
    default: memcpy(&low, bytes, 8), memcpy(&high, bytes + 8, 8);
    }
    const __m256i raw = _mm256_broadcastsi128_si256(_mm_set_epi64x((long long)high, (long long)low));
    for (int half = 0; half < 2; half++) {
        const __m256i word = _mm256_shuffle_epi8(raw, how->fetch[half]);
        out[half] = _mm256_srl_epi16(_mm256_mullo_epi16(word, how->push[half]), how->pull);
    }
}

/* -- base plane alone, 4 bits: 64 columns at a time ---------------------------------------------------------------------- */

INLINE void integer4(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out, const int T)
{
    const __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)layer->book->base));
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    const uint8_t *codes = layer->codes + row * layer->codes_stride, *scales = layer->scales + row * layer->scales_stride;
    const int16_t *x = (const int16_t *)act->values + token * act->blocks * BLOCK;
    __m256 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 8) {
        const __m256 own = scales8(scales + block, layer->blocks - block);
        __m256 scale[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = (token + t) * act->blocks + block;
            scale[t] = _mm256_mul_ps(own, _mm256_loadu_ps(act->scale + at));
            sum[t] = _mm256_fnmadd_ps(own, _mm256_loadu_ps(act->correction + at), sum[t]);
        }
        __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
        const int64_t end = block + 8 < layer->blocks ? block + 8 : layer->blocks;
        for (int64_t at = block; at < end; at += 2) {
            const uint8_t *bytes = codes + 16 * at;
            _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T1);
            const __m256i raw = layer->blocks - at >= 2
                                    ? _mm256_loadu_si256((const __m256i *)bytes)
                                    : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
            const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(raw, nibble));
            const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble));
            /* Columns 0, 4, 8, ... of each block, then 2, 6, ..., then 1, 5, ..., then 3, 7, ... */
            const __m256i w0 = _mm256_and_si256(even, byte), w2 = _mm256_srli_epi16(even, 8);
            const __m256i w1 = _mm256_and_si256(odd, byte), w3 = _mm256_srli_epi16(odd, 8);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i *columns = (const __m256i *)(x + (t * act->blocks + at) * BLOCK);
                __m256i dot = _mm256_add_epi32(_mm256_madd_epi16(w0, columns[0]), _mm256_madd_epi16(w2, columns[1]));
                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w1, columns[2]));
                dot = _mm256_add_epi32(dot, _mm256_madd_epi16(w3, columns[3]));
                sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_permutevar8x32_ps(scale[t], lanes), sum[t]);
            }
            lanes = _mm256_add_epi32(lanes, _mm256_set1_epi32(2));
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = sum_of(sum[t]);
}

/* -- every other pair of planes: 32 columns at a time ---------------------------------------------------------------------- */

typedef struct {
    unpacking codes, residual;
    __m256i table, coefficient[5], offset;
    __m128i to_index, to_x;
} decoding;

INLINE decoding decoding_of(const tq_codebook *book)
{
    decoding how;
    const int total = book->bits + book->residual_bits;
    how.codes = unpacking_of(book->bits);
    how.residual = unpacking_of(book->residual_bits ? book->residual_bits : 1);
    how.table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)book->base));
    for (int i = 0; i < 5; i++) how.coefficient[i] = _mm256_set1_epi16(book->coefficient[i]);
    how.to_index = _mm_cvtsi32_si128(book->residual_bits);
    how.to_x = _mm_cvtsi32_si128(16 - total);
    how.offset = _mm256_set1_epi16((int16_t)(((1 - (1 << total)) * 32768) >> total));
    return how;
}

/* Indices of a block, two vectors of 16 words. */
INLINE void index32(const tq_layer *layer, int64_t row, int64_t block, const decoding *how, const int nested, __m256i index[2])
{
    unpack32(layer->codes + row * layer->codes_stride + 4 * how->codes.width * block, &how->codes, index);
    if (nested) {
        __m256i rest[2];
        unpack32(layer->residual + row * layer->residual_stride + 4 * how->residual.width * block, &how->residual, rest);
        for (int half = 0; half < 2; half++)
            index[half] = _mm256_or_si256(_mm256_sll_epi16(index[half], how->to_index), rest[half]);
    }
}

/* Level times polynomial_unit: x = (2 i + 1 - 2^T) / 2^T in [-1, 1] as 16-bit fixed point, and a polynomial in 2 x^2 - 1,
 * whose coefficients are smaller than those in x^2. */
INLINE __m256i nested_levels(__m256i index, const decoding *how)
{
    const __m256i x = _mm256_add_epi16(_mm256_sll_epi16(index, how->to_x), how->offset);
    const __m256i square = _mm256_mulhrs_epi16(x, x);
    const __m256i t = _mm256_xor_si256(_mm256_add_epi16(square, square), _mm256_set1_epi16((int16_t)0x8000));
    __m256i value = how->coefficient[4];
#pragma GCC unroll 4
    for (int i = 3; i >= 0; i--) value = _mm256_add_epi16(_mm256_mulhrs_epi16(value, t), how->coefficient[i]);
    return _mm256_mulhrs_epi16(value, x);
}

INLINE void integer32(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                      const int nested, const int T)
{
    const decoding how = decoding_of(layer->book);
    const uint8_t *scales = layer->scales + row * layer->scales_stride;
    const int16_t *x = (const int16_t *)act->values + token * act->blocks * BLOCK;
    __m256 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 8) {
        const __m256 own = scales8(scales + block, layer->blocks - block);
        __m256 scale[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = (token + t) * act->blocks + block;
            scale[t] = _mm256_mul_ps(own, _mm256_loadu_ps(act->scale + at));
            if (!nested) sum[t] = _mm256_fnmadd_ps(own, _mm256_loadu_ps(act->correction + at), sum[t]);
        }
        const int64_t end = block + 8 < layer->blocks ? block + 8 : layer->blocks;
        for (int64_t at = block; at < end; at++) {
            const __m256i lanes = _mm256_set1_epi32((int)(at - block));
            __m256i index[2], level[2];
            index32(layer, row, at, &how, nested, index);
            for (int half = 0; half < 2; half++)
                level[half] = nested ? nested_levels(index[half], &how)
                                     : _mm256_and_si256(_mm256_shuffle_epi8(how.table, index[half]), _mm256_set1_epi16(255));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m256i *columns = (const __m256i *)(x + (t * act->blocks + at) * BLOCK);
                const __m256i dot =
                    _mm256_add_epi32(_mm256_madd_epi16(level[0], columns[0]), _mm256_madd_epi16(level[1], columns[1]));
                sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_permutevar8x32_ps(scale[t], lanes), sum[t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = sum_of(sum[t]);
}

/* -- float32 --------------------------------------------------------------------------------------------------------------- */

/* Levels of a block in the order of columns. */
INLINE void levels32(const tq_layer *layer, int64_t row, int64_t block, const decoding *how, __m256 level[4])
{
    const tq_codebook *book = layer->book;
    __m256i index[2];
    index32(layer, row, block, how, book->residual_bits > 0, index);
    for (int i = 0; i < 4; i++) {
        const __m128i half = i % 2 ? _mm256_extracti128_si256(index[i / 2], 1) : _mm256_castsi256_si128(index[i / 2]);
        if (book->residual_bits) {
            level[i] = _mm256_i32gather_ps(book->level, _mm256_cvtepu16_epi32(half), 4);
        } else {
            const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(how->table), half);
            const __m256i wide = _mm256_and_si256(_mm256_cvtepu16_epi32(low), _mm256_set1_epi32(255));
            level[i] = _mm256_sub_ps(_mm256_cvtepi32_ps(wide), _mm256_set1_ps(127.5f));
        }
    }
}

INLINE void exact32(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out, const int T)
{
    const decoding how = decoding_of(layer->book);
    const uint8_t *scales = layer->scales + row * layer->scales_stride;
    const float *x = (const float *)act->values + token * act->blocks * BLOCK;
    __m256 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 8) {
        const __m256 own = scales8(scales + block, layer->blocks - block);
        const int64_t end = block + 8 < layer->blocks ? block + 8 : layer->blocks;
        for (int64_t at = block; at < end; at++) {
            const __m256 scale = _mm256_permutevar8x32_ps(own, _mm256_set1_epi32((int)(at - block)));
            __m256 level[4];
            levels32(layer, row, at, &how, level);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const float *columns = x + (t * act->blocks + at) * BLOCK;
                __m256 dot = _mm256_mul_ps(level[0], _mm256_load_ps(columns));
                for (int i = 1; i < 4; i++) dot = _mm256_fmadd_ps(level[i], _mm256_load_ps(columns + 8 * i), dot);
                sum[t] = _mm256_fmadd_ps(dot, scale, sum[t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = sum_of(sum[t]);
}

static void decode(const tq_layer *layer, int64_t row, int64_t rows, float *out, int64_t stride)
{
    const decoding how = decoding_of(layer->book);
    for (int64_t end = row + rows; row < end; row++, out += stride)
        for (int64_t block = 0; block < layer->blocks; block += 8) {
            const __m256 own = scales8(layer->scales + row * layer->scales_stride + block, layer->blocks - block);
            const int64_t last = block + 8 < layer->blocks ? block + 8 : layer->blocks;
            for (int64_t at = block; at < last; at++) {
                const __m256 scale = _mm256_permutevar8x32_ps(own, _mm256_set1_epi32((int)(at - block)));
                __m256 level[4];
                levels32(layer, row, at, &how, level);
                for (int i = 0; i < 4; i++) _mm256_storeu_ps(out + at * BLOCK + 8 * i, _mm256_mul_ps(level[i], scale));
            }
        }
}

/* -- entry points ---------------------------------------------------------------------------------------------------------- */

/* Instantiates a kernel for 1, 2 and 4 tokens. */
#define KERNEL(name, call)                                                                                                   \
    static void name(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,             \
                     int64_t count, float *out)                                                                              \
    {                                                                                                                        \
        for (int64_t end = row + rows; row < end; row++, out += TOKENS)                                                      \
            for (int64_t t = 0; t < count;) {                                                                                \
                const int64_t left = count - t;                                                                              \
                if (left >= 4) call(4);                                                                                      \
                else if (left >= 2) call(2);                                                                                 \
                else call(1);                                                                                                \
                t += left >= 4 ? 4 : left >= 2 ? 2 : 1;                                                                      \
            }                                                                                                                \
    }

#define CALL_4(T) integer4(layer, act, row, token + t, out + t, T)
#define CALL_BASE(T) integer32(layer, act, row, token + t, out + t, 0, T)
#define CALL_NESTED(T) integer32(layer, act, row, token + t, out + t, 1, T)
#define CALL_EXACT(T) exact32(layer, act, row, token + t, out + t, T)

KERNEL(kernel_4, CALL_4)
KERNEL(kernel_base, CALL_BASE)
KERNEL(kernel_nested, CALL_NESTED)
KERNEL(kernel_exact, CALL_EXACT)

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    const tq_codebook *book = layer->book;
    (book->residual_bits ? kernel_nested : book->bits == 4 ? kernel_4 : kernel_base)(layer, act, row, rows, token, count, out);
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    const tq_codebook *book = layer->book;
    const int64_t columns = act->blocks * BLOCK;
    if (act->exact) {
        rotate_token(layer, x, type, act->blocks, (float *)act->values + token * columns, act->token_scale + token);
        return;
    }
    float *rotated = scratch;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    const int nested = book->residual_bits > 0, reorder = book->bits == 4 && !nested;
    int16_t *out = (int16_t *)act->values + token * columns, *q = reorder ? (int16_t *)(rotated + columns) : out;
    to_integers(rotated, act->blocks, LIMIT, nested, nested ? 0.0f : 127.5f, q, act->scale + token * act->blocks,
                act->correction + token * act->blocks);
    if (nested) act->token_scale[token] /= book->polynomial_unit;
    if (!reorder) return;
    static const uint8_t first[4] = {0, 2, 1, 3};
    for (int64_t i = 0; i < columns; i += 64)
        for (int j = 0; j < 64; j++) {
            const int column = j % 16 / 8 * BLOCK + j % 8 * 4 + first[j / 16];
            out[i + j] = q[i + column];
        }
}

const tq_engine tq_avx2 = {"avx2", 32, available, prepare, integer, kernel_exact, decode, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
