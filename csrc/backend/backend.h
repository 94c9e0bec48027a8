// The interface between the model and a machine: memory and about a dozen operations.
//
// The public functions check their arguments once (ops.cpp) and call the do_ functions, which
// compute and check nothing. Every operation gives each row the same bits whatever other rows are
// in the batch and however many threads run. A new backend is one folder and one entry of
// DUPLEX_BACKENDS in CMakeLists.txt.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "backend/exchange.h"
#include "backend/op_args.h"
#include "backend/page_memory.h"

namespace duplex {

// What the host asked of a device so far, for measurements.
struct DeviceCalls {
  std::int64_t launches = 0;  // of kernels, and of whole records of them
  std::int64_t waits = 0;     // of the host, for work that it had given
};

struct BackendOptions {
  int n_threads = 0;  // 0 = one per available core
  std::string isa;    // cpu: which kernels, "avx2" say; empty = the best there are
  int gpu = -1;       // cuda: which one; -1 = the process's current one
};

// Zeroed memory that never moves, owned. It is the backend's: the host gets at it with write and
// read alone.
class Buffer {
 public:
  virtual ~Buffer() = default;
  virtual void* data() const = 0;
  virtual std::size_t bytes() const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  virtual std::string name() const = 0;         // "cpu"
  virtual std::string description() const = 0;  // e.g. "cpu avx512, 2 threads"
  virtual int n_threads() const = 0;
  // A backend for work that can wait: the same machine, threads and memory, scratch of its own.
  // While run_awake is at work here, work there stands still, at the latest where its next task
  // (a GPU: its next layer but one) would begin. Any number of them, each with one caller at a
  // time; they may outlive this one. What one lane wrote to pages and weights the other may read
  // as soon as the call is over.
  virtual std::unique_ptr<Backend> background_lane() = 0;
  virtual DeviceCalls calls() const { return {}; }  // from any thread; none where all is the host's

  // ---- memory
  virtual std::unique_ptr<Buffer> allocate(std::size_t bytes) = 0;
  // From and to the host's memory, in order with the operations; read waits for them.
  virtual void write(void* destination, const void* source, std::size_t bytes) = 0;
  virtual void read(void* destination, const void* source, std::size_t bytes) = 0;
  // The first `row_bytes`, a multiple of 16, of some rows, one behind the other; waits like read.
  virtual void read_rows(void* destination, const Rows& source, std::span<const std::int32_t> rows,
                         std::size_t row_bytes) {
    const auto* const from = static_cast<const std::byte*>(source.data);
    const std::size_t stride = static_cast<std::size_t>(source.stride) * dtype_bytes(source.dtype);
    auto* to = static_cast<std::byte*>(destination);
    for (const std::int32_t row : rows) {
      read(to, from + static_cast<std::size_t>(row) * stride, row_bytes);
      to += row_bytes;
    }
  }
  virtual std::unique_ptr<PageMemory> create_page_memory(std::size_t page_bytes,
                                                         std::int64_t n_pages) = 0;
  virtual std::size_t page_granularity() const = 0;  // page_bytes is a multiple of this
  // Whether kv_append and attention keep keys and values as this.
  virtual bool has_kv_dtype(DType kv_dtype) const { return !is_quantised(kv_dtype); }

  // ---- weights
  virtual std::size_t packed_bytes(std::int64_t n_out, std::int64_t n_in_padded, DType) const = 0;
  // Packs source rows as outputs first_out, first_out + 1, ... of the matrix at `destination`,
  // which was zero. Returns the index of the first source row with a NaN or infinity, or -1.
  virtual std::int64_t pack(const PackSource& source, const PackShape& shape,
                            std::int64_t first_out, void* destination) = 0;
  virtual std::size_t moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                                        std::int64_t max_rows, std::int32_t n_parts = 1) const = 0;
  virtual bool packs_parts_apart() const { return false; }   // see LinearArgs
  virtual bool pairs_gate_up(DType) const { return false; }  // see PackShape

  // ---- ranks of a tensor-parallel group
  // Connects the devices, where they have something of their own: all ranks do so at the same time,
  // before the first pass. Throws BackendUnavailable, on all, where the transport is not there.
  virtual void connect(std::shared_ptr<Rendezvous>, const ExchangeOptions&) {}
  virtual std::string transport() const { return "shared memory"; }  // in words
  // Of this lane, which must outlive it; where nothing was connected, by way of `hosts`.
  virtual std::unique_ptr<Exchange> create_exchange(std::unique_ptr<SlabExchange> hosts) {
    return hosts;
  }
  // Of a background lane: waits while run_awake is at work beside it. Operations do so themselves,
  // but not on connected devices: a rank that stood still in a pass would hold up all of them.
  virtual void give_way() {}
  // Waits until all is done that was asked for; throws RankFailed if a rank was waited for in vain.
  virtual void finish() {}

  // Runs one pass or more: workers stay awake meanwhile. It may be on a thread of the backend's
  // own; what `work` throws is thrown here.
  virtual void run_awake(const std::function<void()>& work) { work(); }
  // Runs layer(0), layer(1) .. over some segments. Each asks for the same operations whenever there
  // are as many rows in as many segments, so a backend may record them and play the record.
  virtual void run_layers(const Segments&, std::int32_t n_layers,
                          const std::function<void(std::int32_t)>& layer) {
    for (std::int32_t i = 0; i < n_layers; ++i) layer(i);
  }

  virtual bool has_turns() const { return false; }  // without, passes are asked for one by one
  void turn(const TurnArgs& args, const TurnSteps& steps);

  // ---- operations
  void embed_text(const EmbedTextArgs& args);
  void embed_audio(const EmbedAudioArgs& args);
  void norm(const NormArgs& args);
  void linear(const LinearArgs& args);
  void kv_append(const KvAppendArgs& args);
  void attention(const AttentionArgs& args);
  void conv_add_norm(const ConvAddNormArgs& args);
  void silu_mul(const SiluMulArgs& args);
  void moe(const MoeArgs& args);
  void fold(const FoldArgs& args);
  void sample(const SampleArgs& args);

 protected:
  virtual void do_turn(const TurnArgs&, const TurnSteps&) {}
  virtual void do_embed_text(const EmbedTextArgs& args) = 0;
  virtual void do_embed_audio(const EmbedAudioArgs& args) = 0;
  virtual void do_norm(const NormArgs& args) = 0;
  virtual void do_linear(const LinearArgs& args) = 0;
  virtual void do_kv_append(const KvAppendArgs& args) = 0;
  virtual void do_attention(const AttentionArgs& args) = 0;
  virtual void do_conv_add_norm(const ConvAddNormArgs& args) = 0;
  virtual void do_silu_mul(const SiluMulArgs& args) = 0;
  virtual void do_moe(const MoeArgs& args) = 0;
  virtual void do_fold(const FoldArgs& args) = 0;
  virtual void do_sample(const SampleArgs& args) = 0;
};

}  // namespace duplex
