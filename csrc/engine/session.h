// One user's stream: its inbox, and what lasts of it from call to call.
//
// A session does not compute; its lane moves its rows through the model (lane.h, micro_turn.cpp),
// which keeps what belongs to one call alone (call.h). Any thread may fill the inbox at any time.
// What lasts (tapes, what is carried beside them, what is guessed from) belongs to the one caller
// that holds the session busy. Others may drop the tapes, under the mutex of the lane.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <tuple>
#include <vector>

#include "backend/sampling.h"
#include "core/config.h"
#include "encoders/dmel.h"
#include "engine/endless.h"
#include "engine/input.h"
#include "engine/speculation.h"
#include "sequence/sequence.h"

namespace duplex {

class Engine;
class Lane;

inline constexpr std::int32_t kNoToken = -1;

// Where a session is, beside its tapes: a mark keeps it, and truncate goes back to it.
struct Moment {
  std::int64_t turn = 0;
  std::int32_t pending_token = kNoToken;  // sampled, and appended with the next input
  std::vector<std::byte> head_row;  // the last row of the sequence, ready for the head; if any
  std::optional<DmelStream> audio;  // where the model hears
};

// The end of a call.
struct Mark {
  std::int64_t position = 0;     // below 0: of a mark that truncate dropped
  std::int64_t n_looked_up = 0;  // size of Speculation::lookup
  Moment moment;
};
inline constexpr std::size_t kMarks = 32;

// What a session has from one call to the next, beside its tapes: fork and snapshot take it along.
struct Carried {
  Moment now;
  PositionRange untold;     // forgotten for room, and in no turn so far
  std::vector<Mark> marks;  // a ring of kMarks
  std::size_t next_mark = 0;
};

struct SessionOptions {
  std::int64_t max_positions = 0;  // 0 = the engine's default
  SamplingParams sampling;
  std::int32_t max_drafts = 0;  // tokens guessed ahead in one pass; 0 = no speculation
  LaneKind lane = LaneKind::kInteraction;
  std::optional<Endless> endless = {};  // open_session gives it the limit
};

class Session {
 public:
  // Engine::open_session and fork make it.
  Session(std::shared_ptr<Engine> engine, Lane& lane, Sequence sequence,
          std::optional<Speculation> speculation, const SessionOptions& options);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // ---- from any thread
  void feed_audio(std::span<const float> samples);
  void feed_image(Image image);
  void feed_text(std::span<const std::int32_t> ids);
  void feed_result(std::span<const std::int32_t> ids);
  bool is_closed() const { return is_closed_.load(); }
  void close();
  // Raises the epoch. Output in progress ends behind its next token, as if its limit were reached.
  void interrupt();

  // ---- by one caller at a time
  std::int64_t length() const;
  std::int64_t max_positions() const;
  std::int64_t turn() const { return carried_.now.turn; }
  std::int64_t epoch() const { return epoch_.load(); }
  SequenceUsage usage() const;
  std::int64_t draft_bytes() const;  // held for drafts, beside usage()
  std::vector<std::tuple<std::int32_t, std::int64_t, std::uint64_t>> digests() const;
  std::vector<std::int64_t> marks() const;  // positions that truncate accepts, ascending
  void truncate(std::int64_t position);
  std::shared_ptr<Session> fork(std::int64_t max_positions, LaneKind lane = LaneKind::kInteraction);
  PositionRange forget(std::int64_t begin, std::int64_t end);
  std::vector<PositionRange> forgotten() const;  // ascending
  const std::optional<Endless>& endless() const { return endless_; }
  void set_sampling(const SamplingParams& params);
  Engine& engine() const { return *engine_; }
  Lane& lane() const { return lane_; }

  // ---- for that caller's call in a lane
  void begin_call();  // by BusyGuard; throws SessionBusy
  void end_call() { is_busy_.store(false); }
  std::int64_t call_epoch() const { return call_epoch_; }
  bool is_interrupted() const { return epoch_.load() != call_epoch_; }
  void check_open() const;
  std::unique_lock<std::mutex> lock_open() const;  // of the lane; throws SessionClosed
  std::unique_lock<std::mutex> lock_inbox() const { return std::unique_lock(inbox_mutex_); }
  Inbox& inbox() { return inbox_; }  // under its lock
  // The rest under the mutex of the lane, while it is open; a new session has no other caller yet.
  Sequence& sequence() { return *sequence_; }
  Moment& now() { return carried_.now; }
  Carried& carried() { return carried_; }
  const SamplingParams& sampling() const { return sampling_; }
  std::optional<Speculation>& speculation() { return speculation_; }
  Drafter* drafter() {  // of the speculation, or none
    return speculation_ && speculation_->drafter ? &*speculation_->drafter : nullptr;
  }
  // Throws CapacityError unless `n_rows` fit. An endless session forgets for them.
  void make_room(std::int64_t n_rows);
  void set_mark();
  // Of a new session: goes on where another is.
  void go_on(const Carried& carried, std::int64_t epoch) { carried_ = carried, epoch_ = epoch; }
  // Drops the tapes and closes.
  void drop() noexcept;

 private:
  // Forgets, and lets drafts begin anew: what they remember has a hole too.
  PositionRange hide(std::int64_t begin, std::int64_t end);

  std::shared_ptr<Engine> engine_;
  Lane& lane_;
  std::optional<Sequence> sequence_;  // empty once closed
  std::optional<Endless> endless_;
  SamplingParams sampling_;
  std::optional<Speculation> speculation_;  // where drafts are wanted
  Carried carried_;

  mutable std::mutex inbox_mutex_;
  Inbox inbox_;
  std::atomic<std::int64_t> epoch_{0};
  std::int64_t call_epoch_ = 0;  // when the call in progress began; another now: it is interrupted
  std::atomic<bool> is_busy_{false};
  std::atomic<bool> is_closed_{false};
};

}  // namespace duplex
