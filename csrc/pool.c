/* The worker threads: when they are woken, how they join a job and leave it. See pool.h.
 *
 * The gate is one word, (job, threads, open, inside). The caller opens it with the next job's number, does what it can, closes it,
 * and waits only for workers that are inside. A worker enters by counting itself in while the gate is open.
 *
 * An idle worker spins for a while, since the operators of a model follow each other closely, and lets others have its core
 * while it does (torch's own OpenMP threads spin too). Then it sleeps. Waking it costs a system call here and some tens of
 * microseconds until it comes, so a job alone is worth that only if it is long; but the time that sleepers would have saved
 * is added up from job to job, and once it exceeds the price they are woken. The price is how long they took to come the last
 * times: on a machine whose cores are busy it rises by itself. Time is read from a clock, never counted in pauses: a pause is
 * 40 cycles on one processor and 140 on another.
 *
 * After fork() the child has no workers, so it starts with an empty pool. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

#if defined(__x86_64__) || defined(__i386__)
#define pause_briefly() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_briefly() __asm__ volatile("yield")
#else
#define pause_briefly() ((void)0)
#endif

enum {
    IDLE_NS = 100000,       /* a worker spins so long for the next job */
    WAIT_NS = 50000,        /* a thread in a job so long for a piece that another one is at */
    LOST_CORE_NS = 30000,   /* between two looks at the clock: somebody else had the core */
    FIRST_PRICE_NS = 50000, /* of waking, before it was ever measured */
    LEAST_PRICE_NS = 10000,
    MOST_PRICE_NS = 20000000,
    LOOKS = 32              /* between two looks at the clock */
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

static struct {
    fxq_job fn;
    void *arg;
    bool wakes;
} job; /* written while the gate is closed and nobody inside */

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held while a job runs; guards what follows */
static int started;                                      /* workers that exist */
static struct {
    int64_t price_ns, missed_ns, ended; /* missed: what sleepers would have saved lately */
    int64_t asked;                      /* when they were woken the last time, 0 once it is known when they came */
    double ns_a_multiplication;
} habit = {.price_ns = FIRST_PRICE_NS, .ns_a_multiplication = 0.01};

static atomic_int awake;      /* workers that spin or work */
static _Atomic int64_t came;  /* when the first of those who were woken came */
static atomic_bool is_held;
static _Atomic uint64_t jobs, joined, wakes, sleeps;

int64_t fxq_least_share = 1 << 17;

static int64_t now_ns(void) {
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
    for (int64_t now = now_ns(), end = now + spin_ns, before = now; now < end; before = now) {
        for (int i = 0; i < LOOKS; i++) {
            if (has_come(goal)) return true;
            pause_briefly();
        }
        if (is_polite) sched_yield();
        now = now_ns();
        if (is_polite && now - before > LOST_CORE_NS) return has_come(goal);
    }
    return false;
}

/* Sleep until it has come: `asleep` is sequentially consistent, so either we see the change or notify() sees us. */
static void sleep_until(struct fxq_waiters *waiters, bool (*has_come)(uint64_t), uint64_t goal) {
    pthread_mutex_lock(&waiters->lock);
    atomic_fetch_add(&waiters->asleep, 1);
    atomic_fetch_add_explicit(&sleeps, 1, memory_order_relaxed);
    while (!has_come(goal)) pthread_cond_wait(&waiters->changed, &waiters->lock);
    atomic_fetch_sub(&waiters->asleep, 1);
    pthread_mutex_unlock(&waiters->lock);
}

void fxq_await(struct fxq_waiters *waiters, bool (*has_come)(uint64_t), uint64_t goal) {
    if (!spin(has_come, goal, WAIT_NS, false)) sleep_until(waiters, has_come, goal);
}

void fxq_notify(struct fxq_waiters *waiters) {
    if (atomic_load(&waiters->asleep) == 0) return;
    pthread_mutex_lock(&waiters->lock);
    pthread_cond_broadcast(&waiters->changed);
    pthread_mutex_unlock(&waiters->lock);
}

