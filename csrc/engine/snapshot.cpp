// What a session carries, field by field, and its way to other engines. Engines are locked for a
// piece at a time and never two of them at once.
#include "engine/snapshot.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "core/byte_stream.h"
#include "core/error.h"
#include "engine/busy_guard.h"
#include "sequence/snapshot.h"

namespace duplex {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{1} << 20;

void write_endless(const std::optional<Endless>& endless, ByteWriter& to) {
  to.put(endless.has_value());
  if (!endless) return;
  to.put(endless->head);
  to.put(endless->recent);
  to.put(endless->is_automatic);
}

// The limit is that of the sequence.
std::optional<Endless> read_endless(ByteReader& from) {
  if (!from.get_bool()) return std::nullopt;
  Endless endless;
  endless.head = from.get<std::int64_t>();
  endless.recent = from.get<std::int64_t>();
  endless.is_automatic = from.get_bool();
  return endless;
}

void write_sampling(const SamplingParams& params, ByteWriter& to) {
  to.put(params.seed);
  to.put(params.temperature);
  to.put(params.top_k);
  to.put(params.top_p);
}

SamplingParams read_sampling(ByteReader& from) {
  SamplingParams params;
  params.seed = from.get<std::uint64_t>();
  params.temperature = from.get<float>();
  params.top_k = from.get<std::int32_t>();
  params.top_p = from.get<float>();
  params.validate();
  return params;
}

void write_audio(const DmelStream& audio, ByteWriter& to) {
  to.put(audio.state().n_partial);
  to.put_all(audio.state().samples);
  to.put_all(audio.waiting());
}

DmelStream read_audio(ByteReader& from, const DmelAnalyzer& analyzer) {
  DmelState state;
  state.n_partial = from.get<std::int32_t>();
  const auto samples = from.get_all<float>();
  check<CheckpointError>(samples.size() == state.samples.size(), "snapshot: audio: expected ",
                         state.samples.size(), " samples, found ", samples.size());
  std::copy(samples.begin(), samples.end(), state.samples.begin());
  DmelStream audio(analyzer);
  audio.restore(state, from.get_all<std::uint8_t>());  // throws if it is none
  return audio;
}

void write_inbox(const Inbox& inbox, ByteWriter& to) {
  to.put_all(inbox.samples);
  to.put_all(inbox.text);
  to.put_all(inbox.result);
  to.put(static_cast<std::uint64_t>(inbox.images.size()));
  for (const Image& image : inbox.images) {
    to.put(image.height);
    to.put(image.width);
    to.put_all(image.pixels);
  }
}

// By the front door, where everything is checked.
void read_inbox(ByteReader& from, Session& session) {
  const auto samples = from.get_all<float>();
  if (!samples.empty()) session.feed_audio(samples);
  const auto text = from.get_all<std::int32_t>();
  if (!text.empty()) session.feed_text(text);
  const auto result = from.get_all<std::int32_t>();
  if (!result.empty()) session.feed_result(result);
  for (auto n_images = from.get<std::uint64_t>(); n_images > 0; --n_images) {
    Image image;
    image.height = from.get<std::int32_t>();
    image.width = from.get<std::int32_t>();
    image.pixels = from.get_all<std::uint8_t>();
    check<CheckpointError>(
        image.height > 0 && image.width > 0 &&
            static_cast<std::int64_t>(image.pixels.size()) / 3 / image.height == image.width &&
            image.pixels.size() % 3 == 0,
        "snapshot: image: expected ", image.height, "x", image.width, " pixels, found ",
        image.pixels.size(), " bytes");
    session.feed_image(std::move(image));
  }
}

std::int32_t read_token(ByteReader& from, const Engine& engine) {
  const auto token = from.get<std::int32_t>();
  check<CheckpointError>(token >= kNoToken && token < engine.config().vocab_size,
                         "snapshot: expected token ids below ", engine.config().vocab_size,
                         ", found ", token);
  return token;
}

std::vector<std::byte> read_head_row(ByteReader& from, const Engine& engine) {
  auto row = from.get_all<std::byte>();
  check<CheckpointError>(row.empty() || row.size() == engine.interaction().head_row_bytes(),
                         "snapshot: expected no row or one of ",
                         engine.interaction().head_row_bytes(), " bytes, found ", row.size());
  return row;
}

void write_lookup(const DraftLookup& lookup, ByteWriter& to) {
  to.put(lookup.size());
  to.put_all(lookup.newest());
}

DraftLookup read_lookup(ByteReader& from, const Engine& engine) {
  const auto size = from.get<std::int64_t>();
  const auto newest = from.get_all<std::int32_t>();
  check<CheckpointError>(
      size >= 0 && std::ssize(newest) <= size && std::ssize(newest) <= DraftLookup::kCapacity,
      "snapshot: expected ", size, " looked-up ids or fewer, found ", newest.size());
  check_ids(engine.config(), newest);
  return DraftLookup(size, newest);
}

void write_mark(const Mark& mark, ByteWriter& to) {
  to.put(mark.position);
  to.put(mark.moment.turn);
  to.put(mark.moment.pending_token);
  to.put(mark.n_looked_up);
  to.put_all(mark.moment.head_row);
  if (mark.moment.audio) write_audio(*mark.moment.audio, to);
}

Mark read_mark(ByteReader& from, const Engine& engine) {
  Mark mark;
  mark.position = from.get<std::int64_t>();
  mark.moment.turn = from.get<std::int64_t>();
  mark.moment.pending_token = read_token(from, engine);
  mark.n_looked_up = from.get<std::int64_t>();
  mark.moment.head_row = read_head_row(from, engine);
  if (engine.analyzer() != nullptr) mark.moment.audio = read_audio(from, *engine.analyzer());
  return mark;
}

// Hands out the bytes of a session's blocks, however many are asked for: those of all blocks on
// rank 0, then on the others.
class BlockReader {
 public:
  BlockReader(const Session& session, std::vector<BlockRun> runs)
      : session_(session), runs_(std::move(runs)) {
    for (const BlockRun& run : runs_) n_left_ += static_cast<std::int64_t>(run.bytes);
    n_left_ *= session.engine().pool().memory().n_ranks();
  }

