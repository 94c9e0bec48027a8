// The floor program: the least that one pass over a model must do on this machine.
//
// Every weight matrix is multiplied from packed panels on large pages, the cache is read once, and
// two threads that spin hand over to each other. Left out: attention's arithmetic, norms,
// activation functions, scales of quantised weights, sampling. No engine can be faster without
// reading fewer bytes; docs/PERFORMANCE.md compares everything with it.
#include <algorithm>
#include <atomic>
#include <chrono>
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

constexpr std::int64_t kCacheChunk = 64 << 10;

struct Matrix {
  std::int64_t n_panels;
  std::int64_t n_steps;
  std::int64_t offset;  // bytes from the start of the weights

  std::int64_t panel_bytes() const { return n_steps * kStepBytes; }
};

// One piece of work of one thread: a panel, or a chunk of the cache where n_steps is 0.
struct Unit {
  const std::byte* data;
  std::int64_t n_steps;
  std::int64_t n_rows;  // or bytes
};

struct Shape {
  Format format;
  std::vector<Matrix> matrices;
  std::int64_t weight_bytes = 0;
  std::int64_t max_words = 0;  // of one row of x

  Shape(Format of, std::int64_t n, const std::int64_t* n_out, const std::int64_t* n_in)
      : format(of) {
    const std::int64_t inputs = step_inputs(format);
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int64_t n_steps = (n_in[i] + inputs - 1) / inputs;
      matrices.push_back({(n_out[i] + kPanelOutputs - 1) / kPanelOutputs, n_steps, weight_bytes});
      weight_bytes += matrices.back().n_panels * matrices.back().panel_bytes();
      max_words = std::max(max_words, n_steps * (format == Format::kInt4 ? 2 : 1));
    }
  }
};

class Floor {
 public:
  Floor(Shape shape, int n_threads, std::int64_t max_rows, std::int64_t cache_bytes)
      : shape_(std::move(shape)),
        weights_(static_cast<std::size_t>(shape_.weight_bytes) + 2 * kCacheChunk),
        cache_(static_cast<std::size_t>(cache_bytes) + kCacheChunk),
        x_(static_cast<std::size_t>(max_rows * shape_.max_words) * 4),
        y_(static_cast<std::size_t>(max_rows * n_threads * kPanelOutputs) * 4),
        max_rows_(max_rows),
        team_(n_threads) {}

  // Seconds from when the first thread starts until the first sees that the last unit is done. The
  // others may be kept from running meanwhile, even for all of it.
  double run(const FloorOp* ops, std::int64_t n_ops) {
    using Clock = std::chrono::steady_clock;
    plan(ops, n_ops);
    std::vector<Clock::time_point> starts(static_cast<std::size_t>(team_.n_threads()));
    std::vector<Clock::time_point> ends(starts.size());
    team_.run([&](int thread) {
      starts[static_cast<std::size_t>(thread)] = Clock::now();
      for (Phase& phase : phases_) {
        run_phase(phase, thread);
        while (phase.n_done.load(std::memory_order_acquire) < phase.n_units) __builtin_ia32_pause();
      }
      ends[static_cast<std::size_t>(thread)] = Clock::now();
    });
    const auto start = *std::min_element(starts.begin(), starts.end());
    const auto end = *std::min_element(ends.begin(), ends.end());
    return std::chrono::duration<double>(end - start).count();
  }

 private:
  // Units that may run at once. Each thread has a share, which lies together in memory, and takes
  // from the others' when it has finished its own. A phase ends when its units are done: a thread
  // that the system keeps from running delays only what it has taken.
  struct Phase {
    std::int64_t n_units = 0;
    std::vector<std::int64_t> ends;                 // of each thread's share
    std::vector<std::atomic<std::int64_t>> starts;  // what is left of it
    std::atomic<std::int64_t> n_done{0};
  };

  // Cuts the pass into units before the clock starts.
  void plan(const FloorOp* ops, std::int64_t n_ops) {
    units_.clear();
    std::vector<std::int64_t> firsts = {0};
    std::int64_t cache_at = 0;
    for (std::int64_t i = 0; i < n_ops; ++i) {
      if (i > 0 && ops[i].phase != ops[i - 1].phase)
        firsts.push_back(static_cast<std::int64_t>(units_.size()));
      if (ops[i].matrix < 0)
        add_cache(ops[i].rows, cache_at);
      else
        add_matrix(shape_.matrices[static_cast<std::size_t>(ops[i].matrix)], ops[i].rows);
    }
    firsts.push_back(static_cast<std::int64_t>(units_.size()));
    phases_ = std::vector<Phase>(firsts.size() - 1);
    for (std::size_t i = 0; i < phases_.size(); ++i)
      share_out(phases_[i], firsts[i], firsts[i + 1]);
  }

