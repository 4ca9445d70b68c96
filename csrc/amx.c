/* AMX int8: 16 x 16 products of 64 columns an instruction (TDPBSUD: signed weights, unsigned activations). */
#include "isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
#ifdef __clang__
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,prfchw")
#else
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,prfchw,prefer-vector-width=512")
#endif

#define DOT_FORM_ROWS 2 /* beyond, a tile product is faster even with most of its columns empty */
#include "avx512.h"
#include "avx512_blocks.h"

/* All eight tiles are 16 rows of 64 bytes; a thread sets them once a job. Constant data, not a local variable: gcc 12
 * thinks that _tile_loadconfig reads 8 bytes, and would leave the others unwritten. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} all_tiles = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin(void) { _tile_loadconfig(&all_tiles); }

static void end(void) { _tile_release(); }

/* The weights of the block after this one, which lie right behind it: the tiles' strided loads alone would each wait
 * for the L3 cache. A step of 64 columns fetches as many lines as it uses. */
FXQ_INLINE void fetch_rows(const int8_t *from, int lines) {
    FXQ_UNROLL(16) for (int i = 0; i < lines; i++) _mm_prefetch((const char *)from + 64 * i, _MM_HINT_T1);
}

/* 32 outputs by 32 activations: accumulators 0–3, weights 4 and 5, activations 6 and 7. A product takes 16 cycles and
 * its result 52, so that four accumulators in turn keep the unit busy; each loaded tile is used twice. */
FXQ_INLINE void multiply_2x2(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t (*c)[256],
                             struct epilogue *earlier, int pace, const int8_t *next) {
    const int8_t *w1 = w + 16 * stride;
    const uint8_t *b1 = b + 16 * depth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
        _tile_loadd(4, w + k, stride);
        _tile_loadd(6, b + 16 * k, 64);
        _tile_dpbsud(0, 4, 6);
        _tile_loadd(7, b1 + 16 * k, 64);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(5, w1 + k, stride);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        if (next) fetch_rows(next + 32 * k, 32);
        finish_tiles(earlier, pace);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[1], 64);
    _tile_stored(2, c[2], 64);
    _tile_stored(3, c[3], 64);
}

/* 64 outputs by 16 activations: accumulators 0–3, weights 4–6 in turn, activations 7. */
FXQ_INLINE void multiply_4x1(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t (*c)[256],
                             struct epilogue *earlier, int pace, const int8_t *next) {
    const int8_t *w1 = w + 16 * stride, *w2 = w + 32 * stride, *w3 = w + 48 * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += 64) {
        _tile_loadd(7, b + 16 * k, 64);
        _tile_loadd(4, w + k, stride);
        _tile_dpbsud(0, 4, 7);
        _tile_loadd(5, w1 + k, stride);
        _tile_dpbsud(1, 5, 7);
        _tile_loadd(6, w2 + k, stride);
        _tile_dpbsud(2, 6, 7);
        _tile_loadd(4, w3 + k, stride);
        _tile_dpbsud(3, 4, 7);
        if (next) fetch_rows(next + 64 * k, 64);
        finish_tiles(earlier, pace);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[2], 64);
    _tile_stored(2, c[4], 64);
    _tile_stored(3, c[6], 64);
}

/* 32 outputs by 16 activations: accumulators 0 and 1, weights 4 and 5, activations 7. */
FXQ_INLINE void multiply_2x1(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t (*c)[256],
                             struct epilogue *earlier, int pace, const int8_t *next) {
    const int8_t *w1 = w + 16 * stride;
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t k = 0; k < depth; k += 64) {
        _tile_loadd(7, b + 16 * k, 64);
        _tile_loadd(4, w + k, stride);
        _tile_dpbsud(0, 4, 7);
        _tile_loadd(5, w1 + k, stride);
        _tile_dpbsud(1, 5, 7);
        if (next) fetch_rows(next + 32 * k, 32);
        finish_tiles(earlier, pace);
    }
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[2], 64);
}

static void multiply(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int blocks, int tiles,
                     int32_t (*c)[256], struct epilogue *earlier, const int8_t *next) {
    const int64_t steps = depth / 64 ? depth / 64 : 1;
    if (blocks == 2) {
        const int pace = (int)((8 + 2 * steps - 1) / (2 * steps));
        multiply_2x2(w, stride, depth, b, c, earlier, pace, next);
        if (tiles <= 2) return;
        if (next) next += 32 * stride;
        multiply_2x2(w + 32 * stride, stride, depth, b, c + 4, earlier, pace, next);
    } else if (tiles > 2) {
        multiply_4x1(w, stride, depth, b, c, earlier, (int)((4 + steps - 1) / steps), next);
    } else {
        multiply_2x1(w, stride, depth, b, c, earlier, (int)((4 + steps - 1) / steps), next);
    }
}

const struct fxq_kernels fxq_amx = {.name = "amx", .value_bytes = 1, .begin = begin, .end = end, .quantize = quantize,
                                    .row_sums = row_sums, .matmul = matmul, FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
