/* AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later; they all have GFNI, too).
 *
 * Integers go by chunks of 128 columns. Base plane alone, 4 bits: `vpermb` looks the levels of low and high nibbles up, and
 * `vpdpbusd` multiplies with the two bytes of the activation. Every other pair of planes: `vpermb` and `vpmultishiftqb` unpack
 * fields of any width, `vpermi2b` looks the two bytes of a level up in 128 entries; 256 levels fold onto 128 by complement,
 * because they are odd.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TURBOQUANT_AVX2
#define TURBOQUANT_AVX512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,gfni,avx512vnni,avx512vbmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,gfni,avx512vnni,avx512vbmi,prefer-vector-width=512")
#endif

#include "avx512.h"
#include "feedback.h"

enum { LIMIT = 127 * 128 + 63 };
enum { ROWS_AT_ONCE = 4 };
enum { BEYOND = 2048, LEAST = 9216 }; /* bytes prefetched ahead, to the L2 cache: beyond the rows at work, and in all */

static int available(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni");
}

/* -- integers ---------------------------------------------------------------------------------------------------------- */

/* A chunk is 4 blocks, 128 columns, in two vectors of bytes: lane i of 32 bits has columns of block i / 4 in both, so that
 * their products may be added up in one lane. */
enum { CHUNK = 4 };
enum { FOURS, BASE, FOURS_NESTED, NESTED }; /* 4 bits, another base plane, 4 + 4 bits, any two planes */

/* What the decoding of chunks keeps in registers. */
typedef struct {
    __m512i codes_gather[2], residual_gather[2]; /* bytes of the fields of either vector */
    __m512i codes_shift, residual_shift;
    __m512i residual_mask, mask;
    __m512i high[2], low[2];                     /* 128 entries each; of a base plane 16, four times */
} integers;

/* Where the lanes of chunk i of 16 blocks find their block's scale. */
INLINE __m512i lane_blocks(int i)
{
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(CHUNK * i));
}

INLINE __m512i chunk_gather(int width, int half)
{
    uint8_t gather[64]; /* word i of 8 fields: columns 0, 8, 32, 40, 64, ..., and 16 more in the second vector */
    for (int i = 0; i < 64; i++) gather[i] = (uint8_t)((i / 16 * 4 + half * 2 + i / 8 % 2) * width + i % 8) & 63;
    return _mm512_loadu_si512(gather);
}

INLINE integers integers_of(const tq_codebook *book, const int nested)
{
    integers how;
    const int rest = book->residual_bits;
    for (int half = 0; half < 2; half++) {
        how.codes_gather[half] = chunk_gather(book->bits, half);
        how.residual_gather[half] = chunk_gather(rest, half);
        how.high[half] = nested ? _mm512_loadu_si512(book->high + 64 * half)
                                : _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)book->base));
        how.low[half] = _mm512_loadu_si512(book->low + 64 * half);
    }
    how.codes_shift = unpacking_of(book->bits, rest).shift;
    how.residual_shift = unpacking_of(rest ? rest : 1, 0).shift;
    how.residual_mask = _mm512_set1_epi8((char)((1 << rest) - 1));
    how.mask = _mm512_set1_epi8((char)((1 << (book->bits + rest)) - 1));
    return how;
}

INLINE int is_nested(const int kind) { return kind == FOURS_NESTED || kind == NESTED; }
INLINE int codes_width(const tq_codebook *book, const int kind)
{
    return kind == FOURS || kind == FOURS_NESTED ? 4 : book->bits;
}
INLINE int residual_width(const tq_codebook *book, const int kind) { return kind == FOURS_NESTED ? 4 : book->residual_bits; }

