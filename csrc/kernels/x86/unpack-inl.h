/* generic/unpack-inl.h in x86 instructions: compilers do not find the interleaving.
 *
 * Expects: a target with AVX begun. */
#include <immintrin.h>
#include <string.h>

FXQ_INLINE __m128i at_bits(__m128i v, int first, __m128i mask) { return _mm_and_si128(_mm_srli_epi16(v, first), mask); }

FXQ_INLINE void unpack_int4_32(const uint8_t *from, int8_t *values) {
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    const __m128i v = _mm_loadu_si128((const __m128i *)from);
    const __m128i even = _mm_sub_epi8(at_bits(v, 0, low), eight), odd = _mm_sub_epi8(at_bits(v, 4, low), eight);
    _mm_storeu_si128((__m128i *)values, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i *)(values + 16), _mm_unpackhi_epi8(even, odd));
}

/* As pairs_of_blocks() in avx512/pairs-inl.h. */
FXQ_INLINE void unpack_int3_32(const uint8_t *from, int8_t *values) {
    const __m128i order = _mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11);
    const __m128i low = _mm_set1_epi8(7), four = _mm_set1_epi8(4);
    int32_t end;
    memcpy(&end, from + 8, sizeof end);
    const __m128i bytes = _mm_insert_epi32(_mm_loadl_epi64((const __m128i *)from), end, 2);
    const __m128i upper = _mm_shuffle_epi8(bytes, order), pieces = _mm_and_si128(upper, _mm_set1_epi32(0x03030300));
    const __m128i halves = _mm_maddubs_epi16(pieces, _mm_set1_epi32(0x40100400));
    const __m128i pairs = _mm_add_epi32(upper, _mm_madd_epi16(halves, _mm_set1_epi16(1)));
    const __m128i even = _mm_sub_epi8(at_bits(pairs, 2, low), four), odd = _mm_sub_epi8(at_bits(pairs, 5, low), four);
    _mm_storeu_si128((__m128i *)values, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i *)(values + 16), _mm_unpackhi_epi8(even, odd));
}

static int64_t unpack_first(enum fxq_format format, const uint8_t *from, int64_t columns, int8_t *values) {
    const int64_t end = columns / 32 * 32;
    for (int64_t k = 0; k < end; k += 32) {
        if (format == FXQ_INT3) unpack_int3_32(from + k / 8 * 3, values + k);
        else unpack_int4_32(from + k / 2, values + k);
    }
    return end;
}
#define FXQ_UNPACK_FIRST unpack_first
#include "kernels/generic/unpack-inl.h"
