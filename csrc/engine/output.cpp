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

void Lane::continue_output(Session& session, std::int64_t max_drafts) {
  InputRows& input = session.input_;
  const std::int32_t token = std::exchange(session.now_.pending_token, kNoToken);
  input.clear();
  input.add_text(token);
  session.n_wanted_ = 0;
  if (!session.speculation_) return;
  const Speculation& speculation = *session.speculation_;
  // Guesses take no page: what a sequence holds does not depend on them either.
  const std::int64_t mapped = session.sequence_->mapped() - session.sequence_->length() - 1;
  const std::int64_t n = std::min({max_drafts, mapped, std::int64_t{speculation.n_drafts}});
  if (n <= 0) return;
  std::array<std::int32_t, kMaxDrafts> drafts;
  input.n_drafts = speculation.lookup.guess(token, {drafts.data(), static_cast<std::size_t>(n)});
  for (std::size_t i = 0; i < input.n_drafts; ++i) input.add_text(drafts[i]);
  if (speculation.drafter && input.n_drafts == 0)
    session.n_wanted_ = static_cast<std::int32_t>(std::min(n, std::int64_t{drafts_->n_depths()}));
}

std::vector<float> Lane::draft_logits(Session& session) {
  const Call call(*this, session);
  check(session.drafter() != nullptr,
        "draft_logits: load the engine with mtp_layers and open the session with speculate");
  check(session.now_.pending_token != kNoToken, "draft_logits: no token waits; decode one first");
  session.input_.clear();
  session.input_.add_text(session.now_.pending_token);
  session.n_wanted_ = drafts_->n_depths();
  std::vector<float> logits;
  Session* const only[] = {&session};
  drafts_->draft(only, &logits);
  return logits;
}

void Lane::score(std::span<Session* const> sessions) {
  head_rows_.clear();
  sample_rows_.clear();
  for (Session* session : sessions) {
    session->sampled_row_ = head_rows_.size();
    head_rows_.push_back(session->now_.head_row.data());
    for (std::size_t i = 0; i < session->input_.n_drafts; ++i)
      head_rows_.push_back(session->draft_head_rows_.data() + i * head_row_bytes());
    std::int64_t position = session->sequence_->length();
    while (sample_rows_.size() < head_rows_.size())
      sample_rows_.push_back({session->sampling_, position++});
  }
  tokens_.resize(head_rows_.size());
  model_->sample(head_rows_, sample_rows_.data(), tokens_.data());
}

std::int32_t Lane::take_sampled(Session& session) {
  session.now_.pending_token = tokens_[session.sampled_row_];
  return session.now_.pending_token;
}

bool Lane::accept_draft(Session& session) {
  InputRows& input = session.input_;
  if (input.n_drafts == 0) return false;
  Speculation& speculation = *session.speculation_;
  const std::size_t row = input.rows.size() - input.n_drafts;
  if (input.rows[row].value != session.now_.pending_token) {
    speculation.n_drafts = std::max(static_cast<std::int32_t>(row) - 1, 1);
    return false;
  }
  --input.n_drafts;
  if (input.n_drafts == 0)
    speculation.n_drafts = std::min(2 * speculation.n_drafts, speculation.max_drafts);
  session.keep_sampled();
  // The rows are the token before and the drafts.
  const std::byte* const head_row = session.draft_head_rows_.data() + (row - 1) * head_row_bytes();
  session.now_.head_row.assign(head_row, head_row + head_row_bytes());
  ++counts_.accepted;
  return true;
}

}  // namespace duplex
