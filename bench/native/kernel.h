// One operation of the CPU backend on inputs of its own, timed alone or beside a background one.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "api.h"
#include "backend/registry.h"
#include "memory.h"

namespace duplex_bench {

using namespace duplex;

class Kernel {
 public:
  Kernel(const KernelSizes& of, DType type, int n_threads)
      : sizes(of),
        dtype(type),
        row_dtype(is_quantised(type) ? DType::kBF16 : type),
        backend(create_backend("cpu", {.n_threads = n_threads, .isa = {}})) {}
  virtual ~Kernel() = default;
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  virtual void run() = 0;

  double seconds() {
    std::chrono::duration<double> elapsed{};
    backend->run_awake([&] {
      const auto start = std::chrono::steady_clock::now();
      run();
      elapsed = std::chrono::steady_clock::now() - start;
    });
    return elapsed.count();
  }

  // Seconds of this operation, (n), as the first of a pass that begins while another operation runs
  // in the background lane without a pause.
  void beside(Kernel& other, std::int64_t n, double* elapsed) {
    std::unique_ptr<Backend> lane = backend->background_lane();
    std::swap(lane, other.backend);
    std::atomic<bool> is_over{false};
    std::thread background([&] {
      other.backend->run_awake([&] {
        while (!is_over) other.run();
      });
    });
    for (std::int64_t i = 0; i < n; ++i) {
      std::this_thread::sleep_for(std::chrono::microseconds(5000 + 37 * (i % 100)));
      elapsed[i] = seconds();
    }
    is_over = true;
    background.join();
    std::swap(lane, other.backend);
  }

  double bytes = 0;
  double operations = 0;

 protected:
  void* memory(std::size_t n) {
    buffers.push_back(std::make_unique<HugeBuffer>(n));
    return buffers.back()->data();
  }
  float* floats(std::int64_t n) {
    return static_cast<float*>(memory(static_cast<std::size_t>(n) * 4));
  }
  Rows rows(std::int64_t n_rows, std::int64_t width) {
    const auto n = static_cast<std::size_t>(n_rows * width);
    return {memory(n * dtype_bytes(row_dtype)), width, row_dtype};
  }
  std::size_t packed(std::int64_t n_out, std::int64_t n_in) const {
    return backend->packed_bytes(n_out, n_in, dtype);
  }

  KernelSizes sizes;
  DType dtype;
  DType row_dtype;
  std::unique_ptr<Backend> backend;
  std::vector<std::unique_ptr<HugeBuffer>> buffers;
};

}  // namespace duplex_bench
