/* The worker threads. One job runs at a time; who finds the pool busy runs its job alone rather than wait.
 *
 * An idle worker spins for some tens of microseconds, because the operators of a model follow each other closely, then
 * sleeps on a condition variable: a long spin would take cores from torch's own OpenMP pool. After fork() the child has
 * no workers, so it starts with an empty pool. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "fxquant.h"

#if defined(__x86_64__) || defined(__i386__)
#define pause_briefly() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("yield")
#else
#define pause_briefly() ((void)0)
#endif

enum { MOST_THREADS = 256, IDLE_SPINS = 600, WAIT_SPINS = 400 };

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held while a job runs */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int started; /* workers that exist; guarded by `busy` */

static _Alignas(64) atomic_uint job_number;
static _Alignas(64) atomic_int sleepers;
static _Alignas(64) atomic_int unfinished;
static _Alignas(64) atomic_int arrived;
static _Alignas(64) atomic_uint barrier_number;
static struct {
    fxq_job fn;
    void *arg;
    int threads;
} job; /* written before job_number grows, read after it was seen to grow */

/* Spin until the condition holds, letting others run if it takes long (more threads than free cores). */
#define WAIT_UNTIL(condition)                                   \
    for (int spins = 0; !(condition); spins++) {                \
        if (spins < WAIT_SPINS) pause_briefly();                \
        else sched_yield();                                     \
    }

static unsigned next_job(unsigned seen) {
    unsigned number;
    for (int spins = 0; spins < IDLE_SPINS; spins++) {
        if ((number = atomic_load_explicit(&job_number, memory_order_acquire)) != seen) return number;
        pause_briefly();
    }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&sleepers, 1); /* sequentially consistent: either we see the new number or run() sees a sleeper */
    while ((number = atomic_load(&job_number)) == seen) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&sleepers, 1);
    pthread_mutex_unlock(&sleep_lock);
    return number;
}

struct start {
    int thread;
    unsigned seen;
};
static struct start starts[MOST_THREADS];

static void *work(void *arg) {
    const struct start *start = arg;
    const int thread = start->thread;
    unsigned seen = start->seen;
    for (;;) {
        seen = next_job(seen);
        /* A worker that the job does not need must not touch `job` later than the job lasts; it never blocks the end of
         * one, so every worker takes part in the count. */
        if (thread < job.threads) job.fn(job.arg, thread, job.threads);
        atomic_fetch_sub_explicit(&unfinished, 1, memory_order_acq_rel);
    }
    return NULL;
}

static void start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (started < wanted) {
        pthread_t thread;
        starts[started] = (struct start){started + 1, atomic_load(&job_number)};
        if (pthread_create(&thread, &attributes, work, &starts[started]) != 0) break;
        started++;
    }
    pthread_attr_destroy(&attributes);
}

int64_t fxq_least_share = 1 << 17;

int fxq_worthwhile(int64_t work, int64_t parts, int threads) {
    const int64_t worth = work / fxq_least_share + 1, most = worth < parts ? worth : parts;
    return most < 1 ? 1 : most < threads ? (int)most : threads < 1 ? 1 : threads;
}

static void forget_workers(void) { /* in the child of a fork: none of them came along */
    pthread_mutex_init(&busy, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
    started = 0;
    atomic_store(&sleepers, 0);
    atomic_store(&unfinished, 0);
    atomic_store(&arrived, 0);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

void fxq_run(fxq_job fn, void *arg, int threads) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&busy) != 0) {
        fn(arg, 0, 1);
        return;
    }
    pthread_once(&once, watch_forks);
    start_workers(threads - 1);
    if (threads > started + 1) threads = started + 1;
    job.fn = fn;
    job.arg = arg;
    job.threads = threads;
    atomic_store(&unfinished, started);
    atomic_fetch_add(&job_number, 1);
    if (atomic_load(&sleepers) > 0) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
    fn(arg, 0, threads);
    WAIT_UNTIL(atomic_load_explicit(&unfinished, memory_order_acquire) == 0)
    pthread_mutex_unlock(&busy);
}

void fxq_barrier(int threads) {
    if (threads <= 1) return;
    const unsigned number = atomic_load_explicit(&barrier_number, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&barrier_number, number + 1, memory_order_release);
    } else {
        WAIT_UNTIL(atomic_load_explicit(&barrier_number, memory_order_acquire) != number)
    }
}
