// The set-up of memory that a group shares, by the CUDA driver: what it says to multicast on one
// GPU, and ranks that reach each other's memory through mappings of their own. Each in a process of
// its own, as what a driver does not expect may end the context, or never return.
#include <catch2/catch.hpp>
#include <cstdio>
#include <optional>
#include <thread>

#include "core/error.h"
#include "tests/gpu/device_ranks.h"
#include "tests/simt/fake_driver.h"

namespace duplex::gpu_tests {
namespace {

using cuda::HandleKind;
using cuda::MulticastDriver;
using cuda::MulticastMemory;

constexpr std::size_t kBytes = 1 << 20;

// Multicast to one device: stores, sums and counts go through it. Handles live as long as the
// process.
void try_multicast(MulticastDriver& driver, cuda::Runtime& runtime) {
  constexpr HandleKind kKind = HandleKind::kDescriptor;
  const std::size_t granularity =
      std::max(driver.memory_granularity(0, kKind), driver.multicast_granularity(1, kBytes, kKind));
  const MulticastDriver::Handle multicast = driver.create_multicast(1, granularity, kKind);
  driver.add_device(multicast, 0);
  const MulticastDriver::Handle memory = driver.create_memory(0, granularity, kKind);
  driver.bind(multicast, memory, granularity);
  std::byte* addresses[2];
  for (int i = 0; i < 2; ++i) {
    addresses[i] = driver.reserve(granularity, granularity);
    driver.map(addresses[i], granularity, i == 0 ? memory : multicast);
    driver.allow_access(addresses[i], granularity, 0);
  }
  driver.fill(addresses[0], std::byte{0}, granularity);
  const float summed[] = {-1.5f, 0.25f, 3e10f, 0.0f}, stored[] = {1, 2, 3, 4};
  runtime.write(addresses[0] + kSummedAt, summed, sizeof summed);
  const DeviceMemory sum(runtime, sizeof summed);
  launch_multicast(runtime, addresses[1], sum.as());
  float found[4];
  runtime.read(found, addresses[0] + kStoredAt, sizeof found);
  CHECK(std::equal(found, found + 4, stored));
  runtime.read(found, sum.as(), sizeof found);
  CHECK(std::equal(found, found + 4, summed));
  std::uint32_t count = 0;
  runtime.read(&count, addresses[0] + kCounterAt, sizeof count);
  CHECK(count == 1);
}

TEST_CASE("process: multicast to one device", "[.]") {
  const auto driver = cuda::create_multicast_driver();
  cuda::Runtime& runtime = *streams_of(1, 0)[0];
  const cuda::DeviceAbilities has = driver->abilities(0);
  std::printf("the GPU %s multicast, %s memory by file descriptor, %s by fabric handle\n",
              has.has_multicast ? "has" : "has no", has.shares_descriptors ? "shares" : "shares no",
              has.shares_fabric ? "and" : "none");
  if (!has.has_multicast) return;
  try {
    try_multicast(*driver, runtime);
    std::printf("multicast to one device: multimem.st, .ld_reduce and .red ran\n");
  } catch (const BackendUnavailable& error) {
    std::printf("multicast to one device: the driver refuses: %s\n", error.what());
  }
}

// Ranks as threads, whose memory is mapped once by each of them.
void reduce_on_shared_memory(bool wants_multicast) {
  constexpr int kRanks = 4;
  const std::vector<Scene> scenes = simt_tests::scenes_of(kRanks);
  const auto lanes = open_lanes({.n_ranks = kRanks});
  Lane& lane = *lanes[0];
  CheckedWorld checked(lane.runtimes, scenes);
  const std::int64_t buffer = simt_tests::largest_buffer(scenes);
  simt_tests::Meetings meetings(kRanks);
  std::vector<std::unique_ptr<MulticastDriver>> drivers;
  std::vector<std::unique_ptr<simt_tests::ThreadRendezvous>> ranks;
  std::vector<std::optional<MulticastMemory>> memories(kRanks);
  std::vector<std::function<void()>> programs;
  for (int r = 0; r < kRanks; ++r) {
    drivers.push_back(cuda::create_multicast_driver());
    ranks.push_back(std::make_unique<simt_tests::ThreadRendezvous>(meetings, r));
  }
  for (std::size_t r = 0; r < kRanks; ++r)
    programs.emplace_back([&, r] {
      lane.runtimes[r]->synchronize();  // so this thread has the context
      const auto bytes = static_cast<std::size_t>(cuda::lane_bytes(buffer));
      MulticastMemory& memory = memories[r].emplace(
          *drivers[r], *ranks[r], cuda::SharedMemoryOptions{0, bytes, wants_multicast});
      memory.fill(0, std::byte{0}, static_cast<std::size_t>(cuda::kPadBytes));
      memory.fill(static_cast<std::size_t>(cuda::kPadBytes), std::byte{0xff},
                  memory.bytes() - static_cast<std::size_t>(cuda::kPadBytes));
      Group& group = lane.groups[r];
      group.buffer_bytes = buffer;
      group.own = memory.own();
      group.multicast = memory.multicast();
      for (int peer = 0; peer < kRanks; ++peer) group.peers[peer] = memory.peer(peer);
      memory.meet();
      for (std::size_t i = 0; i < 60; ++i)
        checked.step(group, i % scenes.size(), simt_tests::kWays[i % 3], 0);
      lane.runtimes[r]->synchronize();
    });
  run_on(lanes, programs);
  std::printf(
      "memory of %d ranks on one device: %s\n", kRanks,
      memories[0]->multicast() != nullptr ? "with multicast" : memories[0]->why_not().c_str());
  for (std::size_t r = 0; r < kRanks; ++r) {
    CHECK(checked.differences(r).n_words == 0);
    CHECK(checked.differences(r).n_comparisons == 60);
  }
}

TEST_CASE("process: memory without multicast", "[.]") { reduce_on_shared_memory(false); }
TEST_CASE("process: memory with multicast where the driver gives it", "[.]") {
  reduce_on_shared_memory(true);
}

TEST_CASE("multicast on one device or what the driver says") {
  CHECK(run_self("process: multicast to one device") == 0);
}
TEST_CASE("ranks share memory through the driver") {
  CHECK(run_self("process: memory without multicast") == 0);
  CHECK(run_self("process: memory with multicast where the driver gives it") == 0);
}

}  // namespace
}  // namespace duplex::gpu_tests
