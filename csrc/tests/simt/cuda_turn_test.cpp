// Turns: passes one behind the other on the device, as one record. Tokens, head rows and the tape
// are those of the same passes asked for one by one on the CPU, in float32.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <set>
#include <vector>

#include "tests/simt/device_ranks.h"
#include "tests/simt/fixtures.h"
#include "tests/simt/turn_scene.h"

namespace duplex::simt_tests {
namespace {

constexpr std::int32_t kVocab = 70, kTaps = 3, kLevels = 3;
constexpr std::int32_t kMostRows = 24, kMostTokens = 5, kHeadRows = 2, kPositions = 120;
constexpr std::int64_t kStride = 64, kBlockBytes = 4 * kStride;
constexpr float kEps = 1e-5f;

// What behind each sequence of a pass was said.
using Said = std::vector<std::vector<std::int32_t>>;

// Embeddings, one convolution that looks back along the tape, and a head. Of several ranks, each
// has a slice of the head.
class Model {
 public:
  Model(Backend& backend, std::vector<std::int32_t> stops, Exchange* ranks = nullptr)
      : backend_(backend), memory_(backend), stops_(std::move(stops)), ranks_(ranks) {
    const std::int32_t n_ranks = ranks_ == nullptr ? 1 : ranks_->size();
    for (std::int32_t r = 0; r < n_ranks; ++r)
      slices_.push_back({kVocab * r / n_ranks, kVocab * (r + 1) / n_ranks - kVocab * r / n_ranks});
    const Slice own = slices_[ranks_ == nullptr ? 0 : static_cast<std::size_t>(ranks_->rank())];
    Random random(3);
    const auto put = [&](std::int64_t n_rows, std::int64_t stride) {
      RowBuffer rows = random_rows(random, n_rows, kWidth, stride);
      return memory_.put_floats(rows);
    };
    text_table_ = put(kVocab, kWidth);
    sound_table_ = put(kMels * kLevels, kWidth);
    norm_ = put(1, kStride);
    taps_ = put(kTaps, kWidth);
    RowBuffer head = random_rows(random, kVocab, kWidth, kWidth);
    RowBuffer slice(own.n, kWidth, kWidth, DType::kF32);
    std::memcpy(slice.address(0), head.address(own.first),
                static_cast<std::size_t>(own.n) * kWidth * sizeof(float));
    head_ = memory_.pack(slice, {kWidth, kWidth, kWidth, DType::kF32},
                         static_cast<std::int32_t>(own.n));
    hidden_ = zeros(kMostRows, kStride);
    normed_ = {zeros(kMostRows, kStride), kStride, DType::kF32};
    passed_ = {zeros(kMostRows, kStride), kStride, DType::kF32};
    head_rows_ = {zeros(kHeadRows, kStride), kStride, DType::kF32};
    logits_ = zeros(kHeadRows, 2 * kStride);
  }

  TapeView tape() { return memory_.put(HostTape(kPositions, kBlockBytes)); }
  std::vector<std::byte> rows_of(const Sequence& sequence) {
    HostTape tape(kPositions, kBlockBytes);
    memory_.get(tape, sequence.tape);
    std::vector<std::byte> rows;
    for (std::int64_t i = 0; i < sequence.position; ++i) {
      const std::byte* const at = tape.view.block(i);
      rows.insert(rows.end(), at, at + kWidth * sizeof(float));
    }
    return rows;
  }
  bool is_stop(std::int32_t token) const {
    return std::find(stops_.begin(), stops_.end(), token) != stops_.end();
  }

