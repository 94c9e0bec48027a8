// The CUDA backend's sums over ranks: N emulated GPUs run their grids at once, in random
// interleavings, with stores that happen late and in any order; the result is the CPU backend's of
// the summed parts, byte for byte.
#include <algorithm>
#include <random>

#include "tests/simt/ranks.h"

namespace duplex::simt_tests {
namespace {

// A way to the sum: with multicast or without.
enum class Way : std::uint8_t { kOneShot, kTwoShot, kShares };
constexpr Way kWays[] = {Way::kOneShot, Way::kTwoShot, Way::kShares};

std::vector<Scene> scenes_of(int n_ranks) {
  return {{n_ranks, 24, 4, {1, 1}, {0, 5}, DType::kF32},
          {n_ranks, 40, 3, {4, 1}, {2, 63}, DType::kBF16},
          {n_ranks, 70, 1, {2, 3}, {64, 0}, DType::kF32},
          {n_ranks, 12, 4, {1, 0}, {7, 0}, DType::kBF16}};
}

std::int64_t largest_buffer(const std::vector<Scene>& scenes) {
  std::int64_t bytes = 0;
  for (const Scene& scene : scenes)
    for (const Exchanges how : {Exchanges::kOneShot, Exchanges::kTwoShot})
      bytes = std::max(bytes,
                       cuda::all_reduce_bytes(scene.n_ranks, scene.total() + 1, scene.width, how));
  return bytes;
}

// The places of every rank, and the bytes that all of them should end with, by scene.
struct World {
  explicit World(const std::vector<Scene>& of) : scenes(of) {
    for (std::size_t s = 0; s < scenes.size(); ++s) {
      for (int r = 0; r < scenes[s].n_ranks; ++r)
        places.push_back(
            std::make_unique<Place>(scenes[s], r, 100 + static_cast<std::uint32_t>(s)));
      expected.push_back(places.back()->expected());
    }
  }
  Place& place(std::size_t scene, std::size_t rank) {
    return *places[scene * static_cast<std::size_t>(scenes[0].n_ranks) + rank];
  }

  std::vector<Scene> scenes;
  std::vector<std::unique_ptr<Place>> places;
  std::vector<std::vector<std::byte>> expected;
};

void compute(Place& place, const Group& group, Way way) {
  if (way == Way::kShares)
    place.scatter_and_gather(group);
  else
    place.all_reduce(group, way == Way::kOneShot ? Exchanges::kOneShot : Exchanges::kTwoShot);
}

struct Step {
  std::size_t scene;
  Way way;
};

// The program of one rank: the steps, and how many of them end with other bytes.
std::function<void()> program(World& world, const Group& group, const std::vector<Step>& steps,
                              int& n_wrong) {
  return [&world, &group, &steps, &n_wrong] {
    for (const Step& step : steps) {
      Place& place = world.place(step.scene, static_cast<std::size_t>(group.rank));
      place.reset();
      compute(place, group, step.way);
      n_wrong += place.result() == world.expected[step.scene] ? 0 : 1;
    }
  };
}

std::vector<Step> random_steps(std::mt19937& random, std::size_t n_scenes, int n) {
  std::vector<Step> steps;
  for (int i = 0; i < n; ++i) steps.push_back({random() % n_scenes, kWays[random() % 3]});
  return steps;
}

// Random interleavings of random calls; the lane goes on from one to the next.
int n_wrong_in(int n_ranks, int n_interleavings, bool has_multicast, std::uint32_t seed) {
  World world(scenes_of(n_ranks));
  Lane lane(n_ranks, largest_buffer(world.scenes), has_multicast);
  std::mt19937 random(seed);
  int n_wrong = 0;
  for (int i = 0; i < n_interleavings; ++i) {
    const std::vector<Step> steps = random_steps(random, world.scenes.size(), 4);
    std::vector<std::function<void()>> programs;
    for (const Group& group : lane.groups)
      programs.push_back(program(world, group, steps, n_wrong));
    simt::run_streams(programs, static_cast<std::uint32_t>(random()));
  }
  return n_wrong;
}

TEST_CASE("cuda: all_reduce in random interleavings", "[simt]") {
  if (!has_fused_cpu()) return;
  const bool has_multicast = GENERATE(true, false);
  CHECK(n_wrong_in(2, 300, has_multicast, 1) == 0);
  CHECK(n_wrong_in(4, 60, has_multicast, 2) == 0);
  CHECK(n_wrong_in(8, 15, has_multicast, 3) == 0);
}

}  // namespace
}  // namespace duplex::simt_tests
