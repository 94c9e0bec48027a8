// What an engine is loaded with: the same on all of its ranks, but for the GPU and the threads.
#pragma once

#include <cstdint>
#include <string>

#include "backend/backend.h"
#include "core/shard.h"
#include "core/types.h"

namespace duplex {

struct EngineOptions {
  std::string device = "cpu";
  BackendOptions backend = {};
  DType dtype = DType::kF32;     // of rows and tables
  DType weights = DType::kF32;   // of the layers' matrices and the head: dtype, or quantised
  DType kv_dtype = DType::kF32;  // of keys and values: dtype, or kInt8
  // Of the page pool, of each rank; 0 = that of the engine which this one is loaded beside.
  std::int64_t memory_bytes = std::int64_t{1} << 30;
  std::int64_t page_bytes = 0;         // of the pool's pages, at least
  std::int32_t max_batch_rows = 256;   // of one pass, in any lane; longer input takes several
  std::int64_t max_positions = 32768;  // of a session that does not say
  std::int32_t rewind_rows = 64;       // that truncate can always take back
  std::int32_t n_ranks = 1;
  Reduction reduction = Reduction::kRanks;  // how partial sums are cut
  std::string transport = "auto";           // how the devices of the ranks meet
};

}  // namespace duplex