static bool is_new_job(uint64_t seen) { return number_in(atomic_load(&gate)) != seen; }
static bool is_empty(uint64_t unused) {
    (void)unused;
    return inside_of(atomic_load(&gate)) == 0;
}

/* Wake whom this thread is to wake, so that many are woken side by side. */
static void wake_two(int thread, int threads) {
    for (int i = 2 * thread + 1; i <= 2 * thread + 2 && i < threads; i++) {
        if (atomic_load(&idle[i].asleep) == 0) continue;
        atomic_fetch_add_explicit(&wakes, 1, memory_order_relaxed);
        fxq_notify(&idle[i]);
    }
}

static bool enter(int thread) {
    uint64_t word = atomic_load(&gate);
    while ((word & OPEN) && thread < threads_in(word) && !atomic_load_explicit(&is_held, memory_order_relaxed)) {
        if (atomic_compare_exchange_weak(&gate, &word, word + 1)) return true;
    }
    return false;
}

static void take_part(int thread) {
    struct fxq_team team = {.thread = thread, .threads = threads_in(atomic_load(&gate))};
    if (job.wakes) wake_two(thread, team.threads);
    atomic_fetch_add_explicit(&joined, 1, memory_order_relaxed);
    fxq_begin_rounds(&team);
    job.fn(job.arg, &team);
    const uint64_t word = atomic_fetch_sub(&gate, 1);
    if (!(word & OPEN) && inside_of(word) == 1) fxq_notify(&for_leaving);
}

static void note_coming(void) {
    int64_t nobody = 0;
    atomic_compare_exchange_strong(&came, &nobody, now_ns());
}

