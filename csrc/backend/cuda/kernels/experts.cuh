// How a thread block of the experts' products finds its rows: it looks through all choices itself.
// Which rows are multiplied together depends on the rows beside them; no bits do.
#pragma once

#include "kernels/linear.cuh"

namespace duplex::cuda {

// With fewer pairs than experts each pair has a thread block, which takes all rows of its expert if
// no earlier pair has the same; else each expert has one.
constexpr bool has_block_for_pair(const ExpertLinearArgs& args) {
  return args.n_rows * args.per_row < args.n_experts;
}
constexpr std::int32_t expert_blocks(const ExpertLinearArgs& args) {
  return has_block_for_pair(args) ? args.n_rows * args.per_row : args.n_experts;
}

inline Grid tile_grid(const ExpertLinearArgs& args) {
  return {tiles_of(args.w), expert_blocks(args)};
}

// Of shared memory, behind the product's own: a place and a pair for each row, and the number of
// places. For kExpertRows these are 3 KiB; more rows take several launches.
inline constexpr std::int32_t kExpertRows = 256;
constexpr std::size_t expert_room_bytes(const ExpertLinearArgs& args) {
  const auto n_rows = static_cast<std::size_t>(args.n_rows);
  return n_rows * sizeof(Place) + (n_rows + 1) * sizeof(std::int32_t);
}

// The places of an expert, rows ascending; gives back how many.
DUPLEX_DEVICE std::int32_t find_places(const ExpertLinearArgs& args, std::int32_t expert,
                                       Place* places) {
  auto* const pair_of_row = reinterpret_cast<std::int32_t*>(places + args.n_rows);
  std::int32_t& n_places = pair_of_row[args.n_rows];
  for (std::int32_t row = thread_index(); row < args.n_rows; row += n_threads()) {
    std::int32_t pair = -1;
#pragma unroll 8
    for (std::int32_t i = 0; i < args.per_row; ++i) {
      const std::int32_t of_row = (args.first_row + row) * args.per_row + i;
      if (args.choices[of_row].expert == expert) pair = of_row;
    }
    pair_of_row[row] = pair;
  }
  sync_block();
  for (std::int32_t row = thread_index(); row < args.n_rows; row += n_threads()) {
    const std::int32_t pair = pair_of_row[row];
    std::int32_t place = 0;
#pragma unroll 8
    for (std::int32_t before = 0; before < row; ++before) place += pair_of_row[before] >= 0;
    if (pair >= 0) places[place] = {pair / args.pairs_of_x, pair};
    if (row + 1 == args.n_rows) n_places = place + (pair >= 0);
  }
  sync_block();
  return n_places;
}

// The product of this thread block, without places where there is none. `room` is shared memory.
DUPLEX_DEVICE Job job_of(const ExpertLinearArgs& args, std::byte* room) {
  auto* const places = reinterpret_cast<Place*>(room);
  const bool of_pair = has_block_for_pair(args);
  const std::int32_t pair = args.first_row * args.per_row + block_y();
  const std::int32_t expert = of_pair ? args.choices[pair].expert : args.first_expert + block_y();
  std::int32_t end = find_places(args, expert, places);
  const std::int32_t index = expert - args.first_expert;
  if (index < 0 || index >= args.n_experts || (of_pair && places[0].y != pair)) end = 0;
  return {static_cast<const std::byte*>(args.w.data) + index * args.expert_stride_bytes,
          args.w.n_out,
          args.w.n_in,
          args.x,
          true,
          places,
          0,
          end,
          args.y,
          args.y_stride,
          1.0f,
          args.activated};
}

}  // namespace duplex::cuda
