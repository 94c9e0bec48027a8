// The CPU kernels compiled for any machine.
#define DUPLEX_ISA portable
#include "backend/cpu/codes_portable.h"
// after what it is made of:
#include "backend/cpu/kernels_table.h"

namespace duplex {

const CpuKernels& portable_kernels() {
  static constexpr CpuKernels kKernels = portable::table("portable");
  return kKernels;
}

}  // namespace duplex
