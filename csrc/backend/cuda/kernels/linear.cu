// Matrix products of a few rows with a large matrix, which is read once for up to 64 rows.
//
// float32: panels of 64 outputs as on the CPU, one chain of products for each output.
// bfloat16: tiles of 16 outputs in the fragments of the tensor cores. The warps of a thread block
// share the reduction in a fixed way, and their sums are added in the order of the warps, so an
// output has the same bits whatever other rows there are.
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

constexpr int kPanel = static_cast<int>(kPanelOutputs);
constexpr int kPanelGroups = 4;  // of rows, in a thread block
constexpr int kGroupRows = 2;    // of a thread
constexpr int kPanelRows = kPanelGroups * kGroupRows;

constexpr int kTileOutputs = 16;
constexpr int kTileRows = 8;  // of one matrix instruction
constexpr int kStep = 32;     // reduction indices of 16 bytes of every thread's rows
constexpr int kWarps = 8;
constexpr int kAhead = 4;  // steps whose weights are in flight

// The product of one thread block: rows `begin` to `end` of a matrix with given outputs.
struct Job {
  const void* w;
  std::int32_t n_out;
  std::int32_t n_in;
  Rows x;
  const std::int32_t* row_of_place;
  std::int32_t begin;
  std::int32_t end;
  float* y;
  std::int64_t y_stride;
  float divisor;

  template <class Element>
  DUPLEX_DEVICE const Element* row(std::int32_t place) const {
    const std::int64_t at = row_of_place == nullptr ? place : row_of_place[place];
    return static_cast<const Element*>(x.data) + at * x.stride;
  }
};

// ---- float32

DUPLEX_DEVICE void multiply_panel(const Job& job, std::int32_t panel) {
  const int output = thread_index() % kPanel;
  const auto* w =
      static_cast<const float*>(job.w) + std::int64_t{panel} * job.n_in * kPanel + output;
  for (std::int32_t at = job.begin + thread_index() / kPanel * kGroupRows; at < job.end;
       at += kPanelRows) {
    const bool two = at + 1 < job.end;
    const float* x0 = job.row<float>(at);
    const float* x1 = two ? job.row<float>(at + 1) : x0;
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll 8
    for (std::int32_t k = 0; k < job.n_in; ++k) {
      const float weight = w[std::int64_t{k} * kPanel];
      sum0 = fmaf(weight, x0[k], sum0);
      sum1 = fmaf(weight, x1[k], sum1);
    }
    float* const y = job.y + at * job.y_stride + panel * kPanel + output;
    y[0] = job.divisor == 1.0f ? sum0 : sum0 / job.divisor;
    if (two) y[job.y_stride] = job.divisor == 1.0f ? sum1 : sum1 / job.divisor;
  }
}

// ---- bfloat16

// The weights of a step lie together: two fragments for each of the 32 threads of a warp.
DUPLEX_DEVICE const Words* fragments(const Job& job, std::int32_t tile, std::int32_t step) {
  const std::int64_t n_steps = (job.n_in + kStep - 1) / kStep;
  return static_cast<const Words*>(job.w) + ((tile * n_steps + step) * 2) * kWarp +
         thread_index() % kWarp;
}

template <int kTiles>
DUPLEX_DEVICE void multiply_step(const Job& job, std::int32_t first, std::int32_t step,
                                 const Words (&w)[2], float (&acc)[kTiles][4]) {
  const int lane = thread_index() % kWarp;
  const std::int32_t k = step * kStep + lane % 4 * 8;
  for (int t = 0; t < kTiles; ++t) {
    const std::int32_t place = first + t * kTileRows + lane / 4;
    Words x{};
    if (place < job.end && k < job.n_in)
      x = *reinterpret_cast<const Words*>(job.row<std::uint16_t>(place) + k);
    multiply_add(acc[t], w[0], x.v[0], x.v[1]);
    multiply_add(acc[t], w[1], x.v[2], x.v[3]);
  }
}

