// Loading weights: what is asked of a checkpoint and what is said about one that does not fit; that
// both spellings give the same bytes; and where numbers land, with zeros everywhere else.
#include "model/weights.h"

#include <bit>
#include <catch2/catch.hpp>
#include <cmath>
#include <cstring>
#include <map>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "tests/model/checkpoint.h"

namespace duplex::model_tests {
namespace {

Weights load(const ModelConfig& config, const std::vector<OwnTensor>& tensors,
             DType dtype = DType::kF32) {
  CpuBackend backend({1, "portable"});
  return load_weights(config, views(tensors), {dtype, dtype}, backend, {});
}

std::string problem(const std::vector<OwnTensor>& tensors) {
  try {
    load(tiny_config(), tensors);
  } catch (const CheckpointError& e) {
    return e.what();
  }
  return "";
}

// "model.llm.layers.1.mlp.experts.w13_weight" -> "model.language_model.layers.1.mlp.experts."
std::string module_prefix(const std::string& name) {
  const std::string path = "model.language_model." + name.substr(std::strlen("model.llm."));
  return path.substr(0, std::min(path.find("w13"), path.find("shared_w13")));
}

// Rows of gates and ups, which alternate as published: row r of the result is the gate or up that
// transformers has there, for `n` matrices of 2 * width rows.
OwnTensor halves(const OwnTensor& tensor, std::int64_t n, std::int64_t width) {
  OwnTensor out{module_prefix(tensor.name) + "gate_up_proj", tensor.shape, {}};
  const std::int64_t d = tensor.shape.back();
  for (std::int64_t matrix = 0; matrix < n; ++matrix)
    for (std::int64_t row = 0; row < 2 * width; ++row) {
      const std::int64_t from = matrix * 2 * width + 2 * (row % width) + row / width;
      const auto begin = tensor.values.begin() + from * d;
      out.values.insert(out.values.end(), begin, begin + d);
    }
  return out;
}

// The same weights as the transformers implementation names and cuts them.
std::vector<OwnTensor> in_module_spelling(const std::vector<OwnTensor>& tensors) {
  std::vector<OwnTensor> out;
  for (const OwnTensor& tensor : tensors) {
    if (tensor.name.find("w13") == std::string::npos) {
      out.push_back({module_name(tensor.name), tensor.shape, tensor.values});
      continue;
    }
    const bool is_dense = tensor.shape.size() == 2;
    const std::int64_t n = is_dense ? 1 : tensor.shape[0];
    const std::int64_t width = tensor.shape[tensor.shape.size() - 2] / 2;
    OwnTensor both = halves(tensor, n, width);
    if (tensor.name.find("experts.w13") != std::string::npos) {
      out.push_back(both);
      continue;
    }
    const std::string prefix = module_prefix(tensor.name), suffix = is_dense ? ".weight" : "";
    std::vector<std::int64_t> shape = tensor.shape;
    shape[shape.size() - 2] = width;
    OwnTensor gate{prefix + "gate_proj" + suffix, shape, {}};
    OwnTensor up{prefix + "up_proj" + suffix, shape, {}};
    const std::int64_t half = width * tensor.shape.back();
    for (std::int64_t i = 0; i < 2 * n; ++i) {
      std::vector<float>& values = (i % 2 == 0 ? gate : up).values;
      values.insert(values.end(), both.values.begin() + i * half,
                    both.values.begin() + (i + 1) * half);
    }
    out.push_back(std::move(gate));
    out.push_back(std::move(up));
  }
  return out;
}

bool same_arena(const Weights& a, const Weights& b) {
  return a.arena->bytes() == b.arena->bytes() &&
         std::memcmp(a.arena->data(), b.arena->data(), a.arena->bytes()) == 0;
}

// ---- what is asked of a checkpoint

TEST_CASE("a whole checkpoint loads, and so does one with an unpadded head") {
  RandomCheckpoint checkpoint(tiny_config(), 1);
  CHECK(problem(checkpoint.tensors()) == "");
  const Weights padded = load(tiny_config(), checkpoint.tensors());
  for (OwnTensor& tensor : checkpoint.tensors())
    if (tensor.name == "model.llm.unembed.weight") {
      tensor.shape[0] = 37;
      tensor.values.resize(37 * 20);
    }
  CHECK(same_arena(load(tiny_config(), checkpoint.tensors()), padded));
}

TEST_CASE("each tensor is missed by name") {
  const std::vector<OwnTensor> whole = RandomCheckpoint(tiny_config(), 1).tensors();
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::vector<OwnTensor> tensors = whole;
    tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(i));
    CAPTURE(whole[i].name);
    CHECK_THAT(problem(tensors),
               Catch::Contains("'" + whole[i].name + "'") && Catch::Contains("missing"));
  }
}