/* Bytes of the levels of one chunk of one row, low ones only if nested. What lies behind its fields is decoded, too. */
INLINE void decode_chunk(__m512i base, __m512i rest, const integers *how, const int kind, __m512i high[2], __m512i low[2])
{
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        __m512i index;
        if (kind == FOURS || kind == FOURS_NESTED) { /* columns with even numbers, then those with odd ones */
            const __m512i nibble = _mm512_set1_epi8(15);
            if (kind == FOURS)
                index = half ? _mm512_srli_epi16(base, 4) : base; /* the table is there four times: bits above are ignored */
            else
                index = half ? select_bits(nibble, _mm512_srli_epi16(rest, 4), base)
                             : select_bits(nibble, rest, _mm512_slli_epi16(base, 4));
        } else {
            index = _mm512_multishift_epi64_epi8(how->codes_shift, _mm512_permutexvar_epi8(how->codes_gather[half], base));
            if (kind == NESTED)
                index = select_bits(how->residual_mask,
                                    _mm512_multishift_epi64_epi8(how->residual_shift,
                                                                 _mm512_permutexvar_epi8(how->residual_gather[half], rest)),
                                    index);
            index = _mm512_and_si512(index, how->mask);
        }
        if (kind == FOURS || kind == BASE) {
            high[half] = _mm512_permutexvar_epi8(index, how->high[0]);
        } else if (kind == NESTED) {
            high[half] = _mm512_permutex2var_epi8(how->high[0], index, how->high[1]);
            low[half] = _mm512_permutex2var_epi8(how->low[0], index, how->low[1]);
        } else { /* 256 levels: those of the upper half are complements */
            const __m512i upper = _mm512_gf2p8affine_epi64_epi8(index, _mm512_set1_epi64((long long)0x8080808080808080), 0);
            index = _mm512_gf2p8affine_epi64_epi8(index, _mm512_set1_epi64((long long)0x8182848890a0c000), 0);
            high[half] = _mm512_xor_si512(_mm512_permutex2var_epi8(how->high[0], index, how->high[1]), upper);
            low[half] = _mm512_xor_si512(_mm512_permutex2var_epi8(how->low[0], index, how->low[1]), upper);
        }
    }
}

/* (128 high + low) (128 a + b) = 128 (128 high a + high b + low a) + low b, and the last term is left out: it is 6e-5 of the
 * result, and unbiased because both bytes are centred. A base plane has no low bytes. R rows, whose chains of products go side
 * by side; one behind the other they would fill the scheduler. */
INLINE void multiply_chunk(const int8_t *x, __m512i high[][2], __m512i low[][2], const int nested, const int R, __m512i dot[])
{
    const __m512i a0 = _mm512_load_si512(x), a1 = _mm512_load_si512(x + 64);
    const __m512i b0 = _mm512_load_si512(x + 128), b1 = _mm512_load_si512(x + 192);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) dot[r] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), high[r][0], a0);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) dot[r] = _mm512_slli_epi32(_mm512_dpbusd_epi32(dot[r], high[r][1], a1), 7);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) dot[r] = _mm512_dpbusd_epi32(dot[r], high[r][0], b0);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) dot[r] = _mm512_dpbusd_epi32(dot[r], high[r][1], b1);
    if (!nested) return;
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) dot[r] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot[r], low[r][0], a0), low[r][1], a1);
}

INLINE __m512 add_scaled(__m512 sum, __m512i dot, __m512 scale, __m512i lanes)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale), sum);
}

/* `there` blocks of a plane of `width` bits. */
INLINE __m512i load_blocks(const uint8_t *plane, int width, int64_t there)
{
    return _mm512_maskz_loadu_epi8(~(__mmask64)0 >> (64 - 4 * there * width), plane);
}

/* Adds chunk i of 16 blocks of R rows times T tokens to the sums; `left` of the blocks are there. */
INLINE void integer_chunks(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, int64_t block, int i,
                           int64_t left, const integers *how, __m512 scale[][TOKENS], __m512 sum[][TOKENS], const int kind,
                           const int R, const int T)
{
    const int wide = codes_width(layer->book, kind), rest_wide = residual_width(layer->book, kind);
    const int64_t at = block + CHUNK * i, there = left - CHUNK * i < CHUNK ? left - CHUNK * i : CHUNK;
    const __m512i lanes = lane_blocks(i);
    __m512i high[2][2], low[2][2];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
        const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row + r) + 4 * wide * at, *residual = NULL;
        __m512i rest = _mm512_setzero_si512();
        _mm_prefetch((const char *)codes + R * layer->codes_stride + LEAST, _MM_HINT_T1);
        if (is_nested(kind)) {
            residual = row_of(layer->residual, layer->residual_stride, row + r) + 4 * rest_wide * at;
            _mm_prefetch((const char *)residual + R * layer->residual_stride + LEAST, _MM_HINT_T1);
            rest = load_blocks(residual, rest_wide, there);
        }
        decode_chunk(load_blocks(codes, wide, there), rest, how, kind, high[r], low[r]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        const int8_t *x = (const int8_t *)act->values + (token + t) * 2 * act->blocks * BLOCK + 64 * at;
        __m512i dot[2];
        multiply_chunk(x, high, low, is_nested(kind), R, dot);
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) sum[r][t] = add_scaled(sum[r][t], dot[r], scale[r][t], lanes);
    }
}

