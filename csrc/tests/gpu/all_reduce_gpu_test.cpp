// Sums over ranks on a GPU, peer to peer: the ranks are streams of one device, so the protocol is
// real and the links are not. The result is the CPU backend's of the summed parts, byte for byte.
#include <catch2/catch.hpp>
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>

#include "core/error.h"
#include "tests/gpu/sizes.h"

namespace duplex::gpu_tests {
namespace {

using simt_tests::kWays;

// Small ones with odd widths and places, then those of the tables in either dtype.
std::vector<Scene> all_scenes(int n_ranks) {
  std::vector<Scene> scenes = simt_tests::scenes_of(n_ranks);
  for (const DType dtype : {DType::kF32, DType::kBF16})
    for (const Scene& scene : sized_scenes(n_ranks, dtype)) scenes.push_back(scene);
  return scenes;
}

struct Step {
  std::size_t scene;
  Way way;
};

std::vector<Step> random_steps(std::uint32_t seed, std::size_t n_scenes, std::size_t n) {
  std::mt19937 random(seed);
  std::vector<Step> steps;
  while (steps.size() < n) steps.push_back({random() % n_scenes, kWays[random() % 3]});
  return steps;
}

std::uint32_t calls_in(const std::vector<Step>& steps) {
  std::uint32_t n = 0;
  for (const Step& step : steps) n += step.way == Way::kShares ? 2 : 1;
  return n;
}

// A rank makes the steps, each in its own time: now and then its host or its stream is late.
void run_steps(CheckedWorld& checked, const Group& group, const std::vector<Step>& steps,
               std::uint32_t seed) {
  constexpr std::size_t kOnTheirWay = 25;  // fewer launches than a stream takes at once
  std::mt19937 random(seed);
  cuda::Runtime& runtime = *checked.world.runtimes[static_cast<std::size_t>(group.rank)];
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (random() % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 300));
    const std::uint64_t delay_ns = random() % 4 == 0 ? random() % 50'000 : 0;
    checked.step(group, steps[i].scene, steps[i].way, delay_ns);
    if (i % kOnTheirWay == 0) runtime.synchronize();
  }
  runtime.synchronize();
}

void check_ranks(CheckedWorld& checked, const Lane& lane, std::uint32_t n_steps,
                 std::uint32_t n_calls) {
  for (std::size_t r = 0; r < lane.groups.size(); ++r) {
    CAPTURE(r);
    const Differences found = checked.differences(r);
    CHECK(found.n_words == 0);
    CHECK(found.n_comparisons == n_steps);
    CHECK(lane.n_calls(r) == n_calls);
  }
}

TEST_CASE("the comparison on the GPU finds one byte") {
  CheckedWorld checked(streams_of(2, 0), {simt_tests::scenes_of(2)[1]});
  cuda::Runtime& runtime = *checked.world.runtimes[0];
  std::vector<std::byte> bytes = checked.world.expected[0];
  const DeviceMemory expected(runtime, bytes.size()), differences(runtime, sizeof(Differences));
  runtime.write(expected.as(), bytes.data(), bytes.size());
  bytes.back() ^= std::byte{1};
  runtime.write(checked.world.place(0, 0).written(), bytes.data(), bytes.size());
  launch_compare(runtime, checked.world.place(0, 0).written(), expected.as(), bytes.size(),
                 differences.as<Differences>());
  Differences found;
  runtime.read(&found, differences.as(), sizeof found);
  CHECK(found.n_words == 1);
}

// Compared on the host, one call after another.
TEST_CASE("all_reduce: every way gives the CPU's bytes") {
  REQUIRE(backend_tests::instruction_sets().back() != "portable");  // which has other bits
  const int n_ranks = GENERATE(2, 4, 8);
  const std::vector<Scene> scenes = all_scenes(n_ranks);
  const auto lanes =
      open_lanes({.n_ranks = n_ranks, .buffer_bytes = simt_tests::largest_buffer(scenes)});
  World world(lanes[0]->runtimes, scenes);
  for (std::size_t s = 0; s < scenes.size(); ++s)
    for (const Way way : kWays) {
      CAPTURE(n_ranks, s, static_cast<int>(way));
      for (const auto& runtime : world.runtimes) runtime->synchronize();
      std::vector<std::function<void()>> programs;
      for (const Group& group : lanes[0]->groups) {
        Place& place = world.place(s, static_cast<std::size_t>(group.rank));
        place.reset();
        place.runtime().synchronize();
        programs.emplace_back([&place, &group, way] {
          place.compute(group, way);
          place.runtime().synchronize();
        });
      }
      run_on(lanes, programs);
      for (std::size_t r = 0; r < lanes[0]->groups.size(); ++r) {
        const bool has_same_bytes = world.place(s, r).result() == world.expected[s];
        CHECK(has_same_bytes);  // of which there are too many to print
      }
    }
}

