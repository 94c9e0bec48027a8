// Which kernel table this machine can run.
#pragma once

#include <string>

#include "backend/cpu/kernels.h"

namespace duplex {

// `isa`: "" for the best, or "avx512", "avx512_vnni", "avx2_vnni", "avx2", "portable".
const CpuKernels& choose_kernels(const std::string& isa);

}  // namespace duplex