/* R rows, one or two, times T tokens. */
INLINE void integer_rows(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                         const integers *how, const int kind, const int R, const int T)
{
    __m512 sum[2][TOKENS];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        const int64_t left = layer->blocks - block;
        __m512 scale[2][TOKENS];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            const __m512 own = scales16(row_of(layer->scales, layer->scales_stride, row + r) + block, left);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t at = (token + t) * act->blocks + block;
                scale[r][t] = _mm512_mul_ps(own, _mm512_load_ps(act->scale + at));
                sum[r][t] = _mm512_fnmadd_ps(own, _mm512_load_ps(act->correction + at), sum[r][t]);
            }
        }
        if (left >= 16)
#pragma GCC unroll 4
            for (int i = 0; i < 16 / CHUNK; i++)
                integer_chunks(layer, act, row, token, block, i, 16, how, scale, sum, kind, R, T);
        else
            for (int i = 0; CHUNK * i < left; i++)
                integer_chunks(layer, act, row, token, block, i, left, how, scale, sum, kind, R, T);
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* -- integers, one token and four rows side by side ------------------------------------------------------------------------ */

/* Where one plane of four rows lies from the current 16 blocks on, and what of it is prefetched with them: the planes of later
 * rows, byte after byte, while the rows at work are read side by side. Memory is fastest in its own order. */
typedef struct {
    const uint8_t *first;
    int64_t stride;
    const uint8_t *ahead;
} places;

INLINE places places_of(const uint8_t *plane, int64_t stride, int64_t row)
{
    const int64_t beyond = ROWS_AT_ONCE * stride + BEYOND, far = beyond > LEAST ? beyond : LEAST;
    return (places){row_of(plane, stride, row), stride, row_of(plane, stride, row) + far};
}

INLINE __m512i load_row(const places *at, int r, int64_t offset) { return _mm512_loadu_si512(at->first + r * at->stride + offset); }

/* Line r of what comes when chunk i of four rows is at work: a line for each bit of a field. */
INLINE void prefetch(const places *at, int i, int r, const int width)
{
    if (r < width) _mm_prefetch((const char *)at->ahead + 64 * (width * i + r), _MM_HINT_T1);
}

INLINE void advance(places *at, int bytes)
{
    at->first += bytes;
    at->ahead += ROWS_AT_ONCE * bytes;
}

/* Adds chunk i of four rows to their sums. Whole vectors are read: behind the last block the activation is zero. */
INLINE void four_chunks(const tq_layer *layer, const places *codes, const places *residual, const int8_t *values, const int i,
                        const integers *how, const __m512 scale[ROWS_AT_ONCE], __m512 sum[ROWS_AT_ONCE], const int kind)
{
    const int wide = codes_width(layer->book, kind), rest_wide = residual_width(layer->book, kind);
    const __m512i lanes = lane_blocks(i);
    __m512i high[ROWS_AT_ONCE][2], low[ROWS_AT_ONCE][2], dot[ROWS_AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        const __m512i base = load_row(codes, r, 16 * wide * i);
        __m512i rest = base;
        prefetch(codes, i, r, wide);
        if (is_nested(kind)) {
            prefetch(residual, i, r, rest_wide);
            rest = load_row(residual, r, 16 * rest_wide * i);
        }
        decode_chunk(base, rest, how, kind, high[r], low[r]);
    }
    multiply_chunk(values + 256 * i, high, low, is_nested(kind), ROWS_AT_ONCE, dot);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; r++) sum[r] = add_scaled(sum[r], dot[r], scale[r], lanes);
}

/* Sums of the lanes of four vectors. */
INLINE __m128 lane_sums(const __m512 v[4])
{
    const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 all = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(first), _mm512_castps_pd(second))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(first), _mm512_castps_pd(second))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Rows in front of the last ones of a matrix: what is read behind the end of such a row still lies in its planes. */
INLINE int64_t inner_rows(const tq_layer *layer)
{
    int64_t behind = 1;
    while (behind * layer->scales_stride < 16 || behind * layer->codes_stride < 64 ||
           (layer->residual && behind * layer->residual_stride < 64))
        behind++;
    return layer->rows - behind;
}

