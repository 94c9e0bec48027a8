// From multi-token-prediction layers (model/mtp.h) to guesses, for several sessions at once.
//
// A batch runs some rows of each session through depth 0, then the same rows through depth 1, and
// so on; each depth reads embedded rows one further on. The last row of a session ends in guesses:
// there depth 0 reads the pending token and guesses the next, which depth 1 reads, ... Rows that
// read no guess are final and lengthen the tapes; the others are written over by a later batch.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "engine/call.h"
#include "model/mtp.h"

namespace duplex {

class DraftRunner {
 public:
  // All but the layout, which is that of config.mtp_model(), outlive it.
  DraftRunner(const ModelConfig& config, const Weights& weights, SequenceLayout layout,
              Backend& backend, Inkling& model);

  std::int32_t n_depths() const { return static_cast<std::int32_t>(mtp_.n_depths()); }
  const Mtp& layers() const { return mtp_; }
  // Of a new session.
  Drafter make_drafter(PagePool& pool, std::int64_t max_positions) const;

  // Copies rows of the model, the next of the session, to its drafter: as they were embedded before
  // a pass, and what it made of them. Sessions without a drafter are passed over.
  void keep_embedded(Call& call, std::int32_t row_begin, std::int32_t n_rows);
  void keep_hidden(Call& call, std::int32_t row_begin, std::int32_t n_rows);
  // Runs the rows that wait, while there are `least`.
  void catch_up(Call& call, std::int64_t least = kWaitingRows);
  // Adds the guesses that are wanted to each input, behind the pending token; `logits` takes what
  // they are drawn from, depth by depth.
  void draft(std::span<Call* const> calls, std::vector<float>* logits = nullptr);

 private:
  // Consecutive rows of one session, all from Drafter::next() on.
  struct Part {
    Call* call;
    std::int32_t n_rows;
    std::int32_t n_final;        // of the rows, the first: no later row changes them
    std::int32_t n_wanted = 0;   // guesses behind the last row
    std::int32_t row_begin = 0;  // in the batch
  };

  void read_row(std::int32_t row, float* out);  // of the model
  void run(std::vector<float>* logits);         // parts_, which it clears
  void place_rows(const Part& part, std::int32_t depth);
  void guess(std::int32_t depth, std::vector<float>* logits);

  const ModelConfig& config_;
  const Weights& weights_;
  SequenceLayout layout_;
  Backend& backend_;
  Inkling& model_;
  Mtp mtp_;
  std::vector<Part> parts_;  // of the batch, and the buffers it fills
  std::vector<Segment> segments_;
  std::vector<std::int32_t> ids_;
  std::vector<const void*> head_rows_;
  std::vector<SampleRow> sample_rows_;
  std::vector<std::int32_t> tokens_;
};

}  // namespace duplex
