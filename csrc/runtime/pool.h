/* Threads that share a call's work.
 *
 * A job is a sequence of rounds. A round is some pieces of work: none needs another piece of its round, and any may
 * need all pieces of the rounds before. Each thread of the job's team runs the job's function, which walks through the
 * same rounds in the same order; in a round a thread does the pieces of its own share, then those that others have not
 * begun. So nobody waits for a thread that has not shown up: whoever comes late finds the rounds done and passes
 * through them. A thread waits only for pieces that another one is at.
 *
 * Who includes whom: pool.c decides who helps with a job, workers.c has threads of our own, openmp.c borrows torch's,
 * rounds.c shares out the pieces; crew.h is what these four share, and this file what everybody else needs. */
#ifndef FXQUANT_POOL_H
#define FXQUANT_POOL_H

#include <stdbool.h>
#include <stdint.h>

#pragma GCC visibility push(default)

enum { FXQ_MOST_THREADS = 256, FXQ_MOST_PIECES = (1 << 16) - 1 };

/* A job as one of its threads sees it. */
struct fxq_team {
    int thread, threads;
    uint32_t round; /* the last one that this thread began */
    uint64_t due;   /* pieces of all rounds up to it */
};

typedef void (*fxq_job)(void *arg, struct fxq_team *team);
typedef void (*fxq_pieces)(void *arg, int thread, int64_t first, int64_t last);

/* How many threads a job is cut for, of those that there may be. */
struct fxq_hands {
    int threads, available;
};

/* How many of the available threads have enough to do: `work` multiplications between two rounds, in so many parts. */
struct fxq_hands fxq_worthwhile(int64_t work, int64_t parts, int available);
/* Into how many pieces to cut a round's `parts`: several a thread, since one may come late. */
int64_t fxq_piece_count(int64_t parts, struct fxq_hands hands);
/* Run the job on this thread and up to hands.threads - 1 more. work: multiplications in all, by which it is decided
 * whether others are worth calling. One job runs at a time: whoever finds another one running does its own job alone.
 */
void fxq_run(fxq_job job, void *arg, struct fxq_hands hands, int64_t work);
/* A job of one round. */
void fxq_split(fxq_pieces fn, void *arg, int64_t pieces, struct fxq_hands hands, int64_t work);
/* Inside a job, by each of its threads: from here on, what this thread splits is a round of the job. All threads split
 * the same things in the same order, cut alike, each with an arg of its own that says the same. NULL: no longer. */
void fxq_split_within(struct fxq_team *team);
/* Inside a job: see that each of the pieces [0, pieces) is done, pieces <= FXQ_MOST_PIECES. A thread alone does all of
 * them in one call of fn. */
void fxq_round(struct fxq_team *team, int64_t pieces, fxq_pieces fn, void *arg);

/* Before the first fork of a process that uses the pool: torch's threads too are gone in the child. */
void fxq_watch_forks(void);

/* Who helps with a job: workers that spin, workers that must be woken first, or the team of torch's OpenMP. */
enum fxq_way { FXQ_READY, FXQ_WAKING, FXQ_OPENMP, FXQ_WAYS, FXQ_ALONE = FXQ_WAYS };

/* For tests: multiplications that a thread must have to repay a round, 1 for the smallest jobs too; one way for all
 * jobs (FXQ_WAYS: the cheapest); and workers and OpenMP's threads that come, but join no job. */
extern int64_t fxq_least_share;
extern enum fxq_way fxq_only_way;
void fxq_hold_helpers(bool holds);
void fxq_skip_rounds(uint32_t count); /* as if jobs of so many rounds had come and gone, which touched no share */
bool fxq_has_openmp(void);

/* What the pool has done so far. */
struct fxq_pool_counts {
    uint64_t jobs[FXQ_WAYS + 1]; /* by the way they went, jobs alone that could have been shared last */
    uint64_t joined;             /* times that a thread joined another one's job */
    uint64_t wakes;              /* workers woken */
    uint64_t sleeps;             /* waits that ended in sleep, of callers and workers */
};
struct fxq_pool_counts fxq_count_pool(void);

#pragma GCC visibility pop

#endif
