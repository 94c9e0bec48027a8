// A turn as one record: the first pass, and a loop of passes whose end the device decides. The host
// hands over one block of memory, plays the record and reads another block.
#include "host/cuda_turn.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string_view>
#include <type_traits>

#include "core/error.h"

namespace duplex::cuda {
namespace {

constexpr std::int64_t kTurnKind = 0;  // where other kinds say how far attention reaches
constexpr std::size_t kTurnBytes = std::size_t{16} << 10;  // of each block at first

// DUPLEX_CUDA_TURNS=0 lets the host ask for each pass and each token, so that the two can be
// compared.
bool may_run_turns() {
  static const bool may = [] {
    const char* const value = std::getenv("DUPLEX_CUDA_TURNS");
    const std::string_view text = value == nullptr ? "1" : value;
    check(text == "0" || text == "1", "DUPLEX_CUDA_TURNS: expected 0 or 1, found '", text, "'");
    return text == "1";
  }();
  return may;
}

// Arrays one behind the other in a block of device memory, which may prove too small.
class Block {
 public:
  explicit Block(const Buffer& buffer) : there_(static_cast<std::byte*>(buffer.data())) {}

  template <class T>
  T* take(std::int64_t n) {
    T* const at = reinterpret_cast<T*>(there_ + bytes_);
    bytes_ += round_up(n * static_cast<std::int64_t>(sizeof(T)), 16);
    return at;
  }
  // What is to lie at such a place, as part of the block's bytes; null: nobody asks.
  template <class T>
  void fill(std::vector<std::byte>& bytes, const T* at, const T* from, std::int64_t n) const {
    bytes.resize(static_cast<std::size_t>(bytes_));
    const auto begin =
        reinterpret_cast<std::uintptr_t>(at) - reinterpret_cast<std::uintptr_t>(there_);
    if (n > 0 && from != nullptr)
      std::memcpy(bytes.data() + begin, from, static_cast<std::size_t>(n) * sizeof(T));
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* there_;
  std::int64_t bytes_ = 0;
};

// A row of each sequence behind the first pass; `is_last`: behind the last pass that there may be.
std::vector<Segment> segments_behind(const TurnArgs& args, bool is_last) {
  std::vector<Segment> later(args.segments.data, args.segments.data + args.segments.count);
  for (std::int32_t i = 0; i < args.segments.count; ++i) {
    Segment& segment = later[static_cast<std::size_t>(i)];
    segment.position += segment.n_rows + (is_last ? std::max(args.limits[i] - 1, 0) : 0);
    segment.row_begin = i;
    segment.n_rows = 1;
  }
  return later;
}

// All that launches depend on.
std::vector<std::int64_t> kind_of(const TurnArgs& args, const Segments& later) {
  std::vector<std::int64_t> kind = {kTurnKind,
                                    attention_reach(args.segments),
                                    attention_reach(later),
                                    args.text.n_rows,
                                    args.audio.n_rows,
                                    args.n_stops,
                                    args.max_tokens};
  for (std::int32_t i = 0; i < args.segments.count; ++i)
    kind.push_back(args.segments.data[i].n_rows);
  return kind;
}

}  // namespace

bool CudaBackend::has_turns() const {
  return lane_ == LaneKind::kInteraction && may_run_turns() && !meets_by_hosts_;
}

// The block that the host hands over, and its bytes. Holes come last: how many there are is no part
// of a turn's kind.
std::size_t CudaBackend::lay_out_turn(Turn& turn) {
  const TurnArgs& args = turn.args;
  const std::int64_t count = turn.count();
  Block block(*turn_in_);
  const auto put = [&](const auto* from, std::int64_t n) {
    auto* const at = block.take<std::remove_const_t<std::remove_pointer_t<decltype(from)>>>(n);
    block.fill(turn_bytes_, at, from, n);
    return at;
  };
  turn.first_segments = block.take<Segment>(count);
  turn.places.segments = block.take<Segment>(count);
  turn.places.sampling = put(args.sampling, count);
  turn.places.limits = put(args.limits, count);
  turn.places.stops = put(args.stops, args.n_stops);
  turn.text = args.text;
  turn.text.ids = put(args.text.ids, args.text.n_rows);
  turn.text.rows = put(args.text.rows, args.text.n_rows);
  turn.audio = args.audio;
  turn.audio.rows = put(args.audio.rows, args.audio.n_rows);
  turn.audio.bins = put(args.audio.bins, std::int64_t{args.audio.n_rows} * args.audio.n_mels);
  std::vector<std::int32_t> rows(static_cast<std::size_t>(count));
  std::iota(rows.begin(), rows.end(), 0);
  turn.later_rows = put(rows.data(), count);
  for (std::int32_t& row : rows) {
    const Segment& segment = args.segments.data[row];
    row = segment.row_begin + segment.n_rows - 1;
  }
  turn.last_rows = put(rows.data(), count);
  std::vector<Segment> later = segments_behind(args, false);
  for (std::int64_t i = 0; i < count; ++i) {
    Segment first = args.segments.data[i];
    first.forgotten = put(first.forgotten, first.n_forgotten);
    block.fill(turn_bytes_, turn.first_segments + i, &first, 1);
    later[static_cast<std::size_t>(i)].forgotten = first.forgotten;
  }
  block.fill(turn_bytes_, turn.places.segments, later.data(), count);
  return static_cast<std::size_t>(block.bytes());
}

// The block that the host reads; behind `n_read` bytes of it is what stays on the device.
std::size_t CudaBackend::lay_out_results(Turn& turn, std::size_t& n_read) {
  const TurnArgs& args = turn.args;
  const std::int64_t count = turn.count();
  Block block(*turn_out_);
  turn.places.n_tokens = block.take<std::int32_t>(count);
  turn.places.tokens = block.take<std::int32_t>(count * args.max_tokens);
  turn.head_rows = block.take<std::byte>(count * turn.row_bytes());
  n_read = static_cast<std::size_t>(block.bytes());
  turn.places.chosen = block.take<std::int32_t>(count);
  turn.places.is_open = block.take<std::int32_t>(count);
  turn.places.count = turn.count();
  turn.places.max_tokens = args.max_tokens;
  turn.places.n_stops = args.n_stops;
  turn.tokens = args.text;
  turn.tokens.ids = turn.places.chosen;
  turn.tokens.rows = nullptr;
  turn.tokens.n_rows = turn.count();
  return static_cast<std::size_t>(block.bytes());
}

void CudaBackend::pass_of_turn(const Turn& turn, bool is_first, const Loop* loop) {
  const TurnArgs& args = turn.args;
  const EmbedTextArgs& text = is_first ? turn.text : turn.tokens;
  const bool is_leader = args.logits != nullptr;
  if (is_leader && text.n_rows > 0) launch_embed_text(stream(), text);
  if (is_leader && is_first && turn.audio.n_rows > 0) launch_embed_audio(stream(), turn.audio);
  turn.steps.layers(is_first ? args.segments : turn.later_segments());
  launch_gather_rows(stream(), turn.count(),
                     {static_cast<const std::byte*>(args.passed.data), turn.row_bytes(),
                      is_first ? turn.last_rows : turn.later_rows,
                      is_first ? nullptr : turn.places.is_open, turn.head_rows, turn.row_bytes()});
  for (std::int32_t begin = 0; begin < turn.count(); begin += args.n_head) {
    const std::int32_t n = std::min(args.n_head, turn.count() - begin);
    turn.steps.head(
        {turn.head_rows + begin * turn.row_bytes(), args.passed.stride, args.passed.dtype}, n);
    if (is_leader)
      launch_sample(stream(), {args.logits, args.logits_stride, args.n_vocab, n,
                               turn.places.sampling + begin, turn.places.chosen + begin});
  }
  // Each rank takes the tokens by itself, so all decide alike whether the loop goes on.
  if (group_ != nullptr) {
    auto* const chosen = reinterpret_cast<float*>(turn.places.chosen);
    launch_broadcast(stream(), {group_->lane(lane_), chosen, chosen, div_up(turn.count(), 4), {}});
  }
  launch_take_tokens(stream(),
                     {turn.places, is_first, loop != nullptr, loop != nullptr ? *loop : Loop{0}});
}

// The first turn of its kind is its first pass alone, which finds the buffers' sizes.
void CudaBackend::do_turn(const TurnArgs& args, const TurnSteps& steps) {
  Turn turn{.args = args, .steps = steps, .later = segments_behind(args, true)};
  for (std::unique_ptr<Buffer>* block : {&turn_in_, &turn_out_})
    if (*block == nullptr) *block = allocate(kTurnBytes);
  if (const std::size_t bytes = lay_out_turn(turn); turn_in_->bytes() < bytes) {
    grow(turn_in_, 2 * bytes);
    lay_out_turn(turn);
  }
  std::size_t n_read = 0;
  if (const std::size_t bytes = lay_out_results(turn, n_read); turn_out_->bytes() < bytes) {
    grow(turn_out_, 2 * bytes);
    lay_out_results(turn, n_read);
  }
  runtime_.copy(turn_in_->data(), runtime_.stage(turn_bytes_.data(), turn_bytes_.size()),
                turn_bytes_.size());
  turn_ = &turn;
  try {
    run_turn(turn);
  } catch (...) {
    turn_ = nullptr;
    throw;
  }
  turn_ = nullptr;
  turn_bytes_.resize(n_read);
  read(turn_bytes_.data(), turn_out_->data(), n_read);
  if (args.tokens != nullptr) hand_back(turn);
}

void CudaBackend::run_turn(const Turn& turn) {
  Records* const records = records_of(kind_of(turn.args, turn.later_segments()));
  if (records == nullptr) return pass_of_turn(turn, true, nullptr);
  if (records->empty())
    records->push_back(runtime_.record_loop([&](Loop loop) { pass_of_turn(turn, true, &loop); },
                                            [&](Loop loop) { pass_of_turn(turn, false, &loop); }));
  stream().play(*records->front());
}

// From the block that was read.
void CudaBackend::hand_back(const Turn& turn) const {
  const TurnArgs& args = turn.args;
  const auto count = static_cast<std::size_t>(turn.count());
  const auto* const there = static_cast<const std::byte*>(turn_out_->data());
  const auto here = [&](const void* at) {
    return turn_bytes_.data() + (static_cast<const std::byte*>(at) - there);
  };
  std::memcpy(args.n_tokens, here(turn.places.n_tokens), count * sizeof(std::int32_t));
  std::memcpy(args.tokens, here(turn.places.tokens),
              count * static_cast<std::size_t>(args.max_tokens) * sizeof(std::int32_t));
  const std::size_t bytes = static_cast<std::size_t>(args.width) * dtype_bytes(args.passed.dtype);
  for (std::size_t i = 0; i < count; ++i)
    std::memcpy(args.head_rows + i * bytes,
                here(turn.head_rows + i * static_cast<std::size_t>(turn.row_bytes())), bytes);
}

}  // namespace duplex::cuda
