/* The CPU engine: y = x W^T + bias with W in packed planes (FORMAT.md), shared declarations.
 *
 * Letters as in FORMAT.md: n rows, k in_features, c stored columns, m tokens. A *block* is 32 columns, which share a scale.
 *
 * Two ways of computing, each in every engine:
 *
 *   integer  the rotated activation becomes integers q of 14 or 15 bits with one float scale per block, split into bytes
 *            q = 128 a + b; levels become integers too, and the block's dot product is exact in 32 bits.
 *   exact    activation, levels and sums in float32.
 *
 * A sum does not care about the order of its terms: kernels read planes as they lie, and the activation is stored in the
 * order in which a kernel's unpacking emits columns. Nothing is repacked.
 */
#ifndef TURBOQUANT_ENGINE_H
#define TURBOQUANT_ENGINE_H

#include <stdint.h>

enum { BLOCK = 32, TOKENS = 4, STEP_TOKENS = 16, TILE_ROWS = 48, TILE_COLUMNS = 1024 };
enum { LANES = 64 };             /* of calibrated rounding: pairs of a row and a scale whose columns fit in the L1 cache */
enum { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum { INTEGER = 0, EXACT = 1, TILED = 2 };

/* Tables of one pair of planes; made by tq_codebook_init. T = bits + residual bits. */
typedef struct {
    int32_t bits, residual_bits;
    float level[256];            /* ascending */
    uint8_t half_high[256];      /* the bytes of the levels as binary16, in which they are exact */
    uint8_t half_low[256];
    uint8_t high[256], low[256]; /* level * unit = 128 (high - 127.5) + (low - 127.5), rounded; low is 64 to 191 */
    uint8_t base[16];            /* residual_bits = 0: level = base - 127.5, exactly */
    float unit;
    int16_t word[256];           /* level * word_unit */
    int16_t line_start[64], line_step[64]; /* 256 levels by their upper 6 bits: level * word_unit = start + step * lower 2 bits */
    uint16_t half[256];          /* the levels as binary16 */
    float word_unit;
    int16_t coefficient[5];      /* residual_bits > 0: the polynomial in 16-bit fixed point, for engines without wide tables */
    float polynomial_unit;       /* level * polynomial_unit = what it yields */
    /* 4 bits and a residual plane, for engines with tables of 16 entries: a parabola for each base field, level * middle_unit
     * = middle + step * way + curve * bend. Ways and bends by nibbles of the residual plane: for the first field in a nibble,
     * and for the second where it has two. */
    uint8_t middle_low[16], middle_high[16], step[16], bend[2][16];
    int8_t curve[16], way[2][16];
    float middle_unit;
} tq_codebook;

/* One layer. Mirrored by ctypes in library.py. */
typedef struct {
    const uint8_t *codes, *residual, *scales;
    const int8_t *exponents;
    const void *bias;            /* or NULL */
    const float *signs;          /* [c], +-1 */
    const tq_codebook *book;
    int64_t rows, blocks, in_features;
    int64_t codes_stride, residual_stride, scales_stride; /* bytes from row to row */
    int32_t rotation;            /* columns per rotation block: 32, 64 or 128 */
    int32_t bias_type;
} tq_layer;

/* How tq_linear computes with a layer. Mirrored by ctypes in library.py. */
typedef struct {
    const tq_layer *layer;
    int64_t x_stride;            /* bytes from token to token */
    int32_t engine, mode, type;  /* the number of the engine; INTEGER, EXACT or TILED; of x and y */
} tq_call;

/* Rotated activations. Columns are padded with zeros to 16 blocks, the arrays are aligned to 64 bytes. */
typedef struct {
    int64_t blocks;              /* a multiple of 16 */
    int32_t exact;
    int32_t coarse;              /* results are rounded to bfloat16, by 2e-3: an error of that size in nested levels is allowed */
    double *token_scale;         /* [m]: what a token's sums must be multiplied with */
    float *scale;                /* [m, blocks]: of the integers; unused if exact */
    float *correction;           /* [m, blocks]: scale * offset of the levels * sum of the integers */
    void *values;                /* [m, 32 * blocks]: int8 pairs, int16 or (exact) float32, in the kernel's order */
} tq_activations;

/* Rotates one token and writes its share of the activations; scratch holds 6 bytes per padded column. */
typedef void tq_prepare(const tq_layer *, const tq_activations *, const void *x, int type, int64_t token, void *scratch);

/* Sums of rows [row, row + rows) with tokens [token, token + count), count <= TOKENS, into out[row][TOKENS]; the factors of
 * the row and the token, and 2^19 for the scales, are the caller's business. */
typedef void tq_kernel(const tq_layer *, const tq_activations *, int64_t row, int64_t rows, int64_t token, int64_t count,
                       float *out);

/* Levels times scales (times 2^-19) of rows [row, row + rows), in the order of the exact activations. */
typedef void tq_decode(const tq_layer *, int64_t row, int64_t rows, float *out, int64_t stride);

/* A product of many tokens in bfloat16. The activations have a layout of their own, blocks of 64 tokens. */
typedef struct {
    int (*available)(void);
    /* As tq_prepare, but of STEP_TOKENS tokens or the last ones, x_stride bytes apart. */
    void (*prepare)(const tq_layer *, const tq_activations *, const char *x, int64_t x_stride, int type, int64_t token,
                    int64_t count, void *scratch);
    /* sums [TILE_ROWS][tokens rounded up to 16] of at most TILE_ROWS rows; tile holds TILE_ROWS * TILE_COLUMNS numbers. */
    void (*multiply)(const tq_layer *, const tq_activations *, int64_t row, int64_t rows, int64_t tokens, float *sums,
                     uint16_t *tile);
    /* From these sums to y [tokens, rows of the layer] in bfloat16: 1 if every factor allows that in float32. */
    int (*finish)(const tq_layer *, const tq_activations *, int64_t row, int64_t rows, int64_t tokens, const float *sums,
                  uint16_t *y);
} tq_tiled;

/* One block of calibrated rounding; all arrays contiguous, the results by row and candidate. */
typedef struct {
    const float *block;          /* [rows, 32]: the columns, with the errors of those before made up for */
    const float *scale;          /* [rows, candidates] */
    const float *factor;         /* [32, 32] upper */
    const float *boundaries;     /* [levels - 1] */
    const float *level;          /* [levels], a power of two */
    uint8_t *codes;              /* [rows, candidates, 32] */
    float *errors;               /* [rows, candidates, 32]: over the diagonal of factor */
    float *losses;               /* [rows, candidates] */
    int64_t rows;
    int32_t candidates, levels;
} tq_feedback;

typedef struct {
    const char *name;
    int step;                    /* columns decoded at a time: decode writes whole steps */
    int (*available)(void);
    tq_prepare *prepare;
    tq_kernel *integer;          /* NULL: this engine is always exact */
    tq_kernel *exact;
    tq_decode *decode;
    void (*feed_back)(const tq_feedback *, int64_t first, int64_t count); /* of the pairs of a row and a candidate */
    const tq_tiled *tiled;       /* NULL, or a product of many tokens that not every such processor has */
} tq_engine;

extern const tq_engine tq_portable, tq_avx2, tq_avx512, tq_avx512_vnni, tq_neon;
extern const tq_tiled tq_avx512_bf16;

#endif
