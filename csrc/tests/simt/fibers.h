// Fibres: calls that can be left in the middle and gone on with later, all on one system thread.
//
// What they are used for is in grid.h.
#pragma once

#include <cstddef>

namespace duplex::simt {

class Fiber {
 public:
  using Entry = void (*)(void* argument);  // must not throw

  // `number` moves the top of the stack a little, so that many fibres share a cache well.
  explicit Fiber(int number);
  ~Fiber();  // a suspended call is dropped, not unwound
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() begins entry(argument). The call before has ended.
  void start(Entry entry, void* argument);
  // Runs the call until it suspends or ends.
  void resume();
  // Leaves the call, from inside, for whoever resumed it.
  void suspend();

 private:
  struct Context;
  static void run(Fiber* fiber);

  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  std::byte* memory_ = nullptr;  // a guard page, then the stack
  Context* context_ = nullptr;   // at the far end of the stack
};

}  // namespace duplex::simt
