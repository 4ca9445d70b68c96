/* Who helps with a job: see pool.h.
 *
 * How long jobs of a size take, alone and shared, is remembered, and a job goes the way that is faster. Shared jobs
 * count with all that disturbed them, so on a machine whose cores are busy jobs are done alone by themselves; now and
 * then the other way is tried again, the sooner the less it lost so far.
 *
 * Each way to get help has its price: how long it took lately until somebody came, and how long threads then waited for
 * others that had lost their cores. It tells which way is the cheapest, and whether a job that was never shared is
 * worth it. Prices fall with time, so that a way is tried again. Waking pays for later jobs too, so what sleepers would
 * have saved is added up from job to job, as long as these follow each other closely.
 *
 * After fork() the child has no threads but its own, so it starts with an empty pool. */
#include <float.h>
#include <pthread.h>

#include "runtime/crew.h"

enum {
    CLOSE_NS = 300000, /* jobs so close follow each other: a worker would have stayed awake (workers.c) */
    MOST_PRICE_NS = 20000000,
    SIZES = 64,           /* of jobs that are remembered */
    STALE_NS = 100000000, /* after so long, or so many times its length, a job is done alone to see what that takes */
    STALE_TIMES = 200,
    SETTLED_NS = 20000000, /* after a shared job: so long it may slow down jobs that are done alone */
    DRIFT = 32,            /* lone jobs after which a slower time is believed */
    FIRST_TRIES = 4,
    MEAN_OF = 64,
    MEAN_OF_LOSSES = 8, /* where it loses again and again */
    PATIENCE = 4, /* lengths after which a job that is slower when shared is shared again; twice that for each loss, */
    MOST_LOSSES = 16,
    MOST_PATIENCE_NS = 400000000, /* and at most so long, or STALE_TIMES lengths */
    BAD = 16,                     /* times the usual price */
    SURE = 2                      /* a job must save so many prices */
};
/* OpenMP's price is the only one that the caller must pay in full, even if nobody comes: it is tried again less often.
 */
static const int64_t half_life_ns[FXQ_WAYS] = {
    [FXQ_READY] = 100000000, [FXQ_WAKING] = 100000000, [FXQ_OPENMP] = 500000000};
static const int64_t least_price_ns[FXQ_WAYS] = {[FXQ_READY] = 500, [FXQ_WAKING] = 15000, [FXQ_OPENMP] = 2000};

static pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER; /* held while a job runs; guards what follows */
static struct {
    int64_t price_ns[FXQ_WAYS], halved[FXQ_WAYS]; /* halved: when it was last */
    bool was_bad[FXQ_WAYS];
    int64_t missed_ns, ended;
    double ns_a_multiplication;
} habit = {.ns_a_multiplication = 0.01};

/* How long a job of this size takes, alone and shared, and when that was seen last; 0: never. tries: shared ones, the
 * first few. losses: two for each shared one that was slower than alone, halved by each that was not. has_waked:
 * somebody was woken for the last one, and that was not counted: it pays for those that follow. */
enum { ALONE, SHARED };
static struct experience {
    int64_t work;
    int threads;
    int64_t took[2], seen[2];
    int tries, losses;
    bool has_waked;
} experiences[SIZES];

_Atomic int64_t fxq_first_arrival, fxq_waited_ns;
atomic_bool fxq_holds_helpers;
_Atomic uint64_t fxq_joined, fxq_wakes, fxq_sleeps;
static _Atomic uint64_t jobs[FXQ_WAYS + 1];

int64_t fxq_least_share = 1 << 17;
enum fxq_way fxq_only_way = FXQ_WAYS;

struct fxq_hands fxq_worthwhile(int64_t work, int64_t parts, int available) {
    const int64_t worth = work / fxq_least_share + 1, most = worth < parts ? worth : parts;
    if (available > FXQ_MOST_THREADS) available = FXQ_MOST_THREADS;
    if (available < 1) available = 1;
    return (struct fxq_hands){most < 1 ? 1 : most < available ? (int)most : available, available};
}

int64_t fxq_piece_count(int64_t parts, struct fxq_hands hands) {
    const int64_t most = hands.threads > 1 ? 4 * (int64_t)hands.threads : 1;
    return parts < most ? parts : most;
}

void fxq_note_arrival(void) {
    int64_t nobody = 0;
    if (atomic_load_explicit(&fxq_first_arrival, memory_order_relaxed)) return;
    atomic_compare_exchange_strong(&fxq_first_arrival, &nobody, fxq_now_ns());
}

