#include "host/lanes.h"

#include <algorithm>

namespace duplex::cuda {

void Lanes::add(Runtime& lane) {
  const std::lock_guard lock(mutex_);
  for (Runtime* other : lanes_) lane.wait_for(*other);
  lanes_.push_back(&lane);
}

void Lanes::remove(Runtime& lane) noexcept {
  const std::lock_guard lock(mutex_);
  std::erase(lanes_, &lane);
}

void Lanes::put_behind_all(Runtime& stream) {
  const std::lock_guard lock(mutex_);
  for (Runtime* lane : lanes_) stream.wait_for(*lane);
}

void Lanes::synchronize() {
  const std::lock_guard lock(mutex_);
  for (Runtime* lane : lanes_) lane->synchronize();
}

void Lanes::begin_pass() {
  const std::lock_guard lock(gate_);
  ++n_passes_;
}

void Lanes::end_pass() {
  const std::lock_guard lock(gate_);
  if (--n_passes_ == 0) ended_.notify_all();
}

void Lanes::park() {
  std::unique_lock lock(gate_);
  ended_.wait(lock, [this] { return n_passes_.load() == 0; });
}

}  // namespace duplex::cuda
