// The CPU kernels compiled for avx512; the flags are set in CMakeLists.txt.
#define DUPLEX_ISA avx512
#include "backend/cpu/codes_avx512.h"
#include "backend/cpu/simd_avx512.h"
// after the simd header, whose types they use:
#include "backend/cpu/kernels_append.h"
#include "backend/cpu/kernels_attention.h"
#include "backend/cpu/kernels_conv.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_quantise.h"
#include "backend/cpu/kernels_quantised.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex {

const CpuKernels* avx512_kernels() {
  static constexpr CpuKernels kKernels = {
      avx512::kName,          avx512::linear_panel,      avx512::attention,
      avx512::embed_text_row, avx512::embed_audio_row,   avx512::norm_row,
      avx512::kv_append_row,  avx512::conv_add_norm_row, avx512::silu_mul_row,
      avx512::quantise_row,   avx512::to_float,          avx512::add_scaled,
  };
  return &kKernels;
}

}  // namespace duplex
