#include <algorithm>

#include "core/error.h"
#include "tests/gpu/device_ranks.h"

namespace duplex::gpu_tests {
namespace {

constexpr int kMostThreads = 512;  // of the kernels that sum over ranks

std::unique_ptr<DeviceMemory> put(cuda::Runtime& runtime, const std::vector<std::byte>& bytes) {
  auto memory = std::make_unique<DeviceMemory>(runtime, bytes.size());
  runtime.write(memory->as(), bytes.data(), bytes.size());
  runtime.synchronize();
  return memory;
}

// All blocks of all streams meet once.
void try_at_once(const World::Runtimes& runtimes, std::int32_t n_blocks) {
  DeviceMemory counters(*runtimes[0], sizeof(std::uint32_t) * (2 + runtimes.size()));
  runtimes[0]->synchronize();
  auto* const counter = counters.as<std::uint32_t>();
  std::vector<std::function<void()>> programs;
  for (std::size_t i = 0; i < runtimes.size(); ++i)
    programs.emplace_back([&, i] {
      const auto n_streams = static_cast<std::int32_t>(runtimes.size());
      launch_meeting(*runtimes[i], {counter, counter + 2 + i, counter + 1, n_streams, n_blocks, {}},
                     kMostThreads);
      runtimes[i]->synchronize();
    });
  run_ranks(programs);
  std::uint32_t n_alone = 0;
  runtimes[0]->read(&n_alone, counter + 1, sizeof n_alone);
  check<Error>(n_alone == 0, "expected ", runtimes.size(), " streams with ", n_blocks,
               " thread blocks each on the GPU at once, found ", n_alone,
               " blocks that waited in vain; is the GPU shared, or "
               "CUDA_DEVICE_MAX_CONNECTIONS below 32?");
}

}  // namespace

DeviceMemory::DeviceMemory(cuda::Runtime& runtime, std::size_t bytes)
    : data_(runtime.allocate(bytes)) {
  runtime.synchronize();
}

Lane::Lane(World::Runtimes of, std::int32_t n_blocks, std::int64_t buffer_bytes,
           std::uint64_t wait_limit_ns)
    : runtimes(std::move(of)),
      groups(runtimes.size()),
      reports_(runtimes.size() * sizeof(cuda::WaitReport)) {
  std::vector<std::byte> empty(static_cast<std::size_t>(cuda::lane_bytes(buffer_bytes)),
                               std::byte{0xff});
  std::fill_n(empty.begin(), cuda::kPadBytes, std::byte{0});
  for (const auto& runtime : runtimes) memory_.push_back(put(*runtime, empty));
  for (std::size_t r = 0; r < runtimes.size(); ++r) {
    Group& group = groups[r];
    group.rank = static_cast<std::int32_t>(r);
    group.n_ranks = static_cast<std::int32_t>(runtimes.size());
    group.n_blocks = n_blocks;
    group.own = memory_[r]->as();
    for (std::size_t peer = 0; peer < runtimes.size(); ++peer)
      group.peers[peer] = memory_[peer]->as();
    group.multicast = nullptr;
    group.buffer_bytes = buffer_bytes;
    group.report = static_cast<cuda::WaitReport*>(reports_.data()) + r;
    group.wait_limit_ns = wait_limit_ns;
  }
  for (std::size_t r = 0; r < runtimes.size(); ++r) {
    memory_.push_back(std::make_unique<DeviceMemory>(*runtimes[r], sizeof(cuda::GroupState)));
    groups[r].state = memory_.back()->as<cuda::GroupState>();
  }
}

std::vector<std::string> Lane::reports() const {
  std::vector<std::string> texts;
  for (const Group& group : groups)
    if (group.report->is_there != 0) texts.push_back(cuda::describe(*group.report));
  return texts;
}

std::uint32_t Lane::n_calls(std::size_t rank) const {
  cuda::GroupState state;
  runtimes[rank]->read(&state, groups[rank].state, sizeof state);
  return state.epoch;
}

std::int32_t blocks_of(const LaneOptions& options) {
  return std::min(cuda::kMaxBlocks,
                  open_gpu().n_multiprocessors / (options.n_ranks * options.n_lanes));
}

std::vector<std::unique_ptr<Lane>> open_lanes(const LaneOptions& options) {
  const std::int32_t n_blocks = blocks_of(options);
  check<Error>(n_blocks > 0, "expected a multiprocessor for each of ", options.n_ranks,
               " ranks in ", options.n_lanes, " lanes, found ", open_gpu().n_multiprocessors);
  std::vector<std::unique_ptr<Lane>> lanes;
  World::Runtimes all;
  for (int l = 0; l < options.n_lanes; ++l) {
    const World::Runtimes runtimes = streams_of(options.n_ranks, l);
    all.insert(all.end(), runtimes.begin(), runtimes.end());
    lanes.push_back(
        std::make_unique<Lane>(runtimes, n_blocks, options.buffer_bytes, options.wait_limit_ns));
  }
  try_at_once(all, n_blocks);
  return lanes;
}

void run_on(const std::vector<std::unique_ptr<Lane>>& lanes,
            const std::vector<std::function<void()>>& programs) {
  try {
    run_ranks(programs);
  } catch (const Error& error) {
    std::string text = error.what();
    for (const auto& lane : lanes)
      for (const std::string& report : lane->reports()) text += "\n" + report;
    fail<Error>(text);
  }
}

CheckedWorld::CheckedWorld(World::Runtimes runtimes, const std::vector<Scene>& scenes)
    : world(std::move(runtimes), scenes) {
  for (std::size_t s = 0; s < scenes.size(); ++s)
    for (std::size_t r = 0; r < world.runtimes.size(); ++r) {
      before_.push_back(put(*world.runtimes[r], world.place(s, r).before()));
      expected_.push_back(put(*world.runtimes[r], world.expected[s]));
    }
  for (const auto& runtime : world.runtimes)
    differences_.push_back(std::make_unique<DeviceMemory>(*runtime, sizeof(Differences)));
}

void CheckedWorld::step(const Group& group, std::size_t scene, Way way, std::uint64_t delay_ns) {
  const auto rank = static_cast<std::size_t>(group.rank);
  cuda::Runtime& runtime = *world.runtimes[rank];
  Place& place = world.place(scene, rank);
  const std::size_t at = scene * world.runtimes.size() + rank, bytes = place.before().size();
  launch_copy(runtime, place.written(), before_[at]->as(), bytes);
  if (delay_ns > 0) launch_delay(runtime, delay_ns);
  place.compute(group, way);
  launch_compare(runtime, place.written(), expected_[at]->as(), bytes,
                 differences_[rank]->as<Differences>());
}

Differences CheckedWorld::differences(std::size_t rank) {
  Differences found;
  world.runtimes[rank]->read(&found, differences_[rank]->as(), sizeof found);
  return found;
}

}  // namespace duplex::gpu_tests
