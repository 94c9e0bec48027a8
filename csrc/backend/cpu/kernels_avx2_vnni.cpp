// The CPU kernels compiled for AVX2 with AVX-VNNI; the flags are set in CMakeLists.txt.
#define DUPLEX_ISA avx2_vnni
#include "backend/cpu/codes_avx2.h"
// after what it is made of:
#include "backend/cpu/kernels_table.h"

namespace duplex {

const CpuKernels& avx2_vnni_kernels() {
  static constexpr CpuKernels kKernels = avx2_vnni::table("avx2_vnni");
  return kKernels;
}

}  // namespace duplex
