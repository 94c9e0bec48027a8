// The mixture of experts: route, run every expert over its rows, add the results per row in
// ascending expert order (csrc/backend/cpu/cpu_moe.cpp). Nobody sorts the pairs of a row and an
// expert: a thread block of an expert finds its rows in the choices (experts.cuh). Parts of a
// product with `down` are computed one after the other, in the same scratch.
#include "backend/moe_layout.h"
#include "kernels/common.cuh"
#include "kernels/launchers.h"

namespace duplex::cuda {
namespace {

// Few, so that the bytes of a row come into many multiprocessors.
constexpr int kThreads = 64;

// The scratch buffer.
struct CudaMoeScratch : MoeScratch {
  float* logits;  // (slices, n_rows, router_stride)
};

CudaMoeScratch lay_out(const MoeSizes& s, Places& places) {
  CudaMoeScratch scratch{};
  static_cast<MoeScratch&>(scratch) = lay_out_moe(s, places);
  const std::int64_t n_slices = div_up(round_up(s.d_model, kColumnAlign), kRouterSlice);
  places.take(scratch.logits, n_slices * s.n_rows * s.router_stride());
  return scratch;
}

struct CombineArgs {
  const MoeChoice* choices;
  std::int32_t per_row;
  const float* down;  // of the pairs, a row's one behind the other
  std::int64_t down_stride;
  float* y;
  std::int64_t y_stride;
};

// Four columns of a row, the numbers of up to eight experts on their way at once.
DUPLEX_KERNEL combine_kernel(CombineArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  const std::int64_t column = (std::int64_t{block_y()} * n_threads() + thread_index()) * kFour;
  if (column >= args.down_stride) return;
  const std::int64_t pair = block_x() * args.per_row;
  const MoeChoice* const choices = args.choices + pair;
  const float* const down = args.down + pair * args.down_stride + column;
  constexpr int kAtOnce = 8;
  Four sum{};
  for (std::int32_t first = 0; first < args.per_row; first += kAtOnce) {
    Four x[kAtOnce];
    float weights[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= args.per_row) break;
      x[i] = load_four(down + (first + i) * args.down_stride);
      weights[i] = choices[first + i].weight;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= args.per_row) break;
      for (int c = 0; c < kFour; ++c) sum.v[c] = fmaf(x[i].v[c], weights[i], sum.v[c]);
    }
  }
  store_four(args.y + block_x() * args.y_stride + column, sum);
}

// One of the experts' matrices; shared experts of another format have a launch of their own.
void multiply(Runtime& runtime, const MoeArgs& args, ExpertLinearArgs experts,
              const ExpertMatrix& shared) {
  if (shared.first.data != nullptr) {
    ExpertLinearArgs of_shared = experts;
    of_shared.w = shared.first;
    of_shared.expert_stride_bytes = shared.stride_bytes;
    of_shared.first_expert = args.config.n_experts;
    of_shared.n_experts = args.config.n_shared;
    launch_expert_linear(runtime, of_shared);
    experts.n_experts = args.config.n_experts;
  }
  launch_expert_linear(runtime, experts);
}

}  // namespace

std::size_t moe_scratch_bytes(const MoeConfig& config, std::int64_t d_model,
                              std::int64_t max_rows) {
  Places places(nullptr);
  lay_out(moe_sizes(config, d_model, max_rows), places);
  return places.bytes();
}

std::size_t moe_quantised_bytes(const MoeArgs& args) {
  const std::int64_t n_pairs = moe_sizes(args.config, args.down.n_out, args.n_rows).n_pairs();
  const std::size_t up = quantised_rows_bytes(args.n_rows, args.gate_up);
  const std::size_t down = quantised_rows_bytes(n_pairs, args.down);
  return up > down ? up : down;
}

void launch_moe(Runtime& runtime, const MoeArgs& args, void* quantised) {
  const MoeSizes s = moe_sizes(args.config, args.down.n_out, args.n_rows);
  Places places(args.scratch);
  const CudaMoeScratch scratch = lay_out(s, places);
  launch_route(runtime, args, scratch.logits, scratch.choices);
  const auto n_all = static_cast<std::int32_t>(s.n_all);
  const auto n_pairs = static_cast<std::int32_t>(s.n_pairs());
  const auto per_row = static_cast<std::int32_t>(s.per_row);
  const Rows x = launch_quantise_rows(runtime, args.x, args.n_rows, args.gate_up, quantised);
  const Rows activated{scratch.activated, s.d_expert_padded, args.x.dtype};
  const bool is_paired = args.gate_up.is_paired;
  multiply(
      runtime, args,
      {args.gate_up, args.gate_up_stride_bytes, 0, n_all, scratch.choices, 0, args.n_rows, per_row,
       per_row, x, scratch.gate_up, s.gate_up_stride(), is_paired ? activated : Rows{}},
      args.shared_gate_up);
  if (!is_paired)
    launch_silu_mul(
        runtime, {scratch.gate_up, s.gate_up_stride(), static_cast<std::int32_t>(s.d_expert_padded),
                  s.d_expert_padded, n_pairs, activated});
  for (std::int32_t p = 0; p < args.n_parts; ++p) {
    const PackedMatrix down = part_of(args.down, args.n_parts, p);
    const Rows pairs = launch_quantise_rows(runtime, columns_from(activated, p * down.n_in),
                                            n_pairs, down, quantised);
    multiply(runtime, args,
             {down,
              args.down_stride_bytes,
              0,
              n_all,
              scratch.choices,
              0,
              args.n_rows,
              per_row,
              1,
              pairs,
              scratch.down,
              s.down_stride(),
              {}},
             {part_of(args.shared_down.first, args.n_parts, p), args.shared_down.stride_bytes});
    runtime.launch_early(combine_kernel, {s.n_rows, div_up(s.down_stride(), kThreads * kFour)},
                         kThreads, 0,
                         CombineArgs{scratch.choices, per_row, scratch.down, s.down_stride(),
                                     args.y + p * args.y_part_stride, args.y_stride});
  }
}

}  // namespace duplex::cuda
