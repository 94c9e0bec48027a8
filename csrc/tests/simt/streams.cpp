#include "tests/simt/streams.h"

#include <exception>
#include <memory>
#include <random>
#include <utility>

#include "tests/simt/block.h"
#include "tests/simt/fibers.h"
#include "tests/simt/order.h"
#include "tests/simt/system_memory.h"

namespace duplex::simt {
namespace {

// How fast stores happen: all at once, half of them, or a few, between two pieces.
constexpr std::uint32_t kDrains[] = {1, 2, 30};
constexpr std::uint32_t kOneLateIn = 400;  // pieces
constexpr std::uint32_t kLateSteps = 600;  // at most

// Blocks that have ended, whose fibres can be used again.
thread_local std::vector<std::unique_ptr<Block>> idle;

struct Stream {
  Stream(const std::function<void()>& of, int number) : program(of), fiber(number), index(number) {}
  const std::function<void()>& program;
  Fiber fiber;
  int index;
  int launch = 0;
  bool has_ended = false;
  std::exception_ptr error;
  std::vector<std::unique_ptr<Block>> running;
  std::uint64_t late_until = 0;
  LaunchOrder order;
};

class Streams final : public Runner {
 public:
  Streams(const std::vector<std::function<void()>>& programs, std::uint32_t seed)
      : memory_(seed), random_(seed), drain_(kDrains[random_() % std::size(kDrains)]) {
    for (const auto& program : programs)
      streams_.push_back(std::make_unique<Stream>(program, static_cast<int>(streams_.size())));
    set_runner(this);
  }
  ~Streams() override { set_runner(nullptr); }
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;

  void run() {
    const Unseen unseen;
    for (auto& stream : streams_) {
      stream->fiber.start(&Streams::run_program, stream.get());
      release(stream.get());
      go_on(*stream);
    }
    std::vector<Stream*> left;
    for (;;) {
      left.clear();
      for (auto& stream : streams_)
        if (!stream->has_ended) left.push_back(stream.get());
      if (left.empty()) break;
      memory_.step();
      Stream& stream = *left[random_() % left.size()];
      if (stream.late_until <= memory_.clock()) step(stream);
      memory_.drain(drain_);
    }
    for (auto& stream : streams_) acquire(stream.get());
  }

  // A launch: from inside a program.
  void run(const LaunchShape& shape, void (*call)(const void*), const void* context) override {
    Stream& stream = *current_;
    stream.order.begin_launch();
    begin(stream, shape, call, context);
    stream.fiber.suspend();
    stream.order.wait_for_all();
  }

 private:
  void begin(Stream& stream, const LaunchShape& shape, void (*call)(const void*),
             const void* context) {
    const Unseen unseen;
    ++stream.launch;
    const std::int64_t n_blocks = shape.grid[0] * shape.grid[1] * shape.grid[2];
    for (std::int64_t i = 0; i < n_blocks; ++i) {
      if (idle.empty()) idle.push_back(std::make_unique<Block>());
      stream.running.push_back(std::move(idle.back()));
      idle.pop_back();
      stream.running.back()->begin(shape, i, call, context, static_cast<std::uint32_t>(random_()));
    }
  }
  static void run_program(void* argument) {
    auto& stream = *static_cast<Stream*>(argument);
    acquire(&stream);
    std::exception_ptr error;
    try {
      stream.program();
    } catch (...) {
      error = std::current_exception();
    }
    release(&stream);
    const Unseen unseen;
    stream.error = error;
    stream.has_ended = true;
  }
  void go_on(Stream& stream) {
    current_ = &stream;
    stream.fiber.resume();
    if (stream.error != nullptr) std::rethrow_exception(stream.error);
  }
  void step(Stream& stream) {
    if (random_() % kOneLateIn == 0) stream.late_until = memory_.clock() + random_() % kLateSteps;
    memory_.set_launch(stream.index, stream.launch);
    auto& chosen = stream.running[random_() % stream.running.size()];
    {
      const InLaunchOrder in_order(stream.order);
      if (chosen->pass(random_() % 4 == 0)) return;
    }
    idle.push_back(std::move(chosen));
    chosen = std::move(stream.running.back());
    stream.running.pop_back();
    if (stream.running.empty()) go_on(stream);
  }

  PendingStores memory_;
  std::mt19937 random_;
  std::uint32_t drain_;
  std::vector<std::unique_ptr<Stream>> streams_;
  Stream* current_ = nullptr;
};

}  // namespace

void run_streams(const std::vector<std::function<void()>>& programs, std::uint32_t seed) {
  Streams(programs, seed).run();
}

}  // namespace duplex::simt
