/* Static quantization's operators on single values and on pools' windows: plain C, vectorized by the compiler.
 *
 * Expects: ending-inl.h. */
#define FXQ_VALUES                                                                                                  \
    .quantize_value = quantize_value, .dequantize_value = dequantize_value, .look_up = look_up, .combine = combine, \
    .pool_pixels = pool_pixels

enum { POOLED = 64 }; /* channels at a time */

static void quantize_value(const float *restrict x, int64_t count, struct fxq_scale scale, int qmax,
                           uint8_t *restrict q) {
    const float inverse = 1.0f / scale.scale, least = (float)-scale.zero_point, most = (float)(qmax - scale.zero_point);
    for (int64_t i = 0; i < count; i++) q[i] = to_uint8(x[i] * inverse, least, most, scale.zero_point);
}

FXQ_INLINE float real_of(uint8_t q, struct fxq_scale scale) {
    return (float)((int32_t)q - scale.zero_point) * scale.scale;
}

static void dequantize_value(const uint8_t *restrict q, int64_t count, struct fxq_scale scale, float *restrict x) {
    for (int64_t i = 0; i < count; i++) x[i] = real_of(q[i], scale);
}

static void look_up(const uint8_t *restrict q, int64_t count, const uint8_t *restrict table, uint8_t *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = table[q[i]];
}

/* multiplies: a constant wherever this is inlined. */
FXQ_INLINE void combine_as(const struct fxq_pair *c, const uint8_t *restrict a, const uint8_t *restrict b,
                           int64_t count, uint8_t *restrict out, bool multiplies) {
    const float inverse = 1.0f / c->scale.scale, least = least_of(c->scale, inverse, c->low),
                most = most_of(c->scale, inverse, c->high, c->qmax);
    const struct fxq_scale of_a = c->a_scale;
    const struct fxq_scale of_b = {c->subtracts ? -c->b_scale.scale : c->b_scale.scale, c->b_scale.zero_point};
    const int32_t zero_point = c->scale.zero_point;
    for (int64_t i = 0; i < count; i++) {
        const float x = real_of(a[i], of_a), y = real_of(b[i], of_b);
        out[i] = to_uint8((multiplies ? x * y : x + y) * inverse, least, most, zero_point);
    }
}

/* `count` values of a and b. */
static void combine(const struct fxq_pair *c, const uint8_t *a, const uint8_t *b, int64_t count, uint8_t *out) {
    if (c->multiplies) combine_as(c, a, b, count, out, true);
    else combine_as(c, a, b, count, out, false);
}

/* A window in one dimension: its places [first, last), `apart` from each other, that are in the input; and how many
 * count. */
struct span {
    int64_t first, last, apart, counted;
};

static struct span span_of(const struct fxq_pool *c, int i, int64_t out) {
    const int64_t apart = c->dilation[i], begin = out * c->stride[i] - c->before[i];
    const int64_t padded = c->in[i] + c->before[i], size = c->in[i];
    int64_t first = begin, last = begin + (c->kernel[i] - 1) * apart + 1;
    const int64_t counted = (last < padded ? last : padded) - begin;
    if (first < 0) first += (-first + apart - 1) / apart * apart;
    if (last > size) last = size;
    return (struct span){first, last, apart, c->counts_padding ? counted : last - first};
}

FXQ_INLINE void greatest_of(const uint8_t *restrict x, int64_t count, uint8_t *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = x[i] > out[i] ? x[i] : out[i];
}

FXQ_INLINE void add_bytes(const uint8_t *restrict x, int64_t count, int32_t *restrict sums) {
    for (int64_t i = 0; i < count; i++) sums[i] += x[i];
}

/* Averages of `real` values each, as values. */
static void end_averages(const struct fxq_pool *c, const int32_t *sums, int64_t count, int64_t real, int64_t divisor,
                         uint8_t *out) {
    const float inverse = 1.0f / c->scale.scale, least = (float)-c->scale.zero_point,
                most = (float)(c->qmax - c->scale.zero_point), scale = c->x_scale.scale;
    const int32_t zero = (int32_t)(real * c->x_scale.zero_point), zero_point = c->scale.zero_point;
    for (int64_t i = 0; i < count; i++) {
        const float y = (float)((double)(sums[i] - zero) / (double)divisor) * scale;
        out[i] = to_uint8(y * inverse, least, most, zero_point);
    }
}

/* Channels [n, n + count) of a window in an image x. */
static void pool_channels(const struct fxq_pool *c, const uint8_t *x, const struct span s[FXQ_SPACE], int64_t count,
                          uint8_t *out) {
    int32_t sums[POOLED] = {0};
    uint8_t greatest[POOLED] = {0};
    int64_t real = 0;
    for (int64_t d = s[0].first; d < s[0].last; d += s[0].apart) {
        for (int64_t h = s[1].first; h < s[1].last; h += s[1].apart) {
            for (int64_t w = s[2].first; w < s[2].last; w += s[2].apart, real++) {
                const uint8_t *from = x + ((d * c->in[1] + h) * c->in[2] + w) * c->channels;
                if (count == POOLED) {
                    if (c->is_average) add_bytes(from, POOLED, sums);
                    else greatest_of(from, POOLED, greatest);
                } else {
                    if (c->is_average) add_bytes(from, count, sums);
                    else greatest_of(from, count, greatest);
                }
            }
        }
    }
    const int64_t counted = s[0].counted * s[1].counted * s[2].counted;
    if (c->is_average) end_averages(c, sums, count, real, c->divisor ? c->divisor : counted, out);
    else memcpy(out, greatest, (size_t)count);
}

/* Output pixels [p0, p1). */
static void pool_pixels(const struct fxq_pool *c, int64_t p0, int64_t p1) {
    const int64_t pixels = c->in[0] * c->in[1] * c->in[2];
    for (int64_t p = p0; p < p1; p++) {
        const int64_t row = p / c->out[2], plane = row / c->out[1], image = plane / c->out[0];
        const struct span spans[FXQ_SPACE] = {span_of(c, 0, plane % c->out[0]), span_of(c, 1, row % c->out[1]),
                                              span_of(c, 2, p % c->out[2])};
        for (int64_t n = 0; n < c->channels; n += POOLED) {
            const int64_t count = c->channels - n < POOLED ? c->channels - n : POOLED;
            pool_channels(c, c->x + image * pixels * c->channels + n, spans, count, c->y + p * c->channels + n);
        }
    }
}
