// The explorer itself, on protocols whose outcomes are known.
#include "tests/parallel/explorer.h"

#include <catch2/catch.hpp>
#include <stdexcept>

namespace duplex::model {
namespace {

// Each stores to a variable of its own, then loads the other's: at least one must see the other's
// store, unless its own waits in the buffer. Who saw nothing adds 1.
Protocol store_buffering(Order order) {
  Protocol protocol{{"x", "y", "blind"}, {}, true, {}};
  for (std::size_t i = 0; i < 2; ++i) {
    protocol.processes.push_back({"process " + std::to_string(i),
                                  {{"stores", [=](Actor& a) { a.store(i, 1, order); }},
                                   {"loads",
                                    [=](Actor& a) {
                                      if (a.load(1 - i) != 0) a.end();
                                    }},
                                   {"saw nothing", [](Actor& a) {
                                      if (a.add(2, 1) == 1) a.violate("neither saw the other");
                                      a.end();
                                    }}}});
  }
  return protocol;
}

// One process stores data and a flag, the other loads the flag and then the data.
Protocol message(Order order) {
  Protocol protocol{{"data", "flag"}, {}, true, {}};
  protocol.processes.push_back(
      {"writer",
       {{"data", [](Actor& a) { a.store(0, 7, Order::kRelaxed); }}, {"flag", [=](Actor& a) {
                                                                       a.store(1, 1, order);
                                                                       a.end();
                                                                     }}}});
  protocol.processes.push_back({"reader",
                                {{"flag",
                                  [](Actor& a) {
                                    if (a.load(1) == 0) a.wait();
                                  }},
                                 {"data", [](Actor& a) {
                                    if (a.load(0) != 7) a.violate("the data was not there");
                                    a.end();
                                  }}}});
  return protocol;
}

// Each takes two locks, in this order of its own.
Protocol locks(bool is_same_order) {
  Protocol protocol{{"lock 0", "lock 1"}, {}, true, {}};
  for (std::size_t i = 0; i < 2; ++i) {
    const std::size_t first = is_same_order ? 0 : i;
    const auto take = [](std::size_t lock) {
      return [=](Actor& a) {
        if (a.add(lock, 1) != 0) a.wait();
      };
    };
    const auto release = [](std::size_t lock) {
      return [=](Actor& a) { a.store(lock, 0, Order::kRelease); };
    };
    protocol.processes.push_back({"process " + std::to_string(i),
                                  {{"takes", take(first)},
                                   {"takes the other", take(1 - first)},
                                   {"releases the other", release(1 - first)},
                                   {"releases", release(first)},
                                   {"ends", [](Actor& a) { a.end(); }}}});
  }
  return protocol;
}

TEST_CASE("a release store keeps the data before it, a relaxed one does not", "[parallel]") {
  CHECK(explore(message(Order::kRelease)).error == "");
  CHECK(explore(message(Order::kSeqCst)).error == "");
  const Report report = explore(message(Order::kRelaxed));
  CHECK(report.error == "the data was not there");
  const std::vector<std::string> trace = {"writer: data", "writer: flag", "writer: flag becomes 1",
                                          "reader: flag", "reader: data"};
  CHECK(report.trace == trace);
}

TEST_CASE("a release store can come after a later load", "[parallel]") {
  CHECK(explore(store_buffering(Order::kSeqCst)).error == "");
  CHECK(explore(store_buffering(Order::kRelease)).error == "neither saw the other");
  Protocol strong = store_buffering(Order::kRelaxed);
  strong.is_weak = false;
  CHECK(explore(strong).error == "");
}

TEST_CASE("locks that are taken in two orders are a deadlock", "[parallel]") {
  CHECK(explore(locks(true)).error == "");
  const Report report = explore(locks(false));
  CHECK(report.error == "the processes cannot all end");
  CHECK(report.is_whole);
  CHECK(report.trace == std::vector<std::string>{"process 0: takes", "process 1: takes"});
}

TEST_CASE("a process that may die holds what it held", "[parallel]") {
  Protocol protocol = locks(true);
  protocol.processes[0].may_die = true;
  const Report report = explore(protocol);
  CHECK(report.error == "the processes cannot all end");
  CHECK(report.trace.back() == "process 0: dies");
}

TEST_CASE("what is no protocol is refused", "[parallel]") {
  Protocol protocol{{"x"}, {}, true, {}};
  protocol.processes.push_back({"greedy", {{"both", [](Actor& a) {
                                              a.load(0);
                                              a.load(0);
                                            }}}});
  CHECK_THROWS_AS(explore(protocol), std::logic_error);
  protocol.processes[0].steps = {{"lost", [](Actor& a) { a.go_to("nowhere"); }}};
  CHECK_THROWS_AS(explore(protocol), std::logic_error);
  protocol.processes[0].steps = {{"last", [](Actor& a) { a.load(0); }}};
  CHECK_THROWS_AS(explore(protocol), std::logic_error);
}

}  // namespace
}  // namespace duplex::model
