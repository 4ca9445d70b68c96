/* The rounds of a job: which pieces are begun, and how many are done. See pool.h.
 *
 * Each thread's share of a round is one word, (round, first, end): its owner takes pieces from the front, others take
 * them from the back, each by one compare-and-swap. The word of an earlier round stands for a share that nobody has
 * touched yet, so nobody has to set up a round; the word of a later round says that this one is over. Rounds and done
 * pieces are counted on from job to job, so nothing has to be reset either. */
#include "runtime/crew.h"

static struct {
    _Alignas(64) _Atomic uint64_t word;
} shares[FXQ_MOST_THREADS];
static _Alignas(64) _Atomic uint64_t done; /* pieces, ever */
static uint32_t rounds_so_far;             /* before the running job; written by the thread that runs it */
static uint64_t due_so_far;

static uint64_t word_of(uint32_t round, int64_t first, int64_t end) {
    return (uint64_t)round << 32 | (uint64_t)first << 16 | (uint64_t)end;
}

static bool is_done(uint64_t due) { return (int64_t)(atomic_load(&done) - due) >= 0; }

/* Take a piece of a thread's share of this round; false if none is left. */
static bool take(const struct fxq_team *team, int owner, int64_t pieces, int64_t *piece) {
    _Atomic uint64_t *word = &shares[owner].word;
    uint64_t seen = atomic_load_explicit(word, memory_order_relaxed);
    for (;;) {
        const int32_t behind = (int32_t)(team->round - (uint32_t)(seen >> 32));
        if (behind < 0) return false;
        const int64_t first = behind ? pieces * owner / team->threads : (int64_t)(seen >> 16 & 0xffff);
        const int64_t end = behind ? pieces * (owner + 1) / team->threads : (int64_t)(seen & 0xffff);
        if (first == end) return false;
        const bool is_own = owner == team->thread;
        *piece = is_own ? first : end - 1;
        const uint64_t left = word_of(team->round, is_own ? first + 1 : first, is_own ? end : end - 1);
        if (atomic_compare_exchange_weak(word, &seen, left)) return true;
    }
}

void fxq_round(struct fxq_team *team, int64_t pieces, fxq_pieces fn, void *arg) {
    if (team->threads == 1) {
        if (pieces > 0) fn(arg, team->thread, 0, pieces);
        return;
    }
    team->round++;
    team->due += (uint64_t)pieces;
    if (is_done(team->due)) return;
    uint64_t own = 0;
    for (int i = 0; i < team->threads; i++) {
        const int owner = (team->thread + i) % team->threads;
        for (int64_t piece; take(team, owner, pieces, &piece); own++) fn(arg, team->thread, piece, piece + 1);
    }
    if (own && atomic_fetch_add(&done, own) + own == team->due) fxq_notify(fxq_round_waiters);
    else fxq_await(fxq_round_waiters, is_done, team->due);
}

void fxq_begin_rounds(struct fxq_team *team) {
    team->round = rounds_so_far;
    team->due = due_so_far;
}

static void touch_shares(void) {
    for (int i = 0; i < FXQ_MOST_THREADS; i++) atomic_store(&shares[i].word, word_of(rounds_so_far, 0, 0));
}

void fxq_end_rounds(const struct fxq_team *team) {
    const bool is_long_ago = team->round >> 30 != rounds_so_far >> 30;
    rounds_so_far = team->round;
    due_so_far = team->due;
    if (is_long_ago)
        touch_shares(); /* a share that no job has touched for 2^31 rounds would seem to be of a later one */
}

void fxq_reset_rounds(void) { /* in the child of a fork: a job may have been half done */
    touch_shares();
    atomic_store(&done, due_so_far);
}

void fxq_skip_rounds(uint32_t count) {
    const struct fxq_team team = {.round = rounds_so_far + count, .due = due_so_far};
    fxq_end_rounds(&team);
}
