// Chooses the kernel table: the best the machine has, or the one asked for.
#include "backend/cpu/isa.h"

#include <cmath>

#include "core/error.h"

namespace duplex {
namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
const CpuKernels* usable_avx2() { return has_avx2() ? avx2_kernels() : nullptr; }
const CpuKernels* usable_avx512() { return has_avx512() ? avx512_kernels() : nullptr; }
#else
const CpuKernels* usable_avx2() { return nullptr; }
const CpuKernels* usable_avx512() { return nullptr; }
#endif

}  // namespace

const CpuKernels& choose_kernels(const std::string& isa) {
  const CpuKernels* avx2 = usable_avx2();
  const CpuKernels* avx512 = usable_avx512();
  if (isa.empty())
    return avx512 != nullptr ? *avx512 : avx2 != nullptr ? *avx2 : portable_kernels();
  if (isa == "portable") return portable_kernels();
  const bool known = isa == "avx2" || isa == "avx512";
  check(known, "isa: expected 'avx512', 'avx2' or 'portable', found '", isa, "'");
  const CpuKernels* wanted = isa == "avx2" ? avx2 : avx512;
  check<BackendUnavailable>(wanted != nullptr, "isa '", isa, "' is not available on this machine",
                            isa == "avx512" ? ", or not with VNNI and BF16" : "",
                            "; leave it out to use the best");
  return *wanted;
}

float log_scaling_tau(std::int64_t position, std::int32_t floor, float alpha) {
  if (floor <= 0) return 1.0f;
  const float n = static_cast<float>(position + 1) / static_cast<float>(floor);
  // In double, so that other devices can give the same bits.
  return n <= 1.0f ? 1.0f : 1.0f + alpha * static_cast<float>(std::log(static_cast<double>(n)));
}

}  // namespace duplex
