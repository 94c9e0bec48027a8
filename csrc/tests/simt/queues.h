// The streams of one pretended GPU, as queues of work: what each is given is done in its order, and
// between two of them nothing is in order but what wait_for() puts so.
//
// When work is done is the order of threads' business too (grid.h): forward as late as may be,
// reverse at once, at random some of it at any time. A lone queue has nothing to be mixed with, so
// its work is always done at once.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace duplex::simt {

class Queue {
 private:
  friend class Queues;
  struct Step {
    std::function<void()> work;  // or, where it waits:
    std::shared_ptr<Queue> other;
    std::uint64_t other_done = 0;
  };
  std::deque<Step> steps_;  // to be done
  std::uint64_t n_given_ = 0;
  std::uint64_t n_done_ = 0;
  bool is_busy_ = false;  // with the first of what is not done
};

// Any of its calls may come from any thread; the work is done on the thread of some later call,
// without the lock: a kernel may wait for another GPU, and what goes on there for other queues
// here.
class Queues {
 public:
  Queues();
  ~Queues();
  Queues(const Queues&) = delete;
  Queues& operator=(const Queues&) = delete;

  std::shared_ptr<Queue> open();
  void close(const std::shared_ptr<Queue>& queue);  // all work is done first, of all queues

  void give(const std::shared_ptr<Queue>& queue, std::function<void()> work);
  void wait_for(const std::shared_ptr<Queue>& later, const std::shared_ptr<Queue>& earlier);
  std::uint64_t n_given(const Queue& queue) const;
  // Does the work of the queue up to the n-th that it was given. What any work threw is thrown
  // here, in every call from then on.
  void finish(const std::shared_ptr<Queue>& queue, std::uint64_t n);
  // All work of all queues of all GPUs, as when memory is given back.
  static void finish_everything();

 private:
  using Lock = std::unique_lock<std::mutex>;  // of mutex_, held; let go while work is done
  static bool has_more(const Queue& queue) { return queue.n_done_ < queue.n_given_; }
  bool can_go_on(const Queue& queue) const;
  void do_next(Lock& lock, Queue& queue);
  void do_needed(Lock& lock, Queue& queue);
  void do_some(Lock& lock);
  void do_all(Lock& lock);
  void do_alone(Lock& lock, const std::function<void()>& work);

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Queue>> queues_;
  bool is_busy_ = false;  // with work of a lone queue
  std::condition_variable at_rest_;
  std::exception_ptr error_;
  std::mt19937 random_;
};

}  // namespace duplex::simt
