// The switch between two stacks: a dozen instructions on x86-64, ucontext elsewhere (which is some
// ten times slower: it asks the system for the signal mask).
#include "tests/simt/fibers.h"

#include "tests/simt/order.h"

#if defined(__x86_64__) && !defined(DUPLEX_SIMT_UCONTEXT)
#define DUPLEX_SIMT_ASM
#endif

#include <sys/mman.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(DUPLEX_SIMT_ASM)
#include <ucontext.h>
#endif

#if defined(DUPLEX_SIMT_ASM)
// Saves what a call must preserve on the stack, leaves the stack's address in *from, goes on at
// `to`. A new stack "returns" to duplex_simt_enter, with a function and its argument in registers.
extern "C" void duplex_simt_switch(void** from, void* to);
extern "C" void duplex_simt_enter();
asm(R"(
.pushsection .text
.type duplex_simt_switch, @function
duplex_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size duplex_simt_switch, . - duplex_simt_switch
.type duplex_simt_enter, @function
duplex_simt_enter:
  movq %r12, %rdi
  callq *%r13
  ud2
.size duplex_simt_enter, . - duplex_simt_enter
.popsection
)");
#endif

namespace duplex::simt {
namespace {

constexpr std::size_t kGuardBytes = 4096;
constexpr std::size_t kStackBytes = std::size_t{128} << 10;
constexpr std::size_t kColours = 32, kColourBytes = 128;

}  // namespace

struct Fiber::Context {
#if defined(DUPLEX_SIMT_ASM)
  void* own = nullptr;
  void* caller = nullptr;
  DUPLEX_UNSEEN void to_fiber() { duplex_simt_switch(&caller, own); }
  DUPLEX_UNSEEN void to_caller() { duplex_simt_switch(&own, caller); }
  void prepare(std::byte* top, Fiber* fiber) {
    auto* const slots = reinterpret_cast<std::uintptr_t*>(top) - 9;
    slots[2] = reinterpret_cast<std::uintptr_t>(&Fiber::run);         // r13
    slots[3] = reinterpret_cast<std::uintptr_t>(fiber);               // r12
    slots[6] = reinterpret_cast<std::uintptr_t>(&duplex_simt_enter);  // where switch returns to
    own = slots;
  }
#else
  ucontext_t own;
  ucontext_t caller;
  DUPLEX_UNSEEN void to_fiber() { swapcontext(&caller, &own); }
  DUPLEX_UNSEEN void to_caller() { swapcontext(&own, &caller); }
  static void enter(unsigned high, unsigned low) {
    run(reinterpret_cast<Fiber*>(std::uintptr_t{high} << 32 | low));
  }
  void prepare(std::byte* top, Fiber* fiber) {
    getcontext(&own);
    own.uc_stack.ss_sp = fiber->memory_ + kGuardBytes;
    own.uc_stack.ss_size = static_cast<std::size_t>(top - fiber->memory_) - kGuardBytes;
    own.uc_link = nullptr;
    const auto address = reinterpret_cast<std::uint64_t>(fiber);
    makecontext(&own, reinterpret_cast<void (*)()>(&Context::enter), 2,
                static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
  }
#endif

  // The sanitizers are told of every switch; elsewhere these do nothing.
  const void* caller_stack = nullptr;
  std::size_t caller_bytes = 0;
  void* own_frames = nullptr;
  void* tsan_own = nullptr;
  void* tsan_caller = nullptr;

  DUPLEX_UNSEEN void leave_caller([[maybe_unused]] void** frames,
                                  [[maybe_unused]] const std::byte* stack) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(frames, stack, kStackBytes);
#elif defined(__SANITIZE_THREAD__)
    tsan_caller = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_own, __tsan_switch_to_fiber_no_sync);
#endif
  }
  DUPLEX_UNSEEN void enter_caller([[maybe_unused]] void* frames) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
  }
  DUPLEX_UNSEEN void leave_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&own_frames, caller_stack, caller_bytes);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(tsan_caller, __tsan_switch_to_fiber_no_sync);
#endif
  }
  DUPLEX_UNSEEN void enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own_frames, &caller_stack, &caller_bytes);
#endif
  }
};

Fiber::Fiber(int number) {
  void* const mapped = ::mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<std::byte*>(mapped);
  ::mprotect(memory_, kGuardBytes, PROT_NONE);
  std::byte* const end = memory_ + kGuardBytes + kStackBytes;
  const std::size_t colour = static_cast<std::size_t>(number) % kColours * kColourBytes;
  std::byte* const place = end - (sizeof(Context) + 63) / 64 * 64 - colour;
  context_ = new (place) Context;
  context_->prepare(place, this);
  DUPLEX_TSAN(context_->tsan_own = __tsan_create_fiber(0);)
}

Fiber::~Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory_, kGuardBytes + kStackBytes);  // frames of a dropped call
#elif defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(context_->tsan_own);
#endif
  ::munmap(memory_, kGuardBytes + kStackBytes);
}

void Fiber::start(Entry entry, void* argument) {
  entry_ = entry;
  argument_ = argument;
}

DUPLEX_UNSEEN void Fiber::resume() {
  void* frames = nullptr;
  context_->leave_caller(&frames, memory_ + kGuardBytes);
  context_->to_fiber();
  context_->enter_caller(frames);
}

DUPLEX_UNSEEN void Fiber::suspend() {
  context_->leave_fiber();
  context_->to_caller();
  context_->enter_fiber();
}

DUPLEX_UNSEEN void Fiber::run(Fiber* fiber) {
  fiber->context_->enter_fiber();
  for (;;) {
    fiber->entry_(fiber->argument_);
    fiber->suspend();
  }
}

}  // namespace duplex::simt

#if defined(__SANITIZE_ADDRESS__)
// A program that a failure of another one ends is not unwound: what it holds is never freed.
extern "C" [[gnu::visibility("default")]] const char* __lsan_default_suppressions() {
  return "leak:duplex::simt::Fiber::run\n";
}
#endif
