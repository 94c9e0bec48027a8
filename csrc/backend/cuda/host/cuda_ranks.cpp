// How a GPU meets those of other ranks: in memory that they share, or by way of their hosts.
#include <memory>
#include <utility>

#include "host/cuda_backend.h"
#include "host/host_exchange.h"

namespace duplex::cuda {

void CudaBackend::connect(std::shared_ptr<Rendezvous> ranks, const ExchangeOptions& options) {
  if (options.transport == Backend::transport()) return;
  group_ = std::make_shared<DeviceGroup>(runtime_, std::move(ranks), options);
}

std::string CudaBackend::transport() const {
  return group_ == nullptr ? Backend::transport() : group_->transport();
}

std::unique_ptr<Exchange> CudaBackend::create_exchange(std::unique_ptr<SlabExchange> hosts) {
  if (group_ != nullptr) return std::make_unique<DeviceExchange>(*this, group_, lane_);
  meets_by_hosts_ = true;
  return std::make_unique<HostExchange>(*this, std::move(hosts));
}

void CudaBackend::all_reduce(const AllReduceArgs& args, Exchanges how) {
  AllReduceArgs on_device = args;
  on_device.op.segments = staged(args.op.segments);
  launch_all_reduce(stream(), on_device, how);
}

}  // namespace duplex::cuda
