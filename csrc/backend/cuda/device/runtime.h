// A stream of one GPU: memory, copies and the launching of kernels.
// csrc/tests/simt/device/runtime.h is the host's twin.
//
// Everything is put into the stream, in order; read() and synchronize() wait for it. Between two
// streams there is no order but that of wait_for(). A CUDA error is a duplex::Error that names the
// call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/types.h"
#include "device/page_memory.h"

namespace duplex::cuda {

struct Grid {
  std::int64_t x = 1, y = 1, z = 1;
};

// What a kernel names a loop by (device/loop.cuh).
using Loop = unsigned long long;

// Kernel launches that can be made again, all at once, with the arguments that they had.
class Record {
 public:
  // `source`: what `graph` was made from, if that must stay.
  explicit Record(void* graph, void* source = nullptr) : graph_(graph), source_(source) {}
  ~Record();
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  void* graph() const { return graph_; }

 private:
  void* graph_;
  void* source_;
};

class Runtime {
 public:
  // GPU `device`; -1: the process's current one. Throws BackendUnavailable.
  explicit Runtime(int device = -1);
  // Another stream of the same GPU, in no order with this one as yet. Thread blocks of the
  // background's wait while others have some to place.
  Runtime(Runtime& beside, LaneKind lane);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  const std::string& device_name() const { return device_name_; }
  int device() const { return device_; }
  // Of one kernel: so many are at work at once, and as many of another stream's.
  int resident_blocks() const { return resident_blocks_; }
  // Makes a GPU the current one of this thread, for calls of the driver.
  static void make_current(int device);

  void* allocate(std::size_t bytes);           // zeroed; throws CapacityError
  static void release(void* memory) noexcept;  // waits for whatever runs on the GPU
  // Memory of the host that kernels can write, zeroed.
  static void* allocate_host(std::size_t bytes);
  static void release_host(void* memory) noexcept;
  std::unique_ptr<DevicePages> create_pages(std::size_t page_bytes, std::int64_t n_pages);
  std::size_t page_granularity() const { return page_granularity_; }

  // The host's memory may change as soon as write() and stage() return.
  void write(void* device, const void* host, std::size_t bytes);
  void read(void* host, const void* device, std::size_t bytes);
  void copy(void* destination, const void* source, std::size_t bytes);
  // A copy on the device of a small piece of host memory, for the kernels launched next: it stays
  // until half as much as the ring holds has been staged behind it.
  void* stage(const void* host, std::size_t bytes);
  void synchronize();
  // What is put into this stream from here on begins when all that `other` was given is done.
  void wait_for(Runtime& other);
  // Waits until all is done that was put into the stream before the last call of this. Called
  // between pieces of work, it keeps two of them on their way and no more.
  void keep_close();

  // Records what `work` launches, without doing it; it must do nothing but launch.
  std::unique_ptr<Record> record(const std::function<void()>& work);
  // The same for work that ends in a loop: first(loop), then again(loop) for as long as the last
  // launch of either says so, by set_loop() of device/loop.cuh.
  std::unique_ptr<Record> record_loop(const std::function<void(Loop)>& first,
                                      const std::function<void(Loop)>& again);
  void play(const Record& record);
  std::int64_t n_launches() const { return n_launches_; }  // records played are one
  std::int64_t n_waits() const { return n_waits_; }        // of the host, for the stream

  template <class Args>
  void launch(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
              const Args& args) {
    launch_any(kernel, grid, n_threads, shared_bytes, args, false);
  }
  // The same for a kernel that calls wait_for_previous_grid(): what it does before that overlaps
  // with the end of the launch in front of it. Only behind another of these: whatever else was put
  // into the stream, and whatever was put there before that, has ended when such a chain begins.
  template <class Args>
  void launch_early(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
                    const Args& args) {
    launch_any(kernel, grid, n_threads, shared_bytes, args, true);
  }

 private:
  void open(LaneKind lane);
  template <class Args>
  void launch_any(void (*kernel)(Args), Grid grid, int n_threads, std::size_t shared_bytes,
                  const Args& args, bool is_early) {
    void* pointers[] = {const_cast<Args*>(&args)};
    launch_kernel(reinterpret_cast<const void*>(kernel), grid, n_threads, shared_bytes, pointers,
                  is_early);
  }
  // `stream_` for whatever is no launch: the next launch is then the first of a chain.
  void* behind_chain();
  void launch_kernel(const void* kernel, Grid grid, int n_threads, std::size_t shared_bytes,
                     void** args, bool is_early);
  // What `work` launches becomes nodes of the graph; then end_of_it(), which may add some behind.
  void capture(
      void* graph, const std::function<void()>& work,
      const std::function<void()>& end_of_it = [] {});

  std::string device_name_;
  std::size_t page_granularity_ = 0;
  int device_ = 0;
  int resident_blocks_ = 0;
  std::size_t most_shared_bytes_ = 0;  // of a thread block
  bool reads_host_memory_ = false;     // also what is not pinned
  void* stream_ = nullptr;
  // Where launches are recorded. `stream_` itself is never in a capture, so that another thread may
  // order its stream behind this one at any time.
  void* recording_ = nullptr;
  bool is_recording_ = false;
  // The last thing put into `stream_` was launched early. Other threads' waits change it too.
  std::atomic<bool> in_chain_{false};
  bool in_recorded_chain_ = false;  // in the record that is being made
  void* given_ = nullptr;           // event of wait_for, of this stream
  void* marks_[2] = {};             // events of keep_close
  int next_mark_ = 0;
  std::byte *ring_host_ = nullptr, *ring_device_ = nullptr;  // the former pinned
  std::size_t ring_at_ = 0;
  std::atomic<std::int64_t> n_launches_{0}, n_waits_{0};
};

}  // namespace duplex::cuda
