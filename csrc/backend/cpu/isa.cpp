// Chooses the kernel table: the best the machine has, or the one asked for.
#include "backend/cpu/isa.h"

#include <array>
#include <string>

#include "core/error.h"

namespace duplex {
namespace {

struct Isa {
  const char* name;
  const CpuKernels* kernels;  // nullptr where this machine lacks the instructions
};

// The best first.
std::array<Isa, 5> instruction_sets() {
  const CpuKernels *avx512 = nullptr, *avx512_vnni = nullptr, *avx2_vnni = nullptr, *avx2 = nullptr;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    avx2 = &avx2_kernels();
    if (__builtin_cpu_supports("avxvnni")) avx2_vnni = &avx2_vnni_kernels();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
      avx512_vnni = &avx512_vnni_kernels();
      if (__builtin_cpu_supports("avx512bf16")) avx512 = &avx512_kernels();
    }
  }
#endif
  return {{{"avx512", avx512},
           {"avx512_vnni", avx512_vnni},
           {"avx2_vnni", avx2_vnni},
           {"avx2", avx2},
           {"portable", &portable_kernels()}}};
}

}  // namespace

const CpuKernels& choose_kernels(const std::string& isa) {
  std::string names;
  for (const Isa& known : instruction_sets()) {
    if (isa.empty() && known.kernels != nullptr) return *known.kernels;
    if (isa == known.name) {
      check<BackendUnavailable>(
          known.kernels != nullptr, "isa '", isa, "' is not available on this machine",
          isa == "avx512" ? ", or not with VNNI and BF16" : "", "; leave it out to use the best");
      return *known.kernels;
    }
    names += std::string(names.empty() ? "'" : ", '") + known.name + "'";
  }
  fail<InvalidArgument>("isa: expected one of ", names, ", found '", isa, "'");
}

}  // namespace duplex
