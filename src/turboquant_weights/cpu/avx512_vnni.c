/* AVX-512 with VNNI but without VBMI (Cascade Lake, Cooper Lake): no shuffle of bytes crosses 128 bits here.
 *
 * Base plane of 4 bits: as in avx512.c, with `vpshufb` instead of `vpermb`. All other planes: levels as 16-bit words, which
 * `vpermw` looks up in 32 entries or `vpermi2w` in 64, and `vpdpwssd` multiplies with 16-bit activations. 128 levels take two
 * look-ups, 256 fold onto 128, because levels are odd. 4 + 4 bits and bfloat16: two look-ups by the upper 6 bits, a level and
 * the step to the next, times the lower 2 bits: 0.08 % off, where bfloat16 rounds the result by 0.17 %.
 */
#if defined(__x86_64__)

#include <immintrin.h>

#define TURBOQUANT_AVX2
#define TURBOQUANT_AVX512

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512")
#endif

#include "feedback.h"
#include "prepare.h"

#define INLINE static inline __attribute__((always_inline))
enum { LIMIT = 127 * 128 + 63, WORD_LIMIT = 8191 }; /* of bytes a, b; of words: a lane adds 8 products with levels of 2^15 */
enum { ROWS_AT_ONCE = 4 };
enum { AHEAD = 8192 };        /* bytes that a plane is prefetched ahead, to the L1 cache: rows lie one behind the other */

static int available(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

INLINE const uint8_t *row_of(const uint8_t *plane, int64_t stride, int64_t row) { return plane + row * stride; }

INLINE __m512i select_bits(__m512i mask, __m512i set, __m512i clear) { return _mm512_ternarylogic_epi32(mask, set, clear, 0xca); }

/* 16 scales of a row, times 2^-19; `left` are there. */
INLINE __m512 scales16(const uint8_t *scales, int64_t left)
{
    const __mmask16 mask = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, scales));
    return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 5));
}

/* -- fields of any width ------------------------------------------------------------------------------------------------- */

/* How 32 fields of a plane become words, in their order: fetch the two bytes a field lies in, shift it down. What stands
 * above it is not cleared. */
typedef struct {
    __m512i fetch, shift;
    __mmask16 there;             /* bytes of a block */
    int width;
} unpacking;

INLINE unpacking unpacking_of(int width)
{
    uint8_t fetch[64];
    uint16_t shift[32];
    for (int i = 0; i < 32; i++) {
        const int byte = i * width / 8;
        fetch[2 * i] = (uint8_t)byte;
        fetch[2 * i + 1] = (uint8_t)(byte + 1 < 4 * width ? byte + 1 : 0x80);
        shift[i] = (uint16_t)(i * width % 8);
    }
    return (unpacking){_mm512_loadu_si512(fetch), _mm512_loadu_si512(shift), (__mmask16)((1u << 4 * width) - 1), width};
}

INLINE __m512i unpack(const uint8_t *row, int64_t block, const unpacking *how)
{
    const __m128i raw = _mm_maskz_loadu_epi8(how->there, row + 4 * how->width * block);
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(raw), how->fetch), how->shift);
}

typedef struct {
    unpacking codes, residual;
    __m512i residual_mask, mask; /* of an index */
    __m128i up;                  /* residual bits */
    __m512i table[4];            /* words; of 256 levels the upper half */
    int total;
} decoding;

INLINE decoding decoding_of(const tq_codebook *book, const void *table)
{
    decoding how;
    how.total = book->bits + book->residual_bits;
    how.codes = unpacking_of(book->bits);
    how.residual = unpacking_of(book->residual_bits ? book->residual_bits : 1);
    how.residual_mask = _mm512_set1_epi16((int16_t)((1 << book->residual_bits) - 1));
    how.mask = _mm512_set1_epi16((int16_t)((1 << how.total) - 1));
    how.up = _mm_cvtsi32_si128(book->residual_bits);
    for (int i = 0; i < 4; i++) how.table[i] = _mm512_loadu_si512((const uint16_t *)table + (how.total == 8 ? 128 : 0) + 32 * i);
    return how;
}

