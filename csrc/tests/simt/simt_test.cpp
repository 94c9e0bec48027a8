// The twin itself: barriers, shuffles, the matrix product, shared memory, orders, and the reports
// of kernels that are wrong on purpose.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/error.h"
#include "core/types.h"
#include "device/platform.cuh"
#include "device/runtime.h"
#include "tests/simt/arrange.h"

namespace duplex::cuda {
namespace {

using simt_tests::Arrange;
using simt_tests::kOrders;

float* floats() { return reinterpret_cast<float*>(shared_memory()); }

// ---- barriers

struct SumArgs {
  float* out;  // (blocks, threads)
  int missing_barrier;
};

// Everyone leaves a number, and adds up everyone's.
DUPLEX_KERNEL sum_kernel(SumArgs args) {
  floats()[thread_index()] = static_cast<float>(thread_index() + block_x());
  if (args.missing_barrier != 1) sync_block();
  float sum = 0;
  for (int i = 0; i < n_threads(); ++i) sum += floats()[i];
  if (args.missing_barrier != 2) sync_block();
  floats()[thread_index()] = sum;
  sync_block();
  args.out[block_x() * n_threads() + thread_index()] = floats()[(thread_index() + 1) % n_threads()];
}

bool sums_are_right(int missing_barrier) {
  constexpr int kBlocks = 3, kThreads = 96;
  std::vector<float> out(kBlocks * kThreads, 0.0f);
  Runtime runtime;
  runtime.launch(sum_kernel, {kBlocks}, kThreads, kThreads * sizeof(float),
                 SumArgs{out.data(), missing_barrier});
  for (int i = 0; i < kBlocks * kThreads; ++i) {
    const int expected = kThreads * (kThreads - 1) / 2 + i / kThreads * kThreads;
    if (out[static_cast<std::size_t>(i)] != static_cast<float>(expected)) return false;
  }
  return true;
}

TEST_CASE("a barrier holds every thread of a block, in every order", "[simt]") {
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order, 7);
    CHECK(sums_are_right(0));
  }
}

TEST_CASE("a barrier that is missing shows in some order", "[simt]") {
  for (const int missing : {1, 2}) {
    int n_wrong = 0;
    for (const simt::Order order : kOrders) {
      const Arrange arrange(order, 7);
      n_wrong += sums_are_right(missing) ? 0 : 1;
    }
    CHECK(n_wrong > 0);
  }
}

struct OutArgs {
  float* out;
};

DUPLEX_KERNEL early_return_kernel(OutArgs args) {
  if (thread_index() % 3 == 0) return;
  sync_block();
  sync_block();
  args.out[thread_index()] = 1;
}

TEST_CASE("a barrier does not wait for threads that have returned", "[simt]") {
  std::vector<float> out(64, 0.0f);
  Runtime().launch(early_return_kernel, {}, 64, 0, OutArgs{out.data()});
  for (std::size_t i = 0; i < 64; ++i) CHECK(out[i] == (i % 3 == 0 ? 0 : 1));
}

struct OrderArgs {
  int* n_before;
  float* out;
};

DUPLEX_KERNEL order_kernel(OrderArgs args) {
  args.out[(*args.n_before)++] = static_cast<float>(thread_index());
}

std::vector<float> order_of(simt::Order order, std::uint32_t seed) {
  const Arrange arrange(order, seed);
  std::vector<float> out(32, -1.0f);
  int n_before = 0;
  Runtime().launch(order_kernel, {}, 32, 0, OrderArgs{&n_before, out.data()});
  return out;
}

TEST_CASE("threads run forward, in reverse, or at random by a seed", "[simt]") {
  const std::vector<float> forward = order_of(simt::Order::kForward, 0);
  std::vector<float> reverse = order_of(simt::Order::kReverse, 0);
  for (std::size_t i = 0; i < 32; ++i) CHECK(forward[i] == static_cast<float>(i));
  CHECK(reverse == std::vector<float>(forward.rbegin(), forward.rend()));
  const std::vector<float> random = order_of(simt::Order::kRandom, 5);
  CHECK(random == order_of(simt::Order::kRandom, 5));
  CHECK(random != order_of(simt::Order::kRandom, 6));
  CHECK(random != forward);
  CHECK(std::is_permutation(random.begin(), random.end(), forward.begin()));
}

