// Products of bfloat16 rows on the tensor cores, whatever the weights are stored as: a `Round`
// holds what a lane loads of a tile in one round of its warp, and turns a step of it into the left
// operands of two matrix instructions. The first kSharedBytes of shared memory are its own.
//
// The warps of a thread block share the reduction in a fixed way, and their sums are added in the
// order of the warps, so an output has the same bits whatever other rows there are.
#pragma once

#include "kernels/experts.cuh"

namespace duplex::cuda {

inline constexpr int kWarps = 8;
inline constexpr int kAhead = 4;  // steps whose weights are in flight

// Asks for the bytes of a tile from `first` on, into the second-level cache. Nothing is waited for.
template <class Round>
DUPLEX_DEVICE void prefetch_tile(const Job& job, std::int32_t tile, std::int64_t first) {
  constexpr std::int64_t kPiece = 4096;
  const std::int64_t bytes = Round::tile_bytes((job.n_in + kBf16Step - 1) / kBf16Step);
  const auto* const at = static_cast<const std::byte*>(job.w) + tile * bytes;
  for (std::int64_t i = first + thread_index() * kPiece; i < bytes; i += n_threads() * kPiece)
    prefetch(at + i, static_cast<std::uint32_t>(bytes - i < kPiece ? bytes - i : kPiece));
}

// A lane's part of the rows in one step; zeros where there is nothing.
template <int kTiles>
DUPLEX_DEVICE void load_rows(const Job& job, std::int32_t first, std::int32_t step,
                             Words (&x)[kTiles]) {
  const int lane = thread_index() % kWarp;
  const std::int32_t k = step * kBf16Step + lane % 4 * 8;
  for (int t = 0; t < kTiles; ++t) {
    const std::int32_t place = first + t * kTileRows + lane / 4;
    x[t] = {};
    if (place < job.end && k < job.n_in)
      x[t] = *reinterpret_cast<const Words*>(job.row<std::uint16_t>(place) + k);
  }
}

// Outputs of one tile for up to kTiles * 8 rows from `first` on. Rows are those of the grid before,
// weights are nobody's: the first of them are on their way while it ends, and with `asks_ahead` the
// others are asked for.
template <class Round, int kTiles>
DUPLEX_DEVICE void multiply_tile(const Job& job, std::int32_t tile, std::int32_t first,
                                 bool asks_ahead) {
  const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
  const std::int32_t n_steps = (job.n_in + kBf16Step - 1) / kBf16Step;
  float acc[kTiles][4] = {};
  Round round{};
  if (warp < n_steps) round.load(job, tile, warp, n_steps);
  if (asks_ahead) prefetch_tile<Round>(job, tile, kWarps * kAhead * Round::kStepBytes);
  wait_for_previous_grid();
  // Few rows come some steps ahead, of many there are registers for one step.
  constexpr int kRowsAhead = kTiles == 1 ? kAhead : kTiles <= 4 ? 2 : 0;
  constexpr int kHeld = kRowsAhead > 0 ? kRowsAhead : 1;
  Words x[kHeld][kTiles];
  for (int i = 0; i < kRowsAhead; ++i) load_rows(job, first, warp + i * kWarps, x[i]);
  for (std::int32_t step = warp; step < n_steps;) {
    for (int i = 0; i < kAhead; ++i) {
      if (step + i * kWarps >= n_steps) break;
      Words(&rows)[kTiles] = x[i % kHeld];
      if (kRowsAhead == 0) load_rows(job, first, step + i * kWarps, rows);
      Words w[2];
      round.operands(i, w);
      for (int t = 0; t < kTiles; ++t) {
        multiply_add(acc[t], w[0], rows[t].v[0], rows[t].v[1]);
        multiply_add(acc[t], w[1], rows[t].v[2], rows[t].v[3]);
      }
      if (kRowsAhead > 0) load_rows(job, first, step + (i + kRowsAhead) * kWarps, rows);
    }
    step += kWarps * kAhead;
    if (step < n_steps) round.load(job, tile, step, n_steps);
  }
  // (warp, tile of rows, row, output), then added up in the order of the warps.
  auto* const sums = reinterpret_cast<float*>(shared_memory() + Round::kSharedBytes);
  constexpr int kSums = kTiles * kTileRows * kTileOutputs;
  sync_block();
  for (int t = 0; t < kTiles; ++t)
    for (int i = 0; i < 4; ++i) {
      const int output = lane / 4 + i / 2 * 8, row = lane % 4 * 2 + i % 2;
      sums[warp * kSums + (t * kTileRows + row) * kTileOutputs + output] = acc[t][i];
    }
  sync_block();
  for (int i = thread_index(); i < kSums; i += n_threads()) {
    const int output = i % kTileOutputs;
    const std::int32_t place = first + i / kTileOutputs;
    if (place - lane / kTileOutputs >= job.end) break;  // a warp has two rows
    float sum = sums[i];
    for (int other = 1; other < kWarps; ++other) sum += sums[other * kSums + i];
    if (job.activated.data != nullptr) {
      const float up = shuffle_down(sum, kTilePairs, kTileOutputs);
      if (place < job.end && output < kTilePairs)
        store_activated(job.activated, job.out_row(place), tile * kTilePairs + output, sum, up);
      continue;
    }
    if (place >= job.end) break;
    if (job.divisor != 1.0f) sum /= job.divisor;
    job.out(place)[tile * kTileOutputs + output] = sum;
  }
}

// A matrix for the rows of one expert, two tiles of them at a time. Where these lie is said behind
// the sums in shared memory.
template <class Round>
DUPLEX_DEVICE void multiply_expert(const Job& job, std::int32_t tile) {
  for (std::int32_t first = job.begin; first < job.end; first += 2 * kTileRows) {
    if (job.end - first > kTileRows)
      multiply_tile<Round, 2>(job, tile, first, false);
    else
      multiply_tile<Round, 1>(job, tile, first, false);
  }
}

template <int kTiles>
constexpr std::size_t tile_bytes() {
  return sizeof(float) * kWarps * kTiles * kTileRows * kTileOutputs;
}

// launch<kTiles>() with as many tiles of rows as a thread block should take.
template <class Launch>
void with_tiles(std::int32_t n_rows, const Launch& launch) {
  if (n_rows <= kTileRows)
    launch.template operator()<1>();
  else if (n_rows <= 2 * kTileRows)
    launch.template operator()<2>();
  else if (n_rows <= 3 * kTileRows)
    launch.template operator()<3>();
  else if (n_rows <= 4 * kTileRows)
    launch.template operator()<4>();
  else
    launch.template operator()<8>();
}

template <int kTiles>
Grid tile_grid(const LinearArgs& args) {
  return {tiles_of(args.w), div_up(args.n_rows, kTiles * kTileRows)};
}
template <class Round>
constexpr std::size_t kExpertRoomAt = Round::kSharedBytes + tile_bytes<2>();

// The job of a thread block of an expert. All of its tile is asked for, as the rounds of its warps
// have few bytes on their way.
template <class Round>
DUPLEX_DEVICE Job expert_job(const ExpertLinearArgs& args) {
  const Job job = job_of(args, shared_memory() + kExpertRoomAt<Round>);
  if (job.begin < job.end) prefetch_tile<Round>(job, block_x(), 0);
  return job;
}

}  // namespace duplex::cuda
