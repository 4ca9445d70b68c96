/* AMX int8: 16 x 16 products of 64 columns an instruction (TDPBSUD: signed weights, unsigned activations). */
#include "runtime/isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
#ifdef __clang__
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,amx-bf16,prfchw")
#else
FXQ_TARGET_BEGIN(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,amx-tile,amx-int8,amx-bf16,prfchw,prefer-vector-width=512")
#endif

#define MOST_GEMV_ROWS(columns) 2 /* beyond, a tile product is faster even with most of its columns empty */
#define MOST_NIBBLE_ROWS 6        /* beyond, unpacking them for the tiles is repaid */
#define GROUP_VALUE_BYTES 2       /* bfloat16: see amx_groups-inl.h */
#include "kernels/x86/avx512/common-inl.h"
#include "kernels/x86/avx512/packing-inl.h"
#include "kernels/x86/avx512/convolution-inl.h"
#include "kernels/x86/avx512/tiled-inl.h"
#include "kernels/x86/avx512/stream-inl.h"
#include "kernels/x86/avx512/amx_packed-inl.h"
#include "kernels/x86/avx512/lstm-inl.h"
#include "kernels/x86/avx512/nibbles-inl.h"
#include "kernels/x86/avx512/low_high-inl.h"
#include "kernels/x86/avx512/groups-inl.h"
#include "kernels/x86/avx512/amx_groups-inl.h"
#include "kernels/x86/avx512/floats-inl.h"

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
    FXQ_FOR(16, int i = 0; i < lines; i++) _mm_prefetch((const char *)from + 64 * i, _MM_HINT_T1);
}

FXQ_INLINE void zero_accumulators(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* To every step-th tile of c. */
FXQ_INLINE void store_accumulators(int32_t (*c)[256], int step) {
    _tile_stored(0, c[0], 64);
    _tile_stored(1, c[step], 64);
    _tile_stored(2, c[2 * step], 64);
    _tile_stored(3, c[3 * step], 64);
}

/* 32 outputs by 32 activations: accumulators 0–3, weights 4 and 5, activations 6 and 7. A product takes 16 cycles and
 * its result 52, so that four accumulators in turn keep the unit busy; each loaded tile is used twice. */
FXQ_INLINE void multiply_2x2(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t (*c)[256],
                             struct epilogue *earlier, int pace, const int8_t *next) {
    const int8_t *w1 = w + 16 * stride;
    const uint8_t *b1 = b + 16 * depth;
    zero_accumulators();
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
    store_accumulators(c, 1);
}

/* 64 outputs by 16 activations: accumulators 0–3, weights 4–6 in turn, activations 7. */
FXQ_INLINE void multiply_4x1(const int8_t *w, int64_t stride, int64_t depth, const uint8_t *b, int32_t (*c)[256],
                             struct epilogue *earlier, int pace, const int8_t *next) {
    const int8_t *w1 = w + 16 * stride, *w2 = w + 32 * stride, *w3 = w + 48 * stride;
    zero_accumulators();
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
    store_accumulators(c, 2);
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

/* 16 rows by the 4 gates of 16 units: accumulators 0–3, activations 4, weights 5–7 in turn. */
FXQ_INLINE void add_units(const int8_t *w, int64_t depth, const uint8_t *q, int64_t k) {
    w += k * UNIT_BLOCK_GATES;
    _tile_loadd(4, q + k, depth);
    _tile_loadd(5, w, 256);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, w + 64, 256);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, w + 128, 256);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, w + 192, 256);
    _tile_dpbusd(3, 4, 5);
}

/* 32 rows by 64 outputs, half of the outputs at a time: accumulators 0–3, activations 4 and 5, weights 6 and 7. */
FXQ_INLINE void multiply_packed_2(const uint8_t *q, int64_t depth, const int8_t *w, int32_t (*c)[PACKED_OUTPUTS],
                                  struct finished_rows *earlier, int pace) {
    const uint8_t *q1 = q + 16 * depth;
    for (int half = 0; half < 2; half++) {
        zero_accumulators();
        for (int64_t k = 0; k < depth; k += 64) {
            const int8_t *weights = w + k * PACKED_OUTPUTS + 128 * half;
            _tile_loadd(6, weights, 4 * PACKED_OUTPUTS);
            _tile_loadd(4, q + k, depth);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(7, weights + 64, 4 * PACKED_OUTPUTS);
            _tile_dpbusd(1, 4, 7);
            _tile_loadd(5, q1 + k, depth);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
            finish_rows(earlier, pace);
        }
        _tile_stored(0, c[0] + 32 * half, 4 * PACKED_OUTPUTS);
        _tile_stored(1, c[0] + 32 * half + 16, 4 * PACKED_OUTPUTS);
        _tile_stored(2, c[16] + 32 * half, 4 * PACKED_OUTPUTS);
        _tile_stored(3, c[16] + 32 * half + 16, 4 * PACKED_OUTPUTS);
    }
}

