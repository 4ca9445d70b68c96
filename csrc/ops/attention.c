/* softmax(scale q k^T + mask) v, some rows of a head at a time: their scores stay in the L2 cache.
 *
 * A row's result depends on its query, its keys and their values alone; keys at the end that the mask keeps out change
 * nothing. So it is the same alone, in any batch, padded, and token by token with the earlier keys kept. */
#include "kernels.h"
#include "runtime/pool.h"

enum {
    SCORE_BYTES = 96 << 10, /* of scores at a time */
    MOST_ROWS = 96,
    LEAST_ROWS = 6
};

struct job {
    const struct fxq_attention *call;
    char *memory;
    int64_t thread_bytes, block, blocks; /* rows of a block, blocks of a head */
    int64_t width;                       /* keys in whole panels: a row of scores */
    int64_t pieces;                      /* into which all blocks are cut */
    bool packs_values;
};

static const float *find(const struct fxq_attention *call, const struct fxq_operand *operand, int index, int64_t head) {
    return operand->data + fxq_batch_offset(&call->batches, index, head);
}

/* scores = q k^T of some rows by the first `keys` keys, which lie in panels. */
static void score(const struct job *job, const float *q, int64_t rows, int64_t keys, const float *panels,
                  float *scores) {
    const struct fxq_attention *call = job->call;
    for (int64_t n = 0; n < keys; n += FXQ_PANEL) {
        const int64_t columns = job->width - n < FXQ_PANEL ? job->width - n : FXQ_PANEL;
        const struct fxq_tiles tiles = {.a = q,
                                        .b = panels + n * call->depth,
                                        .a_row = call->q.row,
                                        .a_column = call->q.column,
                                        .b_row = columns,
                                        .rows = rows,
                                        .depth = call->depth,
                                        .columns = columns,
                                        .out = scores + n,
                                        .out_row = job->width};
        fxq_active->multiply_tiles(&tiles);
    }
}

/* out = scores v, each row over its sum. */
static void weigh(const struct job *job, const float *scores, const float *sums, int64_t rows, int64_t keys,
                  const float *v, float *out) {
    const struct fxq_attention *call = job->call;
    const int64_t out_row = call->batches.sizes[1] * call->outputs;
    for (int64_t n = 0; n < call->outputs; n += FXQ_PANEL) {
        const int64_t columns = call->outputs - n < FXQ_PANEL ? call->outputs - n : FXQ_PANEL;
        const struct fxq_tiles tiles = {.a = scores,
                                        .b = job->packs_values ? v + n * call->keys : v + n,
                                        .a_row = job->width,
                                        .a_column = 1,
                                        .b_row = job->packs_values ? fxq_panel_columns(columns) : call->v.row,
                                        .rows = rows,
                                        .depth = keys,
                                        .columns = columns,
                                        .out = out + n,
                                        .out_row = out_row};
        fxq_active->multiply_tiles(&tiles);
    }
    for (int64_t i = 0; i < rows; i++) {
        const float over = sums[i] == 0.0f ? 0.0f : 1.0f / sums[i];
        for (int64_t n = 0; n < call->outputs; n++) out[i * out_row + n] *= over;
    }
}

static void attend(const struct job *job, int64_t head, int64_t m0, int64_t m1, const float *panels, const float *v,
                   float *scores) {
    const struct fxq_attention *call = job->call;
    const int64_t rows = m1 - m0, keys = call->is_causal && m1 < call->keys ? m1 : call->keys,
                  heads = call->batches.sizes[1];
    const float *mask = call->mask.data ? find(call, &call->mask, 3, head) + m0 * call->mask.row : NULL;
    float sums[MOST_ROWS];
    score(job, find(call, &call->q, 0, head) + m0 * call->q.row, rows, keys, panels, scores);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t own = call->is_causal && m0 + i + 1 < keys ? m0 + i + 1 : keys;
        const struct fxq_scores row = {.values = scores + i * job->width,
                                       .count = own,
                                       .padded = keys,
                                       .scale = call->scale,
                                       .mask = mask ? mask + i * call->mask.row : NULL,
                                       .mask_stride = call->mask.column};
        sums[i] = fxq_active->softmax_row(&row);
    }
    float *out = call->out + ((head / heads * call->rows + m0) * heads + head % heads) * call->outputs;
    weigh(job, scores, sums, rows, keys, v, out);
}

static void work(void *arg, int thread, int64_t first, int64_t last) {
    const struct job *job = arg;
    const struct fxq_attention *call = job->call;
    const int64_t all = call->batches.count * job->blocks, end = fxq_share(all, 1, last, job->pieces);
    float *panels = (float *)(job->memory + thread * job->thread_bytes), *scores = panels + call->depth * job->width;
    float *values = scores + job->block * job->width;
    int64_t packed = -1;
    for (int64_t i = fxq_share(all, 1, first, job->pieces); i < end; i++) {
        const int64_t head = i / job->blocks, block = i % job->blocks;
        const float *v = find(call, &call->v, 2, head);
        if (head != packed) {
            const float *k = find(call, &call->k, 1, head);
            fxq_pack_panels(k, call->k.column, call->k.row, call->depth, call->keys, panels);
            if (job->packs_values) fxq_pack_panels(v, call->v.row, call->v.column, call->keys, call->outputs, values);
            packed = head;
        }
        const int64_t m0 = call->rows * block / job->blocks, m1 = call->rows * (block + 1) / job->blocks;
        attend(job, head, m0, m1, panels, job->packs_values ? values : v, scores);
    }
}

int fxq_attention(const struct fxq_attention *call, int threads) {
    if (call->batches.count == 0 || call->rows == 0 || call->outputs == 0) return FXQ_OK;
    struct job job = {.call = call, .width = fxq_panel_columns(call->keys)};
    const int64_t fits = SCORE_BYTES / (int64_t)sizeof(float) / (job.width + 1);
    const int64_t most = fxq_clamp(fits, LEAST_ROWS, MOST_ROWS);
    job.blocks = (call->rows + most - 1) / most;
    job.block = (call->rows + job.blocks - 1) / job.blocks;
    /* Few rows read values where they lie, if whole registers may be read there. */
    job.packs_values = call->v.column != 1 || call->outputs % 16 != 0 || call->rows >= 12;
    const int64_t products = call->batches.count * call->rows * call->keys * (call->depth + call->outputs + 16);
    /* An instruction multiplies a quarter as many floats as bytes. */
    const struct fxq_hands hands = fxq_worthwhile(4 * products, call->batches.count * job.blocks, threads);
    job.pieces = fxq_piece_count(call->batches.count * job.blocks, hands);
    const int64_t values = job.packs_values ? call->keys * fxq_panel_columns(call->outputs) : 0;
    job.thread_bytes =
        fxq_aligned((call->depth * job.width + job.block * job.width + values) * (int64_t)sizeof(float)) + 64;
    job.memory = fxq_scratch(hands.threads * job.thread_bytes);
    if (job.memory == NULL) return FXQ_NO_MEMORY;
    fxq_split(work, &job, job.pieces, hands, 4 * products);
    fxq_trim_scratch();
    return FXQ_OK;
}