TEST_CASE("all_reduce: hundreds of calls with ranks that come late") {
  const int n_ranks = GENERATE(2, 4, 8);
  const std::vector<Scene> scenes = all_scenes(n_ranks);
  const auto lanes =
      open_lanes({.n_ranks = n_ranks, .buffer_bytes = simt_tests::largest_buffer(scenes)});
  CheckedWorld checked(lanes[0]->runtimes, scenes);
  const std::vector<Step> steps = random_steps(1, scenes.size(), 600);
  std::vector<std::function<void()>> programs;
  for (const Group& group : lanes[0]->groups)
    programs.emplace_back(
        [&] { run_steps(checked, group, steps, 10 + static_cast<std::uint32_t>(group.rank)); });
  run_on(lanes, programs);
  check_ranks(checked, *lanes[0], 600, calls_in(steps));
}

// One record of each rank, with calls of every scene, again and again without the host.
TEST_CASE("all_reduce: recorded in a graph and played") {
  constexpr std::uint32_t kPlays = 12;
  const int n_ranks = GENERATE(2, 4, 8);
  const std::vector<Scene> scenes = all_scenes(n_ranks);
  const auto lanes =
      open_lanes({.n_ranks = n_ranks, .buffer_bytes = simt_tests::largest_buffer(scenes)});
  CheckedWorld checked(lanes[0]->runtimes, scenes);
  const std::vector<Step> steps = random_steps(2, scenes.size(), 40);
  std::vector<std::unique_ptr<cuda::Record>> records;
  for (const Group& group : lanes[0]->groups) {
    std::mt19937 random(static_cast<std::uint32_t>(group.rank));
    records.push_back(lanes[0]->runtimes[static_cast<std::size_t>(group.rank)]->record([&] {
      for (const Step& step : steps)
        checked.step(group, step.scene, step.way, random() % 4 == 0 ? random() % 50'000 : 0);
    }));
  }
  std::vector<std::function<void()>> programs;
  for (std::size_t r = 0; r < records.size(); ++r)
    programs.emplace_back([&, r] {
      for (std::uint32_t i = 0; i < kPlays; ++i) {
        lanes[0]->runtimes[r]->play(*records[r]);
        if (i % 2 == 1) lanes[0]->runtimes[r]->synchronize();
      }
    });
  run_on(lanes, programs);
  check_ranks(checked, *lanes[0], 40 * kPlays, calls_in(steps) * kPlays);
}

TEST_CASE("all_reduce: two lanes at once") {
  const int n_ranks = GENERATE(2, 4);
  const std::vector<Scene> scenes = all_scenes(n_ranks);
  const auto lanes = open_lanes(
      {.n_ranks = n_ranks, .n_lanes = 2, .buffer_bytes = simt_tests::largest_buffer(scenes)});
  std::vector<std::unique_ptr<CheckedWorld>> checked;
  std::vector<std::vector<Step>> steps;
  std::vector<std::function<void()>> programs;
  for (std::uint32_t l = 0; l < 2; ++l) {
    checked.push_back(std::make_unique<CheckedWorld>(lanes[l]->runtimes, scenes));
    steps.push_back(random_steps(3 + l, scenes.size(), 300));
  }
  for (std::uint32_t l = 0; l < 2; ++l)
    for (const Group& group : lanes[l]->groups)
      programs.emplace_back([&, l] {
        run_steps(*checked[l], group, steps[l], 8 * l + static_cast<std::uint32_t>(group.rank));
      });
  run_on(lanes, programs);
  for (std::size_t l = 0; l < 2; ++l) check_ranks(*checked[l], *lanes[l], 300, calls_in(steps[l]));
}

// All ranks but the last make three calls, the last one makes two. The trap ends the context, so
// this needs a process of its own.
void wait_in_vain(Way way) {
  constexpr std::uint64_t kLimitNs = 100'000'000;
  const std::vector<Scene> scenes = simt_tests::scenes_of(4);
  const auto lanes = open_lanes({.n_ranks = 4,
                                 .buffer_bytes = simt_tests::largest_buffer(scenes),
                                 .wait_limit_ns = kLimitNs});
  World world(lanes[0]->runtimes, scenes);
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::function<void()>> programs;
  for (const Group& group : lanes[0]->groups)
    programs.emplace_back([&world, &group, way] {
      Place& place = world.place(0, static_cast<std::size_t>(group.rank));
      for (int i = 0; i < (group.rank == 3 ? 2 : 3); ++i) place.compute(group, way);
      place.runtime().synchronize();
    });
  CHECK_THROWS_WITH(run_ranks(programs), Catch::Contains("cuda: "));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  CHECK(took.count() < 20);
  const std::vector<std::string> reports = lanes[0]->reports();
  CHECK(!reports.empty());
  for (const std::string& text : reports) {
    std::printf("a rank that never comes, after %.0f ms: %s\n", took.count() * 1e3, text.c_str());
    CHECK_THAT(text, Catch::StartsWith("rank ") && Catch::Contains("waited in vain for the "));
    CHECK_THAT(text, Catch::EndsWith(" of call 3; rank 3 has begun call 2"));
  }
}

TEST_CASE("process: a rank never comes in one exchange", "[.]") { wait_in_vain(Way::kOneShot); }
TEST_CASE("process: a rank never comes in two exchanges", "[.]") { wait_in_vain(Way::kTwoShot); }

TEST_CASE("all_reduce: a rank that never comes is named and the others end") {
  CHECK(run_self("process: a rank never comes in one exchange") == 0);
  CHECK(run_self("process: a rank never comes in two exchanges") == 0);
}

}  // namespace
}  // namespace duplex::gpu_tests
