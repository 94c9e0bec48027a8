// What the lanes of one GPU share: the order between their streams, and who may go on.
//
// Each lane puts its work into a stream of its own, and may do so from a thread of its own. What
// one lane wrote and another reads, or the other way round, is put between everything: after all
// that any lane was given, before all that any lane will be given.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "device/runtime.h"

namespace duplex::cuda {

class Lanes {
 public:
  // What the lane is given comes after all that the others were given so far.
  void add(Runtime& lane);
  void remove(Runtime& lane) noexcept;

  // What `stream` is given from here on comes after all that the lanes were given.
  void put_behind_all(Runtime& stream);
  // work() puts something into `stream`, between everything.
  template <class Work>
  void put_between(Runtime& stream, const Work& work) {
    const std::lock_guard lock(mutex_);
    for (Runtime* lane : lanes_) stream.wait_for(*lane);
    work();
    for (Runtime* lane : lanes_) lane->wait_for(stream);
  }
  // Waits until all is done that any lane was given.
  void synchronize();

  // As long as one lives, an interaction pass is running: the background is given nothing new.
  class Pass {
   public:
    explicit Pass(Lanes& lanes) : lanes_(lanes) { lanes_.begin_pass(); }
    ~Pass() { lanes_.end_pass(); }
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    Lanes& lanes_;
  };
  // Where the background waits for the pass to end.
  void give_way() {
    if (n_passes_.load() != 0) park();
  }

 private:
  void begin_pass();
  void end_pass();
  void park();

  std::mutex mutex_;  // guards lanes_
  std::vector<Runtime*> lanes_;
  std::mutex gate_;
  std::condition_variable ended_;
  std::atomic<int> n_passes_{0};  // changed under gate_
};

}  // namespace duplex::cuda
