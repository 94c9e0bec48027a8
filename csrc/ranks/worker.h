// A rank of a group that is not rank 0: it owns a share of the weights and of every sequence, knows
// nothing of sessions, and does what rank 0 sends (ranks/leader.h) in the order in which it is
// sent.
#pragma once

#include <memory>
#include <span>
#include <string>

#include "backend/backend.h"
#include "model/inkling.h"
#include "model/weights.h"
#include "parallel/commands.h"
#include "parallel/group.h"
#include "parallel/group_exchange.h"
#include "ranks/commands.h"
#include "ranks/options.h"
#include "sequence/layout.h"

namespace duplex {

class RankWorker {
 public:
  // Loads this rank's share. `config` is that of the whole model. `socket`, to rank 0, is one that
  // this process inherited; it stays the caller's.
  RankWorker(const ModelConfig& config, WeightSource source, const EngineOptions& options,
             Group group, const LoadProgress& progress, int socket = -1);

  // Does what rank 0 asks for until it says stop. Throws RankFailed when a rank is gone.
  void serve();

  // Device, instruction set, threads.
  std::string description() const { return backend_->description(); }
  std::size_t arena_bytes() const { return weights_.arena->bytes(); }
  void write_arena(const ArenaWriter& write) const {
    duplex::write_arena(weights_, *backend_, write);
  }
  std::uint64_t weights_hash() const { return arena_hash(weights_, *backend_); }

 private:
  class LaneServer;

  void serve_lane(LaneServer& server, LaneKind lane);
  void serve_memory();
  // Carries one command out; false for stop.
  bool do_memory(std::span<const std::byte> command);
  template <class Do>
  void answer_status(const Do& act);
  void transfer(MemoryCommand kind, ByteReader& from);

  Group group_;
  ModelConfig config_;  // of this shard
  std::unique_ptr<Backend> backend_;
  Weights weights_;
  SequenceLayout layout_;
  SequenceLayout mtp_layout_;
  std::unique_ptr<PageMemory> memory_;
  AddressRanges ranges_;
  std::unique_ptr<SlabExchange> memory_exchange_;
};

}  // namespace duplex
