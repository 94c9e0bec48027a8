// The transformer: embedded rows of any number of sequences in, normalised hidden rows out.
//
// As a rank of a tensor-parallel group it computes its heads and its share of every width, has the
// residual stream in full, and meets the others twice a layer: each rank reads the partial sums of
// all and adds them in ascending order, so all go on with the same bits. All ranks make the same
// calls with the same rows.
//
// Owns the working buffers of one pass and nothing of any session. The arithmetic in formulas:
// docs/MODEL.md; readable twin: duplex_engine/reference/inkling.py. Next: backend/op_args.h.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "backend/exchange.h"
#include "core/config.h"
#include "model/weights.h"
#include "sequence/layout.h"

namespace duplex {

// One layer: what it computes with, and where its state lies in a block of the tapes.
struct Block {
  const LayerWeights* weights;
  LayerConfig config;
  LayerPlacement place;
};

// Throws InvalidArgument for a pass of none or too many rows.
void check_max_rows(std::int32_t max_rows);

class Inkling {
 public:
  // All must outlive the model. `config` and `layout` are those of the weights' shard
  // (shard_config); `exchange` is there if it has several ranks. `max_rows`: the most of one pass.
  Inkling(const ModelConfig& config, const Weights& weights, const SequenceLayout& layout,
          Backend& backend, std::int32_t max_rows, Exchange* exchange = nullptr);

  virtual ~Inkling() = default;
  Inkling(const Inkling&) = delete;
  Inkling& operator=(const Inkling&) = delete;

  // What an exchange must be good for at least.
  static ExchangeOptions exchange_options(const ModelConfig& config, const Shard& shard,
                                          std::int32_t max_rows);

  static constexpr std::int32_t kHeadRows = 16;  // rows that the head multiplies at once
  std::int32_t max_rows() const { return max_rows_; }
  // The residual stream, (max_rows, row_stride), padding zero: the embedded rows of the next pass,
  // and after it what the layers made of them.
  float* rows() { return hidden_; }
  std::int64_t row_stride() const { return hidden_stride_; }

  // Runs every layer over rows [0, segments.n_rows) and appends them to their tapes.
  virtual void forward(const Segments& segments);
  // Runs the block of the multi-token-prediction layer `depth` over what rows() holds, then `norm`,
  // for read_head_rows. Its layout is that of these layers.
  virtual void run_draft_block(const Segments& segments, const Block& block, std::int32_t depth,
                               const float* norm);

  // Normalised rows of the last pass, ready for the head, to the host: (n, head_row_bytes).
  void read_head_rows(std::span<const std::int32_t> rows, std::byte* out);
  std::size_t head_row_bytes() const;
  // Logits of rows that read_head_rows gave, to the host: (n, unpadded_vocab_size). On ranks other
  // than 0, which compute their part of it, `out` is not used.
  void logits(std::span<const void* const> head_rows, float* out);
  // The tokens that come behind such rows, one for each; the logits stay where they are.
  void sample(std::span<const void* const> head_rows, const SampleRow* rows, std::int32_t* tokens);

  // Several tokens at once, where the backend has turns; fills in what is the model's: layers, what
  // they leave and the head.
  virtual void turn(TurnArgs args);

  // Working buffers by name, in bytes.
  const std::vector<std::pair<std::string, std::size_t>>& plan() const { return plan_; }

 protected:
  // head_out_ = the logits of at most kHeadRows rows. All ranks meet.
  virtual void multiply_head(std::span<const void* const> head_rows);
  // Whether rows() of a pass are rank 0's by themselves.
  bool spreads_rows() const { return exchange_ != nullptr && exchange_->spreads_rows(); }

  Backend& backend_;

 private:
  void multiply_head(const Rows& rows, std::int32_t n_rows);
  void allocate();
  void check_exchange() const;
  void set_rows(std::int32_t n_rows);  // of the pass that begins
  float* partial_sums();               // of this rank: (n_parts, rows, d_model)
  void sum_parts(const PackedMatrix& w, const Rows& x, std::int32_t n_rows);
  void* make_buffer(const char* name, std::size_t bytes);
  Rows make_rows(const char* name, std::int64_t width, DType dtype, std::int64_t n_rows);
  float* make_floats(const char* name, std::int64_t width, std::int64_t& stride);
  // Block i of these, with the norm before the first and the one behind it.
  void run_block(const Segments& segments, std::span<const Block> blocks, std::size_t i,
                 const float* norm);
  // What comes behind half a block: the norm of its rows, and the matrix that reads them.
  struct Next {
    const float* norm;
    const PackedMatrix& matrix;
  };
  void attention_half(const Segments& segments, const Block& block);
  void mlp_half(const Segments& segments, const Block& block, const Next& next);
  void add_and_norm(const Segments& segments, const Block& block, bool is_attention, float scale,
                    const Next& next);

  const ModelConfig& config_;
  const Weights& weights_;
  Exchange* exchange_;
  std::int32_t max_rows_;
  DType kv_dtype_;  // of the tapes of every block
  std::vector<Block> blocks_;
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<std::pair<std::string, std::size_t>> plan_;

  float* hidden_ = nullptr;  // (max_rows, d_model) residual stream
  std::int64_t hidden_stride_ = 0;
  Rows normed_;                 // (max_rows, d_model) what the matrices of a block multiply
  float* projected_ = nullptr;  // (max_rows, widest of qkvr and gate_up)
  std::int64_t projected_stride_ = 0;
  Rows queries_;                // (max_rows, n_heads * d_head padded)
  Rows attended_;               // (max_rows, n_heads * d_head padded)
  Rows activated_;              // (max_rows, d_ff padded)
  float* block_out_ = nullptr;  // partial_sums where nobody is met
  std::int64_t block_out_stride_ = 0;
  std::int64_t part_stride_ = 0;  // floats, from a part to the next, in this pass
  void* moe_scratch_ = nullptr;
  Rows head_rows_;                     // (kHeadRows, d_model)
  std::vector<std::byte> head_input_;  // what goes there
  float* head_out_ = nullptr;          // (kHeadRows, vocabulary) on rank 0
  std::int64_t head_out_stride_ = 0;
  std::int64_t slab_logits_stride_ = 0;  // of one rank's part of them
  std::vector<Slice> logits_slices_;     // by rank
};

}  // namespace duplex
