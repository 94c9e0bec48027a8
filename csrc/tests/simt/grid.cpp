#include "tests/simt/grid.h"

#include <algorithm>
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

#include "tests/simt/block.h"
#include "tests/simt/machine.h"
#include "tests/simt/order.h"
#include "tests/simt/report.h"

namespace duplex::simt {
namespace {

constexpr std::size_t kCopyBytes = 16;

thread_local Machine* current_machine = nullptr;  // of a block among others
thread_local Runner* current_runner = nullptr;
thread_local LaunchOrder* current_launch_order = nullptr;

Thread& current_thread() { return const_cast<Thread&>(static_cast<const Thread&>(*current_place)); }

std::vector<std::int64_t> in_order(std::int64_t n, Order order) {
  std::vector<std::int64_t> indices(static_cast<std::size_t>(n));
  std::iota(indices.begin(), indices.end(), std::int64_t{0});
  if (order == Order::kReverse) std::reverse(indices.begin(), indices.end());
  return indices;
}

}  // namespace

Machine& machine() {
  if (current_machine != nullptr) return *current_machine;
  static thread_local Machine instance;
  return instance;
}

std::vector<std::int64_t> order_of_blocks(const LaunchShape& shape, std::uint32_t seed) {
  const Order order = current_schedule().order;
  std::vector<std::int64_t> blocks = in_order(shape.grid[0] * shape.grid[1] * shape.grid[2], order);
  std::mt19937 random(seed);
  if (order == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

void Machine::arrange(std::vector<std::int64_t>& order) {
  if (schedule_.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
}

void Machine::begin_launch(const LaunchShape& shape, void (*call)(const void*), const void* context,
                           std::uint32_t seed) {
  check_shape(shape);
  shape_ = shape;
  call_ = call;
  context_ = context;
  n_threads_ = shape.n_threads;
  random_.seed(seed);
  make_threads();
}

void Machine::make_threads() {
  while (threads_.size() < static_cast<std::size_t>(n_threads_))
    threads_.push_back(std::make_unique<Thread>(static_cast<int>(threads_.size())));
}

void Machine::run(const LaunchShape& shape, void (*call)(const void*), const void* context,
                  const std::vector<std::int64_t>& elsewhere) {
  if (is_running_) throw std::logic_error("a kernel launches " + describe(shape));
  const Schedule wanted = current_schedule();
  if (wanted != schedule_) n_launches_ = 0;
  schedule_ = wanted;
  // Every launch in another order.
  begin_launch(shape, call, context, schedule_.seed + n_launches_++);
  is_running_ = true;
  try {
    for (const std::int64_t block : order_of_blocks(shape, static_cast<std::uint32_t>(random_()))) {
      if (std::find(elsewhere.begin(), elsewhere.end(), block) != elsewhere.end()) continue;
      DUPLEX_TSAN(std::swap(threads_, others_); make_threads();)
      begin_block(block);
      while (pass(false)) {
      }
    }
  } catch (...) {
    threads_.clear();  // their calls are in the middle of something
    is_running_ = false;
    throw;
  }
  is_running_ = false;
}

void Machine::start(std::byte* shared) {
  n_live_ = n_threads_;
  n_at_barrier_ = 0;
  n_barriers_ = 0;
  const auto [nx, ny, nz] = shape_.grid;
  const std::int64_t x = index_ % nx, y = index_ / nx % ny, z = index_ / (nx * ny);
  for (int i = 0; i < n_threads_; ++i) {
    Thread& thread = *threads_[static_cast<std::size_t>(i)];
    static_cast<Place&>(thread) = {
        i, n_threads_, {static_cast<int>(x), static_cast<int>(y), static_cast<int>(z)}, shared};
    thread.wait = Wait::kNothing;
    thread.copies.clear();
    thread.n_groups = 0;
    thread.has_waited = false;
    thread.fiber.start(&Machine::run_thread, &thread);
  }
}

void Machine::begin_block(std::int64_t index) {
  index_ = index;
  ++n_blocks_;
  shared_.emplace(shape_.shared_bytes);
  start(shared_->data());
  turns_ = in_order(n_threads_, schedule_.order);
}

bool Machine::pass(bool skip) {
  arrange(turns_);
  bool has_moved = false;
  for (std::size_t at = 0; at < turns_.size(); at = next_turn(at)) {
    Thread& thread = *threads_[static_cast<std::size_t>(turns_[at])];
    if (thread.wait == Wait::kTurn) thread.wait = Wait::kNothing;
    if (thread.wait != Wait::kNothing) continue;
    has_moved = true;
    if (skip && random_() % 2 == 0) continue;
    current_place = &thread;
    thread.fiber.resume();
    current_place = nullptr;
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }
  if (n_live_ == 0) {
    if (!shared_->is_intact())
      throw std::logic_error(describe(shape_, index_) +
                             ": a thread wrote outside the shared memory");
    return false;
  }
  if (has_moved) return true;
  const auto stands = [](const auto& thread) { return thread->wait == Wait::kGrid; };
  if (is_held_ && std::any_of(threads_.begin(), threads_.begin() + n_threads_, stands))
    return false;
  std::vector<Wait> waits;
  for (int i = 0; i < n_threads_; ++i) waits.push_back(threads_[static_cast<std::size_t>(i)]->wait);
  throw std::logic_error(describe_deadlock(shape_, index_, waits));
}

// In a fixed order a warp goes on for as long as it can before another begins, so that one is as
// far ahead of the others as barriers let it; at random they stay side by side.
std::size_t Machine::next_turn(std::size_t at) const {
  const auto warp_of = [&](std::size_t i) { return turns_[i] / kWarpLanes; };
  const std::size_t next = at + 1;
  const bool is_last = next == turns_.size() || warp_of(next) != warp_of(at);
  if (schedule_.order == Order::kRandom || !is_last) return next;
  std::size_t first = at;
  while (first > 0 && warp_of(first - 1) == warp_of(at)) --first;
  for (std::size_t i = first; i < next; ++i)
    if (threads_[static_cast<std::size_t>(turns_[i])]->wait == Wait::kNothing) return first;
  return next;
}

void Machine::run_thread(void* thread) {
  Machine& self = machine();
  launch_order().begin_thread(self.shape_.is_early);
  std::exception_ptr error;
  try {
    self.call_(self.context_);
  } catch (...) {
    error = std::current_exception();
  }
  launch_order().end_thread();
  const Unseen unseen;
  if (error != nullptr) self.error_ = error;
  self.end(*static_cast<Thread*>(thread));
}

void Machine::end(Thread& thread) noexcept {
  if (shape_.is_early && !thread.has_waited && error_ == nullptr)
    error_ = std::make_exception_ptr(
        std::logic_error(describe(shape_, index_) + ": thread " + std::to_string(thread.thread) +
                         " has returned without wait_for_previous_grid()"));
  thread.wait = Wait::kReturned;
  --n_live_;
  release_barrier();
}

// As with __syncthreads, threads that have returned are not waited for.
DUPLEX_UNSEEN void Machine::release_barrier() noexcept {
  if (n_at_barrier_ == 0 || n_at_barrier_ < n_live_) return;
  n_at_barrier_ = 0;
  ++n_barriers_;
  for (int i = 0; i < n_threads_; ++i) {
    Wait& wait = threads_[static_cast<std::size_t>(i)]->wait;
    if (wait == Wait::kBarrier) wait = Wait::kNothing;
  }
}

// note: the last to arrive suspends too, so that the order decides who goes on first.
DUPLEX_UNSEEN void Machine::sync_block(Thread& thread) {
  const char* const place =
      &barriers_[2 * (n_blocks_ % 2) + static_cast<unsigned>(n_barriers_ % 2)];
  simt::release(place);
  thread.wait = Wait::kBarrier;
  ++n_at_barrier_;
  release_barrier();
  thread.fiber.suspend();
  acquire(place);
}

DUPLEX_UNSEEN void Machine::wait_for_previous_grid(Thread& thread) {
  thread.has_waited = true;
  if (is_held_) {
    thread.wait = Wait::kGrid;
    thread.fiber.suspend();
  }
  launch_order().wait_for_previous_grid();
}

void Machine::release() {
  is_held_ = false;
  for (const auto& thread : threads_)
    if (thread->wait == Wait::kGrid) thread->wait = Wait::kNothing;
}

DUPLEX_UNSEEN void Machine::yield(Thread& thread) {
  thread.wait = Wait::kTurn;
  thread.fiber.suspend();
}

// The last lane to arrive works for all. Lanes that never arrive leave the others waiting; that is
// found, and said, when nobody can go on.
// note: shuffles and products put no memory in order.
DUPLEX_UNSEEN void Machine::meet_warp(Thread& thread, Wait kind) {
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
  const Unseen unseen;
  return schedule_.order == Order::kForward ||
         (schedule_.order == Order::kRandom && random_() % 2 == 0);
}

// ---- blocks among others

Block::Block() : machine_(std::make_unique<Machine>()) {}
Block::~Block() = default;

void Block::begin(const LaunchShape& shape, std::int64_t index, void (*call)(const void*),
                  const void* context, std::uint32_t seed) {
  machine_->set_schedule({Order::kRandom});
  machine_->begin_launch(shape, call, context, seed);
  machine_->begin_block(index);
}

bool Block::pass(bool skip) {
  current_machine = machine_.get();
  const struct Current {
    explicit Current(Machine* machine) { current_machine = machine; }
    ~Current() { current_machine = nullptr; }
  } current(machine_.get());
  return machine_->pass(skip);
}

void Block::begin_early(const LaunchShape& shape, std::int64_t index, void (*call)(const void*),
                        const void* context, std::uint32_t seed) {
  machine_->set_schedule(current_schedule());
  machine_->begin_launch(shape, call, context, seed);
  machine_->hold();
  machine_->begin_block(index);
  while (pass(false)) {
  }
}

void Block::end() {
  machine_->release();
  while (pass(false)) {
  }
}

void set_runner(Runner* runner) { current_runner = runner; }
bool has_runner() { return current_runner != nullptr; }

InLaunchOrder::InLaunchOrder(LaunchOrder& order) { current_launch_order = &order; }
InLaunchOrder::~InLaunchOrder() { current_launch_order = nullptr; }
LaunchOrder& launch_order() {
  if (current_launch_order != nullptr) return *current_launch_order;
  static thread_local LaunchOrder own;
  return own;
}

Origin origin() { return {&machine(), current_thread().thread, machine().n_barriers()}; }

constinit thread_local const Place* current_place = nullptr;

void run_grid(const LaunchShape& shape, void (*call)(const void*), const void* context) {
  if (current_runner != nullptr && current_place == nullptr)
    return current_runner->run(shape, call, context);
  const Unseen unseen;
  launch_order().begin_launch();
  machine().run(shape, call, context, {});
  launch_order().wait_for_all();
}

void sync_block() { machine().sync_block(current_thread()); }

void wait_for_previous_grid() { machine().wait_for_previous_grid(current_thread()); }

void yield() { machine().yield(current_thread()); }
void copy_async(void* shared, const void* global) {
  const auto is_aligned = [](const void* address) {
    return reinterpret_cast<std::uintptr_t>(address) % kCopyBytes == 0;
  };
  if (!is_aligned(shared) || !is_aligned(global))
    throw std::logic_error("copy_async: expected addresses that are multiples of 16");
  Thread& thread = current_thread();
  if (!machine().copies_late()) {
    std::memcpy(shared, global, kCopyBytes);
    return;
  }
  const Unseen unseen;
  thread.copies.push_back({shared, global, thread.n_groups});
}

void prefetch(const void* address, std::uint32_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0 || bytes % 16 != 0 || bytes == 0)
    throw std::logic_error("prefetch: expected multiples of 16 bytes");
  volatile const auto* const memory = static_cast<const std::byte*>(address);
  (void)memory[0];  // it must be there
  (void)memory[bytes - 1];
}

DUPLEX_UNSEEN void commit_copies() { ++current_thread().n_groups; }

void wait_copies(int n_pending) {
  Thread& thread = current_thread();
  std::deque<Copy>& copies = thread.copies;
  while (!copies.empty() && copies.front().group < thread.n_groups - n_pending) {
    std::memcpy(copies.front().to, copies.front().from, kCopyBytes);
    const Unseen unseen;
    copies.pop_front();
  }
}

DUPLEX_UNSEEN float shuffle(Wait kind, float value, int argument, int width) {
  Thread& thread = current_thread();
  thread.exchange.value = value;
  thread.exchange.argument = argument;
  thread.exchange.width = width;
  machine().meet_warp(thread, kind);
  return thread.exchange.value;
}

namespace {

DUPLEX_UNSEEN void meet_for_product(Wait kind, Thread& thread, const std::uint32_t* a,
                                    const std::uint32_t* b) {
  for (int i = 0; i < 4; ++i) thread.exchange.a[i] = a[i];
  for (int i = 0; i < 2; ++i) thread.exchange.b[i] = b[i];
  machine().meet_warp(thread, kind);
}

}  // namespace

DUPLEX_UNSEEN void multiply_fragments(float* acc, const std::uint32_t* a, const std::uint32_t* b) {
  Thread& thread = current_thread();
  thread.exchange.acc = acc;
  meet_for_product(Wait::kProduct, thread, a, b);
}

DUPLEX_UNSEEN void multiply_fragments(std::int32_t* acc, const std::uint32_t* a,
                                      const std::uint32_t* b, Unsigned codes) {
  Thread& thread = current_thread();
  thread.exchange.integer_acc = acc;
  thread.exchange.codes = codes;
  meet_for_product(Wait::kIntegerProduct, thread, a, b);
}

}  // namespace duplex::simt
