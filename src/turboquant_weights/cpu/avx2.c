/* AVX2 with FMA and F16C (Haswell and later).
 *
 * Integers are 16 bits wide here: `vpmaddwd` takes 16 weights at a time and needs no second byte of the activation. Base
 * levels come from `vpshufb`, those of 4 + 1 bits as two bytes each. There is no table for 256 levels, so others are
 * computed. For bfloat16, 4 + 2 to 4 + 4 bits: a parabola for each base field, whose bytes are looked up (tq_codebook).
 * Otherwise, as on a GPU: the polynomial of FORMAT.md section 6 in 16-bit fixed point, 1e-4 of a standard deviation off at
 * most. The exact path reads a table.
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

#include "feedback.h"
#include "prepare.h"

#define INLINE static inline __attribute__((always_inline))
enum { LIMIT = 16383 }; /* a lane adds 8 products: of levels below 2^8 with this, or of nested ones, 2^15, with half of it */
enum { AHEAD = 8192 }; /* bytes that a plane is prefetched ahead */

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

/* -- integers ------------------------------------------------------------------------------------------------------------ */

/* A chunk is 2 blocks, 64 columns, in four vectors of words. */
enum { CHUNK = 2 };
/* Planes: 4 bits, another base, 4 + 1, 4 + 2, 4 + 3, 4 + 4 bits, any two. */
enum { FOURS, BASE, FOURS_ONES, FOURS_TWOS, FOURS_THREES, FOURS_FOURS, NESTED };

/* What the decoding of chunks keeps in registers. */
typedef struct {
    unpacking codes, residual;
    __m256i table;                                  /* levels of the base plane */
    __m256i middle_low, middle_high, step, curve;   /* by base field, see tq_codebook */
    __m256i way[2], bend[2];                        /* by nibble of the residual plane: of its even and its odd columns */
    __m256i pairs_fetch[2], pairs_push[2];          /* of 4 + 3 bits: two fields of the residual plane each, in a word */
    __m256i word_low[2], word_high[2];              /* of 4 + 1 bits by base field, for either bit: bytes of the levels */
    __m256i coefficient[5], offset;
    __m128i to_index, to_x;
} decoding;

INLINE __m256i table_of(const void *bytes) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes)); }

INLINE decoding decoding_of(const tq_codebook *book)
{
    decoding how;
    const int total = book->bits + book->residual_bits;
    how.codes = unpacking_of(book->bits);
    how.residual = unpacking_of(book->residual_bits ? book->residual_bits : 1);
    how.table = table_of(book->base);
    how.middle_low = table_of(book->middle_low);
    how.middle_high = table_of(book->middle_high);
    how.step = table_of(book->step);
    how.curve = table_of(book->curve);
    for (int odd = 0; odd < 2; odd++) {
        how.way[odd] = table_of(book->way[odd]);
        how.bend[odd] = table_of(book->bend[odd]);
    }
    for (int half = 0; half < 2; half++) {
        uint8_t fetch[16];
        int16_t push[8];
        for (int i = 0; i < 8; i++) {
            const int bit = 6 * (8 * half + i);
            fetch[2 * i] = (uint8_t)(bit / 8);
            fetch[2 * i + 1] = (uint8_t)(bit / 8 + 1);
            push[i] = (int16_t)(1 << (10 - bit % 8));
        }
        how.pairs_fetch[half] = table_of(fetch);
        how.pairs_push[half] = table_of(push);
    }
    uint8_t low[2][16], high[2][16];
    for (int i = 0; i < 32; i++) {
        low[i % 2][i / 2] = (uint8_t)book->word[i];
        high[i % 2][i / 2] = (uint8_t)((uint16_t)book->word[i] >> 8);
    }
    for (int bit = 0; bit < 2; bit++) {
        how.word_low[bit] = table_of(low[bit]);
        how.word_high[bit] = table_of(high[bit]);
    }
    for (int i = 0; i < 5; i++) how.coefficient[i] = _mm256_set1_epi16(book->coefficient[i]);
    how.to_index = _mm_cvtsi32_si128(book->residual_bits);
    how.to_x = _mm_cvtsi32_si128(16 - total);
    how.offset = _mm256_set1_epi16((int16_t)(((1 - (1 << total)) * 32768) >> total));
    return how;
}

