/* The machine's limits: integer products out of registers alone, and memory read and written.
 *
 * benchmarks/limits.py compiles this file when it measures; the package has nothing of it. A peak's loop adds to so
 * many sums that no instruction waits for the last one, and it neither loads nor stores. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "runtime/isa.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

/* Makes the compiler believe that a register has changed and that its value is needed: else it would compute equal sums
 * once. It costs no instruction. */
#define CHANGED(constraint, value) __asm__ volatile("" : "+" constraint(value))

/* fxq_peak_NAME(steps) -> multiplications done. In each step `change` of sums[i], for i up to `count`, x being new. */
#define PEAK(name) int64_t fxq_peak_##name(int64_t steps)
#define LOOP(count, constraint, change)                                  \
    FXQ_FOR(16, int i = 0; i < count; i++) CHANGED(constraint, sums[i]); \
    for (int64_t step = 0; step < steps; step++) {                       \
        FXQ_FOR(16, int i = 0; i < count; i++) {                         \
            CHANGED(constraint, x);                                      \
            sums[i] = change;                                            \
        }                                                                \
    }                                                                    \
    FXQ_FOR(16, int i = 0; i < count; i++) CHANGED(constraint, sums[i])

/* fxq_read_NAME(from, bytes, times) -> bytes read. PASS: in each step `change` of all[i]. */
#define READ(name) int64_t fxq_read_##name(const char *from, int64_t bytes, int64_t times)
#define PASS(count, change)                                  \
    for (int64_t pass = 0; pass < times; pass++) {           \
        __asm__ volatile("" : : : "memory");                 \
        for (int64_t at = 0; at < bytes; at += sizeof all) { \
            FXQ_FOR(8, int i = 0; i < count; i++) change;    \
        }                                                    \
    }

#if defined(FXQ_HAS_AVX2)
FXQ_TARGET_BEGIN("avx2")
enum { YMM_SUMS = 12 };

/* Pairs of int16: exact whatever the values are. */
PEAK(madd) {
    __m256i sums[YMM_SUMS] = {_mm256_setzero_si256()}, x = _mm256_set1_epi16(3), w = _mm256_set1_epi16(2);
    LOOP(YMM_SUMS, "x", _mm256_add_epi32(sums[i], _mm256_madd_epi16(x, w)));
    return steps * YMM_SUMS * 16;
}

/* Bytes: pairs are added as int16, with saturation, then pairs of these as int32. */
PEAK(maddubs) {
    __m256i sums[YMM_SUMS] = {_mm256_setzero_si256()}, x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(2);
    const __m256i ones = _mm256_set1_epi16(1);
    LOOP(YMM_SUMS, "x", _mm256_add_epi32(sums[i], _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), ones)));
    return steps * YMM_SUMS * 32;
}

/* Bytes, with nothing but the first half of that, where the pairs may be added as int16. */
PEAK(maddubs_int16) {
    __m256i sums[YMM_SUMS] = {_mm256_setzero_si256()}, x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(2);
    LOOP(YMM_SUMS, "x", _mm256_add_epi16(sums[i], _mm256_maddubs_epi16(x, w)));
    return steps * YMM_SUMS * 32;
}

READ(ymm) {
    __m256i all[8] = {_mm256_setzero_si256()};
    PASS(8, all[i] = _mm256_or_si256(all[i], _mm256_load_si256((const __m256i *)(from + at) + i)));
    FXQ_FOR(8, int i = 0; i < 8; i++) CHANGED("x", all[i]);
    return times * bytes;
}
FXQ_TARGET_END
#endif

#if defined(FXQ_HAS_VNNI_AND_AMX)
FXQ_TARGET_BEGIN("avx2,avxvnni")
PEAK(avx_vnni) {
    __m256i sums[YMM_SUMS] = {_mm256_setzero_si256()}, x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(2);
    LOOP(YMM_SUMS, "x", _mm256_dpbusd_avx_epi32(sums[i], x, w));
    return steps * YMM_SUMS * 32;
}
FXQ_TARGET_END

FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
PEAK(avx512_vnni) {
    enum { SUMS = 16 };
    __m512i sums[SUMS] = {_mm512_setzero_si512()}, x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(2);
    LOOP(SUMS, "v", _mm512_dpbusd_epi32(sums[i], x, w));
    return steps * SUMS * 64;
}

READ(zmm) {
    __m512i all[8] = {_mm512_setzero_si512()};
    PASS(8, all[i] = _mm512_or_si512(all[i], _mm512_load_si512(from + at + 64 * i)));
    FXQ_FOR(8, int i = 0; i < 8; i++) CHANGED("v", all[i]);
    return times * bytes;
}
FXQ_TARGET_END

/* As in csrc/kernels/x86/avx512/amx.c. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} all_tiles = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};

/* Four tiles of sums, two of activations, two of weights. The process must have asked for tiles: fxquant has. */
FXQ_TARGET_BEGIN("amx-tile,amx-int8")
PEAK(amx) {
    _tile_loadconfig(&all_tiles);
    static const uint8_t zeros[1024] __attribute__((aligned(64)));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, zeros, 64);
    _tile_loadd(5, zeros, 64);
    _tile_loadd(6, zeros, 64);
    _tile_loadd(7, zeros, 64);
    for (int64_t step = 0; step < steps; step++) {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
    _tile_release();
    return steps * 4 * 16 * 16 * 64;
}
FXQ_TARGET_END
#endif

#if defined(FXQ_HAS_NEON_DOT)
#if defined(__clang__)
FXQ_TARGET_BEGIN("dotprod")
#else
FXQ_TARGET_BEGIN("arch=armv8.2-a+dotprod")
#endif
PEAK(neon_dot) {
    enum { SUMS = 16 };
    int32x4_t sums[SUMS] = {vdupq_n_s32(0)};
    int8x16_t x = vdupq_n_s8(3), w = vdupq_n_s8(2);
    LOOP(SUMS, "w", vdotq_s32(sums[i], x, w));
    return steps * SUMS * 16;
}
FXQ_TARGET_END
#endif

/* Any processor. */
READ(words) {
    uint64_t all[8] = {0};
    PASS(8, all[i] |= ((const uint64_t *)(const void *)(from + at))[i]);
    FXQ_FOR(8, int i = 0; i < 8; i++) CHANGED("r", all[i]);
    return times * bytes;
}

int64_t fxq_write(char *to, int64_t bytes, int64_t times) {
    for (int64_t pass = 0; pass < times; pass++) {
        memset(to, 1, (size_t)bytes);
        __asm__ volatile("" : : "r"(to) : "memory");
    }
    return times * bytes;
}

/* Asks for large pages, so that a rate is that of the memory and not of the page tables. */
int64_t fxq_use_large_pages(char *from, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    return madvise(from, (size_t)bytes, MADV_HUGEPAGE);
#else
    return from == NULL || bytes == 0;
#endif
}
