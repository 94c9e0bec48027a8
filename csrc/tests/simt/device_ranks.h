// Ranks with a GPU each, as threads of one process.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "host/cuda_backend.h"
#include "tests/simt/fake_driver.h"

namespace duplex::simt_tests {

inline constexpr ExchangeOptions kOptions{
    .transport = "auto", .max_rows = 4, .width = 40, .gather_stride = 32, .slab_bytes = 1 << 14};

// The ranks of a group; what each of them threw.
struct Ranks {
  explicit Ranks(int n) : meetings(n) {
    for (int r = 0; r < n; ++r) {
      BackendOptions options;
      options.gpu = r;
      backends.push_back(std::make_unique<cuda::CudaBackend>(options));
    }
  }
  void run(const std::function<void(int rank, cuda::CudaBackend& backend)>& rank) {
    errors.assign(backends.size(), "");
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < backends.size(); ++r)
      threads.emplace_back([&, r] {
        try {
          rank(static_cast<int>(r), *backends[r]);
        } catch (const std::exception& error) {
          errors[r] = error.what();
        }
      });
    for (std::thread& thread : threads) thread.join();
  }
  void connect(const ExchangeOptions& options = kOptions) {
    run([&](int r, cuda::CudaBackend& backend) {
      backend.connect(std::make_shared<ThreadRendezvous>(meetings, r), options);
    });
  }
  bool all_ended_well() const { return errors == std::vector<std::string>(errors.size()); }

  Meetings meetings;
  std::vector<std::unique_ptr<cuda::CudaBackend>> backends;
  std::vector<std::string> errors;
};

}  // namespace duplex::simt_tests
