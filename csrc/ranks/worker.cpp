// One thread for page memory and one for each lane, as the channels are.
#include "ranks/worker.h"

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "backend/registry.h"
#include "core/error.h"
#include "ranks/connect.h"

namespace duplex {
namespace {

// Where a layer's state lies in a block depends on neither pages nor limits, and those are rank 0's
// business: any will do here.
SequenceLayout any_layout(const ModelConfig& config, DType kv_dtype) {
  return SequenceLayout::make(config, kv_dtype, 1, {.rewind_rows = 0, .pending_rows = 1});
}

}  // namespace

RankWorker::RankWorker(const ModelConfig& config, WeightSource source, const EngineOptions& options,
                       Group group, const LoadProgress& progress, int socket)
    : group_(std::move(group)),
      backend_(create_backend(options.device, options.backend)),
      memory_exchange_(std::make_unique<GroupExchange>(group_, group_.memory_channel())) {
  const Shard shard =
      make_shard(config, options.weights, group_.rank(), group_.n_ranks(), options.reduction);
  config_ = shard_config(config, shard);
  connect_ranks(*backend_, group_, *memory_exchange_, {socket}, {config_, shard, options});
  weights_ = load_weights(config, std::move(source), {options.dtype, options.weights}, *backend_,
                          progress, shard);
  layout_ = any_layout(config_, options.kv_dtype);
  if (!config_.mtp.layers.empty()) mtp_layout_ = any_layout(config_.mtp_model(), options.kv_dtype);
}

// The passes of one lane.
class RankWorker::LaneServer {
 public:
  LaneServer(RankWorker& worker, LaneKind lane)
      : worker_(worker),
        own_backend_(lane == LaneKind::kBackground ? worker.backend_->background_lane() : nullptr),
        backend_(own_backend_ ? *own_backend_ : *worker.backend_),
        exchange_(backend_.create_exchange(
            std::make_unique<GroupExchange>(worker.group_, static_cast<int>(lane)))) {}

  // False for stop.
  bool run(std::span<const std::byte> command) {
    ByteReader from(command);
    switch (from.get<PassCommand>()) {
      case PassCommand::kOpen:
        open(from.get<std::int32_t>());
        return true;
      case PassCommand::kBlocks:
        run_blocks(from);
        return true;
      case PassCommand::kLogits:
        logits(from);
        return true;
      case PassCommand::kTurn: {
        const TurnArgs turn = get_turn(from, worker_.ranges_, turn_store_);
        backend_.run_awake([&] { model_->turn(turn); });
        return true;
      }
      case PassCommand::kStop:
        break;
    }
    return false;
  }

 private:
  void open(std::int32_t max_rows) {
    model_ = std::make_unique<Inkling>(worker_.config_, worker_.weights_, worker_.layout_, backend_,
                                       max_rows, exchange_.get());
    const auto& drafting = worker_.weights_.mtp.layers;
    for (std::size_t i = 0; i < drafting.size(); ++i)
      drafting_.push_back(
          {&drafting[i].block, worker_.config_.mtp.layers[i], worker_.mtp_layout_.layers[i]});
  }

  void run_blocks(ByteReader& from) {
    const auto depth = from.get<std::int32_t>();
    const Segments segments = get_segments(from, worker_.ranges_, store_);
    const std::span<const std::byte> rows = from.rest();
    if (!rows.empty()) backend_.write(model_->rows(), rows.data(), rows.size());
    backend_.run_awake([&] {
      if (depth == kModelLayers)
        model_->forward(segments);
      else  // what the last norm makes of it is rank 0's alone
        model_->run_draft_block(segments, drafting_[static_cast<std::size_t>(depth)], depth,
                                worker_.weights_.final_norm);
      backend_.finish();
    });
  }

  void logits(ByteReader& from) {
    const auto n_rows = from.get<std::int32_t>();
    const std::span<const std::byte> rows = from.rest();
    head_rows_.clear();
    for (std::int32_t i = 0; i < n_rows; ++i)
      head_rows_.push_back(rows.data() + static_cast<std::size_t>(i) * model_->head_row_bytes());
    backend_.run_awake([&] {
      model_->logits(head_rows_, nullptr);
      backend_.finish();
    });
  }

