/* AVX512-VNNI: 64 products of uint8 by int8 an instruction (vpdpbusd), added to int32 without saturation. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
#ifdef __clang__
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#else
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif

#define MOST_GEMV_ROWS 6   /* beyond, 16 activations in the lanes beat adding up lanes, even if not all 16 are used */
#define MOST_NIBBLE_ROWS 6 /* beyond, unpacking them is repaid */
#define GROUP_VALUE_BYTES 1
#include "kernels/x86/avx512/common-inl.h"
#include "kernels/x86/avx512/tiled-inl.h"
#include "kernels/x86/avx512/lstm-inl.h"
#include "kernels/x86/avx512/nibbles-inl.h"
#include "kernels/x86/avx512/int16-inl.h"
#include "kernels/x86/avx512/stream-inl.h"
#include "kernels/x86/avx512/groups-inl.h"
#include "kernels/x86/avx512/vnni_groups-inl.h"
#include "kernels/x86/avx512/floats-inl.h"

FXQ_INLINE __m512i broadcast_4(const int8_t *w) {
    int32_t four;
    memcpy(&four, w, sizeof four);
    return _mm512_set1_epi32(four);
}

/* 8 outputs by 32 activations: 16 accumulators, two registers of activations, one of weights. 10 loads for 16 products:
 * the two product units stay busy. Lanes are activations, 4 columns a lane. */
FXQ_INLINE void multiply_8x2(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t *c) {
    __m512i acc[8][2];
    FXQ_FOR(8, int i = 0; i < 8; i++) acc[i][0] = acc[i][1] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 4) {
        const __m512i b0 = _mm512_load_si512(b + 16 * k), b1 = _mm512_load_si512(b + 16 * (depth + k));
        FXQ_FOR(8, int i = 0; i < 8; i++) {
            const __m512i weights = broadcast_4(w + i * stride + k);
            acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], b0, weights);
            acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], b1, weights);
        }
    }
    FXQ_FOR(8, int i = 0; i < 8; i++) {
        _mm512_store_si512(c + 16 * i, acc[i][0]);
        _mm512_store_si512(c + 256 + 16 * i, acc[i][1]);
    }
}

/* 16 outputs by 16 activations: 16 accumulators, one register of activations, the weights broadcast from memory. */
FXQ_INLINE void multiply_16x1(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t *c) {
    __m512i acc[16];
    FXQ_FOR(16, int i = 0; i < 16; i++) acc[i] = _mm512_setzero_si512();
    for (int64_t k = 0; k < depth; k += 4) {
        const __m512i b0 = _mm512_load_si512(b + 16 * k);
        FXQ_FOR(16, int i = 0; i < 16; i++) {
            acc[i] = _mm512_dpbusd_epi32(acc[i], b0, broadcast_4(w + i * stride + k));
        }
    }
    FXQ_FOR(16, int i = 0; i < 16; i++) _mm512_store_si512(c + 16 * i, acc[i]);
}

static void multiply(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int blocks, int tiles,
                     int32_t (*c)[256], struct epilogue *earlier, const int8_t *next) {
    (void)next;
    for (int i = 0; i < tiles; i++) {
        const int8_t *rows = w + 16 * i * stride;
        if (blocks == 2) {
            multiply_8x2(rows, stride, depth, b, c[2 * i]);
            multiply_8x2(rows + 8 * stride, stride, depth, b, c[2 * i] + 128);
        } else {
            multiply_16x1(rows, stride, depth, b, c[2 * i]);
        }
        finish_tiles(earlier, blocks);
    }
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    (uses_gemv(job->x) ? matmul_gemv : matmul_tiled)(job, n0, n1, to, scratch);
}

static void lstm_step(const struct fxq_lstm_step *s) {
    (s->weight->group ? lstm_step_by_groups : lstm_step_by_rows)(s);
}

const struct fxq_kernels fxq_avx512_vnni = {.name = "avx512_vnni",
                                            .value_bytes = 1,
                                            .thresholds = {MOST_GEMV_ROWS, 0, 0},
                                            .quantize = quantize,
                                            .row_sums = row_sums,
                                            .matmul = matmul,
                                            .pack_lstm = pack_lstm,
                                            .lstm_step = lstm_step,
                                            FXQ_NIBBLES,
                                            FXQ_GROUPS,
                                            FXQ_INT16,
                                            FXQ_FLOATS,
                                            FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
