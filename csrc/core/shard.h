// How a model is cut for tensor parallelism: what one rank of a group computes of every layer.
//
// A rank has whole heads, a slice of the width of each MLP and expert, and a slice of the
// vocabulary. Where there are fewer key/value heads than ranks, several ranks have the same one.
// What a rank sums over its columns of an attention's or MLP's output is one partial sum, or
// several: one for each of its parts. All ranks add all parts in ascending order (model/inkling.h).
#pragma once

#include <cstdint>

#include "core/config.h"
#include "core/types.h"

namespace duplex {

inline constexpr std::int32_t kMaxParts = 8;  // of all ranks together

struct Shard {
  std::int32_t rank = 0;
  std::int32_t size = 1;     // ranks
  std::int32_t n_parts = 1;  // of each rank

  constexpr std::int32_t total_parts() const { return size * n_parts; }
  constexpr bool is_whole() const { return total_parts() == 1; }
};

// How partial sums are cut and added: one part for each rank, in rank order; the same number of
// parts, virtual_shards, for any number of ranks, so that the bits do not depend on it; or one part
// for each rank, in the order that an NVLink switch chooses.
enum class Reduction : std::uint8_t { kRanks, kInvariant, kSwitch };

// The largest of 8, 4, 2 and 1 that this model can be cut into, with matrices in that format.
std::int32_t virtual_shards(const ModelConfig& config, DType matrices);
// Throws InvalidArgument where the model cannot be cut so; says what does not divide and what fits.
Shard make_shard(const ModelConfig& config, DType matrices, std::int32_t rank, std::int32_t size,
                 Reduction reduction);
void check_shard(const ModelConfig& config, DType matrices, const Shard& shard);
// The model as one rank sees it: its heads, and widths padded part by part. Layout and working
// buffers follow from it; the vocabulary stays whole.
ModelConfig shard_config(const ModelConfig& config, const Shard& shard);

struct Slice {
  std::int64_t first = 0;
  std::int64_t n = 0;
};
// Of one rank.
Slice head_slice(const AttentionShape& shape, const Shard& shard);
Slice kv_head_slice(const AttentionShape& shape, const Shard& shard);
Slice vocabulary_slice(const ModelConfig& config, std::int32_t rank, std::int32_t size);

}  // namespace duplex
