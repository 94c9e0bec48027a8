// What kernels may use of other GPUs' memory: platform.cuh goes no further than the own one. The
// host's twin is csrc/tests/simt/device/system.cuh.
//
// An address is the own memory's, a peer's, or one of a multicast object, where a store reaches
// every rank; those take the functions that begin with multicast_. All accesses are of system scope
// and, where nothing else is said, relaxed: each number arrives by itself, in any order.
#pragma once

#include "device/platform.cuh"

namespace duplex::cuda {

DUPLEX_DEVICE Words load_system(const void* address) {
  Words words;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.v[0]), "=r"(words.v[1]), "=r"(words.v[2]), "=r"(words.v[3])
               : "l"(address)
               : "memory");
  return words;
}
DUPLEX_DEVICE void store_system(void* address, const Words& words) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "r"(words.v[0]), "r"(words.v[1]), "r"(words.v[2]), "r"(words.v[3])
               : "memory");
}
DUPLEX_DEVICE void multicast_store(void* address, const Words& words) {
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "f"(__uint_as_float(words.v[0])), "f"(__uint_as_float(words.v[1])),
               "f"(__uint_as_float(words.v[2])), "f"(__uint_as_float(words.v[3]))
               : "memory");
}
// The sum of four float32 of every rank, in an order that the switch chooses.
DUPLEX_DEVICE Words multicast_sum(const void* address) {
  float sum[4];
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
               : "l"(address)
               : "memory");
  return {__float_as_uint(sum[0]), __float_as_uint(sum[1]), __float_as_uint(sum[2]),
          __float_as_uint(sum[3])};
}

DUPLEX_DEVICE std::uint32_t load_word_system(const std::uint32_t* address) {
  std::uint32_t word;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
  return word;
}
DUPLEX_DEVICE void store_word_system(std::uint32_t* address, std::uint32_t word) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(word) : "memory");
}

// The own memory has an address of its own and one in the multicast object: what was stored through
// either is seen through the other behind this.
DUPLEX_DEVICE void fence_addresses() { asm volatile("fence.proxy.alias;" ::: "memory"); }

// One more on the counter of every rank, after all that this thread has stored, or knows of; the
// own one may be read by its own address behind it.
DUPLEX_DEVICE void multicast_count_release(std::uint32_t* counter) {
  asm volatile("multimem.red.release.sys.global.add.u32 [%0], %1;" ::"l"(counter), "r"(1)
               : "memory");
  fence_addresses();
}
// What is read after it is what was stored before the count.
DUPLEX_DEVICE std::uint32_t load_word_acquire(const std::uint32_t* address) {
  std::uint32_t word;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(word) : "l"(address) : "memory");
  return word;
}
// What this thread has stored, everyone sees before what it stores next.
DUPLEX_DEVICE void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Of this GPU alone: the counter before one was added. Nothing else is ordered by it.
DUPLEX_DEVICE std::uint32_t count_up(std::uint32_t* counter) {
  std::uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(1)
               : "memory");
  return before;
}

DUPLEX_DEVICE std::uint64_t clock_ns() {
  std::uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Ends the kernel, and with it the context, with an error.
DUPLEX_DEVICE void stop() { asm volatile("trap;"); }

}  // namespace duplex::cuda
