// The host's twin of csrc/backend/cuda/device/runtime.h: the same class, on the host's memory.
// Everything is done when a call returns; errors of a kernel leave launch().
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "backend/page_memory.h"
#include "tests/simt/grid.h"

namespace duplex::cuda {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

// Launches that were noted and can be made again.
struct Record {
  std::vector<std::function<void()>> launches;
};

class Runtime {
 public:
  Runtime() = default;
  ~Runtime() = default;
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  const std::string& device_name() const { return device_name_; }

  void* allocate(std::size_t bytes);
  void release(void* memory) noexcept;
  std::unique_ptr<PageMemory> create_page_memory(std::size_t page_bytes, std::int64_t n_pages);
  std::size_t page_granularity() const { return 4096; }

  void write(void* device, const void* host, std::size_t bytes);
  void read(void* host, const void* device, std::size_t bytes);
  void copy(void* destination, const void* source, std::size_t bytes);
  void* stage(const void* host, std::size_t bytes);
  void synchronize() {}

  std::unique_ptr<Record> record(const std::function<void()>& work);
  void play(const Record& record);

  template <class Args>
  void launch(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
              const Args& args) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
    if (recording_ != nullptr) {
      recording_->launches.emplace_back(
          [=, this] { launch(kernel, grid, n_threads, shared_bytes, args); });
      return;
    }
    struct Call {
      void (*kernel)(Args);
      const Args& args;
    };
    const Call call{kernel, args};
    simt::run_grid(
        {&typeid(Args), {grid.x, grid.y, grid.z}, n_threads, shared_bytes},
        [](const void* context) {
          const auto& [function, arguments] = *static_cast<const Call*>(context);
          function(arguments);
        },
        &call);
  }

 private:
  std::string device_name_ = "host";
  Record* recording_ = nullptr;
  std::deque<std::vector<std::byte>> staged_;  // oldest first
  std::size_t staged_bytes_ = 0;
};

}  // namespace duplex::cuda
