/* AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later).
 *
 * Base plane alone, 4 bits: 64 bytes hold 128 columns. Low and high nibbles look their level up with `vpshufb`; `vpdpbusd`
 * multiplies with the two bytes of the activation. Every other pair of planes: 64 columns at a time, `vpermb` and
 * `vpmultishiftqb` unpack fields of any width in their order, `vpermi2b` looks the two bytes of a level up in 128 entries;
 * 256 levels fold onto 128 by complement, because they are odd.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TURBOQUANT_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,prefer-vector-width=512")
#endif

#include "avx512.h"

enum { LIMIT = 127 * 128 + 63 };
enum { AHEAD = 4096 };       /* bytes that a plane is prefetched ahead: rows lie one behind the other */
enum { LONG_ROW = 4096 };    /* bytes of a row from which four rows at once are faster: fewer loads of the activation */

static int available(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
}

/* Where the lanes of a chunk find their block's scale among 16: 128 / 16 or 64 / 16 columns per lane. */
INLINE __m512i lane_blocks(int lanes_per_block)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_srli_epi32(lane, lanes_per_block == 4 ? 2 : 3);
}

/* -- base plane alone, 4 bits ------------------------------------------------------------------------------------------ */

INLINE void integer4(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                     const int R, const int T)
{
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)layer->book->base));
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    const int64_t columns = act->blocks * BLOCK, row_bytes = layer->blocks * 16;
    const uint8_t *codes[4];
    const int8_t *x[TOKENS];
    __m512 sum[4][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) codes[r] = row_of(layer->codes, layer->codes_stride, row + r);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        x[t] = (const int8_t *)act->values + (token + t) * 2 * columns;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        __m512 scale[4][TOKENS];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512 own =
                scales16(row_of(layer->scales, layer->scales_stride, row + r) + block, layer->blocks - block);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t at = (token + t) * act->blocks + block;
                scale[r][t] = _mm512_mul_ps(own, _mm512_loadu_ps(act->scale + at));
                sum[r][t] = _mm512_fnmadd_ps(own, _mm512_loadu_ps(act->correction + at), sum[r][t]);
            }
        }
        __m512i lanes = lane_blocks(4);
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at += 4) {
            __m512i even[4], odd[4];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const int64_t left = row_bytes - 16 * at;
                const uint8_t *bytes = codes[r] + 16 * at;
                _mm_prefetch((const char *)bytes + AHEAD, _MM_HINT_T1);
                const __m512i raw = left >= 64 ? _mm512_loadu_si512(bytes)
                                               : _mm512_maskz_loadu_epi8(((__mmask64)1 << left) - 1, bytes);
                even[r] = _mm512_shuffle_epi8(table, _mm512_and_si512(raw, nibble));
                odd[r] = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int8_t *columns4 = x[t] + 64 * at;
                const __m512i a_even = _mm512_load_si512(columns4), a_odd = _mm512_load_si512(columns4 + 64);
                const __m512i b_even = _mm512_load_si512(columns4 + 128), b_odd = _mm512_load_si512(columns4 + 192);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const __m512i a = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even[r], a_even), odd[r], a_odd);
                    const __m512i b = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even[r], b_even), odd[r], b_odd);
                    const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(a, 7), b);
                    sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r][t]), sum[r][t]);
                }
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(4));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* -- every other pair of planes ---------------------------------------------------------------------------------------- */

/* (128 high + low) (128 a + b) = 128 (128 high a + high b + low a) + low b, and the last term is left out: it is 6e-5 of the
 * result, and unbiased because both bytes are centred. */
INLINE void integer64(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                      const int nested, const int R, const int T)
{
    const tq_codebook *book = layer->book;
    const decoding how = decoding_of(book, book->high, book->low);
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)book->base));
    const __m512i zero = _mm512_setzero_si512();
    const int64_t columns = act->blocks * BLOCK;
    __m512 sum[4][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[r][t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        __m512 scale[4][TOKENS];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512 own =
                scales16(row_of(layer->scales, layer->scales_stride, row + r) + block, layer->blocks - block);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t at = (token + t) * act->blocks + block;
                scale[r][t] = _mm512_mul_ps(own, _mm512_loadu_ps(act->scale + at));
                sum[r][t] = _mm512_fnmadd_ps(own, _mm512_loadu_ps(act->correction + at), sum[r][t]);
            }
        }
        __m512i lanes = lane_blocks(8);
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at += 2) {
            __m512i high[4], low[4];
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row + r);
                const uint8_t *residual = nested ? row_of(layer->residual, layer->residual_stride, row + r) : NULL;
                _mm_prefetch((const char *)codes + 4 * book->bits * at + AHEAD * layer->codes_stride, _MM_HINT_T0);
                if (nested)
                    _mm_prefetch((const char *)residual + 4 * book->residual_bits * at + AHEAD, _MM_HINT_T1);
                const __m512i index = index64(codes, residual, at, layer->blocks, &how);
                if (nested)
                    bytes64(index, &how, 0, &high[r], &low[r]);
                else
                    high[r] = _mm512_shuffle_epi8(table, index);
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int8_t *columns2 = (const int8_t *)act->values + (token + t) * 2 * columns + 64 * at;
                const __m512i a = _mm512_load_si512(columns2), b = _mm512_load_si512(columns2 + 64);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    __m512i fine = _mm512_dpbusd_epi32(zero, high[r], b);
                    if (nested) fine = _mm512_dpbusd_epi32(fine, low[r], a);
                    const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(_mm512_dpbusd_epi32(zero, high[r], a), 7), fine);
                    sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r][t]), sum[r][t]);
                }
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(2));
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* -- 4 + 4 bits: indices of 128 columns from two nibbles each ------------------------------------------------------------- */

