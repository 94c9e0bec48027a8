#include "tests/simt/grid.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "tests/simt/fibers.h"
#include "tests/simt/report.h"
#include "tests/simt/warp.h"

namespace duplex::simt {
namespace {

// Bytes around the shared memory that must stay as they are. AddressSanitizer knows its end to the
// byte, so there the memory is taken alone.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::ptrdiff_t kGuardBytes = 0;
#else
constexpr std::ptrdiff_t kGuardBytes = 256;
#endif
constexpr auto kGuard = std::byte{0xc5};
constexpr auto kUnwritten = std::byte{0xff};  // NaN in float32 and bfloat16

struct Schedule {
  Order order = Order::kForward;
  std::uint16_t generation = 0;  // counts calls of set_order
  std::uint32_t seed = 0;
  bool operator==(const Schedule&) const = default;
};

Schedule schedule_of_environment() {
  const char* const value = std::getenv("DUPLEX_SIMT_ORDER");
  const std::string text = value == nullptr ? "forward" : value;
  if (text == "forward") return {};
  if (text == "reverse") return {Order::kReverse};
  char* end = nullptr;
  const std::string prefix = "random:";
  if (text.starts_with(prefix) && text.size() > prefix.size()) {
    const unsigned long seed = std::strtoul(text.c_str() + prefix.size(), &end, 10);
    if (*end == '\0') return {Order::kRandom, 0, static_cast<std::uint32_t>(seed)};
  }
  throw std::logic_error("DUPLEX_SIMT_ORDER: expected forward, reverse or random:<seed>, found '" +
                         text + "'");
}

std::atomic<Schedule>& schedule() {
  static std::atomic<Schedule> value{schedule_of_environment()};
  return value;
}

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

constexpr std::size_t kCopyBytes = 16;
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
};

// The GPU of one system thread.
class Machine {
 public:
  void run(const LaunchShape& shape, void (*call)(const void*), const void* context);

  void sync_block(Thread& thread);
  void meet_warp(Thread& thread, Wait kind);
  bool copies_late();

 private:
  void run_block(const LaunchShape& shape, std::int64_t index);
  void start(const LaunchShape& shape, std::int64_t index, std::byte* shared);
  static void run_thread(void* thread);
  void end(Thread& thread) noexcept;
  void release_barrier() noexcept;
  void arrange(std::vector<std::int64_t>& order);

  void (*call_)(const void*) = nullptr;
  const void* context_ = nullptr;
  bool is_running_ = false;
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as any launch had
  int n_threads_ = 0;                             // of this launch
  int n_live_ = 0;
  int n_at_barrier_ = 0;
  std::exception_ptr error_;
  Schedule schedule_;
  std::uint32_t n_launches_ = 0;
  std::mt19937 random_;
};

Machine& machine() {
  static thread_local Machine instance;
  return instance;
}

Thread& current_thread() { return const_cast<Thread&>(static_cast<const Thread&>(*current_place)); }

void Machine::arrange(std::vector<std::int64_t>& order) {
  if (schedule_.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
}

std::vector<std::int64_t> in_order(std::int64_t n, Order order) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(n));
  std::iota(indices.begin(), indices.end(), std::int64_t{0});
  if (order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  return indices;
}

void Machine::run(const LaunchShape& shape, void (*call)(const void*), const void* context) {
  check_shape(shape);
  if (is_running_) throw std::logic_error("a kernel launches " + describe(shape));
  call_ = call;
  context_ = context;
  n_threads_ = shape.n_threads;
  const Schedule wanted = schedule().load();
  if (wanted != schedule_) n_launches_ = 0;
  schedule_ = wanted;
  random_.seed(schedule_.seed + n_launches_++);  // every launch in another order
  while (threads_.size() < static_cast<std::size_t>(n_threads_))
    threads_.push_back(std::make_unique<Thread>(static_cast<int>(threads_.size())));
  is_running_ = true;
  try {
    std::vector<std::int64_t> blocks =
        in_order(shape.grid[0] * shape.grid[1] * shape.grid[2], schedule_.order);
    arrange(blocks);
    for (const std::int64_t block : blocks) run_block(shape, block);
  } catch (...) {
    threads_.clear();  // their calls are in the middle of something
    is_running_ = false;
    throw;
  }
  is_running_ = false;
}

void Machine::start(const LaunchShape& shape, std::int64_t index, std::byte* shared) {
  n_live_ = n_threads_;
  n_at_barrier_ = 0;
  const std::int64_t x = index % shape.grid[0], y = index / shape.grid[0] % shape.grid[1];
  const std::int64_t z = index / shape.grid[0] / shape.grid[1];
  for (int i = 0; i < n_threads_; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    static_cast<Place&>(thread) = {
        i, n_threads_, {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)}, shared};
    thread.wait = Wait::kNothing;
    thread.copies.clear();
    thread.n_groups = 0;
    thread.fiber.start(&Machine::run_thread, &thread);
  }
}