TEST_CASE("each tensor of another shape is named with both shapes") {
  const std::vector<OwnTensor> whole = RandomCheckpoint(tiny_config(), 1).tensors();
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::vector<OwnTensor> tensors = whole;
    tensors[i].shape.back() += 1;
    const std::string text = problem(tensors);
    CAPTURE(whole[i].name);
    CHECK_THAT(text, Catch::Contains("'" + whole[i].name + "'") &&
                         Catch::Contains(shape_text(whole[i].shape)) &&
                         Catch::Contains(shape_text(tensors[i].shape)));
  }
}

TEST_CASE("a NaN or infinity is named with its tensor") {
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), -INFINITY);
  const std::vector<OwnTensor> whole = RandomCheckpoint(tiny_config(), 1).tensors();
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::vector<OwnTensor> tensors = whole;
    // Rows of the head behind the vocabulary that exists are not read.
    const bool is_head = whole[i].name == "model.llm.unembed.weight";
    tensors[i].values[is_head ? 36 * 20 + 19 : whole[i].values.size() - 1] = bad;
    CAPTURE(whole[i].name);
    CHECK_THAT(problem(tensors),
               Catch::Contains("'" + whole[i].name + "'") && Catch::Contains("NaN"));
  }
}

TEST_CASE("tensors that are no part of the model are named, but for the known ones") {
  std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 1).tensors();
  tensors.push_back({"model.mtp.layers.0.attn.wq_du.weight", {2}, {1, 2}});
  CHECK(problem(tensors) == "");
  tensors.push_back({"model.llm.layers.3.attn_norm.weight", {20}, std::vector<float>(20)});
  CHECK_THAT(problem(tensors), Catch::Contains("'model.llm.layers.3.attn_norm.weight'") &&
                                   Catch::Contains("not part of the model"));
}

TEST_CASE("a tensor in both spellings is refused") {
  std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 1).tensors();
  tensors.push_back({"lm_head.weight", {40, 20}, std::vector<float>(800, 1.0f)});
  CHECK_THAT(problem(tensors), Catch::Contains("'lm_head.weight'"));
}

// ---- where numbers land

TEST_CASE("both spellings give the same bytes") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  const std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 2).tensors();
  const std::vector<OwnTensor> module = in_module_spelling(tensors);
  CHECK(module.size() > tensors.size());
  CHECK(same_arena(load(tiny_config(), tensors, dtype), load(tiny_config(), module, dtype)));
}

TEST_CASE("the arena holds every number once, and zeros") {
  const std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 3).tensors();
  const Weights weights = load(tiny_config(), tensors);
  std::map<float, int> expected;
  for (const OwnTensor& tensor : tensors) {
    const bool is_head = tensor.name == "model.llm.unembed.weight";
    const auto end = is_head ? tensor.values.begin() + 37 * 20 : tensor.values.end();
    for (auto value = tensor.values.begin(); value != end; ++value) ++expected[*value];
  }
  const auto* values = static_cast<const float*>(weights.arena->data());
  std::map<float, int> found;
  for (std::size_t i = 0; i < weights.arena->bytes() / 4; ++i)
    if (values[i] != 0) ++found[values[i]];
  CHECK((found == expected));
}

// ---- arenas in files

