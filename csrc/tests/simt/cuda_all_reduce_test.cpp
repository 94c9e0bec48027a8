// The CUDA backend's sums over ranks: N emulated GPUs run their grids at once, in random
// interleavings, with stores that happen late and in any order; the result is the CPU backend's of
// the summed parts, byte for byte.
#include <algorithm>
#include <atomic>
#include <bit>
#include <random>

#include "core/error.h"
#include "tests/simt/ranks.h"

namespace duplex::simt_tests {
namespace {

struct Step {
  std::size_t scene;
  Way way;
};

// The program of one rank: the steps, and how many of them end with other bytes.
std::function<void()> program(World& world, const Group& group, const std::vector<Step>& steps,
                              std::atomic<int>& n_wrong) {
  return [&world, &group, &steps, &n_wrong] {
    for (const Step& step : steps) {
      Place& place = world.place(step.scene, static_cast<std::size_t>(group.rank));
      place.reset();
      place.compute(group, step.way);
      if (place.result() != world.expected[step.scene])
        n_wrong.fetch_add(1, std::memory_order_relaxed);
    }
  };
}

std::vector<Step> random_steps(std::mt19937& random, std::size_t n_scenes, int n) {
  std::vector<Step> steps;
  for (int i = 0; i < n; ++i) steps.push_back({random() % n_scenes, kWays[random() % 3]});
  return steps;
}

// Random interleavings of random calls; each lane goes on from one to the next.
int n_wrong_in(int n_ranks, int n_interleavings, bool has_multicast, std::uint32_t seed,
               std::size_t n_lanes = 1) {
  std::vector<std::unique_ptr<World>> worlds;
  std::vector<std::unique_ptr<Lane>> lanes;
  for (std::size_t l = 0; l < n_lanes; ++l) {
    worlds.push_back(std::make_unique<World>(world_of(scenes_of(n_ranks))));
    const std::int64_t bytes = largest_buffer(worlds[l]->scenes);
    lanes.push_back(std::make_unique<Lane>(n_ranks, bytes, has_multicast));
  }
  std::mt19937 random(seed);
  std::atomic<int> n_wrong = 0;
  for (int i = 0; i < n_interleavings; ++i) {
    std::vector<std::vector<Step>> steps(n_lanes);
    std::vector<std::function<void()>> programs;
    for (std::size_t l = 0; l < n_lanes; ++l) {
      steps[l] = random_steps(random, worlds[l]->scenes.size(), 3);
      for (const Group& group : lanes[l]->groups)
        programs.push_back(program(*worlds[l], group, steps[l], n_wrong));
    }
    simt::run_streams(programs, static_cast<std::uint32_t>(random()));
  }
  return n_wrong;
}

TEST_CASE("cuda: all_reduce in random interleavings", "[simt]") {
  if (!has_fused_cpu()) return;
  const bool has_multicast = GENERATE(true, false);
  CHECK(n_wrong_in(2, 120, has_multicast, 1) == 0);
  CHECK(n_wrong_in(4, 30, has_multicast, 2) == 0);
  CHECK(n_wrong_in(8, 6, has_multicast, 3) == 0);
}

TEST_CASE("all_reduce in thousands of interleavings", "[.][interleavings]") {
  if (!has_fused_cpu()) return;
  const bool has_multicast = GENERATE(true, false);
  CHECK(n_wrong_in(2, 2000, has_multicast, 4) == 0);
  CHECK(n_wrong_in(4, 500, has_multicast, 5) == 0);
  CHECK(n_wrong_in(8, 150, has_multicast, 6) == 0);
  CHECK(n_wrong_in(4, 150, has_multicast, 7, 2) == 0);
}

TEST_CASE("cuda: all_reduce of two lanes at once", "[simt]") {
  if (!has_fused_cpu()) return;
  CHECK(n_wrong_in(2, 40, true, 8, 2) == 0);
}

// Longer than what one thread block adds alone, and than its threads are many; with more rows than
// blocks, and more taps than sums that are waited for together.
TEST_CASE("cuda: all_reduce of long rows", "[simt]") {
  if (!has_fused_cpu()) return;
  World world =
      world_of({{2, 4128, 4, {1, 0}, {9, 0}, DType::kBF16}, {2, 2100, 6, {5, 0}, {0, 0}}});
  Lane lane(2, largest_buffer(world.scenes), true, 2);
  const std::vector<Step> steps = {
      {0, Way::kOneShot}, {1, Way::kOneShot}, {0, Way::kTwoShot}, {1, Way::kTwoShot}};
  std::atomic<int> n_wrong = 0;
  for (std::uint32_t seed = 0; seed < 4; ++seed) {
    std::vector<std::function<void()>> programs;
    for (const Group& group : lane.groups)
      programs.push_back(program(world, group, steps, n_wrong));
    simt::run_streams(programs, seed);
  }
  CHECK(n_wrong == 0);
}

// One launch, recorded once, again and again; calls and signals are counted beyond 32 bits.
TEST_CASE("cuda: all_reduce is recorded once and played", "[simt][races]") {
  if (!has_fused_cpu()) return;
  const Exchanges how = GENERATE(Exchanges::kOneShot, Exchanges::kTwoShot, Exchanges::kSwitch);
  CAPTURE(static_cast<int>(how));
  World world = world_of(scenes_of(2));
  Lane lane(2, largest_buffer(world.scenes), true);
  int n_wrong = 0;
  std::vector<std::unique_ptr<cuda::Record>> records;
  std::vector<std::function<void()>> programs;
  std::vector<std::vector<std::byte>> results[2];
  for (const Group& group : lane.groups) {
    group.state->epoch = 0xfffffffcu;
    group.state->n_signals = 0xfffffffcu;
    auto* const pad = reinterpret_cast<std::uint32_t*>(group.own + cuda::kSignalsAt);
    std::fill_n(pad, group.n_blocks, 2 * 0xfffffffcu);
    const auto rank = static_cast<std::size_t>(group.rank);
    Place& place = world.place(1, rank);
    records.push_back(place.runtime().record([&] { place.all_reduce(group, how); }));
    const cuda::Record& record = *records.back();
    programs.emplace_back([&, rank] {
      for (int i = 0; i < 9; ++i) {
        place.reset();
        place.runtime().play(record);
        results[rank].push_back(place.result());
      }
    });
  }
  for (std::uint32_t seed = 0; seed < 5; ++seed) {
    simt::run_streams(programs, seed);
    for (auto& of_rank : results)
      for (const auto& result : of_rank) n_wrong += result == results[0].front() ? 0 : 1;
    if (how != Exchanges::kSwitch) CHECK(results[0].front() == world.expected[1]);
  }
  CHECK(n_wrong == 0);
  CHECK(lane.groups[0].state->epoch == 45 - 4);
}

TEST_CASE("cuda: all_reduce by the switch has another order, the same on every rank",
          "[simt][races]") {
  const int n_ranks = GENERATE(2, 4, 8);
  World world = world_of(scenes_of(n_ranks));
  Lane lane(n_ranks, largest_buffer(world.scenes), true);
  std::vector<std::vector<std::byte>> results(lane.groups.size());
  for (std::uint32_t seed = 0; seed < 6; ++seed) {
    std::vector<std::function<void()>> programs;
    for (const Group& group : lane.groups)
      programs.emplace_back([&] {
        const auto rank = static_cast<std::size_t>(group.rank);
        Place& place = world.place(2, rank);
        place.reset();
        place.all_reduce(group, seed % 3 == 2 ? Exchanges::kTwoShot : Exchanges::kSwitch);
        results[rank] = place.result();
      });
    simt::run_streams(programs, seed);
    const bool is_exact = seed % 3 == 2 || n_ranks == 2;  // two terms have one order
    if (has_fused_cpu()) CHECK((results[0] == world.expected[2]) == is_exact);
    CHECK(std::all_of(results.begin(), results.end(),
                      [&](const auto& result) { return result == results[0]; }));
  }
}

TEST_CASE("cuda: all_reduce takes every number, also the one that means none", "[simt]") {
  Lane lane(2, 1 << 12, GENERATE(true, false));
  std::vector<float> in(32, 1.0f), out[2] = {std::vector<float>(32), std::vector<float>(32)};
  std::fill_n(in.begin() + 3, 9, std::bit_cast<float>(cuda::kEmpty));
  in[20] = -0.0f;
  in[21] = std::bit_cast<float>(0x7f812345u);
  in[22] = std::bit_cast<float>(1u);
  std::vector<std::function<void()>> programs;
  for (const Group& group : lane.groups)
    programs.emplace_back([&] {
      const auto rank = static_cast<std::size_t>(group.rank);
      cuda::launch_all_gather(lane.devices[rank].runtime,
                              {group, in.data() + 16 * rank, out[rank].data(), 8, {}});
    });
  simt::run_streams(programs, 1);
  for (std::size_t i = 0; i < 32; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(in[i]);
    for (const auto& found : out)
      CHECK(std::bit_cast<std::uint32_t>(found[i]) == (bits == cuda::kEmpty ? 0x7fffffffu : bits));
  }
}

// All ranks but the last make three calls, the last one makes two.
TEST_CASE("cuda: all_reduce says for whom it waited in vain", "[simt]") {
  struct Case {
    Exchanges how;
    const char* text;
  };
  // Parts, or sums that lack a part.
  const Case of = GENERATE(Case{Exchanges::kOneShot, "the "}, Case{Exchanges::kTwoShot, "the "},
                           Case{Exchanges::kSwitch, "the signals"});
  World world = world_of(scenes_of(4));
  Lane lane(4, largest_buffer(world.scenes), true, 2, 20'000);
  std::vector<std::function<void()>> programs;
  for (const Group& group : lane.groups)
    programs.emplace_back([&] {
      for (int i = 0; i < (group.rank == 3 ? 2 : 3); ++i)
        world.place(0, static_cast<std::size_t>(group.rank)).all_reduce(group, of.how);
    });
  CHECK_THROWS_AS(simt::run_streams(programs, 5), simt::Trap);
  int n_reports = 0;
  for (const Group& group : lane.groups) {
    if (group.report->is_there == 0) continue;
    ++n_reports;
    const std::string text = cuda::describe(*group.report);
    CHECK_THAT(text, Catch::StartsWith("rank " + std::to_string(group.rank) + ", thread block "));
    CHECK_THAT(text, Catch::Contains(std::string("waited in vain for ") + of.text));
    CHECK_THAT(text, Catch::EndsWith(" of call 3; rank 3 has begun call 2"));
  }
  CHECK(n_reports == 1);
}

TEST_CASE("cuda: all_reduce refuses what does not fit", "[simt]") {
  const Scene scene = scenes_of(2)[0];
  World world = world_of({scene});
  Place& place = world.place(0, 0);
  Lane lane(2, cuda::all_reduce_bytes(2, scene.total(), scene.width, Exchanges::kTwoShot), false);
  const auto launch = [&](const auto& change, Exchanges how) {
    cuda::AllReduceArgs args = place.all_reduce_args(lane.groups[0]);
    change(args);
    cuda::launch_all_reduce(place.runtime(), args, how);
  };
  const auto same = [](cuda::AllReduceArgs&) {};
  CHECK_THROWS_WITH(launch(same, Exchanges::kSwitch), Catch::Contains("needs multicast"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.group.n_ranks = 3; }, Exchanges::kOneShot),
                    Catch::Contains("expected 2, 4 or 8 ranks, found 3"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.group.rank = 2; }, Exchanges::kOneShot),
                    Catch::Contains("expected a rank below 2, found 2"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.group.n_blocks = 65; }, Exchanges::kOneShot),
                    Catch::Contains("expected 1 to 64 thread blocks, found 65"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.group.buffer_bytes -= 16; }, Exchanges::kTwoShot),
                    Catch::Contains("expected buffers of 512 bytes or more, found 496"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.next.bytes = 8; }, Exchanges::kTwoShot),
                    Catch::Contains("multiples of 16 bytes, found 8"));
  CHECK_THROWS_WITH(launch([](auto& a) { a.op.segments.n_rows = 0; }, Exchanges::kTwoShot),
                    Catch::Contains("expected 1 row or more, found none"));
  CHECK_THROWS_WITH(cuda::launch_all_gather(place.runtime(), {lane.groups[0], {}, {}, 1, {}}),
                    Catch::Contains("expected a share for each of 2 ranks, found 1 words"));
  CHECK_THROWS_AS(cuda::launch_all_gather(place.runtime(), {lane.groups[0], {}, {}, 33, {}}),
                  InvalidArgument);
  CHECK_THROWS_AS(cuda::launch_reduce_scatter(place.runtime(), {lane.groups[0], {}, {}, 33, {}}),
                  InvalidArgument);
}

}  // namespace
}  // namespace duplex::simt_tests