/* 32 indices in the order of columns, as words; residual may be NULL. */
INLINE __m512i index32(const uint8_t *codes, const uint8_t *residual, int64_t block, const decoding *how)
{
    __m512i index = unpack(codes, block, &how->codes);
    if (residual)
        index = select_bits(how->residual_mask, unpack(residual, block, &how->residual), _mm512_sll_epi16(index, how->up));
    return _mm512_and_si512(index, how->mask);
}

/* Words of the levels. Of 256 the lower half is negative: `negative` says which, and the table has its magnitudes. */
INLINE __m512i look_up(__m512i index, const decoding *how, __mmask32 *negative)
{
    *negative = 0;
    if (how->total < 7) return _mm512_permutex2var_epi16(how->table[0], index, how->table[1]);
    if (how->total == 8) {
        *negative = _mm512_testn_epi16_mask(index, _mm512_set1_epi16(128));
        index = _mm512_xor_si512(index, _mm512_maskz_set1_epi16(*negative, 255));
    }
    return _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                   _mm512_permutex2var_epi16(how->table[0], index, how->table[1]),
                                   _mm512_permutex2var_epi16(how->table[2], index, how->table[3]));
}

/* 32 levels in the order of columns. */
INLINE void levels32(__m512i index, const decoding *how, __m512 level[2])
{
    __mmask32 negative;
    const __m512i magnitude = look_up(index, how, &negative);
    const __m512i half = _mm512_or_si512(magnitude, _mm512_maskz_set1_epi16(negative, (int16_t)0x8000));
    level[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(half));
    level[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
}

/* -- integers ------------------------------------------------------------------------------------------------------------ */

enum { CHUNK = 4 };              /* blocks: 128 columns */
/* Planes: 2, 3, 4 bits, 4 + 1, 4 + 2, 4 + 3, 4 + 4 for bfloat16, any. */
enum { TWOS, THREES, FOURS, FOURS_ONES, FOURS_TWOS, FOURS_THREES, FOURS_FOURS, WORDS };

/* Bytes of a block in either plane. */
INLINE int code_bytes(const int kind) { return kind == TWOS ? 8 : kind == THREES ? 12 : 16; }
INLINE int rest_bytes(const int kind) { return kind > FOURS ? 4 * (kind - FOURS) : 0; }

/* What the decoding of chunks keeps in registers. */
typedef struct {
    __m512i bytes;               /* levels of 4 bits, four times */
    __m512i level[4];            /* words: as many levels as there are, fewer than 32 repeated, or the first of four in a row */
    __m512i step[2];             /* between those four */
    __m512i fetch, dwords, shift; /* how 4 fields of 1 or 3 bits come into each word: bytes, after double words, shifted down */
} integers;

INLINE integers integers_of(const tq_codebook *book, const int kind)
{
    integers how;
    how.bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)book->base));
    for (int i = 0; i < 4; i++)
        how.level[i] = _mm512_loadu_si512(kind == FOURS_FOURS && i < 2 ? book->line_start + 32 * i : book->word + 32 * i);
    if (kind == THREES) how.level[0] = _mm512_broadcast_i32x4(_mm512_castsi512_si128(how.level[0]));
    if (kind == TWOS) how.level[0] = _mm512_broadcastq_epi64(_mm512_castsi512_si128(how.level[0]));
    for (int i = 0; i < 2; i++) how.step[i] = _mm512_loadu_si512(book->line_step + 32 * i);
    how.shift = _mm512_set1_epi32(4 << 16); /* every other word begins in the middle of a byte */
    how.dwords = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
    if (kind == FOURS_ONES) { /* word j of the chunk: byte j / 2 */
        const __m512i pair = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3); /* of 4 bytes */
        const __m512i word = _mm512_broadcast_i32x4(
            _mm_setr_epi32((int)0x80008000, (int)0x80018001, (int)0x80028002, (int)0x80038003));
        how.fetch = _mm512_add_epi16(word, _mm512_mullo_epi32(pair, _mm512_set1_epi32(0x00040004)));
    } else /* word j of 8: the two bytes from 3 j / 2 on */
        how.fetch = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11));
    return how;
}

/* Where the lanes of chunk i of 16 blocks find their block's scale. */
INLINE __m512i lane_blocks(int i)
{
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(CHUNK * i));
}

