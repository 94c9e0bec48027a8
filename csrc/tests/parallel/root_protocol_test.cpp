// The calls between GPUs of a recorded turn as a table of steps, in every interleaving, with stores
// that happen late and in any order: rank 0's rows go to all, sums, logits come to rank 0, and its
// tokens go to all, which say whether the loop goes on (kernels/root.cu, host/cuda_turn.cpp).
// Nobody reads what another call left or loses what was sent, and all leave the loop behind the
// same pass. Each deliberate fault must be found. Sums alone, in all their ways:
// device_protocol_test.cpp.
//
// Calls of all kinds use the same words of the buffers in turn. Rank 0 sends words to itself too,
// which it never waits for. That they do no harm later is because a call begins when all that the
// one in front stored is there, however early its thread blocks came (device/chain.cuh).
#include <algorithm>
#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/parallel/explorer.h"

namespace duplex::model {
namespace {

enum class Call : std::uint8_t { kRows, kSum, kLogits, kTokens };
struct Turn {
  std::size_t n_ranks = 2;
  std::vector<Call> pass = {Call::kRows, Call::kSum, Call::kSum, Call::kLogits, Call::kTokens};
  std::size_t n_passes = 2;
  bool has_warp = true;       // that empties beside those who send; else these do, before they send
  bool meets_at_once = true;  // before the other words are read, which other blocks may do sooner
  // What can be done wrong.
  bool meets = true;
  bool waits_for_grid = true;  // rank 0's warp, for the call in front; else for the one before that
  bool waits_for_stores = true;  // of the call in front
  bool has_fence = true;
  bool empties_own = true;  // rank 0, what it has sent itself
  std::size_t n_buffers = 3;
  bool takes_tokens = true;
};

constexpr std::uint8_t kStop = 64;  // in a token; else a word is the number of its call
constexpr std::uint8_t kOver = 255;
enum Register : std::size_t { kNumber, kAt, kIsStopped };
struct Word {
  std::size_t to, i;
};
using Words = std::vector<Word>;

class TurnRanks {
 public:
  explicit TurnRanks(const Turn& turn) : turn_(turn), n_(turn.n_ranks) {
    protocol_.variables.emplace_back("fence");
    for (std::size_t r = 0; r < n_; ++r) {
      first_word_.push_back(protocol_.variables.size());
      for (std::size_t i = 0; i < 3 * n_words(r); ++i) make_variable("word", r);
    }
    begun_ = protocol_.variables.size();
    for (std::size_t r = 0; r < 2 * n_ && turn.has_warp; ++r) make_variable("warps", r);
    for (std::size_t r = 0; r < n_; ++r) protocol_.processes.push_back(rank(r));
    for (std::size_t r = 0; r < n_ && turn.has_warp; ++r) protocol_.processes.push_back(warp(r));
  }
  Report explored() const { return explore(protocol_); }

 private:
  void make_variable(const std::string& name, std::size_t r) {
    protocol_.variables.push_back(name + " of rank " + std::to_string(r));
  }
  Call kind(std::size_t number) const { return turn_.pass[(number - 1) % turn_.pass.size()]; }
  bool is_last(std::size_t number) const { return number % turn_.pass.size() == 0; }
  bool is_end(std::size_t number) const { return number == turn_.n_passes * turn_.pass.size(); }

  // Of a buffer: first a word of each other rank, then what else comes: to rank 0 one more of each.
  std::size_t n_words(std::size_t rank) const { return rank == 0 ? 2 * (n_ - 1) : n_; }
  Word of_meeting(std::size_t to, std::size_t from) const {
    return {to, from < to ? from : from - 1};
  }
  bool is_of_meeting(const Word& word) const { return word.i < n_ - 1; }
  Word other(std::size_t to, std::size_t from) const {
    return {to, n_ - 1 + (to == 0 ? from - 1 : 0)};
  }
  std::size_t variable(const Word& word, std::size_t number) const {
    return first_word_[word.to] + number % turn_.n_buffers * n_words(word.to) + word.i;
  }

  Words sent(std::size_t rank, std::size_t number) const {
    const Call call = kind(number);
    const bool is_spread = call == Call::kRows || call == Call::kTokens;
    Words words;
    if (rank == 0 && is_spread) words.push_back(other(0, 1));  // its own
    if (rank != 0 && !is_spread) words.push_back(other(0, rank));
    for (std::size_t to = 0; to < n_; ++to) {
      if (to == rank) continue;
      if (rank == 0 && call != Call::kLogits) words.push_back(other(to, 0));
      if (turn_.meets || call == Call::kSum) words.push_back(of_meeting(to, rank));
    }
    return words;
  }
  Words awaited(std::size_t rank, std::size_t number) const {
    Words words;
    for (std::size_t from = 0; from < n_; ++from)
      for (const Word& word : sent(from, number))
        if (from != rank && word.to == rank) words.push_back(word);
    std::stable_partition(words.begin(), words.end(), [&](const Word& word) {
      return is_of_meeting(word) == turn_.meets_at_once;
    });
    return words;
  }
  // By the call before this one.
  Words used(std::size_t rank, std::size_t number) const {
    if (number == 1) return {};
    Words words = awaited(rank, number - 1);
    for (const Word& word : sent(rank, number - 1))
      if (word.to == rank && turn_.empties_own) words.push_back(word);
    return words;
  }

