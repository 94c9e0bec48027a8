// The layer loop cut for tensor parallelism, ranks as threads (model/inkling.cpp): with the same
// parts the bits do not depend on the number of ranks, and parts are added in the order of ranks.
#include <algorithm>
#include <catch2/catch.hpp>
#include <cmath>
#include <random>

#include "backend/cpu/cpu_backend.h"
#include "core/error.h"
#include "model/inkling.h"
#include "model/mtp.h"
#include "sequence/sequence.h"
#include "tests/model/shards.h"

namespace duplex::model_tests {
namespace {

constexpr std::int32_t kMaxRows = 16;
constexpr RowLimits kLimits{8, 2 * kMaxRows};
// Windows end inside, and there is a block of keys and values that is whole.
constexpr std::int32_t kPasses[] = {16, 16, 1, 13, 1, 16, 5};

struct Case {
  const char* name;
  ModelConfig config;
  WeightDTypes dtypes;
  DType kv_dtype;
};

std::vector<Case> cases() {
  ModelConfig all_dense = cut_config();
  for (LayerConfig& layer : all_dense.layers) layer.is_moe = false;
  ModelConfig one_kv_head = cut_config();
  one_kv_head.global.n_kv_heads = one_kv_head.local.n_kv_heads = 1;
  one_kv_head.mtp.has_chain_norm = false;
  return {{"dense float32", all_dense, {DType::kF32, DType::kF32}, DType::kF32},
          {"experts float32", cut_config(), {DType::kF32, DType::kF32}, DType::kF32},
          {"bfloat16", one_kv_head, {DType::kBF16, DType::kBF16}, DType::kInt8},
          {"int8", quantised_config(), {DType::kF32, DType::kInt8}, DType::kF32},
          {"int4", quantised_config(), {DType::kBF16, DType::kInt4}, DType::kBF16}};
}

// A model of random sizes that four ranks can share, in random formats.
Case random_case(std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto one_of = [&](std::initializer_list<std::int32_t> values) {
    return values.begin()[random() % values.size()];
  };
  const DType rows = one_of({0, 1}) == 0 ? DType::kF32 : DType::kBF16;
  const bool is_int4 = one_of({0, 0, 1}) == 1;
  ModelConfig config = tiny_config();
  config.d_model = one_of({7, 16, 33, 70});
  config.d_rel = one_of({1, 4, 5});
  config.unpadded_vocab_size = one_of({4, 21, 40});
  config.vision.reset();
  const std::int32_t n_kv = one_of({1, 2, 4});
  config.global = {one_of({4, 8}), n_kv, is_int4 ? 32 : one_of({3, 12, 16, 20}), 24, 0};
  config.local = {4, one_of({1, 2, 4}), is_int4 ? 24 : one_of({1, 8, 16}), 9, 9};
  if (is_int4) config.local.n_heads = 8;
  config.d_ff = 4 * (is_int4 ? 32 : one_of({1, 5, 16, 19}));
  config.moe = {one_of({3, 5}), one_of({1, 2}), one_of({1, 3}),
                4 * (is_int4 ? 64 : one_of({1, 6, 16})), 1.25f};
  for (LayerConfig& layer : config.layers) layer = {one_of({0, 1}) == 1, one_of({0, 1}) == 1};
  config.mtp.layers = {{one_of({0, 1}) == 1, false}};
  const DType kv_dtype = one_of({0, 1}) == 0 ? rows : DType::kInt8;
  return {"random", config, {rows, is_int4 ? DType::kInt4 : rows}, kv_dtype};
}

// What one rank computed: the residual stream, rows for the head, logits (rank 0 alone).
struct Result {
  std::vector<float> hidden;
  std::vector<std::byte> head_rows;
  std::vector<float> logits;
  std::vector<BlockDigest> digests;

  bool same_rows(const Result& other) const {
    return same(hidden, other.hidden) && head_rows == other.head_rows;
  }
  bool operator==(const Result& other) const {
    return same_rows(other) && same(logits, other.logits);
  }
  static bool same(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
};

// One rank from its weights on: a stream of random rows, the first depth of multi-token prediction
// behind each pass.
class Rank {
 public:
  Rank(const Case& of, const std::vector<OwnTensor>& tensors, const Shard& shard,
       Exchange* exchange)
      : config_(shard_config(of.config, shard)),
        backend_({1, ""}),
        layout_(SequenceLayout::make(config_, of.kv_dtype, 4096, kLimits)),
        mtp_layout_(SequenceLayout::make(config_.mtp_model(), of.kv_dtype, 4096, kLimits)) {
    weights_ = load_weights(of.config, views(tensors), of.dtypes, backend_, {}, shard);
    model_.emplace(config_, weights_, layout_, backend_, kMaxRows, exchange);
    mtp_.emplace(config_, weights_, mtp_layout_, backend_, *model_);
  }

