/* What the AVX512-VNNI and AMX kernels share; their files include the other parts of this folder after it.
 *
 * Three forms of a product with int8 weights, chosen by the number of rows:
 *
 * gemv (gemv-inl.h), few rows: the weight's rows are read as they lie, 64 columns a register, and multiplied with q's
 * rows (vpdpbusd: 4 products a lane); the 16 lanes of 16 outputs' sums are then added up, all at once. Activations lie
 * row by row, with an extra row for the correction: see row_major-inl.h.
 *
 * Tiled gemm (tiled-inl.h), more tokens, with AMX: C^T = W X^T in tiles of 16 outputs by 16 tokens.
 * Activations lie in blocks of 16 rows, [depth / 4][16][4] bytes, the layout of an AMX "B" tile; the weight is read as
 * it lies, 16 rows by 64 columns an "A" tile. So the weights are never repacked, and the tile is transposed in
 * registers when it is finished.
 *
 * Packed gemm (amx_packed-inl.h, vnni_packed-inl.h), for so many rows that a packed copy of the weights is repaid.
 *
 * Columns beyond the last: q is 0 there, so that a weight's row may be read into the next one. The tensor's end is
 * never passed: see weight_rows().
 *
 * Expects: a target with AVX512 F, BW, VL, DQ and VNNI begun; MOST_GEMV_ROWS(columns), beyond which
 * another form is faster. */
#include <immintrin.h>

#define FXQ_VALUE uint8_t
#define FXQ_OWN_QUANTIZATION
#include "kernels/x86/unpack-inl.h"

enum { MOST_GEMM_COLUMNS = 32768 /* correct() splits the row sums into 16-bit halves */ };

static bool uses_gemv(const struct fxq_activations *x) {
    return fxq_uses(FXQ_GEMV, x->rows <= MOST_GEMV_ROWS(x->columns)) || x->columns > MOST_GEMM_COLUMNS;
}

FXQ_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1u << count) - 1);
}

/* Sixteen registers to one, whose lane n is the sum of the lanes of v[n] (or their least, or their greatest): 15
 * operations and 30 shuffles for all. */
#define FXQ_REDUCE_16(name, type, combine, unpacklo_32, unpackhi_32, unpacklo_64, unpackhi_64, shuffle)        \
    FXQ_INLINE type name##_lanes(type a, type b) { return combine(shuffle(a, b, 0x88), shuffle(a, b, 0xdd)); } \
    FXQ_INLINE type name##_8(const type v[8]) {                                                                \
        type fours[2];                                                                                         \
        FXQ_FOR(2, int i = 0; i < 2; i++) {                                                                    \
            const type a = v[4 * i], b = v[4 * i + 1], c = v[4 * i + 2], d = v[4 * i + 3];                     \
            const type ab = combine(unpacklo_32(a, b), unpackhi_32(a, b)),                                     \
                       cd = combine(unpacklo_32(c, d), unpackhi_32(c, d));                                     \
            fours[i] = combine(unpacklo_64(ab, cd), unpackhi_64(ab, cd));                                      \
        }                                                                                                      \
        return name##_lanes(fours[0], fours[1]);                                                               \
    }                                                                                                          \
    FXQ_INLINE type name(const type v[16]) { return name##_lanes(name##_8(v), name##_8(v + 8)); }
FXQ_INLINE __m512 unpacklo_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FXQ_INLINE __m512 unpackhi_pairs(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
}
FXQ_REDUCE_16(sum_16, __m512i, _mm512_add_epi32, _mm512_unpacklo_epi32, _mm512_unpackhi_epi32, _mm512_unpacklo_epi64,
              _mm512_unpackhi_epi64, _mm512_shuffle_i32x4)
FXQ_REDUCE_16(least_16, __m512, _mm512_min_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, unpacklo_pairs, unpackhi_pairs,
              _mm512_shuffle_f32x4)
FXQ_REDUCE_16(greatest_16, __m512, _mm512_max_ps, _mm512_unpacklo_ps, _mm512_unpackhi_ps, unpacklo_pairs,
              unpackhi_pairs, _mm512_shuffle_f32x4)

FXQ_INLINE void transpose_16x16(__m512i v[16]) {
    __m512i t[16];
    FXQ_FOR(8, int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
    }
    FXQ_FOR(4, int i = 0; i < 4; i++) { /* now v[4i + j] has, in each 128-bit lane l, column 4l + j of 4 rows */
        v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) { /* transpose the 4 x 4 lanes of v[j], v[4 + j], v[8 + j], v[12 + j] */
        const __m512i a = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88), b = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
        const __m512i c = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(b, d, 0xdd);
    }
    FXQ_FOR(16, int i = 0; i < 16; i++) v[i] = t[i];
}

#include "kernels/x86/avx512/activations-inl.h"
#include "kernels/x86/avx512/tables-inl.h"
#include "kernels/x86/avx512/epilogue-inl.h"
#include "kernels/x86/avx512/gemv-inl.h"