  // One token behind each.
  Said run_pass(const std::vector<Input>& inputs) {
    const Pass pass(inputs);
    backend_.embed_text(text(pass));
    backend_.embed_audio(sound(pass));
    layers(pass.all());
    std::vector<std::byte> rows(inputs.size() * kWidth * sizeof(float));
    backend_.read_rows(rows.data(), passed_, pass.last_rows, kWidth * sizeof(float));
    hand_out(inputs, rows);
    Said said;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      backend_.write(head_rows_.data, inputs[i].sequence->head_row.data(), kWidth * sizeof(float));
      backend_.linear({head_, head_rows_, 1, logits_, 2 * kStride, 0.5f});
      std::int32_t token = -1;
      backend_.sample({logits_, 2 * kStride, kVocab, 1, &pass.sampling[i], &token});
      said.push_back({token});
      if (inputs[i].limit == 0) said.back().clear();
    }
    return said;
  }
  // As many as the device says at once.
  Said run_turn(const std::vector<Input>& inputs) {
    const Pass pass(inputs);
    std::vector<std::int32_t> n_tokens(inputs.size()), tokens(inputs.size() * kMostTokens);
    std::vector<std::byte> rows(inputs.size() * kWidth * sizeof(float));
    backend_.turn({.segments = pass.all(),
                   .text = text(pass),
                   .audio = sound(pass),
                   .passed = passed_,
                   .width = kWidth,
                   .n_head = kHeadRows,
                   .logits = is_leader() ? logits_ : nullptr,
                   .logits_stride = 2 * kStride,
                   .n_vocab = kVocab,
                   .sampling = pass.sampling.data(),
                   .limits = pass.limits.data(),
                   .stops = stops_.data(),
                   .n_stops = static_cast<std::int32_t>(stops_.size()),
                   .max_tokens = kMostTokens,
                   .n_tokens = n_tokens.data(),
                   .tokens = is_leader() ? tokens.data() : nullptr,
                   .head_rows = rows.data()},
                  {[&](const Segments& segments) { layers(segments); },
                   [&](const Rows& x, std::int32_t n) { multiply_head(x, n); }});
    hand_out(inputs, rows);
    Said said;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(i) * kMostTokens;
      said.emplace_back(first, first + n_tokens[i]);
    }
    return said;
  }

 private:
  bool is_leader() const { return ranks_ == nullptr || ranks_->rank() == 0; }
  void multiply_head(const Rows& x, std::int32_t n) {
    if (ranks_ == nullptr) return backend_.linear({head_, x, n, logits_, 2 * kStride, 0.5f});
    backend_.linear({head_, x, n, static_cast<float*>(ranks_->mine()), kStride, 0.5f});
    ranks_->gather(backend_, {.n_rows = n,
                              .stride = kStride,
                              .slices = slices_.data(),
                              .out = is_leader() ? logits_ : nullptr,
                              .out_stride = 2 * kStride});
  }
  float* zeros(std::int64_t n_rows, std::int64_t stride) {
    return static_cast<float*>(memory_.zeros(static_cast<std::size_t>(n_rows * stride) * 4));
  }
  EmbedTextArgs text(const Pass& pass) const {
    return {pass.ids.data(),
            text_table_,
            DType::kF32,
            norm_,
            kEps,
            kWidth,
            static_cast<std::int32_t>(pass.ids.size()),
            hidden_,
            kStride,
            pass.text_rows.data()};
  }
  EmbedAudioArgs sound(const Pass& pass) const {
    return {pass.bins.data(),
            kMels,
            kLevels,
            sound_table_,
            DType::kF32,
            norm_,
            kEps,
            kWidth,
            static_cast<std::int32_t>(pass.sound_rows.size()),
            hidden_,
            kStride,
            pass.sound_rows.data()};
  }
  void layers(const Segments& segments) {
    backend_.run_layers(segments, 1, [&](std::int32_t) {
      if (ranks_ != nullptr) ranks_->spread_rows(hidden_, segments.n_rows * kStride);
      backend_.norm(
          {hidden_, kStride, norm_, kEps, kWidth, segments.n_rows, Activation::kNone, normed_});
      backend_.conv_add_norm({.segments = segments,
                              .parts = {static_cast<const float*>(normed_.data)},
                              .n_parts = 1,
                              .x_stride = kStride,
                              .scale = 0.7f,
                              .conv = {taps_, 0, kWidth},
                              .kernel = kTaps,
                              .hidden = hidden_,
                              .hidden_stride = kStride,
                              .norm = norm_,
                              .eps = kEps,
                              .width = kWidth,
                              .out = passed_});
    });
  }
  static void hand_out(const std::vector<Input>& inputs, const std::vector<std::byte>& rows) {
    for (std::size_t i = 0; i < inputs.size(); ++i)
      std::memcpy(inputs[i].sequence->head_row.data(), rows.data() + i * kWidth * sizeof(float),
                  kWidth * sizeof(float));
  }

  Backend& backend_;
  Memory memory_;
  std::vector<std::int32_t> stops_;
  Exchange* ranks_;
  std::vector<Slice> slices_;
  float *text_table_, *sound_table_, *norm_, *taps_, *hidden_, *logits_;
  PackedMatrix head_;
  Rows normed_, passed_, head_rows_;
};