/* Indices of a block, two vectors of 16 words. */
INLINE void index32(const uint8_t *codes, const uint8_t *residual, const decoding *how, const int nested, __m256i index[2])
{
    unpack32(codes, &how->codes, index);
    if (nested) {
        __m256i rest[2];
        unpack32(residual, &how->residual, rest);
        for (int half = 0; half < 2; half++)
            index[half] = _mm256_or_si256(_mm256_sll_epi16(index[half], how->to_index), rest[half]);
    }
}

/* Level times polynomial_unit: x = (2 i + 1 - 2^T) / 2^T in [-1, 1] as 16-bit fixed point, and a polynomial in 2 x^2 - 1,
 * whose coefficients are smaller than those in x^2. */
INLINE __m256i polynomial_levels(__m256i index, const decoding *how)
{
    const __m256i x = _mm256_add_epi16(_mm256_sll_epi16(index, how->to_x), how->offset);
    const __m256i square = _mm256_mulhrs_epi16(x, x);
    const __m256i t = _mm256_xor_si256(_mm256_add_epi16(square, square), _mm256_set1_epi16((int16_t)0x8000));
    __m256i value = how->coefficient[4];
#pragma GCC unroll 4
    for (int i = 3; i >= 0; i--) value = _mm256_add_epi16(_mm256_mulhrs_epi16(value, t), how->coefficient[i]);
    return _mm256_mulhrs_epi16(value, x);
}

/* 32 bytes of which 16 may be there. */
INLINE __m256i load32(const uint8_t *bytes, int there)
{
    return there ? _mm256_loadu_si256((const __m256i *)bytes) : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)bytes));
}

/* 16 pairs of fields of 3 bits in bytes, for each block: the first field below the second. */
INLINE __m256i pairs_of_threes(const uint8_t *bytes, const decoding *how, const int full)
{
    uint64_t low[2] = {0}, high[2] = {0};
    for (int i = 0; i <= full; i++) memcpy(low + i, bytes + 12 * i, 8), memcpy(high + i, bytes + 12 * i + 8, 4);
    const __m256i raw = _mm256_set_epi64x((long long)high[1], (long long)low[1], (long long)high[0], (long long)low[0]);
    __m256i word[2];
    for (int half = 0; half < 2; half++) {
        const __m256i fetched = _mm256_shuffle_epi8(raw, how->pairs_fetch[half]);
        word[half] = _mm256_srli_epi16(_mm256_mullo_epi16(fetched, how->pairs_push[half]), 10);
    }
    return _mm256_packus_epi16(word[0], word[1]);
}

/* Levels of one chunk of one row, of which only one block may be there, as words in the order that `prepare` gives the
 * activation. */
