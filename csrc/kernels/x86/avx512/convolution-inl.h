/* The products of convolutions in vpdpbusd: tiles of up to 6 pixels by 16 to 64 outputs, and depthwise ones.
 *
 * Expects: common-inl.h, packing-inl.h. */
#define CONV_VALUE uint8_t
#define FXQ_PAIRS
#include "kernels/generic/windows-inl.h"
#include "kernels/generic/ending-inl.h"
#include "kernels/generic/values-inl.h"
#include "kernels/x86/avx512/exponentials-inl.h"
#include "kernels/x86/avx512/ending-inl.h"
#include "kernels/generic/depthwise-inl.h"
enum { TILE_PIXELS = 6, REGISTERS_TOGETHER = 1 };
#include "kernels/generic/convolution-inl.h"

FXQ_INLINE void pack_runs(const int8_t *rows, int64_t stride, int64_t count, int64_t columns, int8_t *packed,
                          int64_t step, int32_t *sums) {
    __m512i sum = _mm512_load_si512(sums);
    for (int64_t k = 0; k < columns; k += 32) {
        __m512i v[8];
        if (count >= 16 && columns - k >= 32) load_rows(rows + k, stride, v);
        else load_some_rows(rows + k, stride, count, columns - k, v);
        transpose_rows(v);
        const int64_t words = columns - k >= 32 ? 8 : (columns - k + 3) / 4;
        for (int64_t i = 0; i < words; i++, packed += step) _mm512_store_si512(packed, v[i]);
        FXQ_FOR(8, int i = 0; i < 8; i++) sum = sum_columns(sum, v[i]);
    }
    _mm512_store_si512(sums, sum);
}

/* count, registers, even: constants wherever this is inlined. */
FXQ_INLINE void multiply_pixels_by(const struct tile *tile, int count, int registers, bool even, int64_t at) {
    const struct windows *v = tile->windows;
    const struct outputs_64 *o = tile->outputs;
    const int64_t run = v->run, step = tile->step;
    const int8_t *w = tile->weights, *soon = tile->soon;
    __m512i acc[TILE_PIXELS][4];
    FXQ_FOR(24, int i = 0; i < 4 * count; i++) acc[i / 4][i % 4] = _mm512_load_si512(o->start + 16 * (i % 4));
    for (int64_t t = 0; t < v->taps; t++) {
        const uint8_t *q[TILE_PIXELS];
        FXQ_FOR(6, int i = 0; i < count; i++) q[i] = v->at[t] + tile->offsets[even ? 0 : i];
        for (int64_t k = 0; k < run; k += 4, w += 64 * registers, soon += tile->soon_step) {
            __m512i weights[4];
            _mm_prefetch((const char *)soon, _MM_HINT_T1);
            FXQ_FOR(4, int j = 0; j < registers; j++) weights[j] = _mm512_load_si512(w + 64 * j);
            FXQ_FOR(6, int i = 0; i < count; i++) {
                int32_t four;
                memcpy(&four, even ? q[0] + i * step + k : q[i] + k, sizeof four);
                const __m512i a = _mm512_set1_epi32(four);
                FXQ_FOR(4, int j = 0; j < registers; j++) {
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc[i][j]) : "v"(a), "v"(weights[j])); /* as add_products */
                }
            }
        }
    }
    if (registers == 4 && o->count == 64 && is_near(tile->ending, o)) {
        end_near(tile->ending, o, acc, count, at, tile->row);
        return;
    }
    _Alignas(64) int32_t sums[TILE_PIXELS][BLOCK_OUTPUTS];
    FXQ_FOR(6, int i = 0; i < count; i++) {
        FXQ_FOR(4, int j = 0; j < registers; j++) _mm512_store_si512(sums[i] + 16 * j, acc[i][j]);
    }
    end_pixels(tile, count, sums, at);
}

