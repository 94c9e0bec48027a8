// From rows to passes: fills a pass with the rows of several sessions, embeds them in place, runs
// the model and commits. What a row computes does not depend on what else is in its pass.
#include <algorithm>

#include "core/error.h"
#include "engine/lane.h"

namespace duplex {

void Lane::run_rows(std::span<Session* const> sessions) {
  for (;;) {
    parts_.clear();
    std::int32_t n_rows = 0;
    for (Session* session : sessions) {
      InputRows& input = session->input_;
      const auto n = static_cast<std::int32_t>(std::min<std::size_t>(
          input.rows.size() - input.n_done, static_cast<std::size_t>(model_->max_rows() - n_rows)));
      if (n == 0) continue;
      parts_.push_back({session, input.n_done, n, static_cast<std::int32_t>(input.n_drafts)});
      input.n_done += static_cast<std::size_t>(n);
      n_rows += n;
    }
    if (parts_.empty()) return;
    run_pass();
  }
}

void Lane::run_pass() {
  segments_.clear();
  std::int32_t row = 0;
  for (const Part& part : parts_) {
    part.session->sequence_->reserve(part.n_rows);
    segments_.push_back(part.session->sequence_->segment(row, part.n_rows));
    embed_rows(part.session->input_, part.first, part.n_rows, row);
    if (drafts_ != nullptr) drafts_->keep_embedded(*part.session, row, part.n_rows);
    row += part.n_rows;
  }
  model_->forward({segments_.data(), static_cast<std::int32_t>(segments_.size()), row});
  for (std::size_t i = 0; i < parts_.size(); ++i) keep_rows(parts_[i], segments_[i].row_begin);
  if (all_logits_ != nullptr) collect_logits();
  if (drafts_ != nullptr)
    for (const Part& part : parts_) drafts_->catch_up(*part.session);
  ++counts_.passes;
  counts_.rows += row;
}

// All rows but the drafts are permanent. Drafts stay behind the length, where nothing is read,
// until accept_draft; those that are not accepted are written over.
void Lane::keep_rows(const Part& part, std::int32_t row_begin) {
  Session& session = *part.session;
  if (drafts_ != nullptr) drafts_->keep_hidden(session, row_begin, part.n_rows);
  counts_.drafted += part.n_drafts;
  const std::int32_t n_kept = part.n_rows - part.n_drafts;
  session.sequence_->advance(n_kept);
  session.sequence_->commit();
  for (std::int32_t i = 0; i < n_kept; ++i) {
    const InputRow& row = session.input_.rows[part.first + static_cast<std::size_t>(i)];
    if (row.kind == RowKind::kText) session.remember(row.value);
  }
  model_->read_head_row(row_begin + n_kept - 1, session.head_row_.data());
  session.has_head_row_ = true;
  for (std::int32_t i = 0; i < part.n_drafts; ++i)
    model_->read_head_row(
        row_begin + n_kept + i,
        session.draft_head_rows_.data() + static_cast<std::size_t>(i) * head_row_bytes());
}

// Cuts the rows into runs of one kind (and one picture).
void Lane::embed_rows(const InputRows& input, std::size_t first, std::int32_t n_rows,
                      std::int32_t row_begin) {
  const std::size_t end = first + static_cast<std::size_t>(n_rows);
  while (first < end) {
    std::size_t next = first + 1;
    while (next < end && input.rows[next].kind == input.rows[first].kind &&
           input.rows[next].image == input.rows[first].image)
      ++next;
    const auto n = static_cast<std::int32_t>(next - first);
    embed_run(input, first, n, row_begin);
    row_begin += n;
    first = next;
  }
}

void Lane::embed_run(const InputRows& input, std::size_t first, std::int32_t n_rows,
                     std::int32_t row_begin) {
  float* out = model_->rows() + row_begin * model_->row_stride();
  const InputRow& head = input.rows[first];
  switch (head.kind) {
    case RowKind::kText:
      for (std::int32_t i = 0; i < n_rows; ++i)
        ids_[static_cast<std::size_t>(i)] = input.rows[first + static_cast<std::size_t>(i)].value;
      backend_->embed_text({ids_.data(), loaded_.weights.embed, loaded_.weights.dtype,
                            loaded_.weights.embed_norm, config_.norm_eps, config_.d_model, n_rows,
                            out, model_->row_stride()});
      return;
    case RowKind::kAudio:  // frames of a run follow one another
      backend_->embed_audio({input.frames.data() + std::int64_t{head.value} * config_.audio->n_mels,
                             config_.audio->n_mels, config_.audio->n_levels,
                             loaded_.weights.audio_table, loaded_.weights.dtype,
                             loaded_.weights.audio_norm, kTowerNormEps, config_.d_model, n_rows,
                             out, model_->row_stride()});
      return;
    case RowKind::kImage:
      vision_->encode(input.images[static_cast<std::size_t>(head.image)].view(), head.value, n_rows,
                      out, model_->row_stride());
      return;
  }
}

void Lane::collect_logits() {
  std::int32_t n_rows = 0;
  for (const Segment& segment : segments_) n_rows += segment.n_rows;
  std::vector<std::byte> rows(static_cast<std::size_t>(n_rows) * head_row_bytes());
  head_rows_.clear();
  for (std::int32_t row = 0; row < n_rows; ++row) {
    std::byte* const at = rows.data() + static_cast<std::size_t>(row) * head_row_bytes();
    model_->read_head_row(row, at);
    head_rows_.push_back(at);
  }
  const std::size_t begin = all_logits_->size();
  all_logits_->resize(begin +
                      head_rows_.size() * static_cast<std::size_t>(config_.unpadded_vocab_size));
  model_->logits(head_rows_, all_logits_->data() + begin);
}

std::vector<float> Lane::embed(const InputRows& input) {
  const auto width = static_cast<std::size_t>(config_.d_model);
  std::vector<float> rows(input.rows.size() * width);
  const std::lock_guard lock(mutex_);
  check_open();
  for (std::size_t first = 0; first < input.rows.size();) {
    const auto n = static_cast<std::int32_t>(std::min<std::size_t>(
        input.rows.size() - first, static_cast<std::size_t>(model_->max_rows())));
    embed_rows(input, first, n, 0);
    for (std::int32_t i = 0; i < n; ++i, ++first)
      backend_->read(rows.data() + first * width, model_->rows() + i * model_->row_stride(),
                     width * sizeof(float));
  }
  return rows;
}

}  // namespace duplex
