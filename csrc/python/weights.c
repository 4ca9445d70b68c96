/* Weights and tables from tensors: the only place that tells a format from a dtype. */
#include "python/calls.h"

/* A weight's format by its dtype, and whether columns are grouped. FXQ_NONE: there is none. */
static enum fxq_format format_of(enum kind kind, bool is_grouped) {
    if (is_grouped) return kind == UINT8 ? FXQ_INT4 : FXQ_NONE;
    switch (kind) {
        case INT8: return FXQ_INT8;
        case INT16: return FXQ_INT16;
        case FLOAT16: return FXQ_FLOAT16;
        case FLOAT32: return FXQ_FLOAT32;
        default: return FXQ_NONE;
    }
}

/* A table's, by its dtype and bits. */
static enum fxq_format table_format_of(enum kind kind, int64_t bits) {
    if (bits == 4) return kind == INT8 || kind == UINT8 ? FXQ_UINT4 : FXQ_NONE;
    if (kind == FLOAT16) return FXQ_FLOAT16;
    if (bits != 8) return FXQ_NONE;
    return kind == INT8 ? FXQ_INT8 : kind == UINT8 ? FXQ_UINT8 : FXQ_NONE;
}

/* Elements of a row of the tensor: values, or bytes of several. */
static int64_t width_of(enum fxq_format format, int64_t columns) {
    return fxq_formats[format].bits < 8 ? fxq_row_bytes(format, columns) : columns;
}

/* The least group size that gives so many groups, or 0. */
static int64_t group_size_of(int64_t columns, int64_t groups) {
    for (int64_t size = 32; size <= 128; size *= 2) {
        if ((columns + size - 1) / size == groups) return size;
    }
    return 0;
}

static bool read_groups(PyObject *object, int64_t group, struct fxq_weight *weight) {
    struct tensor scale;
    if (!read_kind(object, BFLOAT16, 2, &scale) || scale.shape[0] != weight->outputs || weight->columns == 0)
        return false;
    weight->scale = scale.data;
    weight->groups = scale.shape[1];
    weight->group = group == ANY_GROUP ? group_size_of(weight->columns, weight->groups) : group;
    return (weight->group == 32 || weight->group == 64 || weight->group == 128) &&
           weight->groups == (weight->columns + weight->group - 1) / weight->group;
}

bool read_weight(PyObject *object, PyObject *scale, int64_t columns, int64_t group, struct fxq_weight *weight) {
    struct tensor matrix;
    const float *row_scale = NULL;
    if (!read_tensor(object, &matrix) || matrix.dimensions != 2) return false;
    const bool is_grouped = group == ANY_GROUP ? matrix.kind == UINT8 : group > 0;
    *weight = (struct fxq_weight){.format = format_of(matrix.kind, is_grouped),
                                  .data = matrix.data,
                                  .outputs = matrix.shape[0],
                                  .columns = columns};
    if (weight->format == FXQ_NONE || matrix.shape[1] != width_of(weight->format, columns)) return false;
    if (is_grouped) return read_groups(scale, group, weight);
    if (fxq_formats[weight->format].takes == FXQ_TO_FLOAT) return true; /* which have no scale, or one of any kind */
    const bool is_scaled = read_vector(scale, weight->outputs, &row_scale);
    weight->scale = row_scale;
    return is_scaled;
}

bool read_table(PyObject *object, PyObject *scale, PyObject *zero_point, int64_t columns, int64_t bits,
                struct fxq_table *table) {
    struct tensor matrix;
    if (!read_tensor(object, &matrix) || matrix.dimensions != 2) return false;
    *table = (struct fxq_table){.format = table_format_of(matrix.kind, bits),
                                .values = matrix.data,
                                .rows = matrix.shape[0],
                                .columns = columns};
    if (table->format == FXQ_NONE || matrix.shape[1] != width_of(table->format, columns)) return false;
    if (table->format == FXQ_FLOAT16) return scale == Py_None && zero_point == Py_None;
    return read_vector(scale, table->rows, &table->scale) &&
           read_optional_vector(zero_point, table->rows, &table->zero_point);
}
