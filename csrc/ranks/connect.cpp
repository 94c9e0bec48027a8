#include "ranks/connect.h"

#include <utility>

#include "core/error.h"
#include "model/inkling.h"
#include "parallel/group_rendezvous.h"

namespace duplex {

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
