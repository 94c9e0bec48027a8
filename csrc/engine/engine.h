// The engine: one checkpoint, one page pool, two lanes, and the sessions they serve.
//
// It loads, opens and closes; what computes for one session is a call of its lane (lane.h).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/lane.h"
#include "engine/session.h"
#include "engine/turn.h"
#include "sequence/page_pool.h"

namespace duplex {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // Beside another engine: on its machine and threads, as background work of that engine, and with
  // memory_bytes = 0 out of its page pool. It keeps what they share, not the other engine.
  // With `ranks`, where there are several, it is rank 0 of a group, whose workers load the same
  // checkpoint.
  Engine(ModelConfig config, WeightSource source, const EngineOptions& options,
         const LoadProgress& progress, const Engine* beside = nullptr,
         std::shared_ptr<RankLeader> ranks = nullptr);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::shared_ptr<Session> open_session(SessionOptions options);
  // One micro-turn for each session, all of one lane. Errors of one session are in its Turn.
  std::vector<Turn> step(std::span<const StepRequest> requests);
  // The rows as they would enter a sequence: (rows, d_model). Sound is padded to whole frames.
  std::vector<float> embed_text(std::span<const std::int32_t> ids);
  std::vector<float> embed_audio(std::span<const float> samples);
  std::vector<float> embed_image(Image image);

  const ModelConfig& config() const { return model_.config; }
  std::string description() const;
  std::vector<std::pair<std::string, std::int64_t>> memory_plan() const;
  EngineStats stats() const;
  std::int64_t arena_bytes() const { return arena_bytes_; }
  void write_arena(const ArenaWriter& write) const;
  std::uint64_t weights_hash() const;  // arena_hash
  bool is_closed() const;
  // Closes every session and frees the weights; later calls throw SessionClosed.
  void close();

  // ---- for sessions
  Lane& interaction() const { return *interaction_; }
  PagePool& pool() const { return *pool_; }
  const SequenceLayout& layout() const { return model_.layout; }
  const DmelAnalyzer* analyzer() const { return analyzer_.get(); }
  // A session around a sequence, which may share pages with another.
  std::shared_ptr<Session> adopt(Sequence sequence, std::optional<Speculation> speculation,
                                 const SessionOptions& options);
  void unregister(Session& session);

 private:
  void check_open() const;  // mutex_ is held
  Lane& lane(LaneKind kind);
  void close_lanes();  // and every session
  // The weights are there for as long as it is held. Throws SessionClosed.
  std::unique_lock<std::mutex> hold_weights() const;

  LoadedModel model_;
  mutable std::mutex weights_mutex_;  // of who reads or frees the weights outside of lanes
  std::int64_t arena_bytes_ = 0;      // theirs, also when they are freed
  std::shared_ptr<PagePool> pool_;    // of several engines, if they were loaded so
  std::unique_ptr<DmelAnalyzer> analyzer_;
  std::unique_ptr<Lane> interaction_;

  mutable std::mutex mutex_;          // guards all below; taken after a lane's, never before it
  std::unique_ptr<Lane> background_;  // made when a session first asks for it, then never changed
  std::vector<Session*> sessions_;
  bool is_closed_ = false;
};

}  // namespace duplex
