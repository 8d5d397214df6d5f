/* Fuzzes every engine of this machine against double precision: random shapes, planes, activations and strides, in blocks
 * of memory of exactly the right size, so that AddressSanitizer sees any access beside them. Builds natively, with
 * sanitizers, and for other processors (under emulation). Usage: cpu_fuzz ROUNDS SEED
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../src/turboquant_weights/cpu/engine.h"
#include "../src/turboquant_weights/cpu/prepare.h"

const char *tq_engine_name(int);
int tq_engine_available(int);
int tq_engine_has_tiled(int);
int tq_engine_has_integer(int);
int tq_engine_step(int);
void tq_codebook_init(tq_codebook *, const float *, const float *, int, int);
int tq_linear(const tq_call *, const void *, void *, int64_t, int);
int tq_rotate(int, const tq_layer *, const void *, int64_t, int, int64_t, float *, float *, int);
int tq_look_up(const tq_layer *, const int64_t *, int64_t, void *, int, int);
void tq_decode_rows(int, const tq_layer *, int64_t, int64_t, float *, int);
void tq_feed_back(int, const tq_feedback *, int);

static uint64_t state;
static uint64_t draw(void) /* SplitMix64 */
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
static int64_t between(int64_t low, int64_t high) { return low + (int64_t)(draw() % (uint64_t)(high - low + 1)); }

static uint8_t *bytes(int64_t count)
{
    uint8_t *out = malloc((size_t)count);
    for (int64_t i = 0; i < count; i++) out[i] = (uint8_t)draw();
    return out;
}

static int field(const uint8_t *row, int width, int64_t column)
{
    int out = 0;
    for (int i = 0; i < width; i++) out |= (row[(column * width + i) / 8] >> ((column * width + i) % 8) & 1) << i;
    return out;
}

/* An odd polynomial stands for every codebook: levels are those of 4 + 4 bits, or half-integers. */
static void make_book(tq_codebook *book, int bits, int rest)
{
    static const double a[5] = {45.34375, -7.6484375, 13.359375, -6.046875, 0.9833984375};
    static const int base[3][8] = {{35, 118}, {12, 38, 68, 109}, {5, 16, 27, 39, 52, 67, 86, 114}};
    float levels[256], coefficients[5] = {0};
    const int count = 1 << (bits + rest);
    for (int i = 0; i < count; i++) {
        const double x = (2 * i + 1 - count) / (double)(count / 2);
        double value = 0;
        for (int j = 4; j >= 0; j--) value = value * x * x + a[j];
        const int magnitude = i < count / 2 ? count / 2 - 1 - i : i - count / 2;
        levels[i] = rest ? (float)(value * x) : (i < count / 2 ? -1 : 1) * (base[bits - 2][magnitude] + 0.5f);
        if (rest) { /* to a half */
            uint32_t word;
            memcpy(&word, levels + i, 4);
            word = (word + 0xfff) & ~0x1fffu;
            memcpy(levels + i, &word, 4);
        }
    }
    for (int j = 0; j < 5 && rest; j++) coefficients[j] = (float)a[j];
    tq_codebook_init(book, levels, coefficients, bits, rest);
}

/* An entry of the rotated matrix. */
static double weight_of(const tq_layer *layer, int64_t row, int64_t column)
{
    const int bits = layer->book->bits, rest = layer->book->residual_bits;
    int index = field(layer->codes + row * layer->codes_stride, bits, column);
    if (rest) index = index << rest | field(layer->residual + row * layer->residual_stride, rest, column);
    const int byte = layer->scales[row * layer->scales_stride + column / 32], e = byte >> 5, mantissa = byte & 31;
    return layer->book->level[index] * ldexp(e ? (32 + mantissa) << (e - 1) : mantissa, layer->exponents[row]);
}

/* The rotation of one row, signs aside, from its definition. */
static void rotate(double *row, int64_t columns, int64_t rotation)
{
    for (int64_t start = 0; start < columns; start += rotation) {
        double block[128];
        for (int64_t i = 0; i < rotation; i++) {
            block[i] = 0;
            for (int64_t j = 0; j < rotation; j++)
                block[i] += row[start + j] * (__builtin_popcountll((uint64_t)(i & j)) & 1 ? -1 : 1);
        }
        for (int64_t i = 0; i < rotation; i++) row[start + i] = block[i] / sqrt((double)rotation);
    }
}