  std::int64_t n_left() const { return n_left_; }  // bytes
  void read(std::span<std::byte> to) {
    n_left_ -= std::ssize(to);
    const auto lock = session_.lock_open();
    PageMemory& memory = session_.engine().pool().memory();
    while (!to.empty()) {
      const BlockRun& run = runs_[at_];
      const std::size_t n = std::min(to.size(), run.bytes - n_done_);
      memory.read_rank(rank_, to.data(), run.data + n_done_, n);
      to = to.subspan(n);
      n_done_ += n;
      if (n_done_ < run.bytes) continue;
      n_done_ = 0;
      if (++at_ < runs_.size()) continue;
      at_ = 0;
      ++rank_;
    }
  }

 private:
  const Session& session_;
  std::vector<BlockRun> runs_;
  std::int64_t n_left_ = 0;
  int rank_ = 0;
  std::size_t at_ = 0;
  std::size_t n_done_ = 0;  // of runs_[at_]
};

// A sequence that no session has yet: it is filled outside the engine's lock, a piece at a time.
class Arrival {
 public:
  // `max_positions` 0 takes those of the state.
  Arrival(Engine& engine, const SequenceState& state, std::optional<Endless> endless,
          std::int64_t max_positions)
      : engine_(engine), endless_(endless) {
    // Before pages are taken and written: in a fork they are the parent's.
    check<SessionClosed>(!engine_.is_closed(), "engine: it is closed; load it again");
    const SequenceLayout& layout = engine_.layout();
    if (endless_ && max_positions > 0) {
      endless_ = endless_->with_limit(max_positions, layout);
    } else if (endless_) {
      endless_->max_positions = state.max_positions;
      try {
        endless_->validate(layout);
      } catch (const InvalidArgument& error) {  // of this engine's rewind_rows, say
        fail<CheckpointError>("snapshot: ", error.what());
      }
    }
    if (max_positions <= 0) max_positions = state.max_positions;
    if (endless_) max_positions = endless_->held_positions(layout);
    sequence_ = Sequence::restore(engine_.pool(), engine_.layout(), state, max_positions);
    runs_ = held_blocks(*sequence_, state);
  }
  ~Arrival() {
    const std::lock_guard lock(mutex());
    sequence_.reset();
  }
  Arrival(const Arrival&) = delete;
  Arrival& operator=(const Arrival&) = delete;

