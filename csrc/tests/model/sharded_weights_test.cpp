// One rank's slices of the weights (model/weights.cpp): together they are the whole, with the same
// groups of codes, and a rank reads its own alone.
#include <catch2/catch.hpp>
#include <map>
#include <set>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "model/weights.h"
#include "tests/model/shards.h"

namespace duplex::model_tests {
namespace {

Weights load(const ModelConfig& config, std::vector<SourceTensor> tensors,
             const WeightDTypes& dtypes, const Shard& shard) {
  CpuBackend backend({1, "portable"});
  return load_weights(config, std::move(tensors), dtypes, backend, {}, shard);
}

bool same_arena(const Weights& a, const Weights& b) {
  return a.arena->bytes() == b.arena->bytes() &&
         std::memcmp(a.arena->data(), b.arena->data(), a.arena->bytes()) == 0;
}

// Every value of a float32 arena but zeros, and how often.
std::map<float, int> values_of(const Weights& weights) {
  const auto* values = static_cast<const float*>(weights.arena->data());
  std::map<float, int> found;
  for (std::size_t i = 0; i < weights.arena->bytes() / sizeof(float); ++i)
    if (values[i] != 0) ++found[values[i]];
  return found;
}

bool has_word(const std::string& name, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(),
                     [&](const char* word) { return name.find(word) != std::string::npos; });
}

// How many of `size` ranks hold an element of a tensor of cut_config.
int n_holders(const std::string& name, int size) {
  if (has_word(name, {"model.visual.layers.linear", "llm.embed.", "audio.encoder"})) return 1;
  if (has_word(name, {"wk_dv", "wv_dv", "k_sconv", "v_sconv"})) {
    const bool is_global = has_word(name, {"llm.layers.1."});
    return std::max(1, size / (is_global ? 2 : 4));
  }
  if (has_word(name, {"wq_du", "wr_du", "wo_ud", "w13", "w2_", "unembed"})) return 1;
  return size;
}

TEST_CASE("the slices of all ranks are the whole, each number as often as it is needed") {
  const int size = GENERATE(1, 2, 4, 8);
  const int n_parts = GENERATE(1, 2);
  if (size * n_parts > kMaxParts) return;
  CAPTURE(size, n_parts);
  const ModelConfig config = cut_config();
  const std::vector<OwnTensor> tensors = RandomCheckpoint(config, 3).tensors();
  std::map<float, int> expected, found;
  for (const OwnTensor& tensor : tensors) {
    const bool is_head = tensor.name == "model.llm.unembed.weight";
    const auto end = is_head ? tensor.values.begin() + config.unpadded_vocab_size * config.d_model
                             : tensor.values.end();
    for (auto value = tensor.values.begin(); value != end; ++value)
      expected[*value] += n_holders(tensor.name, size);
  }
  for (int rank = 0; rank < size; ++rank)
    for (const auto& [value, n] :
         values_of(load(config, views(tensors), {}, {rank, size, n_parts})))
      found[value] += n;
  CHECK((found == expected));
}

TEST_CASE("a rank reads no number outside its slices") {
  const Shard shard = GENERATE(Shard{0, 2, 1}, Shard{1, 2, 4}, Shard{5, 8, 1});
  CAPTURE(shard.rank, shard.size);
  const ModelConfig config = cut_config();
  std::vector<OwnTensor> tensors = RandomCheckpoint(config, 4).tensors();
  const Weights weights = load(config, views(tensors), {}, shard);
  const std::map<float, int> own = values_of(weights);
  std::size_t n_outside = 0;
  for (OwnTensor& tensor : tensors)
    for (float& value : tensor.values)
      if (!own.contains(value)) {
        value = std::numeric_limits<float>::quiet_NaN();  // load refuses it where it reads it
        ++n_outside;
      }
  CHECK(n_outside > 1000);
  CHECK(same_arena(load(config, views(tensors), {}, shard), weights));
}

// ---- matrices whose columns are cut

const std::byte* bytes_of(const PackedMatrix& matrix) {
  return static_cast<const std::byte*>(matrix.data);
}

// Panel for panel, the matrices of all ranks side by side are the bytes of the whole.
bool is_joined(const PackedMatrix& whole, const std::vector<PackedMatrix>& slices) {
  CpuBackend backend({1, "portable"});
  const std::byte* at = bytes_of(whole);
  const auto n_panels = static_cast<std::size_t>(div_up(whole.n_out, kPanelOutputs));
  for (std::size_t p = 0; p < n_panels; ++p)
    for (const PackedMatrix& slice : slices) {
      const std::size_t piece = backend.packed_bytes(1, slice.n_in, slice.dtype);
      if (std::memcmp(at, bytes_of(slice) + p * piece, piece) != 0) return false;
      at += piece;
    }
  return at == bytes_of(whole) + backend.packed_bytes(whole.n_out, whole.n_in, whole.dtype);
}

TEST_CASE("cut columns keep the groups and codes of the whole") {
  const DType matrices = GENERATE(DType::kF32, DType::kBF16, DType::kInt8, DType::kInt4);
  const Shard of = GENERATE(Shard{0, 4, 1}, Shard{0, 2, 2}, Shard{0, 1, 4});
  CAPTURE(dtype_name(matrices), of.size);
  ModelConfig config = quantised_config();
  config.d_model = 72;  // two panels
  config.vision.reset();
  const std::vector<OwnTensor> tensors = RandomCheckpoint(config, 5).tensors();
  const WeightDTypes dtypes{matrices == DType::kF32 ? DType::kF32 : DType::kBF16, matrices};
  const Weights whole = load(config, views(tensors), dtypes, {});
  std::vector<Weights> ranks;
  for (int rank = 0; rank < of.size; ++rank)
    ranks.push_back(load(config, views(tensors), dtypes, {rank, of.size, of.n_parts}));
  if (of.size == 1) CHECK(same_arena(ranks.front(), whole));
  const auto slices = [&](std::size_t layer, const auto& matrix) {
    std::vector<PackedMatrix> found;
    for (const Weights& rank : ranks) found.push_back(matrix(rank.layers[layer]));
    return found;
  };
  const auto last_expert = [&](const LayerWeights& layer) {
    PackedMatrix expert = layer.moe.down;
    expert.data = bytes_of(expert) +
                  (config.moe.n_experts + config.moe.n_shared - 1) * layer.moe.down_stride_bytes;
    return expert;
  };
  const auto out = [](const LayerWeights& layer) { return layer.out; };
  const auto down = [](const LayerWeights& layer) { return layer.dense.down; };
  for (std::size_t i = 0; i < config.layers.size(); ++i) {
    const LayerWeights& layer = whole.layers[i];
    CHECK(is_joined(layer.out, slices(i, out)));
    if (config.layers[i].is_moe)
      CHECK(is_joined(last_expert(layer), slices(i, last_expert)));
    else
      CHECK(is_joined(layer.dense.down, slices(i, down)));
  }
}

// ---- files of codes

// A checkpoint whose larger matrices are NVFP4 and E4M3 codes, and the floats that these are.
struct Codes {
  explicit Codes(const ModelConfig& config)
      : plain(RandomCheckpoint(config, 6).tensors()), tensors(views(plain)) {
    std::uint8_t state = 1;
    const auto fill = [&](std::size_t n, std::uint8_t limit) {
      std::vector<std::uint8_t>& made = bytes.emplace_back(n);
      for (std::uint8_t& byte : made)
        byte =
            static_cast<std::uint8_t>((state = static_cast<std::uint8_t>(state * 13 + 7)) % limit);
      return reinterpret_cast<const std::byte*>(made.data());
    };
    for (std::size_t i = 0; i < plain.size(); ++i) {
      const bool is_fp4 = has_word(plain[i].name, {"experts.w"});
      if (!is_fp4 && !has_word(plain[i].name, {"wo_ud", "w2_md", "wq_du"})) continue;
      SourceTensor& tensor = tensors[i];
      const std::size_t n = plain[i].values.size();
      tensor.type = is_fp4 ? FileType::kU8 : FileType::kE4M3;
      tensor.data = is_fp4 ? fill(n / 2, 255) : fill(n, 120);
      if (is_fp4) tensor.shape.back() /= 2;
      const std::int64_t block = is_fp4 ? 16 : 32;
      std::vector<std::int64_t> shape = plain[i].shape;
      shape.back() = div_up(shape.back(), block);
      std::size_t n_scales = 1;
      for (const std::int64_t size : shape) n_scales *= static_cast<std::size_t>(size);
      tensors.push_back({plain[i].name + ".scale",
                         is_fp4 ? FileType::kE4M3 : FileType::kE8M0,
                         shape,
                         is_fp4 ? fill(n_scales, 100) : fill(n_scales, 127),
                         false,
                         {}});
      if (is_fp4)
        tensors.push_back({plain[i].name + ".scale2",
                           FileType::kF32,
                           {1},
                           reinterpret_cast<const std::byte*>(&half),
                           false,
                           {}});
    }
    TensorSource source(tensors);
    for (OwnTensor& tensor : plain) {
      const SourceTensor& codes = source.find(tensor.name);
      codes.read(0, codes.elements(), tensor.values.data());
    }
  }
  float half = 0.5f;
  std::vector<OwnTensor> plain;
  std::vector<SourceTensor> tensors;
  std::vector<std::vector<std::uint8_t>> bytes;
};

TEST_CASE("slices of codes are those of the floats that they stand for") {
  const Shard shard = GENERATE(Shard{0, 2, 1}, Shard{1, 2, 2}, Shard{3, 4, 1});
  const DType matrices = GENERATE(DType::kF32, DType::kInt4);
  ModelConfig config = quantised_config();
  config.d_model = 32;  // whole blocks of codes in a row
  config.vision.reset();
  const Codes codes(config);
  const WeightDTypes dtypes{DType::kF32, matrices};
  CHECK(same_arena(load(config, codes.tensors, dtypes, shard),
                   load(config, views(codes.plain), dtypes, shard)));
}

TEST_CASE("codes that come in pairs are not cut between two") {
  ModelConfig config = quantised_config();
  config.d_model = 32;
  config.vision.reset();
  config.moe.d_expert = 12;
  const Codes codes(config);
  CHECK_NOTHROW(load(config, codes.tensors, {}, {0, 2, 1}));
  CHECK_THROWS_WITH(load(config, codes.tensors, {}, {0, 4, 1}),
                    Catch::Contains("expected slices of an even number of columns of '"
                                    "model.llm.layers.1.mlp.experts.w2_weight'") &&
                        Catch::Contains("found 3"));
}

// ---- the rest

TEST_CASE("the arena of a rank, written and read again, is the same weights") {
  const Shard shard = GENERATE(Shard{0, 2, 1}, Shard{1, 2, 2}, Shard{0, 1, 4});
  const DType matrices = GENERATE(DType::kF32, DType::kInt8);
  const ModelConfig config = quantised_config();
  const WeightDTypes dtypes{DType::kF32, matrices};
  const std::vector<OwnTensor> tensors = RandomCheckpoint(config, 7).tensors();
  const Weights packed = load(config, views(tensors), dtypes, shard);
  CpuBackend backend({1, "portable"});
  std::vector<std::byte> bytes;
  write_arena(packed, backend, [&](const std::byte* from, std::size_t n) {
    bytes.insert(bytes.end(), from, from + n);
  });
  std::size_t at = 0;
  const PackedArena arena{bytes.size(), [&](std::byte* to, std::size_t n) {
                            std::memcpy(to, bytes.data() + at, n);
                            at += n;
                          }};
  const Weights read = load_weights(config, arena, dtypes, backend, {}, shard);
  CHECK(same_arena(read, packed));
  CHECK(read.shard.n_parts == shard.n_parts);
  const LayerWeights& a = read.layers[1];
  const LayerWeights& b = packed.layers[1];
  CHECK(bytes_of(a.moe.down) - bytes_of(read.head) == bytes_of(b.moe.down) - bytes_of(packed.head));
  CHECK(a.moe.down_stride_bytes == b.moe.down_stride_bytes);
  CHECK((read.embed == nullptr) == (shard.rank != 0));
  at = 0;
  CHECK_THROWS_AS(load_weights(config, arena, dtypes, backend, {}, {0, 4, 1}), CheckpointError);
}

TEST_CASE("weights that cannot be cut are refused before anything is read") {
  const ModelConfig config = cut_config();
  const std::vector<OwnTensor> tensors = RandomCheckpoint(config, 8).tensors();
  CHECK_THROWS_WITH(load(config, views(tensors), {}, {0, 3, 1}),
                    "tensor_parallel: expected a divisor of 8 heads, found 3; 1, 2, 4 or 8 fit");
  CHECK_THROWS_WITH(load(config, views(tensors), {DType::kF32, DType::kInt8}, {0, 2, 1}),
                    Catch::Contains("slices of whole groups of 64 columns for int8 weights"));
}

}  // namespace
}  // namespace duplex::model_tests
