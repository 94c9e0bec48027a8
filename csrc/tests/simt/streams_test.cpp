// Several GPUs at once, itself: stores are seen late and in any order, but for fences.
#include "tests/simt/streams.h"

#include <random>

#include "core/error.h"
#include "device/runtime.h"
#include "device/system.cuh"
#include "tests/simt/arrange.h"

namespace duplex::cuda {
namespace {

constexpr int kThreads = 64;

// Thread 1 of the sender leaves a number, thread 0 a flag, after a fence of some kind.
enum class Fence : std::uint8_t { kNone, kOfFlag, kOfFlagNoBarrier, kOfNumber };
struct MessageArgs {
  Words* number;
  std::uint32_t* flag;
  Fence fence;
  bool is_sender;
  std::uint32_t* found;
};

DUPLEX_KERNEL message_kernel(MessageArgs args) {
  if (args.is_sender) {
    if (thread_index() == 1) store_system(args.number, {{7, 7, 7, 7}});
    if (thread_index() == 1 && args.fence == Fence::kOfNumber) fence_system();
    if (args.fence != Fence::kOfFlagNoBarrier) sync_block();
    if (thread_index() == 0) {
      if (args.fence == Fence::kOfFlag || args.fence == Fence::kOfFlagNoBarrier) fence_system();
      store_word_system(args.flag, 1);
    }
  } else if (thread_index() == 0) {
    while (load_word_acquire(args.flag) == 0) clock_ns();
    const Words number = load_system(args.number);
    for (const std::uint32_t word : number.v) *args.found += word;
  }
}

// Runs that find another number than the one sent.
int n_stale(Fence fence) {
  int n = 0;
  for (std::uint32_t seed = 0; seed < 200; ++seed) {
    Words number{};
    std::uint32_t flag = 0, found = 0;
    Runtime runtime;
    const auto run = [&](bool is_sender) {
      runtime.launch(message_kernel, {}, kThreads, 0,
                     MessageArgs{&number, &flag, fence, is_sender, &found});
    };
    simt::run_streams({[&] { run(true); }, [&] { run(false); }}, seed);
    n += found == 28 ? 0 : 1;
  }
  return n;
}

TEST_CASE("a store is seen late, but not behind a fence", "[simt]") {
  CHECK(n_stale(Fence::kNone) > 20);
  CHECK(n_stale(Fence::kOfFlagNoBarrier) > 5);
  CHECK(n_stale(Fence::kOfFlag) == 0);
  CHECK(n_stale(Fence::kOfNumber) == 0);
}

struct CountArgs {
  std::uint32_t* multicast;
  const std::uint32_t* own;
  std::uint32_t n;
  Words* sums;
};

DUPLEX_KERNEL count_kernel(CountArgs args) {
  if (thread_index() != 0) return;
  multicast_count_release(args.multicast);
  while (load_word_acquire(args.own) < args.n) clock_ns();
  multicast_store(args.multicast + 4, {{1, 2, 3, 4}});
  *args.sums = multicast_sum(args.multicast + 8);
}

TEST_CASE("a multicast address stands for a place of every rank", "[simt]") {
  struct alignas(16) Memory {
    std::uint32_t words[12] = {};
  };
  Memory memory[3];
  Words sums[3];
  for (std::size_t r = 0; r < 3; ++r)
    for (std::size_t i = 8; i < 12; ++i)
      memory[r].words[i] = std::bit_cast<std::uint32_t>(static_cast<float>(r + i));
  const auto address = [&](std::size_t r) { return reinterpret_cast<std::byte*>(&memory[r]); };
  const simt::Multicast object({address(0), address(1), address(2)}, sizeof(Memory));
  auto* const base = reinterpret_cast<std::uint32_t*>(object.address());
  Runtime runtime;
  std::vector<std::function<void()>> programs;
  for (std::size_t r = 0; r < 3; ++r)
    programs.emplace_back([&, r] {
      runtime.launch(count_kernel, {}, 32, 0, CountArgs{base, memory[r].words, 3, &sums[r]});
    });
  simt::run_streams(programs, 3);
  for (const Memory& of : memory) {
    CHECK(of.words[0] == 3);
    for (std::uint32_t i = 0; i < 4; ++i) CHECK(of.words[4 + i] == i + 1);
  }
  for (const Words& sum : sums)
    for (std::size_t i = 0; i < 4; ++i)
      CHECK(std::bit_cast<float>(sum.v[i]) == static_cast<float>(3 * (8 + i) + 3));
  Words words{};
  CHECK_THROWS_WITH(store_system(base, words), Catch::Contains("plain store to a multicast"));
  CHECK_THROWS_WITH(load_system(base), Catch::Contains("plain load of a multicast"));
  CHECK_THROWS_WITH(multicast_store(&words, words), Catch::Contains("no multicast object's"));
}

struct FailArgs {
  int way;
};

DUPLEX_KERNEL fail_kernel(FailArgs args) {
  if (args.way == 1 && thread_index() == 5) stop();
  if (args.way == 2 && thread_index() < 8) return;
  if (args.way == 2) shuffle_down(0.0f, 1, 32);
}

TEST_CASE("what a kernel or a program throws leaves run_streams", "[simt]") {
  Runtime runtime;
  const auto launch = [&](int way) {
    return [&runtime, way] { runtime.launch(fail_kernel, {2}, 32, 0, FailArgs{way}); };
  };
  CHECK_NOTHROW(simt::run_streams({launch(0), launch(0)}, 1));
  CHECK_THROWS_AS(simt::run_streams({launch(0), launch(1)}, 1), simt::Trap);
  CHECK_THROWS_WITH(simt::run_streams({launch(2), launch(0)}, 1), Catch::Contains("deadlock"));
  CHECK_THROWS_WITH(simt::run_streams({launch(0), [] { fail("a program"); }}, 1), "a program");
  CHECK_NOTHROW(launch(0)());
  CHECK_THROWS_WITH(clock_ns(), Catch::Contains("outside of one"));
}

}  // namespace
}  // namespace duplex::cuda
