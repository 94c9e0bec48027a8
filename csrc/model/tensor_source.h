// The raw tensors of a checkpoint, found by name in either of two spellings, codes with their
// scales attached.
//
// The canonical spelling is the one of the published weights
// ("model.llm.layers.0.attn.wq_du.weight"); the other is the module path of the transformers
// implementation. names.cpp has the tables. Reading files is Python's business
// (duplex_engine/checkpoint.py); memory belongs to the caller.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "model/source_tensor.h"

namespace duplex {

class TensorSource {
 public:
  explicit TensorSource(std::vector<SourceTensor> tensors);
  // A source without bytes that has every tensor, in the published spelling and the shape asked
  // for. A reference it returns is good until the next question.
  static TensorSource of_shapes();

  // `name` in the canonical spelling. Throws CheckpointError when missing.
  const SourceTensor& find(const std::string& name);
  // nullptr when missing; marks it used otherwise. Throws CheckpointError when it holds codes whose
  // scales are missing or do not fit.
  const SourceTensor* try_find(const std::string& name);
  // Throws CheckpointError unless the tensor has this shape.
  const SourceTensor& find(const std::string& name, const std::vector<std::int64_t>& shape);
  // Throws CheckpointError that names every tensor nobody asked for; multi-token-prediction layers
  // (model.mtp.*) may be left out.
  void check_all_used() const;

 private:
  SourceTensor* lookup(const std::string& name);
  // The first of the names that is there, marked used; nullptr if none is.
  SourceTensor* lookup_any(const std::vector<std::string>& names);
  void attach_scales(SourceTensor& tensor, const std::string& name);

  std::vector<SourceTensor> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
  std::vector<bool> used_;
  bool is_of_shapes_ = false;
};

// The transformers spelling of a canonical name; empty where it has none.
std::string module_name(const std::string& canonical);
// transformers saves a text model, the decoder alone, without the level "language_model": puts it
// in. Any other name is returned as it is.
std::string module_path(const std::string& name);

// What accompanies a tensor of codes.
enum class Companion : std::uint8_t { kCodes, kBlockScale, kMultiplier, kDivisor, kUnused };
// Every spelling of a companion of the tensor `name`. kCodes: the tensor itself under another name.
std::vector<std::string> companion_names(const std::string& name, Companion companion);

}  // namespace duplex
