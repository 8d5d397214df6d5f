/* Activations before the kernels: rotation (FORMAT.md section 4) and rounding to integers. Plain C, compiled once per engine
 * with that engine's instructions, which is why everything here is static.
 */
#ifndef TURBOQUANT_PREPARE_H
#define TURBOQUANT_PREPARE_H

#include <math.h>
#include <string.h>

#include "engine.h"

static inline float half_to_float(uint16_t bits)
{
    /* Shifted into place, a half is a float that is 2^-112 times as large, subnormals included; its Inf and NaN are not. */
    uint32_t word = (uint32_t)(bits & 0x7fff) << 13;
    const uint32_t special = (uint32_t)0 - (uint32_t)(word >= 0x0f800000u);
    float value;
    memcpy(&value, &word, 4);
    value *= 0x1p112f;
    memcpy(&word, &value, 4);
    word |= (special & 0x7f800000u) | (uint32_t)(bits & 0x8000) << 16;
    memcpy(&value, &word, 4);
    return value;
}

static inline float bfloat_to_float(uint16_t bits)
{
    const uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline float value_of(const void *values, int type, int64_t i)
{
    if (type == FLOAT32) return ((const float *)values)[i];
    const uint16_t bits = ((const uint16_t *)values)[i];
    return type == BFLOAT16 ? bfloat_to_float(bits) : half_to_float(bits);
}

static void read_token(const void *x, int type, int64_t count, float *out)
{
    const uint16_t *bits = x;
    if (type == FLOAT32)
        memcpy(out, x, (size_t)count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) out[i] = bfloat_to_float(bits[i]);
    else
        for (int64_t i = 0; i < count; i++) out[i] = half_to_float(bits[i]);
}

static uint32_t largest_magnitude(const float *x, int64_t count)
{
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        uint32_t word;
        memcpy(&word, x + i, 4);
        word &= 0x7fffffffu;
        largest = word > largest ? word : largest;
    }
    return largest; /* as bits, among which NaN is the largest */
}

/* The butterflies within 8 neighbours; the rest vectorises by itself. */
static inline void hadamard8(float *v)
{
#if defined(TURBOQUANT_AVX2)
    const __m256 s1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), s2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
    __m256 x = _mm256_loadu_ps(v);
    x = _mm256_fmadd_ps(x, s1, _mm256_permute_ps(x, 0xb1));
    x = _mm256_fmadd_ps(x, s2, _mm256_permute_ps(x, 0x4e));
    const __m256 low = _mm256_permute2f128_ps(x, x, 0x00), high = _mm256_permute2f128_ps(x, x, 0x11);
    _mm256_storeu_ps(v, _mm256_fmadd_ps(high, _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1), low));
#else
    const float a0 = v[0] + v[1], a1 = v[0] - v[1], a2 = v[2] + v[3], a3 = v[2] - v[3];
    const float a4 = v[4] + v[5], a5 = v[4] - v[5], a6 = v[6] + v[7], a7 = v[6] - v[7];
    const float b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3;
    const float b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7;
    v[0] = b0 + b4, v[1] = b1 + b5, v[2] = b2 + b6, v[3] = b3 + b7;
    v[4] = b0 - b4, v[5] = b1 - b5, v[6] = b2 - b6, v[7] = b3 - b7;
#endif
}

#if defined(TURBOQUANT_AVX512)
/* Those within 16 neighbours: each lane and its partner, added or subtracted. */
static inline __attribute__((always_inline)) __m512 butterflies16(__m512 x)
{
    const __m512 one = _mm512_set1_ps(1), minus = _mm512_set1_ps(-1);
    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xaaaa, minus), _mm512_permute_ps(x, 0xb1));
    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xcccc, minus), _mm512_permute_ps(x, 0x4e));
    x = _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xf0f0, minus), _mm512_shuffle_f32x4(x, x, 0xb1));
    return _mm512_fmadd_ps(x, _mm512_mask_mov_ps(one, 0xff00, minus), _mm512_shuffle_f32x4(x, x, 0x4e));
}

