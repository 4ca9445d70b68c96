/* Each thread's reusable memory. It grows to the largest call and stays, but for unusually large blocks. */
#include <pthread.h>
#include <stdlib.h>

#include "kernels.h"

#define KEPT_BYTES ((int64_t)16 << 20) /* larger blocks are given back after the call */

struct block {
    void *memory;
    int64_t bytes;
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool has_key;

static void release(void *pointer) {
    struct block *block = pointer;
    free(block->memory);
    free(block);
}

static void make_key(void) { has_key = pthread_key_create(&key, release) == 0; }

static struct block *own_block(void) {
    pthread_once(&once, make_key);
    if (!has_key) return NULL;
    struct block *block = pthread_getspecific(key);
    if (block == NULL && (block = calloc(1, sizeof *block)) != NULL && pthread_setspecific(key, block) != 0) {
        free(block);
        block = NULL;
    }
    return block;
}

void *fxq_scratch(int64_t bytes) {
    struct block *block = own_block();
    if (block == NULL || bytes < 0) return NULL;
    if (block->bytes < bytes) {
        free(block->memory);
        block->bytes = 0;
        bytes = (bytes + 4095) & ~(int64_t)4095;
        block->memory = aligned_alloc(64, (size_t)bytes);
        if (block->memory == NULL) return NULL;
        block->bytes = bytes;
    }
    return block->memory;
}

void fxq_trim_scratch(void) {
    struct block *block = own_block();
    if (block == NULL || block->bytes <= KEPT_BYTES) return;
    free(block->memory);
    block->memory = NULL;
    block->bytes = 0;
}
