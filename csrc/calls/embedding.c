/* The module's calls of embeddings and embedding bags. */
#include <string.h>

#include "calls/calls.h"

/* indices, weight, scale, zero_point, embedding_dim as the operators have them */
static bool read_look_up(object const *args, object format, object dtype, struct fxq_table *table,
                         struct fxq_indices *indices, struct tensor *index) {
    if (!is_float32(dtype) || !read_tensor(args[0], index) || (index->dtype != INT32 && index->dtype != INT64) ||
        index->dimensions == MOST_DIMENSIONS ||
        !read_table(args[1], args[2], args[3], INTEGER(args[4]), read_format(format), table)) {
        return false;
    }
    *indices = (struct fxq_indices){index->data, index->count, index->dtype == INT64};
    return true;
}

/* embedding(asks, indices, weight, scale, zero_point, embedding_dim, format, dtype); None too for an index beyond the
 * table */
CALL(embedding) {
    struct tensor index;
    struct fxq_table table;
    struct fxq_indices indices;
    if (count != 8) return nothing();
    if (!may_run(args[0], args[1]) || !read_look_up(args + 1, args[6], args[7], &table, &indices, &index)) {
        return nothing();
    }
    index.shape[index.dimensions] = table.columns;
    RETURN_OUTPUT(index.shape, index.dimensions + 1, fxq_embedding(&table, &indices, out, threads));
}

/* How the indices are divided into bags: mode, offsets or None, per_sample_weights or None, include_last_offset. */
static bool read_bags(object mode, object offsets, object weights, bool has_end, const struct tensor *index,
                      struct fxq_bags *bags) {
    static const char *const modes[] = {"sum", "mean", "max"}; /* FXQ_SUM, FXQ_MEAN, FXQ_MAX */
    struct tensor tensor;
    for (bags->mode = 0; bags->mode < 3 && !is_text(mode, modes[bags->mode]);) bags->mode++;
    if (bags->mode == 3 || index->dimensions != (is_none(offsets) ? 2 : 1)) return false;
    bags->count = index->shape[0];
    bags->width = is_none(offsets) ? index->shape[1] : 0;
    if (!is_none(offsets)) {
        if (!read_dtype(offsets, INT64, 1, &tensor) || tensor.count < has_end) return false;
        bags->offsets = tensor.data;
        bags->has_end = has_end;
        bags->count = tensor.count - has_end;
    }
    if (is_none(weights)) return true;
    if (bags->mode != FXQ_SUM || !read_dtype(weights, FLOAT32, index->dimensions, &tensor) ||
        memcmp(tensor.shape, index->shape, (size_t)index->dimensions * sizeof *index->shape) != 0) {
        return false;
    }
    bags->weights = tensor.data;
    return true;
}

/* embedding_bag(asks, indices, weight, scale, zero_point, embedding_dim, offsets, mode, per_sample_weights,
 *               include_last_offset, padding_idx, format, dtype); None too for an index beyond the table, or offsets
 * that do not rise from 0 to the number of indices */
CALL(embedding_bag) {
    struct tensor index;
    struct fxq_table table;
    struct fxq_indices indices;
    struct fxq_bags bags = {.padding = -1};
    if (count != 13) return nothing();
    if (!may_run(args[0], args[1]) || (!is_none(args[8]) && !may_run(args[0], args[8])) ||
        !read_look_up(args + 1, args[11], args[12], &table, &indices, &index) ||
        !read_bags(args[7], args[6], args[8], INTEGER(args[9]) != 0, &index, &bags)) {
        return nothing();
    }
    if (!is_none(args[10])) {
        bags.padding = INTEGER(args[10]);
        if (bags.padding < 0) bags.padding += table.rows;
    }
    const int64_t shape[] = {bags.count, table.columns};
    RETURN_OUTPUT(shape, 2, fxq_embedding_bag(&table, &indices, &bags, out, threads));
}