/* 16 rows by 64 outputs: accumulators 0–3, activations 4, weights 5–7 in turn. */
FXQ_INLINE void multiply_packed_1(const uint8_t *q, int64_t depth, const int8_t *w, int32_t (*c)[PACKED_OUTPUTS],
                                  struct finished_rows *earlier, int pace) {
    zero_accumulators();
    for (int64_t k = 0; k < depth; k += 64) {
        add_units(w, depth, q, k);
        finish_rows(earlier, pace);
    }
    _tile_stored(0, c[0], 4 * PACKED_OUTPUTS);
    _tile_stored(1, c[0] + 16, 4 * PACKED_OUTPUTS);
    _tile_stored(2, c[0] + 32, 4 * PACKED_OUTPUTS);
    _tile_stored(3, c[0] + 48, 4 * PACKED_OUTPUTS);
}

static void multiply_packed(const uint8_t *q, int64_t depth, int blocks, const int8_t *w, int32_t (*c)[PACKED_OUTPUTS],
                            struct finished_rows *earlier) {
    const int64_t steps = depth / 64 ? depth / 64 : 1;
    if (blocks == 2) multiply_packed_2(q, depth, w, c, earlier, (int)((32 + 2 * steps - 1) / (2 * steps)));
    else multiply_packed_1(q, depth, w, c, earlier, (int)((32 + steps - 1) / steps));
}

/* The tiles of a block of units are multiplied between the rows of the block before, whose gates take longer. */
static void step_tiles(const struct fxq_lstm_step *s, int64_t m, int count) {
    const int64_t depth = s->h->depth;
    const uint8_t *q = (const uint8_t *)s->h->packed + m * depth;
    const int8_t *w = (const int8_t *)s->packed + s->u0 * 4 * depth;
    _Alignas(64) int32_t c[2][4][256];
    int parity = 0;
    zero_accumulators();
    for (int64_t k = 0; k < depth; k += 64) add_units(w, depth, q, k);
    store_accumulators(c[parity], 1);
    for (int64_t u = s->u0; u < s->u1; u += UNIT_BLOCK, parity ^= 1) {
        const struct unit_block b = begin_units(s, u);
        const bool has_next = u + UNIT_BLOCK < s->u1;
        int64_t k = 0;
        w += 4 * UNIT_BLOCK * depth;
        if (has_next) zero_accumulators();
        for (int i = 0; i < count; i += 2) {
            const int64_t due = has_next ? depth * (i + 2) / count : 0;
            for (; k < due && k < depth; k += 64) add_units(w, depth, q, k);
            struct unit_row rows[2] = {{.block = &b, .m = m + i}, {.block = &b, .m = m + i + 1}};
            FXQ_FOR(8, int j = 0; j < 8; j++) {
                rows[j / 4].sums[j % 4] = _mm512_load_si512(c[parity][j % 4] + 16 * (i + j / 4));
            }
            if (i + 1 < count) finish_states(s, rows, 2);
            else finish_states(s, rows, 1);
        }
        if (has_next) store_accumulators(c[parity ^ 1], 1);
    }
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    if (job->x->is_row_major) matmul_packed(job, n0, n1, to, scratch);
    else (uses_gemv(job->x) ? matmul_gemv : matmul_tiled)(job, n0, n1, to, scratch);
}

enum { MOST_ROWS_WITHOUT_TILES = 4 }; /* a register of weights serves four rows; loading tiles takes longer than that */

static void lstm_step(const struct fxq_lstm_step *s) {
    if (s->weight->group) {
        lstm_step_by_groups(s);
        return;
    }
    if (s->h->rows <= MOST_ROWS_WITHOUT_TILES) {
        lstm_step_by_rows(s);
        return;
    }
    for (int64_t m = 0; m < s->h->rows; m += 16) step_tiles(s, m, (int)(s->h->rows - m < 16 ? s->h->rows - m : 16));
    finish_hidden(s);
}

const struct fxq_kernels fxq_amx = {.name = "amx",
                                    .value_bytes = 1,
                                    .thresholds = {MOST_GEMV_ROWS(0), UNSTREAMED_ROWS, STREAMED_ROWS},
                                    .begin = begin,
                                    .end = end,
                                    .quantize = quantize,
                                    .row_sums = row_sums,
                                    .matmul = matmul,
                                    .packs_weight = packs_weight,
                                    .pack_lstm = pack_lstm,
                                    .lstm_step = lstm_step,
                                    FXQ_NIBBLES,
                                    FXQ_GROUPS,
                                    FXQ_INT16,
                                    FXQ_FLOATS,
                                    FXQ_STATIC,
                                    FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
