/* The calls' arguments and results as torch's operators have them, for programs without Python. */
#ifndef FXQUANT_TORCH_DOOR_H
#define FXQUANT_TORCH_DOOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What an argument is. A truth and a dtype, in torch's numbers, are integers. */
enum fxq_tag { FXQ_IS_NONE, FXQ_IS_INTEGER, FXQ_IS_NUMBER, FXQ_IS_TEXT, FXQ_IS_TENSOR, FXQ_IS_LIST };
struct fxq_argument {
    int64_t tag, count; /* count: of a list's items */
    union {
        int64_t integer;
        double number;
        const char *text;
        void *tensor; /* an AtenTensorHandle, which is not owned; of a result it is */
        struct fxq_argument *items;
    } as;
};
typedef struct fxq_argument *object;

#define CALL(name) object name(object const *args, int64_t count)
#define INTEGER(value) ((value)->as.integer)
#define NUMBER(value) ((value)->as.number)
#define NONE (&fxq_none)
#define BEGIN_KERNEL
#define END_KERNEL

/* tensors.cpp */
extern struct fxq_argument fxq_none;
object new_tuple(object *results, int count); /* takes the results over; NULL: one of them is NULL */
void drop(object result);

static inline bool is_none(object value) { return value->tag == FXQ_IS_NONE; }
static inline bool is_true(object value) { return value->tag == FXQ_IS_INTEGER && value->as.integer != 0; }
static inline bool is_yes(object value) { return is_true(value); }
static inline bool is_no(object value) { return value->tag == FXQ_IS_INTEGER && value->as.integer == 0; }
static inline bool is_text(object value, const char *text) {
    const char *own = value->tag == FXQ_IS_TEXT ? value->as.text : "";
    while (*own && *own == *text) own++, text++;
    return *own == *text;
}
static inline int64_t length_of(object list) { return list->count; }
static inline object item(object list, int64_t i) { return &list->as.items[i]; }
static inline int64_t integer_at(object list, int64_t i) { return list->as.items[i].as.integer; }

/* Memory is all that a call can fail for, and then it gives NULL. */
static inline bool has_failed(void) { return false; }
static inline object no_memory(void) { return NULL; }
static inline object new_none(void) { return NONE; }

#endif
