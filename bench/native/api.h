// The C functions of libduplex_bench.so, called by bench/native.py. A function that makes an object
// returns nullptr where it cannot, and duplex_bench_error() then says why.
#pragma once

#include <cstdint>

#define DUPLEX_BENCH_API extern "C" __attribute__((visibility("default")))

DUPLEX_BENCH_API const char* duplex_bench_error();

// ---- limits of the machine
DUPLEX_BENCH_API void* duplex_bench_reader_create(std::int64_t bytes, std::int32_t n_threads);
DUPLEX_BENCH_API double duplex_bench_reader_run(void* reader);  // seconds of one pass
DUPLEX_BENCH_API void duplex_bench_reader_destroy(void* reader);
// Operations per second of dot products on registers; kind as `Dot`.
DUPLEX_BENCH_API double duplex_bench_dot_peak(std::int32_t kind, std::int32_t n_threads);

// ---- the floor program
// Operation of a pass: `matrix` times `rows` rows, or, where matrix is -1, a read of `rows` bytes
// of the cache. Operations of one phase may run at once; phases follow one another.
struct FloorOp {
  std::int64_t matrix;
  std::int64_t rows;
  std::int64_t phase;
};
DUPLEX_BENCH_API void* duplex_bench_floor_create(std::int32_t format, std::int32_t n_threads,
                                                 std::int64_t n_matrices, const std::int64_t* n_out,
                                                 const std::int64_t* n_in, std::int64_t max_rows,
                                                 std::int64_t cache_bytes);
DUPLEX_BENCH_API double duplex_bench_floor_run(void* floor, std::int64_t n_ops,
                                               const FloorOp* ops);  // seconds
DUPLEX_BENCH_API void duplex_bench_floor_destroy(void* floor);

// ---- single operations of the CPU backend
// `name` says which, `sizes` are its own (kernels.cpp). `dtype` is of the weights or of the tape:
// 0 float32, 1 bfloat16, 2 int8, 3 int4.
struct KernelSizes {
  std::int32_t rows, n_out, n_in;                        // linear, norm, silu_mul, conv_add_norm
  std::int32_t n_heads, n_kv_heads, d_head, rel_extent;  // attention, kv_append
  std::int64_t context;                                  // attention
  std::int32_t n_experts, n_shared, top_k, d_expert;     // moe; n_in is d_model
};
DUPLEX_BENCH_API void* duplex_bench_kernel_create(const char* name, std::int32_t dtype,
                                                  std::int32_t n_threads, const KernelSizes* sizes);
DUPLEX_BENCH_API double duplex_bench_kernel_run(void* kernel);  // seconds of one call
// Seconds of n calls, each the first of a pass that begins while `other` runs in the background
// lane.
DUPLEX_BENCH_API void duplex_bench_kernel_beside(void* kernel, void* other, std::int64_t n,
                                                 double* seconds);
DUPLEX_BENCH_API double duplex_bench_kernel_bytes(void* kernel);  // that a call must read
DUPLEX_BENCH_API double duplex_bench_kernel_operations(void* kernel);
DUPLEX_BENCH_API void duplex_bench_kernel_destroy(void* kernel);
