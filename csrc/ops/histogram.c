/* How many values lie in each bin: what calibration counts (fxquant/value_observers.py). */
#include <string.h>

#include "kernels.h"

enum { BLOCK = 256, TABLES = 4 };

/* Counts in several tables, for values that are alike would wait for each other's count. */
void fxq_histogram(const float *x, int64_t count, float inverse, float offset, float *out) {
    static const int bins = FXQ_HISTOGRAM_BINS;
    int32_t tables[TABLES][FXQ_HISTOGRAM_BINS + 1], bin[BLOCK];
    memset(tables, 0, sizeof tables);
    for (int64_t i = 0; i < count; i += BLOCK) {
        const int block = count - i < BLOCK ? (int)(count - i) : BLOCK;
        for (int j = 0; j < block; j++) {
            const float place = x[i + j] * inverse + offset;
            const bool is_inside = place >= 0.0f && place < (float)bins; /* a NaN is not */
            bin[j] = (int32_t)(is_inside ? place : (float)bins);
        }
        for (int j = 0; j < block; j++) tables[j % TABLES][bin[j]]++;
    }
    for (int j = 0; j < bins; j++) {
        out[j] = (float)(tables[0][j] + tables[1][j] + tables[2][j] + tables[3][j]);
    }
}