void Machine::run_block(const LaunchShape& shape, std::int64_t index) {
  SharedMemory shared(shape.shared_bytes);
  start(shape, index, shared.data());
  std::vector<std::int64_t> order = in_order(n_threads_, schedule_.order);
  while (n_live_ > 0) {
    arrange(order);
    bool has_moved = false;
    for (const std::int64_t i : order) {
      Thread& thread = *threads_[static_cast<std::size_t>(i)];
      if (thread.wait != Wait::kNothing) continue;
      has_moved = true;
      current_place = &thread;
      thread.fiber.resume();
      current_place = nullptr;
      if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
    }
    if (has_moved) continue;
    std::vector<Wait> waits;
    for (int i = 0; i < n_threads_; ++i)
      waits.push_back(threads_[static_cast<std::size_t>(i)]->wait);
    throw std::logic_error(describe_deadlock(shape, index, waits));
  }
  if (!shared.is_intact())
    throw std::logic_error(describe(shape, index) + ": a thread wrote outside the shared memory");
}

void Machine::run_thread(void* thread) {
  Machine& self = machine();
  try {
    self.call_(self.context_);
  } catch (...) {
    self.error_ = std::current_exception();
  }
  self.end(*static_cast<Thread*>(thread));
}

void Machine::end(Thread& thread) noexcept {
  thread.wait = Wait::kReturned;
  --n_live_;
  release_barrier();
}

// As with __syncthreads, threads that have returned are not waited for.
void Machine::release_barrier() noexcept {
  if (n_at_barrier_ == 0 || n_at_barrier_ < n_live_) return;
  n_at_barrier_ = 0;
  for (int i = 0; i < n_threads_; ++i) {
    Wait& wait = threads_[static_cast<std::size_t>(i)]->wait;
    if (wait == Wait::kBarrier) wait = Wait::kNothing;
  }
}

// note: the last to arrive suspends too, so that the order decides who goes on first.
void Machine::sync_block(Thread& thread) {
  thread.wait = Wait::kBarrier;
  ++n_at_barrier_;
  release_barrier();
  thread.fiber.suspend();
}

// The last lane to arrive works for all. Lanes that never arrive leave the others waiting; that is
// found, and said, when nobody can go on.
void Machine::meet_warp(Thread& thread, Wait kind) {
  thread.wait = kind;
  const int first = thread.thread / kWarpLanes * kWarpLanes;
  Exchange* lanes[kWarpLanes];
  int n_here = 0;
  for (int lane = 0; lane < kWarpLanes && first + lane < n_threads_; ++lane) {
    Thread& other = *threads_[static_cast<std::size_t>(first + lane)];
    lanes[lane] = &other.exchange;
    n_here += other.wait == kind;
  }
  if (n_here == kWarpLanes) {
    exchange_lanes(kind, lanes);
    for (int lane = 0; lane < kWarpLanes; ++lane)
      threads_[static_cast<std::size_t>(first + lane)]->wait = Wait::kNothing;
  }
  thread.fiber.suspend();
}

bool Machine::copies_late() {
  return schedule_.order == Order::kForward ||
         (schedule_.order == Order::kRandom && random_() % 2 == 0);
}

}  // namespace

constinit thread_local const Place* current_place = nullptr;

void set_order(Order order, std::uint32_t seed) {
  const auto generation = static_cast<std::uint16_t>(schedule().load().generation + 1);
  schedule().store({order, generation, seed});
}

Order current_order() { return schedule().load().order; }
std::uint32_t current_seed() { return schedule().load().seed; }

void run_grid(const LaunchShape& shape, void (*call)(const void*), const void* context) {
  machine().run(shape, call, context);
}

void sync_block() { machine().sync_block(current_thread()); }

void copy_async(void* shared, const void* global) {
  const auto is_aligned = [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % kCopyBytes == 0;
  };
  if (!is_aligned(shared) || !is_aligned(global))
    throw std::logic_error("copy_async: expected addresses that are multiples of 16");
  Thread& thread = current_thread();
  if (machine().copies_late())
    thread.copies.push_back({shared, global, thread.n_groups});
  else
    std::memcpy(shared, global, kCopyBytes);
}

void commit_copies() { ++current_thread().n_groups; }

void wait_copies(int n_pending) {
  Thread& thread = current_thread();
  std::deque<Copy>& copies = thread.copies;
  for (; !copies.empty() && copies.front().group < thread.n_groups - n_pending; copies.pop_front())
    std::memcpy(copies.front().to, copies.front().from, kCopyBytes);
}

float shuffle(Wait kind, float value, int argument, int width) {
  Thread& thread = current_thread();
  thread.exchange.value = value;
  thread.exchange.argument = argument;
  thread.exchange.width = width;
  machine().meet_warp(thread, kind);
  return thread.exchange.value;
}

void multiply_fragments(float* acc, const std::uint32_t* a, const std::uint32_t* b) {
  Thread& thread = current_thread();
  thread.exchange.acc = acc;
  std::copy_n(a, 4, thread.exchange.a);
  std::copy_n(b, 2, thread.exchange.b);
  machine().meet_warp(thread, Wait::kProduct);
}

}  // namespace duplex::simt
