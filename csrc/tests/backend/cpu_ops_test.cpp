// How the CPU backend cuts operations for its threads (cpu_ops.cpp): any number of threads gives
// the same bytes. Also the gather of pixels, and the memory that the backend hands out.
#include <sched.h>

#include <thread>

#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

// One layer's worth of work on two streams, by one backend.
struct Work {
  static constexpr std::int32_t kRows = 40, kWidth = 48, kHeads = 6, kHead = 16, kRel = 2;
  static constexpr std::int32_t kExtent = 16, kProjected = (kHeads + 4) * kHead + kHeads * kRel;
  static constexpr std::int32_t kStride = 192;
  static constexpr std::int64_t kBlock = 4 * kHead * kBlockPositions * 4;  // two heads, float32

  explicit Work(Random random)
      : x(random_rows(random, kRows, kWidth, kWidth)),
        weights(random_rows(random, kProjected, kWidth, kWidth)),
        vector(random_rows(random, 8, kWidth, kWidth)),
        bank(random_rows(random, kRel, kExtent + 128, kExtent + 128)) {}

  std::vector<Segment> segments(const TapeView& a, const TapeView& b, const TapeView& a_conv,
                                const TapeView& b_conv) const {
    const std::int32_t half = kRows / 2 + 3;
    return {{.row_begin = 0, .n_rows = half, .global = a, .local = a, .conv = a_conv},
            {.row_begin = half, .n_rows = kRows - half, .global = b, .local = b, .conv = b_conv}};
  }
  // Every result of every operation, as bytes.
  std::vector<std::byte> run(Backend& backend) {
    std::vector<std::byte> packed(backend.packed_bytes(kProjected, kWidth, DType::kF32));
    backend.pack({weights.address(0), DType::kF32, kProjected, kWidth},
                 {kWidth, kWidth, kWidth, DType::kF32}, 0, packed.data());
    HostTape a(1, kBlock), b(1, kBlock), a_conv(kRows, 1024), b_conv(kRows, 1024);
    const std::vector<Segment> parts = segments(a.view, b.view, a_conv.view, b_conv.view);
    const Segments all{parts.data(), 2, kRows};
    RowBuffer projected(kRows, 0, kStride, DType::kF32), q(kRows, 0, 96, DType::kF32);
    RowBuffer attended(kRows, 0, 96, DType::kF32), normed(kRows, 0, kWidth, DType::kF32);
    RowBuffer hidden = x;
    const AttentionShape shape{kHeads, 2, kHead, kExtent, 0};
    backend.run_awake([&] {
      backend.linear({.w = {packed.data(), kProjected, kWidth, DType::kF32},
                      .x = x.rows(),
                      .n_rows = kRows,
                      .y = projected.floats(),
                      .y_stride = kStride});
      backend.kv_append({.segments = all,
                         .shape = shape,
                         .d_head_padded = kHead,
                         .qkvr = projected.floats(),
                         .stride = kStride,
                         .k_conv = {vector.floats(), 0, 32},
                         .v_conv = {vector.floats(), 128, 32},
                         .kernel = 4,
                         .q_norm = vector.floats(),
                         .k_norm = vector.floats(),
                         .eps = 1e-6f,
                         .is_local = false,
                         .log_scaling_floor = 0,
                         .log_scaling_alpha = 0,
                         .layer_offset_bytes = 0,
                         .kv_dtype = DType::kF32,
                         .q = q.rows()});
      backend.attention({.segments = all,
                         .shape = shape,
                         .d_head_padded = kHead,
                         .d_rel = kRel,
                         .q = q.rows(),
                         .r = projected.floats() + (kHeads + 4) * kHead,
                         .r_stride = kStride,
                         .rel_bank = bank.floats(),
                         .rel_stride = bank.stride(),
                         .is_local = false,
                         .log_scaling_floor = 0,
                         .log_scaling_alpha = 0,
                         .layer_offset_bytes = 0,
                         .kv_dtype = DType::kF32,
                         .out = attended.rows()});
      backend.conv_add_norm({.segments = all,
                             .parts = {attended.floats()},
                             .n_parts = 1,
                             .x_stride = attended.stride(),
                             .scale = 0.5f,
                             .conv = {vector.floats(), 256, kWidth},
                             .kernel = 4,
                             .hidden = hidden.floats(),
                             .hidden_stride = kWidth,
                             .norm = vector.floats(),
                             .eps = 1e-6f,
                             .width = kWidth,
                             .out = normed.rows()});
    });
    std::vector<std::byte> bytes = a.memory;
    for (const auto* tape : {&b, &a_conv, &b_conv})
      bytes.insert(bytes.end(), tape->memory.begin(), tape->memory.end());
    for (RowBuffer* rows : {&projected, &q, &attended, &hidden, &normed}) {
      const auto* begin = static_cast<const std::byte*>(rows->address(0));
      bytes.insert(bytes.end(), begin, begin + rows->n_rows() * rows->stride() * 4);
    }
    return bytes;
  }

