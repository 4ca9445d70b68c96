/* Matrices with rows and columns swapped: what a convolution's input and output take, to be rows and back.
 *
 * A plain loop reads or writes one value of each cache line, and where a row is a power of two long, always the same
 * few sets of the cache. So squares go through a buffer. 32 wide: 16 would be a line, but lines that a row's length
 * leaves unaligned are written in two parts, and cost several times as much where the part is half of it. */
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

enum { SIDE = 32 };

struct job {
    const float *x;
    float *out;
    int64_t matrices, rows, columns, pieces;
};

static inline void turn(const float *x, int64_t columns, int m, int n, float *out, int64_t rows) {
    float square[SIDE][SIDE];
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) square[j][i] = x[i * columns + j];
    }
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) out[j * rows + i] = square[j][i];
    }
}

static void work(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const int64_t rows = job->rows, columns = job->columns, stripes = (rows + SIDE - 1) / SIDE;
    const int64_t all = job->matrices * stripes, end = fxq_share(all, 1, last, job->pieces);
    (void)thread;
    for (int64_t i = fxq_share(all, 1, first, job->pieces); i < end; i++) { /* a stripe: some rows of a matrix */
        const int64_t row = i % stripes * SIDE, at = i / stripes * rows * columns;
        const float *x = job->x + at + row * columns;
        float *out = job->out + at + row;
        const int m = rows - row < SIDE ? (int)(rows - row) : SIDE;
        for (int64_t column = 0; column < columns; column += SIDE) {
            const int n = columns - column < SIDE ? (int)(columns - column) : SIDE;
            /* The length of the loops is known but at the edges. */
            if (m == SIDE && n == SIDE) turn(x + column, columns, SIDE, SIDE, out + column * rows, rows);
            else turn(x + column, columns, m, n, out + column * rows, rows);
        }
    }
}

void fxq_transpose(const float *x, int64_t matrices, int64_t rows, int64_t columns, float *out, int threads) {
    const int64_t stripes = matrices * ((rows + SIDE - 1) / SIDE), values = matrices * rows * columns;
    const struct fxq_hands hands = fxq_worthwhile(8 * values, stripes, threads);
    struct job job = {x, out, matrices, rows, columns, fxq_piece_count(stripes, hands)};
    fxq_split(work, &job, job.pieces, hands, 8 * values);
}

/* Blocks of so many columns: their lines stay in the cache while all rows pass. */
enum { TURNED = 64 };

struct byte_job {
    const uint8_t *x;
    uint8_t *out;
    int64_t rows, columns, blocks, pieces; /* blocks: of all matrices */
};

static void turn_block(const uint8_t *x, int64_t rows, int64_t columns, int64_t width, uint8_t *out) {
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < width; column++) out[column * rows + row] = x[row * columns + column];
    }
}

static void turn_bytes(void *arg, int thread, int64_t first, int64_t last) {
    const struct byte_job *job = arg;
    const int64_t rows = job->rows, columns = job->columns, of_matrix = (columns + TURNED - 1) / TURNED;
    const int64_t end = fxq_share(job->blocks, 1, last, job->pieces);
    (void)thread;
    for (int64_t i = fxq_share(job->blocks, 1, first, job->pieces); i < end; i++) {
        const int64_t at = i / of_matrix * rows * columns, column = i % of_matrix * TURNED;
        const int64_t width = columns - column < TURNED ? columns - column : TURNED;
        turn_block(job->x + at + column, rows, columns, width, job->out + at + column * rows);
    }
}

void fxq_turn_bytes(const uint8_t *x, int64_t matrices, int64_t rows, int64_t columns, uint8_t *out, int threads) {
    const bool is_turned = rows == 1 || columns == 1; /* then it is a copy, cut anywhere */
    struct byte_job job = {x, out, is_turned ? 1 : rows, is_turned ? matrices * rows * columns : columns, 0, 0};
    job.blocks = (is_turned ? 1 : matrices) * ((job.columns + TURNED - 1) / TURNED);
    const int64_t work = 8 * matrices * rows * columns;
    const struct fxq_hands hands = fxq_worthwhile(work, job.blocks, threads);
    job.pieces = fxq_piece_count(job.blocks, hands);
    if (job.blocks) fxq_split(turn_bytes, &job, job.pieces, hands, work);
}
