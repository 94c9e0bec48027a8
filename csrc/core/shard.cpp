#include "core/shard.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace duplex {
namespace {

// What a slice of so many input columns lacks, empty if nothing.
std::string column_misfit(DType matrices, const char* of, std::int64_t n_columns) {
  if (!is_quantised(matrices) || n_columns % quantised_group(matrices) == 0) return "";
  return text_of("slices of whole groups of ", quantised_group(matrices), " columns for ",
                 dtype_name(matrices), " weights (of ", of, ": ", n_columns, " columns)");
}

std::string attention_misfit(const AttentionShape& shape, DType matrices, const Shard& shard) {
  const std::int32_t n = shard.total_parts(), n_kv = shape.n_kv_heads;
  if (shape.n_heads % n != 0) return text_of("a divisor of ", shape.n_heads, " heads");
  if (n_kv % shard.size != 0 && shard.size % n_kv != 0)
    return text_of("a divisor or a multiple of ", n_kv, " key/value heads");
  return column_misfit(matrices, "heads", std::int64_t{shape.n_heads / n} * shape.d_head_padded());
}

std::string width_misfit(const char* name, std::int32_t width, DType matrices, std::int32_t n) {
  if (width % n != 0) return text_of("a divisor of ", name, " ", width);
  return column_misfit(matrices, name, width / n);
}

// What would have to be given in place of total_parts, empty if the model can be cut so.
std::string misfit(const ModelConfig& config, DType matrices, const Shard& shard) {
  const std::int32_t n = shard.total_parts();
  if (n == 1) return "";
  ModelConfig all = config;  // with the layers that draft
  all.layers.insert(all.layers.end(), config.mtp.layers.begin(), config.mtp.layers.end());
  for (const std::string& problem :
       {all.has_global() ? attention_misfit(config.global, matrices, shard) : "",
        all.has_local() ? attention_misfit(config.local, matrices, shard) : "",
        all.has_dense() ? width_misfit("d_ff", config.d_ff, matrices, n) : "",
        all.has_moe() ? width_misfit("d_expert", config.moe.d_expert, matrices, n) : ""})
    if (!problem.empty()) return problem;
  if (config.unpadded_vocab_size >= shard.size) return "";
  return text_of("at most ", config.unpadded_vocab_size, ", the vocabulary");
}

// "1, 2 or 4 fit"
std::string what_fits(const ModelConfig& config, DType matrices) {
  std::string fits = "1";
  std::int32_t last = 1;
  for (std::int32_t size = 2; size <= kMaxParts; ++size)
    if (misfit(config, matrices, {0, size, 1}).empty()) {
      if (last > 1) fits += text_of(", ", last);
      last = size;
    }
  return last == 1 ? "1 fits" : fits + text_of(" or ", last, " fit");
}

}  // namespace

std::int32_t virtual_shards(const ModelConfig& config, DType matrices) {
  for (const std::int32_t n : {8, 4, 2})
    if (misfit(config, matrices, {0, n, 1}).empty()) return n;
  return 1;
}

void check_shard(const ModelConfig& config, DType matrices, const Shard& shard) {
  check(shard.size >= 1 && shard.n_parts >= 1 && shard.size <= kMaxParts / shard.n_parts,
        "tensor_parallel: expected 1 to ", kMaxParts, ", found ", shard.size,
        shard.n_parts > 1 ? text_of(" with ", shard.n_parts, " parts each") : "");
  check(shard.rank >= 0 && shard.rank < shard.size, "rank: expected 0 to ", shard.size - 1,
        ", found ", shard.rank);
  const std::string expected = misfit(config, matrices, shard);
  check(expected.empty(), "tensor_parallel: expected ", expected, ", found ", shard.total_parts(),
        "; ", what_fits(config, matrices));
}

Shard make_shard(const ModelConfig& config, DType matrices, std::int32_t rank, std::int32_t size,
                 Reduction reduction) {
  Shard shard{rank, size, 1};
  check_shard(config, matrices, shard);
  if (reduction == Reduction::kInvariant) {
    const std::int32_t n = virtual_shards(config, matrices);
    check(size >= 1 && n % size == 0, "tensor_parallel: expected a divisor of ", n,
          ", the virtual shards of reduction 'invariant', found ", size);
    shard.n_parts = n / size;
  }
  return shard;
}

ModelConfig shard_config(const ModelConfig& config, const Shard& shard) {
  if (shard.is_whole()) return config;
  ModelConfig sliced = config;
  for (AttentionShape* shape : {&sliced.global, &sliced.local}) {
    if (shape->n_heads == 0) continue;  // there are no such layers
    shape->n_kv_heads = static_cast<std::int32_t>(kv_head_slice(*shape, shard).n);
    shape->n_heads /= shard.size;
  }
  const auto width = [&](std::int32_t whole) {
    return static_cast<std::int32_t>(shard.n_parts *
                                     round_up(whole / shard.total_parts(), kColumnAlign));
  };
  sliced.d_ff = width(config.d_ff);
  sliced.moe.d_expert = width(config.moe.d_expert);
  return sliced;
}

Slice head_slice(const AttentionShape& shape, const Shard& shard) {
  const std::int64_t n = shape.n_heads / shard.size;
  return {shard.rank * n, n};
}

Slice kv_head_slice(const AttentionShape& shape, const Shard& shard) {
  const std::int64_t n_kv = shape.n_kv_heads;
  return {shard.rank * n_kv / shard.size, std::max<std::int64_t>(n_kv / shard.size, 1)};
}

Slice vocabulary_slice(const ModelConfig& config, std::int32_t rank, std::int32_t size) {
  const std::int64_t n = config.unpadded_vocab_size;
  const std::int64_t first = n * rank / size;
  return {first, n * (rank + 1) / size - first};
}

}  // namespace duplex
