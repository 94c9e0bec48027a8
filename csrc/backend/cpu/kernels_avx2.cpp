// The CPU kernels compiled for avx2; the flags are set in CMakeLists.txt.
#define DUPLEX_ISA avx2
#include "backend/cpu/codes_avx2.h"
#include "backend/cpu/simd_avx2.h"
// after the simd header, whose types they use:
#include "backend/cpu/kernels_append.h"
#include "backend/cpu/kernels_attention.h"
#include "backend/cpu/kernels_conv.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_quantise.h"
#include "backend/cpu/kernels_quantised.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex {

const CpuKernels* avx2_kernels() {
  static constexpr CpuKernels kKernels = {
      avx2::kName,           avx2::linear_panel, avx2::attention,     avx2::embed_text_row,
      avx2::embed_audio_row, avx2::norm_row,     avx2::kv_append_row, avx2::conv_add_norm_row,
      avx2::silu_mul_row,    avx2::quantise_row, avx2::to_float,      avx2::add_scaled,
  };
  return &kKernels;
}

}  // namespace duplex
