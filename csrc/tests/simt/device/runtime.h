// The host's twin of csrc/backend/cuda/device/runtime.h: the same class, on the host's memory. When
// its work is done: queues.h. Errors of a kernel leave launch() where there is one stream, else
// the calls that wait.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "core/types.h"
#include "device/page_memory.h"
#include "tests/simt/grid.h"
#include "tests/simt/queues.h"

namespace duplex::cuda {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

using Loop = unsigned long long;

// Launches that were noted and can be made again; those of the loop for as long as one of them says
// so.
struct Record {
  using Launches = std::vector<simt::Launch>;
  struct Notes {
    Launches launches, loop;
    bool goes_on = false;
  };
  std::shared_ptr<Notes> notes = std::make_shared<Notes>();
};

class Runtime {
 public:
  explicit Runtime(int device = -1);
  Runtime(Runtime& beside, LaneKind lane);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  const std::string& device_name() const { return device_name_; }
  int device() const { return device_; }
  // note: the thread blocks of a kernel run one after the other here, but for run_streams().
  int resident_blocks() const { return 1; }
  static void make_current(int) {}

  void* allocate(std::size_t bytes);
  static void release(void* memory) noexcept;
  static void* allocate_host(std::size_t bytes);
  static void release_host(void* memory) noexcept;
  std::unique_ptr<DevicePages> create_pages(std::size_t page_bytes, std::int64_t n_pages);
  std::size_t page_granularity() const { return std::size_t{2} << 20; }  // that of every GPU

  void write(void* device, const void* host, std::size_t bytes);
  void read(void* host, const void* device, std::size_t bytes);
  void copy(void* destination, const void* source, std::size_t bytes);
  void* stage(const void* host, std::size_t bytes);
  void synchronize();
  void wait_for(Runtime& other) { queues_->wait_for(queue_, other.queue_); }
  void keep_close();

  std::unique_ptr<Record> record(const std::function<void()>& work);
  std::unique_ptr<Record> record_loop(const std::function<void(Loop)>& first,
                                      const std::function<void(Loop)>& again);
  void play(const Record& record);
  std::int64_t n_launches() const { return n_launches_; }
  std::int64_t n_waits() const { return n_waits_; }

  template <class Args>
  void launch(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
              const Args& args) {
    put(launch_of(kernel, grid, n_threads, shared_bytes, args, false));
  }
  // note: begins early in a record alone.
  template <class Args>
  void launch_early(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
                    const Args& args) {
    put(launch_of(kernel, grid, n_threads, shared_bytes, args, true));
  }

 private:
  template <class Args>
  static simt::Launch launch_of(void (*kernel)(Args), Grid grid, int n_threads,
                                std::size_t shared_bytes, const Args& args, bool is_early) {
    static_assert(std::is_trivially_copyable_v<Args> && sizeof(Args) <= 4096);
    struct Call {
      void (*kernel)(Args);
      Args args;
    };
    return {{&typeid(Args), {grid.x, grid.y, grid.z}, n_threads, shared_bytes, is_early},
            [](const void* context) {
              const auto& [function, arguments] = *static_cast<const Call*>(context);
              function(arguments);
            },
            std::make_shared<const Call>(Call{kernel, args})};
  }

  void record_into(Record::Launches& launches, const std::function<void()>& work);
  void put(std::function<void()> work);
  void put(const simt::Launch& launch);  // into the record that is being made, or else the stream

  std::string device_name_ = "host";
  int device_;
  std::shared_ptr<simt::Queues> queues_;
  std::shared_ptr<simt::Queue> queue_;
  std::uint64_t marks_[2] = {};  // of keep_close
  Record::Launches* recording_ = nullptr;
  std::atomic<std::int64_t> n_launches_{0}, n_waits_{0};
  std::deque<std::shared_ptr<std::vector<std::byte>>> staged_;  // oldest first
  std::size_t staged_bytes_ = 0;
};

}  // namespace duplex::cuda