  void fill(const SnapshotReader& read) {
    std::vector<std::byte> piece(kPieceBytes);
    PageMemory& memory = engine_.pool().memory();
    for (int rank = 0; rank < memory.n_ranks(); ++rank) {
      for (const BlockRun& run : runs_) {
        for (std::size_t at = 0; at < run.bytes; at += kPieceBytes) {
          const auto part = std::span(piece).first(std::min(kPieceBytes, run.bytes - at));
          read(part);
          if (run.data == nullptr) continue;
          const std::lock_guard lock(mutex());
          memory.write_rank(rank, run.data + at, part.data(), part.size());
        }
      }
    }
  }

  std::shared_ptr<Session> become_session(ByteReader& from) {
    const auto max_drafts = from.get<std::int32_t>();
    check<CheckpointError>(max_drafts >= 0 && max_drafts <= kMaxDrafts, "snapshot: expected 0 to ",
                           kMaxDrafts, " drafts, found ", max_drafts);
    const SamplingParams sampling = read_sampling(from);
    const LaneKind lane = from.get_bool() ? LaneKind::kBackground : LaneKind::kInteraction;
    auto speculation = engine_.interaction().make_speculation(
        engine_.pool(), max_drafts,
        endless_ ? endless_->max_positions : sequence_->max_positions());
    if (speculation && speculation->drafter) speculation->drafter->start_at(sequence_->length());
    Sequence sequence = std::move(*sequence_);
    sequence_.reset();
    return engine_.adopt(std::move(sequence), std::move(speculation),
                         {.sampling = sampling, .lane = lane, .endless = endless_});
  }

 private:
  // Whoever writes to memory that a lane may be computing with waits for that lane.
  std::mutex& mutex() const { return engine_.interaction().mutex(); }

