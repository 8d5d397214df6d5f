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
enum { AHEAD = 8192 };       /* bytes that a plane is prefetched ahead: rows lie one behind the other */

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

/* One chunk of one row, from the `blocks` that are there: bytes of the levels, low ones only if nested. */
INLINE void decode_chunk(const uint8_t *codes, const uint8_t *residual, int64_t blocks, const tq_codebook *book,
                         const integers *how, const int kind, const int full, __m512i high[2], __m512i low[2])
{
    const int codes_width = kind == FOURS || kind == FOURS_NESTED ? 4 : book->bits;
    const int residual_width = kind == FOURS_NESTED ? 4 : book->residual_bits;
    const __mmask64 all = ~(__mmask64)0;
    const int64_t there = full ? CHUNK : blocks;
    const __m512i base = full && codes_width == 4
                             ? _mm512_loadu_si512(codes)
                             : _mm512_maskz_loadu_epi8(all >> (64 - 4 * there * codes_width), codes);
    __m512i rest = base;
    if (kind == FOURS_NESTED || kind == NESTED)
        rest = full && residual_width == 4
                   ? _mm512_loadu_si512(residual)
                   : _mm512_maskz_loadu_epi8(all >> (64 - 4 * there * residual_width), residual);
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
 * result, and unbiased because both bytes are centred. A base plane has no low bytes. */
INLINE void integer_chunk(const int8_t *x, const __m512i high[2], const __m512i low[2], const __m512 scale, const __m512i lanes,
                          const int nested, __m512 *sum)
{
    const __m512i a0 = _mm512_load_si512(x), a1 = _mm512_load_si512(x + 64);
    const __m512i b0 = _mm512_load_si512(x + 128), b1 = _mm512_load_si512(x + 192);
    __m512i dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), high[0], a0), high[1], a1);
    dot = _mm512_slli_epi32(dot, 7);
    dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot, high[0], b0), high[1], b1);
    if (nested) dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot, low[0], a0), low[1], a1);
    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale), *sum);
}

/* Adds chunk i of 16 blocks of R rows times T tokens to the sums; `left` of the blocks are there. */
INLINE void integer_chunks(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, int64_t block, int i,
                           int64_t left, const integers *how, __m512 scale[][TOKENS], __m512 sum[][TOKENS], const int kind,
                           const int full, const int R, const int T)
{
    const tq_codebook *book = layer->book;
    const int nested = kind == FOURS_NESTED || kind == NESTED;
    const int codes_width = kind == FOURS || kind == FOURS_NESTED ? 4 : book->bits;
    const int residual_width = kind == FOURS_NESTED ? 4 : book->residual_bits;
    const int64_t at = block + CHUNK * i, there = left - CHUNK * i;
    const __m512i lanes = lane_blocks(i);
    __m512i high[ROWS_AT_ONCE][2], low[ROWS_AT_ONCE][2];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row + r) + 4 * codes_width * at;
        const uint8_t *residual = NULL;
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T1);
        if (nested) {
            residual = row_of(layer->residual, layer->residual_stride, row + r) + 4 * residual_width * at;
            _mm_prefetch((const char *)residual + AHEAD, _MM_HINT_T1);
        }
        decode_chunk(codes, residual, there < CHUNK ? there : CHUNK, book, how, kind, full, high[r], low[r]);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        const int8_t *x = (const int8_t *)act->values + (token + t) * 2 * act->blocks * BLOCK + 64 * at;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) integer_chunk(x, high[r], low[r], scale[r][t], lanes, nested, &sum[r][t]);
    }
}

/* R rows times T tokens. */
INLINE void integer_rows(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                         const int kind, const int R, const int T)
{
    const integers how = integers_of(layer->book, kind == FOURS_NESTED || kind == NESTED);
    __m512 sum[ROWS_AT_ONCE][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        const int64_t left = layer->blocks - block;
        __m512 scale[ROWS_AT_ONCE][TOKENS];
#pragma GCC unroll 4
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
                integer_chunks(layer, act, row, token, block, i, left, &how, scale, sum, kind, 1, R, T);
        else
            for (int i = 0; CHUNK * i < left; i++)
                integer_chunks(layer, act, row, token, block, i, left, &how, scale, sum, kind, 0, R, T);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t]);
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

