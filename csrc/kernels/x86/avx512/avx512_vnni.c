/* AVX512-VNNI: 64 products of uint8 by int8 an instruction (vpdpbusd), added to int32 without saturation. */
#include "runtime/isa.h"

#ifdef FXQ_HAS_VNNI_AND_AMX
#include <immintrin.h>
#ifdef __clang__
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#else
FXQ_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")
#endif

/* The gemv adds up lanes for each row, about 45 instructions for 16 outputs; packing takes about 110 for them and 64
 * columns, whatever the number of rows. So beyond columns / 26 rows packing is repaid: on Zen 4 from 12 rows of 256
 * columns, 22 of 512, and 40 of 1024 or more. Of more than 32 too many bytes pass through the caches. */
#define MOST_GEMV_ROWS(columns) fxq_clamp((columns) / 24, 1, 32)
#define MOST_NIBBLE_ROWS 6 /* beyond, unpacking them is repaid */
#define GROUP_VALUE_BYTES 1
#include "kernels/x86/avx512/common-inl.h"
#include "kernels/x86/avx512/packing-inl.h"
#include "kernels/x86/avx512/convolution-inl.h"
#include "kernels/x86/avx512/lstm-inl.h"
#include "kernels/x86/avx512/nibbles-inl.h"
#include "kernels/x86/avx512/low_high-inl.h"
#include "kernels/x86/avx512/stream-inl.h"
#include "kernels/x86/avx512/vnni_packed-inl.h"
#include "kernels/x86/avx512/groups-inl.h"
#include "kernels/x86/avx512/vnni_groups-inl.h"
#include "kernels/x86/avx512/floats-inl.h"

static void quantize(const struct fxq_activations *x, int64_t first, int count, const float *const *rows) {
    set_scales(x, first, count, rows);
    quantize_row_major(x, first, count, rows);
}

static void matmul(const struct fxq_matmul *job, int64_t n0, int64_t n1, const struct fxq_target *to, void *scratch) {
    (uses_gemv(job->x) ? matmul_gemv : matmul_packed)(job, n0, n1, to, scratch);
}

static void lstm_step(const struct fxq_lstm_step *s) {
    (s->weight->group ? lstm_step_by_groups : lstm_step_by_rows)(s);
}

const struct fxq_kernels fxq_avx512_vnni = {.name = "avx512_vnni",
                                            .value_bytes = 1,
                                            .thresholds = {256 / 24, 256 / 24 + 1, 256 / 24 + 1}, /* of 256 columns */
                                            .quantize = quantize,
                                            .row_sums = row_sums,
                                            .matmul = matmul,
                                            .pack_lstm = pack_lstm,
                                            .lstm_step = lstm_step,
                                            FXQ_NIBBLES,
                                            FXQ_GROUPS,
                                            FXQ_INT16,
                                            FXQ_FLOATS,
                                            FXQ_STATIC,
                                            FXQ_ELEMENTWISE};
FXQ_TARGET_END
#endif
