/* Decoding with AVX-512 and VBMI, shared by avx512.c and avx512_bf16.c, which set the target before they include this. */
#ifndef TURBOQUANT_AVX512_H
#define TURBOQUANT_AVX512_H

#include "prepare.h"

#define INLINE static inline __attribute__((always_inline))

INLINE const uint8_t *row_of(const uint8_t *plane, int64_t stride, int64_t row) { return plane + row * stride; }

/* How 64 fields of a plane are unpacked: each 8 fields' bytes go into a word of their own, from which every field is taken
 * `up` bits above the bottom of its byte. What stands around it is not cleared. */
typedef struct {
    __m512i gather, shift;
    __mmask64 all, half;         /* bytes to read: of 64 columns, of the 32 that may be the last */
    int width;
} unpacking;

INLINE unpacking unpacking_of(int width, int up)
{
    uint8_t gather[64], shift[64];
    for (int i = 0; i < 64; i++) {
        gather[i] = (uint8_t)((i / 8 * width + i % 8) & 63);
        shift[i] = (uint8_t)((i % 8 * width - up) & 63);
    }
    return (unpacking){_mm512_loadu_si512(gather), _mm512_loadu_si512(shift), ((__mmask64)1 << 8 * width) - 1,
                       ((__mmask64)1 << 4 * width) - 1, width};
}

INLINE __m512i unpack(const uint8_t *row, int64_t block, int64_t blocks, const unpacking *how)
{
    const __mmask64 there = blocks - block >= 2 ? how->all : how->half;
    const __m512i raw = _mm512_maskz_loadu_epi8(there, row + 4 * how->width * block);
    return _mm512_multishift_epi64_epi8(how->shift, _mm512_permutexvar_epi8(how->gather, raw));
}

INLINE __m512i select_bits(__m512i mask, __m512i set, __m512i clear) { return _mm512_ternarylogic_epi32(mask, set, clear, 0xca); }

/* 16 scales of a row, times 2^-19; `left` are there. */
INLINE __m512 scales16(const uint8_t *scales, int64_t left)
{
    const __mmask16 mask = left < 16 ? (__mmask16)((1u << left) - 1) : (__mmask16)0xffff;
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(mask, scales));
    return _mm512_cvtph_ps(_mm256_slli_epi16(wide, 5));
}

typedef struct {
    unpacking codes, residual;
    __m512i high[2], low[2];     /* 128 entries each */
    __m512i residual_mask, mask; /* of an index */
    int folds;
} decoding;

INLINE decoding decoding_of(const tq_codebook *book, const uint8_t *high, const uint8_t *low)
{
    decoding how;
    const int rest = book->residual_bits, total = book->bits + rest;
    how.codes = unpacking_of(book->bits, rest);
    how.residual = unpacking_of(rest ? rest : 1, 0);
    how.residual_mask = _mm512_set1_epi8((char)((1 << rest) - 1));
    how.mask = _mm512_set1_epi8((char)((1 << total) - 1));
    how.folds = total == 8;
    for (int i = 0; i < 2; i++) {
        how.high[i] = _mm512_loadu_si512(high + 64 * i);
        how.low[i] = _mm512_loadu_si512(low + 64 * i);
    }
    return how;
}

/* 64 indices in the order of columns; residual may be NULL. */
INLINE __m512i index64(const uint8_t *codes, const uint8_t *residual, int64_t block, int64_t blocks, const decoding *how)
{
    __m512i index = unpack(codes, block, blocks, &how->codes);
    if (residual) index = select_bits(how->residual_mask, unpack(residual, block, blocks, &how->residual), index);
    return _mm512_and_si512(index, how->mask);
}

/* Bytes of the levels; with 256 levels those of the upper half are complements. */
INLINE void bytes64(__m512i index, const decoding *how, const int folds, __m512i *high, __m512i *low)
{
    if (folds) {
        const __m512i upper = _mm512_movm_epi8(_mm512_movepi8_mask(index));
        index = _mm512_xor_si512(index, upper);
        *high = _mm512_xor_si512(_mm512_permutex2var_epi8(how->high[0], index, how->high[1]), upper);
        *low = _mm512_xor_si512(_mm512_permutex2var_epi8(how->low[0], index, how->low[1]), upper);
    } else {
        *high = _mm512_permutex2var_epi8(how->high[0], index, how->high[1]);
        *low = _mm512_permutex2var_epi8(how->low[0], index, how->low[1]);
    }
}

/* 64 levels: columns 0-7 and 16-23, 8-15 and 24-31 of the first block, then of the second. */
INLINE void levels64(__m512i index, const decoding *how, __m512 level[4])
{
    __m512i high, low;
    if (how->folds) { /* the sign of a half is a bit of its own, not a complement */
        const __m512i sign = _mm512_andnot_si512(index, _mm512_set1_epi8((char)0x80));
        index = _mm512_xor_si512(index, _mm512_movm_epi8(_mm512_movepi8_mask(index)));
        high = _mm512_and_si512(_mm512_permutex2var_epi8(how->high[0], index, how->high[1]), _mm512_set1_epi8(0x7f));
        high = _mm512_or_si512(high, sign);
        low = _mm512_permutex2var_epi8(how->low[0], index, how->low[1]);
    } else {
        high = _mm512_permutex2var_epi8(how->high[0], index, how->high[1]);
        low = _mm512_permutex2var_epi8(how->low[0], index, how->low[1]);
    }
    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
    level[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(first));
    level[1] = _mm512_cvtph_ps(_mm512_castsi512_si256(second));
    level[2] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(first, 1));
    level[3] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(second, 1));
}

/* Exact order of columns: within 64 the groups of 8 that levels64 yields. */
INLINE void exact_order(const float *columns, float *out)
{
    static const uint8_t order[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    for (int group = 0; group < 8; group++) memcpy(out + 8 * group, columns + 8 * order[group], 32);
}

#endif
