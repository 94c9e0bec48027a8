#include "ranks/connect.h"

#include <utility>

#include "model/inkling.h"
#include "parallel/group_rendezvous.h"

namespace duplex {

void connect_ranks(Backend& backend, const Group& group, SlabExchange& memory_channel,
                   std::vector<int> sockets, const Connection& of) {
  if (group.transport() != nullptr) return;
  ExchangeOptions options = Inkling::exchange_options(of.config, of.shard, of.max_rows);
  options.transport = of.transport;
  backend.connect(std::make_shared<GroupRendezvous>(group, memory_channel, std::move(sockets)),
                  options);
}

}  // namespace duplex
