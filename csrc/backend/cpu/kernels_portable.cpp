// The CPU kernels compiled for any machine.
#define DUPLEX_ISA portable
#include "backend/cpu/codes_portable.h"
#include "backend/cpu/simd_portable.h"
// after the simd header, whose types they use:
#include "backend/cpu/kernels_append.h"
#include "backend/cpu/kernels_attention.h"
#include "backend/cpu/kernels_conv.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_quantise.h"
#include "backend/cpu/kernels_quantised.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex {

const CpuKernels& portable_kernels() {
  static constexpr CpuKernels kKernels = {
      portable::kName,          portable::linear_panel,      portable::attention,
      portable::embed_text_row, portable::embed_audio_row,   portable::norm_row,
      portable::kv_append_row,  portable::conv_add_norm_row, portable::silu_mul_row,
      portable::quantise_row,   portable::to_float,          portable::add_scaled,
  };
  return kKernels;
}

}  // namespace duplex
