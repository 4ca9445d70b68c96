/* generic/unpack-inl.h in x86 instructions: compilers do not find the interleaving.
 *
 * Expects: a target with AVX begun. */
#include <immintrin.h>

static void unpack(const struct fxq_weight *weight, int64_t n, int64_t count, int64_t k0, int64_t columns,
                   int8_t *values) {
    const int64_t stride = fxq_row_bytes(weight->format, weight->columns);
    const uint8_t *nibbles = (const uint8_t *)weight->data + n * stride + k0 / 2;
    const __m128i low = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t i = 0; i < count; i++, nibbles += stride, values += columns) {
        int64_t k = 0;
        for (; k + 32 <= columns; k += 32) {
            const __m128i v = _mm_loadu_si128((const __m128i *)(nibbles + k / 2));
            const __m128i even = _mm_sub_epi8(_mm_and_si128(v, low), eight);
            const __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(v, 4), low), eight);
            _mm_storeu_si128((__m128i *)(values + k), _mm_unpacklo_epi8(even, odd));
            _mm_storeu_si128((__m128i *)(values + k + 16), _mm_unpackhi_epi8(even, odd));
        }
        for (; k < columns; k++) values[k] = (int8_t)((nibbles[k / 2] >> k % 2 * 4 & 15) - 8);
    }
}
