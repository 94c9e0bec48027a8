// How long a sum over ranks takes on one GPU, in recorded launches: a table. No pass or fail but
// that every rank came.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>

#include "tests/gpu/sizes.h"

namespace duplex::gpu_tests {
namespace {

struct Microseconds {
  double median, p99;
};

Microseconds of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[times.size() * 99 / 100]};
}

// Calls in a row are timed together, from when all ranks have met. The first of a record, which
// meet while other ranks are still being launched, are not counted.
struct Measurement {
  Way way;
  std::uint32_t n_calls;  // in a row
  std::uint32_t n_in_record;
  std::uint32_t n_plays;
};
constexpr std::uint32_t kInARow = 20;

// Clocks of every rank in memory of its own.
struct Clocks {
  Clocks(const World::Runtimes& of, std::uint32_t n_measured)
      : runtimes(of), n(n_measured), counters(*of[0], sizeof(std::uint32_t) * (2 + of.size())) {
    for (const auto& runtime : of)
      times.push_back(
          std::make_unique<DeviceMemory>(*runtime, sizeof(std::uint64_t) * (2 * n + 1)));
  }
  Times of(std::size_t rank) const {
    auto* const words = times[rank]->as<std::uint64_t>();
    return {words + 1, reinterpret_cast<std::uint32_t*>(words)};
  }
  Meeting meeting(std::size_t rank) const {
    auto* const counter = counters.as<std::uint32_t>();
    return {counter, counter + 2 + rank, counter + 1, static_cast<std::int32_t>(runtimes.size()), 1,
            of(rank)};
  }
  // From the first rank that began to the last that ended.
  std::vector<double> spans_us(std::uint32_t n_in_record) const {
    std::uint32_t n_alone = 0;
    runtimes[0]->read(&n_alone, counters.as<std::uint32_t>() + 1, sizeof n_alone);
    REQUIRE(n_alone == 0);
    std::vector<std::uint64_t> begin(n, ~std::uint64_t{0}), end(n, 0);
    for (std::size_t r = 0; r < times.size(); ++r) {
      std::vector<std::uint64_t> all(2 * n + 1);
      runtimes[r]->read(all.data(), times[r]->as(), all.size() * sizeof(std::uint64_t));
      REQUIRE(static_cast<std::uint32_t>(all[0]) == 2 * n);
      for (std::size_t i = 0; i < n; ++i) {
        begin[i] = std::min(begin[i], all[2 * i + 1]);
        end[i] = std::max(end[i], all[2 * i + 2]);
      }
    }
    std::vector<double> spans;
    for (std::size_t i = 0; i < n; ++i)
      if (i % n_in_record != 0) spans.push_back(static_cast<double>(end[i] - begin[i]) / 1e3);
    return spans;
  }

  World::Runtimes runtimes;
  std::uint32_t n;
  DeviceMemory counters;
  std::vector<std::unique_ptr<DeviceMemory>> times;
};

// Of one call.
Microseconds measure(const std::vector<std::unique_ptr<Lane>>& lanes, World& world,
                     std::size_t scene, const Measurement& how) {
  const Lane& lane = *lanes[0];
  const Clocks clocks(lane.runtimes, how.n_in_record * how.n_plays);
  std::vector<std::unique_ptr<cuda::Record>> records;
  for (std::size_t r = 0; r < lane.groups.size(); ++r)
    records.push_back(lane.runtimes[r]->record([&] {
      for (std::uint32_t i = 0; i < how.n_in_record; ++i) {
        launch_meeting(*lane.runtimes[r], clocks.meeting(r), 32);
        for (std::uint32_t call = 0; call < how.n_calls; ++call)
          world.place(scene, r).compute(lane.groups[r], how.way);
        launch_stamp(*lane.runtimes[r], clocks.of(r));
      }
    }));
  std::vector<std::function<void()>> programs;
  for (std::size_t r = 0; r < records.size(); ++r)
    programs.emplace_back([&, r] {
      for (std::uint32_t i = 0; i < how.n_plays; ++i) {
        lane.runtimes[r]->play(*records[r]);
        lane.runtimes[r]->synchronize();
      }
    });
  run_on(lanes, programs);
  std::vector<double> spans = clocks.spans_us(how.n_in_record);
  for (double& span : spans) span /= std::max(how.n_calls, 1u);
  return of(std::move(spans));
}

std::uint64_t tick_ns() {
  cuda::Runtime& runtime = *streams_of(1, 0)[0];
  const DeviceMemory memory(runtime, sizeof(std::uint64_t) * (kTicks + 1));
  auto* const words = memory.as<std::uint64_t>();
  run_ranks({[&] { launch_ticks(runtime, {words + 1, reinterpret_cast<std::uint32_t*>(words)}); }});
  std::vector<std::uint64_t> ticks(kTicks);
  runtime.read(ticks.data(), words + 1, kTicks * sizeof(std::uint64_t));
  return *std::min_element(ticks.begin(), ticks.end());
}

void print_row(const std::vector<std::unique_ptr<Lane>>& lanes, World& world, std::size_t scene) {
  std::printf("%5d  %6d  %-6s", world.scenes[0].n_ranks, lanes[0]->groups[0].n_blocks,
              kSizes[scene].name);
  for (const Way way : simt_tests::kWays) {
    const Microseconds alone = measure(lanes, world, scene, {way, 1, 26, 40});
    const Microseconds in_row = measure(lanes, world, scene, {way, kInARow, 5, 25});
    std::printf("  %6.1f (%6.1f) %6.1f", alone.median, alone.p99, in_row.median);
  }
  std::printf("\n");
  std::fflush(stdout);
}

TEST_CASE("all_reduce: a table of times") {
  const Gpu& gpu = open_gpu();
  std::printf(
      "\n%s, %d multiprocessors. Ranks are streams of this one GPU: the latency of the protocol\n"
      "through its second-level cache, no NVLink, and the multiprocessors shared among the ranks.\n"
      "The clock goes on by %llu ns at a time.\n"
      "All-reduce with convolution, residual and norm; sizes of rows of %d in bfloat16, parts\n"
      "travel in float32, twice that. Microseconds of recorded launches, from the first rank that\n"
      "begins to the last that ends: median (p99) of 1000 single calls, with the start of the\n"
      "kernel that takes the time; then the mean in %u calls in a row, median of 100.\n",
      gpu.name.c_str(), gpu.n_multiprocessors, static_cast<unsigned long long>(tick_ns()), kWidth,
      kInARow);
  std::printf("ranks  blocks  size     %-24s%-24s%s\n", "one exchange", "two exchanges",
              "scatter, gather, norm");
  for (const int n_ranks : {2, 4, 8}) {
    const std::vector<Scene> scenes = sized_scenes(n_ranks, DType::kBF16);
    const auto lanes =
        open_lanes({.n_ranks = n_ranks, .buffer_bytes = simt_tests::largest_buffer(scenes)});
    World world(lanes[0]->runtimes, scenes);
    const Microseconds nothing = measure(lanes, world, 0, {Way::kOneShot, 0, 26, 40});
    std::printf("%5d          none    %6.1f (%6.1f)\n", n_ranks, nothing.median, nothing.p99);
    for (std::size_t scene = 0; scene < scenes.size(); ++scene) print_row(lanes, world, scene);
  }
}

}  // namespace
}  // namespace duplex::gpu_tests
