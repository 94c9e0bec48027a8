// A checkpoint in memory.
#pragma once

#include <memory>

#include "core/config.h"
#include "model/weights.h"
#include "ranks/leader.h"
#include "ranks/options.h"
#include "sequence/layout.h"

namespace duplex {

// What all lanes of an engine compute with; it changes no more once it is loaded.
struct LoadedModel {
  ModelConfig config;
  EngineOptions options;
  std::shared_ptr<RankLeader> ranks;  // where there are several
  ModelConfig share = {};             // what this rank has of it: the same where there is one
  Weights weights = {};
  SequenceLayout layout = {};
  SequenceLayout mtp_layout = {};  // of the layers that draft
};

}  // namespace duplex
