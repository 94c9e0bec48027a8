// Launches that begin before the one in front of them has ended, in the twin itself: a wait that is
// missing, or too late, shows.
#include "device/chain.cuh"

#include <string>
#include <vector>

#include "device/runtime.h"
#include "tests/simt/arrange.h"

namespace duplex::cuda {
namespace {

using simt_tests::Arrange;
using simt_tests::kOrders;

constexpr int kThreads = 64, kBlocks = 5;

// to = from + 1, number by number.
struct StepArgs {
  const int* from;
  int* to;
  enum class Mistake : std::uint8_t { kNone, kReadsEarly, kWritesEarly, kOneReturns, kNoWait };
  Mistake mistake;
};
using Mistake = StepArgs::Mistake;

DUPLEX_KERNEL step_kernel(StepArgs args) {
  const int i = block_x() * n_threads() + thread_index();
  let_next_grid_begin();
  if (args.mistake == Mistake::kOneReturns && i == kThreads + 7) return;
  const int early = args.mistake == Mistake::kReadsEarly ? args.from[i] : 0;
  if (args.mistake == Mistake::kWritesEarly) args.to[i] = 0;
  sync_block();
  if (args.mistake != Mistake::kNoWait) wait_for_previous_grid();
  args.to[i] = (args.mistake == Mistake::kReadsEarly ? early : args.from[i]) + 1;
}

// Four steps between two rows of numbers, there and back, `mistake` in the third.
bool steps_are_right(Mistake mistake, bool is_early) {
  constexpr std::size_t kNumbers = kThreads * kBlocks;
  std::vector<int> a(kNumbers, 1), b(kNumbers, 0);
  Runtime runtime;
  const auto step = [&](const int* from, int* to, Mistake of) {
    if (is_early)
      runtime.launch_early(step_kernel, {kBlocks}, kThreads, 0, StepArgs{from, to, of});
    else
      runtime.launch(step_kernel, {kBlocks}, kThreads, 0, StepArgs{from, to, of});
  };
  const auto record = runtime.record([&] {
    step(a.data(), b.data(), Mistake::kNone);
    step(b.data(), a.data(), Mistake::kNone);
    step(a.data(), b.data(), mistake);
    step(b.data(), a.data(), Mistake::kNone);
  });
  runtime.play(*record);
  runtime.play(*record);
  return a == std::vector<int>(kNumbers, 9) && b == std::vector<int>(kNumbers, 8);
}

TEST_CASE("a grid that begins early waits for the one in front of it", "[simt]") {
  int n_read = 0, n_written = 0;
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order);
    CHECK(steps_are_right(Mistake::kNone, true));
    n_read += steps_are_right(Mistake::kReadsEarly, true) ? 0 : 1;
    n_written += steps_are_right(Mistake::kWritesEarly, true) ? 0 : 1;
    for (const Mistake mistake : {Mistake::kReadsEarly, Mistake::kWritesEarly, Mistake::kNoWait})
      CHECK(steps_are_right(mistake, false));
  }
  CHECK(n_read == 3);
  CHECK(n_written > 0);
}

TEST_CASE("a thread that returns without the wait is named, recorded or not", "[simt]") {
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order);
    CHECK_THROWS_WITH(steps_are_right(Mistake::kOneReturns, true),
                      Catch::Contains("block (1, 0, 0): thread 7 has returned without wait"));
    CHECK_THROWS_WITH(steps_are_right(Mistake::kNoWait, true), Catch::Contains("without wait"));
  }
  std::vector<int> numbers(kThreads * kBlocks, 0);
  CHECK_THROWS_WITH(
      Runtime().launch_early(step_kernel, {kBlocks}, kThreads, 0,
                             StepArgs{numbers.data(), numbers.data(), Mistake::kNoWait}),
      Catch::Contains("without wait"));
}

TEST_CASE("a record holds launches alone", "[simt]") {
  Runtime runtime;
  int number = 0;
  CHECK_THROWS_WITH(runtime.record([&] { runtime.write(&number, &number, sizeof number); }),
                    Catch::Contains("nothing but launches"));
}

}  // namespace
}  // namespace duplex::cuda
