// A thread block as it runs: its threads as fibres, its shared memory, who goes on when.
#pragma once

#include <algorithm>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "tests/simt/fibers.h"
#include "tests/simt/grid.h"
#include "tests/simt/schedule.h"
#include "tests/simt/warp.h"

namespace duplex::simt {

// Bytes around the shared memory that must stay as they are. AddressSanitizer knows its end to the
// byte, so there the memory is taken alone.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr std::ptrdiff_t kGuardBytes = 0;
#else
inline constexpr std::ptrdiff_t kGuardBytes = 256;
#endif
inline constexpr auto kGuard = std::byte{0xc5};
inline constexpr auto kUnwritten = std::byte{0xff};  // NaN in float32 and bfloat16

// One thread block's shared memory, fresh for each.
class SharedMemory {
 public:
  explicit SharedMemory(std::size_t bytes) : memory_(bytes + 2 * kGuardBytes, kGuard) {
    std::fill(memory_.begin() + kGuardBytes, memory_.end() - kGuardBytes, kUnwritten);
  }
  std::byte* data() { return memory_.data() + kGuardBytes; }
  bool is_intact() const {
    const auto is_guard = [](std::byte b) { return b == kGuard; };
    return std::all_of(memory_.begin(), memory_.begin() + kGuardBytes, is_guard) &&
           std::all_of(memory_.end() - kGuardBytes, memory_.end(), is_guard);
  }

 private:
  std::vector<std::byte> memory_;
};

struct Copy {
  void* to;
  const void* from;
  int group;  // of the thread's, in order
};

struct Thread : Place {
  explicit Thread(int number) : Place{}, fiber(number) {}
  Fiber fiber;
  Wait wait = Wait::kNothing;
  Exchange exchange;
  std::deque<Copy> copies;  // on their way, oldest first
  int n_groups = 0;         // committed
  bool has_waited = false;  // for the grid before
};

// The GPU of one system thread, or one thread block among others.
class Machine {
 public:
  // All blocks but those of `elsewhere`.
  void run(const LaunchShape& shape, void (*call)(const void*), const void* context,
           const std::vector<std::int64_t>& elsewhere);

  void begin_launch(const LaunchShape& shape, void (*call)(const void*), const void* context,
                    std::uint32_t seed);
  void begin_block(std::int64_t index);
  // Whoever can goes on to the next wait; false once all threads have returned, or stand where the
  // grid before must end. With `skip`, half of them stay where they are.
  bool pass(bool skip);
  // The grid before has not ended; it has.
  void hold() { is_held_ = true; }
  void release();

  void sync_block(Thread& thread);
  void wait_for_previous_grid(Thread& thread);
  void yield(Thread& thread);
  void meet_warp(Thread& thread, Wait kind);
  bool copies_late();
  int n_barriers() const { return n_barriers_; }
  void set_schedule(const Schedule& schedule) { schedule_ = schedule; }

 private:
  void make_threads();
  void start(std::byte* shared);
  std::size_t next_turn(std::size_t at) const;
  static void run_thread(void* thread);
  void end(Thread& thread) noexcept;
  void release_barrier() noexcept;
  void arrange(std::vector<std::int64_t>& order);

  void (*call_)(const void*) = nullptr;
  const void* context_ = nullptr;
  bool is_running_ = false;
  LaunchShape shape_{};
  std::int64_t index_ = 0;  // of the block
  std::optional<SharedMemory> shared_;
  std::vector<std::int64_t> turns_;               // the threads, in the order of a pass
  int n_barriers_ = 0;                            // that the block has passed
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as any launch had
  std::vector<std::unique_ptr<Thread>> others_;   // of the block before, for ThreadSanitizer
  int n_threads_ = 0;                             // of this launch
  int n_live_ = 0;
  int n_at_barrier_ = 0;
  std::uint32_t n_blocks_ = 0;
  char barriers_[4] = {};  // places of order.h: of two barriers and two blocks, which take turns
  bool is_held_ = false;
  std::exception_ptr error_;
  Schedule schedule_;
  std::uint32_t n_launches_ = 0;
  std::mt19937 random_;
};

Machine& machine();  // of the block that runs now

}  // namespace duplex::simt