  RowBuffer x, weights, vector, bank;
};

TEST_CASE("any number of threads gives the same bytes", "[threads]") {
  const std::string isa = GENERATE(from_range(instruction_sets()));
  CAPTURE(isa);
  CpuBackend one({1, isa});
  const std::vector<std::byte> expected = Work(Random(18)).run(one);
  for (const int n_threads : {2, 3, 4}) {
    CpuBackend backend({n_threads, isa});
    for (int i = 0; i < 3; ++i) CHECK((Work(Random(18)).run(backend) == expected));
    CHECK((Work(Random(18)).run(*backend.background_lane()) == expected));
  }
}

TEST_CASE("fold gathers blocks of cells") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::int32_t n_threads = GENERATE(1, 3);
  constexpr std::int32_t kPatches = 3, kT = 4, kH = 6, kW = 6, kC = 5, kTFold = 2, kHwFold = 3;
  constexpr std::int64_t kCellStride = 16, kWidth = kTFold * kHwFold * kHwFold * kC;
  CpuBackend backend({n_threads, ""});
  Random random(19);
  RowBuffer cells = random_rows(random, kPatches * kT * kH * kW, kC, kCellStride);
  constexpr std::int64_t kRows = kPatches * (kT / kTFold) * (kH / kHwFold) * (kW / kHwFold);
  RowBuffer out(kRows, 0, round_up(kWidth, kColumnAlign), dtype);
  backend.fold({.x = cells.floats(),
                .x_stride = kCellStride,
                .n_patches = kPatches,
                .t = kT,
                .h = kH,
                .w = kW,
                .c = kC,
                .t_fold = kTFold,
                .hw_fold = kHwFold,
                .out = out.rows()});
  bool is_right = true;
  for (std::int64_t row = 0; row < kRows; ++row)
    for (std::int64_t column = 0; column < out.stride(); ++column) {
      if (column >= kWidth) {
        is_right &= out.get(row, column) == 0;
        continue;
      }
      const std::int64_t c = column % kC;
      const std::int64_t x = row % 2 * kHwFold + column / kC % kHwFold;
      const std::int64_t y = row / 2 % 2 * kHwFold + column / (kC * kHwFold) % kHwFold;
      const std::int64_t t = row / 4 % 2 * kTFold + column / (kC * kHwFold * kHwFold);
      const std::int64_t patch = row / 8;
      is_right &= out.get(row, column) ==
                  rounded(cells.get(((patch * kT + t) * kH + y) * kW + x, c), dtype);
    }
  CHECK(is_right);
}

TEST_CASE("the backend says what it is") {
  const CpuBackend backend({2, "portable"});
  CHECK(backend.name() == "cpu");
  CHECK(backend.description() == "cpu portable, 2 threads");
  CHECK(CpuBackend({1, "portable"}).description() == "cpu portable, 1 thread");
  CHECK(CpuBackend({0, ""}).n_threads() >= 1);
  CHECK_THROWS_AS(CpuBackend({-1, ""}), InvalidArgument);
  CHECK_THROWS_AS(CpuBackend({4000, ""}), InvalidArgument);
}

TEST_CASE("there are as many threads as processors that the caller may use") {
  std::thread([] {
    cpu_set_t allowed;
    REQUIRE(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
    CHECK(CpuBackend({0, ""}).n_threads() == CPU_COUNT(&allowed));
    const unsigned first = static_cast<unsigned>(sched_getcpu());
    CPU_ZERO(&allowed);
    CPU_SET(first, &allowed);
    REQUIRE(sched_setaffinity(0, sizeof allowed, &allowed) == 0);
    CHECK(CpuBackend({0, ""}).n_threads() == 1);
  }).join();
}

TEST_CASE("memory comes zeroed and aligned, in any size") {
  CpuBackend backend({1, ""});
  for (const std::size_t bytes : {std::size_t{0}, std::size_t{1}, std::size_t{4097},
                                  (std::size_t{2} << 20), (std::size_t{5} << 20) + 3}) {
    const auto buffer = backend.allocate(bytes);
    REQUIRE(buffer->data() != nullptr);
    CHECK(buffer->bytes() == bytes);
    const std::uintptr_t alignment = bytes >= (std::size_t{2} << 20) ? std::size_t{2} << 20 : 64;
    CHECK(reinterpret_cast<std::uintptr_t>(buffer->data()) % alignment == 0);
    auto* const data = static_cast<std::byte*>(buffer->data());
    CHECK(std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; }));
    std::fill_n(data, bytes, std::byte{1});
  }
  CHECK_THROWS_AS(backend.allocate(std::size_t{1} << 60), CapacityError);
}

}  // namespace
}  // namespace duplex::backend_tests
