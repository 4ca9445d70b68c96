/* torch's tensors, seen by the stable C functions of its libraries (torch/csrc/inductor/aoti_torch/c/shim.h). */
#include <torch/csrc/stable/c/shim.h>

#include <cstdlib>

extern "C" {
#include "calls/tensors.h"
}

struct fxq_argument fxq_none = {FXQ_IS_NONE, 0, {0}};

static int32_t (*const dtypes[DTYPES])() = {
    aoti_torch_dtype_float32, aoti_torch_dtype_int8,     aoti_torch_dtype_uint8, aoti_torch_dtype_int32,
    aoti_torch_dtype_int64,   aoti_torch_dtype_bfloat16, aoti_torch_dtype_int16, aoti_torch_dtype_float16};

static bool read_dtype_of(AtenTensorHandle handle, enum dtype *dtype) {
    int32_t known;
    if (aoti_torch_get_dtype(handle, &known)) return false;
    for (int i = 0; i < DTYPES; i++) {
        if (dtypes[i]() == known) {
            *dtype = (enum dtype)i;
            return true;
        }
    }
    return false;
}

bool read_strided(object value, struct tensor *to) {
    const AtenTensorHandle handle = value->tag == FXQ_IS_TENSOR ? (AtenTensorHandle)value->as.tensor : nullptr;
    int64_t dimensions, *sizes, *strides;
    int32_t device, layout;
    if (handle == nullptr || aoti_torch_get_device_type(handle, &device) || device != aoti_torch_device_type_cpu() ||
        aoti_torch_get_layout(handle, &layout) || layout != aoti_torch_layout_strided() ||
        aoti_torch_get_dim(handle, &dimensions) || dimensions > MOST_DIMENSIONS || !read_dtype_of(handle, &to->dtype) ||
        aoti_torch_get_sizes(handle, &sizes) || aoti_torch_get_strides(handle, &strides) ||
        aoti_torch_get_data_ptr(handle, &to->data)) {
        return false;
    }
    to->dimensions = (int)dimensions;
    to->count = 1;
    for (int i = 0; i < to->dimensions; i++) {
        to->shape[i] = sizes[i];
        to->strides[i] = strides[i];
        to->count *= sizes[i];
    }
    return to->data != nullptr || to->count == 0;
}

bool is_watched(object) { return false; } /* torch's dispatcher has been there already */
bool is_trained(object) { return false; }
bool is_float32(object dtype) { return dtype->as.integer == aoti_torch_dtype_float32(); }

object new_strided(const int64_t *shape, const int64_t *strides, int dimensions, enum dtype dtype,
                   struct tensor *tensor) {
    AtenTensorHandle handle;
    object made = (object)calloc(1, sizeof *made);
    if (made == nullptr) return nullptr;
    if (aoti_torch_empty_strided(dimensions, shape, strides, dtypes[dtype](), aoti_torch_device_type_cpu(), 0,
                                 &handle)) {
        free(made);
        return nullptr;
    }
    made->tag = FXQ_IS_TENSOR;
    made->as.tensor = handle;
    if (read_strided(made, tensor)) return made;
    drop(made);
    return nullptr;
}

object new_tensor(const int64_t *shape, int dimensions, struct tensor *tensor) {
    int64_t strides[MOST_DIMENSIONS], dense = 1;
    for (int i = dimensions - 1; i >= 0; i--) {
        strides[i] = dense;
        dense *= shape[i] > 1 ? shape[i] : 1;
    }
    return new_strided(shape, strides, dimensions, FLOAT32, tensor);
}

object new_tuple(object *results, int count) {
    object tuple = (object)calloc(1, sizeof *tuple), items = (object)calloc((size_t)count, sizeof *items);
    bool are_made = tuple && items;
    for (int i = 0; i < count; i++) are_made = are_made && results[i];
    for (int i = 0; i < count; i++) {
        if (are_made) {
            items[i] = *results[i];
            free(results[i]);
        } else if (results[i]) {
            drop(results[i]);
        }
    }
    if (!are_made) {
        free(tuple);
        free(items);
        return nullptr;
    }
    *tuple = {FXQ_IS_LIST, count, {0}};
    tuple->as.items = items;
    return tuple;
}

void drop(object result) {
    if (result == nullptr || result == NONE) return;
    if (result->tag == FXQ_IS_TENSOR) aoti_torch_delete_tensor_object((AtenTensorHandle)result->as.tensor);
    for (int64_t i = 0; result->tag == FXQ_IS_LIST && i < result->count; i++) {
        aoti_torch_delete_tensor_object((AtenTensorHandle)result->as.items[i].as.tensor);
    }
    if (result->tag == FXQ_IS_LIST) free(result->as.items);
    free(result);
}

int thread_count() {
    uint32_t threads = 1;
    return torch_get_num_threads(&threads) ? 1 : (int)threads;
}
