// The CUDA backend: operations become kernel launches in the stream of its lane. What the host
// hands over with an operation (token ids, bins, segments) goes to the device first.
//
// Kernels are in kernels/, the machine below them is device/. It also runs on the host, without a
// GPU, against csrc/tests/simt/device/.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "backend/backend.h"
#include "device/runtime.h"
#include "host/device_group.h"
#include "host/lanes.h"

namespace duplex::cuda {

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const BackendOptions& options);
  ~CudaBackend() override;

  std::string name() const override { return "cuda"; }
  std::string description() const override { return "cuda " + runtime_.device_name(); }
  int n_threads() const override { return 1; }
  DeviceCalls calls() const override { return {runtime_.n_launches(), runtime_.n_waits()}; }
  std::unique_ptr<Backend> background_lane() override;

  std::unique_ptr<Buffer> allocate(std::size_t bytes) override;
  void write(void* destination, const void* source, std::size_t bytes) override;
  void read(void* destination, const void* source, std::size_t bytes) override;
  void read_rows(void* destination, const Rows& source, std::span<const std::int32_t> rows,
                 std::size_t row_bytes) override;
  std::unique_ptr<PageMemory> create_page_memory(std::size_t page_bytes,
                                                 std::int64_t n_pages) override;
  std::size_t page_granularity() const override { return runtime_.page_granularity(); }
  bool has_kv_dtype(DType kv_dtype) const override {
    return !is_quantised(kv_dtype) || kv_dtype == DType::kInt8;
  }
  std::size_t packed_bytes(std::int64_t n_out, std::int64_t n_in_padded, DType) const override;
  std::int64_t pack(const PackSource& source, const PackShape& shape, std::int64_t first_out,
                    void* destination) override;
  std::size_t moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                                std::int64_t max_rows, std::int32_t n_parts = 1) const override;
  bool packs_parts_apart() const override { return true; }
  bool pairs_gate_up(DType dtype) const override { return dtype != DType::kF32; }
  void connect(std::shared_ptr<Rendezvous> ranks, const ExchangeOptions& options) override;
  std::string transport() const override;
  std::unique_ptr<Exchange> create_exchange(std::unique_ptr<SlabExchange> hosts) override;
  void give_way() override;
  void finish() override;
  void run_awake(const std::function<void()>& work) override;
  void run_layers(const Segments& segments, std::int32_t n_layers,
                  const std::function<void(std::int32_t)>& layer) override;
  bool has_turns() const override;

  // ---- for exchanges
  void do_conv_add_norm(const ConvAddNormArgs& args) override;
  void all_reduce(const AllReduceArgs& args, Exchanges how);
  // Where launches go. The background waits here while a pass of the interaction lane is running,
  // unless devices are connected: see give_way().
  Runtime& stream();

 protected:
  void do_turn(const TurnArgs& args, const TurnSteps& steps) override;
  void do_embed_text(const EmbedTextArgs& args) override;
  void do_embed_audio(const EmbedAudioArgs& args) override;
  void do_norm(const NormArgs& args) override;
  void do_linear(const LinearArgs& args) override;
  void do_kv_append(const KvAppendArgs& args) override;
  void do_attention(const AttentionArgs& args) override;
  void do_silu_mul(const SiluMulArgs& args) override;
  void do_moe(const MoeArgs& args) override;
  void do_fold(const FoldArgs& args) override;
  void do_sample(const SampleArgs& args) override;

 private:
  using Records = std::vector<std::unique_ptr<Record>>;
  struct Turn;  // cuda_turn.cpp

  explicit CudaBackend(CudaBackend& interaction);  // its background lane

  // Does what waits for the GPU, and looks whether kernels have waited for other ranks in vain.
  template <class Work>
  void wait(const Work& work);

  // The same segments in the device's memory; those of the last operation are kept.
  Segments staged(const Segments& segments);

  // Grows a buffer that launches point to; what was recorded with the old one is forgotten.
  void grow(std::unique_ptr<Buffer>& buffer, std::size_t bytes);
  // The same for scratch, whose old one stays with ranks: their records are forgotten by what all
  // of them do, not by what rank 0 does alone, so that all have the same ones.
  void grow_scratch(std::unique_ptr<Buffer>& buffer, std::size_t bytes);
  // Takes a larger one; nothing that is at work uses the old one.
  void replace(std::unique_ptr<Buffer>& buffer, std::size_t bytes);

  void* quantised(std::size_t bytes);

  // What is recorded of passes of a kind, which may be nothing as yet; null: the first of its kind.
  Records* records_of(const std::vector<std::int64_t>& kind);

  // Bytes of the block: whether there is room for it, the caller sees.
  std::size_t lay_out_turn(Turn& turn);
  std::size_t lay_out_results(Turn& turn, std::size_t& n_read);
  void run_turn(const Turn& turn);
  void pass_of_turn(const Turn& turn, bool is_first, const Loop* loop);
  void hand_back(const Turn& turn) const;

  LaneKind lane_ = LaneKind::kInteraction;
  std::shared_ptr<Lanes> lanes_;
  Runtime runtime_;
  std::shared_ptr<DeviceGroup> group_;  // of the ranks, where their GPUs are connected
  bool meets_by_hosts_ = false;         // in every layer, so that no pass can be recorded
  std::vector<std::unique_ptr<Buffer>> outgrown_;
  // Of a pass: one record, in the background lane one for each layer; none: seen once.
  std::map<std::vector<std::int64_t>, Records> records_;
  std::vector<std::int64_t>
      kind_;  // of the pass in progress; kept, so that a pass allocates nothing
  std::unique_ptr<Buffer> segments_;  // on the device
  std::vector<std::byte> staged_;     // what it holds
  std::vector<std::byte> wanted_;
  std::unique_ptr<Buffer> quantised_;
  std::unique_ptr<Buffer> partial_;  // sums of attention that are added later
  std::unique_ptr<Buffer> pack_source_;
  std::unique_ptr<Buffer> tokens_;  // chosen, on their way to the host
  std::unique_ptr<Buffer> rows_;    // gathered, on their way to the host
  const Turn* turn_ = nullptr;      // in progress
  std::unique_ptr<Buffer> turn_in_, turn_out_;
  std::vector<std::byte> turn_bytes_;  // on their way to the one or from the other
};

}  // namespace duplex::cuda