/* As many of the rows as come in fours and are no last ones, times one token; returns their number. */
INLINE int64_t rows_abreast(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,
                            float *out, const integers *how, const int kind)
{
    const int wide = codes_width(layer->book, kind), rest_wide = residual_width(layer->book, kind);
    const int64_t last = inner_rows(layer), end = row + rows < last ? row + rows : last;
    int64_t done = 0;
    for (; row + done + ROWS_AT_ONCE <= end; done += ROWS_AT_ONCE, out += ROWS_AT_ONCE * TOKENS) {
        places codes = places_of(layer->codes, layer->codes_stride, row + done), residual;
        places scales = places_of(layer->scales, layer->scales_stride, row + done);
        if (is_nested(kind)) residual = places_of(layer->residual, layer->residual_stride, row + done);
        const int8_t *values = (const int8_t *)act->values + token * 2 * act->blocks * BLOCK;
        const float *factor = act->scale + token * act->blocks, *correction = act->correction + token * act->blocks;
        __m512 sum[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_AT_ONCE; r++) sum[r] = _mm512_setzero_ps();
        for (int64_t left = layer->blocks; left > 0; left -= 16) {
            __m512 scale[ROWS_AT_ONCE];
            prefetch(&scales, 0, 0, 1);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                const __m512 own = scales16(scales.first + r * scales.stride, 16);
                scale[r] = _mm512_mul_ps(own, _mm512_load_ps(factor));
                sum[r] = _mm512_fnmadd_ps(own, _mm512_load_ps(correction), sum[r]);
            }
            if (left >= 16)
#pragma GCC unroll 4
                for (int i = 0; i < 16 / CHUNK; i++)
                    four_chunks(layer, &codes, &residual, values, i, how, scale, sum, kind);
            else
                for (int i = 0; CHUNK * i < left; i++)
                    four_chunks(layer, &codes, &residual, values, i, how, scale, sum, kind);
            advance(&codes, 64 * wide);
            advance(&scales, 16);
            if (is_nested(kind)) advance(&residual, 64 * rest_wide);
            values += 16 * 64;
            factor += 16;
            correction += 16;
        }
        const __m128 sums = lane_sums(sum);
        _MM_EXTRACT_FLOAT(out[0], sums, 0);
        _MM_EXTRACT_FLOAT(out[TOKENS], sums, 1);
        _MM_EXTRACT_FLOAT(out[2 * TOKENS], sums, 2);
        _MM_EXTRACT_FLOAT(out[3 * TOKENS], sums, 3);
    }
    return done;
}

/* -- float32 ----------------------------------------------------------------------------------------------------------- */

INLINE void exact64(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out, const int T)
{
    const tq_codebook *book = layer->book;
    const decoding how = decoding_of(book, book->half_high, book->half_low);
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    const float *x = (const float *)act->values + token * act->blocks * BLOCK;
    __m512 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at += 2) {
            __m512 level[4];
            levels64(index64(codes, residual, at, layer->blocks, &how), &how, level);
            const __m512 first = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block)), own);
            const __m512 second = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block) + 1), own);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const float *columns = x + t * act->blocks * BLOCK + at * BLOCK;
                const __m512 one = _mm512_fmadd_ps(level[1], _mm512_load_ps(columns + 16),
                                                   _mm512_mul_ps(level[0], _mm512_load_ps(columns)));
                const __m512 two = _mm512_fmadd_ps(level[3], _mm512_load_ps(columns + 48),
                                                   _mm512_mul_ps(level[2], _mm512_load_ps(columns + 32)));
                sum[t] = _mm512_fmadd_ps(one, first, _mm512_fmadd_ps(two, second, sum[t]));
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = _mm512_reduce_add_ps(sum[t]);
}

static void decode(const tq_layer *layer, int64_t row, int64_t rows, float *out, int64_t stride)
{
    const tq_codebook *book = layer->book;
    const decoding how = decoding_of(book, book->half_high, book->half_low);
    for (int64_t end = row + rows; row < end; row++, out += stride) {
        const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
        const uint8_t *residual = book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
        const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
        for (int64_t block = 0; block < layer->blocks; block += 16) {
            const __m512 own = scales16(scales + block, layer->blocks - block);
            const int64_t last = block + 16 < layer->blocks ? block + 16 : layer->blocks;
            for (int64_t at = block; at < last; at += 2) {
                __m512 level[4];
                levels64(index64(codes, residual, at, layer->blocks, &how), &how, level);
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block) + i / 2), own);
                    _mm512_storeu_ps(out + at * BLOCK + 16 * i, _mm512_mul_ps(level[i], scale));
                }
            }
        }
    }
}

