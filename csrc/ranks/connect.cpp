#include "ranks/connect.h"

#include <utility>

#include "model/inkling.h"
#include "parallel/group_rendezvous.h"

namespace duplex {

bool connect_ranks(Backend& backend, const Group& group, SlabExchange& memory_channel,
                   std::vector<int> sockets, const Connection& of) {
  ExchangeOptions options = Inkling::exchange_options(of.config, of.shard, of.max_rows);
  options.transport = of.transport;
  return backend.connect(
      std::make_shared<GroupRendezvous>(group, memory_channel, std::move(sockets)), options);
}

std::unique_ptr<Exchange> open_exchange(Backend& lane, const Group& group, int channel,
                                        bool is_connected) {
  if (is_connected) return lane.create_exchange();
  return make_exchange(group, channel);
}

}  // namespace duplex