// What write_arena hands out, in one piece.
std::vector<std::byte> arena_bytes(const Weights& weights) {
  CpuBackend backend({1, "portable"});
  std::vector<std::byte> bytes;
  write_arena(weights, backend, [&](const std::byte* from, std::size_t n) {
    bytes.insert(bytes.end(), from, from + n);
  });
  return bytes;
}

Weights load_packed(const std::vector<std::byte>& bytes, const WeightDTypes& dtypes) {
  CpuBackend backend({1, "portable"});
  std::size_t at = 0;
  const auto read = [&](std::byte* to, std::size_t n) {
    std::memcpy(to, bytes.data() + at, n);
    at += n;
  };
  return load_weights(tiny_config(), PackedArena{bytes.size(), read}, dtypes, backend, {});
}

// Every pointer of the weights as an offset into the arena, and what is kept beside them.
std::vector<std::int64_t> places(const Weights& weights) {
  std::vector<std::int64_t> places;
  const auto* base = static_cast<const std::byte*>(weights.arena->data());
  const auto add = [&](const void* pointer) {
    places.push_back(pointer == nullptr ? -1 : static_cast<const std::byte*>(pointer) - base);
  };
  const auto add_matrix = [&](const PackedMatrix& matrix) {
    add(matrix.data);
    places.insert(places.end(), {matrix.n_out, matrix.n_in, static_cast<int>(matrix.dtype)});
  };
  for (const void* p : {weights.embed, static_cast<const void*>(weights.embed_norm),
                        static_cast<const void*>(weights.final_norm), weights.audio_table,
                        static_cast<const void*>(weights.audio_norm)})
    add(p);
  add_matrix(weights.head);
  for (const LayerWeights& layer : weights.layers) {
    for (const float* p :
         {layer.attn_norm, layer.mlp_norm, layer.q_norm, layer.k_norm, layer.k_conv, layer.v_conv,
          layer.attn_conv, layer.mlp_conv, layer.rel_bank, layer.moe.selection_bias})
      add(p);
    for (const PackedMatrix& m : {layer.qkvr, layer.out, layer.dense.gate_up, layer.dense.down,
                                  layer.moe.router, layer.moe.gate_up, layer.moe.down})
      add_matrix(m);
    places.insert(places.end(),
                  {layer.rel_stride, layer.moe.gate_up_stride_bytes, layer.moe.down_stride_bytes});
    for (const float scale : {layer.dense.global_scale, layer.moe.global_scale})
      places.push_back(std::bit_cast<std::int32_t>(scale));
  }
  for (const PackedMatrix& matrix : weights.vision.linear) add_matrix(matrix);
  for (const float* norm : weights.vision.norm) add(norm);
  add(weights.vision.final_norm);
  return places;
}

TEST_CASE("an arena that was written and read again is the same weights") {
  const DType rows = GENERATE(DType::kF32, DType::kBF16);
  const DType matrices = GENERATE(DType::kF32, DType::kInt8, DType::kInt4);
  const WeightDTypes dtypes{rows, is_quantised(matrices) ? matrices : rows};
  CpuBackend backend({1, "portable"});
  RandomCheckpoint checkpoint(tiny_config(), 6);
  const Weights packed =
      load_weights(tiny_config(), views(checkpoint.tensors()), dtypes, backend, {});
  const Weights read = load_packed(arena_bytes(packed), dtypes);
  CHECK(same_arena(packed, read));
  CHECK((places(packed) == places(read)));
}

TEST_CASE("an arena of another size is refused") {
  const Weights weights = load(tiny_config(), RandomCheckpoint(tiny_config(), 6).tensors());
  std::vector<std::byte> bytes = arena_bytes(weights);
  CHECK_THROWS_AS(load_packed(bytes, {DType::kBF16, DType::kBF16}), CheckpointError);
  bytes.resize(bytes.size() - 64);
  CHECK_THROWS_WITH(load_packed(bytes, {}),
                    Catch::Contains("packed weights: expected") && Catch::Contains("float32"));
}

