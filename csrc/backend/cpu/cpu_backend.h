// The CPU backend: memory on large pages, kernels chosen for the machine, one thread pool for both
// lanes.
//
// cpu_ops.cpp cuts operations into pieces for the threads, cpu_moe.cpp does so for the experts,
// pack.cpp holds the weight layout, kernels.h what a piece is.
#pragma once

#include <cstring>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "backend/cpu/background_thread.h"
#include "backend/cpu/kernels.h"
#include "backend/cpu/sampler.h"
#include "backend/cpu/thread_pool.h"

namespace duplex {

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const BackendOptions& options);

  std::string name() const override { return "cpu"; }
  std::string description() const override;
  int n_threads() const override { return pool_->n_threads(); }
  std::unique_ptr<Backend> background_lane() override;

  std::unique_ptr<Buffer> allocate(std::size_t bytes) override;
  void write(void* destination, const void* source, std::size_t bytes) override {
    std::memcpy(destination, source, bytes);
  }
  void read(void* destination, const void* source, std::size_t bytes) override {
    std::memcpy(destination, source, bytes);
  }
  std::unique_ptr<PageMemory> create_page_memory(std::size_t page_bytes,
                                                 std::int64_t n_pages) override;
  std::size_t page_granularity() const override { return 4096; }
  bool has_kv_dtype(DType kv_dtype) const override { return kv_dtype != DType::kInt4; }
  std::size_t packed_bytes(std::int64_t n_out, std::int64_t n_in_padded,
                           DType dtype) const override;
  std::int64_t pack(const PackSource& source, const PackShape& shape, std::int64_t first_out,
                    void* destination) override;
  std::size_t moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                                std::int64_t max_rows, std::int32_t n_parts = 1) const override;
  void run_awake(const std::function<void()>& work) override;

 protected:
  void do_embed_text(const EmbedTextArgs& args) override;
  void do_embed_audio(const EmbedAudioArgs& args) override;
  void do_norm(const NormArgs& args) override;
  void do_linear(const LinearArgs& args) override;
  void do_kv_append(const KvAppendArgs& args) override;
  void do_attention(const AttentionArgs& args) override;
  void do_conv_add_norm(const ConvAddNormArgs& args) override;
  void do_silu_mul(const SiluMulArgs& args) override;
  void do_moe(const MoeArgs& args) override;
  void do_fold(const FoldArgs& args) override;
  void do_sample(const SampleArgs& args) override;

 private:
  CpuBackend(const CpuKernels& kernels, std::shared_ptr<ThreadPool> pool, LaneKind lane);

  // Less is done before a worker would have begun: a few microseconds.
  static constexpr std::int64_t kElementsWorthSharing = 8192;          // of rows
  static constexpr std::int64_t kWeightBytesWorthSharing = 128 << 10;  // to read
  static constexpr std::int64_t kProductsWorthSharing = 500'000;       // of rows and weights
  // Of one piece of attention in the background lane: about half a millisecond.
  static constexpr std::int64_t kVectorPositionsAtOnce = 96 * 1024;

  // Runs fn(task, thread) for every task, on this thread alone where sharing would not pay.
  template <class Fn>
  void for_tasks(std::int64_t n_tasks, bool is_worth_sharing, const Fn& fn) {
    if (is_worth_sharing) return pool_->parallel_for(lane_, n_tasks, fn);
    pool_->give_way(lane_);
    for (std::int64_t task = 0; task < n_tasks; ++task) fn(task, 0);
  }
  // Runs fn(row) for every row of so many elements.
  template <class Fn>
  void for_rows(std::int64_t n_rows, std::int64_t n_elements, const Fn& fn) {
    for_tasks(n_rows, n_rows * n_elements >= kElementsWorthSharing,
              [&](std::int64_t row, int) { fn(static_cast<std::int32_t>(row)); });
  }
  // Runs fn(segment, row inside it) for every row.
  template <class Fn>
  void for_segment_rows(const Segments& segments, std::int64_t n_elements, const Fn& fn) {
    for_rows(segments.n_rows, n_elements, [&](std::int32_t row) {
      const Segment* segment = segments.data;
      while (row >= segment->row_begin + segment->n_rows) ++segment;
      fn(*segment, row - segment->row_begin);
    });
  }

  struct PanelRows {
    const std::byte* data;
    std::int64_t stride_bytes;
    const std::byte* at(std::int64_t row) const { return data + row * stride_bytes; }
  };
  // One of the equal runs of columns of a matrix.
  struct PanelParts {
    std::int32_t n_in;
    std::int64_t panel_bytes;
    std::int64_t row_bytes;
  };
  PanelParts panel_parts(const PackedMatrix& w, std::int32_t n_parts, DType row_dtype) const;
  std::int32_t vectors_at_once(const AttentionArgs& args) const;
  PanelRows panel_rows(const Rows& x, std::int32_t n_rows, std::int64_t n_in, DType format);

  const CpuKernels& kernels_;
  std::shared_ptr<ThreadPool> pool_;
  LaneKind lane_;
  std::unique_ptr<BackgroundThread> background_;     // of a background lane
  std::vector<AttentionScratch> attention_scratch_;  // one a thread
  std::unique_ptr<Buffer> bias_scratch_;             // one slice a thread
  std::vector<std::byte> quantised_;                 // rows of the matrix at hand
  Sampler sampler_;
};

}  // namespace duplex
