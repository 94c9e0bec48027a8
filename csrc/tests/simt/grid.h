// The host's stand-in for a GPU that runs a kernel: the thread blocks one after another, the
// threads of a block as fibres on the calling thread. A fibre runs until it waits for others.
// streams.h has several GPUs at once.
//
// What kernels see of this is device/platform.cuh. It cannot show: what the machine's own
// instructions do, weak memory order, speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <typeinfo>
#include <vector>

namespace duplex::simt {

inline constexpr int kWarpLanes = 32;

enum class Order : std::uint8_t { kForward, kReverse, kRandom };
// In which order blocks run, and the threads of a block from one wait to the next; except at random
// a warp goes as far as it can before the next begins. Until this is called: the environment's
// DUPLEX_SIMT_ORDER (forward, reverse or random:<seed>), else forward.
void set_order(Order order, std::uint32_t seed = 0);

struct LaunchShape {
  const std::type_info* args;  // the launch's name in reports
  std::int64_t grid[3];
  int n_threads;
  std::size_t shared_bytes;
  bool is_early = false;  // every thread must call wait_for_previous_grid()
};

// call(context) for every thread of every block. Throws std::logic_error for a launch that no GPU
// takes, for threads that wait for each other for ever, and for writes around the shared memory;
// what a thread throws is passed on. The other threads are dropped then.
void run_grid(const LaunchShape& shape, void (*call)(const void* context), const void* context);

// A launch that is to be made.
struct Launch {
  LaunchShape shape;
  void (*call)(const void* context);
  std::shared_ptr<const void> context;
};
// One behind the other. Of early ones behind an early one, some blocks go as far as they can before
// that one begins, as a GPU may have it.
void run_chain(const std::vector<Launch>& launches);
// In which order the blocks of a launch run.
std::vector<std::int64_t> order_of_blocks(const LaunchShape& shape, std::uint32_t seed);

// ---- for a running thread

struct Place {
  int thread;
  int n_threads;
  int block[3];
  std::byte* shared;
};
extern constinit thread_local const Place* current_place;
inline const Place& here() { return *current_place; }

enum class Wait : std::uint8_t {
  kNothing,
  kBarrier,
  kShuffleDown,
  kShuffleXor,
  kShuffleFrom,
  kProduct,
  kTurn,
  kIntegerProduct,
  kGrid,
  kReturned,
};

void sync_block();
void wait_for_previous_grid();
// Lets the others go on, for a loop that waits for them.
void yield();
// 16 bytes that arrive at some time before wait_copies() lets their group pass: in forward order as
// late as may be, in reverse order at once, at random either way.
void copy_async(void* shared, const void* global);
void commit_copies();
void prefetch(const void* address, std::uint32_t bytes);
void wait_copies(int n_pending);
// The value of another lane, as CUDA's shuffles choose it by `argument` (delta, mask or lane).
float shuffle(Wait kind, float value, int argument, int width);
enum class Unsigned : std::uint8_t { kNone, kLeft, kRight };  // codes of which factor
// acc (4) of every lane of the warp += the product of all a (4) with all b (2); device/platform.cuh
// says which lane holds what.
void multiply_fragments(float* acc, const std::uint32_t* a, const std::uint32_t* b);
void multiply_fragments(std::int32_t* acc, const std::uint32_t* a, const std::uint32_t* b,
                        Unsigned codes);

}  // namespace duplex::simt
