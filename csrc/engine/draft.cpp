#include "engine/draft.h"

#include <algorithm>
#include <utility>

namespace duplex {

DraftRunner::DraftRunner(const ModelConfig& config, const Weights& weights, SequenceLayout layout,
                         Backend& backend, Inkling& model)
    : config_(config),
      weights_(weights),
      layout_(std::move(layout)),
      backend_(backend),
      model_(model),
      mtp_(config, weights, layout_, backend, model),
      ids_(static_cast<std::size_t>(model.max_rows())) {}

Drafter DraftRunner::make_drafter(PagePool& pool, std::int64_t max_positions) const {
  return Drafter(pool, layout_,
                 {.max_positions = max_positions,
                  .n_depths = n_depths(),
                  .d_model = config_.d_model,
                  // what waits and what a rewind makes wait, beside the rows of the longest pass
                  .kept_rows = layout_.limits.pending_rows + layout_.limits.rewind_rows});
}

void DraftRunner::read_row(std::int32_t row, float* out) {
  backend_.read(out, model_.rows() + row * model_.row_stride(),
                static_cast<std::size_t>(config_.d_model) * sizeof(float));
}

void DraftRunner::keep_embedded(Call& call, std::int32_t row_begin, std::int32_t n_rows) {
  Drafter* const drafter = call.session->drafter();
  const std::int64_t length = call.session->sequence().length();
  for (std::int32_t i = 0; i < n_rows && drafter != nullptr; ++i)
    read_row(row_begin + i, drafter->embedded(length + i));
}

void DraftRunner::keep_hidden(Call& call, std::int32_t row_begin, std::int32_t n_rows) {
  Drafter* const drafter = call.session->drafter();
  if (drafter == nullptr) return;
  const std::int64_t length = call.session->sequence().length();
  for (std::int32_t i = 0; i < n_rows; ++i) read_row(row_begin + i, drafter->hidden(length + i));
  drafter->extend(length + n_rows);
}

void DraftRunner::catch_up(Call& call, std::int64_t least) {
  if (call.session->drafter() == nullptr) return;
  Drafter& drafter = *call.session->drafter();
  const std::int64_t length = call.session->sequence().length();
  while (drafter.n_waiting(length) >= least) {
    const auto n = static_cast<std::int32_t>(
        std::min<std::int64_t>(drafter.n_waiting(length), model_.max_rows()));
    if (!drafter.reserve(n, length)) return;
    parts_.assign(1, {.call = &call, .n_rows = n, .n_final = n});
    run(nullptr);
  }
}

void DraftRunner::draft(std::span<Call* const> calls, std::vector<float>* logits) {
  std::int64_t n_rows = 0;
  parts_.clear();  // of a batch that failed
  for (Call* call : calls) {
    if (call->n_wanted == 0) continue;
    Drafter& drafter = *call->session->drafter();
    const std::int64_t length = call->session->sequence().length();
    if (n_rows + length - drafter.next() > model_.max_rows()) {
      run(logits);
      n_rows = 0;
      if (length - drafter.next() > model_.max_rows()) catch_up(*call, 1);
    }
    const std::int64_t n = length - drafter.next();
    if (n <= 0 || n > model_.max_rows() || !drafter.reserve(n, length)) continue;
    // The pending token enters the session next, so a row that reads it is final too.
    const std::int64_t n_final = std::max<std::int64_t>(drafter.n_waiting(length) + 1, 0);
    parts_.push_back({.call = call,
                      .n_rows = static_cast<std::int32_t>(n),
                      .n_final = static_cast<std::int32_t>(n_final),
                      .n_wanted = call->n_wanted});
    n_rows += n;
  }
  run(logits);
}

// Rows that only some depths have seen are not final: they wait on.
void DraftRunner::run(std::vector<float>* logits) {
  if (parts_.empty()) return;
  Segments segments;
  std::int32_t depths_wanted = 0;
  segments_.clear();
  for (Part& part : parts_) {
    part.row_begin = segments.n_rows;
    segments_.push_back(part.call->session->drafter()->segment(part.row_begin, part.n_rows));
    segments.n_rows += part.n_rows;
    depths_wanted = std::max(depths_wanted, part.n_wanted > 0 ? part.n_wanted : n_depths());
  }
  segments.data = segments_.data();
  segments.count = static_cast<std::int32_t>(segments_.size());
  for (std::int32_t depth = 0; depth < depths_wanted; ++depth) {
    for (const Part& part : parts_) place_rows(part, depth);
    mtp_.run(segments, depth);
    guess(depth, logits);
  }
  if (depths_wanted == n_depths())
    for (const Part& part : parts_) part.call->session->drafter()->commit(part.n_final);
  parts_.clear();
}

void DraftRunner::place_rows(const Part& part, std::int32_t depth) {
  Drafter& drafter = *part.call->session->drafter();
  const InputRows& input = part.call->input;  // the pending token and the guesses behind it
  const std::int64_t length = part.call->session->sequence().length();
  const auto bytes = static_cast<std::size_t>(config_.d_model) * sizeof(float);
  const std::int64_t stride = model_.row_stride();
  std::int32_t n_ids = 0;
  for (std::int32_t i = 0; i < part.n_rows; ++i) {
    const std::int64_t position = drafter.next() + i;
    const std::int64_t row = part.row_begin + i;
    if (depth == 0) backend_.write(model_.rows() + row * stride, drafter.hidden(position), bytes);
    const std::int64_t ahead = position + depth + 1;
    if (ahead < length) {
      backend_.write(mtp_.embedded() + row * stride, drafter.embedded(ahead), bytes);
    } else {
      // A session that wants fewer guesses than another runs the deeper ones for nothing.
      const auto known = std::min(static_cast<std::size_t>(ahead - length), input.rows.size() - 1);
      ids_[static_cast<std::size_t>(n_ids++)] = input.rows[known].value;
    }
  }
  backend_.embed_text({ids_.data(), weights_.embed, weights_.dtype, weights_.embed_norm,
                       config_.norm_eps, config_.d_model, n_ids,
                       mtp_.embedded() + (part.row_begin + part.n_rows - n_ids) * stride, stride});
}

// Drawn as the token itself will be, with the same random number, so that what is likely for both
// is likely the same.
void DraftRunner::guess(std::int32_t depth, std::vector<float>* logits) {
  head_rows_.clear();
  sample_rows_.clear();
  for (const Part& part : parts_) {
    if (part.n_wanted <= depth) continue;
    std::vector<std::byte>& head_row = part.call->draft_head_rows;
    head_row.resize(model_.head_row_bytes());
    mtp_.read_head_row(part.row_begin + part.n_rows - 1, head_row.data());
    head_rows_.push_back(head_row.data());
    Session& session = *part.call->session;
    sample_rows_.push_back({session.sampling(), session.sequence().length() + 1 + depth});
  }
  if (logits != nullptr) {
    const auto n_vocab = static_cast<std::size_t>(config_.unpadded_vocab_size);
    logits->resize(logits->size() + head_rows_.size() * n_vocab);
    model_.logits(head_rows_, logits->data() + logits->size() - head_rows_.size() * n_vocab);
  }
  tokens_.resize(head_rows_.size());
  model_.sample(head_rows_, sample_rows_.data(), tokens_.data());
  auto token = tokens_.begin();
  for (const Part& part : parts_) {
    if (part.n_wanted <= depth) continue;
    part.call->input.add_text(*token++);
    ++part.call->input.n_drafts;
  }
}

}  // namespace duplex
