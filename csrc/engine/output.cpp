// From rows to output tokens, several a pass where drafts hold.
//
// A pass takes the pending token and behind it guesses at the tokens to come. A row's bits do not
// depend on what else is in its pass, nor a draw on anything but its logits and place: so sampling
// behind the pending token, then behind each guess for as long as the token sampled is the guess,
// gives the output of one token a pass, bit for bit, whatever the guesses are.
#include <algorithm>
#include <array>
#include <utility>

#include "core/error.h"
#include "engine/lane.h"

namespace duplex {

void Lane::continue_output(Call& call, std::int64_t max_drafts) {
  Session& session = *call.session;
  InputRows& input = call.input;
  const std::int32_t token = std::exchange(session.now().pending_token, kNoToken);
  input.clear();
  input.add_text(token);
  call.n_wanted = 0;
  if (!session.speculation()) return;
  const Speculation& speculation = *session.speculation();
  // Guesses take no page: what a sequence holds does not depend on them either.
  const std::int64_t mapped = session.sequence().mapped() - session.sequence().length() - 1;
  const std::int64_t n = std::min({max_drafts, mapped, std::int64_t{speculation.n_drafts}});
  if (n <= 0) return;
  std::array<std::int32_t, kMaxDrafts> drafts;
  input.n_drafts = speculation.lookup.guess(token, {drafts.data(), static_cast<std::size_t>(n)});
  for (std::size_t i = 0; i < input.n_drafts; ++i) input.add_text(drafts[i]);
  if (speculation.drafter && input.n_drafts == 0)
    call.n_wanted = static_cast<std::int32_t>(std::min(n, std::int64_t{drafts_->n_depths()}));
}

std::vector<float> Lane::draft_logits(Session& session) {
  const Hold hold(*this, session);
  check(session.drafter() != nullptr,
        "draft_logits: load the engine with mtp_layers and open the session with speculate");
  check(session.now().pending_token != kNoToken, "draft_logits: no token waits; decode one first");
  hold.call.input.add_text(session.now().pending_token);
  hold.call.n_wanted = drafts_->n_depths();
  std::vector<float> logits;
  drafts_->draft(active_, &logits);
  return logits;
}

void Lane::score() {
  head_rows_.clear();
  sample_rows_.clear();
  for (Call* call : active_) {
    Session& session = *call->session;
    call->sampled_row = head_rows_.size();
    head_rows_.push_back(session.now().head_row.data());
    for (std::size_t i = 0; i < call->input.n_drafts; ++i)
      head_rows_.push_back(call->draft_head_rows.data() + i * head_row_bytes());
    std::int64_t position = session.sequence().length();
    while (sample_rows_.size() < head_rows_.size())
      sample_rows_.push_back({session.sampling(), position++});
  }
  tokens_.resize(head_rows_.size());
  model_->sample(head_rows_, sample_rows_.data(), tokens_.data());
}

bool Lane::accept_draft(Call& call) {
  Session& session = *call.session;
  InputRows& input = call.input;
  if (input.n_drafts == 0) return false;
  Speculation& speculation = *session.speculation();
  const std::size_t row = input.rows.size() - input.n_drafts;
  if (input.rows[row].value != session.now().pending_token) {
    speculation.n_drafts = std::max(static_cast<std::int32_t>(row) - 1, 1);
    return false;
  }
  --input.n_drafts;
  if (input.n_drafts == 0)
    speculation.n_drafts = std::min(2 * speculation.n_drafts, speculation.max_drafts);
  keep_sampled(call);
  // The rows are the token before and the drafts.
  const std::byte* const head_row = call.draft_head_rows.data() + (row - 1) * head_row_bytes();
  session.now().head_row.assign(head_row, head_row + head_row_bytes());
  ++counts_.accepted;
  return true;
}

void Lane::keep_sampled(Call& call) {
  Session& session = *call.session;
  session.sequence().advance(1);
  session.sequence().commit();
  remember(session, std::exchange(session.now().pending_token, kNoToken));
  ++call.sampled_row;
}

}  // namespace duplex
