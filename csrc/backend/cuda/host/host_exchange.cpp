#include "host/host_exchange.h"

#include <algorithm>
#include <functional>
#include <span>
#include <utility>

namespace duplex::cuda {

HostExchange::HostExchange(CudaBackend& lane, std::unique_ptr<SlabExchange> hosts)
    : lane_(lane),
      hosts_(std::move(hosts)),
      slab_(lane.allocate(hosts_->slab_bytes())),
      sum_(hosts_->slab_bytes() / sizeof(float)) {}

void HostExchange::hand_over(std::int64_t n_floats) {
  lane_.read(hosts_->mine(), slab_->data(), static_cast<std::size_t>(n_floats) * sizeof(float));
}

void HostExchange::add(Backend&, const ConvAddNormArgs& args, std::int64_t part_stride,
                       const PackedMatrix&) {
  if (args.segments.n_rows == 0) return;
  const auto n = static_cast<std::size_t>(args.segments.n_rows * args.x_stride);
  const std::int64_t n_sent = args.n_parts * part_stride;
  hand_over(n_sent);
  const std::span sum(sum_.data(), n);
  bool is_first = true;
  for (const void* slab : hosts_->meet(static_cast<std::size_t>(n_sent) * sizeof(float)))
    for (std::int32_t p = 0; p < args.n_parts; ++p, is_first = false) {
      const float* const part = static_cast<const float*>(slab) + p * part_stride;
      if (is_first)
        std::copy_n(part, n, sum.begin());
      else
        std::transform(sum.begin(), sum.end(), part, sum.begin(), std::plus());
    }
  lane_.write(slab_->data(), sum.data(), sum.size_bytes());
  ConvAddNormArgs of_sum = args;
  of_sum.parts[0] = static_cast<const float*>(slab_->data());
  of_sum.n_parts = 1;
  lane_.do_conv_add_norm(of_sum);
}

// What the hosts gather, they write to this GPU.
void HostExchange::gather(Backend& backend, const GatherArgs& args) {
  hand_over(args.n_rows * args.stride);
  hosts_->gather(backend, args);
}

}  // namespace duplex::cuda