  Engine& engine_;
  std::optional<Endless> endless_;
  std::optional<Sequence> sequence_;
  std::vector<BlockRun> runs_;
};

// All fields of a session but its tapes. A new one is written and read here.
void write_session(Session& session, ByteWriter& to) {
  const std::optional<Speculation>& speculation = session.speculation();
  const auto& [now, untold, marks, next_mark] = session.carried();
  to.put(speculation ? speculation->max_drafts : 0);
  write_sampling(session.sampling(), to);
  to.put(session.lane().kind() == LaneKind::kBackground);
  to.put(now.audio.has_value());
  if (now.audio) write_audio(*now.audio, to);
  to.put(untold.begin);
  to.put(untold.end);
  to.put(now.turn);
  to.put(session.epoch());
  to.put(now.pending_token);
  to.put_all(now.head_row);
  to.put(speculation ? speculation->n_drafts : 0);
  if (speculation) write_lookup(speculation->lookup, to);
  to.put(static_cast<std::uint64_t>(next_mark));
  to.put(static_cast<std::uint64_t>(marks.size()));
  for (const Mark& mark : marks) write_mark(mark, to);
  const auto lock = session.lock_inbox();
  write_inbox(session.inbox(), to);
}

// The state of a session that the caller holds busy, and its blocks.
std::pair<ByteWriter, BlockReader> capture(Session& session) {
  const auto lock = session.lock_open();
  SequenceState state = session.sequence().state();
  if (session.endless()) state.max_positions = session.endless()->max_positions;
  ByteWriter bytes;
  write_endless(session.endless(), bytes);
  state.write(bytes);
  write_session(session, bytes);
  return {std::move(bytes), BlockReader(session, held_blocks(session.sequence(), state))};
}

// Into the session that become_session made.
void read_session(ByteReader& from, Session& session) {
  const Engine& engine = session.engine();
  const bool hears = engine.analyzer() != nullptr;
  check<CheckpointError>(from.get_bool() == hears,
                         "snapshot: expected one of a model that hears like this one");
  Carried carried;
  auto& [now, untold, marks, next_mark] = carried;
  if (hears) now.audio = read_audio(from, *engine.analyzer());
  untold.begin = from.get<std::int64_t>();
  untold.end = from.get<std::int64_t>();
  now.turn = from.get<std::int64_t>();
  const auto epoch = from.get<std::int64_t>();
  now.pending_token = read_token(from, engine);
  now.head_row = read_head_row(from, engine);
  const auto n_drafts = from.get<std::int32_t>();
  std::int64_t n_looked_up = 0;
  if (std::optional<Speculation>& speculation = session.speculation()) {
    speculation->n_drafts = std::clamp(n_drafts, 0, speculation->max_drafts);
    speculation->lookup = read_lookup(from, engine);
    n_looked_up = speculation->lookup.size();
  }
  next_mark = from.get<std::uint64_t>();
  const auto n_marks = from.get<std::uint64_t>();
  check<CheckpointError>(n_marks >= 1 && n_marks <= kMarks && next_mark <= n_marks &&
                             next_mark < kMarks + (n_marks < kMarks ? 1 : 0),
                         "snapshot: expected 1 to ", kMarks, " marks, found ", n_marks);
  while (marks.size() < n_marks) {
    const Mark& mark = marks.emplace_back(read_mark(from, engine));
    const std::int64_t n = mark.position < 0 ? 0 : mark.n_looked_up;  // of one that was dropped
    check<CheckpointError>(n >= 0 && n <= n_looked_up, "snapshot: expected a mark with 0 to ",
                           n_looked_up, " looked-up ids, found ", n);
  }
  session.go_on(carried, epoch);
  read_inbox(from, session);
}

}  // namespace

void write_snapshot(Session& session, const SnapshotWriter& writer) {
  const BusyGuard busy({&session});
  auto [state, reader] = capture(session);
  writer.begin(state.bytes(), reader.n_left());
  std::vector<std::byte> piece(kPieceBytes);
  while (reader.n_left() > 0) {
    const auto n = std::min<std::int64_t>(reader.n_left(), kPieceBytes);
    const auto part = std::span(piece).first(static_cast<std::size_t>(n));
    reader.read(part);
    writer.write(part);
  }
}

std::shared_ptr<Session> read_snapshot(Engine& engine, std::span<const std::byte> state,
                                       const SnapshotReader& read, std::int64_t max_positions) {
  ByteReader from(state);
  const std::optional<Endless> endless = read_endless(from);
  Arrival arrival(engine, SequenceState::read(from), endless, max_positions);
  arrival.fill(read);
  try {
    auto session = arrival.become_session(from);
    read_session(from, *session);
    from.check_at_end();
    return session;
  } catch (const InvalidArgument& error) {
    fail<CheckpointError>("snapshot: ", error.what());
  }
}

std::shared_ptr<Session> copy_session(Session& session, Engine& engine) {
  const BusyGuard busy({&session});
  auto [state, reader] = capture(session);
  return read_snapshot(
      engine, state.bytes(), [&blocks = reader](std::span<std::byte> to) { blocks.read(to); }, 0);
}

}  // namespace duplex
