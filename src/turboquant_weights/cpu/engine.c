/* What library.py calls: codebooks, the choice of an engine, threads, and the way from sums to results. */
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <stdatomic.h>
#include <stdlib.h>

#include "prepare.h"

#if defined(_WIN32)
#define API __declspec(dllexport)
#else
#define API __attribute__((visibility("default")))
#endif

enum { ROWS = 64 };                  /* at most this many rows per share of the work */
enum { SHARE_BYTES = 1 << 17 };      /* and about this many bytes of planes, which then stay in the L2 cache */
enum { SERIAL_WORK = 1 << 17 };      /* products below which a second thread costs more than it brings */

static const tq_engine *const engines[] = {
#if defined(__x86_64__)
    &tq_avx512,
    &tq_avx512_vnni,
    &tq_avx2,
#endif
#if defined(__aarch64__)
    &tq_neon,
#endif
    &tq_portable,
};
enum { ENGINES = sizeof engines / sizeof *engines };

/* Name of engine i, best first; NULL behind the last. */
API const char *tq_engine_name(int i) { return i < ENGINES ? engines[i]->name : NULL; }
API int tq_engine_available(int i) { return engines[i]->available(); }
API int tq_engine_has_integer(int i) { return engines[i]->integer != NULL; }
API int tq_engine_has_tiled(int i) { return engines[i]->tiled && engines[i]->tiled->available(); }
API int tq_engine_step(int i) { return engines[i]->step; }
API size_t tq_codebook_size(void) { return sizeof(tq_codebook); }
API size_t tq_layer_size(void) { return sizeof(tq_layer); }
API size_t tq_call_size(void) { return sizeof(tq_call); }
API size_t tq_feedback_size(void) { return sizeof(tq_feedback); }

/* -- codebooks --------------------------------------------------------------------------------------------------------- */

static uint16_t half_of(float exact)
{
    uint32_t word;
    memcpy(&word, &exact, 4);
    return (uint16_t)((word >> 16 & 0x8000) | (((word >> 13) - (112 << 10)) & 0x7fff)); /* levels are normal halves */
}

/* Coefficients in t = 2 x^2 - 1 and fixed point, x in [-1, 1], of a polynomial given in powers of x^2 for x in [-2, 2]. */
static void fixed_point(const float *coefficients, int levels, tq_codebook *book)
{
    double a[5];
    for (int i = 0; i < 5; i++) a[i] = ldexp(coefficients[i], 2 * i + 1 - i); /* x^2 = (t + 1) / 2 */
    for (int pass = 0; pass < 4; pass++)
        for (int i = 3; i >= pass; i--) a[i] += a[i + 1];
    double largest = 0;
    for (int i = levels / 2; i < levels; i++) {
        const double x = (2 * i + 1 - levels) / (double)levels, t = 2 * x * x - 1;
        double value = 0;
        for (int j = 4; j >= 0; j--) {
            value = value * t + a[j];
            largest = fmax(largest, fmax(fabs(value), fabs(a[j])));
        }
    }
    book->polynomial_unit = (float)(32000 / largest);
    for (int i = 0; i < 5; i++) book->coefficient[i] = (int16_t)lrint(a[i] * (32000 / largest));
}

/* Parabolas through the levels of each base field, by least squares: ways are the odd numbers around 0, bends triangular
 * numbers, both stretched so that their coefficients are as large as bytes allow. */
