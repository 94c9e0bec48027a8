// Operations one behind the other in a recorded pass, where a kernel begins before the one in front
// of it has ended: the bytes are those of the same launches one by one.
#include <functional>

#include "tests/simt/experts.h"
#include "tests/simt/fixtures.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int32_t kRows = 3, kWidth = 336, kOut = 192;
constexpr float kEps = 1e-6f;

// What is in front of an operation, and what it is given.
struct Scene {
  Backend& backend;
  Memory& memory;
  Random& random;
  Segments segments;
  Rows rows;  // (n_rows, kWidth)
  std::int32_t n_rows;

  float* weight(std::int64_t n_rows_of, std::int64_t width) const {
    RowBuffer of = random_rows(random, n_rows_of, width, width);
    return memory.put_floats(of);
  }
};
// launch(out) for rows of kOut float32 numbers.
using Launch = std::function<void(float* out)>;
using Make = std::function<Launch(const Scene&)>;

// Two tapes of one stream that has 130 positions behind it, zeros all.
struct Tapes {
  static constexpr std::int64_t kPosition = 130, kLayerOffset = 128;

  Tapes(Memory& memory, std::int64_t n_rows)
      : kv(div_up(kPosition + n_rows, kBlockPositions), 1 << 14), conv(kPosition + n_rows, 4096) {
    std::fill(kv.memory.begin(), kv.memory.end(), std::byte{0});
    std::fill(conv.memory.begin(), conv.memory.end(), std::byte{0});
    segment = {.row_begin = 0,
               .n_rows = static_cast<std::int32_t>(n_rows),
               .position = kPosition,
               .global = memory.put(kv),
               .local = {},
               .conv = memory.put(conv)};
  }
  HostTape kv, conv;
  Segment segment{};
};

// Passes of: a norm leaves rows, the operation reads them; both again, with other rows in the same
// place. The numbers of each pass are other ones; gives what the last one leaves.
RowBuffer run(Backend& backend, DType dtype, std::int32_t n_rows, const Make& make,
              const std::vector<std::uint32_t>& passes) {
  Memory memory(backend);
  Random random(7);
  Tapes tapes(memory, n_rows);
  const Segments segments{&tapes.segment, 1, n_rows};
  RowBuffer rows(n_rows, 0, kWidth, dtype), ones(1, kWidth, kWidth, DType::kF32);
  for (std::int64_t c = 0; c < kWidth; ++c) ones.set(0, c, 1.0f);
  const Scene scene{backend, memory, random, segments, memory.put(rows), n_rows};
  float* const weight = memory.put_floats(ones);
  const Launch launch = make(scene);
  RowBuffer numbers(2 * n_rows, kWidth, kWidth, DType::kF32);
  RowBuffer out(2 * n_rows, 0, kOut, DType::kF32);
  float* const numbers_there = memory.put_floats(numbers);
  float* const out_there = memory.put_floats(out);
  for (const std::uint32_t seed : passes) {
    Random of_pass(seed);
    numbers = random_rows(of_pass, 2 * n_rows, kWidth, kWidth);
    backend.write(numbers_there, numbers.address(0), bytes_of(numbers, DType::kF32));
    backend.run_layers(segments, 1, [&](std::int32_t) {
      for (std::int64_t i = 0; i < 2; ++i) {
        backend.norm({numbers_there + i * n_rows * kWidth, kWidth, weight, kEps, kWidth, n_rows,
                      Activation::kNone, scene.rows});
        launch(out_there + i * n_rows * kOut);
      }
    });
  }
  memory.get(out, out_there);
  return out;
}

void check_chain(DType dtype, const Make& make, std::int32_t n_rows = kRows) {
  in_every_order([&](Backend& backend) {
    cuda::CudaBackend one_by_one({});
    const RowBuffer expected = run(one_by_one, dtype, n_rows, make, {3});
    // The second pass is recorded, and played from then on.
    CHECK(n_different(run(backend, dtype, n_rows, make, {1, 2, 3}), expected) == 0);
  });
}

TEST_CASE("cuda: a chain of matrix products", "[simt][races]") {
  // Formats of the matrix and of the rows; more rows than one kernel takes.
  const auto [format, of_rows, n_rows] =
      GENERATE(table<DType, DType, std::int32_t>({{DType::kF32, DType::kF32, kRows},
                                                  {DType::kBF16, DType::kBF16, kRows},
                                                  {DType::kBF16, DType::kBF16, 70},
                                                  {DType::kMxfp8, DType::kBF16, kRows},
                                                  {DType::kInt8, DType::kF32, kRows},
                                                  {DType::kInt4, DType::kBF16, kRows}}));
  CAPTURE(dtype_name(format), n_rows);
  check_chain(
      of_rows,
      [format = format](const Scene& scene) -> Launch {
        RowBuffer w = random_rows(scene.random, kOut, kWidth, kWidth);
        const PackedMatrix packed = scene.memory.pack(w, {kWidth, kWidth, kWidth, format}, kOut);
        return [=](float* out) {
          scene.backend.linear({packed, scene.rows, scene.n_rows, out, kOut, 1.0f});
        };
      },
      n_rows);
}

