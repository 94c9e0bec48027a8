// What the tests of tensor parallelism share: models that can be cut into eight, and ranks as
// threads of one process.
#pragma once

#include <barrier>
#include <cstring>
#include <exception>
#include <functional>
#include <thread>
#include <vector>

#include "backend/exchange.h"
#include "core/shard.h"
#include "tests/model/checkpoint.h"

namespace duplex::model_tests {

// 8 heads, fewer for keys and values; heads and parts of widths need padding.
inline ModelConfig cut_config() {
  ModelConfig config = tiny_config();
  config.d_ff = 72;
  config.global = {8, 2, 12, 24, 0};
  config.local = {8, 4, 8, 5, 5};
  config.moe = {4, 2, 2, 40, 1.5f};
  config.mtp.layers = {{true, false}};
  config.mtp.has_chain_norm = true;
  return config;
}

// Parts of whole groups of quantised columns.
inline ModelConfig quantised_config() {
  ModelConfig config = cut_config();
  config.d_ff = 256;
  config.global = {4, 2, 64, 24, 0};
  config.local = {8, 4, 32, 5, 5};
  config.moe.d_expert = 256;
  return config;
}

// Slabs in the memory of the process; the second meeting after may fill one again.
class MeetingPlace {
 public:
  MeetingPlace(int size, std::size_t slab_bytes)
      : size_(size), slab_bytes_(slab_bytes), barrier_(size) {
    for (std::vector<std::vector<std::byte>>& slabs : slabs_)
      slabs.assign(static_cast<std::size_t>(size), std::vector<std::byte>(slab_bytes));
  }
  int size() const { return size_; }
  std::size_t slab_bytes() const { return slab_bytes_; }
  std::byte* slab(int epoch, int rank) {
    return slabs_[epoch % 2][static_cast<std::size_t>(rank)].data();
  }
  void wait() { barrier_.arrive_and_wait(); }
  void leave() { barrier_.arrive_and_drop(); }

 private:
  int size_;
  std::size_t slab_bytes_;
  std::barrier<> barrier_;
  std::vector<std::vector<std::byte>> slabs_[2];
};

// `is_reversed`: hands out the slabs in descending order, which nobody may notice but by the bits.
class ThreadExchange : public SlabExchange {
 public:
  ThreadExchange(MeetingPlace& place, int rank, bool is_reversed = false)
      : place_(place), rank_(rank), is_reversed_(is_reversed) {}
  int rank() const override { return rank_; }
  int size() const override { return place_.size(); }
  std::size_t slab_bytes() const override { return place_.slab_bytes(); }
  void* mine() override { return place_.slab(epoch_, rank_); }
  std::span<const void* const> meet(std::size_t /*bytes*/) override {
    place_.wait();
    slabs_.clear();
    for (int r = 0; r < size(); ++r)
      slabs_.push_back(place_.slab(epoch_, is_reversed_ ? size() - 1 - r : r));
    ++epoch_;
    return slabs_;
  }

 private:
  MeetingPlace& place_;
  int rank_;
  bool is_reversed_;
  int epoch_ = 0;
  std::vector<const void*> slabs_;
};

// Runs `rank(r)` on a thread for each; an exception of one is thrown when all have ended.
inline void run_ranks(MeetingPlace& place, const std::function<void(int)>& rank) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(place.size()));
  std::vector<std::thread> threads;
  for (int r = 0; r < place.size(); ++r)
    threads.emplace_back([&, r] {
      try {
        rank(r);
      } catch (...) {
        errors[static_cast<std::size_t>(r)] = std::current_exception();
      }
      place.leave();
    });
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);
}

}  // namespace duplex::model_tests
