// From rows to passes: fills a pass with the rows of several sessions, embeds them in place, runs
// the model and commits. What a row computes does not depend on what else is in its pass.
#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "engine/lane.h"

namespace duplex {

void Lane::run_rows(std::vector<float>* logits) {
  for (;;) {
    parts_.clear();
    std::int32_t n_rows = 0;
    for (Call* call : active_) {
      InputRows& input = call->input;
      const auto n = static_cast<std::int32_t>(std::min<std::size_t>(
          input.rows.size() - input.n_done, static_cast<std::size_t>(model_->max_rows() - n_rows)));
      if (n == 0) continue;
      parts_.push_back({call, input.n_done, n, static_cast<std::int32_t>(input.n_drafts)});
      input.n_done += static_cast<std::size_t>(n);
      n_rows += n;
    }
    if (parts_.empty()) return;
    run_pass(logits);
  }
}

void Lane::run_pass(std::vector<float>* logits) {
  const Segments segments = place_parts();
  placed_.embed(*backend_);
  if (drafts_ != nullptr)
    for (std::size_t i = 0; i < parts_.size(); ++i)
      drafts_->keep_embedded(*parts_[i].call, segments_[i].row_begin, parts_[i].n_rows);
  model_->forward(segments);
  keep_rows();
  if (logits != nullptr) collect_logits(*logits);
  if (drafts_ != nullptr)
    for (const PassPart& part : parts_) drafts_->catch_up(*part.call);
  ++counts_.passes;
  counts_.rows += segments.n_rows;
}

Segments Lane::place_parts() {
  segments_.clear();
  placed_.clear();
  std::int32_t row = 0;
  for (const PassPart& part : parts_) {
    Sequence& sequence = part.call->session->sequence();
    sequence.reserve(part.n_rows);
    segments_.push_back(sequence.segment(row, part.n_rows));
    place_rows(part.call->input, part.first, part.n_rows, row);
    row += part.n_rows;
  }
  return {segments_.data(), static_cast<std::int32_t>(segments_.size()), row};
}

// All rows but the drafts are permanent. Drafts stay behind the length, where nothing is read,
// until accept_draft; those that are not accepted are written over.
void Lane::keep_rows() {
  wanted_rows_.clear();
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    const std::int32_t n_kept = parts_[i].n_rows - parts_[i].n_drafts;
    for (std::int32_t draft = 0; draft <= parts_[i].n_drafts; ++draft)
      wanted_rows_.push_back(segments_[i].row_begin + n_kept - 1 + draft);
  }
  new_head_rows_.resize(wanted_rows_.size() * head_row_bytes());
  model_->read_head_rows(wanted_rows_, new_head_rows_.data());
  const std::byte* from = new_head_rows_.data();
  for (std::size_t i = 0; i < parts_.size(); ++i) {
    Call& call = *parts_[i].call;
    if (drafts_ != nullptr) drafts_->keep_hidden(call, segments_[i].row_begin, parts_[i].n_rows);
    keep_part(parts_[i], from);
    from += head_row_bytes();
    const std::size_t draft_bytes = static_cast<std::size_t>(parts_[i].n_drafts) * head_row_bytes();
    call.draft_head_rows.assign(from, from + draft_bytes);
    from += draft_bytes;
  }
}

void Lane::keep_part(const PassPart& part, const std::byte* head_row) {
  Session& session = *part.call->session;
  InputRows& input = part.call->input;
  counts_.drafted += part.n_drafts;
  const std::int32_t n_kept = part.n_rows - part.n_drafts;
  session.sequence().advance(n_kept);
  session.sequence().commit();
  for (std::int32_t i = 0; i < n_kept; ++i) {
    const InputRow& row = input.rows[part.first + static_cast<std::size_t>(i)];
    if (row.kind == RowKind::kText) remember(session, row.value);
  }
  const std::size_t end = part.first + static_cast<std::size_t>(part.n_rows);
  if (end == input.rows.size()) input.images.clear();  // a lane keeps its calls for long
  session.now().head_row.assign(head_row, head_row + head_row_bytes());
}

// `listen` tells nothing about the words around it, and nothing behind it would be accepted.
void Lane::remember(Session& session, std::int32_t id) const {
  const auto& interaction = config_.interaction;
  if (session.speculation() && !(interaction && id == interaction->listen))
    session.speculation()->lookup.push(id);
}

// Text and sound wait in placed_; each picture's rows are made at once.
void Lane::place_rows(const InputRows& input, std::size_t first, std::int32_t n_rows,
                      std::int32_t row_begin) {
  const std::size_t end = first + static_cast<std::size_t>(n_rows);
  for (; first < end; ++first, ++row_begin) {
    const InputRow& row = input.rows[first];
    switch (row.kind) {
      case RowKind::kText:
        placed_.add_text(row.value, row_begin);
        break;
      case RowKind::kAudio:
        placed_.add_sound(input.frames.data() + std::int64_t{row.value} * config_.audio->n_mels,
                          row_begin);
        break;
      case RowKind::kImage: {
        std::int32_t n = 1;
        while (first + 1 < end && input.rows[first + 1].kind == RowKind::kImage &&
               input.rows[first + 1].image == row.image)
          ++first, ++n;
        vision_->encode(input.images[static_cast<std::size_t>(row.image)].view(), row.value, n,
                        model_->rows() + row_begin * model_->row_stride(), model_->row_stride());
        row_begin += n - 1;
        break;
      }
    }
  }
}

void Lane::collect_logits(std::vector<float>& logits) {
  std::int32_t n_rows = 0;
  for (const Segment& segment : segments_) n_rows += segment.n_rows;
  wanted_rows_.resize(static_cast<std::size_t>(n_rows));
  std::iota(wanted_rows_.begin(), wanted_rows_.end(), 0);
  new_head_rows_.resize(wanted_rows_.size() * head_row_bytes());
  model_->read_head_rows(wanted_rows_, new_head_rows_.data());
  head_rows_.clear();
  for (std::size_t row = 0; row < wanted_rows_.size(); ++row)
    head_rows_.push_back(new_head_rows_.data() + row * head_row_bytes());
  const std::size_t begin = logits.size();
  logits.resize(begin + head_rows_.size() * static_cast<std::size_t>(config_.unpadded_vocab_size));
  model_->logits(head_rows_, logits.data() + begin);
}

std::vector<float> Lane::embed(const InputRows& input) {
  const auto width = static_cast<std::size_t>(config_.d_model);
  std::vector<float> rows(input.rows.size() * width);
  const std::lock_guard lock(mutex());
  check_open();
  for (std::size_t first = 0; first < input.rows.size();) {
    const auto n = static_cast<std::int32_t>(std::min<std::size_t>(
        input.rows.size() - first, static_cast<std::size_t>(model_->max_rows())));
    placed_.clear();
    place_rows(input, first, n, 0);
    placed_.embed(*backend_);
    for (std::int32_t i = 0; i < n; ++i, ++first)
      backend_->read(rows.data() + first * width, model_->rows() + i * model_->row_stride(),
                     width * sizeof(float));
  }
  return rows;
}

}  // namespace duplex