/* `there` of 64 bytes. */
INLINE __m512i load(const uint8_t *bytes, int64_t there)
{
    return there >= 64 ? _mm512_loadu_si512(bytes) : _mm512_maskz_loadu_epi8(((__mmask64)1 << there) - 1, bytes);
}

/* Fields of 3 bits of one chunk, 4 in each word; above the fourth are others. */
INLINE __m512i threes(const uint8_t *plane, int64_t blocks, const integers *how)
{
    const __m512i raw = _mm512_permutexvar_epi32(how->dwords, load(plane, 12 * blocks));
    return _mm512_srlv_epi16(_mm512_shuffle_epi8(raw, how->fetch), how->shift);
}

/* Fields of 2 bits: a byte in each word. */
INLINE __m512i twos(const uint8_t *plane, int64_t blocks)
{
    return _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(blocks >= CHUNK ? 0xffffffffu : (1u << 8 * blocks) - 1, plane));
}

/* Indices of the columns i, i + 4, ... from their base fields and `R` bits each of `rest`; what stands above is not cleared. */
INLINE __m512i joined(__m512i raw, __m512i rest, const int i, const int R)
{
    const __m512i up = i == 0 ? _mm512_slli_epi16(raw, R) : _mm512_srli_epi16(raw, 4 * i - R);
    return select_bits(_mm512_set1_epi16((1 << R) - 1), i == 0 ? rest : _mm512_srli_epi16(rest, R * i), up);
}

/* Levels of one chunk of one row, from the `blocks` that are there. FOURS: w[0] are bytes of the columns with even numbers,
 * w[1] with odd ones. Otherwise words: w[i] has columns i, i + 4, i + 8 ... */
INLINE void decode_chunk(const uint8_t *codes, const uint8_t *residual, int64_t blocks, const integers *how, const int kind,
                         __m512i w[4])
{
    if (kind == TWOS || kind == THREES) { /* the table repeats itself: bits above an index do not matter */
        const __m512i fields = kind == TWOS ? twos(codes, blocks) : threes(codes, blocks, how);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i index = i == 0 ? fields : _mm512_srli_epi16(fields, (kind == TWOS ? 2 : 3) * i);
            w[i] = _mm512_permutexvar_epi16(index, how->level[0]);
        }
        return;
    }
    const __m512i raw = load(codes, 16 * blocks);
    if (kind == FOURS) {
        const __m512i nibble = _mm512_set1_epi8(15);
        w[0] = _mm512_shuffle_epi8(how->bytes, _mm512_and_si512(raw, nibble));
        w[1] = _mm512_shuffle_epi8(how->bytes, _mm512_and_si512(_mm512_srli_epi16(raw, 4), nibble));
    } else if (kind == FOURS_ONES) { /* look-ups ignore the bits above an index, here and below */
        const __m128i bits = blocks >= CHUNK ? _mm_loadu_si128((const __m128i *)residual)
                                             : _mm_maskz_loadu_epi8((__mmask16)((1u << 4 * blocks) - 1), residual);
        const __m512i rest = _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(bits), how->fetch), how->shift);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = _mm512_permutexvar_epi16(joined(raw, rest, i, 1), how->level[0]);
    } else if (kind == FOURS_TWOS) {
        const __m512i rest = twos(residual, blocks);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) w[i] = _mm512_permutex2var_epi16(how->level[0], joined(raw, rest, i, 2), how->level[1]);
    } else if (kind == FOURS_THREES) {
        const __m512i rest = threes(residual, blocks, how);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i index = joined(raw, rest, i, 3);
            w[i] = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(index, _mm512_set1_epi16(64)),
                                           _mm512_permutex2var_epi16(how->level[0], index, how->level[1]),
                                           _mm512_permutex2var_epi16(how->level[2], index, how->level[3]));
        }
    } else {
        const __m512i nibble = _mm512_set1_epi8(15), low = _mm512_set1_epi16(3), rest = load(residual, 16 * blocks);
        const __m512i even = select_bits(nibble, rest, _mm512_slli_epi16(raw, 4));
        const __m512i odd = select_bits(nibble, _mm512_srli_epi16(rest, 4), raw);
        const __m512i quarter[4] = {_mm512_srli_epi16(even, 2), _mm512_srli_epi16(odd, 2), _mm512_srli_epi16(even, 10),
                                    _mm512_srli_epi16(odd, 10)};
        const __m512i within[4] = {even, odd, _mm512_srli_epi16(even, 8), _mm512_srli_epi16(odd, 8)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512i start = _mm512_permutex2var_epi16(how->level[0], quarter[i], how->level[1]);
            const __m512i step = _mm512_permutex2var_epi16(how->step[0], quarter[i], how->step[1]);
            w[i] = _mm512_add_epi16(start, _mm512_mullo_epi16(step, _mm512_and_si512(within[i], low)));
        }
    }
}

