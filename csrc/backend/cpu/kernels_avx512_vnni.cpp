// The CPU kernels compiled for AVX-512 with VNNI, without BF16; the flags are set in
// CMakeLists.txt.
#define DUPLEX_ISA avx512_vnni
#include "backend/cpu/codes_avx512.h"
// after what it is made of:
#include "backend/cpu/kernels_table.h"

namespace duplex {

const CpuKernels& avx512_vnni_kernels() {
  static constexpr CpuKernels kKernels = avx512_vnni::table("avx512_vnni");
  return kKernels;
}

}  // namespace duplex
