// How a rank, whichever it is, makes its group, and how its devices are connected with those of the
// others.
#pragma once

#include <vector>

#include "backend/backend.h"
#include "core/config.h"
#include "core/shard.h"
#include "parallel/group.h"
#include "ranks/options.h"

namespace duplex {

// The same on every rank. `config` is that of the whole model.
GroupOptions group_options(const ModelConfig& config, const EngineOptions& options);

struct Connection {
  const ModelConfig& config;  // of the shard
  const Shard& shard;
  const EngineOptions& options;
};

// On every rank at the same time, with nothing else in the page-memory channel. Devices of ranks
// that share no memory are not connected. `sockets`: as GroupRendezvous takes them.
void connect_ranks(Backend& backend, const Group& group, SlabExchange& memory_channel,
                   std::vector<int> sockets, const Connection& of);

}  // namespace duplex
