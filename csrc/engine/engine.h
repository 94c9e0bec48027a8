// The engine: one checkpoint, one backend, one page pool, and the sessions they serve.
//
// step() runs one micro-turn for any number of sessions together (micro_turn.cpp tells the story);
// append() and decode() are the finer tools. One call computes at a time; a second one waits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "core/config.h"
#include "engine/draft.h"
#include "engine/session.h"
#include "engine/turn.h"
#include "model/inkling.h"
#include "model/weights.h"
#include "sequence/page_pool.h"

namespace duplex {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  Engine(ModelConfig config, WeightSource source, const EngineOptions& options,
         const LoadProgress& progress);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::shared_ptr<Session> open_session(const SessionOptions& options);
  // One micro-turn for each session. Errors of one session are in its Turn.
  std::vector<Turn> step(std::span<const StepRequest> requests);
  // Appends rows and returns their logits: (rows wanted, unpadded_vocab_size).
  std::vector<float> append_text(Session& session, std::span<const std::int32_t> ids,
                                 LogitsWanted wanted);
  std::vector<float> append_audio(Session& session, std::span<const float> samples,
                                  bool is_end_of_audio, LogitsWanted wanted);
  std::vector<float> append_image(Session& session, Image image, LogitsWanted wanted);
  // The rows as they would enter a sequence: (rows, d_model). Sound is padded to whole frames.
  std::vector<float> embed_text(std::span<const std::int32_t> ids);
  std::vector<float> embed_audio(std::span<const float> samples);
  std::vector<float> embed_image(Image image);
  // Up to n tokens; a token of `stop` ends it and is the last one returned.
  std::vector<std::int32_t> decode(Session& session, std::int32_t n,
                                   std::span<const std::int32_t> stop);
  std::vector<float> draft_logits(Session& session);  // behind the pending token, for tests

  const ModelConfig& config() const { return config_; }
  std::string description() const;
  std::vector<std::pair<std::string, std::int64_t>> memory_plan() const;
  EngineStats stats() const;
  std::int64_t arena_bytes() const { return static_cast<std::int64_t>(weights_.arena->bytes()); }
  void write_arena(const ArenaWriter& write) const;
  // Closes every session; later calls throw SessionClosed.
  void close();

  // ---- for sessions
  void check_ids(std::span<const std::int32_t> ids) const;
  Image check_image(Image image) const;
  const DmelAnalyzer* analyzer() const { return analyzer_.get(); }
  std::size_t head_row_bytes() const { return model_->head_row_bytes(); }
  std::mutex& mutex() const { return mutex_; }
  std::shared_ptr<Session> adopt(Sequence sequence, std::optional<Drafter> drafter,
                                 const SamplingParams& sampling, std::int32_t max_drafts);
  void unregister(Session& session);

 private:
  friend class SessionState;  // snapshot.cpp
  // Consecutive rows of one session in a pass.
  struct Part {
    Session* session;
    std::size_t first;  // of session->input_.rows
    std::int32_t n_rows;
    std::int32_t n_drafts;  // of the rows, the last
  };

  // ---- micro_turn.cpp
  InputPlan plan_input(const Session& session) const;
  void compose_input(Session& session, const InputPlan& plan, Inbox inbox);
  void begin_turn(const StepRequest& request, Turn& turn);
  void decode_turns(std::span<const StepRequest> requests, std::span<Turn> turns);
  // Samples for as long as the tokens were drafted; true when one of them ends the turn.
  bool take_tokens(const StepRequest& request, Turn& turn);
  std::int32_t token_limit(std::int32_t max_tokens) const;
  // Whether the token ends its turn; notes why.
  bool is_last(std::int32_t token, const StepRequest& request, Turn& turn) const;

  // ---- batch.cpp
  // Appends session->input_ of every session, in as many passes as that takes.
  void run_rows(std::span<Session* const> sessions);
  void run_pass();
  void keep_rows(const Part& part, std::int32_t row_begin);
  // Writes rows [first, first + n_rows) of the input into the model's rows from row_begin on.
  void embed(const InputRows& input, std::size_t first, std::int32_t n_rows,
             std::int32_t row_begin);
  void embed_run(const InputRows& input, std::size_t first, std::int32_t n_rows,
                 std::int32_t row_begin);
  void collect_logits();
  std::vector<float> embed_all(const InputRows& input);

  // ---- output.cpp
  // Makes the pending token the input, and behind it at most `max_drafts` looked-up guesses.
  void continue_output(Session& session, std::int64_t max_drafts);
  void score(std::span<Session* const> sessions);  // logits of last rows, and of drafts
  // Samples the next token behind the last row; it becomes the pending token.
  std::int32_t sample(Session& session);
  // Whether the pending token is the next draft: then its row is the last one now.
  bool accept_draft(Session& session);

  // One caller of one open session on an open engine, for as long as it lives.
  struct Call {
    Call(Engine& engine, Session& session);
    BusyGuard busy;
    std::lock_guard<std::mutex> lock;
  };
  void check_open() const;
  std::vector<float> append_input(Session& session, LogitsWanted wanted);
  void back_ahead(Session& session, std::int64_t n_rows);
  void reserve_logits(std::int32_t max_drafts);

  ModelConfig config_;
  EngineOptions options_;
  std::unique_ptr<Backend> backend_;
  Weights weights_;
  SequenceLayout layout_;
  std::unique_ptr<PagePool> pool_;
  std::unique_ptr<Inkling> model_;
  std::unique_ptr<DmelAnalyzer> analyzer_;
  std::unique_ptr<HmlpEncoder> vision_;
  Sampler sampler_;
  std::unique_ptr<DraftRunner> drafts_;  // where layers for it were loaded

  mutable std::mutex mutex_;  // one computing call at a time; guards all below
  std::vector<Session*> sessions_;
  bool is_closed_ = false;
  std::vector<Part> parts_;  // of the pass in progress, and the buffers it fills
  std::vector<Segment> segments_;
  std::vector<std::int32_t> ids_;
  std::vector<Session*> active_;
  std::vector<const void*> head_rows_;
  std::vector<float> logits_;
  std::vector<float>* all_logits_ = nullptr;  // where append() wants the logits of every row
  EngineStats counts_;                        // passes, rows, drafts
};

}  // namespace duplex
