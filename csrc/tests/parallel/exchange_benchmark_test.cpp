// How long a meeting takes, between processes: duplex_tests "[!benchmark]". No pass or fail.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>

#include "parallel/group_exchange.h"
#include "tests/parallel/ranks.h"

namespace duplex {
namespace {

constexpr int kRounds = 3000;

struct Microseconds {
  double median, p99;
};

Microseconds of(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[times.size() * 99 / 100]};
}

// Rounds of `bytes`: the slab is written, the ranks meet, and every rank adds all slabs, in order,
// as the layers do. With 0 bytes: meetings alone. The times of this rank's rounds.
std::vector<double> run_rounds(const Group& group, std::size_t bytes) {
  GroupExchange exchange(group, 0);
  std::vector<float> row(bytes / 4, 1.5f), sum(bytes / 4);
  std::vector<double> times;
  exchange.meet(8);
  for (int round = 0; round < kRounds; ++round) {
    const auto start = Clock::now();
    std::copy(row.begin(), row.end(), static_cast<float*>(exchange.mine()));
    const auto slabs = exchange.meet(bytes);
    for (std::size_t part = 0; part < slabs.size(); ++part) {
      const auto* const values = static_cast<const float*>(slabs[part]);
      for (std::size_t i = 0; i < sum.size(); ++i)
        sum[i] = part == 0 ? values[i] : sum[i] + values[i];
    }
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  CHECK(std::all_of(sum.begin(), sum.end(), [&](float value) {
    return value == 1.5f * static_cast<float>(group.n_ranks());
  }));
  return times;
}

Microseconds measure(int n_ranks, std::size_t bytes) {
  GroupOptions options = small_group(n_ranks);
  options.slab_bytes = std::max<std::size_t>(bytes, 64);
  const Group group = Group::create(options);
  std::vector<pid_t> children;
  for (int rank = 1; rank < n_ranks; ++rank) {
    children.push_back(start_process(group, rank, [=](const Group& mine) {
      run_rounds(mine, bytes);
      return 0;
    }));
  }
  const Microseconds result = of(run_rounds(group, bytes));
  for (const pid_t child : children) CHECK(end_of(child) == 0);
  return result;
}

TEST_CASE("meetings between processes", "[!benchmark]") {
  std::printf("one round, us: median (p99); %u cores\n", std::thread::hardware_concurrency());
  for (const int n_ranks : {2, 4}) {
    std::printf("%d ranks:", n_ranks);
    for (const std::size_t bytes : {0u, 8u << 10, 64u << 10, 320u << 10, 1u << 20}) {
      const Microseconds time = measure(n_ranks, bytes);
      std::printf("  %zu KB %.1f (%.1f)", bytes >> 10, time.median, time.p99);
    }
    std::printf("\n");
  }
}

}  // namespace
}  // namespace duplex
