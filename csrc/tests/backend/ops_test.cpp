// The front of the operations (backend/ops.cpp): arguments that do not fit together are refused by
// name before any backend sees them, no rows are no work, and the table of backends.
#include <functional>

#include "backend/registry.h"
#include "tests/backend/fixtures.h"

namespace duplex::backend_tests {
namespace {

// Arguments that are in order, for a backend that must not be reached otherwise.
struct Valid {
  std::vector<float> floats = std::vector<float>(4096, 0.0f);
  std::vector<float> scratch = std::vector<float>(4096, 0.0f);
  std::vector<std::byte> tape_memory = std::vector<std::byte>(32768);
  TapeView tape{tape_memory.data(), 2, 32768, 16384};
  Segment segment{.row_begin = 0, .n_rows = 2, .global = tape, .local = tape, .conv = tape};
  Segments segments{&segment, 1, 2};
  Rows rows{floats.data(), 64, DType::kF32};
  std::int32_t id = 0;
  std::uint8_t bin = 0;
  float* data = floats.data();

  EmbedTextArgs embed_text{&id, data, DType::kF32, data, 1e-6f, 16, 1, data, 16};
  EmbedAudioArgs embed_audio{&bin, 1, 4, data, DType::kF32, data, 1e-6f, 16, 1, data, 16};
  NormArgs norm{data, 16, data, 1e-6f, 16, 2, Activation::kNone, rows};
  LinearArgs linear{{data, 64, 16, DType::kF32}, rows, 2, data, 64};
  ConvSlot slot{data, 0, 16};
  KvAppendArgs kv_append{
      segments, {1, 1, 16, 8, 0}, 16,  data, 64, slot, slot, 2, data, data, 1e-6f, false, 0, 0,
      0,        DType::kF32,      rows};
  AttentionArgs attention{segments, {1, 1, 16, 8, 0}, 16,  2, rows, data, 2, data, 144, false, 0, 0,
                          0,        DType::kF32,      rows};
  ConvAddNormArgs conv_add_norm{segments, {data}, 1,    16,    1.0f, slot, 2,
                                data,     16,     data, 1e-6f, 16,   rows};
  SiluMulArgs silu_mul{data, 64, 16, 16, 2, rows};
  MoeArgs moe{{{data, 2, 16, DType::kF32},
               data,
               1.0f,
               {data, 32, 16, DType::kF32},
               {data, 16, 16, DType::kF32},
               4096,
               4096},
              {1, 1, 1, 16, 1.0f},
              1,
              rows,
              data,
              64,
              scratch.data()};
  FoldArgs fold{data, 3, 1, 2, 4, 4, 3, 2, 2, rows};
  SampleRow place{{}, 0};
  std::int32_t token = 0;
  SampleArgs sample{data, 64, 40, 1, &place, &token};
};

// Spoils one thing; `says` is part of the message.
struct Fault {
  const char* says;
  std::function<void(Valid&)> spoil;
  std::function<void(Backend&, const Valid&)> call;
};

const auto kEmbedText = [](Backend& b, const Valid& v) { b.embed_text(v.embed_text); };
const auto kEmbedAudio = [](Backend& b, const Valid& v) { b.embed_audio(v.embed_audio); };
const auto kNorm = [](Backend& b, const Valid& v) { b.norm(v.norm); };
const auto kLinear = [](Backend& b, const Valid& v) { b.linear(v.linear); };
const auto kKvAppend = [](Backend& b, const Valid& v) { b.kv_append(v.kv_append); };
const auto kAttention = [](Backend& b, const Valid& v) { b.attention(v.attention); };
const auto kConvAddNorm = [](Backend& b, const Valid& v) { b.conv_add_norm(v.conv_add_norm); };
const auto kSiluMul = [](Backend& b, const Valid& v) { b.silu_mul(v.silu_mul); };
const auto kMoe = [](Backend& b, const Valid& v) { b.moe(v.moe); };
const auto kFold = [](Backend& b, const Valid& v) { b.fold(v.fold); };
const auto kSample = [](Backend& b, const Valid& v) { b.sample(v.sample); };

const std::vector<Fault> kFaults = {
    {"embed_text: table and norm", [](Valid& v) { v.embed_text.table = nullptr; }, kEmbedText},
    {"embed_text: out needs rows of 32", [](Valid& v) { v.embed_text.d_model = 17; }, kEmbedText},
    {"embed_audio: table and norm", [](Valid& v) { v.embed_audio.norm = nullptr; }, kEmbedAudio},
    {"embed_audio: out has no data", [](Valid& v) { v.embed_audio.out = nullptr; }, kEmbedAudio},
    {"norm: x needs rows of 32", [](Valid& v) { v.norm.width = 20; }, kNorm},
    {"norm: out has no data", [](Valid& v) { v.norm.out.data = nullptr; }, kNorm},
    {"linear: no weights", [](Valid& v) { v.linear.w.data = nullptr; }, kLinear},
    {"linear: rows are bfloat16", [](Valid& v) { v.linear.x.dtype = DType::kBF16; }, kLinear},
    {"linear: x needs rows of 80", [](Valid& v) { v.linear.w.n_in = 80; }, kLinear},
    {"linear: y needs rows of 128", [](Valid& v) { v.linear.w.n_out = 65; }, kLinear},
    {"kv_append: segment 0 must start", [](Valid& v) { v.segment.row_begin = 1; }, kKvAppend},
    {"kv_append: segment 0 has no tape", [](Valid& v) { v.segment.global.base = nullptr; },
     kKvAppend},
    {"linear: expected float32 columns for 2 parts of whole groups of 16, found 16",
     [](Valid& v) { v.linear.n_parts = 2; }, kLinear},
    {"linear: expected float32 columns for 0 parts", [](Valid& v) { v.linear.n_parts = 0; },
     kLinear},
    {"linear: device 'cpu' multiplies no float32 gates and ups",
     [](Valid& v) { v.linear.w.is_paired = true; }, kLinear},
    {"moe: device 'cpu' multiplies no float32 gates",
     [](Valid& v) { v.moe.gate_up.is_paired = true; }, kMoe},
    {"linear: 48 outputs must be gates and ups",
     [](Valid& v) {
       v.linear.activated = v.rows;
       v.linear.w.n_out = 48;
     },
     kLinear},
    {"linear: activated rows have no divisor",
     [](Valid& v) {
       v.linear.activated = v.rows;
       v.linear.divisor = 2.0f;
     },
     kLinear},
    {"linear: activated rows have no divisor and no parts",
     [](Valid& v) {
       v.linear.activated = v.rows;
       v.linear.w.n_in = 32;
       v.linear.n_parts = 2;
     },
     kLinear},
    {"linear: activated needs rows of 32",
     [](Valid& v) {
       v.linear.activated = v.rows;
       v.linear.activated.stride = 16;
     },
     kLinear},
    {"moe: gates and ups must lie in pairs in all experts",
     [](Valid& v) {
       v.moe.shared_gate_up.first = v.moe.gate_up;
       v.moe.shared_gate_up.first.is_paired = true;
     },
     kMoe},
    {"moe: expected float32 columns for 3 parts", [](Valid& v) { v.moe.n_parts = 3; }, kMoe},
    {"conv_add_norm: expected 1 to 8 parts, found 9", [](Valid& v) { v.conv_add_norm.n_parts = 9; },
     kConvAddNorm},
    {"kv_append: segments cover 2 of 3", [](Valid& v) { v.kv_append.segments.n_rows = 3; },
     kKvAppend},
    {"kv_append: qkvr needs rows of 96", [](Valid& v) { v.kv_append.shape.n_heads = 4; },
     kKvAppend},
    {"kv_append: q needs rows of 16", [](Valid& v) { v.kv_append.q.stride = 8; }, kKvAppend},
    {"kv_append: q must have the dtype", [](Valid& v) { v.kv_append.kv_dtype = DType::kBF16; },
     kKvAppend},
    {"kv_append: device 'cpu' keeps no int4", [](Valid& v) { v.kv_append.kv_dtype = DType::kInt4; },
     kKvAppend},
    {"attention: device 'cpu' keeps no int4", [](Valid& v) { v.attention.kv_dtype = DType::kInt4; },
     kAttention},
    {"attention: segment 0 must start", [](Valid& v) { v.segment.n_rows = 0; }, kAttention},
    {"attention: q needs rows of 80", [](Valid& v) { v.attention.shape.n_heads = 5; }, kAttention},
    {"attention: out needs rows of 16", [](Valid& v) { v.attention.out.stride = 8; }, kAttention},
    {"attention: q must have the dtype", [](Valid& v) { v.attention.q.dtype = DType::kBF16; },
     kAttention},
    {"attention: the bias bank", [](Valid& v) { v.attention.shape.rel_extent = 17; }, kAttention},
    {"attention: segment 0 has no tape",
     [](Valid& v) {
       v.attention.is_local = true;
       v.segment.local.base = nullptr;
     },
     kAttention},
    {"conv_add_norm: x needs rows of 32", [](Valid& v) { v.conv_add_norm.width = 20; },
     kConvAddNorm},
    {"conv_add_norm: hidden needs rows of 16", [](Valid& v) { v.conv_add_norm.hidden_stride = 8; },
     kConvAddNorm},
    {"conv_add_norm: out needs rows of 16", [](Valid& v) { v.conv_add_norm.out.stride = 8; },
     kConvAddNorm},
    {"conv_add_norm: 32 channels", [](Valid& v) { v.conv_add_norm.conv.channels = 32; },
     kConvAddNorm},
    {"silu_mul: width 10", [](Valid& v) { v.silu_mul.width = 10; }, kSiluMul},
    {"silu_mul: width 16", [](Valid& v) { v.silu_mul.up_offset = 8; }, kSiluMul},
    {"silu_mul: x needs rows of 96", [](Valid& v) { v.silu_mul.up_offset = 80; }, kSiluMul},
    {"silu_mul: out needs rows of 16", [](Valid& v) { v.silu_mul.out.stride = 8; }, kSiluMul},
    {"moe: the router is float32", [](Valid& v) { v.moe.router.dtype = DType::kBF16; }, kMoe},
    {"moe: rows are float32, weights are bfloat16",
     [](Valid& v) { v.moe.down.dtype = DType::kBF16; }, kMoe},
    {"moe: rows are float32, weights are bfloat16",
     [](Valid& v) { v.moe.gate_up.dtype = DType::kBF16; }, kMoe},
    {"moe: rows are float32, weights are bfloat16",
     [](Valid& v) {
       v.moe.shared_down.first = v.moe.down;
       v.moe.shared_down.first.dtype = DType::kBF16;
     },
     kMoe},
    {"moe: x needs rows of 80", [](Valid& v) { v.moe.gate_up.n_in = 80; }, kMoe},
    {"moe: rows are bfloat16", [](Valid& v) { v.moe.x.dtype = DType::kBF16; }, kMoe},
    {"moe: y needs rows of 128", [](Valid& v) { v.moe.down.n_out = 80; }, kMoe},
    {"moe: no scratch", [](Valid& v) { v.moe.scratch = nullptr; }, kMoe},
    {"fold: 3x4x4 cells do not divide", [](Valid& v) { v.fold.t = 3; }, kFold},
    {"fold: 2x4x5 cells do not divide", [](Valid& v) { v.fold.w = 5; }, kFold},
    {"fold: 2x4x4 cells do not divide", [](Valid& v) { v.fold.hw_fold = 3; }, kFold},
    {"fold: x needs rows of 4", [](Valid& v) { v.fold.c = 4; }, kFold},
    {"fold: out needs rows of 96", [](Valid& v) { v.fold.hw_fold = 4; }, kFold},
    {"sample: expected 1 to", [](Valid& v) { v.sample.n_vocab = 0; }, kSample},
    {"sample: logits needs rows of 80", [](Valid& v) { v.sample.n_vocab = 65; }, kSample},
    {"sample: rows and tokens", [](Valid& v) { v.sample.tokens = nullptr; }, kSample},
};

TEST_CASE("arguments that do not fit are refused by name") {
  CpuBackend backend({1, ""});
  for (const Fault& fault : kFaults) {
    CAPTURE(fault.says);
    Valid valid;
    CHECK_NOTHROW(fault.call(backend, valid));
    Valid spoilt;
    fault.spoil(spoilt);
    CHECK_THROWS_AS(fault.call(backend, spoilt), InvalidArgument);
    CHECK_THROWS_WITH(fault.call(backend, spoilt), Catch::StartsWith(fault.says));
  }
}

TEST_CASE("operations on no rows do nothing, whatever else they are given") {
  CpuBackend backend({1, ""});
  CHECK_NOTHROW(backend.embed_text({}));
  CHECK_NOTHROW(backend.embed_audio({}));
  CHECK_NOTHROW(backend.norm({}));
  CHECK_NOTHROW(backend.linear({}));
  CHECK_NOTHROW(backend.kv_append({}));
  CHECK_NOTHROW(backend.attention({}));
  CHECK_NOTHROW(backend.conv_add_norm({}));
  CHECK_NOTHROW(backend.silu_mul({}));
  CHECK_NOTHROW(backend.moe({}));
  CHECK_NOTHROW(backend.fold({}));
  CHECK_NOTHROW(backend.sample({}));
}

TEST_CASE("backends are found by name") {
  CHECK(backend_names().front() == "cpu");
  CHECK(create_backend("cpu", {1, "portable"})->name() == "cpu");
  CHECK_THROWS_WITH(create_backend("tpu", {}), Catch::Contains("'cpu'"));
  CHECK_THROWS_AS(create_backend("tpu", {}), InvalidArgument);
  // Where there is a GPU it is the instruction set that is wrong.
  CHECK_THROWS_AS(create_backend("cuda", {0, "sparc"}), Error);
}

}  // namespace
}  // namespace duplex::backend_tests