// Micro-turns of some sequences as an engine has them; the last token said comes with the next
// input. `run` gives what is said behind a pass, and behind what is said then.
template <class Run>
void speak(Model& model, std::vector<Sequence>& sequences, int n_turns, const Run& run) {
  Random random(11);
  for (int turn = 0; turn < n_turns; ++turn) {
    std::vector<Input> open;
    for (std::size_t i = 0; i < sequences.size(); ++i) {
      Input input{&sequences[i], {}, {}, (turn + static_cast<int>(2 * i)) % (kMostTokens + 1)};
      if (turn % 4 == 3) input.limit = 1;
      if (!sequences[i].said.empty()) input.ids.push_back(sequences[i].said.back());
      while (input.ids.size() < 1 + i % 2) input.ids.push_back(random.below(kVocab));
      for (std::int32_t k = 0; k < 2 * kMels; ++k)
        input.bins.push_back(static_cast<std::uint8_t>(random.below(kLevels)));
      open.push_back(input);
    }
    while (!open.empty()) {
      const Said said = run(open);
      std::vector<Input> later;
      for (std::size_t i = 0; i < open.size(); ++i) {
        Sequence& sequence = *open[i].sequence;
        const auto n = static_cast<std::int32_t>(said[i].size());
        REQUIRE(n <= open[i].limit);
        sequence.position += open[i].n_rows() + std::max(n - 1, 0);
        sequence.said.insert(sequence.said.end(), said[i].begin(), said[i].end());
        for (std::int32_t k = 0; k + 1 < n; ++k)
          CHECK_FALSE(model.is_stop(said[i][static_cast<std::size_t>(k)]));
        if (n == open[i].limit || model.is_stop(said[i].back())) continue;
        later.push_back({&sequence, {said[i].back()}, {}, open[i].limit - n});
      }
      open = std::move(later);
    }
  }
}

std::vector<Sequence> sequences_of(Model& model, std::size_t n) {
  std::vector<Sequence> sequences(n);
  for (std::size_t i = 0; i < n; ++i) {
    sequences[i].tape = model.tape();
    if (i % 2 == 1) sequences[i].sampling = {7 + i, 4.0f, 20, 0.95f};
  }
  return sequences;
}

TEST_CASE("cuda: turns say what passes one by one say", "[simt]") {
  if (!has_fused_cpu()) return;
  const std::size_t n = GENERATE(1, 5);
  const std::vector<std::int32_t> stops =
      GENERATE(std::vector<std::int32_t>{}, std::vector<std::int32_t>{3, 17, 20, 31, 44, 58, 66});
  constexpr int kTurns = 6;
  CpuBackend cpu({1, ""});
  Model expected(cpu, stops);
  std::vector<Sequence> one_by_one = sequences_of(expected, n);
  speak(expected, one_by_one, kTurns, [&](const auto& open) { return expected.run_pass(open); });
  in_every_order([&](Backend& backend) {
    Model model(backend, stops);
    std::vector<Sequence> sequences = sequences_of(model, n);
    std::size_t most = 0;  // at once
    speak(model, sequences, kTurns, [&](const auto& open) {
      const Said said = model.run_turn(open);
      for (const auto& tokens : said) most = std::max(most, tokens.size());
      return said;
    });
    CHECK(most > 1);
    for (std::size_t i = 0; i < n; ++i) {
      CHECK(sequences[i].said == one_by_one[i].said);
      CHECK(sequences[i].position == one_by_one[i].position);
      CHECK(sequences[i].head_row == one_by_one[i].head_row);
      CHECK(model.rows_of(sequences[i]) == expected.rows_of(one_by_one[i]));
    }
  });
}

TEST_CASE("cuda: turn is one launch and one wait from its second time on", "[simt][races]") {
  cuda::CudaBackend backend({});
  Model model(backend, {});
  std::vector<Sequence> sequences = sequences_of(model, 1);
  for (int turn = 0; turn < 5; ++turn) {
    const DeviceCalls before = backend.calls();
    const Said said = model.run_turn({{&sequences[0], {5, 9}, {0, 1, 2, 0}, kMostTokens}});
    const DeviceCalls after = backend.calls();
    CHECK(said[0].size() == (turn == 0 ? 1 : kMostTokens));
    if (turn > 0) CHECK(after.launches - before.launches == 1);
    if (turn > 0) CHECK(after.waits - before.waits == 1);
    sequences[0].position += 3 + std::ssize(said[0]) - 1;
  }
}

