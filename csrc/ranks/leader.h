// Rank 0's side of a tensor-parallel group: what it does is mirrored to the workers.
//
// Rank 0 alone knows sessions. What reaches the others is page memory (LeaderMemory, a decorator
// around rank 0's own) and passes (LeaderModel, rank 0's Inkling): so sequences, forks, lanes and
// snapshots above need not know of ranks. Between a call's beginning and end all ranks have done
// what it says; what gives memory back is only sent. Next: ranks/worker.h for the other side.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>

#include "backend/page_memory.h"
#include "model/inkling.h"
#include "parallel/commands.h"
#include "parallel/group.h"
#include "parallel/group_exchange.h"
#include "parallel/group_rendezvous.h"
#include "ranks/commands.h"
#include "ranks/connect.h"
#include "ranks/options.h"

namespace duplex {

// The group itself. Outlives the memory and the models that lead it.
class RankLeader {
 public:
  // `transport`: of ranks that share no memory with this one.
  RankLeader(const ModelConfig& config, const EngineOptions& options,
             std::shared_ptr<Transport> transport = nullptr);

  const Group& group() const { return group_; }
  // A worker's end of the socket to it, which it inherits.
  int worker_socket(int rank) const { return sockets_.worker(rank); }
  // Connects the devices, where they have something of their own to meet in; the workers do the
  // same as they begin (RankWorker). Before any memory or model.
  void connect(Backend& backend, const Connection& of);
  // Says that a rank is gone; every wait in the group ends. Any thread.
  void fail(int rank, std::string_view reason) const noexcept { group_.fail(rank, reason); }
  // Tells the workers to end. Later calls do nothing.
  void stop() noexcept;

 private:
  friend class LeaderMemory;
  friend class LeaderModel;
  static constexpr int kLanes = 2;  // channel = LaneKind

  // Page-memory commands, with memory_mutex_ held: one that is only sent, and one that waits for
  // the answers, the slabs of all ranks.
  void tell(CommandParts parts);
  // `bytes` of them.
  std::span<const void* const> ask(CommandParts parts, std::size_t bytes);
  // Opens the lane, for its model.
  Exchange* open(LaneKind lane, Backend& backend);

  Group group_;
  RankSockets sockets_;
  CommandSender sender_;
  std::unique_ptr<Exchange> lanes_[kLanes];
  AddressRanges ranges_;

  std::mutex memory_mutex_;  // one page-memory command at a time; guards all below
  std::unique_ptr<SlabExchange> memory_exchange_;
  std::int32_t next_range_ = 0;
  bool is_stopped_ = false;
};

// Page memory of all ranks: addresses are those of rank 0, whose own memory it is around.
class LeaderMemory final : public PageMemory {
 public:
  LeaderMemory(std::shared_ptr<RankLeader> leader, std::unique_ptr<PageMemory> own);

  std::size_t page_bytes() const override { return own_->page_bytes(); }
  std::int64_t n_pages() const override { return own_->n_pages(); }
  std::byte* reserve_range(std::size_t bytes) override;
  void release_range(std::byte* base, std::size_t bytes) noexcept override;
  void map(std::byte* address, PageId page) override;
  void unmap(std::byte* address) noexcept override;
  void copy(std::byte* destination, const std::byte* source, std::size_t bytes) override;
  void discard(PageId page) noexcept override;
  void read(void* host, const std::byte* source, std::size_t bytes) const override {
    own_->read(host, source, bytes);
  }
  void write(std::byte* destination, const void* host, std::size_t bytes) override {
    own_->write(destination, host, bytes);
  }
  int n_ranks() const override { return leader_->group().n_ranks(); }
  void read_rank(int rank, void* host, const std::byte* source, std::size_t bytes) override;
  void write_rank(int rank, std::byte* destination, const void* host, std::size_t bytes) override;

 private:
  // Does `here` on this rank while the others do `command`; where one fails, all undo it.
  void everywhere(const ByteWriter& command, const std::function<void()>& here,
                  const std::function<void()>& undo_here, const ByteWriter& undo);
  void send(const ByteWriter& command) const;
  void send_quietly(const ByteWriter& command) const noexcept;

  std::shared_ptr<RankLeader> leader_;
  std::unique_ptr<PageMemory> own_;
};

// The model of rank 0: tells the others what it is about to compute.
class LeaderModel final : public Inkling {
 public:
  LeaderModel(RankLeader& leader, LaneKind lane, const ModelConfig& config, const Weights& weights,
              const SequenceLayout& layout, Backend& backend, std::int32_t max_rows);

  void forward(const Segments& segments) override;
  void run_draft_block(const Segments& segments, const Block& block, std::int32_t depth,
                       const float* norm) override;
  void turn(TurnArgs args) override;

 private:
  void multiply_head(std::span<const void* const> head_rows) override;
  // Tells the others.
  void send_blocks(const Segments& segments, std::int32_t depth);
  // Runs this rank's share of what was sent, to its end on the device.
  void share(const std::function<void()>& compute);

  RankLeader& leader_;
  int lane_;
  std::vector<float> rows_;          // of a pass, on the host
  std::vector<std::byte> gathered_;  // head rows, one behind the other
};

}  // namespace duplex