/* Adds chunk i of 16 blocks of R rows times T tokens to the sums; `left` of the blocks are there. */
INLINE void integer_chunks(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, int64_t block, int i,
                           int64_t left, const integers *how, __m512 scale[][TOKENS], __m512 sum[][TOKENS], const int kind,
                           const int R, const int T)
{
    const int64_t at = block + CHUNK * i, there = left - CHUNK * i < CHUNK ? left - CHUNK * i : CHUNK;
    const __m512i lanes = lane_blocks(i);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
        const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row + r) + code_bytes(kind) * at, *residual = NULL;
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        if (rest_bytes(kind)) {
            residual = row_of(layer->residual, layer->residual_stride, row + r) + rest_bytes(kind) * at;
            _mm_prefetch((const char *)residual + AHEAD, _MM_HINT_T0);
        }
        __m512i w[4];
        decode_chunk(codes, residual, there, how, kind, w);
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const __m512i *x = (const __m512i *)((const char *)act->values + (token + t) * 2 * act->blocks * BLOCK + 64 * at);
            __m512i dot = _mm512_setzero_si512();
            if (kind == FOURS) {
                dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot, w[0], x[0]), w[1], x[1]);
                dot = _mm512_slli_epi32(dot, 7);
                dot = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(dot, w[0], x[2]), w[1], x[3]);
            } else {
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) dot = _mm512_dpwssd_epi32(dot, w[j], x[j]);
            }
            sum[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lanes, scale[r][t]), sum[r][t]);
        }
    }
}

/* R rows times T tokens of the planes that are decoded by chunks. */
INLINE void integer_rows(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                         const integers *how, const int kind, const int R, const int T)
{
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
                if (kind == FOURS) sum[r][t] = _mm512_fnmadd_ps(own, _mm512_load_ps(act->correction + at), sum[r][t]);
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
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) out[r * TOKENS + t] = _mm512_reduce_add_ps(sum[r][t]);
}

/* -- integers, one token and four rows side by side ------------------------------------------------------------------------ */

/* Where four rows lie, from the current 16 blocks on, so that chunks are constants away. */
typedef struct {
    const uint8_t *codes[ROWS_AT_ONCE], *residual[ROWS_AT_ONCE], *scales[ROWS_AT_ONCE];
    const __m512i *values;
} places;

/* Adds chunk i of four rows to their sums. Whole vectors are read: behind the last block the activation is zero. The rows'
 * chains of products go side by side; one behind the other they would fill the scheduler. */
INLINE void four_chunks(const places *at, const int i, const integers *how, const __m512 scale[ROWS_AT_ONCE],
                        __m512 sum[ROWS_AT_ONCE], const int kind)
{
    __m512i w[ROWS_AT_ONCE][4], dot[ROWS_AT_ONCE];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        const uint8_t *codes = at->codes[r] + CHUNK * code_bytes(kind) * i;
        const uint8_t *residual = rest_bytes(kind) ? at->residual[r] + CHUNK * rest_bytes(kind) * i : NULL;
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        if (residual) _mm_prefetch((const char *)residual + AHEAD, _MM_HINT_T0);
        decode_chunk(codes, residual, CHUNK, how, kind, w[r]);
        dot[r] = _mm512_setzero_si512();
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i x = _mm512_load_si512(at->values + 4 * i + j);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            if (kind != FOURS) {
                dot[r] = _mm512_dpwssd_epi32(dot[r], w[r][j], x);
                continue;
            }
            if (j == 2) dot[r] = _mm512_slli_epi32(dot[r], 7);
            dot[r] = _mm512_dpbusd_epi32(dot[r], w[r][j % 2], x);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS_AT_ONCE; r++)
        sum[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), _mm512_permutexvar_ps(lane_blocks(i), scale[r]), sum[r]);
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

