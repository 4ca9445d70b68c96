/* What the files of the pool share: see pool.h. */
#ifndef FXQUANT_CREW_H
#define FXQUANT_CREW_H

#include <stdatomic.h>

#include "runtime/pool.h"

/* A job that others may join. */
struct fxq_offer {
    fxq_job fn;
    void *arg;
    struct fxq_hands hands;
};

int64_t fxq_now_ns(void);

/* Threads that wait for the same thing. */
struct fxq_waiters;
extern struct fxq_waiters *const fxq_round_waiters;
void fxq_await(struct fxq_waiters *waiters, bool (*has_come)(uint64_t goal), uint64_t goal); /* spin, then sleep */
void fxq_notify(struct fxq_waiters *waiters);

/* rounds.c. Before and after a job, by the thread whose job it is; others begin only. */
void fxq_begin_rounds(struct fxq_team *team);
void fxq_end_rounds(const struct fxq_team *team);
void fxq_reset_rounds(void);

/* Of the job that runs: when the first helper came, 0 if none has; and for how long threads slept for want of others.
 */
void fxq_note_arrival(void);
extern _Atomic int64_t fxq_first_arrival, fxq_waited_ns;
extern atomic_bool fxq_holds_helpers;
extern _Atomic uint64_t fxq_joined, fxq_wakes, fxq_sleeps;

/* workers.c */
int fxq_ready_workers(int threads); /* how many of the first threads - 1 spin, or are still busy */
void fxq_run_with_workers(const struct fxq_offer *offer, bool wakes);
void fxq_forget_workers(void);

/* openmp.c */
void fxq_run_with_openmp(const struct fxq_offer *offer);
void fxq_forget_openmp(void);

#endif
