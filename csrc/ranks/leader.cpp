// The group of rank 0, and its model.
#include "ranks/leader.h"

#include <algorithm>
#include <utility>

#include "core/error.h"

namespace duplex {
namespace {

Group make_group(const GroupOptions& options, std::shared_ptr<Transport> transport) {
  return transport == nullptr ? Group::create(options)
                              : Group::apart(options, 0, std::move(transport));
}

}  // namespace

RankLeader::RankLeader(const ModelConfig& config, const EngineOptions& options,
                       std::shared_ptr<Transport> transport)
    : group_(make_group(group_options(config, options), std::move(transport))),
      sockets_(options.n_ranks),
      sender_(group_),
      memory_exchange_(std::make_unique<GroupExchange>(group_, group_.memory_channel())) {}

void RankLeader::connect(Backend& backend, const Connection& of) {
  std::vector<int> sockets;
  for (int rank = 1; rank < group_.n_ranks(); ++rank) sockets.push_back(sockets_.leader(rank));
  connect_ranks(backend, group_, *memory_exchange_, std::move(sockets), of);
}

Exchange* RankLeader::open(LaneKind lane, Backend& backend) {
  const int channel = static_cast<int>(lane);
  lanes_[channel] = backend.create_exchange(std::make_unique<GroupExchange>(group_, channel));
  return lanes_[channel].get();
}

void RankLeader::stop() noexcept {
  const std::lock_guard lock(memory_mutex_);
  if (is_stopped_) return;
  is_stopped_ = true;
  try {
    for (int lane = 0; lane < kLanes; ++lane) {
      sender_.send_pass(lane, {command(PassCommand::kStop).bytes()});
      sender_.end_pass(lane);
    }
    sender_.send_memory({command(MemoryCommand::kStop).bytes()});
  } catch (const Error&) {  // a rank is gone: the others end by that
  }
}

void RankLeader::tell(CommandParts parts) {
  check<SessionClosed>(!is_stopped_, "engine: it is closed; load it again");
  sender_.send_memory(parts);
}

std::span<const void* const> RankLeader::ask(CommandParts parts, std::size_t bytes) {
  tell(parts);
  return memory_exchange_->meet(bytes);
}

LeaderModel::LeaderModel(RankLeader& leader, LaneKind lane, const ModelConfig& config,
                         const Weights& weights, const SequenceLayout& layout, Backend& backend,
                         std::int32_t max_rows)
    : Inkling(config, weights, layout, backend, max_rows, leader.open(lane, backend)),
      leader_(leader),
      lane_(static_cast<int>(lane)),
      rows_(static_cast<std::size_t>(max_rows * row_stride())),
      gathered_(static_cast<std::size_t>(kHeadRows) * head_row_bytes()) {
  leader_.sender_.send_pass(lane_, {command(PassCommand::kOpen, max_rows).bytes()});
  leader_.sender_.end_pass(lane_);
}

// A rank that breaks off leaves the others waiting in a meeting. A pass has ended when the device
// has done it: what is asked for next may want memory that it used.
void LeaderModel::share(const std::function<void()>& compute) {
  try {
    compute();
  } catch (const std::exception& error) {
    leader_.fail(0, error.what());
    throw;
  }
  leader_.sender_.end_pass(lane_);
}

void LeaderModel::send_blocks(const Segments& segments, std::int32_t depth) {
  backend_.give_way();
  ByteWriter head = command(PassCommand::kBlocks, depth);
  put_segments(head, segments, leader_.ranges_);
  std::span<const std::byte> rows;
  if (!spreads_rows()) {
    const auto n_floats = static_cast<std::size_t>(segments.n_rows * row_stride());
    backend_.read(rows_.data(), this->rows(), n_floats * sizeof(float));
    rows = std::as_bytes(std::span(rows_).first(n_floats));
  }
  leader_.sender_.send_pass(lane_, {head.bytes(), rows});
}

void LeaderModel::forward(const Segments& segments) {
  send_blocks(segments, kModelLayers);
  share([&] {
    Inkling::forward(segments);
    backend_.finish();
  });
}

void LeaderModel::run_draft_block(const Segments& segments, const Block& block, std::int32_t depth,
                                  const float* norm) {
  send_blocks(segments, depth);
  share([&] {
    Inkling::run_draft_block(segments, block, depth, norm);
    backend_.finish();
  });
}

void LeaderModel::multiply_head(std::span<const void* const> head_rows) {
  for (std::size_t i = 0; i < head_rows.size(); ++i)
    std::copy_n(static_cast<const std::byte*>(head_rows[i]), head_row_bytes(),
                gathered_.data() + i * head_row_bytes());
  backend_.give_way();
  const ByteWriter head =
      command(PassCommand::kLogits, static_cast<std::int32_t>(head_rows.size()));
  leader_.sender_.send_pass(
      lane_, {head.bytes(), std::span(gathered_).first(head_rows.size() * head_row_bytes())});
  share([&] {
    Inkling::multiply_head(head_rows);
    backend_.finish();
  });
}

// It ends with what is read of the device.
void LeaderModel::turn(TurnArgs args) {
  ByteWriter turn = command(PassCommand::kTurn);
  put_turn(turn, args, leader_.ranges_);
  leader_.sender_.send_pass(lane_, {turn.bytes()});
  share([&] { Inkling::turn(args); });
}

}  // namespace duplex
