/* The registers of floats-inl.h in NEON: four for sixteen lanes. 24 of 32 hold the sums of 3 rows by 2 outputs.
 * Expects: what floats-inl.h does. */
#define FXQ_REALS struct reals
#define FXQ_REAL_ROWS 3
#define FXQ_REAL_OUTPUTS 2
#define FXQ_ROW_OUTPUTS 4
#define FXQ_TILE_ROWS 5
#define FXQ_TILE_REALS 1

struct reals {
    float32x4_t part[4];
};

FXQ_INLINE struct reals no_reals(void) {
    const float32x4_t zero = vdupq_n_f32(0.0f);
    return (struct reals){{zero, zero, zero, zero}};
}

FXQ_INLINE struct reals load_reals(const float *p) {
    return (struct reals){{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}};
}

FXQ_INLINE float32x4_t load_4_halves(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

FXQ_INLINE struct reals load_halves(const uint16_t *p) {
    return (struct reals){{load_4_halves(p), load_4_halves(p + 4), load_4_halves(p + 8), load_4_halves(p + 12)}};
}

FXQ_INLINE void store_reals(float *p, struct reals v) {
    FXQ_FOR(4, int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, v.part[i]);
}

FXQ_INLINE struct reals spread(float x) {
    const float32x4_t all = vdupq_n_f32(x);
    return (struct reals){{all, all, all, all}};
}

FXQ_INLINE struct reals plus(struct reals a, struct reals b) {
    FXQ_FOR(4, int i = 0; i < 4; i++) a.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return a;
}

FXQ_INLINE struct reals times(struct reals a, struct reals b) {
    FXQ_FOR(4, int i = 0; i < 4; i++) a.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return a;
}

FXQ_INLINE struct reals greater(struct reals a, struct reals b) {
    FXQ_FOR(4, int i = 0; i < 4; i++) a.part[i] = vbslq_f32(vcgtq_f32(a.part[i], b.part[i]), a.part[i], b.part[i]);
    return a;
}

FXQ_INLINE struct reals powers(struct reals shifted) {
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        const uint32x4_t n = vshlq_n_u32(vreinterpretq_u32_f32(shifted.part[i]), 23);
        shifted.part[i] = vreinterpretq_f32_u32(vaddq_u32(n, vdupq_n_u32(0x3f800000)));
    }
    return shifted;
}

FXQ_INLINE struct reals keep_from(struct reals x, float limit, struct reals y) {
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        y.part[i] = vbslq_f32(vcltq_f32(x.part[i], vdupq_n_f32(limit)), vdupq_n_f32(0.0f), y.part[i]);
    }
    return y;
}

FXQ_INLINE struct reals fuse(struct reals a, struct reals b, struct reals sum) {
    FXQ_FOR(4, int i = 0; i < 4; i++) sum.part[i] = vfmaq_f32(sum.part[i], a.part[i], b.part[i]);
    return sum;
}

FXQ_INLINE float32x2_t sum_halves(float32x4_t v) { return vadd_f32(vget_low_f32(v), vget_high_f32(v)); }

FXQ_INLINE void sum_4_reals(const struct reals v[4], float *sums) {
    FXQ_FOR(4, int i = 0; i < 4; i++) {
        const float32x4_t *part = v[i].part;
        const float32x4_t fours = vcombine_f32(vpadd_f32(sum_halves(part[0]), sum_halves(part[1])),
                                               vpadd_f32(sum_halves(part[2]), sum_halves(part[3])));
        const float32x2_t two = sum_halves(fours);
        sums[i] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
}

#include "kernels/generic/floats-inl.h"
