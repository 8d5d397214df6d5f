/* AArch64 with the dot product instructions (Armv8.2 and later: every recent server, phone and Apple processor).
 *
 * A block of 32 columns at a time, in their order: indices, `tbl` for the bytes of the levels, `sdot` with the two bytes of
 * the activation. Bytes are signed here, so a level lies half a unit above them. float32 runs on the portable code.
 */
#if defined(__aarch64__)

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#include "feedback.h"
#include "prepare.h"

#define INLINE static inline __attribute__((always_inline))
enum { LIMIT = 127 * 128 + 63 };

static int available(void)
{
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#else
    return 1;
#endif
}

/* 32 fields of a plane; eight of them fill `width` bytes. */
INLINE void unpack(const uint8_t *bytes, int width, uint8x16_t out[2])
{
    if (width == 4) {
        const uint8x16_t raw = vld1q_u8(bytes), low = vandq_u8(raw, vdupq_n_u8(15)), high = vshrq_n_u8(raw, 4);
        out[0] = vzip1q_u8(low, high);
        out[1] = vzip2q_u8(low, high);
        return;
    }
    uint8_t fields[BLOCK];
    for (int i = 0; i < BLOCK; i += 8, bytes += width) {
        uint32_t word = 0;
        for (int b = 0; b < width; b++) word |= (uint32_t)bytes[b] << (8 * b);
        for (int j = 0; j < 8; j++) fields[i + j] = (uint8_t)(word >> (width * j) & ((1u << width) - 1));
    }
    out[0] = vld1q_u8(fields);
    out[1] = vld1q_u8(fields + 16);
}

INLINE int8x16_t look_up(const uint8_t *table, int levels, uint8x16_t index)
{
    uint8x16_t found = vdupq_n_u8(0);
    for (int first = 0; first < levels; first += 64) /* an index outside the 64 leaves what is there */
        found = vqtbx4q_u8(found, vld1q_u8_x4(table + first), vsubq_u8(index, vdupq_n_u8((uint8_t)first)));
    return vreinterpretq_s8_u8(veorq_u8(found, vdupq_n_u8(0x80)));
}

static float scale_of(uint8_t byte)
{
    const int exponent = byte >> 5, mantissa = byte & 31;
    return (float)(exponent ? (32 + mantissa) << (exponent - 1) : mantissa) * 0x1p-19f;
}

static void integer(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                    float *out)
{
    const tq_codebook *book = layer->book;
    const int rest = book->residual_bits, levels = 1 << (book->bits + rest);
    const uint8x16_t base = vld1q_u8(book->base);
    for (int64_t end = row + rows; row < end; row++, out += TOKENS) {
        const uint8_t *codes = layer->codes + row * layer->codes_stride, *scales = layer->scales + row * layer->scales_stride;
        const uint8_t *residual = rest ? layer->residual + row * layer->residual_stride : NULL;
        float32x4_t sum[TOKENS];
        float correction[TOKENS] = {0};
        for (int t = 0; t < TOKENS; t++) sum[t] = vdupq_n_f32(0);
        for (int64_t block = 0; block < layer->blocks; block++, codes += 4 * book->bits) {
            uint8x16_t index[2];
            int8x16_t high[2], low[2];
            unpack(codes, book->bits, index);
            if (rest) {
                uint8x16_t fine[2];
                unpack(residual + 4 * rest * block, rest, fine);
                for (int i = 0; i < 2; i++) {
                    index[i] = vorrq_u8(vshlq_u8(index[i], vdupq_n_s8((int8_t)rest)), fine[i]);
                    high[i] = look_up(book->high, levels, index[i]);
                    low[i] = look_up(book->low, levels, index[i]);
                }
            } else
                for (int i = 0; i < 2; i++)
                    high[i] = vreinterpretq_s8_u8(veorq_u8(vqtbl1q_u8(base, index[i]), vdupq_n_u8(0x80)));
            const float scale = scale_of(scales[block]);
            for (int64_t t = 0; t < count; t++) {
                const int64_t at = (token + t) * act->blocks + block;
                const int8_t *x = (const int8_t *)act->values + at * 2 * BLOCK;
                const int8x16_t a0 = vld1q_s8(x), a1 = vld1q_s8(x + 16), b0 = vld1q_s8(x + 32), b1 = vld1q_s8(x + 48);
                const int32x4_t zero = vdupq_n_s32(0);
                const int32x4_t coarse = vdotq_s32(vdotq_s32(zero, high[0], a0), high[1], a1);
                int32x4_t fine = vdotq_s32(vdotq_s32(zero, high[0], b0), high[1], b1);
                if (rest) fine = vdotq_s32(vdotq_s32(fine, low[0], a0), low[1], a1); /* without low * b: see avx512.c */
                const int32x4_t dot = vaddq_s32(vshlq_n_s32(coarse, 7), fine);
                sum[t] = vfmaq_n_f32(sum[t], vcvtq_f32_s32(dot), scale * act->scale[at]);
                correction[t] += scale * act->correction[at];
            }
        }
        for (int64_t t = 0; t < count; t++) out[t] = vaddvq_f32(sum[t]) - correction[t];
    }
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    if (act->exact) {
        tq_portable.prepare(layer, act, x, type, token, scratch);
        return;
    }
    const tq_codebook *book = layer->book;
    const int64_t columns = act->blocks * BLOCK;
    float *rotated = scratch;
    int16_t *q = (int16_t *)(rotated + columns);
    const int nested = book->residual_bits > 0;
    rotate_token(layer, x, type, act->blocks, rotated, act->token_scale + token);
    to_integers(rotated, act->blocks, LIMIT, nested, -0.5f, q, act->scale + token * act->blocks,
                act->correction + token * act->blocks);
    act->token_scale[token] *= nested ? 128.0 / book->unit : 1.0;
    int8_t *out = (int8_t *)act->values + token * 2 * columns;
    for (int64_t i = 0; i < columns; i += BLOCK, out += 2 * BLOCK)
        for (int j = 0; j < BLOCK; j++) {
            const int value = q[i + j], high = (value + 64) >> 7;
            out[j] = (int8_t)high;
            out[BLOCK + j] = (int8_t)(value - 128 * high);
        }
}

static void exact(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                  float *out)
{
    tq_portable.exact(layer, act, row, rows, token, count, out);
}

static void decode(const tq_layer *layer, int64_t row, int64_t rows, float *out, int64_t stride)
{
    tq_portable.decode(layer, row, rows, out, stride);
}

const tq_engine tq_neon = {"neon", BLOCK, available, prepare, integer, exact, decode, feed_back, NULL};

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
