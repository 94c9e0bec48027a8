#include "backend/cpu/background_thread.h"

#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <stdexcept>
#include <thread>

#include "backend/registry.h"

using namespace duplex;

namespace {

int nice_of_this_thread() { return getpriority(PRIO_PROCESS, static_cast<id_t>(gettid())); }

}  // namespace

TEST_CASE("background work has a thread of its own, with a smaller share", "[backend][threads]") {
  BackgroundThread background;
  std::thread::id first, second;
  int nice = 0;
  background.run([&] {
    first = std::this_thread::get_id();
    nice = nice_of_this_thread();
  });
  background.run([&] { second = std::this_thread::get_id(); });
  CHECK(first != std::this_thread::get_id());
  CHECK(first == second);
  CHECK(nice == std::min(nice_of_this_thread() + 19, 19));
}

TEST_CASE("what background work throws reaches its caller, and the thread goes on",
          "[backend][threads]") {
  BackgroundThread background;
  CHECK_THROWS_WITH(background.run([] { throw std::runtime_error("no room"); }), "no room");
  int done = 0;
  for (int i = 0; i < 1000; ++i) background.run([&] { ++done; });
  CHECK(done == 1000);
}

TEST_CASE("only a background lane of the CPU leaves its caller's thread", "[backend][threads]") {
  const auto backend = create_backend("cpu", {.n_threads = 2, .isa = {}});
  const auto background = backend->background_lane();
  std::thread::id interaction_thread, background_thread;
  backend->run_awake([&] { interaction_thread = std::this_thread::get_id(); });
  background->run_awake([&] { background_thread = std::this_thread::get_id(); });
  CHECK(interaction_thread == std::this_thread::get_id());
  CHECK(background_thread != std::this_thread::get_id());
  CHECK_THROWS_AS(background->run_awake([] { throw std::runtime_error("x"); }), std::runtime_error);
  std::atomic<bool> is_done{false};  // the pass that threw has ended: the other lane is not kept
  backend->run_awake([&] { is_done = true; });
  CHECK(is_done);
}
