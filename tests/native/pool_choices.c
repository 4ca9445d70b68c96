/* The pool's choices, with a clock and helpers that are made up: nothing here depends on the machine. argv: a scene.
 * Prints how many of JOBS jobs, which follow each other closely, went each way, and what they took together, in us.
 * Used by test_pool_choices.py. */
#include <stdio.h>
#include <string.h>

#include "runtime/pool.c"

enum {
    JOBS = 2000,
    ALONE_NS = 400000,
    SHARED_NS = 220000,
    WAKE_NS = 40000,
    STALL_NS = 4000000,
    GAP_NS = 20000,
    SLOWED_NS = 20000000
};

static int64_t now_ns = 1000000000000;
static const char *scene;
static int shared_so_far;
static bool is_awake;
static int64_t last_shared_ns;

int64_t fxq_now_ns(void) { return now_ns; }
int fxq_ready_workers(int threads) { return is_awake ? threads - 1 : 0; }
bool fxq_has_openmp(void) { return false; }
void fxq_run_with_openmp(const struct fxq_offer *offer) { (void)offer; }
void fxq_round(struct fxq_team *team, int64_t pieces, fxq_pieces fn, void *arg) {
    (void)team, (void)pieces, (void)fn, (void)arg;
}
void fxq_forget_workers(void) {}
void fxq_forget_openmp(void) {}
void fxq_reset_rounds(void) {}

/* A job alone is run by the pool itself; shared it comes here. */
void fxq_run_with_workers(const struct fxq_offer *offer, bool wakes) {
    const int64_t began = now_ns;
    int64_t took = SHARED_NS + (wakes ? WAKE_NS : 0);
    (void)offer;
    shared_so_far++;
    is_awake = strcmp(scene, "sleepy") != 0;
    if (strcmp(scene, "cold") == 0 && shared_so_far <= 2) took = 5 * ALONE_NS;
    if (strcmp(scene, "disturbed") == 0 && shared_so_far % 100 < 2) took += STALL_NS;
    if (strcmp(scene, "busy") == 0 && shared_so_far % 4) took += STALL_NS;
    if (strcmp(scene, "useless") == 0) took = ALONE_NS * 3 / 2;
    if (strcmp(scene, "siblings") == 0 && shared_so_far > 200) took = ALONE_NS * 5 / 4;
    atomic_store(&fxq_first_arrival, began + (wakes ? WAKE_NS : 500));
    if (took > ALONE_NS) atomic_store(&fxq_waited_ns, took - ALONE_NS);
    last_shared_ns = now_ns += took;
}

static void job(void *arg, struct fxq_team *team) {
    (void)arg, (void)team;
    const bool is_slowed = shared_so_far > 200 && now_ns - last_shared_ns < SLOWED_NS; /* by what came before */
    now_ns += strcmp(scene, "siblings") == 0 && is_slowed ? ALONE_NS * 13 / 10 : ALONE_NS;
}

int main(int count, char **arguments) {
    int64_t took = 0;
    scene = count > 1 ? arguments[1] : "";
    for (int i = 0; i < JOBS; i++, now_ns += GAP_NS) {
        const int64_t began = now_ns;
        fxq_run(job, NULL, (struct fxq_hands){2, 2}, 40000000);
        took += now_ns - began;
    }
    const struct fxq_pool_counts counts = fxq_count_pool();
    printf("%d %d %d %lld\n", (int)counts.jobs[FXQ_READY], (int)counts.jobs[FXQ_WAKING], (int)counts.jobs[FXQ_ALONE],
           (long long)took / 1000);
    return 0;
}
