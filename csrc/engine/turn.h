// What the engine is asked and what it answers: options, requests, turns and counts. Plain data.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "core/shard.h"
#include "core/types.h"
#include "sequence/page_pool.h"

namespace duplex {

class Session;

struct EngineOptions {
  std::string device = "cpu";
  BackendOptions backend;
  DType dtype = DType::kF32;     // of rows and tables
  DType weights = DType::kF32;   // of the layers' matrices and the head: dtype, or quantised
  DType kv_dtype = DType::kF32;  // of keys and values: dtype, or kInt8
  // Of the page pool; 0 = that of the engine which this one is loaded beside.
  std::int64_t memory_bytes = std::int64_t{1} << 30;
  std::int64_t page_bytes = 0;              // of the pool's pages, at least
  std::int32_t max_batch_rows = 256;        // of one pass; longer input takes several
  std::int64_t max_positions = 32768;       // of a session that does not say
  std::int32_t rewind_rows = 64;            // that truncate can always take back
  Reduction reduction = Reduction::kRanks;  // how partial sums are cut
};

// One session's part in a step.
struct StepRequest {
  Session* session = nullptr;
  std::int32_t max_tokens = -1;  // below 0: the checkpoint's limit
};

enum class StopReason : std::uint8_t { kListen, kEndOfText, kLimit, kInterrupted };

struct TurnTiming {
  std::int64_t encode_us = 0;  // taking the input and cutting it into rows
  // Passes over the input; where a device goes on by itself, what it then said as well.
  std::int64_t append_us = 0;
  std::int64_t decode_us = 0;  // sampling and passes over output tokens
  std::int64_t total_us = 0;
};

struct Turn {
  std::vector<std::int32_t> token_ids;
  std::int64_t turn = 0;
  std::int64_t epoch = 0;
  std::int64_t position = 0;  // length of the sequence afterwards
  std::int64_t n_rows = 0;    // appended from the input, the pending token included
  std::int64_t merged_turns = 0;
  std::int64_t missing_samples = 0;
  PositionRange forgotten;  // before the turn, for its rows
  StopReason stopped = StopReason::kLimit;
  TurnTiming timing;  // of the whole step: sessions of one step share it
  std::int64_t kv_bytes = 0;
  std::int64_t n_drafted = 0;   // tokens that were guessed and computed ahead
  std::int64_t n_accepted = 0;  // of those, the ones that were then sampled
  std::exception_ptr error;     // set: nothing else is, and the session is as it was
};

enum class LogitsWanted : std::uint8_t { kNone, kLast, kAll };

struct EngineStats {
  PoolStats pool;
  std::int64_t n_sessions = 0;
  std::int64_t passes = 0;
  std::int64_t rows = 0;  // drafts included
  std::int64_t drafted = 0;
  std::int64_t accepted = 0;
  std::int64_t launches = 0;  // that the host gave a device
  std::int64_t waits = 0;     // of the host for a device
};

}  // namespace duplex