INLINE void decode_chunk(const uint8_t *codes, const uint8_t *residual, const decoding *how, const int kind, const int full,
                         __m256i w[4])
{
    const __m256i nibble = _mm256_set1_epi8(15), byte = _mm256_set1_epi16(255);
    if (kind == BASE || kind == NESTED) {
        w[2] = w[3] = _mm256_setzero_si256();
        for (int i = 0; i <= full; i++) {
            __m256i index[2];
            index32(codes + 4 * how->codes.width * i, residual + 4 * how->residual.width * i, how, kind == NESTED, index);
            for (int half = 0; half < 2; half++)
                w[2 * i + half] = kind == NESTED ? polynomial_levels(index[half], how)
                                                 : _mm256_and_si256(_mm256_shuffle_epi8(how->table, index[half]), byte);
        }
        return;
    }
    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T1);
    const __m256i raw = load32(codes, full);
    const __m256i base[2] = {_mm256_and_si256(raw, nibble), _mm256_and_si256(_mm256_srli_epi16(raw, 4), nibble)};
    if (kind == FOURS) {
        for (int odd = 0; odd < 2; odd++) {
            const __m256i level = _mm256_shuffle_epi8(how->table, base[odd]);
            w[2 * odd] = _mm256_and_si256(level, byte);
            w[2 * odd + 1] = _mm256_srli_epi16(level, 8);
        }
        return;
    }
    _mm_prefetch((const char *)residual + AHEAD, _MM_HINT_T1);
    if (kind == FOURS_ONES) { /* byte j of either vector: columns 2 j and 2 j + 1, whose bits lie in byte j / 4 */
        uint64_t bits = 0;
        memcpy(&bits, residual, full ? 8 : 4);
        const __m256i quarter = _mm256_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3,
                                                 4, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7);
        const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi64x((long long)bits), quarter);
        for (int odd = 0; odd < 2; odd++) {
            const __m256i which = _mm256_set1_epi32(odd ? (int)0x80200802 : 0x40100401);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, which), which);
            const __m256i low = _mm256_blendv_epi8(_mm256_shuffle_epi8(how->word_low[0], base[odd]),
                                                   _mm256_shuffle_epi8(how->word_low[1], base[odd]), set);
            const __m256i high = _mm256_blendv_epi8(_mm256_shuffle_epi8(how->word_high[0], base[odd]),
                                                    _mm256_shuffle_epi8(how->word_high[1], base[odd]), set);
            w[2 * odd] = _mm256_unpacklo_epi8(low, high);
            w[2 * odd + 1] = _mm256_unpackhi_epi8(low, high);
        }
        return;
    }
    __m256i rest[2];
    if (kind == FOURS_FOURS) {
        const __m256i fields = load32(residual, full);
        rest[0] = _mm256_and_si256(fields, nibble);
        rest[1] = _mm256_and_si256(_mm256_srli_epi16(fields, 4), nibble);
    } else if (kind == FOURS_THREES) { /* tables by nibble take no notice of its uppermost bit */
        const __m256i pairs = pairs_of_threes(residual, how, full);
        rest[0] = _mm256_and_si256(pairs, nibble);
        rest[1] = _mm256_and_si256(_mm256_srli_epi16(pairs, 3), nibble);
    } else { /* nibbles of two fields, for the tables to choose from */
        const __m128i fields = full ? _mm_loadu_si128((const __m128i *)residual) : _mm_loadl_epi64((const __m128i *)residual);
        const __m256i wide = _mm256_cvtepu8_epi16(fields);
        rest[0] = rest[1] = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), nibble);
    }
    for (int odd = 0; odd < 2; odd++) {
        const int second = kind == FOURS_TWOS ? odd : 0; /* others have one field in a nibble, and one table */
        const __m256i step = _mm256_shuffle_epi8(how->step, base[odd]), curve = _mm256_shuffle_epi8(how->curve, base[odd]);
        const __m256i way = _mm256_shuffle_epi8(how->way[second], rest[odd]);
        const __m256i bend = _mm256_shuffle_epi8(how->bend[second], rest[odd]);
        const __m256i low = _mm256_shuffle_epi8(how->middle_low, base[odd]);
        const __m256i high = _mm256_shuffle_epi8(how->middle_high, base[odd]);
        w[2 * odd] = _mm256_add_epi16(_mm256_unpacklo_epi8(low, high),
                                      _mm256_maddubs_epi16(_mm256_unpacklo_epi8(step, bend), _mm256_unpacklo_epi8(way, curve)));
        w[2 * odd + 1] =
            _mm256_add_epi16(_mm256_unpackhi_epi8(low, high),
                             _mm256_maddubs_epi16(_mm256_unpackhi_epi8(step, bend), _mm256_unpackhi_epi8(way, curve)));
    }
}