static void *work(void *arg) {
    const int thread = (int)(intptr_t)arg;
    uint64_t seen = number_in(atomic_load(&gate)) - 1; /* the job that it was started for may be open already */
    note_coming();
    for (;;) {
        if (!spin(is_new_job, seen, IDLE_NS, true)) {
            atomic_fetch_sub(&awake, 1);
            sleep_until(&idle[thread], is_new_job, seen);
            atomic_fetch_add(&awake, 1);
            note_coming();
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
        struct fxq_waiters *own = &idle[started + 1];
        pthread_mutex_init(&own->lock, NULL);
        pthread_cond_init(&own->changed, NULL);
        atomic_store(&own->asleep, 0);
        atomic_fetch_add(&awake, 1);
        if (pthread_create(&thread, &attributes, work, (void *)(intptr_t)(started + 1)) != 0) {
            atomic_fetch_sub(&awake, 1);
            break;
        }
        started++;
    }
    pthread_attr_destroy(&attributes);
}

static void reset(struct fxq_waiters *waiters) {
    atomic_store(&waiters->asleep, 0);
    pthread_mutex_init(&waiters->lock, NULL);
    pthread_cond_init(&waiters->changed, NULL);
}

static void forget_workers(void) { /* in the child of a fork: none of them came along */
    pthread_mutex_init(&busy, NULL);
    reset(&for_round);
    reset(&for_leaving);
    started = 0;
    atomic_store(&awake, 0);
    atomic_store(&gate, number_in(atomic_load(&gate)) << 32);
    fxq_reset_rounds();
}

static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

int fxq_worthwhile(int64_t work, int64_t parts, int threads) {
    const int64_t worth = work / fxq_least_share + 1, most = worth < parts ? worth : parts;
    if (threads > FXQ_MOST_THREADS) threads = FXQ_MOST_THREADS;
    return most < 1 ? 1 : most < threads ? (int)most : threads < 1 ? 1 : threads;
}

int64_t fxq_piece_count(int64_t parts, int threads) {
    const int64_t most = threads > 1 ? 4 * (int64_t)threads : 1;
    return parts < most ? parts : most;
}

/* Whether to wake those who sleep for a job of so much work. */
static bool repays_waking(int64_t work, int threads, int ready) {
    if (fxq_least_share == 1) return true;
    const double alone_ns = (double)work * habit.ns_a_multiplication;
    return (double)habit.missed_ns + alone_ns * (threads - 1 - ready) / threads > 2.0 * (double)habit.price_ns;
}

/* What a job tells that some threads slept through. */
static void note_missed(int64_t began, int64_t work, int threads, int ready) {
    const int64_t now = now_ns();
    const double ns = (double)(now - began) * (ready + 1) / (double)(work > 0 ? work : 1);
    habit.ns_a_multiplication += (ns - habit.ns_a_multiplication) / 8;
    habit.missed_ns += (now - began) * (threads - 1 - ready) / threads;
    habit.ended = now;
}

/* How long it took until those came who were woken the last time. */
static void note_price(int64_t now) {
    const int64_t when = atomic_load(&came);
    const int64_t took = when ? when - habit.asked : now - habit.asked, price = (habit.price_ns + took) / 2;
    if (when == 0 && price < habit.price_ns) return; /* not yet known */
    habit.price_ns = price < LEAST_PRICE_NS ? LEAST_PRICE_NS : price > MOST_PRICE_NS ? MOST_PRICE_NS : price;
    if (when) habit.asked = 0;
}

static void run_alone(fxq_job fn, void *arg) {
    struct fxq_team alone = {.thread = 0, .threads = 1};
    fn(arg, &alone);
}

static void run_together(fxq_job fn, void *arg, int threads, bool wakes_others) {
    struct fxq_team team = {.thread = 0, .threads = threads};
    job.fn = fn;
    job.arg = arg;
    job.wakes = wakes_others;
    fxq_begin_rounds(&team);
    const uint64_t number = (number_in(atomic_load(&gate)) + 1) & 0xffffffff;
    atomic_store(&gate, number << 32 | (uint64_t)threads << 17 | OPEN);
    if (wakes_others) wake_two(0, threads);
    fn(arg, &team);
    if (inside_of(atomic_fetch_and(&gate, ~OPEN)) > 0) fxq_await(&for_leaving, is_empty, 0);
    fxq_end_rounds(&team);
    atomic_fetch_add_explicit(&jobs, 1, memory_order_relaxed);
}

void fxq_run(fxq_job fn, void *arg, int threads, int64_t work) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    if (threads > FXQ_MOST_THREADS) threads = FXQ_MOST_THREADS;
    if (threads <= 1 || pthread_mutex_trylock(&busy) != 0) {
        run_alone(fn, arg);
        return;
    }
    pthread_once(&once, watch_forks);
    const int others = threads - 1, here = atomic_load(&awake), ready = here < others ? here : others;
    if (ready == others) {
        run_together(fn, arg, threads, false);
        pthread_mutex_unlock(&busy);
        return;
    }
    const int64_t began = now_ns();
    if (began - habit.ended > IDLE_NS) habit.missed_ns = 0; /* by now they would have slept again */
    if (habit.asked) note_price(began);
    const bool wakes_others = repays_waking(work, threads, ready);
    if (wakes_others) {
        habit.missed_ns = 0;
        habit.asked = began;
        atomic_store(&came, 0);
        start_workers(others);
    }
    if (ready > 0 || wakes_others) run_together(fn, arg, threads, wakes_others);
    else run_alone(fn, arg);
    if (!wakes_others) note_missed(began, work, threads, ready);
    pthread_mutex_unlock(&busy);
}

struct split {
    fxq_pieces fn;
    void *arg;
    int64_t pieces;
};

static void run_split(void *arg, struct fxq_team *team) {
    const struct split *split = arg;
    fxq_round(team, split->pieces, split->fn, split->arg);
}

void fxq_split(fxq_pieces fn, void *arg, int64_t pieces, int threads, int64_t work) {
    struct split split = {fn, arg, pieces};
    fxq_run(run_split, &split, threads, work);
}

void fxq_hold_workers(bool holds) { atomic_store(&is_held, holds); }

struct fxq_pool_counts fxq_count_pool(void) {
    return (struct fxq_pool_counts){atomic_load(&jobs), atomic_load(&joined), atomic_load(&wakes), atomic_load(&sleeps)};
}