// ---- warps

struct ShuffleArgs {
  int kind;
  int argument;
  int width;
  float* out;
};

DUPLEX_KERNEL shuffle_kernel(ShuffleArgs args) {
  const auto value = static_cast<float>(thread_index());
  args.out[thread_index()] = args.kind == 0   ? shuffle_down(value, args.argument, args.width)
                             : args.kind == 1 ? shuffle_xor(value, args.argument, args.width)
                                              : shuffle_from(value, args.argument, args.width);
}

// The lane that CUDA's guide names: a lane outside the group gives the own value.
int expected_lane(int kind, int lane, int argument, int width) {
  const int group = lane / width;
  if (kind == 2) return group * width + argument % width;
  const int source = kind == 0 ? lane + argument : lane ^ argument;
  return source / width > group ? lane : source;
}

TEST_CASE("shuffles reach into their group of lanes", "[simt]") {
  const int kind = GENERATE(0, 1, 2);
  const int width = GENERATE(1, 2, 4, 8, 16, 32);
  CAPTURE(kind, width);
  Runtime runtime;
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order, 3);
    for (int argument = 0; argument < 32; ++argument) {
      std::vector<float> out(64, -1.0f);
      runtime.launch(shuffle_kernel, {}, 64, 0, ShuffleArgs{kind, argument, width, out.data()});
      bool is_right = true;
      for (int i = 0; i < 64; ++i)
        is_right &= out[static_cast<std::size_t>(i)] ==
                    static_cast<float>(i / 32 * 32 + expected_lane(kind, i % 32, argument, width));
      CHECK(is_right);
    }
  }
}

TEST_CASE("a group of lanes has a size that there is", "[simt]") {
  std::vector<float> out(32, -1.0f);
  CHECK_THROWS_WITH(Runtime().launch(shuffle_kernel, {}, 32, 0, ShuffleArgs{0, 1, 12, out.data()}),
                    Catch::Contains("found 12"));
}

struct ProductArgs {
  const std::uint16_t* a;  // (16, 16)
  const std::uint16_t* b;  // (16, 8)
  float* c;                // (16, 8)
};

// Fragments as PTX's manual describes them, one element after the other: a0 a1 | a2 a3 | a4 a5 |
// a6 a7 with row g for i in {0, 1, 4, 5} else g + 8, and column 2t + (i & 1), + 8 from i = 4 on.
DUPLEX_KERNEL product_kernel(ProductArgs args) {
  const int g = thread_index() / 4, t = thread_index() % 4;
  Words a;
  std::uint32_t b[2];
  for (int i = 0; i < 8; i += 2) {
    const int row = i % 4 < 2 ? g : g + 8, column = 2 * t + (i < 4 ? 0 : 8);
    std::memcpy(&a.v[i / 2], &args.a[row * 16 + column], 4);
  }
  for (int i = 0; i < 4; i += 2) {
    const int row = 2 * t + (i < 2 ? 0 : 8);
    b[i / 2] = args.b[row * 8 + g] | static_cast<std::uint32_t>(args.b[(row + 1) * 8 + g]) << 16;
  }
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = args.c[(i < 2 ? g : g + 8) * 8 + 2 * t + i % 2];
  multiply_add(acc, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) args.c[(i < 2 ? g : g + 8) * 8 + 2 * t + i % 2] = acc[i];
}