/* As many of the rows as come in fours and are no last ones, times one token; returns their number. Not for 4 + 4 bits, which
 * are slower from memory that way (DESIGN.md). */
INLINE int64_t rows_abreast(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,
                            float *out, const int kind)
{
    const integers how = integers_of(layer->book, kind);
    const int64_t last = inner_rows(layer), end = row + rows < last ? row + rows : last;
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = rest_bytes(kind) ? row_of(layer->residual, layer->residual_stride, row) : NULL;
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    int64_t done = 0;
    for (; row + done + ROWS_AT_ONCE <= end; done += ROWS_AT_ONCE, out += ROWS_AT_ONCE * TOKENS) {
        places at = {.values = (const __m512i *)((const char *)act->values + token * 2 * act->blocks * BLOCK)};
        const float *factor = act->scale + token * act->blocks, *correction = act->correction + token * act->blocks;
        __m512 sum[ROWS_AT_ONCE];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS_AT_ONCE; r++) {
            sum[r] = _mm512_setzero_ps();
            at.codes[r] = codes;
            at.scales[r] = scales;
            codes += layer->codes_stride;
            scales += layer->scales_stride;
            if (!rest_bytes(kind)) continue;
            at.residual[r] = residual;
            residual += layer->residual_stride;
        }
        for (int64_t left = layer->blocks; left > 0; left -= 16) {
            __m512 scale[ROWS_AT_ONCE];
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                const __m512 own = scales16(at.scales[r], 16);
                scale[r] = _mm512_mul_ps(own, _mm512_load_ps(factor));
                if (kind == FOURS) sum[r] = _mm512_fnmadd_ps(own, _mm512_load_ps(correction), sum[r]);
            }
            if (left >= 16)
#pragma GCC unroll 4
                for (int i = 0; i < 16 / CHUNK; i++) four_chunks(&at, i, &how, scale, sum, kind);
            else
                for (int i = 0; CHUNK * i < left; i++) four_chunks(&at, i, &how, scale, sum, kind);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                at.codes[r] += 16 * code_bytes(kind);
                at.scales[r] += 16;
                if (rest_bytes(kind)) at.residual[r] += 16 * rest_bytes(kind);
            }
            at.values += 16;
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

/* -- integers, any planes -------------------------------------------------------------------------------------------------- */

/* One row of any planes times T tokens, block by block. */
INLINE void words_row(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                      const decoding *how, const int T)
{
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = layer->book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    __m512 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        __m512 scale[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) scale[t] = _mm512_mul_ps(own, _mm512_load_ps(act->scale + (token + t) * act->blocks + block));
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at++) {
            __mmask32 negative;
            __m512i w = look_up(index32(codes, residual, at, how), how, &negative);
            w = _mm512_mask_sub_epi16(w, negative, _mm512_setzero_si512(), w);
            const __m512i lane = _mm512_set1_epi32((int)(at - block));
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const __m512i *x = (const __m512i *)((const int16_t *)act->values + ((token + t) * act->blocks + at) * BLOCK);
                const __m512i dot = _mm512_dpwssd_epi32(_mm512_setzero_si512(), w, *x);
                sum[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_permutexvar_ps(lane, scale[t]), sum[t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = _mm512_reduce_add_ps(sum[t]);
}

/* -- float32 ------------------------------------------------------------------------------------------------------------- */

INLINE void exact_row(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                      const decoding *how, const int T)
{
    const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
    const uint8_t *residual = layer->book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
    const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
    const float *x = (const float *)act->values + token * act->blocks * BLOCK;
    __m512 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm512_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 16) {
        const __m512 own = scales16(scales + block, layer->blocks - block);
        const int64_t end = block + 16 < layer->blocks ? block + 16 : layer->blocks;
        for (int64_t at = block; at < end; at++) {
            const __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block)), own);
            __m512 level[2];
            levels32(index32(codes, residual, at, how), how, level);
#pragma GCC unroll 4
            for (int t = 0; t < T; t++) {
                const float *columns = x + (t * act->blocks + at) * BLOCK;
                const __m512 dot = _mm512_fmadd_ps(level[1], _mm512_load_ps(columns + 16),
                                                   _mm512_mul_ps(level[0], _mm512_load_ps(columns)));
                sum[t] = _mm512_fmadd_ps(dot, scale, sum[t]);
            }
        }
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = _mm512_reduce_add_ps(sum[t]);
}

