// The raw tensors of a checkpoint, found by name in either of two spellings.
//
// The canonical spelling is the one of the published weights
// ("model.llm.layers.0.attn.wq_du.weight"); the other is the module path of the transformers
// implementation. names.cpp has the table. Reading files is Python's business
// (duplex_engine/checkpoint.py); memory belongs to the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/types.h"

namespace duplex {

struct SourceTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  const std::byte* data = nullptr;
  bool is_file_mapping = false;  // pages that were read may be given back to the system

  std::int64_t elements() const;
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * dtype_bytes(dtype); }
  const std::byte* at(std::int64_t element) const {
    return data + static_cast<std::size_t>(element) * dtype_bytes(dtype);
  }
  // Tells the system that the elements [begin, end) will not be read again soon.
  void release(std::int64_t begin, std::int64_t end) const;
};

std::string shape_text(const std::vector<std::int64_t>& shape);

class TensorSource {
 public:
  explicit TensorSource(std::vector<SourceTensor> tensors);

  // `name` in the canonical spelling. Throws CheckpointError when missing.
  const SourceTensor& find(const std::string& name);
  // nullptr when missing; marks it used otherwise.
  const SourceTensor* try_find(const std::string& name);
  // Throws CheckpointError unless the tensor has this shape.
  const SourceTensor& find(const std::string& name, const std::vector<std::int64_t>& shape);
  // Throws CheckpointError that names every tensor nobody asked for; the multi-token-prediction
  // layers (model.mtp.*) are known and left out.
  void check_all_used() const;

 private:
  std::vector<SourceTensor> tensors_;
  std::unordered_map<std::string, std::size_t> index_;
  std::vector<bool> used_;
};

// The transformers spelling of a canonical name; empty where it has none.
std::string module_name(const std::string& canonical);
// transformers saves a text model, the decoder alone, without the level "language_model": puts it
// in. Any other name is returned as it is.
std::string module_path(const std::string& name);

}  // namespace duplex