TEST_CASE("the matrix product has the fragments of mma.m16n8k16", "[simt]") {
  std::mt19937 engine(5);
  const auto number = [&engine] {  // multiples of 1/8 below 4: every partial sum is exact
    return static_cast<float>(static_cast<int>(engine() % 64) - 32) / 8;
  };
  std::vector<std::uint16_t> a(16 * 16), b(16 * 8);
  for (std::uint16_t& x : a) x = float_to_bf16(number());
  for (std::uint16_t& x : b) x = float_to_bf16(number());
  std::vector<float> c(16 * 8);
  for (float& x : c) x = number();
  std::vector<float> expected = c;
  for (std::size_t row = 0; row < 16; ++row)
    for (std::size_t column = 0; column < 8; ++column)
      for (std::size_t k = 0; k < 16; ++k)
        expected[row * 8 + column] +=
            bf16_to_float(a[row * 16 + k]) * bf16_to_float(b[k * 8 + column]);
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order, 3);
    std::vector<float> result = c;
    Runtime().launch(product_kernel, {}, 32, 0, ProductArgs{a.data(), b.data(), result.data()});
    CHECK(result == expected);
  }
}

// ---- shared memory

DUPLEX_KERNEL stale_kernel(OutArgs args) {
  if (thread_index() == 0) args.out[block_x()] = floats()[3];
  sync_block();
  floats()[3] = 1.0f;
}

TEST_CASE("shared memory is not a number until it is written, in every block anew", "[simt]") {
  std::vector<float> out(4, 0.0f);
  Runtime().launch(stale_kernel, {4}, 32, 16, OutArgs{out.data()});
  for (const float value : out) CHECK(std::isnan(value));
}

#if !defined(__SANITIZE_ADDRESS__)  // which would end the program
DUPLEX_KERNEL overrun_kernel(OutArgs) {
  if (thread_index() == 31) floats()[thread_index()] = 0.0f;
}

TEST_CASE("a write behind the shared memory is reported", "[simt]") {
  CHECK_THROWS_WITH(
      Runtime().launch(overrun_kernel, {2, 3}, 32, 31 * 4, OutArgs{nullptr}),
      Catch::Contains("124 bytes of shared memory), block (0, 0, 0): a thread wrote outside"));
}
#endif

// ---- asynchronous copies

struct CopyArgs {
  const float* in;  // (2, 4 threads) of a thread block
  float* out;       // (2, 4 threads)
  int mistake;
};

DUPLEX_KERNEL copy_kernel(CopyArgs args) {
  const int n = 4 * n_threads(), i = thread_index(), next = (i + 1) % n_threads();
  copy_async(floats() + 4 * i, args.in + 4 * i);
  commit_copies();
  copy_async(floats() + n + 4 * i, args.in + n + 4 * i);
  commit_copies();
  if (args.mistake == 1)
    wait_copies<2>();
  else
    wait_copies<1>();
  sync_block();
  for (int c = 0; c < 4; ++c) args.out[4 * next + c] = floats()[4 * next + c];
  if (args.mistake != 2) sync_block();
  copy_async(floats() + 4 * i, args.in + n + 4 * i);  // over what was read
  commit_copies();
  wait_copies<1>();
  if (args.mistake != 3) sync_block();
  for (int c = 0; c < 4; ++c) args.out[n + 4 * next + c] = floats()[n + 4 * next + c];
}

TEST_CASE("copies arrive in their groups, and a wrong wait shows in some order", "[simt]") {
  constexpr int kThreads = 64;
  std::vector<float> in(2 * 4 * kThreads);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<float>(i);
  for (const int mistake : {0, 1, 2, 3}) {
    CAPTURE(mistake);
    int n_wrong = 0;
    for (const simt::Order order : kOrders) {
      const Arrange arrange(order);
      std::vector<float> out(in.size(), -1.0f);
      Runtime().launch(copy_kernel, {}, kThreads, in.size() * sizeof(float),
                       CopyArgs{in.data(), out.data(), mistake});
      n_wrong += out == in ? 0 : 1;
    }
    CHECK((n_wrong > 0) == (mistake > 0));
  }
}

// ---- kernels that cannot end

struct WrongArgs {
  int way;
};

DUPLEX_KERNEL wrong_kernel(WrongArgs args) {
  const int i = thread_index();
  if (args.way == 0 && i == 95) return;
  if (args.way == 1 && i >= 40 && i < 64) sync_block();
  if (args.way == 2 && i % 2 == 1) shuffle_xor(0.0f, 1, 32);
  if (args.way == 3 && i == 7) throw std::runtime_error("thread seven");
  shuffle_down(0.0f, 1, 32);
  sync_block();
}