  const Weights& weights() const { return weights_; }
  Result run() {
    PagePool pool(backend_.create_page_memory(layout_.page_bytes, 400));
    PagePool mtp_pool(backend_.create_page_memory(mtp_layout_.page_bytes, 400));
    Sequence sequence = Sequence::open(pool, layout_, 200);
    Sequence mtp_sequence = Sequence::open(mtp_pool, mtp_layout_, 200);
    std::mt19937 random(7);
    Result result;
    for (const std::int32_t n : kPasses) {
      fill(model_->rows(), n, random);
      append(sequence, n, [&](const Segments& rows) { model_->forward(rows); });
      keep(n, result);
      fill(mtp_->embedded(), n, random);
      append(mtp_sequence, n, [&](const Segments& rows) { mtp_->run(rows, 0); });
      keep(n, result);
    }
    result.digests = sequence.digests();
    return result;
  }

 private:
  void fill(float* rows, std::int32_t n, std::mt19937& random) const {
    std::normal_distribution<float> normal;
    for (std::int32_t row = 0; row < n; ++row)
      for (std::int32_t c = 0; c < config_.d_model; ++c)
        rows[row * model_->row_stride() + c] = normal(random);
  }
  template <class Pass>
  static void append(Sequence& sequence, std::int32_t n, const Pass& pass) {
    sequence.reserve(n);
    const Segment segment = sequence.segment(0, n);
    pass(Segments{&segment, 1, n});
    sequence.advance(n);
    sequence.commit();
  }
  // More head rows than the head takes at once.
  void keep(std::int32_t n, Result& result) {
    const std::size_t bytes = model_->head_row_bytes();
    std::vector<const void*> rows;
    std::vector<std::byte> head_rows(bytes * static_cast<std::size_t>(n));
    for (std::int32_t row = 0; row < n; ++row) {
      const float* const hidden = model_->rows() + row * model_->row_stride();
      result.hidden.insert(result.hidden.end(), hidden, hidden + config_.d_model);
      std::byte* const at = head_rows.data() + static_cast<std::size_t>(row) * bytes;
      model_->read_head_rows({&row, 1}, at);
      rows.insert(rows.end(), 2, at);
    }
    result.head_rows.insert(result.head_rows.end(), head_rows.begin(), head_rows.end());
    std::vector<float> logits(rows.size() * static_cast<std::size_t>(config_.unpadded_vocab_size));
    const bool is_first = weights_.shard.rank == 0;
    model_->logits(rows, is_first ? logits.data() : nullptr);
    if (is_first) result.logits.insert(result.logits.end(), logits.begin(), logits.end());
  }

