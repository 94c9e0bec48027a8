#include "tests/simt/queues.h"

#include <algorithm>
#include <utility>

#include "tests/simt/grid.h"
#include "tests/simt/schedule.h"

namespace duplex::simt {
namespace {

struct Registry {
  std::mutex mutex;
  std::vector<Queues*> all;
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

Queues::Queues() : random_(current_schedule().seed) {
  const std::lock_guard lock(registry().mutex);
  registry().all.push_back(this);
}

Queues::~Queues() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().all, this);
}

std::shared_ptr<Queue> Queues::open() {
  std::unique_lock lock(mutex_);
  at_rest_.wait(lock, [this] { return !is_busy_; });
  return queues_.emplace_back(std::make_shared<Queue>());
}

void Queues::close(const std::shared_ptr<Queue>& queue) {
  Lock lock(mutex_);
  do_all(lock);
  std::erase(queues_, queue);
}

void Queues::do_all(Lock& lock) {
  const std::vector<std::shared_ptr<Queue>> all = queues_;
  for (const auto& queue : all)
    while (has_more(*queue)) do_needed(lock, *queue);
}

bool Queues::can_go_on(const Queue& queue) const {
  if (queue.is_busy_ || queue.steps_.empty()) return false;
  const Queue::Step& next = queue.steps_.front();
  return next.other == nullptr || next.other->n_done_ >= next.other_done;
}

// An error stays, as CUDA's do; what follows is done all the same.
void Queues::do_next(Lock& lock, Queue& queue) {
  const Queue::Step step = std::move(queue.steps_.front());
  queue.steps_.pop_front();
  std::exception_ptr error;
  queue.is_busy_ = true;
  lock.unlock();
  try {
    if (step.work) step.work();
  } catch (...) {
    error = std::current_exception();
  }
  lock.lock();
  queue.is_busy_ = false;
  ++queue.n_done_;
  if (error_ == nullptr) error_ = error;
  at_rest_.notify_all();
}

// A step of the queue is done, here or elsewhere; before it what that waits for.
void Queues::do_needed(Lock& lock, Queue& queue) {
  const std::uint64_t n = queue.n_done_;
  while (queue.n_done_ == n) {
    if (can_go_on(queue))
      do_next(lock, queue);
    else if (queue.is_busy_)
      at_rest_.wait(lock);
    else
      do_needed(lock, *std::shared_ptr(queue.steps_.front().other));
  }
}

// Steps of queues that can go on, chosen at random.
void Queues::do_some(Lock& lock) {
  for (auto n = random_() % 3; n > 0; --n) {
    std::vector<std::shared_ptr<Queue>> able;
    for (const auto& queue : queues_)
      if (can_go_on(*queue)) able.push_back(queue);
    if (able.empty()) return;
    do_next(lock, *able[random_() % able.size()]);
  }
}

void Queues::give(const std::shared_ptr<Queue>& queue, std::function<void()> work) {
  std::unique_lock lock(mutex_);
  if (queues_.size() == 1) return do_alone(lock, work);
  ++queue->n_given_;
  queue->steps_.push_back({std::move(work), nullptr});
  if (current_schedule().order == Order::kReverse)
    while (has_more(*queue)) do_needed(lock, *queue);
  else if (current_schedule().order == Order::kRandom)
    do_some(lock);
}

// Without the lock: work may leave its fibre in the middle, for other work of this thread.
void Queues::do_alone(Lock& lock, const std::function<void()>& work) {
  const auto rest = [&] {
    lock.lock();
    is_busy_ = false;
    at_rest_.notify_all();
  };
  is_busy_ = true;
  lock.unlock();
  try {
    work();
  } catch (...) {
    rest();
    throw;
  }
  rest();
}

void Queues::wait_for(const std::shared_ptr<Queue>& later, const std::shared_ptr<Queue>& earlier) {
  const std::lock_guard lock(mutex_);
  later->steps_.push_back({{}, earlier, earlier->n_given_});
  ++later->n_given_;
}

std::uint64_t Queues::n_given(const Queue& queue) const {
  const std::lock_guard lock(mutex_);
  return queue.n_given_;
}

void Queues::finish(const std::shared_ptr<Queue>& queue, std::uint64_t n) {
  Lock lock(mutex_);
  while (queue->n_done_ < n) {
    if (current_schedule().order == Order::kRandom) do_some(lock);
    if (queue->n_done_ < n) do_needed(lock, *queue);
  }
  if (error_ != nullptr) std::rethrow_exception(error_);
}

void Queues::finish_everything() {
  const std::lock_guard lock(registry().mutex);
  for (Queues* queues : registry().all) {
    Lock own_lock(queues->mutex_);
    queues->do_all(own_lock);
  }
}

}  // namespace duplex::simt