#define FXQ_PIXELS(registers, even, name)                                            \
    static void name##_##registers(const struct tile *tile, int count, int64_t at) { \
        switch (count) {                                                             \
            case 6: multiply_pixels_by(tile, 6, registers, even, at); break;         \
            case 5: multiply_pixels_by(tile, 5, registers, even, at); break;         \
            case 4: multiply_pixels_by(tile, 4, registers, even, at); break;         \
            case 3: multiply_pixels_by(tile, 3, registers, even, at); break;         \
            case 2: multiply_pixels_by(tile, 2, registers, even, at); break;         \
            default: multiply_pixels_by(tile, 1, registers, even, at);               \
        }                                                                            \
    }
FXQ_PIXELS(1, true, even_pixels)
FXQ_PIXELS(2, true, even_pixels)
FXQ_PIXELS(3, true, even_pixels)
FXQ_PIXELS(4, true, even_pixels)
FXQ_PIXELS(1, false, any_pixels)
FXQ_PIXELS(2, false, any_pixels)
FXQ_PIXELS(3, false, any_pixels)
FXQ_PIXELS(4, false, any_pixels)

static void multiply_pixels(const struct tile *tile, int count, int registers, int64_t at) {
    switch (registers) {
        case 4: (tile->step ? even_pixels_4 : any_pixels_4)(tile, count, at); break;
        case 3: (tile->step ? even_pixels_3 : any_pixels_3)(tile, count, at); break;
        case 2: (tile->step ? even_pixels_2 : any_pixels_2)(tile, count, at); break;
        default: (tile->step ? even_pixels_1 : any_pixels_1)(tile, count, at);
    }
}

/* Depthwise: four taps' bytes of 64 channels are interleaved in each 128 bits, so that a lane has four of one channel:
 * 4 channels of each quarter a register. Once bytes again, their words are the transpose of what they should be. */
FXQ_INLINE int channel_at(int i) { return i / 4 % 4 * 16 + i / 16 * 4 + i % 4; }

FXQ_INLINE int64_t packed_taps(int64_t taps) { return (taps + 3) / 4 * 4; }

FXQ_INLINE void interleave_4(__m512i v[4]) {
    const __m512i a = _mm512_unpacklo_epi8(v[0], v[1]), b = _mm512_unpackhi_epi8(v[0], v[1]),
                  c = _mm512_unpacklo_epi8(v[2], v[3]), d = _mm512_unpackhi_epi8(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi16(a, c);
    v[1] = _mm512_unpackhi_epi16(a, c);
    v[2] = _mm512_unpacklo_epi16(b, d);
    v[3] = _mm512_unpackhi_epi16(b, d);
}

static void pack_channels(const int8_t *weights, int64_t taps, int8_t *packed, int32_t *sums) {
    __m512i sum[4];
    FXQ_FOR(4, int j = 0; j < 4; j++) sum[j] = _mm512_setzero_si512();
    for (int64_t t = 0; t < taps; t += 4, packed += 256) {
        __m512i v[4];
        FXQ_FOR(4, int j = 0; j < 4; j++) {
            v[j] = t + j < taps ? _mm512_loadu_si512(weights + (t + j) * CHANNELS) : _mm512_setzero_si512();
        }
        interleave_4(v);
        FXQ_FOR(4, int j = 0; j < 4; j++) {
            _mm512_storeu_si512(packed + 64 * j, v[j]);
            sum[j] = sum_columns(sum[j], v[j]);
        }
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) _mm512_storeu_si512(sums + 16 * j, sum[j]);
}

/* 64 values of a tap: of a pixel, or 32 of each of two. */
FXQ_INLINE __m512i load_tap(const uint8_t *at, const int64_t *offsets, bool is_pair) {
    if (!is_pair) return _mm512_loadu_si512(at + offsets[0]);
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(at + offsets[0])));
    return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i *)(at + offsets[1])), 1);
}

