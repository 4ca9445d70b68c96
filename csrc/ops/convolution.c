/* Static convolutions, and linears as convolutions of one place: pixels and outputs shared among threads. */
#include "kernels.h"
#include "runtime/pool.h"

struct job {
    const struct fxq_convolution *call;
    int64_t pixels, pixel_parts, output_parts;
    char *scratch;
    int64_t scratch_bytes; /* a thread */
};

static void convolve(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    void *scratch = job->scratch + thread * job->scratch_bytes;
    const bool is_few = fxq_has_few_pixels(job->call);
    while (first < last) { /* pieces of the same pixels together: their outputs lie side by side */
        const int64_t row = first / job->output_parts, from = first % job->output_parts;
        const int64_t most = job->output_parts - from, count = last - first < most ? last - first : most;
        const int64_t n0 = fxq_share(job->call->outputs, 64, from, job->output_parts),
                      n1 = fxq_share(job->call->outputs, 64, from + count, job->output_parts);
        int64_t rows = 1;
        if (count == job->output_parts) rows = (last - first) / count; /* and all outputs of some pixels */
        const int64_t p0 = fxq_share(job->pixels, 1, row, job->pixel_parts),
                      p1 = fxq_share(job->pixels, 1, row + rows, job->pixel_parts);
        if (n0 < n1 && p0 < p1) {
            (is_few ? fxq_multiply_few_pixels : fxq_active->convolve)(job->call, p0, p1, n0, n1, scratch);
        }
        first += rows * count;
    }
}

/* A convolution of one place is one of a single row of pixels. */
static struct fxq_convolution as_one_row(struct fxq_convolution c) {
    for (int i = 0; i < FXQ_SPACE; i++) {
        if (c.kernel[i] != 1 || c.stride[i] != 1 || c.in[i] != c.out[i] || c.before[i] != 0) return c;
    }
    const int64_t pixels = c.batch * c.out[0] * c.out[1] * c.out[2];
    c.batch = c.in[0] = c.in[1] = c.out[0] = c.out[1] = 1;
    c.in[2] = c.out[2] = pixels;
    return c;
}

static int64_t pixels_of(const struct fxq_convolution *c) { return c->batch * c->out[0] * c->out[1] * c->out[2]; }

int64_t fxq_convolution_work(const struct fxq_convolution *c) {
    const int64_t pixels = c->is_transposed ? c->batch * c->in[0] * c->in[1] * c->in[2] : pixels_of(c);
    return pixels * c->outputs * (c->inputs / c->groups) * c->kernel[0] * c->kernel[1] * c->kernel[2];
}

int64_t fxq_convolution_bytes(const struct fxq_convolution *call) {
    const struct fxq_convolution c = as_one_row(*call);
    return fxq_has_few_pixels(&c) ? fxq_few_pixels_bytes(&c) : fxq_aligned(fxq_active->convolution_bytes(&c));
}

void fxq_convolve_in(const struct fxq_convolution *call, int threads, void *scratch, int64_t scratch_bytes) {
    const struct fxq_convolution c = as_one_row(*call);
    struct job job = {.call = &c, .pixels = pixels_of(&c), .scratch = scratch, .scratch_bytes = scratch_bytes};
    if (job.pixels == 0 || c.outputs == 0) return;
    const int64_t work = fxq_convolution_work(&c), blocks = (c.outputs + 63) / 64;
    const struct fxq_hands hands = fxq_worthwhile(work, job.pixels * blocks, threads);
    const int64_t pieces = fxq_piece_count(job.pixels * blocks, hands);
    /* Weights are packed by each thread that needs them: so few pixels are not shared, as long as there are outputs. */
    const bool shares_outputs = job.pixels < 1024 && blocks >= hands.threads;
    job.output_parts = shares_outputs ? (blocks < pieces ? blocks : pieces) : 1;
    job.pixel_parts = (pieces + job.output_parts - 1) / job.output_parts;
    if (job.pixel_parts > job.pixels) job.pixel_parts = job.pixels;
    fxq_split(convolve, &job, job.pixel_parts * job.output_parts, hands, work);
}

int fxq_convolve(const struct fxq_convolution *call, int threads) {
    if (call->is_transposed) return fxq_convolve_phases(call, threads);
    const int64_t bytes = fxq_convolution_bytes(call);
    const struct fxq_hands hands = fxq_worthwhile(fxq_convolution_work(call), FXQ_MOST_THREADS, threads);
    void *scratch = fxq_scratch(hands.threads * bytes);
    if (scratch == NULL) return FXQ_NO_MEMORY;
    fxq_convolve_in(call, hands.threads, scratch, bytes);
    fxq_trim_scratch();
    return FXQ_OK;
}