static void parabolas(tq_codebook *book)
{
    const int count = 1 << book->residual_bits;
    double way[16], bend[16], mean[16], step[16] = {0}, curve[16] = {0}, ways = 0, bends = 0, mean_bend = 0;
    double steepest = 0, roundest = 0;
    book->middle_unit = 32000 / book->level[16 * count - 1];
    for (int i = 0; i < count; i++) {
        way[i] = 2 * i + 1 - count;
        bend[i] = (way[i] * way[i] - 1) / 8;
        mean_bend += bend[i] / count;
    }
    for (int i = 0; i < count; i++) ways += way[i] * way[i], bends += (bend[i] - mean_bend) * (bend[i] - mean_bend);
    for (int base = 0; base < 16; base++) {
        mean[base] = 0;
        for (int i = 0; i < count; i++) {
            const double level = (double)book->level[base * count + i] * (double)book->middle_unit;
            mean[base] += level / count;
            step[base] += level * way[i] / ways;
            curve[base] += level * (bend[i] - mean_bend) / bends;
        }
        steepest = fmax(steepest, step[base]);
        roundest = fmax(roundest, fabs(curve[base]));
    }
    const double stretch = ceil(steepest / 255), swell = ceil(roundest / 127);
    for (int base = 0; base < 16; base++) {
        book->step[base] = (uint8_t)lrint(step[base] / stretch);
        book->curve[base] = (int8_t)lrint(curve[base] / swell);
        const int middle = (int)lrint(mean[base] - book->curve[base] * swell * mean_bend);
        book->middle_low[base] = (uint8_t)middle;
        book->middle_high[base] = (uint8_t)(middle >> 8);
    }
    for (int nibble = 0; nibble < 16; nibble++)
        for (int odd = 0; odd < 2; odd++) {
            const int field = (odd && count == 4 ? nibble >> 2 : nibble) % count;
            book->way[odd][nibble] = (int8_t)(way[field] * stretch);
            book->bend[odd][nibble] = (uint8_t)(bend[field] * swell);
        }
}

/* Lines through four levels in a row, by least squares. */
static void lines(tq_codebook *book)
{
    for (int i = 0; i < 64; i++) {
        const float *level = book->level + 4 * i, mean = (level[0] + level[1] + level[2] + level[3]) / 4;
        const float step = (3 * (level[3] - level[0]) + level[2] - level[1]) / 10 * book->word_unit;
        book->line_step[i] = (int16_t)lrintf(step);
        book->line_start[i] = (int16_t)lrintf(mean * book->word_unit - 1.5f * (float)book->line_step[i]);
    }
}

/* levels [2^(bits + residual_bits)], ascending; coefficients [5], zeros if there is no residual plane. */
API void tq_codebook_init(tq_codebook *book, const float *levels, const float *coefficients, int bits, int residual_bits)
{
    const int count = 1 << (bits + residual_bits);
    memset(book, 0, sizeof *book);
    book->bits = bits;
    book->residual_bits = residual_bits;
    book->unit = 16383 / levels[count - 1];
    book->word_unit = 32000 / levels[count - 1];
    for (int i = 0; i < count; i++) {
        const uint16_t half = half_of(levels[i]);
        book->level[i] = levels[i];
        book->half_high[i] = (uint8_t)(half >> 8);
        book->half_low[i] = (uint8_t)half;
        book->half[i] = half;
        book->word[i] = (int16_t)lrintf(levels[i] * book->word_unit);
        const int positive = (int)lrint(fabsf(levels[i]) * book->unit + 16447.5);
        const int integer = levels[i] > 0 ? positive : 32895 - positive; /* both bytes are complements where the index is */
        book->high[i] = (uint8_t)((integer - 64) >> 7);
        book->low[i] = (uint8_t)(integer - 128 * book->high[i]);
        if (!residual_bits) book->base[i] = (uint8_t)(levels[i] + 127.5f);
    }
    if (count == 256) lines(book);
    if (residual_bits) fixed_point(coefficients, count, book);
    if (bits == 4 && residual_bits >= 2) parabolas(book);
}

/* -- threads ----------------------------------------------------------------------------------------------------------- */

/* GOMP_parallel of the OpenMP runtime that PyTorch has loaded: its threads, none of our own. */
typedef void parallel_function(void (*)(void *), void *, unsigned, unsigned);
static parallel_function *parallel;
API void tq_set_parallel(parallel_function *function) { parallel = function; }

static void run(void (*function)(void *), void *data, int threads)
{
    if (threads > 1 && parallel)
        parallel(function, data, (unsigned)threads, 0);
    else
        function(data);
}

/* -- y = x W^T + bias -------------------------------------------------------------------------------------------------- */

