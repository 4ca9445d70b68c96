/* Each thread's reusable memory. It grows to the largest call and stays, but for unusually large blocks. */
#include <pthread.h>
#include <stdlib.h>

#include "kernels.h"

/* Larger blocks are given back after the call. */
static const int64_t most_kept[] = {(int64_t)16 << 20, (int64_t)64 << 20};

enum which { SCRATCH, ARENA, BLOCKS };

struct block {
    void *memory;
    int64_t bytes;
};

static pthread_key_t key;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static bool has_key;

static void release(void *pointer) {
    struct block *blocks = pointer;
    for (int i = 0; i < BLOCKS; i++) free(blocks[i].memory);
    free(blocks);
}

static void make_key(void) { has_key = pthread_key_create(&key, release) == 0; }

static struct block *own_block(enum which which) {
    pthread_once(&once, make_key);
    if (!has_key) return NULL;
    struct block *blocks = pthread_getspecific(key);
    if (blocks == NULL && (blocks = calloc(BLOCKS, sizeof *blocks)) != NULL && pthread_setspecific(key, blocks) != 0) {
        free(blocks);
        blocks = NULL;
    }
    return blocks ? &blocks[which] : NULL;
}

static void *grow(enum which which, int64_t bytes) {
    struct block *block = own_block(which);
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

static void trim(enum which which) {
    struct block *block = own_block(which);
    if (block == NULL || block->bytes <= most_kept[which]) return;
    free(block->memory);
    block->memory = NULL;
    block->bytes = 0;
}

void *fxq_scratch(int64_t bytes) { return grow(SCRATCH, bytes); }

void fxq_trim_scratch(void) { trim(SCRATCH); }

void *fxq_arena(int64_t bytes) { return grow(ARENA, bytes); }

void fxq_trim_arena(void) { trim(ARENA); }