  void add_cache(std::int64_t bytes, std::int64_t& cache_at) {
    for (std::int64_t at = 0; at < bytes; at += kCacheChunk)
      units_.push_back({cache_.data() + cache_at + at, 0, std::min(kCacheChunk, bytes - at)});
    cache_at += bytes;
  }

  void add_matrix(const Matrix& matrix, std::int64_t n_rows) {
    for (std::int64_t panel = 0; panel < matrix.n_panels; ++panel)
      units_.push_back(
          {weights_.data() + matrix.offset + panel * matrix.panel_bytes(), matrix.n_steps, n_rows});
  }

  void share_out(Phase& phase, std::int64_t begin, std::int64_t end) {
    const std::int64_t n_threads = team_.n_threads();
    phase.n_units = end - begin;
    phase.starts = std::vector<std::atomic<std::int64_t>>(static_cast<std::size_t>(n_threads));
    for (std::int64_t thread = 0; thread < n_threads; ++thread) {
      phase.starts[static_cast<std::size_t>(thread)] = begin + phase.n_units * thread / n_threads;
      phase.ends.push_back(begin + phase.n_units * (thread + 1) / n_threads);
    }
  }

  // The next unit for a thread, or nullptr.
  const Unit* take(Phase& phase, int thread) {
    for (int i = 0; i < team_.n_threads(); ++i) {
      const auto owner = static_cast<std::size_t>((thread + i) % team_.n_threads());
      if (phase.starts[owner].load(std::memory_order_relaxed) >= phase.ends[owner]) continue;
      const std::int64_t unit = phase.starts[owner]++;
      if (unit < phase.ends[owner]) return &units_[static_cast<std::size_t>(unit)];
    }
    return nullptr;
  }

  void run_phase(Phase& phase, int thread) {
    for (const Unit* unit; (unit = take(phase, thread)) != nullptr;) {
      run_unit(*unit, thread);
      phase.n_done.fetch_add(1, std::memory_order_release);
    }
  }

  void run_unit(const Unit& unit, int thread) {
    if (unit.n_steps == 0) return read_bytes(unit.data, static_cast<std::size_t>(unit.n_rows));
    multiply_panel(shape_.format,
                   {unit.data, unit.n_steps, static_cast<int>(unit.n_rows),
                    reinterpret_cast<const std::uint32_t*>(x_.data()), shape_.max_words,
                    reinterpret_cast<float*>(y_.data()) + max_rows_ * thread * kPanelOutputs});
  }

  Shape shape_;
  HugeBuffer weights_;
  HugeBuffer cache_;
  HugeBuffer x_;
  HugeBuffer y_;  // (threads, max_rows, 64): the results are not kept
  std::int64_t max_rows_;
  std::vector<Unit> units_;
  std::vector<Phase> phases_;
  Team team_;
};

}  // namespace
}  // namespace duplex_bench

using namespace duplex_bench;

void* duplex_bench_floor_create(std::int32_t format, std::int32_t n_threads,
                                std::int64_t n_matrices, const std::int64_t* n_out,
                                const std::int64_t* n_in, std::int64_t max_rows,
                                std::int64_t cache_bytes) {
  return guarded([&]() -> void* {
    if (!machine_has_avx512())
      throw std::runtime_error(
          "expected a processor with AVX-512, BF16 and VNNI, found one without; the floor program "
          "is written for it alone");
    if (max_rows > kMaxRows)
      throw std::runtime_error("floor: expected at most 64 rows a pass, found " +
                               std::to_string(max_rows));
    return new Floor(Shape(static_cast<Format>(format), n_matrices, n_out, n_in), n_threads,
                     max_rows, cache_bytes);
  });
}

double duplex_bench_floor_run(void* floor, std::int64_t n_ops, const FloorOp* ops) {
  return static_cast<Floor*>(floor)->run(ops, n_ops);
}

void duplex_bench_floor_destroy(void* floor) { delete static_cast<Floor*>(floor); }
