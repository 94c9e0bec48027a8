// The CPU kernels compiled for AVX-512; the flags are set in CMakeLists.txt.
#define DUPLEX_ISA avx512
#include "backend/cpu/codes_avx512.h"
// after what it is made of:
#include "backend/cpu/kernels_table.h"

namespace duplex {

const CpuKernels& avx512_kernels() {
  static constexpr CpuKernels kKernels = avx512::table("avx512");
  return kKernels;
}

}  // namespace duplex
