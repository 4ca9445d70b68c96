/* Threads of our own: how they wait for a job, join it and leave it. See pool.h.
 *
 * The gate is one word, (job, threads, open, inside). The caller opens it with the next job's number, does what it can,
 * closes it, and waits only for workers that are inside. A worker enters by counting itself in while the gate is open.
 *
 * An idle worker spins for a while, since the operators of a model follow each other closely, and lets others have its
 * core while it does. Then it sleeps. Time is read from a clock, never counted in pauses: a pause is 40 cycles on one
 * processor and 140 on another. */
#include <pthread.h>
#include <sched.h>
#include <time.h>

#include "runtime/crew.h"

#if defined(__x86_64__) || defined(__i386__)
#define pause_briefly() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("yield")
#else
#define pause_briefly() ((void)0)
#endif

enum {
    IDLE_NS = 300000,     /* a worker spins so long for the next job */
    WAIT_NS = 50000,      /* a thread in a job so long for a piece that another one is at */
    LOST_CORE_NS = 30000, /* between two looks at the clock: somebody else had the core */
    LOOKS = 32            /* between two looks at the clock */
};

struct fxq_waiters {
    _Alignas(64) atomic_int asleep;
    pthread_mutex_t lock;
    pthread_cond_t changed;
};
#define NO_WAITERS {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER}

static struct fxq_waiters for_round = NO_WAITERS, for_leaving = NO_WAITERS;
static struct fxq_waiters idle[FXQ_MOST_THREADS]; /* each worker by itself; 0, the caller, has none */
struct fxq_waiters *const fxq_round_waiters = &for_round;

static _Alignas(64) _Atomic uint64_t gate; /* number << 32 | threads << 17 | open << 16 | inside */
#define OPEN ((uint64_t)1 << 16)
static uint64_t number_in(uint64_t word) { return word >> 32; }
static int threads_in(uint64_t word) { return (int)(word >> 17 & 0x7fff); }
static int inside_of(uint64_t word) { return (int)(word & 0xffff); }

static struct fxq_offer job; /* written while the gate is closed and nobody inside, like the next */
static bool wakes_others;
static int started;                            /* workers that exist; touched by the thread alone that holds the pool */
static atomic_bool is_awake[FXQ_MOST_THREADS]; /* each worker: whether it spins or works */

int64_t fxq_now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * (int64_t)1000000000 + time.tv_nsec;
}

/* Spin until it has come, for spin_ns at most, or until a polite waiter sees that somebody else wants its core. */
static bool spin(bool (*has_come)(uint64_t), uint64_t goal, int64_t spin_ns, bool is_polite) {
    for (int i = 0; i < LOOKS; i++) {
        if (has_come(goal)) return true;
        pause_briefly();
    }
    for (int64_t now = fxq_now_ns(), end = now + spin_ns, before = now; now < end; before = now) {
        for (int i = 0; i < LOOKS; i++) {
            if (has_come(goal)) return true;
            pause_briefly();
        }
        if (is_polite) sched_yield();
        now = fxq_now_ns();
        if (is_polite && now - before > LOST_CORE_NS) return has_come(goal);
    }
    return false;
}

/* Sleep until it has come: `asleep` is sequentially consistent, so either we see the change or fxq_notify() sees us. */
static void sleep_until(struct fxq_waiters *waiters, bool (*has_come)(uint64_t), uint64_t goal) {
    pthread_mutex_lock(&waiters->lock);
    atomic_fetch_add(&waiters->asleep, 1);
    atomic_fetch_add_explicit(&fxq_sleeps, 1, memory_order_relaxed);
    while (!has_come(goal)) pthread_cond_wait(&waiters->changed, &waiters->lock);
    atomic_fetch_sub(&waiters->asleep, 1);
    pthread_mutex_unlock(&waiters->lock);
}

void fxq_await(struct fxq_waiters *waiters, bool (*has_come)(uint64_t), uint64_t goal) {
    if (spin(has_come, goal, WAIT_NS, false)) return;
    const int64_t began = fxq_now_ns();
    sleep_until(waiters, has_come, goal);
    atomic_fetch_add(&fxq_waited_ns, WAIT_NS + fxq_now_ns() - began);
}

void fxq_notify(struct fxq_waiters *waiters) {
    if (atomic_load(&waiters->asleep) == 0) return;
    pthread_mutex_lock(&waiters->lock);
    pthread_cond_broadcast(&waiters->changed);
    pthread_mutex_unlock(&waiters->lock);
}

