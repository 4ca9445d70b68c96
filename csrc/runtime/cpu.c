/* Which instruction sets this processor and operating system allow, and the choice among them. */
#include "runtime/isa.h"
#include "runtime/pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

const struct fxq_kernels *fxq_active = &fxq_portable;

#if defined(__x86_64__)

struct x86 {
    bool avx2, fma_f16c, avx_vnni, avx512_vnni, amx; /* the processor's word */
    bool ymm, zmm, tiles;                            /* the operating system saves these registers */
};

static struct x86 read_x86(void) {
    struct x86 cpu = {0};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return cpu; /* no XGETBV */
    cpu.fma_f16c = (c >> 12 & 1) && (c >> 29 & 1);
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.ymm = (low & 0x6) == 0x6;
    cpu.zmm = (low & 0xe6) == 0xe6;
    cpu.tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
    cpu.avx2 = b >> 5 & 1;
    const bool avx512 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1); /* F, DQ, BW, VL */
    cpu.avx512_vnni = avx512 && (c >> 11 & 1);
    cpu.amx = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1); /* bfloat16, tiles, int8 */
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx_vnni = a >> 4 & 1;
    return cpu;
}

/* Linux gives a process the tile registers only when it asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA). */
static bool ask_for_tiles(void) {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

static const char *avx2_obstacle(void) {
    const struct x86 cpu = read_x86();
    if (!cpu.avx2 || !cpu.fma_f16c) return "the processor has no AVX2, FMA and F16C";
    return cpu.ymm ? "" : "the operating system does not save AVX registers";
}

static const char *avx_vnni_obstacle(void) {
    if (*avx2_obstacle()) return avx2_obstacle();
    return read_x86().avx_vnni ? "" : "the processor has no AVX-VNNI";
}

static const char *avx512_obstacle(void) {
    const struct x86 cpu = read_x86();
    if (!cpu.avx512_vnni) return "the processor has no AVX512-VNNI";
    return cpu.zmm ? "" : "the operating system does not save AVX512 registers";
}

static const char *amx_obstacle(void) {
    const struct x86 cpu = read_x86();
    if (!cpu.amx) return "the processor has no AMX for int8 and bfloat16";
    if (*avx512_obstacle()) return avx512_obstacle();
    if (!cpu.tiles) return "the operating system does not save AMX tiles";
    return ask_for_tiles() ? "" : "the operating system refuses this process the AMX tiles";
}
#endif

#ifdef FXQ_HAS_NEON_DOT
static const char *neon_dot_obstacle(void) {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP ? "" : "the processor has no dot product instructions";
#elif defined(__ARM_FEATURE_DOTPROD)
    return "";
#else
    return "the compiler was not told of dot product instructions";
#endif
}
#endif

static const char *no_obstacle(void) { return ""; }

#if defined(__x86_64__) && !(defined(FXQ_HAS_AVX2) && defined(FXQ_HAS_VNNI_AND_AMX))
static const char *old_compiler(void) { return "the compiler that built the library does not know it"; }
#endif

static const struct {
    const char *name;
    const struct fxq_kernels *kernels;
    const char *(*obstacle)(void);
} sets[] = {
#if defined(FXQ_HAS_VNNI_AND_AMX)
    {"amx", &fxq_amx, amx_obstacle},
    {"avx512_vnni", &fxq_avx512_vnni, avx512_obstacle},
    {"avx_vnni", &fxq_avx_vnni, avx_vnni_obstacle},
#elif defined(__x86_64__)
    {"amx", NULL, old_compiler},
    {"avx512_vnni", NULL, old_compiler},
    {"avx_vnni", NULL, old_compiler},
#endif
#if defined(FXQ_HAS_AVX2)
    {"avx2", &fxq_avx2, avx2_obstacle},
#elif defined(__x86_64__)
    {"avx2", NULL, old_compiler},
#endif
#if defined(FXQ_HAS_NEON_DOT)
    {"neon_dot", &fxq_neon_dot, neon_dot_obstacle},
#endif
    {"portable", &fxq_portable, no_obstacle},
};

int fxq_isa_count(void) { return sizeof sets / sizeof *sets; }

const char *fxq_isa_name(int index) { return sets[index].name; }

const char *fxq_isa_obstacle(int index) { return sets[index].obstacle(); }

bool fxq_select_isa(int index) {
    for (int i = index < 0 ? 0 : index; i < fxq_isa_count(); i++) {
        if (*sets[i].obstacle() == '\0') {
            fxq_active = sets[i].kernels;
            return true;
        }
        if (index >= 0) return false;
    }
    return false;
}

bool fxq_is_registered = false;

bool fxq_begin(void) {
    static bool has_begun = false;
    if (has_begun) return false;
    has_begun = true;
    fxq_select_isa(-1);
    fxq_watch_forks();
    return true;
}
