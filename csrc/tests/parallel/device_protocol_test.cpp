// The protocol of kernels/exchange.cuh as a table of steps, and all its interleavings with stores
// that happen late and in any order: no number lost, none stale, none overwritten before it was
// read, and an end for every rank. Each deliberate fault must be found.
//
// A number is the call's. What a rank sends itself it would find as it does the others', and is
// left out. The warp that empties the buffer of the call before is a process beside the senders; of
// three ranks it would be one too many, there the senders do it, before they send or after.
#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/parallel/explorer.h"

namespace duplex::model {
namespace {

enum class Kind : std::uint8_t { kOneShot, kTwoShot, kSwitch };
enum class Emptying : std::uint8_t { kBeside, kFirst, kAfterSending };
struct Design {
  Kind kind = Kind::kOneShot;
  std::uint8_t n_calls = 6;
  Emptying emptying = Emptying::kBeside;
  // What can be done wrong.
  std::size_t n_buffers = 3;
  bool has_fence = true;
  bool empties = true;
  std::size_t emptied_back = 1;  // calls
  bool waits_for_all = true;
  bool waits_for_signals = true;
  bool signals_first = false;
};

enum Register : std::size_t { kCall, kPeer };

class Ranks {
 public:
  Ranks(std::size_t n_ranks, const Design& design) : n_(n_ranks), design_(design) {
    protocol_.variables.emplace_back("fence");
    if (design.kind == Kind::kSwitch)
      for (std::size_t r = 0; r < n_; ++r) protocol_.variables.push_back("count" + name(r));
    first_part_ = protocol_.variables.size();
    const std::size_t n_places = n_ * (n_ - 1) * 3 * (design.kind == Kind::kOneShot ? 1 : 2);
    for (std::size_t i = 0; i < n_places; ++i) protocol_.variables.push_back("place" + name(i));
    if (design.emptying == Emptying::kBeside) {
      begun_ = protocol_.variables.size();
      for (std::size_t r = 0; r < 2 * n_; ++r) protocol_.variables.push_back("warps" + name(r));
    }
    for (std::size_t r = 0; r < n_; ++r) protocol_.processes.push_back(process(r));
    for (std::size_t r = 0; r < n_ && begun_ > 0; ++r) protocol_.processes.push_back(beside(r));
  }
  Report explored() const { return explore(protocol_); }

 private:
  static std::string name(std::size_t i) { return std::to_string(i); }
  // What rank `from` leaves for rank `to` in the buffer of a call.
  std::size_t place(std::size_t to, std::size_t from, std::size_t call, bool is_sum) const {
    const std::size_t other = from < to ? from : from - 1;
    const std::size_t pair = to * (n_ - 1) + other;
    return first_part_ + (pair * 3 + call % design_.n_buffers) * (1 + (n_parts() > 1)) + is_sum;
  }
  std::size_t n_parts() const { return design_.kind == Kind::kOneShot ? 1 : 2; }

  // For every other rank in turn: does something once; then the next step.
  template <class Fn>
  void for_peers(Process& process, const std::string& step, std::size_t rank, std::size_t n_peers,
                 const Fn& fn) const {
    process.steps.push_back({step, [=](Actor& a) {
                               const std::size_t peer = a.local(kPeer);
                               if (!fn(a, peer < rank ? peer : peer + 1)) return a.wait();
                               const bool is_last = ++a.local(kPeer) == n_peers;
                               if (is_last) a.local(kPeer) = 0;
                               if (!is_last) a.go_to(step);
                             }});
  }
  void add_emptying(Process& process, std::size_t rank) const {
    for (std::size_t part = 0; part < n_parts() && design_.empties; ++part)
      for_peers(process, part == 0 ? "empties" : "empties sums", rank, n_ - 1,
                [=, this](Actor& a, std::size_t peer) {
                  const std::size_t old = a.local(kCall) + 3 * 2 - design_.emptied_back;
                  a.store(place(rank, peer, old, part == 1), 0, Order::kRelaxed);
                  return true;
                });
    if (design_.has_fence) process.steps.push_back({"fence", [](Actor& a) { a.add(0, 0); }});
  }
  void add_sending(Process& process, const std::string& step, std::size_t rank, bool is_sum) const {
    for_peers(process, step, rank, n_ - 1, [=, this](Actor& a, std::size_t peer) {
      a.store(place(peer, rank, a.local(kCall), is_sum), a.local(kCall), Order::kRelaxed);
      return true;
    });
  }
  void add_reading(Process& process, const std::string& step, std::size_t rank, bool is_sum) const {
    const std::size_t n_peers = design_.waits_for_all || is_sum ? n_ - 1 : 1;
    for_peers(process, step, rank, n_peers, [=, this](Actor& a, std::size_t peer) {
      const std::uint8_t found = a.load(place(rank, peer, a.local(kCall), is_sum));
      if (found < a.local(kCall) && found != 0) a.violate("a stale number was read");
      if (found > a.local(kCall)) a.violate("a number was overwritten");
      return found != 0;
    });
  }
  // Every rank stages its numbers where it is itself, counts everywhere, and reads the others'.
  // A staged number is the part of a pair of ranks here: it lies with its owner.
  void add_meeting(Process& process, std::size_t rank) const {
    const auto stage = [&] {
      for_peers(process, "stages", rank, n_ - 1, [=, this](Actor& a, std::size_t peer) {
        a.store(place(rank, peer, a.local(kCall), false), a.local(kCall), Order::kRelaxed);
        return true;
      });
    };
    if (!design_.signals_first) stage();
    for (std::size_t r = 0; r < n_; ++r)
      process.steps.push_back({"counts at " + name(r), [r](Actor& a) { a.add(1 + r, 1); }});
    if (design_.signals_first) stage();
    if (design_.waits_for_signals)
      process.steps.push_back({"waits for the counts", [=, this](Actor& a) {
                                 if (a.load(1 + rank) < n_ * a.local(kCall)) a.wait();
                               }});
    for_peers(process, "reads what others staged", rank, n_ - 1,
              [=, this](Actor& a, std::size_t peer) {
                if (a.load(place(peer, rank, a.local(kCall), false)) != a.local(kCall))
                  a.violate("a stale number was read");
                return true;
              });
  }
  Process process(std::size_t rank) const {
    Process process{"rank " + name(rank), {}};
    process.steps.push_back({"begins", [=, this](Actor& a) {
                               ++a.local(kCall);
                               if (begun_ > 0)
                                 a.store(begun_ + rank, a.local(kCall), Order::kRelaxed);
                             }});
    if (design_.emptying == Emptying::kFirst) add_emptying(process, rank);
    if (design_.kind == Kind::kSwitch) {
      add_meeting(process, rank);
    } else {
      add_sending(process, "sends", rank, false);
      if (design_.emptying == Emptying::kAfterSending) add_emptying(process, rank);
      add_reading(process, "reads", rank, false);
    }
    if (design_.kind != Kind::kOneShot) {
      add_sending(process, "sends sums", rank, true);
      add_reading(process, "reads sums", rank, true);
    }
    if (begun_ > 0)
      process.steps.push_back({"meets the other warp", [=, this](Actor& a) {
                                 if (a.load(begun_ + n_ + rank) < a.local(kCall)) a.wait();
                               }});
    process.steps.push_back({"ends", [n = design_.n_calls](Actor& a) {
                               if (a.local(kCall) == n) return a.end();
                               a.go_to("begins");
                             }});
    return process;
  }

