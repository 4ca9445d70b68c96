/* The threads of torch's OpenMP. Between two float operators they spin on their cores for milliseconds, and a worker of
 * ours would have to fight one of them for its core; but they join a job of ours as quickly as one of torch's.
 *
 * The library is the one that is already loaded; nothing is linked. A team has as many threads as torch's (up to
 * FXQ_MOST_THREADS), since a smaller one makes GNU's library end the others. Its region ends when all of them have
 * come: pool.c measures what that takes. In the child of a fork the team's threads are gone and a region would wait for
 * them for ever, so there it is not used. */
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <string.h>
#endif
#include <pthread.h>
#include <stdlib.h>

#include "runtime/crew.h"

static void (*parallel)(void (*fn)(void *), void *arg, unsigned threads, unsigned flags); /* GOMP_parallel */
static int (*thread_number)(void);                                                        /* omp_get_thread_num */
static atomic_bool is_forgotten;

#if defined(__linux__)
static const char *const names[] = {"libgomp", "libiomp5", "libomp"}; /* the two others have GNU's entry point too */

static int look_at(struct dl_phdr_info *info, size_t size, void *found) {
    const char *path = info->dlpi_name, *file = path ? strrchr(path, '/') : NULL;
    (void)size;
    for (size_t i = 0; file && i < sizeof names / sizeof *names; i++) {
        const char *rest = file + 1 + strlen(names[i]);
        if (strncmp(file + 1, names[i], strlen(names[i])) != 0 || strncmp(rest, "-plugin", 7) == 0) continue;
        *(const char **)found = path;
        return strstr(path, "/torch/lib/") != NULL; /* else go on: another package may have brought this one */
    }
    return 0;
}

static void find_library(void) {
    const char *path = NULL, *setting = getenv("FXQUANT_OPENMP");
    if (setting && strcmp(setting, "0") == 0) return;
    dl_iterate_phdr(look_at, &path);
    void *library = path ? dlopen(path, RTLD_NOLOAD | RTLD_NOW) : NULL;
    if (library == NULL) return;
    *(void **)&thread_number = dlsym(library, "omp_get_thread_num");
    if (thread_number) *(void **)&parallel = dlsym(library, "GOMP_parallel");
}
#else
static void find_library(void) {}
#endif

bool fxq_has_openmp(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_library);
    return parallel != NULL && !atomic_load_explicit(&is_forgotten, memory_order_relaxed);
}

struct region {
    const struct fxq_offer *offer;
    struct fxq_team begin, end; /* with the rounds before it, and with its own */
    int64_t own_end;            /* when the caller had done its part */
};

static void join(void *arg) {
    struct region *region = arg;
    struct fxq_team team = region->begin;
    team.thread = thread_number();
    if (team.thread >= team.threads) return;
    if (team.thread > 0) {
        fxq_note_arrival();
        if (atomic_load_explicit(&fxq_holds_helpers, memory_order_relaxed)) return;
        atomic_fetch_add_explicit(&fxq_joined, 1, memory_order_relaxed);
    }
    region->offer->fn(region->offer->arg, &team);
    if (team.thread > 0) return;
    region->end = team;
    region->own_end = fxq_now_ns();
}

void fxq_run_with_openmp(const struct fxq_offer *offer) {
    struct region region = {.offer = offer, .begin = {.threads = offer->hands.threads}};
    fxq_begin_rounds(&region.begin);
    parallel(join, &region, (unsigned)offer->hands.available, 0);
    fxq_end_rounds(&region.end); /* by now nobody is inside */
    atomic_fetch_add(&fxq_waited_ns, fxq_now_ns() - region.own_end);
}

void fxq_forget_openmp(void) { atomic_store(&is_forgotten, true); }