  // For each of the words, which depend on the call; then the next step.
  template <class Of, class Fn>
  static void for_words(Process& process, const std::string& step, const Of& words_of,
                        const Fn& fn) {
    process.steps.push_back({step, [=](Actor& a) {
                               const Words words = words_of(a.local(kNumber));
                               const std::size_t at = a.local(kAt);
                               if (at < words.size() && !fn(a, words[at])) return a.wait();
                               if (at < words.size()) a.go_to(step);
                               a.local(kAt) = static_cast<std::uint8_t>(
                                   at < words.size() ? at + 1 : std::size_t{0});
                             }});
  }
  void add_emptying(Process& process, std::size_t rank) const {
    for_words(
        process, "empties", [=, this](std::size_t number) { return used(rank, number); },
        [this](Actor& a, const Word& word) {
          a.store(variable(word, a.local(kNumber) - std::size_t{1}), 0, Order::kRelaxed);
          return true;
        });
    if (turn_.has_fence) process.steps.push_back({"fence", [](Actor& a) { a.add(0, 0); }});
  }

  Process rank(std::size_t rank) const {
    Process process{"rank " + std::to_string(rank), {}};
    const auto step = [&](const char* name, std::function<void(Actor&)> run) {
      process.steps.push_back({name, std::move(run)});
    };
    step("begins", [=, this](Actor& a) {
      const std::uint8_t number = ++a.local(kNumber);
      if (turn_.has_warp) a.store(begun_ + rank, number, Order::kRelaxed);
    });
    if (!turn_.has_warp) add_emptying(process, rank);
    for_words(
        process, "sends", [=, this](std::size_t number) { return sent(rank, number); },
        [=, this](Actor& a, const Word& word) {
          const std::uint8_t number = a.local(kNumber);
          const bool is_stop = rank == 0 && !is_of_meeting(word) && is_end(number);
          const auto value = static_cast<std::uint8_t>(number + (is_stop ? kStop : 0));
          a.store(variable(word, number), value, Order::kRelaxed);
          return true;
        });
    for_words(
        process, "reads", [=, this](std::size_t number) { return awaited(rank, number); },
        [this](Actor& a, const Word& word) {
          const std::uint8_t found = a.load(variable(word, a.local(kNumber)));
          const std::uint8_t number = found % kStop;
          if (found != 0 && number < a.local(kNumber)) a.violate("a stale word was read");
          if (number > a.local(kNumber)) a.violate("a word was overwritten");
          if (found >= kStop) a.local(kIsStopped) = 1;
          return found != 0;
        });
    if (turn_.waits_for_stores) step("stores are there", [](Actor& a) { a.add(0, 0); });
    if (turn_.has_warp)
      step("meets the warp", [=, this](Actor& a) {
        if (a.load(begun_ + n_ + rank) < a.local(kNumber)) a.wait();
      });
    step("goes on", [=, this](Actor& a) {
      const std::uint8_t number = a.local(kNumber);
      const bool is_stopped = turn_.takes_tokens && a.local(kIsStopped) != 0;
      if (!is_last(number) || !(rank == 0 ? is_end(number) : is_stopped)) a.go_to("begins");
    });
    step("ends", [=, this](Actor& a) {
      if (turn_.has_warp) a.store(begun_ + rank, kOver, Order::kRelaxed);
      a.end();
    });
    return process;
  }

  // The warp that empties: from the beginning of a call to its end.
  Process warp(std::size_t rank) const {
    Process process{"warp of rank " + std::to_string(rank), {}};
    process.steps.push_back({"begins", [=, this](Actor& a) {
                               const std::uint8_t begun = a.load(begun_ + rank);
                               const bool is_early = rank == 0 && !turn_.waits_for_grid;
                               if (begun == kOver) return a.end();
                               if (begun + is_early <= a.local(kNumber)) return a.wait();
                               ++a.local(kNumber);
                             }});
    add_emptying(process, rank);
    process.steps.push_back({"has emptied", [=, this](Actor& a) {
                               a.store(begun_ + n_ + rank, a.local(kNumber), Order::kRelaxed);
                               a.go_to("begins");
                             }});
    return process;
  }

  Turn turn_;
  std::size_t n_;
  std::vector<std::size_t> first_word_;  // by rank
  std::size_t begun_ = 0;  // calls that the senders have begun, then those that the warps have done
  Protocol protocol_;
};

void check_right(const Turn& turn, std::size_t at_least) {
  const Report report = TurnRanks(turn).explored();
  CAPTURE(turn.n_ranks, report.trace, report.n_states);
  CHECK(report.error.empty());
  CHECK(report.is_whole);
  CHECK(report.n_states >= at_least);
}

TEST_CASE("the calls of a turn between GPUs are right in every interleaving", "[parallel]") {
  for (const bool meets_at_once : {true, false}) {
    for (const std::size_t n_passes : {1, 3})
      check_right({.n_passes = n_passes, .meets_at_once = meets_at_once}, 40'000);
    check_right({.n_ranks = 3, .has_warp = false, .meets_at_once = meets_at_once}, 300'000);
  }
}

TEST_CASE("a fault in the calls of a turn between GPUs is found", "[parallel]") {
  Turn turn;
  const char* expected = "a stale word was read";
  SECTION("a call that begins before all is stored") { turn.waits_for_stores = false; }
  SECTION("no fence") { turn.has_fence = false; }
  SECTION("rank 0 leaves what it has sent itself") { turn.empties_own = false; }
  SECTION("no meeting") {
    turn.meets = false;
    expected = "the processes cannot all end";
  }
  SECTION("two buffers") {
    turn.n_buffers = 2;
    expected = "the processes cannot all end";
  }
  SECTION("a call that begins before the one in front has ended") {
    turn = {.pass = {Call::kRows, Call::kTokens}, .n_passes = 1, .waits_for_grid = false};
    expected = "the processes cannot all end";
  }
  SECTION("ranks that do not look at the tokens") {
    turn.takes_tokens = false;
    expected = "the processes cannot all end";
  }
  CHECK(TurnRanks(turn).explored().error == expected);
}

}  // namespace
}  // namespace duplex::model
