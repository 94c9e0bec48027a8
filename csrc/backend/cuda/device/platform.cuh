// What kernels may use of the machine, and nothing else: indices, barriers, shuffles, matrix
// instructions. The kernels are written against these names alone; csrc/tests/simt/device/ has the
// same names for the host, so the same kernel sources run there without a GPU. All threads of a
// warp take part in a shuffle or a matrix product, all threads of a block in a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#define DUPLEX_KERNEL __global__ void
// For thread blocks of so many threads at most, and so many blocks at once on a multiprocessor: the
// compiler leaves registers for all of them.
#define DUPLEX_KERNEL_OF(n_threads, n_blocks) __global__ void __launch_bounds__(n_threads, n_blocks)
#define DUPLEX_DEVICE __device__ __forceinline__

namespace duplex::cuda {

inline constexpr int kWarp = 32;

DUPLEX_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DUPLEX_DEVICE int n_threads() { return static_cast<int>(blockDim.x); }
DUPLEX_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
DUPLEX_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
DUPLEX_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }

DUPLEX_DEVICE void sync_block() { __syncthreads(); }

// The block's dynamic shared memory, 16-byte aligned; its size is given at launch.
DUPLEX_DEVICE std::byte* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<std::byte*>(bytes);
}

// The number in shared memory before `value` was added, which other threads' additions do not
// split.
DUPLEX_DEVICE std::uint32_t add_shared(std::uint32_t* shared, std::uint32_t value) {
  return atomicAdd_block(shared, value);
}

// The value of the lane `delta` further on, inside groups of `width` lanes.
DUPLEX_DEVICE float shuffle_down(float value, int delta, int width) {
  return __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(delta), width);
}
DUPLEX_DEVICE float shuffle_xor(float value, int mask, int width) {
  return __shfl_xor_sync(0xffffffffu, value, mask, width);
}
DUPLEX_DEVICE float shuffle_from(float value, int lane, int width) {
  return __shfl_sync(0xffffffffu, value, lane, width);
}

struct alignas(16) Words {
  std::uint32_t v[4];
};

// 16 bytes that are read once, past the first-level cache.
DUPLEX_DEVICE Words load_streamed(const void* address) {
  Words words;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.v[0]), "=r"(words.v[1]), "=r"(words.v[2]), "=r"(words.v[3])
               : "l"(address));
  return words;
}

// The same for 8 bytes.
DUPLEX_DEVICE void load_streamed(const void* address, std::uint32_t (&words)[2]) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "l"(address));
}

// Brings memory into the second-level cache; address and size are multiples of 16 bytes.
DUPLEX_DEVICE void prefetch(const void* address, std::uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes));
}

// 16 bytes from global to shared memory, on their way while the thread goes on. Copies started
// since the last commit_copies() are a group; wait_copies<n>() waits until at most n groups of this
// thread are on their way.
DUPLEX_DEVICE void copy_async(void* shared, const void* global) {
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
DUPLEX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
DUPLEX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The products of two pairs of bfloat16 numbers, rounded to nearest even.
DUPLEX_DEVICE std::uint32_t multiply_pairs(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

// Four of the eight bytes of a and b, b's behind a's: byte i is the one that nibble i of `choice`
// names (0 to 7).
DUPLEX_DEVICE std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b, std::uint32_t choice) {
  std::uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(choice));
  return bytes;
}

// acc += a b for a (16, 16) and b (16, 8) in bfloat16, in the fragments of mma.m16n8k16: with
// g = lane / 4 and t = lane % 4, a.v[0] holds columns 2t, 2t + 1 of row g, a.v[1] of row g + 8,
// a.v[2] and a.v[3] the same rows at columns 2t + 8, 2t + 9; b0 holds rows 2t, 2t + 1 of column g,
// b1 rows 2t + 8, 2t + 9; acc[0..1] are columns 2t, 2t + 1 of row g, acc[2..3] of row g + 8.
DUPLEX_DEVICE void multiply_add(float (&acc)[4], const Words& a, std::uint32_t b0,
                                std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

// acc += a b for a (16, 32) and b (32, 8) in int8, in the fragments of mma.m16n8k32, four columns
// of a or rows of b in a word: a.v[0] holds columns 4t to 4t + 3 of row g, a.v[1] of row g + 8,
// a.v[2] and a.v[3] the same rows at columns 4t + 16 on; b0 holds rows 4t to 4t + 3 of column g, b1
// rows 4t + 16 on; acc as above.
DUPLEX_DEVICE void multiply_add(std::int32_t (&acc)[4], const Words& a, std::uint32_t b0,
                                std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

// The same for codes 0 to 255 of a, or of b.
DUPLEX_DEVICE void multiply_add_left_unsigned(std::int32_t (&acc)[4], const Words& a,
                                              std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}
DUPLEX_DEVICE void multiply_add_right_unsigned(std::int32_t (&acc)[4], const Words& a,
                                               std::uint32_t b0, std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(acc[0]), "+r"(acc[1]), "+r"(acc[2]), "+r"(acc[3])
      : "r"(a.v[0]), "r"(a.v[1]), "r"(a.v[2]), "r"(a.v[3]), "r"(b0), "r"(b1));
}

}  // namespace duplex::cuda