static int64_t price_of(enum fxq_way way, int64_t now) {
    int64_t *price = &habit.price_ns[way];
    while (*price > least_price_ns[way] && now - habit.halved[way] > half_life_ns[way]) {
        *price /= 2;
        habit.halved[way] += half_life_ns[way];
    }
    return *price = *price < least_price_ns[way] ? least_price_ns[way] : *price;
}

/* One bad price may be bad luck, and counts in part; two of them are none. */
static void note_price(enum fxq_way way, int64_t paid, int64_t now) {
    const int64_t usual = price_of(way, now);
    const bool is_bad = paid > BAD * usual;
    if (is_bad && !habit.was_bad[way]) paid = BAD * usual;
    if (paid > MOST_PRICE_NS) paid = MOST_PRICE_NS;
    habit.price_ns[way] = (3 * usual + paid) / 4;
    habit.halved[way] = now;
    habit.was_bad[way] = is_bad;
}

static struct experience *recall(int64_t work, int threads) {
    struct experience *found = &experiences[(uint64_t)work * 0x9e3779b97f4a7c15u >> 58];
    if (found->work != work || found->threads != threads)
        *found = (struct experience){.work = work, .threads = threads};
    return found;
}

static int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

/* The fastest that was seen lately. A machine whose cores are two threads of one, or that clocks them down together, is
 * slow for a while after shared jobs, so that one alone seems no faster: until then nothing slower is believed. */
static void remember_alone(struct experience *of, int64_t took, int64_t now) {
    const int64_t usual = of->took[ALONE], most = took < 2 * usual ? took : 2 * usual; /* beyond it is bad luck */
    if (!of->seen[ALONE] || took < usual) of->took[ALONE] = took;
    else if (now - of->seen[SHARED] > SETTLED_NS) of->took[ALONE] = usual + (most - usual) / DRIFT;
    of->seen[ALONE] = now;
}

/* A mean, outliers and all: one wait for a core that somebody else has costs as much as ten jobs gain. But the first
 * times that a job is shared say little, since workers sleep and pages are touched for the first time; nor does a bad
 * mean once good times have made up for the losses. */
static void remember_shared(struct experience *of, int64_t took, int64_t now) {
    const bool is_loss = of->seen[ALONE] && took > of->took[ALONE];
    int64_t *mean = &of->took[SHARED];
    of->losses = is_loss ? of->losses + 2 : of->losses / 2;
    if (of->losses > MOST_LOSSES) of->losses = MOST_LOSSES;
    const bool is_first = of->tries == 0 || (of->tries < FIRST_TRIES && took < *mean);
    const bool is_forgiven = of->losses == 0 && *mean > of->took[ALONE];
    const int64_t of_last = of->losses == MOST_LOSSES ? MEAN_OF_LOSSES : MEAN_OF;
    *mean = is_first ? took : is_forgiven ? (took + of->took[ALONE]) / 2 : *mean + (took - *mean) / of_last;
    of->seen[SHARED] = now;
    of->tries += of->tries < FIRST_TRIES;
}

/* Whether the job is faster alone, or nobody knows how long it takes alone. */
static bool is_better_alone(const struct experience *of, int64_t now) {
    if (!of->seen[SHARED]) return false;
    const int64_t length = of->took[ALONE], patience = (PATIENCE * length) << of->losses;
    const int64_t most = greater(MOST_PATIENCE_NS, STALE_TIMES * length);
    if (now - of->seen[ALONE] > greater(STALE_NS, STALE_TIMES * length)) return true;
    return length < of->took[SHARED] && now - of->seen[SHARED] < (patience < most ? patience : most);
}

/* What is known to be faster when shared is shared in the cheapest way, whatever that costs. */
static enum fxq_way choose_way(struct fxq_hands hands, const struct experience *of, int ready, int64_t now) {
    if (fxq_only_way != FXQ_WAYS) return fxq_only_way == FXQ_OPENMP && !fxq_has_openmp() ? FXQ_WAKING : fxq_only_way;
    if (is_better_alone(of, now)) return FXQ_ALONE;
    const double others = hands.threads - 1;
    const double alone_ns = of->seen[ALONE] ? (double)of->took[ALONE] : (double)of->work * habit.ns_a_multiplication;
    double most = of->seen[SHARED] ? -DBL_MAX : 0.0;
    enum fxq_way best = FXQ_ALONE;
    for (int way = 0; way < FXQ_WAYS; way++) {
        const int helpers = way == FXQ_READY ? ready : hands.threads - 1;
        if (helpers == 0 || (way == FXQ_WAKING && ready >= others) || (way == FXQ_OPENMP && !fxq_has_openmp()))
            continue;
        const double credit = way == FXQ_WAKING ? (double)habit.missed_ns : 0.0;
        const double saved = credit + alone_ns * helpers / (helpers + 1) - SURE * (double)price_of(way, now);
        if (saved > most) {
            most = saved;
            best = (enum fxq_way)way;
        }
    }
    return best;
}

