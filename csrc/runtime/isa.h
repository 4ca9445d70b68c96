/* Which instruction sets this compiler can build, and how a file says that it is written for one.
 *
 * Each instruction set has a file of its own, all built with the same flags: a file's functions carry their target
 * themselves, in gcc's form or in clang's. */
#ifndef FXQUANT_ISA_H
#define FXQUANT_ISA_H

#include "kernels.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 6)
#define FXQ_HAS_AVX2 1
#endif
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define FXQ_HAS_VNNI_AND_AMX 1
#endif
#if defined(__aarch64__) && (defined(__clang__) || __GNUC__ >= 8)
#define FXQ_HAS_NEON_DOT 1
#endif

/* FXQ_FOR(8, int i = 0; i < count; i++): a loop that is unrolled, up to 8 times. */
#define FXQ_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FXQ_TARGET_BEGIN(features) \
    FXQ_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FXQ_TARGET_END FXQ_PRAGMA(clang attribute pop)
#define FXQ_FOR(count, ...) FXQ_PRAGMA(clang loop unroll_count(count)) for (__VA_ARGS__)
#else
#define FXQ_TARGET_BEGIN(features) FXQ_PRAGMA(GCC push_options) FXQ_PRAGMA(GCC target(features))
#define FXQ_TARGET_END FXQ_PRAGMA(GCC pop_options)
#define FXQ_FOR(count, ...) FXQ_PRAGMA(GCC unroll count) for (__VA_ARGS__)
#endif
#define FXQ_INLINE static inline __attribute__((always_inline))

extern const struct fxq_kernels fxq_portable;
#ifdef FXQ_HAS_AVX2
extern const struct fxq_kernels fxq_avx2;
#endif
#ifdef FXQ_HAS_VNNI_AND_AMX
extern const struct fxq_kernels fxq_avx_vnni, fxq_avx512_vnni, fxq_amx;
#endif
#ifdef FXQ_HAS_NEON_DOT
extern const struct fxq_kernels fxq_neon_dot;
#endif

#endif
