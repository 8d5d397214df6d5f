/* Portable C, always exact: what runs where no other engine does, and the simplest of them to read. */
#include "feedback.h"
#include "prepare.h"

static int available(void) { return 1; }

/* 32 fields of a plane. Eight of them fill `width` bytes. */
static void unpack(const uint8_t *bytes, int width, uint8_t *out)
{
    for (int i = 0; i < BLOCK; i += 8, bytes += width) {
        uint32_t word = 0;
        for (int b = 0; b < width; b++) word |= (uint32_t)bytes[b] << (8 * b);
        for (int j = 0; j < 8; j++) out[i + j] = (uint8_t)(word >> (width * j) & ((1u << width) - 1));
    }
}

static float scale_of(uint8_t byte)
{
    const int exponent = byte >> 5, mantissa = byte & 31;
    return (float)(exponent ? (32 + mantissa) << (exponent - 1) : mantissa) * 0x1p-19f;
}

/* Levels of one block times its scale. */
static void decode_block(const tq_layer *layer, int64_t row, int64_t block, float *out)
{
    const tq_codebook *book = layer->book;
    uint8_t index[BLOCK], residual[BLOCK];
    unpack(layer->codes + row * layer->codes_stride + 4 * book->bits * block, book->bits, index);
    if (book->residual_bits) {
        unpack(layer->residual + row * layer->residual_stride + 4 * book->residual_bits * block, book->residual_bits, residual);
        for (int i = 0; i < BLOCK; i++) index[i] = (uint8_t)(index[i] << book->residual_bits | residual[i]);
    }
    const float scale = scale_of(layer->scales[row * layer->scales_stride + block]);
    for (int i = 0; i < BLOCK; i++) out[i] = book->level[index[i]] * scale;
}

static void decode(const tq_layer *layer, int64_t row, int64_t rows, float *out, int64_t stride)
{
    for (int64_t i = 0; i < rows; i++)
        for (int64_t block = 0; block < layer->blocks; block++)
            decode_block(layer, row + i, block, out + i * stride + block * BLOCK);
}

static void exact(const tq_layer *layer, const tq_activations *act, int64_t row, int64_t rows, int64_t token, int64_t count,
                  float *out)
{
    for (int64_t i = 0; i < rows; i++, out += TOKENS) {
        float sum[TOKENS][8] = {{0}};
        for (int64_t block = 0; block < layer->blocks; block++) {
            float weight[BLOCK];
            decode_block(layer, row + i, block, weight);
            for (int64_t t = 0; t < count; t++) {
                const float *x = (const float *)act->values + ((token + t) * act->blocks + block) * BLOCK;
                for (int j = 0; j < BLOCK; j++) sum[t][j % 8] += weight[j] * x[j];
            }
        }
        for (int64_t t = 0; t < count; t++) {
            out[t] = 0;
            for (int j = 0; j < 8; j++) out[t] += sum[t][j];
        }
    }
}

static void prepare(const tq_layer *layer, const tq_activations *act, const void *x, int type, int64_t token, void *scratch)
{
    (void)scratch;
    rotate_token(layer, x, type, act->blocks, (float *)act->values + token * act->blocks * BLOCK, act->token_scale + token);
}

const tq_engine tq_portable = {"portable", 32, available, prepare, NULL, exact, decode, feed_back, NULL};