/* In registers from the first to the last. */
static inline __attribute__((always_inline)) void butterflies(float *x, const int block)
{
    __m512 v[8];
#pragma GCC unroll 8
    for (int i = 0; i < block / 16; i++) v[i] = butterflies16(_mm512_loadu_ps(x + 16 * i));
#pragma GCC unroll 4
    for (int half = 1; half < block / 16; half *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < block / 16; i++) {
            if (i & half) continue;
            const __m512 a = v[i], b = v[i + half];
            v[i] = _mm512_add_ps(a, b);
            v[i + half] = _mm512_sub_ps(a, b);
        }
#pragma GCC unroll 8
    for (int i = 0; i < block / 16; i++) _mm512_storeu_ps(x + 16 * i, v[i]);
}
#else
/* Sizes known when compiling, so that the loops become vectors. */
static inline __attribute__((always_inline)) void butterflies(float *x, const int block)
{
    for (int i = 0; i < block; i += 8) hadamard8(x + i);
#pragma GCC unroll 4
    for (int half = 8; half < block; half *= 2)
        for (int i = 0; i < block; i += 2 * half)
            for (int j = 0; j < half; j++) {
                const float a = x[i + j], b = x[i + j + half];
                x[i + j] = a + b;
                x[i + j + half] = a - b;
            }
}
#endif

static void hadamard(float *x, int block)
{
    if (block == 128) butterflies(x, 128);
    else if (block == 64) butterflies(x, 64);
    else butterflies(x, 32);
}

/* The power of two that brings a token to [0.5, 1), given the bits of its largest magnitude; sets what the rotated token must be
 * multiplied with. 0: Inf or NaN is among them, and the whole result of this token is NaN. */
static float shift_of(const tq_layer *layer, uint32_t largest, double *token_scale)
{
    *token_scale = NAN;
    if (largest >= 0x7f800000u) return 0;
    int exponent = (int)(largest >> 23) - 126;
    exponent = exponent > 126 ? 126 : exponent; /* 2^-127 is subnormal, which the processor may flush to zero */
    *token_scale = ldexp(1.0, exponent) / sqrt((double)layer->rotation);
    return ldexpf(1.0f, -exponent);
}

/* Reads token, rotates it into out [32 * padded_blocks] and sets its scale: the rotated token is out * token_scale.
 * Entries of out are at most 512 in magnitude. */
static void rotate_token(const tq_layer *layer, const void *x, int type, int64_t padded_blocks, float *out, double *token_scale)
{
    const int64_t k = layer->in_features, columns = layer->blocks * BLOCK;
    read_token(x, type, k, out);
    memset(out + k, 0, (size_t)(padded_blocks * BLOCK - k) * 4);
    const float shift = shift_of(layer, largest_magnitude(out, k), token_scale);
    if (shift == 0) memset(out, 0, (size_t)k * 4);
    for (int64_t i = 0; i < columns; i++) out[i] *= layer->signs[i] * shift;
    for (int64_t i = 0; i < columns; i += layer->rotation) hadamard(out + i, layer->rotation);
}

/* Rotated columns to integers of at most `limit`, one scale per block; sums of a block's integers and of their high parts
 * a (q = 128 a + b, -64 <= b < 64) serve the corrections. */
static void to_integers(const float *x, int64_t blocks, int limit, int nested, float offset, int16_t *q, float *scale,
                        float *correction)
{
    for (int64_t block = 0; block < blocks; block++, x += BLOCK, q += BLOCK) {
        const uint32_t bits = largest_magnitude(x, BLOCK);
        float largest;
        memcpy(&largest, &bits, 4);
        const float inverse = largest > 1e-30f ? (float)limit / largest : 0;
        int32_t sum = 0, high = 0;
        for (int i = 0; i < BLOCK; i++) {
            const int32_t value = (int32_t)(x[i] * inverse + copysignf(0.5f, x[i]));
            q[i] = (int16_t)value;
            sum += value;
            high += (value + 64) >> 7;
        }
        scale[block] = largest / (float)limit;
        /* Integer levels are off by a constant, nested ones in both bytes: see the kernels. */
        correction[block] = scale[block] * offset * (float)(nested ? sum + high : sum);
    }
}

#endif
