// What the machine can do at best: bytes read per second, dot products per second.
#include <algorithm>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "api.h"
#include "error.h"
#include "kernels_avx512.h"
#include "memory.h"
#include "team.h"

namespace duplex_bench {
namespace {

thread_local std::string last_error;

struct Reader {
  Reader(std::size_t bytes, int n_threads) : buffer(bytes), team(n_threads) {}

  // Each thread reads one linear share. (Chunks by turns, two threads close together, are up to a
  // third slower.)
  double run() {
    return team.run([this](int thread) {
      const std::size_t share = buffer.bytes() / static_cast<std::size_t>(team.n_threads());
      read_bytes(buffer.data() + static_cast<std::size_t>(thread) * share, share);
    });
  }

  HugeBuffer buffer;
  Team team;
};

constexpr std::int64_t kDotLoops = 1'000'000;
constexpr int kDotRepeats = 5;

}  // namespace

void set_error(const std::string& message) { last_error = message; }

}  // namespace duplex_bench

using namespace duplex_bench;

const char* duplex_bench_error() { return last_error.c_str(); }

void* duplex_bench_reader_create(std::int64_t bytes, std::int32_t n_threads) {
  return guarded([&]() -> void* {
    if (!machine_has_avx512())
      throw std::runtime_error(
          "expected a processor with AVX-512, BF16 and VNNI, found one without; the limits and the "
          "floor program are written for it alone");
    return new Reader(static_cast<std::size_t>(bytes), n_threads);
  });
}

double duplex_bench_reader_run(void* reader) { return static_cast<Reader*>(reader)->run(); }

void duplex_bench_reader_destroy(void* reader) { delete static_cast<Reader*>(reader); }

double duplex_bench_dot_peak(std::int32_t kind, std::int32_t n_threads) {
  Team team(n_threads);
  double best = 0;
  for (int repeat = 0; repeat < kDotRepeats; ++repeat) {
    std::vector<double> operations(static_cast<std::size_t>(n_threads));
    const double seconds = team.run([&](int thread) {
      operations[static_cast<std::size_t>(thread)] = spin_dots(static_cast<Dot>(kind), kDotLoops);
    });
    best = std::max(best, operations[0] * n_threads / seconds);
  }
  return best;
}
