// What the GPUs of a tensor-parallel group share, as one rank has it: memory that all can write,
// and in it for each lane what the sums over ranks need (kernels/all_reduce.h).
//
// A kernel waits for other ranks as long as they compute. Once a rank is gone, a thread of this
// tells the kernels of the own GPU, which then end with zeros: the GPU stays good for another
// group.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "backend/backend.h"
#include "core/owner_process.h"
#include "core/types.h"
#include "device/multicast.h"
#include "device/runtime.h"
#include "kernels/all_reduce.h"

namespace duplex::cuda {

class CudaBackend;

class DeviceGroup {
 public:
  // A meeting of all ranks. Throws BackendUnavailable, on every rank, where the transport is not
  // there.
  DeviceGroup(Runtime& runtime, std::shared_ptr<Rendezvous> ranks, const ExchangeOptions& options);
  // No kernel of this rank is at work in it any more.
  ~DeviceGroup();
  DeviceGroup(const DeviceGroup&) = delete;
  DeviceGroup& operator=(const DeviceGroup&) = delete;

  const std::string& transport() const { return transport_; }  // and why it is not a better one
  const ExchangeOptions& options() const { return options_; }
  const Group& lane(LaneKind lane) const { return lanes_[static_cast<int>(lane)]; }
  Exchanges way_for(std::int64_t n_rows) const;
  // Of all ranks, where each has several.
  std::size_t all_parts_bytes() const;
  // Throws RankFailed where a rank is gone, or a kernel has waited for one in vain.
  void check_alive() const;

 private:
  static constexpr int kLanes = 2;
  std::int64_t buffer_bytes() const;
  std::int32_t common_blocks(std::int32_t mine);
  void set_up(Runtime& runtime);
  bool is_over() const;
  void watch();

  std::shared_ptr<Rendezvous> ranks_;
  ExchangeOptions options_;
  std::unique_ptr<MulticastDriver> driver_;
  std::optional<MulticastMemory> memory_;
  std::string transport_;
  int device_;
  struct OnDevice {
    void operator()(void* memory) const { Runtime::release(memory); }
  };
  struct OnHost {
    void operator()(void* memory) const { Runtime::release_host(memory); }
  };
  std::unique_ptr<GroupState, OnDevice> states_;  // of each lane
  std::unique_ptr<WaitReport, OnHost> reports_;
  Group lanes_[kLanes]{};
  OwnerProcess owner_;
  std::atomic<bool> is_closing_{false};
  std::thread watcher_;
};

// Of one lane.
class DeviceExchange final : public Exchange {
 public:
  DeviceExchange(CudaBackend& lane, std::shared_ptr<const DeviceGroup> group, LaneKind kind);

  int rank() const override { return args_.rank; }
  int size() const override { return args_.n_ranks; }
  std::size_t slab_bytes() const override { return slab_->bytes(); }
  void* mine() override { return slab_->data(); }
  void add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
           const PackedMatrix& next) override;
  void gather(Backend& backend, const GatherArgs& args) override;
  bool spreads_rows() const override { return true; }
  void spread_rows(float* rows, std::int64_t n_floats) override;

 private:
  NextWeights first_bytes(const PackedMatrix& w) const;
  void add_parts(const ConvAddNormArgs& args, std::int64_t part_stride, const PackedMatrix& next);

  CudaBackend& lane_;
  std::shared_ptr<const DeviceGroup> group_;
  const Group& args_;
  std::unique_ptr<Buffer> slab_;
  std::unique_ptr<Buffer> all_parts_;  // of all ranks, where each has several
};

}  // namespace duplex::cuda