static void decode(const tq_layer *layer, int64_t row, int64_t rows, float *out, int64_t stride)
{
    const decoding how = decoding_of(layer->book, layer->book->half);
    for (int64_t end = row + rows; row < end; row++, out += stride) {
        const uint8_t *codes = row_of(layer->codes, layer->codes_stride, row);
        const uint8_t *residual = layer->book->residual_bits ? row_of(layer->residual, layer->residual_stride, row) : NULL;
        const uint8_t *scales = row_of(layer->scales, layer->scales_stride, row);
        for (int64_t block = 0; block < layer->blocks; block += 16) {
            const __m512 own = scales16(scales + block, layer->blocks - block);
            const int64_t last = block + 16 < layer->blocks ? block + 16 : layer->blocks;
            for (int64_t at = block; at < last; at++) {
                const __m512 scale = _mm512_permutexvar_ps(_mm512_set1_epi32((int)(at - block)), own);
                __m512 level[2];
                levels32(index32(codes, residual, at, &how), &how, level);
                _mm512_storeu_ps(out + at * BLOCK, _mm512_mul_ps(level[0], scale));
                _mm512_storeu_ps(out + at * BLOCK + 16, _mm512_mul_ps(level[1], scale));
            }
        }
    }
}

/* -- entry points -------------------------------------------------------------------------------------------------------- */

/* Instantiates a kernel: four rows or one of one token, one row of two and four. `made`, of a `type`, is what all rows
 * share. */
#define KERNEL(name, type, made, call)                                                                                      \
    static void name(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,            \
                     int64_t count, float *out)                                                                             \
    {                                                                                                                       \
        const type how = made;                                                                                              \
        for (int64_t end = row + rows; row < end;) {                                                                        \
            const int64_t many = count == 1 && end - row >= ROWS_AT_ONCE ? ROWS_AT_ONCE : 1;                                \
            for (int64_t t = 0; t < count;) {                                                                               \
                const int64_t left = count - t, from = token + t;                                                           \
                float *to = out + t;                                                                                        \
                if (many == ROWS_AT_ONCE) call(ROWS_AT_ONCE, 1);                                                            \
                else if (left >= 4) call(1, 4);                                                                             \
                else if (left >= 2) call(1, 2);                                                                             \
                else call(1, 1);                                                                                            \
                t += left >= 4 ? 4 : left >= 2 ? 2 : 1;                                                                     \
            }                                                                                                               \
            row += many;                                                                                                    \
            out += many * TOKENS;                                                                                           \
        }                                                                                                                   \
    }

#define CALL_TWOS(R, T) integer_rows(layer, act, row, from, to, &how, TWOS, R, T)
#define CALL_THREES(R, T) integer_rows(layer, act, row, from, to, &how, THREES, R, T)
#define CALL_FOURS(R, T) integer_rows(layer, act, row, from, to, &how, FOURS, R, T)
#define CALL_FOURS_ONES(R, T) integer_rows(layer, act, row, from, to, &how, FOURS_ONES, R, T)
#define CALL_FOURS_TWOS(R, T) integer_rows(layer, act, row, from, to, &how, FOURS_TWOS, R, T)
#define CALL_FOURS_THREES(R, T) integer_rows(layer, act, row, from, to, &how, FOURS_THREES, R, T)
#define CALL_FOURS_FOURS(R, T) integer_rows(layer, act, row, from, to, &how, FOURS_FOURS, R, T)
#define CALL_WORDS(R, T) \
    for (int r = 0; r < R; r++) words_row(layer, act, row + r, from, to + r * TOKENS, &how, T)
#define CALL_EXACT(R, T) \
    for (int r = 0; r < R; r++) exact_row(layer, act, row + r, from, to + r * TOKENS, &how, T)

/* The same for what is done side by side as far as that goes. */
#define KERNEL_ABREAST(name, rest, kind)                                                                                    \
    static void name(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token,            \
                     int64_t count, float *out)                                                                             \
    {                                                                                                                       \
        const int64_t done = count == 1 ? rows_abreast(layer, act, row, rows, token, out, kind) : 0;                        \
        rest(layer, act, row + done, rows - done, token, count, out + done * TOKENS);                                       \
    }