/* Instantiates a kernel: one or four rows of one token, or two rows of up to four tokens. */
#define KERNEL(name, call)                                                                                                  \
    static void name(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,            \
                     int64_t count, float *out)                                                                             \
    {                                                                                                                       \
        for (int64_t end = row + rows; row < end;) {                                                                        \
            const int64_t most = count > 1 ? 2 : ROWS_AT_ONCE;                                                              \
            const int64_t many = end - row >= most ? most : 1;                                                              \
            for (int64_t t = 0; t < count;) {                                                                               \
                float *to = out + t;                                                                                        \
                const int64_t left = count - t, from = token + t;                                                           \
                if (many == 4) call(4, 1);                                                                                  \
                else if (many == 2 && left >= 4) call(2, 4);                                                                \
                else if (many == 2 && left >= 2) call(2, 2);                                                                \
                else if (many == 2) call(2, 1);                                                                             \
                else if (left >= 4) call(1, 4);                                                                             \
                else if (left >= 2) call(1, 2);                                                                             \
                else call(1, 1);                                                                                            \
                t += left >= 4 ? 4 : left >= 2 ? 2 : 1;                                                                     \
            }                                                                                                               \
            row += many;                                                                                                    \
            out += many * TOKENS;                                                                                           \
        }                                                                                                                   \
    }

#define CALL_FOURS(R, T) integer_rows(layer, act, row, from, to, FOURS, R, T)
#define CALL_BASE(R, T) integer_rows(layer, act, row, from, to, BASE, R, T)
#define CALL_NESTED(R, T) integer_rows(layer, act, row, from, to, NESTED, R, T)
#define CALL_FOURS_NESTED(R, T) integer_rows(layer, act, row, from, to, FOURS_NESTED, R, T)
#define CALL_EXACT(R, T) \
    for (int r = 0; r < R; r++) exact64(layer, act, row + r, from, to + r * TOKENS, T)

KERNEL(kernel_fours, CALL_FOURS)
KERNEL(kernel_base, CALL_BASE)
KERNEL(kernel_nested, CALL_NESTED)
KERNEL(kernel_fours_nested, CALL_FOURS_NESTED)
KERNEL(kernel_exact, CALL_EXACT)

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    const tq_codebook *book = layer->book;
    if (book->residual_bits == 0)
        (book->bits == 4 ? kernel_fours : kernel_base)(layer, act, row, rows, token, count, out);
    else
        (book->bits + book->residual_bits == 8 ? kernel_fours_nested : kernel_nested)(layer, act, row, rows, token, count, out);
}

/* q = 128 a + b, -64 <= b < 64. */
INLINE void bytes_of(int16_t q, int8_t *a, int8_t *b)
{
    *a = (int8_t)((q + 64) >> 7);
    *b = (int8_t)((q & 127) - ((q & 64) << 1));
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    const tq_codebook *book = layer->book;
    const int64_t columns = act->blocks * BLOCK;
    float *rotated = scratch;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    if (act->exact) {
        float *out = (float *)act->values + token * columns;
        for (int64_t i = 0; i < columns; i += 64) exact_order(rotated + i, out + i);
        return;
    }
    int16_t *q = (int16_t *)(rotated + columns);
    const int nested = book->residual_bits > 0;
    to_integers(rotated, act->blocks, LIMIT, nested, 127.5f, q, act->scale + token * act->blocks,
                act->correction + token * act->blocks);
    act->token_scale[token] *= nested ? 128.0 / book->unit : 1.0;
    int8_t *out = (int8_t *)act->values + token * 2 * columns;
    const int fours = book->bits == 4 && (!nested || book->residual_bits == 4);
    for (int64_t i = 0; i < columns; i += 128, out += 256)
        for (int half = 0; half < 2; half++)
            for (int part = 0; part < 4; part++) { /* loops that become vectors */
                const int16_t *from = q + i + (fours ? 32 * part + half : 32 * part + 16 * half);
                int8_t *a = out + half * 64 + part * 16, *b = a + 128;
                if (fours)
                    for (int j = 0; j < 16; j++) bytes_of(from[2 * j], a + j, b + j);
                else
                    for (int j = 0; j < 16; j++) bytes_of(from[j], a + j, b + j);
            }
}

const tq_engine tq_avx512 = {"avx512", 64, available, prepare, integer, kernel_exact, decode, feed_back, &tq_avx512_bf16};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