/* Adds chunk `at` of one row times T tokens to the sums. */
INLINE void integer_chunk(const uint8_t *codes, const uint8_t *residual, const int16_t *x, int64_t x_stride, const decoding *how,
                          const __m256 *scale, int at, const int kind, const int full, const int T, __m256 *sum)
{
    const int whole = kind == BASE || kind == NESTED; /* a vector belongs to one block; otherwise its halves to either */
    const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32(CHUNK * at), whole ? _mm256_setr_epi32(0, 0, 1, 1, 0, 0, 1, 1)
                                                                                : _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    __m256i w[4];
    decode_chunk(codes, residual, how, kind, full, w);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
        const __m256i *columns = (const __m256i *)(x + t * x_stride);
        const __m256i first = _mm256_add_epi32(_mm256_madd_epi16(w[0], columns[0]), _mm256_madd_epi16(w[1], columns[1]));
        const __m256i second = _mm256_add_epi32(_mm256_madd_epi16(w[2], columns[2]), _mm256_madd_epi16(w[3], columns[3]));
        const __m256i dot = whole ? _mm256_hadd_epi32(first, second) : _mm256_add_epi32(first, second);
        sum[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_permutevar8x32_ps(scale[t], lanes), sum[t]);
    }
}

/* One row times T tokens. */
INLINE void integer_row(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                        const decoding *how, const int kind, const int T)
{
    const uint8_t *scales = layer->scales + row * layer->scales_stride, *codes = layer->codes + row * layer->codes_stride;
    const uint8_t *residual = layer->book->residual_bits ? layer->residual + row * layer->residual_stride : codes;
    const int64_t codes_step = 4 * CHUNK * layer->book->bits, residual_step = 4 * CHUNK * layer->book->residual_bits;
    const int64_t x_stride = act->blocks * BLOCK;
    const int16_t *x = (const int16_t *)act->values + token * x_stride;
    __m256 sum[TOKENS];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t] = _mm256_setzero_ps();
    for (int64_t block = 0; block < layer->blocks; block += 8) {
        const int64_t left = layer->blocks - block;
        const __m256 own = scales8(scales + block, left);
        __m256 scale[TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) {
            const int64_t at = (token + t) * act->blocks + block;
            scale[t] = _mm256_mul_ps(own, _mm256_load_ps(act->scale + at));
            if (kind == FOURS || kind == BASE) sum[t] = _mm256_fnmadd_ps(own, _mm256_load_ps(act->correction + at), sum[t]);
        }
        const int chunks = left >= 8 ? 8 / CHUNK : (int)left / CHUNK;
        for (int i = 0; i < chunks; i++, codes += codes_step, residual += residual_step, x += CHUNK * BLOCK)
            integer_chunk(codes, residual, x, x_stride, how, scale, i, kind, 1, T, sum);
        if (left < 8 && left % CHUNK) integer_chunk(codes, residual, x, x_stride, how, scale, chunks, kind, 0, T, sum);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) out[t] = sum_of(sum[t]);
}

/* -- float32 --------------------------------------------------------------------------------------------------------------- */

