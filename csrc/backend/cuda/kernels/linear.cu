// Matrix products in float32: panels of 64 outputs as on the CPU, one chain of products for each
// output. Other formats are in linear_bf16.cu, linear_mxfp8.cu, linear_nvfp4.cu and
// linear_quantised.cu.
#include <algorithm>

#include "kernels/experts.cuh"

namespace duplex::cuda {
namespace {

constexpr int kPanel = static_cast<int>(kPanelOutputs);
constexpr int kPanelGroups = 4;  // of rows, in a thread block
constexpr int kGroupRows = 2;    // of a thread
constexpr int kPanelRows = kPanelGroups * kGroupRows;

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
    const std::int32_t column = panel * kPanel + output;
    job.out(at)[column] = job.divisor == 1.0f ? sum0 : sum0 / job.divisor;
    if (two) job.out(at + 1)[column] = job.divisor == 1.0f ? sum1 : sum1 / job.divisor;
  }
}

DUPLEX_KERNEL linear_f32_kernel(LinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  Job job = job_of(args);
  job.begin = block_y() * kPanelRows;  // the rows of this thread block
  if (job.end > job.begin + kPanelRows) job.end = job.begin + kPanelRows;
  multiply_panel(job, block_x());
}

DUPLEX_KERNEL expert_f32_kernel(ExpertLinearArgs args) {
  let_next_grid_begin();
  wait_for_previous_grid();
  multiply_panel(job_of(args, shared_memory()), block_x());
}

}  // namespace

void launch_linear(Runtime& runtime, const LinearArgs& args) {
  if (is_quantised(args.w.dtype))
    launch_linear_quantised(runtime, args);
  else if (args.w.dtype == DType::kBF16)
    launch_linear_bf16(runtime, args);
  else if (args.w.dtype == DType::kMxfp8)
    launch_linear_mxfp8(runtime, args);
  else if (args.w.dtype == DType::kNvfp4)
    launch_linear_nvfp4(runtime, args);
  else
    runtime.launch_early(linear_f32_kernel,
                         {div_up(args.w.n_out, kPanelOutputs), div_up(args.n_rows, kPanelRows)},
                         kPanel * kPanelGroups, 0, args);
}

namespace {

void launch_experts(Runtime& runtime, const ExpertLinearArgs& args) {
  if (is_quantised(args.w.dtype))
    launch_expert_quantised(runtime, args);
  else if (args.w.dtype == DType::kBF16)
    launch_expert_bf16(runtime, args);
  else if (args.w.dtype == DType::kMxfp8)
    launch_expert_mxfp8(runtime, args);
  else if (args.w.dtype == DType::kNvfp4)
    launch_expert_nvfp4(runtime, args);
  else
    runtime.launch_early(expert_f32_kernel,
                         {div_up(args.w.n_out, kPanelOutputs), expert_blocks(args)},
                         kPanel * kPanelGroups, expert_room_bytes(args), args);
}

}  // namespace

void launch_expert_linear(Runtime& runtime, const ExpertLinearArgs& args) {
  ExpertLinearArgs some = args;
  for (std::int32_t done = 0; done < args.n_rows; done += kExpertRows) {
    some.first_row = args.first_row + done;
    some.n_rows = std::min(args.n_rows - done, kExpertRows);
    launch_experts(runtime, some);
  }
}

}  // namespace duplex::cuda