// Outputs of one tile for up to kTiles * 8 rows from `first` on.
template <int kTiles>
DUPLEX_DEVICE void multiply_tile(const Job& job, std::int32_t tile, std::int32_t first) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const std::int32_t n_steps = (job.n_in + kStep - 1) / kStep;
  float acc[kTiles][4] = {};
  for (std::int32_t step = warp; step < n_steps; step += kWarps * kAhead) {
    Words w[kAhead][2] = {};
    for (int i = 0; i < kAhead; ++i) {
      if (step + i * kWarps >= n_steps) break;
      w[i][0] = load_streamed(fragments(job, tile, step + i * kWarps));
      w[i][1] = load_streamed(fragments(job, tile, step + i * kWarps) + kWarp);
    }
    for (int i = 0; i < kAhead; ++i)
      if (step + i * kWarps < n_steps) multiply_step(job, first, step + i * kWarps, w[i], acc);
  }
  // (warp, tile of rows, row, output), then added up in the order of the warps.
  auto* const sums = reinterpret_cast<float*>(shared_memory());
  constexpr int kSums = kTiles * kTileRows * kTileOutputs;
  sync_block();
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 4; ++i) {
      const int output = lane / 4 + i / 2 * 8, row = lane % 4 * 2 + i % 2;
      sums[warp * kSums + (t * kTileRows + row) * kTileOutputs + output] = acc[t][i];
    }
  sync_block();
  for (int i = thread_index(); i < kSums; i += n_threads()) {
    const std::int32_t place = first + i / kTileOutputs;
    if (place >= job.end) break;
    float sum = sums[i];
    for (int other = 1; other < kWarps; ++other) sum += sums[other * kSums + i];
    if (job.divisor != 1.0f) sum /= job.divisor;
    job.y[place * job.y_stride + tile * kTileOutputs + i % kTileOutputs] = sum;
  }
}

template <int kTiles>
constexpr std::size_t tile_bytes() {
  return sizeof(float) * kWarps * kTiles * kTileRows * kTileOutputs;
}

// ---- the kernels: a whole matrix for all rows, or a matrix of each expert for its rows

DUPLEX_DEVICE Job job_of(const LinearArgs& args) {
  return {args.w.data, args.w.n_out, args.w.n_in, args.x,        nullptr,
          0,           args.n_rows,  args.y,      args.y_stride, args.divisor};
}

DUPLEX_DEVICE Job job_of(const ExpertLinearArgs& args, std::int32_t expert) {
  const auto* w = static_cast<const std::byte*>(args.w.data) + expert * args.expert_stride_bytes;
  return {w,
          args.w.n_out,
          args.w.n_in,
          args.x,
          args.row_of_place,
          args.expert_begin[expert],
          args.expert_begin[expert + 1],
          args.y,
          args.y_stride,
          1.0f};
}

DUPLEX_KERNEL linear_f32_kernel(LinearArgs args) {
  Job job = job_of(args);
  job.begin = block_y() * kPanelRows;  // the rows of this thread block
  if (job.end > job.begin + kPanelRows) job.end = job.begin + kPanelRows;
  multiply_panel(job, block_x());
}

template <int kTiles>
DUPLEX_KERNEL linear_bf16_kernel(LinearArgs args) {
  multiply_tile<kTiles>(job_of(args), block_x(), block_y() * kTiles * kTileRows);
}

DUPLEX_KERNEL expert_f32_kernel(ExpertLinearArgs args) {
  multiply_panel(job_of(args, block_y()), block_x());
}

DUPLEX_KERNEL expert_bf16_kernel(ExpertLinearArgs args) {
  const Job job = job_of(args, block_y());
  for (std::int32_t first = job.begin; first < job.end; first += 2 * kTileRows) {
    if (job.end - first > kTileRows)
      multiply_tile<2>(job, block_x(), first);
    else
      multiply_tile<1>(job, block_x(), first);
  }
}

