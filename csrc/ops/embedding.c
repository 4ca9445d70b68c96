/* Rows of quantized tables, and their sums, means and maxima over bags. */
#include <stdatomic.h>
#include <string.h>

#include "kernels.h"
#include "runtime/pool.h"

struct job {
    const struct fxq_table *table;
    const struct fxq_indices *indices;
    const struct fxq_bags *bags;
    float *out;
    float *scratch; /* a row a thread */
    int64_t pieces;
    atomic_int status;
};

static int64_t index_at(const struct fxq_indices *indices, int64_t i) {
    return indices->is_wide ? ((const int64_t *)indices->values)[i] : ((const int32_t *)indices->values)[i];
}

static bool is_row(const struct fxq_table *table, int64_t index) { return index >= 0 && index < table->rows; }

static void take_rows(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const struct fxq_table *table = job->table;
    const int64_t count = job->indices->count, end = fxq_share(count, 1, last, job->pieces);
    (void)thread;
    for (int64_t i = fxq_share(count, 1, first, job->pieces); i < end; i++) {
        const int64_t index = index_at(job->indices, i);
        if (!is_row(table, index)) {
            atomic_store(&job->status, FXQ_BAD_INDEX);
            return;
        }
        fxq_active->put_row(table, index, job->out + i * table->columns);
    }
}

int fxq_embedding(const struct fxq_table *table, const struct fxq_indices *indices, float *out, int threads) {
    const int64_t work = indices->count * table->columns;
    const struct fxq_hands hands = fxq_worthwhile(work, indices->count, threads);
    struct job job = {.table = table,
                      .indices = indices,
                      .out = out,
                      .status = FXQ_OK,
                      .pieces = fxq_piece_count(indices->count, hands)};
    fxq_split(take_rows, &job, job.pieces, hands, work);
    return atomic_load(&job.status);
}

enum { ROWS_TOGETHER = 64 };

/* The greatest values of some rows, and of out where it is begun; `row` is scratch memory. */
static void take_greatest(const struct fxq_table *table, const int64_t *rows, int64_t count, bool is_begun, float *row,
                          float *out) {
    for (int64_t i = 0; i < count; i++) {
        fxq_active->put_row(table, rows[i], is_begun || i ? row : out);
        if (is_begun || i) fxq_active->take_greater(out, row, table->columns);
    }
}

/* One bag, its rows added one after another; the mean is the sum divided by the count. */
static int reduce_bag(const struct job *job, int64_t first, int64_t last, float *row, float *out) {
    const struct fxq_table *table = job->table;
    const struct fxq_bags *bags = job->bags;
    int64_t rows[ROWS_TOGETHER], waiting = 0, count = 0;
    float weights[ROWS_TOGETHER];
    memset(out, 0, (size_t)table->columns * sizeof *out);
    for (int64_t i = first; i < last; i++) {
        const int64_t index = index_at(job->indices, i);
        if (!is_row(table, index)) return FXQ_BAD_INDEX;
        if (index != bags->padding) {
            rows[waiting] = index;
            weights[waiting++] = bags->weights ? bags->weights[i] : 1.0f;
        }
        if (waiting < ROWS_TOGETHER && i + 1 < last) continue;
        if (bags->mode == FXQ_MAX) take_greatest(table, rows, waiting, count > 0, row, out);
        else fxq_active->add_rows(table, rows, bags->weights ? weights : NULL, waiting, out);
        count += waiting;
        waiting = 0;
    }
    if (bags->mode == FXQ_MEAN && count > 1) {
        for (int64_t k = 0; k < table->columns; k++) out[k] /= (float)count;
    }
    return FXQ_OK;
}

static void reduce_bags(void *arg, int thread, int64_t first, int64_t last) {
    struct job *job = arg;
    const struct fxq_bags *bags = job->bags;
    const int64_t columns = job->table->columns, end = fxq_share(bags->count, 1, last, job->pieces);
    for (int64_t bag = fxq_share(bags->count, 1, first, job->pieces); bag < end; bag++) {
        int64_t from = bag * bags->width, to = from + bags->width;
        if (bags->offsets) {
            from = bags->offsets[bag];
            to = bag + 1 < bags->count + bags->has_end ? bags->offsets[bag + 1] : job->indices->count;
        }
        const int status = reduce_bag(job, from, to, job->scratch + thread * columns, job->out + bag * columns);
        if (status != FXQ_OK) {
            atomic_store(&job->status, status);
            return;
        }
    }
}

static bool are_offsets_sound(const struct fxq_bags *bags, int64_t indices) {
    if (bags->offsets == NULL) return true;
    const int64_t count = bags->count + bags->has_end;
    if (count && bags->offsets[0] != 0) return false;
    for (int64_t i = 1; i < count; i++) {
        if (bags->offsets[i] < bags->offsets[i - 1]) return false;
    }
    return count == 0 || bags->offsets[count - 1] <= indices;
}

int fxq_embedding_bag(const struct fxq_table *table, const struct fxq_indices *indices, const struct fxq_bags *bags,
                      float *out, int threads) {
    if (!are_offsets_sound(bags, indices->count)) return FXQ_BAD_OFFSETS;
    struct job job = {.table = table, .indices = indices, .bags = bags, .out = out, .status = FXQ_OK};
    const int64_t work = indices->count * table->columns;
    const struct fxq_hands hands = fxq_worthwhile(work, bags->count, threads);
    job.pieces = fxq_piece_count(bags->count, hands);
    job.scratch = fxq_scratch(hands.threads * table->columns * (int64_t)sizeof(float) + 64);
    if (job.scratch == NULL) return FXQ_NO_MEMORY;
    fxq_split(reduce_bags, &job, job.pieces, hands, work);
    fxq_trim_scratch();
    return atomic_load(&job.status);
}