  // The warp that empties: from the beginning of a call to its end.
  Process beside(std::size_t rank) const {
    Process process{"warp of rank " + name(rank), {}};
    process.steps.push_back({"begins", [=, this](Actor& a) {
                               if (a.load(begun_ + rank) <= a.local(kCall)) return a.wait();
                               ++a.local(kCall);
                             }});
    add_emptying(process, rank);
    process.steps.push_back({"has emptied", [=, this](Actor& a) {
                               a.store(begun_ + n_ + rank, a.local(kCall), Order::kRelaxed);
                             }});
    process.steps.push_back({"ends", [n = design_.n_calls](Actor& a) {
                               if (a.local(kCall) == n) return a.end();
                               a.go_to("begins");
                             }});
    return process;
  }

  std::size_t n_;
  Design design_;
  std::size_t first_part_ = 0;
  std::size_t begun_ = 0;  // calls that the senders have begun, then those that the warps have done
  Protocol protocol_;
};

void check_right(std::size_t n_ranks, const Design& design, std::size_t at_least) {
  const Report report = Ranks(n_ranks, design).explored();
  CAPTURE(n_ranks, report.trace, report.n_states);
  CHECK(report.error.empty());
  CHECK(report.is_whole);
  CHECK(report.n_states >= at_least);
}

TEST_CASE("exchanges between GPUs are right in every interleaving", "[parallel]") {
  for (const Kind kind : {Kind::kOneShot, Kind::kTwoShot, Kind::kSwitch})
    check_right(2, {kind, 7}, 5000);
  for (const Emptying emptying : {Emptying::kFirst, Emptying::kAfterSending})
    check_right(3, {Kind::kOneShot, 4, emptying}, 5000);
}

std::string error_of(std::size_t n_ranks, const Design& design) {
  return Ranks(n_ranks, design).explored().error;
}

TEST_CASE("a fault in the exchanges between GPUs is found", "[parallel]") {
  const Kind kind = GENERATE(Kind::kOneShot, Kind::kTwoShot, Kind::kSwitch);
  Design design{kind, 4};
  if (kind != Kind::kTwoShot) {  // the same, in ten times as many states
    SECTION("no fence") { design.has_fence = false; }
  }
  SECTION("nothing is emptied") { design.empties = false; }
  if (kind != Kind::kSwitch) {  // where nobody can be a call ahead before all have met
    SECTION("two buffers") { design.n_buffers = 2; }
    SECTION("the next buffer is emptied") { design.emptied_back = 2; }
  }
  CHECK_FALSE(error_of(2, design).empty());
}

TEST_CASE("a rank or signals that are not waited for are found", "[parallel]") {
  CHECK_FALSE(
      error_of(3, {.n_calls = 4, .emptying = Emptying::kFirst, .waits_for_all = false}).empty());
  Design design{Kind::kSwitch, 4};
  SECTION("signals that are not waited for") { design.waits_for_signals = false; }
  SECTION("signals before the numbers") { design.signals_first = true; }
  CHECK(error_of(2, design) == "a stale number was read");
}

// If the warp did its work before anyone sends, nobody could be a call ahead meanwhile.
TEST_CASE("two buffers would do for ranks that empty before they send", "[parallel]") {
  check_right(2, {.emptying = Emptying::kFirst, .n_buffers = 2}, 100);
}

}  // namespace
}  // namespace duplex::model
