/* Weights and tables from tensors and the name of their format. */
#include "calls/calls.h"

/* What fxquant/formats.py calls each format, and the dtype that holds it. */
static const struct {
    const char *name;
    enum dtype stored;
} formats[FXQ_FORMATS] = {
    [FXQ_INT8] = {"int8", INT8},    [FXQ_INT16] = {"int16", INT16},       [FXQ_INT4] = {"int4", UINT8},
    [FXQ_INT3] = {"int3", UINT8},   [FXQ_FLOAT16] = {"float16", FLOAT16}, [FXQ_FLOAT32] = {"float32", FLOAT32},
    [FXQ_UINT8] = {"uint8", UINT8}, [FXQ_UINT4] = {"uint4", UINT8},
};

enum fxq_format read_format(object name) {
    for (int i = FXQ_NONE + 1; i < FXQ_FORMATS; i++) {
        if (is_text(name, formats[i].name)) return (enum fxq_format)i;
    }
    return FXQ_NONE;
}

/* Elements of a row of the tensor: values, or bytes of several. */
static int64_t width_of(enum fxq_format format, int64_t columns) {
    return fxq_formats[format].block_values > 1 ? fxq_row_bytes(format, columns) : columns;
}

/* The least group size, or `wanted`, that gives so many groups; 0: none does. */
static int64_t group_size_of(int64_t columns, int64_t groups, int64_t wanted) {
    for (int64_t size = FXQ_LEAST_GROUP; size <= FXQ_MOST_GROUP; size *= 2) {
        if ((wanted == ANY_GROUP || wanted == size) && (columns + size - 1) / size == groups) return size;
    }
    return 0;
}

static bool read_groups(object value, int64_t group, struct fxq_weight *weight) {
    struct tensor scale;
    if (!read_dtype(value, BFLOAT16, 2, &scale) || scale.shape[0] != weight->outputs || weight->columns == 0)
        return false;
    weight->scale = scale.data;
    weight->groups = scale.shape[1];
    weight->group = group_size_of(weight->columns, weight->groups, group);
    return weight->group > 0;
}

/* A matrix of so many columns; whether it is one of its format. */
static bool read_matrix(object value, enum fxq_format format, int64_t columns, struct tensor *matrix) {
    return format != FXQ_NONE && read_dtype(value, formats[format].stored, 2, matrix) &&
           matrix->shape[1] == width_of(format, columns);
}

bool read_weight(object value, object scale, int64_t columns, enum fxq_format format, int64_t group,
                 struct fxq_weight *weight) {
    struct tensor matrix;
    const float *row_scale = NULL;
    if (format == FXQ_UINT8 || format == FXQ_UINT4 || !read_matrix(value, format, columns, &matrix)) return false;
    *weight =
        (struct fxq_weight){.format = format, .data = matrix.data, .outputs = matrix.shape[0], .columns = columns};
    if (fxq_formats[format].is_grouped) return read_groups(scale, group, weight);
    if (group > 0) return false;
    if (fxq_formats[format].takes == FXQ_TO_FLOAT) { /* which have no scale, or an empty one */
        return is_none(scale) || (read_tensor(scale, &matrix) && matrix.count == 0);
    }
    const bool is_scaled = read_vector(scale, weight->outputs, &row_scale);
    weight->scale = row_scale;
    return is_scaled;
}

bool read_table(object value, object scale, object zero_point, int64_t columns, enum fxq_format format,
                struct fxq_table *table) {
    struct tensor matrix;
    if (!read_matrix(value, format, columns, &matrix)) return false;
    *table = (struct fxq_table){.format = format, .values = matrix.data, .rows = matrix.shape[0], .columns = columns};
    if (format == FXQ_FLOAT16) return is_none(scale) && is_none(zero_point);
    if (format != FXQ_INT8 && format != FXQ_UINT8 && format != FXQ_UINT4) return false;
    return read_vector(scale, table->rows, &table->scale) &&
           read_optional_vector(zero_point, table->rows, &table->zero_point);
}
