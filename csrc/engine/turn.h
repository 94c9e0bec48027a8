// What the engine is asked and what it answers: requests, turns and counts. Plain data.
#pragma once

#include <cstdint>
#include <exception>
#include <vector>

#include "core/types.h"
#include "sequence/page_pool.h"

namespace duplex {

class Session;

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
