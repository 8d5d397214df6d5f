/* The sequential part of calibrated rounding (feedback.py): 32 columns in order, for every row and candidate scale at once.
 * Plain C, compiled once per engine with that engine's instructions, as prepare.h is.
 */
#ifndef TURBOQUANT_FEEDBACK_H
#define TURBOQUANT_FEEDBACK_H

#include <string.h>

#include "engine.h"

/* For each target the number of boundaries [levels - 1] below it. */
static inline void nearest(const float *target, const float *boundaries, int levels, int32_t *index)
{
    memset(index, 0, LANES * sizeof *index);
    for (int step = levels / 2; step; step /= 2)
        for (int i = 0; i < LANES; i++) {
            const int32_t middle = index[i] + step;
            index[i] = target[i] > boundaries[middle - 1] ? middle : index[i];
        }
}

/* Pairs [first, first + count) of rows * candidates, count <= LANES. */
static void feed_back(const tq_feedback *f, int64_t first, int64_t count)
{
    float left[BLOCK][LANES] = {{0}}, error[BLOCK][LANES], step[LANES] = {0}, inverse[LANES], loss[LANES] = {0};
    uint8_t code[BLOCK][LANES];
    for (int64_t i = 0; i < count; i++) {
        step[i] = f->scale[first + i];
        for (int j = 0; j < BLOCK; j++) left[j][i] = f->block[(first + i) / f->candidates * BLOCK + j];
    }
    for (int i = 0; i < LANES; i++) inverse[i] = step[i] > 0 ? 1 / step[i] : 0;
    for (int j = 0; j < BLOCK; j++) {
        const float diagonal = f->factor[j * BLOCK + j];
        float target[LANES];
        int32_t index[LANES];
        for (int i = 0; i < LANES; i++) target[i] = left[j][i] * inverse[i];
        nearest(target, f->boundaries, f->levels, index);
        for (int i = 0; i < LANES; i++) {
            code[j][i] = (uint8_t)index[i];
            error[j][i] = (left[j][i] - f->level[index[i]] * step[i]) / diagonal;
            loss[i] += error[j][i] * error[j][i];
        }
        for (int later = j + 1; later < BLOCK; later++) {
            const float factor = f->factor[j * BLOCK + later];
            for (int i = 0; i < LANES; i++) left[later][i] -= factor * error[j][i];
        }
    }
    for (int64_t i = 0; i < count; i++) {
        f->losses[first + i] = loss[i];
        for (int j = 0; j < BLOCK; j++) {
            f->codes[(first + i) * BLOCK + j] = code[j][i];
            f->errors[(first + i) * BLOCK + j] = error[j][i];
        }
    }
}

#endif