TEST_CASE("cuda: a chain of a product in NVFP4", "[simt][races]") {
  check_chain(DType::kBF16, [](const Scene& scene) -> Launch {
    const CodedTensor w(scene.random, kOut, kWidth, {1.7e-3f, false});
    void* const packed =
        scene.memory.zeros(scene.backend.packed_bytes(kOut, kWidth, DType::kNvfp4));
    scene.backend.pack(w.rows(0, kOut), {kWidth, kWidth, kWidth, DType::kNvfp4}, 0, packed);
    return [=](float* out) {
      scene.backend.linear(
          {{packed, kOut, kWidth, DType::kNvfp4}, scene.rows, scene.n_rows, out, kOut, 1.0f});
    };
  });
}

// Rows of a part are quantised where those of the part before it were.
TEST_CASE("cuda: a chain of a product of several parts", "[simt][races]") {
  check_chain(DType::kF32, [](const Scene& scene) -> Launch {
    constexpr std::int32_t kParts = 3, kIn = 64, kPartOut = kOut / kParts;
    RowBuffer w = random_rows(scene.random, kPartOut, kParts * kIn, kParts * kIn);
    const PackedMatrix packed =
        scene.memory.pack(w, {kParts * kIn, kIn, kIn, DType::kInt8}, kPartOut, kParts);
    return [=](float* out) {
      scene.backend.linear({.w = packed,
                            .x = scene.rows,
                            .n_rows = scene.n_rows,
                            .y = out,
                            .y_stride = kOut,
                            .n_parts = kParts,
                            .y_part_stride = kPartOut});
    };
  });
}

TEST_CASE("cuda: a chain of what rows go through one by one", "[simt][races]") {
  SECTION("silu_mul") {
    check_chain(DType::kF32, [](const Scene& scene) -> Launch {
      return [=](float* out) {
        scene.backend.silu_mul({static_cast<const float*>(scene.rows.data),
                                kWidth,
                                160,
                                176,
                                scene.n_rows,
                                {out, kOut, DType::kF32}});
      };
    });
  }
  SECTION("conv_add_norm, of a residual that is new each time") {
    check_chain(DType::kF32, [](const Scene& scene) -> Launch {
      const auto* const x = static_cast<const float*>(scene.rows.data);
      RowBuffer hidden(scene.n_rows, 0, kOut, DType::kF32);
      const ConvAddNormArgs args{.segments = scene.segments,
                                 .parts = {x},
                                 .n_parts = 1,
                                 .x_stride = kWidth,
                                 .scale = 0.7f,
                                 .conv = {scene.weight(4, 160), 64, 160},
                                 .kernel = 4,
                                 .hidden = scene.memory.put_floats(hidden),
                                 .hidden_stride = kOut,
                                 .norm = scene.weight(1, 160),
                                 .eps = kEps,
                                 .width = 160,
                                 .out = {}};
      return [=](float* out) {
        ConvAddNormArgs to = args;
        to.out = {out, kOut, DType::kF32};
        scene.backend.silu_mul(
            {x, kWidth, 160, 176, scene.n_rows, {args.hidden, kOut, DType::kF32}});
        scene.backend.conv_add_norm(to);
      };
    });
  }
}

