/* The worker threads. One job runs at a time; who finds the pool busy runs its job alone rather than wait.
 *
 * Whoever waits spins a little, then sleeps. An idle worker spins for some tens of microseconds, because the operators of
 * a model follow each other closely; a longer spin would take cores from torch's own OpenMP pool. After fork() the child
 * has no workers, so it starts with an empty pool. */
#include <pthread.h>
#include <stdatomic.h>

#include "fxquant.h"

#if defined(__x86_64__) || defined(__i386__)
#define pause_briefly() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("yield")
#else
#define pause_briefly() ((void)0)
#endif

enum {
    MOST_THREADS = 256,
    IDLE_SPINS = 600, /* some 25 us, as a pause takes about 140 cycles */
    WAIT_SPINS = 300  /* in a job: then the thread that it waits for has probably lost its core, and may need this one */
};

/* A number that grows, and who sleeps until it does. */
struct signal {
    _Alignas(64) atomic_uint number;
    atomic_int sleepers;
    pthread_mutex_t lock;
    pthread_cond_t grown;
};
#define NEW_SIGNAL {.lock = PTHREAD_MUTEX_INITIALIZER, .grown = PTHREAD_COND_INITIALIZER}

static struct signal job_given = NEW_SIGNAL, job_done = NEW_SIGNAL, barrier_open = NEW_SIGNAL;
static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held while a job runs */
static int started;                                      /* workers that exist; guarded by `busy` */
static _Alignas(64) atomic_int unfinished;
static _Alignas(64) atomic_int arrived;
static struct {
    fxq_job fn;
    void *arg;
    int threads;
} job; /* written before job_given grows, read after */

static unsigned await(struct signal *signal, unsigned seen, int spins) {
    unsigned number;
    for (; spins > 0; spins--) {
        if ((number = atomic_load_explicit(&signal->number, memory_order_acquire)) != seen) return number;
        pause_briefly();
    }
    pthread_mutex_lock(&signal->lock);
    atomic_fetch_add(&signal->sleepers, 1); /* sequentially consistent: either we see the growth or grow() sees us */
    while ((number = atomic_load(&signal->number)) == seen) pthread_cond_wait(&signal->grown, &signal->lock);
    atomic_fetch_sub(&signal->sleepers, 1);
    pthread_mutex_unlock(&signal->lock);
    return number;
}

static void grow(struct signal *signal) {
    atomic_fetch_add(&signal->number, 1);
    if (atomic_load(&signal->sleepers) == 0) return;
    pthread_mutex_lock(&signal->lock);
    pthread_cond_broadcast(&signal->grown);
    pthread_mutex_unlock(&signal->lock);
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
        seen = await(&job_given, seen, IDLE_SPINS);
        /* Every worker is counted, needed or not: so none can look at `job` when the next one is being written. */
        if (thread < job.threads) job.fn(job.arg, thread, job.threads);
        if (atomic_fetch_sub_explicit(&unfinished, 1, memory_order_acq_rel) == 1) grow(&job_done);
    }
    return NULL;
}

static void start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (started < wanted) {
        pthread_t thread;
        starts[started] = (struct start){started + 1, atomic_load(&job_given.number)};
        if (pthread_create(&thread, &attributes, work, &starts[started]) != 0) break;
        started++;
    }
    pthread_attr_destroy(&attributes);
}

static void reset(struct signal *signal) {
    atomic_store(&signal->sleepers, 0);
    pthread_mutex_init(&signal->lock, NULL);
    pthread_cond_init(&signal->grown, NULL);
}

static void forget_workers(void) { /* in the child of a fork: none of them came along */
    pthread_mutex_init(&busy, NULL);
    reset(&job_given);
    reset(&job_done);
    reset(&barrier_open);
    started = 0;
    atomic_store(&unfinished, 0);
    atomic_store(&arrived, 0);
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

int64_t fxq_least_share = 1 << 17;

int fxq_worthwhile(int64_t work, int64_t parts, int threads) {
    const int64_t worth = work / fxq_least_share + 1, most = worth < parts ? worth : parts;
    return most < 1 ? 1 : most < threads ? (int)most : threads < 1 ? 1 : threads;
}

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
    const unsigned done = atomic_load(&job_done.number);
    atomic_store(&unfinished, started);
    if (started > 0) grow(&job_given);
    fn(arg, 0, threads);
    if (started > 0) await(&job_done, done, WAIT_SPINS);
    pthread_mutex_unlock(&busy);
}

void fxq_barrier(int threads) {
    if (threads <= 1) return;
    const unsigned number = atomic_load_explicit(&barrier_open.number, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&arrived, 0, memory_order_relaxed);
        grow(&barrier_open);
    } else {
        await(&barrier_open, number, WAIT_SPINS);
    }
}
