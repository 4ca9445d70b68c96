/* What becomes of the sums of static products, as fxquant/ops/static.py says: plain C, vectorized by the compiler.
 *
 * Expects: elementwise-inl.h. */
#include <math.h>

#include "static.h"

/* An ending, with what all outputs share. A clamp and then a quantization is one clamp, since rounding keeps order:
 * least and most are those of y / scale. */
struct ending {
    struct fxq_ending of;
    float inverse, least, most;
    uint8_t lowest, highest; /* what those are as integers */
    bool clamps;             /* whether they are within what a byte holds */
    void *y;
};

/* Up to 64 outputs from `first` on, in whole registers. */
struct outputs_64 {
    int64_t first, count, width;
    bool is_near; /* whether each y / scale is a number within ±2^30, whatever the inputs */
    _Alignas(64) float scale[64];
    _Alignas(64) float bias[64];
    _Alignas(64) int32_t start[64]; /* what sums begin with: -zero_point * sum(weights) */
};

/* The bounds of a quantized value before rounding. */
FXQ_INLINE float least_of(struct fxq_scale scale, float inverse, float low) {
    const float least = (float)-scale.zero_point;
    return low * inverse > least ? low * inverse : least;
}

FXQ_INLINE float most_of(struct fxq_scale scale, float inverse, float high, int qmax) {
    const float most = (float)(qmax - scale.zero_point);
    return high * inverse < most ? high * inverse : most;
}

/* A value of y / scale in its bounds: rounded half to even; NaN is real 0. */
FXQ_INLINE uint8_t to_uint8(float t, float least, float most, int32_t zero_point) {
    t = t == t ? t : 0.0f;
    t = t < least ? least : t;
    t = t > most ? most : t;
    return (uint8_t)(float_bits(t + ROUND) + (uint32_t)zero_point);
}

static struct ending begin_ending(const struct fxq_convolution *c) {
    const struct fxq_ending *of = &c->ending;
    struct ending e = {.of = *of, .inverse = of->is_float ? 1.0f : 1.0f / of->scale.scale, .y = c->y};
    e.least = least_of(of->scale, e.inverse, of->low);
    e.most = most_of(of->scale, e.inverse, of->high, of->qmax);
    e.lowest = to_uint8(e.least, e.least, e.most, of->scale.zero_point);
    e.highest = to_uint8(e.most, e.least, e.most, of->scale.zero_point);
    e.clamps = e.lowest > 0 || e.highest < 255;
    return e;
}

/* Whether the sums of any inputs stay near; not so where a scale or a bias is no number. */
static bool are_near(const struct fxq_convolution *c, const struct outputs_64 *o) {
    const float most = (float)(c->inputs / c->groups * c->kernel[0] * c->kernel[1] * c->kernel[2]) * (255.0f * 128.0f);
    const float addend = c->ending.addend ? 255.0f * fabsf(c->ending.addend_scale.scale) : 0.0f;
    const float bound = fabsf(c->ending.scale.scale) * 0x1p30f;
    bool all = true;
    for (int64_t i = 0; i < o->width; i++) all &= most * fabsf(o->scale[i]) + fabsf(o->bias[i]) + addend < bound;
    return all && !c->ending.is_float && 1.0f / c->ending.scale.scale < INFINITY;
}

static void begin_outputs_64(const struct fxq_convolution *c, int64_t first, int64_t count, struct outputs_64 *o) {
    o->first = first;
    o->count = count;
    o->width = (count + 15) / 16 * 16;
    for (int64_t i = 0; i < o->width; i++) {
        const bool is_real = i < count;
        o->scale[i] = is_real ? c->ending.weight_scale[first + i] * c->x_scale.scale : 0.0f;
        o->bias[i] = is_real && c->ending.bias ? c->ending.bias[first + i] : -0.0f; /* y + -0 is y, to the bit */
    }
    o->is_near = are_near(c, o);
}