TEST_CASE("cuda: a chain of an append and attention", "[simt][races]") {
  const DType kv_dtype = GENERATE(DType::kF32, DType::kBF16, DType::kInt8);
  CAPTURE(dtype_name(kv_dtype));
  check_chain(DType::kF32, [kv_dtype](const Scene& scene) -> Launch {
    constexpr std::int32_t kHeads = 4, kKvHeads = 2, kHead = 32, kRel = 8, kExtent = 40;
    constexpr std::int64_t kBank = kExtent + 2 * kBlockPositions;
    const AttentionShape shape{kHeads, kKvHeads, kHead, kExtent, 0};
    RowBuffer q(scene.n_rows, 0, kHeads * kHead, query_dtype(kv_dtype));
    const Rows q_there = scene.memory.put(q);
    const auto* const qkvr = static_cast<const float*>(scene.rows.data);
    const KvAppendArgs append{.segments = scene.segments,
                              .shape = shape,
                              .d_head_padded = kHead,
                              .qkvr = qkvr,
                              .stride = kWidth,
                              .k_conv = {scene.weight(4, kKvHeads * kHead), 64, kKvHeads * kHead},
                              .v_conv = {scene.weight(4, kKvHeads * kHead), 1024, kKvHeads * kHead},
                              .kernel = 4,
                              .q_norm = scene.weight(1, kHead),
                              .k_norm = scene.weight(1, kHead),
                              .eps = kEps,
                              .is_local = false,
                              .log_scaling_floor = 0,
                              .log_scaling_alpha = 0,
                              .layer_offset_bytes = Tapes::kLayerOffset,
                              .kv_dtype = kv_dtype,
                              .q = q_there};
    const float* const bank = scene.weight(kRel, kBank);
    return [=](float* out) {
      scene.backend.kv_append(append);
      scene.backend.attention({.segments = scene.segments,
                               .shape = shape,
                               .d_head_padded = kHead,
                               .d_rel = kRel,
                               .q = q_there,
                               .r = qkvr + (kHeads + 2 * kKvHeads) * kHead,
                               .r_stride = kWidth,
                               .rel_bank = bank,
                               .rel_stride = kBank,
                               .is_local = false,
                               .log_scaling_floor = 0,
                               .log_scaling_alpha = 0,
                               .layer_offset_bytes = Tapes::kLayerOffset,
                               .kv_dtype = kv_dtype,
                               .out = {out, kOut, DType::kF32}});
    };
  });
}

TEST_CASE("cuda: a chain of a mixture of experts", "[simt]") {
  const DType format = GENERATE(DType::kF32, DType::kBF16, DType::kMxfp8, DType::kInt4);
  CAPTURE(dtype_name(format));
  check_chain(format == DType::kF32 ? DType::kF32 : DType::kBF16,
              [&](const Scene& scene) -> Launch {
                Experts experts({4, 1, 2, 40, 1.0f}, format);
                experts.router = random_rows(experts.random, 5, Experts::kModel, Experts::kModel);
                experts.bias.assign(experts.bias.size(), 0.0f);  // the rows alone choose
                const MoeArgs args =
                    experts.pack(scene.backend, scene.memory, scene.rows, scene.n_rows, nullptr);
                return [=](float* out) {
                  MoeArgs to = args;
                  to.y = out;
                  scene.backend.moe(to);
                };
              });
}

// A part is computed in the scratch of the part before it.
TEST_CASE("cuda: a chain of experts of several parts and the sum of these", "[simt]") {
  check_chain(DType::kF32, [](const Scene& scene) -> Launch {
    constexpr std::int32_t kParts = 3, kPadded = Experts::kModelPadded;
    Experts experts({4, 1, 2, kParts * 64, 1.0f}, DType::kInt8);
    experts.router = random_rows(experts.random, 5, Experts::kModel, Experts::kModel);
    experts.bias.assign(experts.bias.size(), 0.0f);  // the rows alone choose
    RowBuffer parts(kParts * scene.n_rows, 0, kOut, DType::kF32);
    RowBuffer hidden(scene.n_rows, 0, kOut, DType::kF32);
    const MoeArgs moe = experts.pack(scene.backend, scene.memory, scene.rows, scene.n_rows,
                                     scene.memory.put_floats(parts), kParts);
    ConvAddNormArgs args{.segments = scene.segments,
                         .parts = {},
                         .n_parts = kParts,
                         .x_stride = moe.y_stride,
                         .scale = 0.7f,
                         .conv = {scene.weight(4, kPadded), 64, kPadded},
                         .kernel = 4,
                         .hidden = scene.memory.put_floats(hidden),
                         .hidden_stride = kOut,
                         .norm = scene.weight(1, kPadded),
                         .eps = kEps,
                         .width = Experts::kModel,
                         .out = {}};
    for (std::int32_t p = 0; p < kParts; ++p) args.parts[p] = moe.y + p * moe.y_part_stride;
    return [=](float* out) {
      ConvAddNormArgs to = args;
      to.out = {out, kOut, DType::kF32};
      scene.backend.silu_mul({static_cast<const float*>(scene.rows.data),
                              kWidth,
                              160,
                              176,
                              scene.n_rows,
                              {args.hidden, kOut, DType::kF32}});
      scene.backend.moe(moe);
      scene.backend.conv_add_norm(to);
    };
  });
}

}  // namespace
}  // namespace duplex::simt_tests
