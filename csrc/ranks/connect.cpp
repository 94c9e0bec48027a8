#include "ranks/connect.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "core/error.h"
#include "model/inkling.h"
#include "parallel/group_rendezvous.h"
#include "ranks/commands.h"

namespace duplex {
namespace {

// A rank that is gone is noticed by its process (parallel/ranks.py); this is for one that hangs.
// The background lane may have to stand still for long in one rank while it waits in another.
constexpr std::chrono::seconds kTimeOut{60};
constexpr std::int64_t kMaxStridePadding = 128;  // of a row of floats, in elements
constexpr std::size_t kCommandHeadBytes = 256;   // before rows and segments
// Bytes of blocks that travel at once, where passes do not need more.
constexpr std::size_t kLeastPieceBytes = std::size_t{256} << 10;

}  // namespace

GroupOptions group_options(const ModelConfig& config, const EngineOptions& options) {
  check_max_rows(options.max_batch_rows);  // before the region is backed
  const Shard shard = make_shard(config, options.weights, 0, options.n_ranks, options.reduction);
  const auto row_bytes = static_cast<std::size_t>(config.d_model + kMaxStridePadding) * 4;
  GroupOptions group;
  group.n_ranks = options.n_ranks;
  group.n_lanes = 2;
  group.slab_bytes =
      std::max(Inkling::exchange_options(config, shard, options.max_batch_rows).slab_bytes,
               kLeastPieceBytes);
  group.max_command_bytes =
      kCommandHeadBytes +
      std::max({static_cast<std::size_t>(options.max_batch_rows) * (row_bytes + kSegmentBytes),
                Inkling::kHeadRows * row_bytes, kLeastPieceBytes});
  group.time_out = kTimeOut;
  return group;
}

void connect_ranks(Backend& backend, const Group& group, SlabExchange& memory_channel,
                   std::vector<int> sockets, const Connection& of) {
  ExchangeOptions options =
      Inkling::exchange_options(of.config, of.shard, of.options.max_batch_rows);
  options.transport = of.options.transport;
  options.adds_in_switch = of.options.reduction == Reduction::kSwitch;
  if (group.transport() == nullptr)
    backend.connect(std::make_shared<GroupRendezvous>(group, memory_channel, std::move(sockets)),
                    options);
  check<BackendUnavailable>(!options.adds_in_switch || backend.transport() == "nvls",
                            "reduction: 'switch' adds inside an NVLink switch; expected the "
                            "transport 'nvls', found '",
                            backend.transport(), "'; take reduction=\"ranks\"");
}

}  // namespace duplex