KERNEL(kernel_twos_apart, integers, integers_of(layer->book, TWOS), CALL_TWOS)
KERNEL(kernel_threes_apart, integers, integers_of(layer->book, THREES), CALL_THREES)
KERNEL(kernel_fours_apart, integers, integers_of(layer->book, FOURS), CALL_FOURS)
KERNEL(kernel_fours_ones_apart, integers, integers_of(layer->book, FOURS_ONES), CALL_FOURS_ONES)
KERNEL(kernel_fours_twos_apart, integers, integers_of(layer->book, FOURS_TWOS), CALL_FOURS_TWOS)
KERNEL(kernel_fours_threes_apart, integers, integers_of(layer->book, FOURS_THREES), CALL_FOURS_THREES)
KERNEL_ABREAST(kernel_twos, kernel_twos_apart, TWOS)
KERNEL_ABREAST(kernel_threes, kernel_threes_apart, THREES)
KERNEL_ABREAST(kernel_fours, kernel_fours_apart, FOURS)
KERNEL_ABREAST(kernel_fours_ones, kernel_fours_ones_apart, FOURS_ONES)
KERNEL_ABREAST(kernel_fours_twos, kernel_fours_twos_apart, FOURS_TWOS)
KERNEL_ABREAST(kernel_fours_threes, kernel_fours_threes_apart, FOURS_THREES)
KERNEL(kernel_fours_fours, integers, integers_of(layer->book, FOURS_FOURS), CALL_FOURS_FOURS)
KERNEL(kernel_words, decoding, decoding_of(layer->book, layer->book->word), CALL_WORDS)
KERNEL(kernel_exact, decoding, decoding_of(layer->book, layer->book->half), CALL_EXACT)

static int kind_of(const tq_codebook *book, const tq_activations *act)
{
    if (book->bits < 4) return book->residual_bits ? WORDS : book->bits == 2 ? TWOS : THREES;
    return book->residual_bits == 4 && !act->coarse ? WORDS : FOURS + book->residual_bits;
}

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    static tq_kernel *const kernels[] = {kernel_twos,       kernel_threes,       kernel_fours,       kernel_fours_ones,
                                         kernel_fours_twos, kernel_fours_threes, kernel_fours_fours, kernel_words};
    kernels[kind_of(layer->book, act)](layer, act, row, rows, token, count, out);
}

/* q = 128 a + b, -64 <= b < 64. */
INLINE void bytes_of(int16_t q, int8_t *a, int8_t *b)
{
    *a = (int8_t)((q + 64) >> 7);
    *b = (int8_t)((q & 127) - ((q & 64) << 1));
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    const int64_t columns = act->blocks * BLOCK;
    if (act->exact) {
        rotate_token(layer, x, type, act->blocks, (float *)act->values + token * columns, act->token_scale + token);
        return;
    }
    float *rotated = scratch;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    const int kind = kind_of(layer->book, act);
    int16_t *words = (int16_t *)act->values + token * columns, *q = kind == WORDS ? words : (int16_t *)(rotated + columns);
    to_integers(rotated, act->blocks, kind == FOURS ? LIMIT : WORD_LIMIT, 0, 127.5f, q, act->scale + token * act->blocks,
                act->correction + token * act->blocks);
    if (kind != FOURS) act->token_scale[token] /= layer->book->word_unit;
    if (kind == WORDS) return;
    for (int64_t i = 0; i < columns; i += 128, words += 128) {
        if (kind == FOURS) {
            int8_t *bytes = (int8_t *)words;
            for (int j = 0; j < 64; j++) {
                bytes_of(q[i + 2 * j], bytes + j, bytes + j + 128);
                bytes_of(q[i + 2 * j + 1], bytes + j + 64, bytes + j + 192);
            }
        } else {
            for (int part = 0; part < 4; part++)
                for (int j = 0; j < 32; j++) words[part * 32 + j] = q[i + 4 * j + part];
        }
    }
}

const tq_engine tq_avx512_vnni = {"avx512vnni", 32, available, prepare, integer, kernel_exact, decode, feed_back, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