  RankWorker& worker_;
  std::unique_ptr<Backend> own_backend_;
  Backend& backend_;
  std::unique_ptr<Exchange> exchange_;
  std::unique_ptr<Inkling> model_;
  std::vector<Block> drafting_;
  SegmentStore store_;
  TurnStore turn_store_;
  std::vector<const void*> head_rows_;
};

void RankWorker::serve() {
  const auto guarded = [this](const auto& loop) {
    try {
      loop();
    } catch (const RankFailed&) {  // known to all
    } catch (const std::exception& error) {
      group_.fail(group_.rank(), error.what());
    }
  };
  LaneServer interaction_lane(*this, LaneKind::kInteraction);
  LaneServer background_lane(*this, LaneKind::kBackground);
  {
    // Joined here, whatever happens; a thread that cannot be made ends the group, and so the
    // others.
    std::vector<std::jthread> lanes;
    guarded([&] {
      lanes.emplace_back(guarded, [&] { serve_lane(interaction_lane, LaneKind::kInteraction); });
      lanes.emplace_back(guarded, [&] { serve_lane(background_lane, LaneKind::kBackground); });
      serve_memory();
    });
  }
  group_.check_alive();
}

void RankWorker::serve_lane(LaneServer& server, LaneKind lane) {
  CommandReceiver commands(group_, static_cast<int>(lane));
  while (server.run(commands.receive())) commands.done();
  commands.done();
}

void RankWorker::serve_memory() {
  CommandReceiver commands(group_, group_.memory_channel());
  while (do_memory(commands.receive())) commands.done();
  commands.done();
}

template <class Do>
void RankWorker::answer_status(const Do& act) {
  Status status;
  try {
    act();
  } catch (const Error& error) {
    status.is_failed = 1;
    std::strncpy(status.message, error.what(), sizeof status.message - 1);
  }
  std::memcpy(memory_exchange_->mine(), &status, sizeof status);
  memory_exchange_->meet(sizeof status);
}

bool RankWorker::do_memory(std::span<const std::byte> command) {
  ByteReader from(command);
  const auto kind = from.get<MemoryCommand>();
  const auto address = [&] { return ranges_.address(get_address(from)); };
  switch (kind) {
    case MemoryCommand::kOpen: {
      const auto page_bytes = from.get<std::uint64_t>();
      memory_ = backend_->create_page_memory(page_bytes, from.get<std::int64_t>());
      return true;
    }
    case MemoryCommand::kReserve: {
      const auto range = from.get<std::int32_t>();
      const auto bytes = from.get<std::uint64_t>();
      answer_status([&] { ranges_.add(range, memory_->reserve_range(bytes), bytes); });
      return true;
    }
    case MemoryCommand::kRelease: {
      const auto range = from.get<std::int32_t>();
      if (!ranges_.has(range)) return true;  // it could not be reserved here
      const auto [base, bytes] = ranges_.remove(range);
      memory_->release_range(base, bytes);
      return true;
    }
    case MemoryCommand::kMap: {
      std::byte* const at = address();
      const auto page = from.get<PageId>();
      answer_status([&] { memory_->map(at, page); });
      return true;
    }
    case MemoryCommand::kUnmap:
      memory_->unmap(address());
      return true;
    case MemoryCommand::kCopy: {
      std::byte* const to = address();
      const std::byte* const source = address();
      memory_->copy(to, source, from.get<std::uint64_t>());
      return true;
    }
    case MemoryCommand::kDiscard:
      memory_->discard(from.get<PageId>());
      return true;
    case MemoryCommand::kRead:
    case MemoryCommand::kWrite:
      transfer(kind, from);
      return true;
    case MemoryCommand::kStop:
      break;
  }
  return false;
}

// Of one rank; in a read all meet.
void RankWorker::transfer(MemoryCommand kind, ByteReader& from) {
  const bool is_mine = from.get<std::int32_t>() == group_.rank();
  std::byte* const at = ranges_.address(get_address(from));
  if (kind == MemoryCommand::kWrite) {
    if (is_mine) memory_->write(at, from.rest().data(), from.rest().size());
    return;
  }
  const auto n_bytes = static_cast<std::size_t>(from.get<std::uint64_t>());
  void* const slab = memory_exchange_->mine();
  if (is_mine) memory_->read(slab, at, n_bytes);
  memory_exchange_->meet(n_bytes);
}

}  // namespace duplex