/* -- entry points ------------------------------------------------------------------------------------------------------ */

/* Instantiates a kernel: four rows of one token side by side as far as that goes, then one or two rows of up to four tokens. */
#define KERNEL(name, kind)                                                                                                  \
    static void name(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,            \
                     int64_t count, float *out)                                                                             \
    {                                                                                                                       \
        const integers how = integers_of(layer->book, is_nested(kind));                                                     \
        const int64_t end = row + rows;                                                                                     \
        if (count == 1) {                                                                                                   \
            const int64_t done = rows_abreast(layer, act, row, rows, token, out, &how, kind);                               \
            row += done;                                                                                                    \
            out += done * TOKENS;                                                                                           \
        }                                                                                                                   \
        for (; row < end; row += 2, out += 2 * TOKENS)                                                                      \
            for (int64_t t = 0; t < count;) {                                                                               \
                float *to = out + t;                                                                                        \
                const int64_t left = count - t, from = token + t;                                                           \
                const int two = end - row >= 2;                                                                             \
                if (two && left >= 4) integer_rows(layer, act, row, from, to, &how, kind, 2, 4);                            \
                else if (two && left >= 2) integer_rows(layer, act, row, from, to, &how, kind, 2, 2);                       \
                else if (two) integer_rows(layer, act, row, from, to, &how, kind, 2, 1);                                    \
                else if (left >= 4) integer_rows(layer, act, row, from, to, &how, kind, 1, 4);                              \
                else if (left >= 2) integer_rows(layer, act, row, from, to, &how, kind, 1, 2);                              \
                else integer_rows(layer, act, row, from, to, &how, kind, 1, 1);                                             \
                t += left >= 4 ? 4 : left >= 2 ? 2 : 1;                                                                     \
            }                                                                                                               \
    }

KERNEL(kernel_fours, FOURS)
KERNEL(kernel_base, BASE)
KERNEL(kernel_nested, NESTED)
KERNEL(kernel_fours_nested, FOURS_NESTED)

static void exact(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                  float *out)
{
    for (int64_t end = row + rows; row < end; row++, out += TOKENS)
        for (int64_t t = 0; t < count;) {
            const int64_t left = count - t;
            if (left >= 4) exact64(layer, act, row, token + t, out + t, 4);
            else if (left >= 2) exact64(layer, act, row, token + t, out + t, 2);
            else exact64(layer, act, row, token + t, out + t, 1);
            t += left >= 4 ? 4 : left >= 2 ? 2 : 1;
        }
}

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    const tq_codebook *book = layer->book;
    if (book->residual_bits == 0)
        (book->bits == 4 ? kernel_fours : kernel_base)(layer, act, row, rows, token, count, out);
    else
        (book->bits + book->residual_bits == 8 ? kernel_fours_nested : kernel_nested)(layer, act, row, rows, token, count, out);
}

/* How rotated columns become bytes: of 32 columns those of the first vector and then those of the second; and of two times 32
 * columns, as words, the bytes of the first and then those of the second. */
typedef struct {
    __m512i words, bytes;
    int nested;
} splitting;

INLINE splitting splitting_of(const tq_codebook *book)
{
    splitting how = {.nested = book->residual_bits > 0};
    const int fours = book->bits == 4 && (!how.nested || book->residual_bits == 4);
    uint16_t words[32];
    uint8_t bytes[64];
    for (int i = 0; i < 32; i++) words[i] = (uint16_t)(2 * (fours ? i % 16 * 2 + i / 16 : i));
    for (int i = 0; i < 64; i++) bytes[i] = (uint8_t)(2 * (i / 32 * 16 + i % 16) + i / 16 % 2 * 64);
    how.words = _mm512_loadu_si512(words);
    how.bytes = _mm512_loadu_si512(bytes);
    return how;
}