/* Rows that one thread begins with. A cache line of its own for each. */
typedef struct {
    _Alignas(64) atomic_llong next;
    int64_t end;
} range;

typedef struct {
    const tq_engine *engine;
    const tq_layer *layer;
    int mode;
    tq_activations act;
    const char *x;
    int64_t tokens, x_stride, grain, least, threads;
    range *ranges;               /* one per thread */
    char *y;
    int type;
    char *scratch;               /* one part per thread */
    int64_t scratch_bytes;
    atomic_int next_scratch;
    atomic_llong next;
} job;

static void prepare_share(void *data)
{
    job *j = data;
    void *scratch = j->scratch + j->scratch_bytes * atomic_fetch_add(&j->next_scratch, 1);
    for (int64_t first; (first = atomic_fetch_add(&j->next, STEP_TOKENS)) < j->tokens;) {
        const int64_t left = j->tokens - first, count = left < STEP_TOKENS ? left : STEP_TOKENS;
        const char *x = j->x + first * j->x_stride;
        if (j->mode == TILED)
            j->engine->tiled->prepare(j->layer, &j->act, x, j->x_stride, j->type, first, count, scratch);
        else
            for (int64_t t = 0; t < count; t++)
                j->engine->prepare(j->layer, &j->act, x + t * j->x_stride, j->type, first + t, scratch);
    }
}