static void read_values(const void *values, int type, int64_t count, double *out)
{
    for (int64_t i = 0; i < count; i++) {
        uint16_t half;
        float value;
        if (type == FLOAT32) memcpy(&value, (const char *)values + 4 * i, 4);
        else {
            memcpy(&half, (const char *)values + 2 * i, 2);
            value = type == BFLOAT16 ? bfloat_to_float(half) : half_to_float(half);
        }
        out[i] = value;
    }
}

static int failures;
enum { TAIL = 4 };               /* z in check */

/* Whether the errors of a token's n results are those of independent roundings of standard deviations at most limit * size.
 * The norm of such an error is sqrt(sum of their squares) in the mean, and more than that plus z times the largest of them
 * with a probability below exp(-z^2 / 2) (Gaussian concentration): a token may have one row, or one that outweighs others.
 * Halves that are subnormal are off by half a step of 2^-24, whatever their size. */
static void check(const char *what, const char *engine, const double *want, const double *got, const double *size, int64_t m,
                  int64_t n, double limit, int type)
{
    for (int64_t t = 0; t < m; t++) {
        double error = 0, norm = 0, largest = 0;
        const double subnormal = type == FLOAT16 ? 0x1p-25 * sqrt((double)n) : 0;
        for (int64_t i = 0; i < n; i++) {
            error += pow(got[t * n + i] - want[t * n + i], 2), norm += pow(size[t * n + i], 2);
            largest = fmax(largest, fabs(size[t * n + i]));
        }
        if (!(sqrt(error) <= limit * (sqrt(norm) + TAIL * largest) + subnormal)) {
            printf("%s %s: token %ld of %ld, error %.3g of %.3g\n", engine, what, (long)t, (long)m, sqrt(error), sqrt(norm));
            failures++;
            return;
        }
    }
}

/* Rows of an embedding, and numbers that are none of a row. */
static void look_up(const tq_layer *layer, int type, double limit)
{
    const int64_t count = between(1, 9), k = layer->in_features, columns = layer->blocks * BLOCK;
    int64_t *ids = malloc((size_t)count * 8);
    void *out = malloc((size_t)(count * k) * (type == FLOAT32 ? 4 : 2));
    double *want = malloc((size_t)(count * columns) * 8), *got = malloc((size_t)(count * k) * 8);
    for (int64_t i = 0; i < count; i++) {
        ids[i] = between(0, layer->rows - 1);
        double *row = want + i * columns;
        for (int64_t j = 0; j < columns; j++) row[j] = weight_of(layer, ids[i], j);
        rotate(row, columns, layer->rotation);
        for (int64_t j = 0; j < columns; j++) row[j] *= layer->signs[j];
    }
    for (int64_t i = 0; i < count; i++) memmove(want + i * k, want + i * columns, (size_t)k * 8); /* without padding */
    if (tq_look_up(layer, ids, count, out, type, 1)) abort();
    read_values(out, type, count * k, got);
    check("rows", "every engine's", want, got, want, count, k, limit, type);
    ids[between(0, count - 1)] = draw() & 1 ? layer->rows : -1;
    if (tq_look_up(layer, ids, count, out, type, 1) != 2) printf("no row of that number, and no error\n"), failures++;
    free(ids), free(out), free(want), free(got);
}

