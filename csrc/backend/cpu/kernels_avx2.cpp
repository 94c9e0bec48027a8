// The CPU kernels compiled for AVX2; the flags are set in CMakeLists.txt.
#define DUPLEX_ISA avx2
#include "backend/cpu/codes_avx2.h"
// after what it is made of:
#include "backend/cpu/kernels_table.h"

namespace duplex {

const CpuKernels& avx2_kernels() {
  static constexpr CpuKernels kKernels = avx2::table("avx2");
  return kKernels;
}

}  // namespace duplex