// More sequences than the head takes at once; on rank 0 alone lie the rows' ids and what is said.
TEST_CASE("cuda: turn of several ranks is one launch and one wait on each", "[simt][groups]") {
  constexpr std::size_t kSequences = 3;
  constexpr int kTurns = 4;
  const int n = GENERATE(2, 4);  // more are processes: python_tests/parallel
  const char* const transport = GENERATE("nvls", "p2p");
  const std::vector<std::int32_t> stops = {20, 31, 44};
  const auto speak_with = [&](Model& model, std::vector<Sequence>& sequences, const auto& run) {
    for (int turn = 0; turn < kTurns; ++turn) {
      std::vector<Input> inputs;
      for (std::size_t i = 0; i < kSequences; ++i)
        inputs.push_back({&sequences[i], {5, 9}, {0, 1, 2, 0}, i == 1 ? 4 : kMostTokens});
      const Said said = run(turn, inputs);
      for (std::size_t i = 0; i < kSequences; ++i)
        sequences[i].position += 3 + std::max<std::int64_t>(std::ssize(said[i]) - 1, 0);
    }
    std::vector<std::vector<std::byte>> rows;
    for (const Sequence& sequence : sequences) rows.push_back(model.rows_of(sequence));
    return rows;
  };
  cuda::CudaBackend alone({});
  Model expected(alone, stops);
  std::vector<Sequence> sequences = sequences_of(expected, kSequences);
  std::vector<Said> all_said;
  const auto rows = speak_with(expected, sequences, [&](int, const std::vector<Input>& inputs) {
    return all_said.emplace_back(expected.run_turn(inputs));
  });
  Ranks ranks(n);
  ExchangeOptions options = kOptions;
  options.transport = transport;
  options.max_rows = kMostRows;
  options.row_stride = kStride;
  options.gather_stride = kStride;
  ranks.connect(options);
  REQUIRE(ranks.all_ended_well());
  std::atomic<std::int64_t> n_wrong = 0, n_calls = 0;
  ranks.run([&](int r, cuda::CudaBackend& backend) {
    const auto exchange = backend.create_exchange(nullptr);
    Model model(backend, stops, exchange.get());
    std::vector<Sequence> own = sequences_of(model, kSequences);
    const auto own_rows = speak_with(model, own, [&](int turn, const std::vector<Input>& inputs) {
      const auto at = static_cast<std::size_t>(turn);
      const DeviceCalls before = backend.calls();
      const Said said = model.run_turn(inputs);
      const DeviceCalls after = backend.calls();
      n_wrong += r == 0 && said != all_said[at];
      n_calls += turn > 0 ? after.launches - before.launches + after.waits - before.waits : 0;
      return all_said[at];
    });
    n_wrong += own_rows != rows;
  });
  CHECK(ranks.all_ended_well());
  CHECK(n_wrong == 0);
  CHECK(n_calls == n * (kTurns - 1) * 2);
}

TEST_CASE("cuda: turn ends when no more than half of its sequences go on", "[simt]") {
  // Limits are 0, 1, 2, ...: of five, three go on behind the first token and two behind the second.
  const auto expected =
      GENERATE(std::vector<std::size_t>{0, 1, 1, 1}, std::vector<std::size_t>{0, 1, 2, 2, 2});
  in_every_order([&](Backend& backend) {
    Model model(backend, {});
    std::vector<Sequence> sequences = sequences_of(model, expected.size());
    Said said;
    for (int turn = 0; turn < 2; ++turn) {
      std::vector<Input> inputs;
      for (std::size_t i = 0; i < expected.size(); ++i)
        inputs.push_back({&sequences[i], {1}, {}, static_cast<std::int32_t>(i)});
      said = model.run_turn(inputs);
      for (Sequence& sequence : sequences) ++sequence.position;
    }
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(said[i].size() == expected[i]);
  });
}

TEST_CASE("cuda: read_rows gathers rows in any order", "[simt][races]") {
  const DType dtype = GENERATE(DType::kF32, DType::kBF16);
  Random random(9);
  RowBuffer rows = random_rows(random, 7, kWidth, kStride, dtype);
  const std::vector<std::int32_t> wanted = {6, 0, 3, 3};
  check_same_bytes([&](Backend& backend) {
    Memory memory(backend);
    RowBuffer out(4, kWidth, kWidth, dtype);
    backend.read_rows(out.address(0), memory.put(rows), wanted, kWidth * dtype_bytes(dtype));
    return out;
  });
}

TEST_CASE("turns: the background asks for each pass, and a CPU has none", "[simt][lanes]") {
  cuda::CudaBackend backend({});
  CHECK(backend.has_turns());
  CHECK_FALSE(backend.background_lane()->has_turns());
  CHECK_THROWS_WITH(CpuBackend({1, ""}).turn({}, {}), Catch::Contains("'cpu' has none"));
}

}  // namespace
}  // namespace duplex::simt_tests