static void round_of_fuzzing(void)
{
    const int bits = (int)between(2, 4), rest = (int)between(0, 4), type = (int)between(0, 2);
    const int64_t n = between(1, 70), k = draw() % 4 ? between(1, 700) : between(1, 3000), blocks = (k + 31) / 32;
    const int64_t columns = blocks * BLOCK, m = draw() % 3 ? between(1, 9) : between(10, 150);
    tq_codebook book;
    make_book(&book, bits, rest);
    int64_t rotation = columns & -columns;
    rotation = rotation > 128 ? 128 : rotation;
    float *signs = malloc((size_t)columns * 4);
    for (int64_t i = 0; i < columns; i++) signs[i] = draw() & 1 ? 1 : -1;
    uint8_t *codes = bytes(n * blocks * 4 * bits), *residual = rest ? bytes(n * blocks * 4 * rest) : NULL;
    uint8_t *scales = bytes(n * blocks);
    int8_t *exponents = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++) exponents[i] = (int8_t)between(-24, -18);
    const int64_t item = type == FLOAT32 ? 4 : 2, gap = between(0, 5) * item, stride = k * item + gap;
    char *x = malloc((size_t)(m * stride - gap)), *y = malloc((size_t)(m * n * item));
    double *real = calloc((size_t)(m * columns), 8), *want = malloc((size_t)(m * n) * 8), *got = malloc((size_t)(m * n) * 8);
    double *size = malloc((size_t)(m * n) * 8);
    for (int64_t t = 0; t < m; t++)
        for (int64_t j = 0; j < k; j++) {
            float value = (float)(between(-1000, 1000) * 0.001 * (draw() % 50 ? 1 : 30));
            char *at = x + t * stride + j * item;
            uint16_t half;
            if (type == BFLOAT16) {
                uint32_t word;
                memcpy(&word, &value, 4);
                half = (uint16_t)(word >> 16), memcpy(at, &half, 2), value = bfloat_to_float(half);
            } else if (type == FLOAT16) {
                half = (uint16_t)(between(0x3000, 0x4000) | (int64_t)(draw() & 1) << 15), memcpy(at, &half, 2);
                value = half_to_float(half);
            } else
                memcpy(at, &value, 4);
            real[t * columns + j] = value * signs[j];
        }
    const tq_layer layer = {.codes = codes, .residual = residual, .scales = scales, .exponents = exponents, .signs = signs,
                            .book = &book, .rows = n, .blocks = blocks, .in_features = k, .codes_stride = blocks * 4 * bits,
                            .residual_stride = blocks * 4 * rest, .scales_stride = blocks, .rotation = (int32_t)rotation};
    for (int64_t t = 0; t < m; t++) rotate(real + t * columns, columns, rotation);
    for (int64_t t = 0; t < m; t++)
        for (int64_t i = 0; i < n; i++) {
            /* Roundings of weights and activations are independent and relative: together, of the norm of the products.
             * That is not the product of both norms: blocks of large weights may meet those with outliers. */
            double sum = 0, squares = 0;
            for (int64_t j = 0; j < columns; j++) {
                const double product = weight_of(&layer, i, j) * real[t * columns + j];
                sum += product;
                squares += product * product;
            }
            want[t * n + i] = sum;
            size[t * n + i] = sqrt(squares) + fabs(sum);
        }
    /* Half precision: twice what rounding weights and results does to an eager layer, 2^-11 and 2^-8 over the root of 3. */
    static const double rounding[3] = {1e-6, 2 * 0x1p-11 / 1.732, 2 * 0x1p-8 / 1.732};
    for (int engine = 0; tq_engine_name(engine); engine++) {
        if (!tq_engine_available(engine)) continue;
        const char *name = tq_engine_name(engine);
        for (int mode = 0; mode < 3; mode++) {
            if (mode == 2 && (type != BFLOAT16 || !tq_engine_has_tiled(engine))) continue;
            if (mode == 0 && type == FLOAT32) continue; /* integers are for half precision */
            const tq_call call = {&layer, stride, engine, mode, type};
            if (tq_linear(&call, x, y, m, 1)) abort();
            read_values(y, type, m * n, got);
            check(mode == 0 ? "integer" : mode == 1 ? "exact" : "tiled", name, want, got, size, m, n,
                  rounding[type], type);
        }
        const int64_t width = (columns + tq_engine_step(engine) - 1) / tq_engine_step(engine) * tq_engine_step(engine);
        float *rotated = malloc((size_t)(m * width) * 4), *rows = malloc((size_t)(n * width) * 4);
        float *factors = malloc((size_t)m * 4);
        if (tq_rotate(engine, &layer, x, stride, type, m, rotated, factors, 1)) abort();
        tq_decode_rows(engine, &layer, 0, n, rows, 1);
        for (int64_t t = 0; t < m; t++)
            for (int64_t i = 0; i < n; i++) {
                double sum = 0;
                for (int64_t j = 0; j < width; j++) sum += (double)rotated[t * width + j] * rows[i * width + j];
                got[t * n + i] = sum * factors[t];
            }
        check("decoded", name, want, got, size, m, n, 1e-6, FLOAT32);
        free(rotated), free(rows), free(factors);
    }
    look_up(&layer, type, rounding[type]);
    free(signs), free(codes), free(residual), free(scales), free(exponents), free(x), free(y);
    free(real), free(want), free(got), free(size);
}