static uint16_t to_bfloat(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

static uint16_t to_half(float value)
{
    uint32_t word;
    memcpy(&word, &value, 4);
    const uint16_t sign = (uint16_t)(word >> 16 & 0x8000);
    word &= 0x7fffffff;
    if (word > 0x7f800000) return sign | 0x7e00;
    if (word >= 0x477ff000) return sign | 0x7c00; /* 65520 and above */
    if (word >= 0x38800000) return (uint16_t)(sign | ((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13));
    /* Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the lowest bits. */
    memcpy(&value, &word, 4);
    value += 0.5f;
    memcpy(&word, &value, 4);
    return (uint16_t)(sign | (word - 0x3f000000));
}

/* count values to results from `at` on. */
static void write_values(void *results, int type, int64_t at, const float *values, int64_t count)
{
    uint16_t *halves = (uint16_t *)results + at;
    if (type == FLOAT32)
        memcpy((float *)results + at, values, (size_t)count * 4);
    else if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) halves[i] = to_bfloat(values[i]);
    else
        for (int64_t i = 0; i < count; i++) halves[i] = to_half(values[i]);
}

/* Sums [rows][stride] of `count` tokens to results. */
static void finish(const job *j, int64_t row, int64_t rows, int64_t token, int64_t count, const float *sums, int64_t stride)
{
    const tq_layer *layer = j->layer;
    double factor[ROWS];
    float bias[ROWS] = {0}, value[ROWS];
    for (int64_t i = 0; i < rows; i++) {
        const uint64_t power = (uint64_t)(1023 + 19 + layer->exponents[row + i]) << 52; /* the bits of 2^(19 + exponent) */
        memcpy(factor + i, &power, 8);
        if (layer->bias) bias[i] = value_of(layer->bias, layer->bias_type, row + i);
    }
    for (int64_t t = 0; t < count; t++) {
        const double scale = j->act.token_scale[token + t];
        const int64_t at = (token + t) * layer->rows + row;
        for (int64_t i = 0; i < rows; i++) value[i] = (float)(sums[i * stride + t] * (scale * factor[i]) + bias[i]);
        write_values(j->y, j->type, at, value, rows);
    }
}

/* Each thread begins with rows of its own, one run of memory, of which what is prefetched serves itself, and then helps others
 * with theirs, so that all end together. Runs begin where kernels' fours of rows and strips of six may begin. */
static void share_rows(job *j)
{
    const int64_t rows = j->layer->rows;
    for (int64_t t = 0; t < j->threads; t++) {
        atomic_init(&j->ranges[t].next, rows * t / j->threads / 12 * 12);
        j->ranges[t].end = t + 1 < j->threads ? rows * (t + 1) / j->threads / 12 * 12 : rows;
    }
}

/* Takes the next rows that nobody has taken, from range `*at` on; 0: there are none. Of the last rows of a range a half at most,
 * but for `least`, so that nobody waits long for another thread's. */
static int64_t take_rows(job *j, int64_t *at, int64_t *tried, int64_t *row)
{
    for (; *tried < j->threads; ++*tried, *at = (*at + 1) % j->threads) {
        range *from = j->ranges + *at;
        for (long long next = atomic_load(&from->next), left; (left = from->end - next) > 0;) {
            int64_t rows = j->grain;
            while (rows > j->least && 2 * rows > left) rows = rows / 2 > j->least ? rows / 2 : j->least;
            rows = rows < left ? rows : left;
            *row = next;
            if (atomic_compare_exchange_weak(&from->next, &next, next + rows)) return rows;
        }
    }
    return 0;
}

static void multiply_share(void *data)
{
    job *j = data;
    tq_kernel *const kernel = j->act.exact ? j->engine->exact : j->engine->integer;
    float sums[ROWS * TOKENS];
    int64_t row, at = atomic_fetch_add(&j->next_scratch, 1), tried = 0;
    for (int64_t rows; (rows = take_rows(j, &at, &tried, &row)) > 0;)
        for (int64_t token = 0; token < j->tokens; token += TOKENS) {
            const int64_t rest = j->tokens - token, count = rest < TOKENS ? rest : TOKENS;
            kernel(j->layer, &j->act, row, rows, token, count, sums);
            finish(j, row, rows, token, count, sums, TOKENS);
        }
}

static void tile_share(void *data)
{
    job *j = data;
    const tq_tiled *tiled = j->engine->tiled;
    int64_t row, at = atomic_fetch_add(&j->next_scratch, 1), tried = 0;
    char *memory = j->scratch + j->scratch_bytes * at;
    uint16_t *tile = (uint16_t *)memory;
    float *sums = (float *)(memory + TILE_ROWS * TILE_COLUMNS * 2);
    for (int64_t rows; (rows = take_rows(j, &at, &tried, &row)) > 0;) {
        tiled->multiply(j->layer, &j->act, row, rows, j->tokens, sums, tile);
        if (j->type == BFLOAT16 && tiled->finish(j->layer, &j->act, row, rows, j->tokens, sums, (uint16_t *)j->y)) continue;
        finish(j, row, rows, 0, j->tokens, sums, (j->tokens + 15) / 16 * 16);
    }
}

static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

/* Memory aligned to a cache line, or NULL. More than what glibc keeps for the next call comes fresh from the system each time,
 * which takes a fault for each page: then on huge pages, if the system has some. */
static char *block_of(int64_t bytes)
{
#if defined(MADV_HUGEPAGE)
    enum { HUGE_PAGE = 1 << 21, KEPT = 1 << 25 };
    if (bytes > KEPT) {
        const size_t whole = ((size_t)bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
        char *memory = aligned_alloc(HUGE_PAGE, whole);
        if (memory) madvise(memory, whole, MADV_HUGEPAGE);
        return memory;
    }
#endif
    return aligned_alloc(64, (size_t)bytes);
}

/* Places the activations of a job in one block of memory, which the caller frees. NULL: no memory. */
static char *allocate(job *j, int threads)
{
    const int64_t m = j->mode == TILED ? (j->tokens + 63) / 64 * 64 : j->tokens, blocks = (j->layer->blocks + 15) / 16 * 16, columns = blocks * BLOCK;
    const int64_t scales = j->mode == TILED ? 0 : aligned(4 * m * blocks), factors = aligned(8 * m);
    const int64_t values = aligned((j->act.exact ? 4 : 2) * m * columns);
    const int64_t tiles = j->mode == TILED ? TILE_ROWS * (TILE_COLUMNS * 2 + m * 4) : 0, rotated = aligned(6 * columns);
    j->scratch_bytes = aligned(tiles > rotated ? tiles : rotated);
    const int64_t ranges = threads * (int64_t)sizeof(range);
    char *memory = block_of(factors + 2 * scales + values + threads * j->scratch_bytes + ranges);
    if (!memory) return NULL;
    j->act.blocks = blocks;
    j->act.token_scale = (double *)memory;
    j->act.scale = (float *)(memory + factors);
    j->act.correction = (float *)(memory + factors + scales);
    j->act.values = memory + factors + 2 * scales;
    j->scratch = memory + factors + 2 * scales + values;
    j->ranges = (range *)(j->scratch + threads * j->scratch_bytes);
    return memory;
}

static void prepare_all(job *j, int threads)
{
    atomic_init(&j->next, 0);
    atomic_init(&j->next_scratch, 0);
    const int64_t work = j->tokens * j->act.blocks * BLOCK;
    run(prepare_share, j, work * 16 < SERIAL_WORK || j->tokens == 1 ? 1 : threads);
}

/* x [m, in_features], y [m, rows], contiguous, both of the call's type. 0: done, 1: no memory. */
API int tq_linear(const tq_call *call, const void *x, void *y, int64_t m, int threads)
{
    const tq_layer *layer = call->layer;
    const int type = call->type;
    job j = {.engine = engines[call->engine], .layer = layer, .x = x, .tokens = m, .x_stride = call->x_stride, .y = y, .type = type};
    j.mode = call->mode == INTEGER && !j.engine->integer ? EXACT : call->mode;
    j.act.exact = j.mode == EXACT;
    j.act.coarse = type == BFLOAT16;
    const double work = (double)m * (double)layer->rows * (double)layer->blocks * BLOCK;
    if (work < SERIAL_WORK) threads = 1;
    char *memory = allocate(&j, threads);
    if (!memory) return 1;
    prepare_all(&j, threads);
    const int64_t row_bytes = 4 * layer->blocks * (layer->book->bits + layer->book->residual_bits);
    int64_t grain = layer->rows / (8 * threads), fits = SHARE_BYTES / row_bytes;
    grain = grain > fits ? fits : grain;
    j.grain = j.mode == TILED ? TILE_ROWS : grain > ROWS ? ROWS : grain < 4 ? 4 : grain / 4 * 4;
    j.least = j.mode == TILED && threads > 1 ? TILE_ROWS / 4 : j.grain;
    j.threads = threads;
    share_rows(&j);
    atomic_init(&j.next_scratch, 0);
    run(j.mode == TILED ? tile_share : multiply_share, &j, threads);
    free(memory);
    return 0;
}

/* -- rows of an embedding -------------------------------------------------------------------------------------------------- */

typedef struct {
    const tq_layer *layer;
    const int64_t *ids;
    int64_t count;
    void *out;
    int type;
    float *scratch;              /* a row per thread */
    atomic_int next_scratch;
    atomic_llong next;
} lookup;

/* The rotation is its own inverse but for the signs, which come last. Rows are decoded by the portable engine, which leaves
 * columns in their order. */
static void look_up_share(void *data)
{
    lookup *l = data;
    const tq_layer *layer = l->layer;
    const int64_t columns = layer->blocks * BLOCK, k = layer->in_features;
    float *row = l->scratch + columns * atomic_fetch_add(&l->next_scratch, 1);
    const double root = sqrt((double)layer->rotation);
    for (int64_t i; (i = atomic_fetch_add(&l->next, 1)) < l->count;) {
        tq_portable.decode(layer, l->ids[i], 1, row, columns);
        for (int64_t j = 0; j < columns; j += layer->rotation) hadamard(row + j, layer->rotation);
        const double factor = ldexp(1, 19 + layer->exponents[l->ids[i]]) / root;
        for (int64_t j = 0; j < k; j++) row[j] = (float)(row[j] * factor) * layer->signs[j];
        write_values(l->out, l->type, i * k, row, k);
    }
}

/* Rows of the weight, as it was before the rotation, to out [count, in_features]. 0: done, 1: no memory, 2: there is no row
 * with one of the numbers. */
API int tq_look_up(const tq_layer *layer, const int64_t *ids, int64_t count, void *out, int type, int threads)
{
    for (int64_t i = 0; i < count; i++)
        if (ids[i] < 0 || ids[i] >= layer->rows) return 2;
    const int64_t columns = layer->blocks * BLOCK;
    if (count * columns < SERIAL_WORK / 8) threads = 1; /* a column costs as much as eight products */
    lookup l = {.layer = layer, .ids = ids, .count = count, .out = out, .type = type};
    l.scratch = malloc((size_t)(threads * columns) * 4);
    if (!l.scratch) return 1;
    atomic_init(&l.next, 0);
    atomic_init(&l.next_scratch, 0);
    run(look_up_share, &l, threads);
    free(l.scratch);
    return 0;
}

/* -- calibrated rounding ------------------------------------------------------------------------------------------------ */

typedef struct {
    const tq_engine *engine;
    const tq_feedback *feedback;
    atomic_llong next;
} rounding;

static void round_share(void *data)
{
    rounding *r = data;
    const int64_t pairs = r->feedback->rows * r->feedback->candidates;
    for (int64_t first; (first = atomic_fetch_add(&r->next, LANES)) < pairs;)
        r->engine->feed_back(r->feedback, first, pairs - first < LANES ? pairs - first : LANES);
}

API void tq_feed_back(int engine, const tq_feedback *feedback, int threads)
{
    rounding r = {.engine = engines[engine], .feedback = feedback};
    run(round_share, &r, threads);
}

/* -- for a BLAS: rotated activations and decoded rows in one order of columns --------------------------------------------- */

/* Columns of one row of what tq_rotate and tq_decode write. */
static int64_t width_of(int engine, const tq_layer *layer)
{
    const int64_t step = engines[engine]->step;
    return (layer->blocks * BLOCK + step - 1) / step * step;
}

/* x as in tq_linear to out [m, width], of magnitude about one whatever x is: the powers of two that are missing go to
 * factors [m]. 0: done, 1: no memory. */
API int tq_rotate(int engine, const tq_layer *layer, const void *x, int64_t x_stride, int type, int64_t m, float *out,
                  float *factors, int threads)
{
    job j = {.engine = engines[engine], .layer = layer, .x = x, .tokens = m, .x_stride = x_stride, .type = type};
    j.mode = EXACT;
    j.act.exact = 1;
    char *memory = allocate(&j, threads);
    if (!memory) return 1;
    prepare_all(&j, threads);
    const int64_t width = width_of(engine, layer);
    const double root = sqrt((double)layer->rotation);
    for (int64_t t = 0; t < m; t++) {
        const float *from = (const float *)j.act.values + t * j.act.blocks * BLOCK, scale = (float)(1 / root);
        for (int64_t i = 0; i < width; i++) out[t * width + i] = from[i] * scale;
        factors[t] = (float)(j.act.token_scale[t] * root);
    }
    free(memory);
    return 0;
}

typedef struct {
    const tq_engine *engine;
    const tq_layer *layer;
    int64_t first, rows, width;
    float *out;
    atomic_llong next;
} decoding;

static void decode_share(void *data)
{
    decoding *d = data;
    for (int64_t row; (row = atomic_fetch_add(&d->next, 1)) < d->rows;) {
        float *out = d->out + row * d->width;
        d->engine->decode(d->layer, d->first + row, 1, out, d->width);
        const float scale = ldexpf(1.0f, 19 + d->layer->exponents[d->first + row]);
        for (int64_t i = 0; i < d->width; i++) out[i] *= scale;
    }
}

/* Rows [first, first + rows), rotated as they are stored, to out [rows, width]. */
API void tq_decode_rows(int engine, const tq_layer *layer, int64_t first, int64_t rows, float *out, int threads)
{
    decoding d = {.engine = engines[engine], .layer = layer, .first = first, .rows = rows, .width = width_of(engine, layer),
                  .out = out};
    run(decode_share, &d, threads);
}
