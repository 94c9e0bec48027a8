// The kernels as a table. Included by kernels_<isa>.cpp after its codes and simd headers, whose
// types they use, with DUPLEX_ISA naming the namespace.
#pragma once

#include "backend/cpu/kernels_append.h"
#include "backend/cpu/kernels_attention.h"
#include "backend/cpu/kernels_conv.h"
#include "backend/cpu/kernels_gemm.h"
#include "backend/cpu/kernels_quantise.h"
#include "backend/cpu/kernels_quantised.h"
#include "backend/cpu/kernels_rows.h"

namespace duplex::DUPLEX_ISA {

constexpr CpuKernels table(const char* name) {
  return {name,     linear_panel,  attention,         embed_text_row, embed_audio_row,
          norm_row, kv_append_row, conv_add_norm_row, silu_mul_row,   quantise_row,
          to_float, add_scaled};
}

}  // namespace duplex::DUPLEX_ISA
