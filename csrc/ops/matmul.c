/* Products of two activations: the same bits alone and in any batch, on every instruction set, with any number of
 * threads. */
#include "kernels.h"
#include "runtime/pool.h"

enum {
    DIRECT_ROWS = 12, /* for fewer rows a panel whose rows are dense is read where it lies */
    BLOCK_ROWS = 24   /* at least, where the rows of a matrix are shared by threads */
};

struct job {
    const struct fxq_product *call;
    float *panels;                                     /* one a thread */
    int64_t row_blocks, column_blocks, blocks, pieces; /* of a batch; of all; into how many pieces those are cut */
};

/* Rows [m0, m1) of a batch by the columns of a panel. */
static void multiply_block(const struct fxq_product *call, int64_t batch, int64_t m0, int64_t m1, int64_t n,
                           float *panel) {
    const float *a = call->a + fxq_batch_offset(&call->batches, 0, batch);
    const float *b = call->b + fxq_batch_offset(&call->batches, 1, batch) + n * call->b_column;
    const int64_t columns = call->columns - n < FXQ_PANEL ? call->columns - n : FXQ_PANEL,
                  width = fxq_panel_columns(columns);
    struct fxq_tiles tiles = {.a = a + m0 * call->a_row,
                              .b = b,
                              .a_row = call->a_row,
                              .a_column = call->a_column,
                              .b_row = call->b_row,
                              .rows = m1 - m0,
                              .depth = call->depth,
                              .columns = columns,
                              .out = call->out + (batch * call->rows + m0) * call->columns + n,
                              .out_row = call->columns};
    if (call->b_column != 1 || columns != width || tiles.rows >= DIRECT_ROWS) {
        fxq_pack_panels(b, call->b_row, call->b_column, call->depth, columns, panel);
        tiles.b = panel;
        tiles.b_row = width;
    }
    fxq_active->multiply_tiles(&tiles);
}

static void work(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const struct fxq_product *call = job->call;
    float *panel = job->panels + thread * call->depth * FXQ_PANEL;
    const int64_t end = fxq_share(job->blocks, 1, last, job->pieces);
    for (int64_t i = fxq_share(job->blocks, 1, first, job->pieces); i < end; i++) {
        const int64_t block = i % job->row_blocks, column = i / job->row_blocks % job->column_blocks;
        const int64_t m0 = call->rows * block / job->row_blocks, m1 = call->rows * (block + 1) / job->row_blocks;
        multiply_block(call, i / job->row_blocks / job->column_blocks, m0, m1, column * FXQ_PANEL, panel);
    }
}

/* Where all batches share b, as of a matrix of weights, they are more rows of one product. */
static struct fxq_product join_rows(struct fxq_product call) {
    while (call.batches.dimensions > 0) {
        const int last = call.batches.dimensions - 1;
        const int64_t size = call.batches.sizes[last];
        const bool is_shared = call.batches.strides[1][last] == 0,
                   is_even = call.batches.strides[0][last] == call.rows * call.a_row;
        if (size != 1 && !(is_shared && is_even)) break;
        call.batches.dimensions = last;
        call.batches.count /= size;
        call.rows *= size;
    }
    return call;
}

int fxq_product(const struct fxq_product *given, int threads) {
    if (given->batches.count == 0 || given->rows == 0 || given->columns == 0) return FXQ_OK;
    const struct fxq_product call = join_rows(*given);
    struct job job = {.call = &call, .row_blocks = 1, .column_blocks = (call.columns + FXQ_PANEL - 1) / FXQ_PANEL};
    const int64_t blocks = call.batches.count * job.column_blocks, most = (call.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t each = call.rows * (call.depth + 1) * (call.columns < 16 ? 16 : call.columns);
    const int64_t products =
        4 * call.batches.count * each; /* an instruction multiplies a quarter as many floats as bytes */
    const struct fxq_hands hands = fxq_worthwhile(products, blocks * most, threads);
    if (hands.threads > 1 && blocks < 4 * hands.threads) job.row_blocks = (4 * hands.threads + blocks - 1) / blocks;
    if (job.row_blocks > most) job.row_blocks = most;
    job.blocks = blocks * job.row_blocks;
    job.pieces = fxq_piece_count(job.blocks, hands);
    job.panels = fxq_scratch(hands.threads * call.depth * FXQ_PANEL * (int64_t)sizeof(float) + 1);
    if (job.panels == NULL) return FXQ_NO_MEMORY;
    fxq_split(work, &job, job.pieces, hands, products);
    fxq_trim_scratch();
    return FXQ_OK;
}