/* The largest lanes of four vectors. */
INLINE __m128 lane_maxima(const __m512 v[4])
{
    const __m512 first = _mm512_max_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 second = _mm512_max_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 all = _mm512_max_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(first), _mm512_castps_pd(second))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(first), _mm512_castps_pd(second))));
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Four words of two vectors each to their lower bytes, vector by vector. */
INLINE void lower_bytes(const __m512i words[4], const splitting *how, int8_t *out)
{
    const __m512i first = _mm512_permutex2var_epi8(words[0], how->bytes, words[1]);
    const __m512i second = _mm512_permutex2var_epi8(words[2], how->bytes, words[3]);
    _mm512_store_si512(out, _mm512_shuffle_i64x2(first, second, 0x44));
    _mm512_store_si512(out + 64, _mm512_shuffle_i64x2(first, second, 0xee));
}

/* What to_integers does, for one chunk: q = 128 a + b, -64 <= b < 64, two vectors of a and two of b. */
INLINE void split_chunk(const float *x, const splitting *how, int8_t *out, float *scale, float *correction)
{
    __m512 columns[4][2], magnitude[4];
#pragma GCC unroll 4
    for (int block = 0; block < CHUNK; block++) {
        columns[block][0] = _mm512_loadu_ps(x + 32 * block);
        columns[block][1] = _mm512_loadu_ps(x + 32 * block + 16);
        magnitude[block] = _mm512_max_ps(_mm512_abs_ps(columns[block][0]), _mm512_abs_ps(columns[block][1]));
    }
    const __m128 largest = lane_maxima(magnitude), limit = _mm_set1_ps(LIMIT), step = _mm_div_ps(largest, limit);
    const __mmask8 there = _mm_cmp_ps_mask(largest, _mm_set1_ps(1e-30f), _CMP_GT_OQ);
    const __m512 inverse = _mm512_broadcast_f32x4(_mm_maskz_div_ps(there, limit, largest));
    __m512i a[4], b[4];
#pragma GCC unroll 4
    for (int block = 0; block < CHUNK; block++) {
        const __m512 factor = _mm512_permutexvar_ps(_mm512_set1_epi32(block), inverse);
        const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(columns[block][0], factor));
        const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(columns[block][1], factor));
        const __m512i q = _mm512_permutex2var_epi16(first, how->words, second);
        a[block] = _mm512_srai_epi16(_mm512_add_epi16(q, _mm512_set1_epi16(64)), 7);
        b[block] = _mm512_sub_epi16(q, _mm512_slli_epi16(a[block], 7));
    }
    lower_bytes(a, how, out);
    lower_bytes(b, how, out + 128);
    /* Sums of the integers, or of those and their high bytes. */
    const __m512i ones = _mm512_set1_epi8(1), zero = _mm512_setzero_si512(), *bytes = (const __m512i *)out;
    const __m512i high = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, ones, bytes[0]), ones, bytes[1]);
    __m512i sum = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(how->nested ? high : zero, ones, bytes[2]), ones, bytes[3]);
    sum = _mm512_add_epi32(sum, _mm512_slli_epi32(high, 7));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, 0x4e));
    sum = _mm512_add_epi32(sum, _mm512_shuffle_epi32(sum, 0xb1));
    const __m512i first_lanes = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    const __m128 sums = _mm_cvtepi32_ps(_mm512_castsi512_si128(_mm512_permutexvar_epi32(first_lanes, sum)));
    _mm_store_ps(scale, step);
    _mm_store_ps(correction, _mm_mul_ps(_mm_mul_ps(step, _mm_set1_ps(127.5f)), sums));
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    const int64_t columns = act->blocks * BLOCK;
    float *rotated = scratch;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    if (act->exact) {
        float *out = (float *)act->values + token * columns;
        for (int64_t i = 0; i < columns; i += 64) exact_order(rotated + i, out + i);
        return;
    }
    const splitting how = splitting_of(layer->book);
    if (how.nested) act->token_scale[token] *= 128.0 / layer->book->unit;
    int8_t *out = (int8_t *)act->values + token * 2 * columns;
    float *scale = act->scale + token * act->blocks, *correction = act->correction + token * act->blocks;
    for (int64_t i = 0; i < columns; i += 128, out += 256, scale += CHUNK, correction += CHUNK)
        split_chunk(rotated + i, &how, out, scale, correction);
}

const tq_engine tq_avx512 = {"avx512", 64, available, prepare, integer, exact, decode, feed_back, &tq_avx512_bf16};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
