// What the tests of sums over ranks share: groups of emulated GPUs. What they compute:
// rank_scene.h.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "tests/simt/fixtures.h"
#include "tests/simt/rank_scene.h"
#include "tests/simt/streams.h"
#include "tests/simt/system_memory.h"

namespace duplex::simt_tests {

// Memory of one rank, given back at the end.
class Device {
 public:
  Device() = default;
  ~Device() {
    for (void* const memory : all_) runtime.release(memory);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void* allocate(std::size_t bytes) { return all_.emplace_back(runtime.allocate(bytes)); }
  template <class T>
  T* put(const std::vector<T>& values) {
    auto* const memory = static_cast<T*>(allocate(values.size() * sizeof(T)));
    std::memcpy(static_cast<void*>(memory), values.data(), values.size() * sizeof(T));
    return memory;
  }

  cuda::Runtime runtime;

 private:
  std::vector<void*> all_;
};

// One lane of a group: the memory of each rank, and what its kernels are told.
struct Lane {
  Lane(int n_ranks, std::int64_t buffer_bytes, bool has_multicast, std::int32_t n_blocks = 2,
       std::uint64_t wait_limit = 200'000)
      : devices(static_cast<std::size_t>(n_ranks)), groups(static_cast<std::size_t>(n_ranks)) {
    const auto bytes = static_cast<std::size_t>(cuda::lane_bytes(buffer_bytes));
    std::vector<std::byte*> memories;
    for (Device& device : devices) {
      memories.push_back(static_cast<std::byte*>(device.allocate(bytes)));
      std::memset(memories.back() + cuda::kPadBytes, 0xff, bytes - cuda::kPadBytes);
    }
    if (has_multicast) multicast = std::make_unique<simt::Multicast>(memories, bytes);
    for (std::size_t r = 0; r < devices.size(); ++r) {
      Group& group = groups[r];
      group.rank = static_cast<std::int32_t>(r);
      group.n_ranks = n_ranks;
      group.n_blocks = n_blocks;
      group.own = memories[r];
      std::copy(memories.begin(), memories.end(), group.peers);
      group.multicast = multicast == nullptr ? nullptr : multicast->address();
      group.buffer_bytes = buffer_bytes;
      group.state = devices[r].put(std::vector<cuda::GroupState>(1));
      group.report = devices[r].put(std::vector<cuda::WaitReport>(1));
      group.wait_limit_ns = wait_limit;
    }
  }
  std::vector<Device> devices;
  std::unique_ptr<simt::Multicast> multicast;
  std::vector<Group> groups;
};

inline World world_of(const std::vector<Scene>& scenes) {
  World::Runtimes runtimes;
  for (int r = 0; r < scenes[0].n_ranks; ++r) runtimes.push_back(std::make_shared<cuda::Runtime>());
  return {std::move(runtimes), scenes};
}

}  // namespace duplex::simt_tests
