// The memory of several GPUs as their kernels see each other's stores: late, and in any order.
//
// Inside run_streams() (streams.h) a store waits in its GPU until it happens at a random time, or
// until a fence makes it happen: one of the same thread; of another thread of the block, if the
// store was before a barrier that the block has passed; or of a later launch of the same stream.
// Loads are never early, so an acquire that is missing cannot be seen here. Outside, a store
// happens at once. What kernels call is device/system.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "tests/simt/block.h"

namespace duplex::simt {

// A kernel has stopped itself.
struct Trap : std::runtime_error {
  Trap() : std::runtime_error("the kernel has stopped itself") {}
};

// `n` words of 4 bytes, up to 4; addresses are multiples of their size.
void load_system(const void* address, std::uint32_t* words, int n);
void store_system(void* address, const std::uint32_t* words, int n);
void multicast_store(void* address, const std::uint32_t* words, int n);
// In float32, from the last rank to the first: not the order that kernels add in.
void multicast_sum(const void* address, std::uint32_t* words, int n);
void multicast_count(std::uint32_t* counter);
void fence_system();
// Counts the steps of run_streams(). Lets others go on.
std::uint64_t clock_ns();

// Addresses that stand for the same place in the memory of each of several GPUs. Nothing but the
// functions above may touch them.
class Multicast {
 public:
  // At `base`, which nothing else uses, or at addresses of its own.
  Multicast(std::vector<std::byte*> members, std::size_t bytes, std::byte* base = nullptr);
  ~Multicast();
  Multicast(const Multicast&) = delete;
  Multicast& operator=(const Multicast&) = delete;
  std::byte* address() const { return base_; }

  // The object of an address, or null.
  static const Multicast* of(const void* address);
  std::size_t size() const { return members_.size(); }
  // The place in a member's memory that an address stands for.
  std::byte* place(std::size_t member, const void* address) const {
    return members_[member] + (static_cast<const std::byte*>(address) - base_);
  }

 private:
  std::byte* base_;
  std::size_t bytes_;
  bool owns_;
  std::vector<std::byte*> members_;
};

// The stores that are yet to happen. One at a time is there, of the thread that makes it.
class PendingStores {
 public:
  explicit PendingStores(std::uint32_t seed);
  ~PendingStores();
  PendingStores(const PendingStores&) = delete;
  PendingStores& operator=(const PendingStores&) = delete;

  // Who stores from now on: a launch of a stream.
  void set_launch(int stream, int launch);
  void add(std::byte* address, const std::uint32_t* words, int n, bool is_count);
  void fence();
  // Some of them happen: about one in `one_in`.
  void drain(std::uint32_t one_in);
  void step() { ++clock_; }
  std::uint64_t clock() const { return clock_; }

 private:
  struct Store {
    std::byte* address;
    std::uint32_t words[4];
    int n;
    bool is_count;
    int launch;
    Origin from;
  };
  void happen(int stream, std::size_t index);
  void perform(Store& store);

  std::vector<std::vector<Store>> waiting_;  // by stream
  // Where the store to an address waits, by stream: there is one at most.
  std::vector<std::unordered_map<const std::byte*, std::size_t>> index_;
  int stream_ = 0, launch_ = 0;
  std::uint64_t clock_ = 1;
  std::mt19937 random_;
};

}  // namespace duplex::simt