template <int kTiles>
void launch_bf16(Runtime& runtime, const LinearArgs& args) {
  const std::int64_t n_tiles = round_up(args.w.n_out, kPanelOutputs) / kTileOutputs;
  runtime.launch(linear_bf16_kernel<kTiles>, {n_tiles, div_up(args.n_rows, kTiles * kTileRows)},
                 kWarps * kWarp, tile_bytes<kTiles>(), args);
}

// One thread an element: to where the kernels above read it.
DUPLEX_KERNEL pack_kernel(PackArgs args) {
  const std::int64_t column = std::int64_t{block_y()} * n_threads() + thread_index();
  if (column >= args.shape.n_in) return;
  const std::int64_t output = args.first_out + block_x();
  const std::int64_t k =
      column / args.shape.in_group * args.shape.in_group_padded + column % args.shape.in_group;
  const float value = load(args.source, args.source_dtype, block_x() * args.row_stride + column);
  if (args.shape.dtype == DType::kF32) {
    const std::int64_t panel = output / kPanel * args.n_in_padded * kPanel;
    static_cast<float*>(args.destination)[panel + k * kPanel + output % kPanel] = value;
    return;
  }
  // Inside a step, the thread t of four has columns 8 t to 8 t + 7: two pairs in each fragment.
  const std::int64_t n_steps = div_up(args.n_in_padded, kStep);
  const std::int64_t lane = output % 8 * 4 + k % kStep / 8;
  const std::int64_t fragment = k % 8 / 4;
  const std::int64_t word = output % kTileOutputs / 8 + k % 4 / 2 * 2;
  const std::int64_t at =
      ((output / kTileOutputs * n_steps + k / kStep) * 2 + fragment) * kWarp + lane;
  static_cast<std::uint16_t*>(args.destination)[(at * 4 + word) * 2 + k % 2] = float_to_bf16(value);
}

}  // namespace

std::size_t packed_matrix_bytes(std::int64_t n_out, std::int64_t n_in_padded, DType dtype) {
  const std::int64_t n_in = dtype == DType::kF32 ? n_in_padded : round_up(n_in_padded, kStep);
  return static_cast<std::size_t>(round_up(n_out, kPanelOutputs) * n_in) * dtype_bytes(dtype);
}

void launch_pack(Runtime& runtime, const PackArgs& args) {
  constexpr int kPackThreads = 128;
  runtime.launch(pack_kernel, {args.n_rows, div_up(args.shape.n_in, kPackThreads)}, kPackThreads, 0,
                 args);
}

void launch_linear(Runtime& runtime, const LinearArgs& args) {
  if (args.w.dtype == DType::kF32) {
    runtime.launch(linear_f32_kernel,
                   {div_up(args.w.n_out, kPanelOutputs), div_up(args.n_rows, kPanelRows)},
                   kPanel * kPanelGroups, 0, args);
    return;
  }
  if (args.n_rows > 8 * kTileRows) {
    launch_linear_large(runtime, args);
    return;
  }
  if (args.n_rows <= kTileRows)
    launch_bf16<1>(runtime, args);
  else if (args.n_rows <= 2 * kTileRows)
    launch_bf16<2>(runtime, args);
  else if (args.n_rows <= 3 * kTileRows)
    launch_bf16<3>(runtime, args);
  else if (args.n_rows <= 4 * kTileRows)
    launch_bf16<4>(runtime, args);
  else
    launch_bf16<8>(runtime, args);
}

void launch_expert_linear(Runtime& runtime, const ExpertLinearArgs& args) {
  if (args.w.dtype == DType::kF32)
    runtime.launch(expert_f32_kernel, {div_up(args.w.n_out, kPanelOutputs), args.n_experts},
                   kPanel * kPanelGroups, 0, args);
  else
    runtime.launch(expert_bf16_kernel,
                   {round_up(args.w.n_out, kPanelOutputs) / kTileOutputs, args.n_experts},
                   kWarps * kWarp, tile_bytes<2>(), args);
}

}  // namespace duplex::cuda