/* Calibrated rounding: codes are those of the level nearest to what earlier errors leave; losses, those of the errors. */
static void round_of_feedback(void)
{
    const int64_t rows = between(1, 90), pairs = rows * between(1, 5);
    const int32_t levels = 1 << between(1, 8);
    float *block = malloc((size_t)rows * BLOCK * 4), *scale = malloc((size_t)pairs * 4), *factor = malloc(BLOCK * BLOCK * 4);
    float *level = malloc((size_t)levels * 4), *boundaries = malloc((size_t)(levels - 1) * 4);
    float *errors = malloc((size_t)pairs * BLOCK * 4), *losses = malloc((size_t)pairs * 4);
    uint8_t *codes = malloc((size_t)pairs * BLOCK);
    for (int64_t i = 0; i < rows * BLOCK; i++) block[i] = (float)between(-1000, 1000) * 0.001f;
    for (int64_t i = 0; i < pairs; i++) scale[i] = draw() % 20 ? (float)between(1, 100) * 0.001f : 0;
    for (int i = 0; i < BLOCK * BLOCK; i++) factor[i] = i % (BLOCK + 1) ? (float)between(-100, 100) * 0.001f : 1.5f;
    for (int i = 0; i < levels; i++) level[i] = (float)(2 * i + 1 - levels);
    for (int i = 0; i + 1 < levels; i++) boundaries[i] = (level[i] + level[i + 1]) / 2;
    const int32_t candidates = (int32_t)(pairs / rows);
    const tq_feedback feedback = {block, scale, factor, boundaries, level, codes, errors, losses, rows, candidates, levels};
    for (int engine = 0; tq_engine_name(engine); engine++) {
        if (!tq_engine_available(engine)) continue;
        tq_feed_back(engine, &feedback, 1);
        for (int64_t i = 0; i < pairs; i++) {
            double loss = 0;
            int wrong = 0;
            for (int j = 0; j < BLOCK; j++) {
                const float *own = errors + i * BLOCK;
                const int code = codes[i * BLOCK + j], outside = code == 0 || code == levels - 1 || scale[i] == 0;
                double left = block[i / candidates * BLOCK + j];
                for (int before = 0; before < j; before++) left -= (double)factor[before * BLOCK + j] * own[before];
                const double off = left - (double)level[code] * scale[i], error = own[j];
                wrong |= !(fabs(off / 1.5 - error) < 1e-4) || (!outside && !(fabs(off) <= scale[i] * 1.001 + 1e-5));
                loss += error * error;
            }
            if (wrong || !(fabs(loss - losses[i]) <= 1e-4 * loss + 1e-6)) {
                printf("%s feedback: pair %ld of %ld\n", tq_engine_name(engine), (long)i, (long)pairs);
                failures++;
                break;
            }
        }
    }
    free(block), free(scale), free(factor), free(level), free(boundaries), free(errors), free(losses), free(codes);
}

int main(int count, char **arguments)
{
    const int rounds = count > 1 ? atoi(arguments[1]) : 100;
    state = count > 2 ? strtoull(arguments[2], NULL, 0) : 0;
    for (int i = 0; i < rounds; i++) round_of_fuzzing(), round_of_feedback();
    for (int engine = 0; tq_engine_name(engine); engine++)
        if (tq_engine_available(engine)) printf("%s ", tq_engine_name(engine));
    printf("%d rounds, %d failures\n", rounds, failures);
    return failures > 0;
}
