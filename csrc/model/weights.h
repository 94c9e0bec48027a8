// The weights in run-time form: one arena that holds every packed matrix, vector and table.
//
// load_weights walks the checkpoint twice with the same code: first to measure the arena, then to
// fill it, tensor by tensor, giving file pages back as it goes. The shapes it asks for follow from
// the config alone; anything missing, misshapen, unused or not finite is a CheckpointError.
//
// A rank of a tensor-parallel group packs and reads its own slices alone. The columns of `out` and
// `down` are those of its parts, one behind the other, or each part's a matrix of its own, as the
// backend wants it (packs_parts_apart).
//
// An arena may be written to a file and read again (write_arena, PackedArena): where each number
// lies in it follows from config, shard, dtypes, backend and kPackingVersion.
#pragma once

#include <functional>
#include <memory>
#include <variant>
#include <vector>

#include "backend/backend.h"
#include "core/config.h"
#include "core/shard.h"
#include "model/tensor_source.h"
#include "model/weight_builder.h"

namespace duplex {

struct DenseMlpWeights {
  PackedMatrix gate_up;  // gates, in padded widths of parts, then ups; or in pairs (PackShape)
  PackedMatrix down;
  float global_scale = 1.0f;
};

struct LayerWeights {
  const float* attn_norm = nullptr;
  const float* mlp_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  PackedMatrix qkvr;  // heads padded: q, k, v, then r
  PackedMatrix out;
  const float* k_conv = nullptr;  // (kernel, n_kv_heads * d_head padded)
  const float* v_conv = nullptr;
  const float* attn_conv = nullptr;  // (kernel, d_model padded)
  const float* mlp_conv = nullptr;
  const float* rel_bank = nullptr;  // (d_rel, rel_stride), see AttentionArgs
  std::int64_t rel_stride = 0;
  DenseMlpWeights dense;  // when the layer is dense
  MoeWeights moe;         // when it is not
};

// One depth of multi-token prediction: [hidden, embedded] to a row, and the block that it enters.
struct MtpLayerWeights {
  const float* hidden_norm = nullptr;
  const float* embed_norm = nullptr;
  PackedMatrix input_proj;  // two halves of d_model padded
  LayerWeights block;
};

struct MtpWeights {
  std::vector<MtpLayerWeights> layers;
  const float* chain_norm = nullptr;  // where the checkpoint has one
};

// The hMLP; encoders/hmlp.h computes with it.
struct VisionWeights {
  std::vector<PackedMatrix> linear;  // one a stage
  std::vector<const float*> norm;    // one a stage but the last
  const float* final_norm = nullptr;
};

// What makes rows of text, sound and pictures is null on all ranks but 0.
struct Weights {
  Shard shard;
  DType dtype = DType::kF32;    // of tables, and of the rows that meet the matrices
  const void* embed = nullptr;  // (vocab_size, d_model padded)
  const float* embed_norm = nullptr;
  std::vector<LayerWeights> layers;
  const float* final_norm = nullptr;
  PackedMatrix head;  // this rank's vocabulary_slice
  MtpWeights mtp;
  const void* audio_table = nullptr;  // (n_mels * n_levels, d_model padded)
  const float* audio_norm = nullptr;
  VisionWeights vision;
  std::unique_ptr<Buffer> arena;
};

// Raise it when the bytes of an arena change: the order of its parts, a layout, a rounding.
inline constexpr int kPackingVersion = 1;

// The arena of packed weights in a file of the caller's.
struct PackedArena {
  std::size_t bytes = 0;
  std::function<void(std::byte* to, std::size_t bytes)> read;  // what follows in the file
};
// A checkpoint's tensors, or weights that were packed before.
using WeightSource = std::variant<std::vector<SourceTensor>, PackedArena>;
// `config` is that of the whole model. Throws InvalidArgument where it cannot be cut so.
Weights load_weights(const ModelConfig& config, WeightSource source, const WeightDTypes& dtypes,
                     Backend& backend, const LoadProgress& progress, const Shard& shard = {});
// Hands out the arena from its beginning, piece by piece.
using ArenaWriter = std::function<void(const std::byte* from, std::size_t bytes)>;
void write_arena(const Weights& weights, Backend& backend, const ArenaWriter& write);
// Tells one set of packed weights from another: the same on every machine, and with any number of
// threads. Reads all of them.
std::uint64_t arena_hash(const Weights& weights, Backend& backend);

}  // namespace duplex