  ModelConfig config_;
  CpuBackend backend_;
  SequenceLayout layout_, mtp_layout_;
  Weights weights_;
  std::optional<Inkling> model_;
  std::optional<Mtp> mtp_;
};

// All ranks of a group, each with `n_parts`.
std::vector<Result> run_group(const Case& of, std::int32_t size, std::int32_t n_parts,
                              bool is_reversed = false) {
  const std::vector<OwnTensor> tensors = RandomCheckpoint(of.config, 11).tensors();
  MeetingPlace place(size,
                     Inkling::exchange_options(of.config, {0, size, n_parts}, kMaxRows).slab_bytes);
  std::vector<Result> results(static_cast<std::size_t>(size));
  run_ranks(place, [&](int rank) {
    ThreadExchange exchange(place, rank, is_reversed);
    const Shard shard{rank, size, n_parts};
    results[static_cast<std::size_t>(rank)] =
        Rank(of, tensors, shard, size == 1 ? nullptr : &exchange).run();
  });
  return results;
}

// Root of the mean squares of a - b, as part of that of b.
double relative_error(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double squares = 0, differences = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    squares += double{b[i]} * b[i];
    differences += (double{a[i]} - b[i]) * (double{a[i]} - b[i]);
  }
  return std::sqrt(differences / squares);
}

TEST_CASE("with the same parts, any number of ranks gives the same bytes") {
  const Case of = GENERATE(from_range(cases()));
  CAPTURE(of.name);
  const std::int32_t n = virtual_shards(of.config, of.dtypes.matrices);
  REQUIRE(n >= 4);
  const Result alone = run_group(of, 1, n).front();
  for (std::int32_t size = 2; size <= n; size *= 2) {
    CAPTURE(size);
    const std::vector<Result> ranks = run_group(of, size, n / size);
    CHECK(ranks.front() == alone);
    for (const Result& rank : ranks) CHECK(rank.same_rows(alone));
  }
}

TEST_CASE("models of random sizes give the same bytes on one, two and four ranks") {
  const auto seed = static_cast<std::uint32_t>(GENERATE(range(0, 24)));
  const Case of = random_case(seed);
  CAPTURE(seed, of.config.d_model, of.config.global.d_head, dtype_name(of.dtypes.matrices));
  const Result alone = run_group(of, 1, 4).front();
  CHECK(run_group(of, 2, 2).front() == alone);
  for (const Result& rank : run_group(of, 4, 1)) CHECK(rank.same_rows(alone));
}

TEST_CASE("one part a rank gives the sum in the order of ranks") {
  const Case of = GENERATE(from_range(cases()));
  const std::int32_t size = GENERATE(2, 4);
  CAPTURE(of.name, size);
  // Alone, the same parts lie side by side in one buffer, part 0 first.
  const Result expected = run_group(of, 1, size).front();
  CHECK(run_group(of, size, 1).front() == expected);
  // a + b is b + a; of four numbers another order is seen.
  CHECK(run_group(of, size, 1, true).front().same_rows(expected) == (size == 2));
}

TEST_CASE("a model in parts is the model, up to rounding") {
  const Case of = GENERATE(from_range(cases()));
  CAPTURE(of.name);
  const Result whole = run_group(of, 1, 1).front();
  const Result parts = run_group(of, 4, 1).front();
  CHECK_FALSE(parts == whole);
  // An activation on the edge between two codes may go to either side.
  const double most = is_quantised(of.dtypes.matrices) ? 1e-2 : 1e-5;
  CHECK(relative_error(parts.hidden, whole.hidden) < most);
  CHECK(relative_error(parts.logits, whole.logits) < most);
}

TEST_CASE("ranks that have the same key/value head have the same tapes") {
  Case of = cases().front();
  of.config.global.n_kv_heads = of.config.local.n_kv_heads = 2;
  const std::vector<Result> ranks = run_group(of, 8, 1);
  const auto hashes = [&](std::size_t rank) {
    std::vector<std::uint64_t> all;
    for (const BlockDigest& digest : ranks[rank].digests) all.push_back(digest.hash);
    return all;
  };
  REQUIRE(hashes(0).size() > 8);
  for (const std::size_t rank : {1u, 2u, 3u}) CHECK((hashes(rank) == hashes(0)));
  for (const std::size_t rank : {5u, 6u, 7u}) CHECK((hashes(rank) == hashes(4)));
  CHECK((hashes(0) != hashes(4)));
}

// Notes which matrix each sum is told to come next.
class NotingExchange final : public ThreadExchange {
 public:
  using ThreadExchange::ThreadExchange;
  void add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
           const PackedMatrix& next) override {
    noted.push_back(next.data);
    ThreadExchange::add(backend, args, part_stride, next);
  }
  std::vector<const void*> noted;
};

TEST_CASE("a sum is told the matrix that reads its rows") {
  const Case of = cases()[1];  // with experts and without
  const std::vector<OwnTensor> tensors = RandomCheckpoint(of.config, 11).tensors();
  MeetingPlace place(2, Inkling::exchange_options(of.config, {0, 2, 1}, kMaxRows).slab_bytes);
  run_ranks(place, [&](int number) {
    NotingExchange exchange(place, number);
    Rank rank(of, tensors, {number, 2, 1}, &exchange);
    rank.run();
    const Weights& weights = rank.weights();
    std::vector<const void*> expected;
    for (std::size_t i = 0; i < weights.layers.size(); ++i) {
      const LayerWeights& w = weights.layers[i];
      expected.push_back(of.config.layers[i].is_moe ? w.moe.router.data : w.dense.gate_up.data);
      expected.push_back(i + 1 < weights.layers.size() ? weights.layers[i + 1].qkvr.data
                                                       : weights.head.data);
    }
    exchange.noted.resize(expected.size());  // the first pass
    if (exchange.noted != expected) throw std::runtime_error("another matrix was named");
  });
}

TEST_CASE("a slab has room for the sums of a pass and for logits, whichever are more") {
  ModelConfig config = cases().front().config;
  for (const std::int32_t vocabulary : {4, 40'000}) {
    config.vocab_size = config.unpadded_vocab_size = vocabulary;
    const ExchangeOptions options = Inkling::exchange_options(config, {0, 2, 2}, kMaxRows);
    const auto n_floats = static_cast<std::int64_t>(options.slab_bytes / sizeof(float));
    CHECK(n_floats >= 2 * options.part_stride);
    CHECK(n_floats >= Inkling::kHeadRows * options.gather_stride);
  }
}

TEST_CASE("an exchange of another group, or too small a one, is refused") {
  const Case of = cases().front();
  const std::vector<OwnTensor> tensors = RandomCheckpoint(of.config, 1).tensors();
  const Shard shard{0, 2, 1};
  const std::size_t needed = Inkling::exchange_options(of.config, shard, kMaxRows).slab_bytes;
  MeetingPlace place(2, needed), small(2, needed - 1);
  ThreadExchange first(place, 0), second(place, 1), too_small(small, 0);
  CHECK_NOTHROW(Rank(of, tensors, shard, &first));
  CHECK_THROWS_WITH(Rank(of, tensors, shard, nullptr),
                    "tensor_parallel: expected rank 0 of 2, whose weights these are, found rank 0 "
                    "of 1");
  CHECK_THROWS_WITH(Rank(of, tensors, shard, &second), Catch::Contains("found rank 1 of 2"));
  CHECK_THROWS_WITH(Rank(of, tensors, shard, &too_small),
                    Catch::Contains("expected slabs of") && Catch::Contains("for 16 rows"));
}

}  // namespace
}  // namespace duplex::model_tests