/* What the job tells about the next: how long it takes, what the way cost, what sleepers would have saved. */
static void learn(enum fxq_way way, struct fxq_hands hands, struct experience *of, int ready, int64_t began) {
    const int64_t now = fxq_now_ns(), took = now - began, came = atomic_load(&fxq_first_arrival);
    const int threads = way == FXQ_ALONE || !came ? 1 : way == FXQ_READY ? ready + 1 : hands.threads;
    const double ns = (double)took * threads / (double)(of->work > 0 ? of->work : 1);
    habit.ns_a_multiplication += (ns - habit.ns_a_multiplication) / 8;
    of->has_waked = way == FXQ_WAKING && !of->has_waked && began - habit.ended < CLOSE_NS;
    if (way == FXQ_ALONE) remember_alone(of, took, now);
    else if (!of->has_waked) remember_shared(of, took, now);
    if (way != FXQ_ALONE) note_price(way, (came ? came - began : took) + atomic_load(&fxq_waited_ns), now);
    habit.missed_ns =
        way == FXQ_WAKING || way == FXQ_OPENMP ? 0 : habit.missed_ns + took * (hands.threads - threads) / hands.threads;
    habit.ended = now;
}

static void run_alone(const struct fxq_offer *offer) {
    struct fxq_team team = {.thread = 0, .threads = 1};
    offer->fn(offer->arg, &team);
}

static void forget_threads(void) { /* in the child of a fork: none came along */
    pthread_mutex_init(&busy, NULL);
    fxq_forget_workers();
    fxq_forget_openmp();
    fxq_reset_rounds();
}

static void ask_for_word(void) { pthread_atfork(NULL, NULL, forget_threads); }

void fxq_watch_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, ask_for_word);
}

void fxq_run(fxq_job fn, void *arg, struct fxq_hands hands, int64_t work) {
    const struct fxq_offer offer = {fn, arg, hands};
    if (hands.threads <= 1 || pthread_mutex_trylock(&busy) != 0) {
        run_alone(&offer);
        return;
    }
    const int ready = fxq_ready_workers(hands.threads);
    const int64_t began = fxq_now_ns();
    if (began - habit.ended > CLOSE_NS) habit.missed_ns = 0;
    struct experience *of = recall(work, hands.threads);
    const enum fxq_way way = choose_way(hands, of, ready, began);
    atomic_store(&fxq_first_arrival, 0);
    atomic_store(&fxq_waited_ns, 0);
    if (way == FXQ_ALONE) run_alone(&offer);
    else if (way == FXQ_OPENMP) fxq_run_with_openmp(&offer);
    else fxq_run_with_workers(&offer, way == FXQ_WAKING);
    learn(way, hands, of, ready, began);
    atomic_fetch_add_explicit(&jobs[way], 1, memory_order_relaxed);
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

static _Thread_local struct fxq_team *own_team; /* whose rounds this thread's splits are */

void fxq_split_within(struct fxq_team *team) { own_team = team; }

void fxq_split(fxq_pieces fn, void *arg, int64_t pieces, struct fxq_hands hands, int64_t work) {
    if (own_team) {
        fxq_round(own_team, pieces, fn, arg);
        return;
    }
    struct split split = {fn, arg, pieces};
    fxq_run(run_split, &split, hands, work);
}

void fxq_hold_helpers(bool holds) { atomic_store(&fxq_holds_helpers, holds); }

struct fxq_pool_counts fxq_count_pool(void) {
    struct fxq_pool_counts counts = {{0}, atomic_load(&fxq_joined), atomic_load(&fxq_wakes), atomic_load(&fxq_sleeps)};
    for (int way = 0; way <= FXQ_WAYS; way++) counts.jobs[way] = atomic_load(&jobs[way]);
    return counts;
}