INLINE void integer44(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                     const int R, const int T)
{
    const decoding how = decoding_of(layer->book, layer->book->high, layer->book->low);
    const __m512i nibble = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
    const int64_t columns = act->blocks * BLOCK, row_bytes = layer->blocks * 16;
    const uint8_t *codes[4], *residual[4];
    const int8_t *x[TOKENS];
    __m512 sum[4][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        codes[r] = row_of(layer->codes, layer->codes_stride, row + r);
        residual[r] = row_of(layer->residual, layer->residual_stride, row + r);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        x[t] = (const int8_t *)act->values + (token + t) * 2 * columns;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) sum[r][t] = _mm512_setzero_ps();
    }
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        __m512 scale[4][TOKENS];
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512 own =
                scales16(row_of(layer->scales, layer->scales_stride, row + r) + block, layer->blocks - block);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int64_t at = (token + t) * act->blocks + block;
                scale[r][t] = _mm512_mul_ps(own, _mm512_loadu_ps(act->scale + at));
                sum[r][t] = _mm512_fnmadd_ps(own, _mm512_loadu_ps(act->correction + at), sum[r][t]);
            }
        }
        __m512i lanes = lane_blocks(4);
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at += 4) {
            __m512i even[4], odd[4], even_low[4], odd_low[4];
            const int64_t left = row_bytes - 16 * at;
            const __mmask64 there = left >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << left) - 1;
#pragma GCC unroll 4
            for (int r = 0; r < R; r++) {
                _mm_prefetch((const char *)codes[r] + 16 * at + AHEAD, _MM_HINT_T1);
                _mm_prefetch((const char *)residual[r] + 16 * at + AHEAD, _MM_HINT_T1);
                const __m512i base = _mm512_maskz_loadu_epi8(there, codes[r] + 16 * at);
                const __m512i rest = _mm512_maskz_loadu_epi8(there, residual[r] + 16 * at);
                bytes64(select_bits(nibble, rest, _mm512_slli_epi16(base, 4)), &how, 1, &even[r], &even_low[r]);
                bytes64(select_bits(nibble, _mm512_srli_epi16(rest, 4), base), &how, 1, &odd[r], &odd_low[r]);
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const int8_t *columns4 = x[t] + 64 * at;
                const __m512i a_even = _mm512_load_si512(columns4), a_odd = _mm512_load_si512(columns4 + 64);
                const __m512i b_even = _mm512_load_si512(columns4 + 128), b_odd = _mm512_load_si512(columns4 + 192);
#pragma GCC unroll 4
                for (int r = 0; r < R; r++) {
                    const __m512i a = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even[r], a_even), odd[r], a_odd);
                    const __m512i b = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, even[r], b_even), odd[r], b_odd);
                    const __m512i low = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(b, even_low[r], a_even), odd_low[r], a_odd);
                    const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(a, 7), low);
                    sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r][t]), sum[r][t]);
                }
            }
            lanes = _mm512_add_epi32(lanes, _mm512_set1_epi32(4));
        }
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
            const int64_t most = count > 1 ? 2 : layer->codes_stride >= LONG_ROW ? 4 : 1;                                    \
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

#define CALL_4(R, T) integer4(layer, act, row, from, to, R, T)
#define CALL_BASE(R, T) integer64(layer, act, row, from, to, 0, R, T)
#define CALL_NESTED(R, T) integer64(layer, act, row, from, to, 1, R, T)
#define CALL_44(R, T) integer44(layer, act, row, from, to, R, T)
#define CALL_EXACT(R, T) \
    for (int r = 0; r < R; r++) exact64(layer, act, row + r, from, to + r * TOKENS, T)

KERNEL(kernel_4, CALL_4)
KERNEL(kernel_base, CALL_BASE)
KERNEL(kernel_nested, CALL_NESTED)
KERNEL(kernel_44, CALL_44)
KERNEL(kernel_exact, CALL_EXACT)

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    const tq_codebook *book = layer->book;
    if (book->residual_bits == 0)
        (book->bits == 4 ? kernel_4 : kernel_base)(layer, act, row, rows, token, count, out);
    else
        (book->bits + book->residual_bits == 8 ? kernel_44 : kernel_nested)(layer, act, row, rows, token, count, out);
}

/* Bytes a and b of 64 integers, taken `step` apart. */
static void split(const int16_t *q, int step, int8_t *a, int8_t *b)
{
    for (int i = 0; i < 64; i++) {
        const int value = q[step * i], high = (value + 64) >> 7;
        a[i] = (int8_t)high;
        b[i] = (int8_t)(value - 128 * high);
    }
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
    if (book->bits == 4 && (!nested || book->residual_bits == 4))
        for (int64_t i = 0; i < columns; i += 128, out += 256) {
            split(q + i, 2, out, out + 128);
            split(q + i + 1, 2, out + 64, out + 192);
        }
    else
        for (int64_t i = 0; i < columns; i += 64, out += 128) split(q + i, 1, out, out + 64);
}

const tq_engine tq_avx512 = {"avx512", 64, available, prepare, integer, kernel_exact, decode, &tq_avx512_bf16};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
