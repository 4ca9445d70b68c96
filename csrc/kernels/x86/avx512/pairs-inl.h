/* How the grouped formats are read: 128 columns to 64 bytes, of a pair of columns each.
 *
 * A block of 3 bits, 8 columns in 3 bytes, becomes a word, whose upper three bytes have their pairs already, in bits
 * 2–4 and 5–7. vpdpbusd puts pair 0 together, out of the pieces in their bits 0 and 1, and adds it to the word as the
 * lowest byte.
 *
 * Expects: common-inl.h. */

enum { PAIR_COLUMNS = 128 };

FXQ_INLINE __m512i dot_bytes(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes)); /* see add_products */
    return sum;
}

FXQ_INLINE __m512i pairs_of_blocks(__m512i bytes) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11);
    const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11));
    const __m512i upper = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, bytes), order);
    const __m512i pieces = _mm512_and_si512(upper, _mm512_set1_epi32(0x03030300));
    return dot_bytes(upper, pieces, _mm512_set1_epi32(0x40100400)); /* 4, 16 and 64 times */
}

/* Which of a step's bytes `columns` more columns of a row have, all or some of PAIR_COLUMNS. */
FXQ_INLINE __mmask64 bytes_of_columns(enum fxq_format format, int64_t columns) {
    return ~0ull >> (64 - fxq_row_bytes(format, columns < PAIR_COLUMNS ? columns : PAIR_COLUMNS));
}

/* What load_pairs() gives of a weight w: (w + offset) << shift, of no sign. */
struct pair_code {
    int offset, shift;
};

FXQ_INLINE struct pair_code pair_code_of(enum fxq_format format) {
    return format == FXQ_INT3 ? (struct pair_code){4, 2} : (struct pair_code){8, 0};
}

FXQ_INLINE void load_pairs(enum fxq_format format, __mmask64 bytes, const uint8_t *from, __m512i *even, __m512i *odd) {
    const __m512i v = _mm512_maskz_loadu_epi8(bytes, from);
    if (format == FXQ_INT3) {
        const __m512i pairs = pairs_of_blocks(v), mask = _mm512_set1_epi8(7 << 2);
        *even = _mm512_and_si512(pairs, mask);
        *odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 3), mask);
    } else {
        const __m512i mask = _mm512_set1_epi8(15);
        *even = _mm512_and_si512(v, mask);
        *odd = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    }
}

/* Pairs as of 4 bits: w + 8 in each nibble. */
FXQ_INLINE __m512i load_nibbles(enum fxq_format format, __mmask64 bytes, const uint8_t *from) {
    const __m512i v = _mm512_maskz_loadu_epi8(bytes, from);
    if (format != FXQ_INT3) return v;
    const __m512i pairs = pairs_of_blocks(v);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi16(pairs, 2), _mm512_set1_epi8(0x07));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 1), _mm512_set1_epi8(0x70));
    return _mm512_add_epi8(_mm512_or_si512(even, odd), _mm512_set1_epi8(0x44));
}