/* The sums of 64 channels. is_pair: a constant wherever this is inlined. */
FXQ_INLINE void add_channels(const struct windows *v, const struct channel_block *block, const int64_t *offsets,
                             bool is_pair, __m512i sums[4]) {
    const uint8_t *const *at = v->at;
    const int8_t *packed = block->packed;
    int64_t t = 0;
    FXQ_FOR(4, int j = 0; j < 4; j++) sums[j] = _mm512_load_si512(block->outputs.start + 16 * j);
    for (; t + 4 <= v->taps; t += 4, packed += 256) {
        __m512i x[4];
        FXQ_FOR(4, int j = 0; j < 4; j++) x[j] = load_tap(at[t + j], offsets, is_pair);
        interleave_4(x);
        FXQ_FOR(4, int j = 0; j < 4; j++)
            sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], _mm512_loadu_si512(packed + 64 * j));
    }
    if (t == v->taps) return;
    const __m512i zero = _mm512_setzero_si512();
    __m512i x[4] = {load_tap(at[t], offsets, is_pair), zero, zero, zero};
    if (t + 1 < v->taps) x[1] = load_tap(at[t + 1], offsets, is_pair);
    if (t + 2 < v->taps) x[2] = load_tap(at[t + 2], offsets, is_pair);
    interleave_4(x);
    FXQ_FOR(4, int j = 0; j < 4; j++) sums[j] = _mm512_dpbusd_epi32(sums[j], x[j], _mm512_loadu_si512(packed + 64 * j));
}

static void convolve_pair(const struct windows *v, const struct ending *e, const struct channel_block *block,
                          const int64_t offsets[2], const int64_t at[2]) {
    const struct outputs_64 *o = &block->outputs;
    const __mmask32 lanes = o->count == 32 ? ~(__mmask32)0 : ((__mmask32)1 << o->count) - 1;
    const uint8_t *from = e->of.addend;
    __m512i q[4], sums[4], addend[4] = {_mm512_setzero_si512()};
    add_channels(v, block, offsets, true, sums);
    if (from) {
        const __m512i first = _mm512_castsi256_si512(_mm256_maskz_loadu_epi8(lanes, from + at[0]));
        unpack_bytes(_mm512_inserti64x4(first, _mm256_maskz_loadu_epi8(lanes, from + at[1]), 1), addend);
    }
    end_registers(e, o, sums, addend, from != NULL, 64, q);
    const __m512i bytes = pack_bytes(q);
    _mm256_mask_storeu_epi8((uint8_t *)e->y + at[0], lanes, _mm512_castsi512_si256(bytes));
    _mm256_mask_storeu_epi8((uint8_t *)e->y + at[1], lanes, _mm512_extracti64x4_epi64(bytes, 1));
}

static void end_floats(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    _Alignas(64) float floats[CHANNELS];
    _Alignas(64) uint8_t plain[CHANNELS] = {0}, addend[CHANNELS];
    if (e->of.addend) memcpy(plain, e->of.addend + at, (size_t)o->count);
    for (int i = 0; i < CHANNELS; i++) addend[i] = plain[channel_at(i)];
    end_whole_sums(e, o, sums, e->of.addend ? addend : NULL, floats);
    for (int i = 0; i < CHANNELS; i++) {
        if (channel_at(i) < o->count) ((float *)e->y)[at + channel_at(i)] = floats[i];
    }
}

static void convolve_pixel(const struct windows *v, const struct ending *e, const struct channel_block *block,
                           int64_t offset, int64_t at) {
    const struct outputs_64 *o = &block->outputs;
    __m512i sums[4];
    add_channels(v, block, &offset, false, sums);
    if (!e->of.is_float) {
        end_bytes(e, o, sums, at, false);
        return;
    }
    _Alignas(64) int32_t stored[CHANNELS];
    FXQ_FOR(4, int j = 0; j < 4; j++) _mm512_store_si512(stored + 16 * j, sums[j]);
    end_floats(e, o, stored, at);
}

FXQ_INLINE void end_pixel(const struct ending *e, const struct outputs_64 *o, const int32_t *sums, int64_t at) {
    __m512i registers[4];
    if (e->of.is_float) {
        end_reals(e, o, sums, at);
        return;
    }
    FXQ_FOR(4, int j = 0; j < 4; j++) registers[j] = _mm512_load_si512(sums + 16 * j);
    end_bytes(e, o, registers, at, true);
}
