// One lane of execution: a backend, the working buffers of a pass, and the way of rows and tokens
// through them.
//
// An engine has an interaction lane, whose micro-turns have a deadline, and makes a background lane
// when a session first asks for one: that one stands still while the first computes (thread_pool.h)
// and gives the same bits. step() runs one micro-turn for any number of sessions together
// (micro_turn.cpp tells the story); append and decode are the finer tools underneath. One call
// computes at a time in a lane; a second caller waits.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "core/config.h"
#include "core/owner_process.h"
#include "engine/busy_guard.h"
#include "engine/call.h"
#include "engine/draft.h"
#include "engine/loaded_model.h"
#include "engine/pass_input.h"
#include "engine/turn.h"
#include "model/inkling.h"

namespace duplex {

class Lane {
 public:
  // `model` outlives it. `max_rows`: the most rows of one pass.
  Lane(LaneKind kind, const LoadedModel& model, std::unique_ptr<Backend> backend,
       std::int32_t max_rows);

  LaneKind kind() const { return kind_; }
  std::vector<Turn> step(std::span<const StepRequest> requests);
  // Appends rows and returns their logits: (rows wanted, unpadded_vocab_size).
  std::vector<float> append_text(Session& session, std::span<const std::int32_t> ids,
                                 LogitsWanted wanted);
  std::vector<float> append_audio(Session& session, std::span<const float> samples,
                                  bool is_end_of_audio, LogitsWanted wanted);
  std::vector<float> append_image(Session& session, Image image, LogitsWanted wanted);
  std::vector<float> embed(const InputRows& input);
  // Up to n tokens; a token of `stops` ends it and is the last one returned.
  std::vector<std::int32_t> decode(Session& session, std::int32_t n,
                                   std::span<const std::int32_t> stops);
  std::vector<float> draft_logits(Session& session);  // behind the pending token, for tests
  Backend& backend() const { return *backend_; }
  std::size_t head_row_bytes() const { return model_->head_row_bytes(); }
  // Of a new session; empty where it makes no drafts.
  std::optional<Speculation> make_speculation(PagePool& pool, std::int32_t max_drafts,
                                              std::int64_t max_positions) const;
  // Maps the pages of a pass of so many rows ahead, if it can.
  void back_ahead(Session& session, std::int64_t n_rows) const;
  void add_counts(EngineStats& stats) const;
  void add_plan(const std::string& prefix,
                std::vector<std::pair<std::string, std::int64_t>>& plan) const;
  // What is no pass but takes milliseconds, with the share of the lane's passes; mutex() is held.
  void run_aside(const std::function<void()>& work);
  const OwnerProcess& owner() const { return owner_; }
  std::mutex& mutex() const;  // throws in a fork, where a thread that is not there may hold it
  void close() { is_closed_ = true; }  // later calls throw SessionClosed; mutex() is held

 private:
  // One caller of one open session, for as long as it lives: alone in active_.
  struct Hold {
    Hold(Lane& lane, Session& session);
    BusyGuard busy;
    std::lock_guard<std::mutex> lock;
    Call& call;
  };
  void check_open() const;
  void back(Session& session, std::int64_t n_rows) const;  // before any input is taken
  std::vector<float> make_ready(Session& session, std::int64_t n_rows, LogitsWanted wanted);
  std::vector<float> append_input(Call& call, LogitsWanted wanted, std::vector<float> logits);
  // ---- micro_turn.cpp
  InputPlan plan_input(Session& session, std::int64_t n_output) const;
  void compose_input(Call& call, const InputPlan& plan, Inbox inbox);
  void run_turns(std::span<const StepRequest> requests, std::span<Turn> turns);
  void begin_turn(Call& call);
  std::int32_t token_limit(std::int32_t max_tokens) const;
  // Until none of active_ has more to say. `has_said`: their first tokens are sampled already.
  void decode_turns(std::span<const std::int32_t> stops, bool has_said);
  // Appends their pending tokens, and guesses behind them. True: the next tokens are sampled.
  bool append_output(std::span<const std::int32_t> stops);
  // Samples for as long as the tokens were drafted. Whether one of them ends the turn; notes why.
  bool take_tokens(Call& call, std::span<const std::int32_t> stops);

  // ---- batch.cpp
  // Appends the input of active_, in as many passes as that takes; also `logits` of each row.
  void run_rows(std::vector<float>* logits = nullptr);
  void run_pass(std::vector<float>* logits);
  Segments place_parts();
  void keep_rows();
  void keep_part(const PassPart& part, const std::byte* head_row);
  // Text that later drafts may be taken from.
  void remember(Session& session, std::int32_t id) const;
  // Rows [first, first + n_rows) of the input become the model's from row_begin on.
  void place_rows(const InputRows& input, std::size_t first, std::int32_t n_rows,
                  std::int32_t row_begin);
  void collect_logits(std::vector<float>& logits);

  // ---- device_turn.cpp
  // Appends the input of active_ and samples tokens, on the device. False: no row is computed.
  bool run_on_device(std::span<const std::int32_t> stops);
  bool take_whole_input();

  // ---- output.cpp
  // Makes the pending token the input, and behind it at most `max_drafts` looked-up guesses.
  void continue_output(Call& call, std::int64_t max_drafts);
  // Samples tokens behind the last rows, and behind each draft as if all before it had held.
  void score();
  // Whether the pending token is the next draft: then its row is the last one now.
  bool accept_draft(Call& call);
  // The pending token's row was computed already: it is the last one now.
  void keep_sampled(Call& call);

  LaneKind kind_;
  OwnerProcess owner_;
  const ModelConfig& config_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Inkling> model_;
  std::unique_ptr<HmlpEncoder> vision_;
  std::unique_ptr<DraftRunner> drafts_;  // where layers for it were loaded

  mutable std::mutex mutex_;  // one computing call at a time; guards all below
  bool is_closed_ = false;
  std::vector<Call> calls_ = std::vector<Call>(1);  // of as many sessions as were ever together
  std::vector<Call*> active_;                       // of these, those that have more to say
  std::vector<PassPart> parts_;  // of the pass in progress, and the buffers it fills
  std::vector<Segment> segments_;
  PassInput placed_;
  std::vector<std::int32_t> wanted_rows_;  // of the pass, whose head rows are read
  std::vector<std::byte> new_head_rows_;
  std::vector<std::int32_t> limits_;  // tokens that each part may say on a device
  std::vector<const void*> head_rows_;
  std::vector<SampleRow> sample_rows_;
  std::vector<std::int32_t> tokens_;  // of the rows that were scored
  struct {
    std::atomic<std::int64_t> passes, rows, drafted, accepted;
  } counts_{};
};

}  // namespace duplex
