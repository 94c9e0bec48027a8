#include "parallel/remote_exchange.h"

#include <utility>

#include "core/error.h"
#include "parallel/shared_exchange.h"
#include "parallel/transport.h"

namespace duplex {

RemoteExchange::RemoteExchange(Group group, int channel)
    : group_(std::move(group)), channel_(channel), part_(group_.channel(channel)) {
  for (std::uint64_t parity : {0, 1})
    for (int i = 0; i < size(); ++i) slabs_[parity].push_back(part_.slab(i, parity));
}

std::span<const void* const> RemoteExchange::meet(std::size_t bytes) {
  check(bytes <= slab_bytes(), "meeting: expected at most ", slab_bytes(), " bytes, found ", bytes);
  group_.check_alive();
  ++epoch_;
  filled_.clear();
  for (int i = 0; i < size(); ++i) filled_.emplace_back(part_.slab(i, epoch_), bytes);
  // Only rank 0 gives up, as with shared memory.
  const auto time_out = rank() == 0 ? group_.time_out() : Transport::kForever;
  if (const auto lost = group_.transport()->exchange(channel_, filled_, time_out))
    group_.lose_and_throw(lost->rank,
                          "meeting of " + group_.channel_name(channel_) + ": " + lost->reason);
  return slabs_[epoch_ % 2];
}

std::unique_ptr<SlabExchange> make_exchange(const Group& group, int channel) {
  if (group.transport() != nullptr) return std::make_unique<RemoteExchange>(group, channel);
  return std::make_unique<SharedExchange>(group, channel);
}

}  // namespace duplex
