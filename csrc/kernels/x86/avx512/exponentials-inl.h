/* Exponentials of 16 values, several registers side by side.
 *
 * Expects: common-inl.h. */

/* gcc puts an operation next to the one that needs it; this keeps operations where they are written. */
FXQ_INLINE __m512 in_order(__m512 x) {
    __asm__("" : "+v"(x));
    return x;
}

/* count x exp(x) - 1, as exp_minus_1 in elementwise-inl.h, to the bit: the fused multiply-adds here have exact
 * products. An operation takes 4 cycles and two begin in each, so that 8 values side by side keep both units busy;
 * fewer can be given part by part between other instructions. */
struct exponentials {
    __m512 x[8], shifted[8], n[8], p[8];
};
enum { EXP_PARTS = 8 };

#define EACH FXQ_FOR(8, int i = 0; i < count; i++)
FXQ_INLINE void exp_minus_1_part(struct exponentials *e, int count, int part) {
    __m512 *x = e->x, *shifted = e->shifted, *n = e->n, *p = e->p;
    switch (part) {
        case 0:
            EACH x[i] = _mm512_max_ps(_mm512_set1_ps(-43.0f), x[i]); /* the second operand where one is NaN */
            EACH x[i] = _mm512_min_ps(_mm512_set1_ps(43.0f), x[i]);
            EACH shifted[i] = _mm512_mul_ps(x[i], _mm512_set1_ps(1.4426950408889634f));
            break;
        case 1:
            EACH shifted[i] = in_order(_mm512_add_ps(shifted[i], _mm512_set1_ps(ROUND)));
            EACH n[i] = in_order(_mm512_sub_ps(shifted[i], _mm512_set1_ps(ROUND)));
            EACH x[i] = in_order(_mm512_fnmadd_ps(n[i], _mm512_set1_ps(0.693359375f), x[i])); /* exact: 10 bits by 7 */
            break;
        case 2:
            EACH n[i] = in_order(_mm512_mul_ps(n[i], _mm512_set1_ps(-2.1219444e-4f)));
            EACH x[i] = in_order(_mm512_sub_ps(x[i], n[i]));
            EACH p[i] = in_order(_mm512_mul_ps(x[i], _mm512_set1_ps((float)(1.0 / 5040))));
            break;
        case 3:
            EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 720))));
            EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
            EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 120))));
            break;
        case 4:
            EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
            EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 24))));
            EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
            break;
        case 5:
            EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps((float)(1.0 / 6))));
            EACH p[i] = in_order(_mm512_mul_ps(p[i], x[i]));
            EACH p[i] = in_order(_mm512_add_ps(p[i], _mm512_set1_ps(0.5f)));
            break;
        case 6:
            EACH n[i] = in_order(_mm512_mul_ps(x[i], x[i]));
            EACH p[i] = in_order(_mm512_mul_ps(p[i], n[i]));
            EACH p[i] = in_order(_mm512_add_ps(p[i], x[i]));
            break;
        case 7:
            EACH {
                const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted[i]), 23);
                const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f800000)));
                /* exact: by a power of two */
                x[i] = _mm512_fmadd_ps(p[i], power, _mm512_sub_ps(power, _mm512_set1_ps(1.0f)));
            }
            break;
    }
}

FXQ_INLINE void exp_minus_1_of(struct exponentials *e, int count) {
    FXQ_FOR(8, int part = 0; part < EXP_PARTS; part++) exp_minus_1_part(e, count, part);
}