// Values that no library decides.
std::vector<OwnTensor> fixed_tensors() {
  std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 1).tensors();
  std::uint32_t state = 1;
  for (OwnTensor& tensor : tensors)
    for (float& value : tensor.values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(static_cast<std::int32_t>(state >> 8) - (1 << 23)) * 0x1p-23f;
    }
  return tensors;
}

TEST_CASE("the bytes of an arena are those of kPackingVersion") {
  // Another digest: raise kPackingVersion, for files written before would be read wrongly.
  const auto [matrices, expected] =
      GENERATE(std::pair{DType::kF32, std::uint64_t{0x57175e01a4c57776}},
               std::pair{DType::kBF16, std::uint64_t{0x1f7fb5b040b5a8cc}},
               std::pair{DType::kInt8, std::uint64_t{0xdbee9cf7abdab23d}},
               std::pair{DType::kInt4, std::uint64_t{0x14afa7dca5561d77}});
  CpuBackend backend({1, "portable"});
  const std::vector<OwnTensor> tensors = fixed_tensors();
  const WeightDTypes dtypes{matrices == DType::kF32 ? DType::kF32 : DType::kBF16, matrices};
  std::uint64_t digest = 0xcbf29ce484222325u;
  for (const std::byte byte :
       arena_bytes(load_weights(tiny_config(), views(tensors), dtypes, backend, {})))
    digest = (digest ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3u;
  CAPTURE(dtype_name(matrices));
  CHECK(kPackingVersion == 1);
  CHECK(digest == expected);
}

TEST_CASE("filling takes exactly what was measured, and progress ends there") {
  CpuBackend backend({1, "portable"});
  const std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 4).tensors();
  std::size_t done = 0, total = 0, n_calls = 0;
  bool is_ascending = true;
  const Weights weights =
      load_weights(tiny_config(), views(tensors), {}, backend, [&](std::size_t d, std::size_t t) {
        is_ascending &= d >= done && d <= t && (n_calls == 0 || t == total);
        done = d;
        total = t;
        ++n_calls;
      });
  CHECK(is_ascending);
  CHECK(n_calls > 10);
  CHECK(done == total);
  CHECK(total == weights.arena->bytes());
  // The norm of the vision tower is taken last: 20 floats in two columns of 16.
  const auto* end = static_cast<const std::byte*>(weights.arena->data()) + total;
  CHECK(reinterpret_cast<const std::byte*>(weights.vision.final_norm + 32) == end);
}

TEST_CASE("bfloat16 files and bfloat16 weights hold the rounded numbers") {
  std::vector<OwnTensor> tensors = RandomCheckpoint(tiny_config(), 5).tensors();
  std::vector<std::vector<std::uint16_t>> halves_of(tensors.size());
  std::vector<SourceTensor> bf16_views = views(tensors);
  const Weights rounded_late = load(tiny_config(), tensors, DType::kBF16);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const bool is_matrix = tensors[i].shape.size() > 1;
    if (!is_matrix) continue;  // both dtypes in one file
    for (float& value : tensors[i].values) {
      halves_of[i].push_back(float_to_bf16(value));
      value = bf16_to_float(halves_of[i].back());
    }
    bf16_views[i].type = FileType::kBF16;
    bf16_views[i].data = reinterpret_cast<const std::byte*>(halves_of[i].data());
  }
  CpuBackend backend({1, "portable"});
  const Weights from_file = load_weights(tiny_config(), bf16_views, {}, backend, {});
  CHECK(same_arena(from_file, load(tiny_config(), tensors)));
  CHECK(rounded_late.arena->bytes() < from_file.arena->bytes());
  // The embedding is a plain table: row 3, columns 0 to 19 of 32.
  const auto* table = static_cast<const std::uint16_t*>(rounded_late.embed);
  for (std::size_t c = 0; c < 32; ++c)
    CHECK(bf16_to_float(table[3 * 32 + c]) == (c < 20 ? tensors[0].values[3 * 20 + c] : 0.0f));
}

}  // namespace
}  // namespace duplex::model_tests