static void reset(struct fxq_waiters *waiters) {
    atomic_store(&waiters->asleep, 0);
    pthread_mutex_init(&waiters->lock, NULL);
    pthread_cond_init(&waiters->changed, NULL);
}

/* Whether there is another job than the one that was seen, and for as many threads that this one may join. */
static bool is_new_job(uint64_t seen) {
    const uint64_t word = atomic_load(&gate);
    return number_in(word) != seen >> 16 && threads_in(word) > (int)(seen & 0xffff);
}
static bool is_empty(uint64_t unused) {
    (void)unused;
    return inside_of(atomic_load(&gate)) == 0;
}

/* Wake whom this thread is to wake, so that many are woken side by side. */
static void wake_two(int thread, int threads) {
    for (int i = 2 * thread + 1; i <= 2 * thread + 2 && i < threads; i++) {
        if (i > started || atomic_load(&idle[i].asleep) == 0) continue;
        atomic_fetch_add_explicit(&fxq_wakes, 1, memory_order_relaxed);
        fxq_notify(&idle[i]);
    }
}

static bool enter(int thread) {
    uint64_t word = atomic_load(&gate);
    while ((word & OPEN) && thread < threads_in(word) &&
           !atomic_load_explicit(&fxq_holds_helpers, memory_order_relaxed)) {
        if (atomic_compare_exchange_weak(&gate, &word, word + 1)) return true;
    }
    return false;
}

static void take_part(int thread) {
    struct fxq_team team = {.thread = thread, .threads = job.hands.threads};
    if (wakes_others) wake_two(thread, team.threads);
    fxq_note_arrival();
    atomic_fetch_add_explicit(&fxq_joined, 1, memory_order_relaxed);
    fxq_begin_rounds(&team);
    job.fn(job.arg, &team);
    const uint64_t word = atomic_fetch_sub(&gate, 1);
    if (!(word & OPEN) && inside_of(word) == 1) fxq_notify(&for_leaving);
}

static void *work(void *arg) {
    const int thread = (int)(intptr_t)arg;
    uint64_t seen = number_in(atomic_load(&gate)) - 1; /* the job that it was started for may be open already */
    for (;;) {
        const uint64_t goal = (seen & 0xffffffff) << 16 | (uint64_t)thread;
        if (!spin(is_new_job, goal, IDLE_NS, true)) {
            atomic_store(&is_awake[thread], false);
            sleep_until(&idle[thread], is_new_job, goal);
            atomic_store(&is_awake[thread], true);
        }
        seen = number_in(atomic_load(&gate));
        if (enter(thread)) take_part(thread);
    }
    return NULL;
}

static void start_workers(int wanted) {
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    while (started < wanted) {
        pthread_t thread;
        reset(&idle[started + 1]);
        atomic_store(&is_awake[started + 1], true);
        if (pthread_create(&thread, &attributes, work, (void *)(intptr_t)(started + 1)) != 0) {
            atomic_store(&is_awake[started + 1], false);
            break;
        }
        started++;
    }
    pthread_attr_destroy(&attributes);
}

int fxq_ready_workers(int threads) {
    int ready = 0;
    for (int i = 1; i < threads && i <= started; i++) ready += atomic_load_explicit(&is_awake[i], memory_order_relaxed);
    return ready;
}

void fxq_run_with_workers(const struct fxq_offer *offer, bool wakes) {
    struct fxq_team team = {.thread = 0, .threads = offer->hands.threads};
    if (wakes) start_workers(team.threads - 1);
    job = *offer;
    wakes_others = wakes;
    fxq_begin_rounds(&team);
    const uint64_t number = (number_in(atomic_load(&gate)) + 1) & 0xffffffff;
    atomic_store(&gate, number << 32 | (uint64_t)team.threads << 17 | OPEN);
    if (wakes) wake_two(0, team.threads);
    offer->fn(offer->arg, &team);
    if (inside_of(atomic_fetch_and(&gate, ~OPEN)) > 0) fxq_await(&for_leaving, is_empty, 0);
    fxq_end_rounds(&team);
}

void fxq_forget_workers(void) {
    reset(&for_round);
    reset(&for_leaving);
    started = 0;
    for (int i = 0; i < FXQ_MOST_THREADS; i++) atomic_store(&is_awake[i], false);
    atomic_store(&gate, number_in(atomic_load(&gate)) << 32);
}
