// How GPUs meet that share no memory: each hands its parts to its host, the hosts meet, and each
// adds the parts of all and gives the sum to its GPU. So a GPU waits for its host twice a layer.
#pragma once

#include <memory>
#include <vector>

#include "host/cuda_backend.h"

namespace duplex::cuda {

// Of one lane, which must outlive it.
class HostExchange final : public Exchange {
 public:
  HostExchange(CudaBackend& lane, std::unique_ptr<SlabExchange> hosts);

  int rank() const override { return hosts_->rank(); }
  int size() const override { return hosts_->size(); }
  std::size_t slab_bytes() const override { return slab_->bytes(); }
  void* mine() override { return slab_->data(); }
  void add(Backend& backend, const ConvAddNormArgs& args, std::int64_t part_stride,
           const PackedMatrix& next) override;
  void gather(Backend& backend, const GatherArgs& args) override;

 private:
  // Puts the first floats of the slab into that of the host; waits for the GPU.
  void hand_over(std::int64_t n_floats);

  CudaBackend& lane_;
  std::unique_ptr<SlabExchange> hosts_;
  std::unique_ptr<Buffer> slab_;  // the GPU's; parts, then their sum
  std::vector<float> sum_;
};

}  // namespace duplex::cuda
