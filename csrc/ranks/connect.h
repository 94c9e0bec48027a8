// How a rank, whichever it is, gets what its lanes meet through: an exchange of its device's, where
// the devices have something of their own, or else one of the group's (make_exchange).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/config.h"
#include "core/shard.h"
#include "parallel/group.h"
#include "parallel/remote_exchange.h"

namespace duplex {

struct Connection {
  const ModelConfig& config;  // of the shard
  const Shard& shard;
  std::int32_t max_rows;  // of one pass, in any lane
  const std::string& transport;
};

// On every rank at the same time, with nothing else in the page-memory channel. False: there is
// nothing of the devices' own. `sockets`: as GroupRendezvous takes them.
bool connect_ranks(Backend& backend, const Group& group, SlabExchange& memory_channel,
                   std::vector<int> sockets, const Connection& of);
std::unique_ptr<Exchange> open_exchange(Backend& lane, const Group& group, int channel,
                                        bool is_connected);

}  // namespace duplex