TEST_CASE("a lane that others wait for in vain is named", "[simt]") {
  const auto run = [](int way, int n_threads) {
    Runtime().launch(wrong_kernel, {2}, n_threads, 0, WrongArgs{way});
  };
  for (const simt::Order order : kOrders) {
    const Arrange arrange(order, 9);
    CHECK_NOTHROW(run(-1, 128));
    CHECK_THROWS_WITH(run(0, 128), Catch::Contains("shuffle_down: lane 31 of warp 2 has returned"));
    CHECK_THROWS_WITH(run(1, 128),
                      Catch::Contains("shuffle_down: lane 8 of warp 1 waits at a barrier"));
    CHECK_THROWS_WITH(run(2, 32),
                      Catch::Contains("shuffle_down: lane 1 of warp 0 waits in shuffle_xor"));
    CHECK_THROWS_WITH(run(-1, 40),
                      Catch::Contains("shuffle_down: lane 8 of warp 1 does not exist"));
    CHECK_THROWS_WITH(run(3, 32), "thread seven");
    CHECK_NOTHROW(run(-1, 128));
  }
}

TEST_CASE("the report of a deadlock names the launch and what every thread waits for", "[simt]") {
  std::string text;
  try {
    Runtime().launch(wrong_kernel, {1, 2}, 128, 16, WrongArgs{1});
  } catch (const std::logic_error& error) {
    text = error.what();
  }
  CAPTURE(text);
  for (const char* part :
       {"WrongArgs", "grid 1 x 2 x 1", "128 threads", "16 bytes", "block (0, 0, 0)", "deadlock",
        "[threads 0-31: waits at a barrier; 32-39: waits in shuffle_down; "
        "40-127: waits at a barrier]"})
    CHECK_THAT(text, Catch::Contains(part));
}

TEST_CASE("a launch that no GPU takes is refused", "[simt]") {
  Runtime runtime;
  const auto launch = [&runtime](Grid grid, int n_threads, std::size_t bytes) {
    runtime.launch(wrong_kernel, grid, n_threads, bytes, WrongArgs{-1});
  };
  CHECK_THROWS_AS(launch({0}, 32, 0), std::logic_error);
  CHECK_THROWS_AS(launch({1, 65536}, 32, 0), std::logic_error);
  CHECK_THROWS_AS(launch({}, 1056, 0), std::logic_error);
  CHECK_THROWS_AS(launch({}, 32, std::size_t{228} << 10), std::logic_error);
  CHECK_NOTHROW(launch({}, 1024, std::size_t{227} << 10));
}

// ---- the runtime's memory

TEST_CASE("staged memory stays for as long as the real ring would keep it", "[simt]") {
  Runtime runtime;
  CHECK(runtime.device_name() == "host");
  const std::vector<std::byte> half(std::size_t{2} << 20, std::byte{1});
  const int value = 42;
  const auto* first = static_cast<const int*>(runtime.stage(&value, sizeof value));
  runtime.stage(half.data(), half.size() - sizeof value);
  CHECK(*first == 42);
  CHECK_THROWS_AS(runtime.stage(half.data(), half.size() + 1), CapacityError);
  CHECK_NOTHROW(runtime.stage(half.data(), half.size()));
}

TEST_CASE("the twin's memory comes zeroed, and its pages can be mapped", "[simt]") {
  Runtime runtime;
  auto* const memory = static_cast<std::byte*>(runtime.allocate(1000));
  CHECK(reinterpret_cast<std::uintptr_t>(memory) % 256 == 0);
  CHECK(std::all_of(memory, memory + 1000, [](std::byte b) { return b == std::byte{0}; }));
  runtime.release(memory);
  const auto pages = runtime.create_pages(runtime.page_granularity(), 2);
  std::byte* const range = pages->reserve(2 * runtime.page_granularity());
  pages->map(range, 1);
  int there = 7, back = 0;
  runtime.write(range, &there, sizeof there);
  runtime.read(&back, range, sizeof back);
  CHECK(back == 7);
  pages->free(range, 2 * runtime.page_granularity());
}

}  // namespace
}  // namespace duplex::cuda