FXQ_INLINE float curve_of(float v, enum fxq_curve curve, float slope) {
    if (curve == FXQ_LEAKY_RELU) return v > 0.0f ? v : v * slope;
    if (curve == FXQ_SILU) return v / (exp_minus_1(-v) + 2.0f);
    float part = v + 3.0f;
    part = part < 0.0f ? 0.0f : part;
    part = part > 6.0f ? 6.0f : part;
    return v * part * (float)(1.0 / 6.0);
}

/* 64 floats become what a curve gives of them, in a loop of each curve's own. */
static void bend(float *v, enum fxq_curve curve, float slope) {
    if (curve == FXQ_LEAKY_RELU) {
        for (int i = 0; i < 64; i++) v[i] = curve_of(v[i], FXQ_LEAKY_RELU, slope);
    } else if (curve == FXQ_SILU) {
        for (int i = 0; i < 64; i++) v[i] = curve_of(v[i], FXQ_SILU, slope);
    } else {
        for (int i = 0; i < 64; i++) v[i] = curve_of(v[i], FXQ_HARDSWISH, slope);
    }
}

/* adds, is_float: constants wherever this is inlined. */
FXQ_INLINE void end_sums(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, const uint8_t *addend,
                         void *y, bool adds, bool is_float) {
    const int32_t addend_zero = e->of.addend_scale.zero_point, zero_point = e->of.scale.zero_point;
    const float addend_scale = e->of.addend_scale.scale, low = e->of.low, high = e->of.high;
    const float inverse = e->inverse, least = e->least, most = e->most;
    for (int64_t n = 0; n < o->width; n += 16) {
        for (int64_t i = n; i < n + 16; i++) {
            float v = (float)sums[i] * o->scale[i] + o->bias[i];
            if (adds) v += (float)((int32_t)addend[i] - addend_zero) * addend_scale;
            if (is_float) {
                v = v < low ? low : v;
                ((float *)y)[i] = v > high ? high : v;
            } else {
                ((uint8_t *)y)[i] = to_uint8(v * inverse, least, most, zero_point);
            }
        }
    }
}

/* The bounds of an ending with a curve are infinite. */
static void end_curved(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, const uint8_t *addend,
                       void *y) {
    _Alignas(64) float v[64] = {0.0f};
    if (addend) end_sums(e, o, sums, addend, v, true, true);
    else end_sums(e, o, sums, addend, v, false, true);
    bend(v, e->of.curve, e->of.slope);
    for (int64_t i = 0; i < o->width; i++) {
        if (e->of.is_float) ((float *)y)[i] = v[i];
        else ((uint8_t *)y)[i] = to_uint8(v[i] * e->inverse, e->least, e->most, e->of.scale.zero_point);
    }
}

FXQ_INLINE void end_whole_sums(const struct ending *e, const struct outputs_64 *o, const int32_t *sums,
                               const uint8_t *addend, void *y) {
    if (e->of.curve) {
        end_curved(e, o, sums, addend, y);
    } else if (e->of.is_float) {
        if (addend) end_sums(e, o, sums, addend, y, true, true);
        else end_sums(e, o, sums, addend, y, false, true);
    } else if (addend) {
        end_sums(e, o, sums, addend, y, true, false);
    } else {
        end_sums(e, o, sums, addend, y, false, false);
    }
}

/* A pixel's outputs; at: where they begin in the output. */
static inline void end_plainly(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    const uint8_t *addend = e->of.addend ? e->of.addend + at : NULL;
    const size_t size = e->of.is_float ? sizeof(float) : 1;
    char *y = (char *)e->y + (size_t)at * size;
    if (o->count == o->width) {
        end_whole_sums(e, o, sums, addend, y);
        return;
    }
    _Alignas(64) uint8_t padded[64];
    _Alignas(64) float out[64];
    if (addend) memcpy(padded, addend, (size_t)o->count);
    end_whole_sums(e, o, sums, addend ? padded : NULL, out);
    memcpy(y, out, (size_t)o->count * size);
}
