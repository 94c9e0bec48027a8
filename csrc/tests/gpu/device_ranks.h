// Several ranks on one GPU: each is a stream with memory of its own, and a thread of the host.
//
// Kernels wait for each other, so those of all ranks must be there at once. Every thread block of
// theirs fits on a multiprocessor that has nothing or only helpers; so it is enough that all ranks
// and lanes together have no more blocks than the GPU has multiprocessors, and that no stream has
// to wait for another: open_lanes() sees to the first, and tries the second.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/gpu/helpers.h"
#include "tests/simt/rank_scene.h"

namespace duplex::gpu_tests {

using simt_tests::Exchanges;
using simt_tests::Group;
using simt_tests::Place;
using simt_tests::Scene;
using simt_tests::Way;
using simt_tests::World;

// ---- the GPU: device_ranks.cpp

struct Gpu {
  std::string name;
  int n_multiprocessors;
};
// Before any other use of CUDA. Throws BackendUnavailable where there is no GPU.
const Gpu& open_gpu();
// Streams that exist once for all tests: the GPU has few queues for launches.
World::Runtimes streams_of(int n_ranks, int lane);
// The programs of ranks at once, each on a thread; throws what one of them threw.
void run_ranks(const std::vector<std::function<void()>>& programs);
// This program again, in a process of its own: with one test case. Its exit status, -1: a signal.
int run_self(const std::string& test_case);

// Zeroed memory of the host that kernels can write, and that is there when the context is gone.
class VisibleMemory {
 public:
  explicit VisibleMemory(std::size_t bytes);
  ~VisibleMemory();
  VisibleMemory(const VisibleMemory&) = delete;
  VisibleMemory& operator=(const VisibleMemory&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

// ---- on it: lanes.cpp

// Memory of the GPU, zeroed.
class DeviceMemory {
 public:
  DeviceMemory(cuda::Runtime& runtime, std::size_t bytes);
  ~DeviceMemory() { cuda::Runtime::release(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  template <class T = std::byte>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// One lane of a group: the memory of each rank, and what its kernels are told.
struct Lane {
  Lane(World::Runtimes of, std::int32_t n_blocks, std::int64_t buffer_bytes,
       std::uint64_t wait_limit_ns);
  // What kernels said that had waited too long, by rank.
  std::vector<std::string> reports() const;
  std::uint32_t n_calls(std::size_t rank) const;  // that the rank has made

  World::Runtimes runtimes;
  std::vector<Group> groups;

 private:
  std::vector<std::unique_ptr<DeviceMemory>> memory_;
  VisibleMemory reports_;
};

struct LaneOptions {
  int n_ranks;
  int n_lanes = 1;
  std::int64_t buffer_bytes = 0;
  std::uint64_t wait_limit_ns = 2'000'000'000;
};
// Thread blocks of each rank and lane.
std::int32_t blocks_of(const LaneOptions& options);
// Throws Error where the blocks of all ranks and lanes are not there at once.
std::vector<std::unique_ptr<Lane>> open_lanes(const LaneOptions& options);

// The programs; where they fail, what the kernels of the lanes said is in the error.
void run_on(const std::vector<std::unique_ptr<Lane>>& lanes,
            const std::vector<std::function<void()>>& programs);

// A world whose results are compared on the device.
class CheckedWorld {
 public:
  CheckedWorld(World::Runtimes runtimes, const std::vector<Scene>& scenes);
  // Of one rank: all as before, the rank late, the call, the comparison. Launches, nothing else.
  void step(const Group& group, std::size_t scene, Way way, std::uint64_t delay_ns);
  Differences differences(std::size_t rank);

  World world;

 private:
  // By scene and rank, as the places of the world.
  std::vector<std::unique_ptr<DeviceMemory>> before_, expected_;
  std::vector<std::unique_ptr<DeviceMemory>> differences_;  // by rank
};

}  // namespace duplex::gpu_tests
