// The process that made something which a fork of it must not touch.
//
// A fork has none of the threads and worker processes of its parent, but all of its shared memory:
// what it wrote there would appear in the streams of the parent.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include "core/error.h"

namespace duplex {

class OwnerProcess {
 public:
  bool is_here() const noexcept { return ::getpid() == pid_; }
  void check_here() const {
    check(is_here(), "engine: it was loaded in process ", pid_, ", and this is process ",
          ::getpid(), ", a fork of that one, which cannot use it; load an engine after the fork");
  }

 private:
  pid_t pid_ = ::getpid();
};

// Deletes in the process that made it. What a fork inherits stays there as it is: a thread that the
// fork does not have may hold its locks, and no thread can be joined.
struct OwnerDelete {
  OwnerProcess owner;
  template <class T>
  void operator()(T* made) const {
    if (owner.is_here()) delete made;
  }
};

}  // namespace duplex
