// A Transport between threads of one process, as simple as can be: what the engine does without
// shared memory can then be seen without torch, and under the sanitizers.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <vector>

#include "parallel/group.h"
#include "parallel/transport.h"

namespace duplex {

// The messages on their way between all ranks, and who is gone.
class Mailboxes {
 public:
  enum class Kind { kCommand, kMeeting };
  using Message = std::vector<std::byte>;

  void put(int channel, Kind kind, int from, int to, std::span<const std::byte> bytes) {
    const std::lock_guard lock(mutex_);
    boxes_[{channel, kind, from, to}].emplace_back(bytes.begin(), bytes.end());
    changed_.notify_all();
  }
  std::optional<Transport::Lost> take(int channel, Kind kind, int from, int to,
                                      std::span<std::byte> bytes,
                                      std::chrono::milliseconds time_out) {
    std::unique_lock lock(mutex_);
    auto& box = boxes_[{channel, kind, from, to}];
    const auto is_over = [&] { return !box.empty() || gone_.contains(from) || gone_.contains(to); };
    if (!changed_.wait_for(lock, time_out, is_over)) return Transport::Lost{from, "too late"};
    if (box.empty()) return Transport::Lost{from, "its box is closed"};
    const Message message = std::move(box.front());
    box.pop_front();
    std::copy(message.begin(), message.end(), bytes.begin());
    return std::nullopt;
  }
  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    gone_.insert(rank);
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::tuple<int, Kind, int, int>, std::deque<Message>> boxes_;
  std::set<int> gone_;
};

class MailTransport final : public Transport {
 public:
  MailTransport(std::shared_ptr<Mailboxes> boxes, int rank, int n_ranks)
      : boxes_(std::move(boxes)), rank_(rank), n_ranks_(n_ranks) {}

  std::string name() const override { return "mail"; }
  std::optional<Lost> send(int channel, std::span<const std::byte> command,
                           std::chrono::milliseconds /*time_out*/) override {
    for (int other = 1; other < n_ranks_; ++other)
      boxes_->put(channel, Mailboxes::Kind::kCommand, rank_, other, command);
    return std::nullopt;
  }
  std::optional<Lost> receive(int channel, std::span<std::byte> command) override {
    return boxes_->take(channel, Mailboxes::Kind::kCommand, 0, rank_, command, kForever);
  }
  std::optional<Lost> exchange(int channel, std::span<const std::span<std::byte>> slabs,
                               std::chrono::milliseconds time_out) override {
    for (int other = 0; other < n_ranks_; ++other)
      if (other != rank_)
        boxes_->put(channel, Mailboxes::Kind::kMeeting, rank_, other,
                    slabs[static_cast<std::size_t>(rank_)]);
    for (int other = 0; other < n_ranks_; ++other) {
      if (other == rank_) continue;
      if (auto lost = boxes_->take(channel, Mailboxes::Kind::kMeeting, other, rank_,
                                   slabs[static_cast<std::size_t>(other)], time_out))
        return lost;
    }
    return std::nullopt;
  }
  void give_up(int /*rank*/, std::string_view /*reason*/) noexcept override {
    ++n_given_up_;
    boxes_->leave(rank_);
  }
  int n_given_up() const { return n_given_up_; }

 private:
  std::shared_ptr<Mailboxes> boxes_;
  int rank_;
  int n_ranks_;
  std::atomic<int> n_given_up_ = 0;
};

}  // namespace duplex
