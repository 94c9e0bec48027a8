// Input and output of several sessions on the device alone (Backend::turn): the host gives the rows
// and gets the tokens, whose own rows are on the tapes by then.
//
// Each session gives what the passes of batch.cpp and output.cpp give it. What a device is not
// asked for, they do: guesses, which need a look at each token, and input that takes several
// passes.
#include <algorithm>

#include "core/error.h"
#include "engine/lane.h"

namespace duplex {
namespace {

// At once. What is said is known, and can be interrupted, only behind them.
constexpr std::int32_t kMostTokens = 32;

}  // namespace

// Into parts_, with limits_ that there is room for. Pages of all rows that will come are mapped
// here, one more included, which may be written behind the last.
bool Lane::take_whole_input() {
  const auto is_done = [](const Call* call) { return call->n_left() == 0; };
  if (!backend_->has_turns() || std::ranges::all_of(active_, is_done)) return false;
  const std::int32_t max_rows = model_->max_rows();
  parts_.clear();
  limits_.clear();
  std::int64_t n_rows = 0;
  for (Call* call : active_) {
    const std::int64_t n = std::ssize(call->input.rows);
    n_rows += n;
    if (n == 0 || n_rows > max_rows || call->session->speculation()) return false;
    const auto n_input = static_cast<std::int32_t>(n);
    const std::int32_t limit = std::min({call->n_left(), kMostTokens, max_rows - n_input});
    if (limit == 0 && !is_done(call)) return false;
    limits_.push_back(limit);
    parts_.push_back({call, 0, n_input, 0});
  }
  try {
    for (std::size_t i = 0; i < parts_.size(); ++i)
      parts_[i].call->session->sequence().reserve(parts_[i].n_rows + limits_[i]);
  } catch (const CapacityError&) {  // a session's last row; without the one behind it there is room
    return false;
  }
  return true;
}

bool Lane::run_on_device(std::span<const std::int32_t> stops) {
  if (!take_whole_input()) return false;
  const std::size_t n = parts_.size();
  const Segments segments = place_parts();
  sample_rows_.clear();
  for (const PassPart& part : parts_) {
    Session& session = *part.call->session;
    sample_rows_.push_back({session.sampling(), session.sequence().length() + part.n_rows});
  }
  std::vector<std::int32_t> n_tokens(n);
  tokens_.resize(n * kMostTokens);
  new_head_rows_.resize(n * head_row_bytes());
  model_->turn({.segments = segments,
                .text = placed_.text(),
                .audio = placed_.sound(),
                .sampling = sample_rows_.data(),
                .limits = limits_.data(),
                .stops = stops.data(),
                .n_stops = static_cast<std::int32_t>(stops.size()),
                .max_tokens = kMostTokens,
                .n_tokens = n_tokens.data(),
                .tokens = tokens_.data(),
                .head_rows = new_head_rows_.data()});
  std::int32_t n_passes = 1;
  for (std::size_t i = 0; i < n; ++i) {
    Call& call = *parts_[i].call;
    keep_part(parts_[i], new_head_rows_.data() + i * head_row_bytes());
    call.input.n_done = call.input.rows.size();
    call.sampled_row = i * kMostTokens;
    call.n_ahead = std::max(n_tokens[i] - 1, 0);
    n_passes = std::max(n_passes, n_tokens[i]);
    counts_.rows += call.n_ahead;
  }
  counts_.passes += n_passes;
  counts_.rows += segments.n_rows;
  return true;
}

}  // namespace duplex
