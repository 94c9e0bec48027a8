// What is between two passes of a turn (backend/op_args.h): the rows that the head takes, and what
// becomes of the tokens that were chosen.
#include <algorithm>

#include "device/loop.cuh"
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr std::int64_t kMostGatherThreads = 1024;
constexpr int kTakeThreads = 128;

DUPLEX_KERNEL gather_rows_kernel(GatherRowsArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  if (args.is_wanted != nullptr && args.is_wanted[block_x()] == 0) return;
  const std::byte* const from = args.from + args.rows[block_x()] * args.from_stride_bytes;
  std::byte* const to = args.to + block_x() * args.row_bytes;
  constexpr std::int64_t kBytes = sizeof(Words);
  for (std::int64_t i = thread_index() * kBytes; i < args.row_bytes; i += n_threads() * kBytes)
    *reinterpret_cast<Words*>(to + i) = *reinterpret_cast<const Words*>(from + i);
}

DUPLEX_DEVICE bool is_stop(const TurnPlaces& turn, std::int32_t token) {
  for (std::int32_t i = 0; i < turn.n_stops; ++i)
    if (turn.stops[i] == token) return true;
  return false;
}

// Whether the sequence goes on. Its token of the pass before is a row now, so the next row lies one
// further on; the first pass was given where its next row lies.
DUPLEX_DEVICE bool take_token(const TakeTokensArgs& args, std::int32_t i) {
  const TurnPlaces& turn = args.turn;
  if (!args.is_first && turn.is_open[i] == 0) return false;
  const std::int32_t n_before = args.is_first ? 0 : turn.n_tokens[i];
  const std::int32_t token = turn.chosen[i];
  if (!args.is_first) ++turn.segments[i].position;
  ++turn.sampling[i].position;
  const bool may_speak = n_before < turn.limits[i];
  if (may_speak) turn.tokens[std::int64_t{i} * turn.max_tokens + n_before] = token;
  const std::int32_t n = n_before + (may_speak ? 1 : 0);
  const bool goes_on = n < turn.limits[i] && !is_stop(turn, token);
  turn.n_tokens[i] = n;
  turn.is_open[i] = goes_on ? 1 : 0;
  return goes_on;
}

// One thread block for all sequences.
DUPLEX_KERNEL take_tokens_kernel(TakeTokensArgs args) {
  auto* const n_open = reinterpret_cast<std::int32_t*>(shared_memory());  // of each thread
  std::int32_t own = 0;
  for (std::int32_t i = thread_index(); i < args.turn.count; i += n_threads())
    if (take_token(args, i)) ++own;
  n_open[thread_index()] = own;
  sync_block();
  if (thread_index() != 0 || !args.has_loop) return;
  for (int i = 1; i < n_threads() && i < args.turn.count; ++i) own += n_open[i];
  set_loop(args.loop, 2 * own > args.turn.count);
}

}  // namespace

void launch_gather_rows(Runtime& runtime, std::int32_t n_rows, const GatherRowsArgs& args) {
  // As many as there are words of a row: their loads are on their way at once.
  const std::int64_t n_words = div_up(args.row_bytes, std::int64_t{sizeof(Words)});
  const std::int64_t n_threads = std::min(round_up(n_words, kWarp), kMostGatherThreads);
  runtime.launch_early(gather_rows_kernel, {n_rows}, static_cast<int>(n_threads), 0, args);
}

void launch_take_tokens(Runtime& runtime, const TakeTokensArgs& args) {
  runtime.launch(take_tokens_kernel, {1}, kTakeThreads, kTakeThreads * sizeof(std::int32_t), args);
}

}  // namespace duplex::cuda
