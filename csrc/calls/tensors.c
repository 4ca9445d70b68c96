/* Tensors of one dtype and shape. */
#include "calls/tensors.h"

bool read_tensor(object value, struct tensor *tensor) {
    if (!read_strided(value, tensor)) return false;
    bool is_dense = true;
    int64_t dense = 1; /* stride */
    for (int i = tensor->dimensions - 1; i >= 0; dense *= tensor->shape[i--]) {
        is_dense = is_dense && (tensor->shape[i] == 1 || tensor->strides[i] == dense);
    }
    return is_dense || tensor->count == 0;
}

bool read_dtype(object value, enum dtype dtype, int dimensions, struct tensor *tensor) {
    return read_tensor(value, tensor) && tensor->dtype == dtype && tensor->dimensions == dimensions;
}

bool read_vector(object value, int64_t count, const float **data) {
    struct tensor vector;
    if (!read_dtype(value, FLOAT32, 1, &vector) || vector.count != count) return false;
    *data = vector.data;
    return true;
}

bool read_optional_vector(object value, int64_t count, const float **data) {
    *data = NULL;
    return is_none(value) || read_vector(value, count, data);
}
