/* Threads that share a call's work.
 *
 * A job is a sequence of rounds. A round is some pieces of work: none needs another piece of its round, and any may need all
 * pieces of the rounds before. Each thread of the job's team runs the job's function, which walks through the same rounds in
 * the same order; in a round a thread does the pieces of its own share, then those that others have not begun. So nobody
 * waits for a thread that has not shown up: whoever comes late finds the rounds done and passes through them. A thread waits only for
 * pieces that another one is at. */
#ifndef FXQUANT_POOL_H
#define FXQUANT_POOL_H

#include <stdbool.h>
#include <stdint.h>

enum { FXQ_MOST_THREADS = 256, FXQ_MOST_PIECES = 1 << 16 };

/* A job as one of its threads sees it. */
struct fxq_team {
    int thread, threads;
    uint32_t round; /* the last one that this thread began */
    uint64_t due;   /* pieces of all rounds up to it */
};

typedef void (*fxq_job)(void *arg, struct fxq_team *team);
typedef void (*fxq_pieces)(void *arg, int thread, int64_t first, int64_t last);

/* How many of `threads` have enough to do: `work` multiplications between two rounds, in so many parts. */
int fxq_worthwhile(int64_t work, int64_t parts, int threads);
/* Into how many pieces to cut a round's `parts`: several a thread, since one may come late. */
int64_t fxq_piece_count(int64_t parts, int threads);
/* Run the job on this thread and up to threads - 1 more. work: multiplications in all, by which it is decided whether
 * sleeping threads are worth waking. One job runs at a time: whoever finds another one running does its own job alone. */
void fxq_run(fxq_job job, void *arg, int threads, int64_t work);
/* A job of one round. */
void fxq_split(fxq_pieces fn, void *arg, int64_t pieces, int threads, int64_t work);
/* Inside a job: see that each of the pieces [0, pieces) is done, pieces <= FXQ_MOST_PIECES. A thread alone does all of them in
 * one call of fn. */
void fxq_round(struct fxq_team *team, int64_t pieces, fxq_pieces fn, void *arg);

extern int64_t fxq_least_share; /* multiplications that repay a round; tests make it 1, and then wake at every job */
void fxq_hold_workers(bool holds); /* for tests: workers wake, but join no job */

/* What the pool has done so far. */
struct fxq_pool_counts {
    uint64_t jobs;      /* that were offered to other threads */
    uint64_t joined;    /* times that a worker joined one */
    uint64_t wakes;     /* workers woken */
    uint64_t sleeps;    /* waits that ended in sleep, of callers and workers */
};
struct fxq_pool_counts fxq_count_pool(void);

/* Between pool.c and rounds.c. */
struct fxq_waiters; /* threads that wait for the same thing */
extern struct fxq_waiters *const fxq_round_waiters;
void fxq_await(struct fxq_waiters *waiters, bool (*has_come)(uint64_t goal), uint64_t goal);
void fxq_notify(struct fxq_waiters *waiters);
void fxq_begin_rounds(struct fxq_team *team);
void fxq_end_rounds(const struct fxq_team *team);
void fxq_reset_rounds(void);

#endif