/* Levels of a block in the order of columns. */
INLINE void levels32(const tq_layer *layer, int64_t row, int64_t block, const decoding *how, __m256 level[4])
{
    const tq_codebook *book = layer->book;
    const uint8_t *codes = layer->codes + row * layer->codes_stride + 4 * how->codes.width * block;
    const uint8_t *residual =
        book->residual_bits ? layer->residual + row * layer->residual_stride + 4 * how->residual.width * block : NULL;
    __m256i index[2];
    index32(codes, residual, how, book->residual_bits > 0, index);
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

INLINE void exact32(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t token, float *out,
                    const decoding *how, const int T)
{
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
            levels32(layer, row, at, how, level);
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
        const decoding how = decoding_of(layer->book);                                                                       \
        for (int64_t end = row + rows; row < end; row++, out += TOKENS)                                                      \
            for (int64_t t = 0; t < count;) {                                                                                \
                const int64_t left = count - t;                                                                              \
                if (left >= 4) call(4);                                                                                      \
                else if (left >= 2) call(2);                                                                                 \
                else call(1);                                                                                                \
                t += left >= 4 ? 4 : left >= 2 ? 2 : 1;                                                                      \
            }                                                                                                                \
    }

#define CALL_FOURS(T) integer_row(layer, act, row, token + t, out + t, &how, FOURS, T)
#define CALL_BASE(T) integer_row(layer, act, row, token + t, out + t, &how, BASE, T)
#define CALL_FOURS_ONES(T) integer_row(layer, act, row, token + t, out + t, &how, FOURS_ONES, T)
#define CALL_FOURS_TWOS(T) integer_row(layer, act, row, token + t, out + t, &how, FOURS_TWOS, T)
#define CALL_FOURS_THREES(T) integer_row(layer, act, row, token + t, out + t, &how, FOURS_THREES, T)
#define CALL_FOURS_FOURS(T) integer_row(layer, act, row, token + t, out + t, &how, FOURS_FOURS, T)
#define CALL_NESTED(T) integer_row(layer, act, row, token + t, out + t, &how, NESTED, T)
#define CALL_EXACT(T) exact32(layer, act, row, token + t, out + t, &how, T)

KERNEL(kernel_fours, CALL_FOURS)
KERNEL(kernel_base, CALL_BASE)
KERNEL(kernel_fours_ones, CALL_FOURS_ONES)
KERNEL(kernel_fours_twos, CALL_FOURS_TWOS)
KERNEL(kernel_fours_threes, CALL_FOURS_THREES)
KERNEL(kernel_fours_fours, CALL_FOURS_FOURS)
KERNEL(kernel_nested, CALL_NESTED)
KERNEL(kernel_exact, CALL_EXACT)

static int kind_of(const tq_codebook *book, const tq_activations *act)
{
    if (book->residual_bits == 0) return book->bits == 4 ? FOURS : BASE;
    if (book->bits == 4 && book->residual_bits == 1) return FOURS_ONES;
    return book->bits < 4 || !act->coarse ? NESTED : FOURS_ONES - 1 + book->residual_bits;
}

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    static tq_kernel *const kernels[] = {kernel_fours,        kernel_base,        kernel_fours_ones, kernel_fours_twos,
                                         kernel_fours_threes, kernel_fours_fours, kernel_nested};
    kernels[kind_of(layer->book, act)](layer, act, row, rows, token, count, out);
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
    const int kind = kind_of(book, act), nested = book->residual_bits > 0, reorder = kind != BASE && kind != NESTED;
    int16_t *out = (int16_t *)act->values + token * columns, *q = reorder ? (int16_t *)(rotated + columns) : out;
    to_integers(rotated, act->blocks, nested ? LIMIT / 2 : LIMIT, nested, nested ? 0.0f : 127.5f, q, act->scale + token * act->blocks, act->correction + token * act->blocks);
    if (nested)
        act->token_scale[token] /= kind == FOURS_ONES ? book->word_unit : reorder ? book->middle_unit : book->polynomial_unit;
    if (!reorder) return;
    static const uint8_t first[4] = {0, 2, 1, 3};
    for (int64_t i = 0; i < columns; i += 64)
        for (int part = 0; part < 4; part++, out += 16) { /* loops that become vectors */
            if (kind == FOURS)
                for (int j = 0; j < 16; j++) out[j] = q[i + 4 * j + first[part]];
            else
                for (int j = 0; j < 8; j++) {
                    out[j] = q[i + 2 * j + part % 2 * 16 + part / 2];
                    out[j + 8] = q[i + 2 * j + BLOCK + part % 2 * 16 + part / 2];
                }
        }
}

const tq_engine tq_avx2 = {"avx2", 32, available, prepare, integer, kernel_exact, decode, feed_back, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
