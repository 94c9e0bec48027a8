#include "model/tensor_source.h"

#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "core/error.h"

namespace duplex {

std::int64_t SourceTensor::elements() const {
  std::int64_t n = 1;
  for (const std::int64_t size : shape) n *= size;
  return n;
}

void SourceTensor::release(std::int64_t begin, std::int64_t end) const {
  if (!is_file_mapping) return;
  const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t first =
      (reinterpret_cast<std::uintptr_t>(at(begin)) + page - 1) / page * page;
  const std::uintptr_t last = reinterpret_cast<std::uintptr_t>(at(end)) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i)
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + ")";
}

TensorSource::TensorSource(std::vector<SourceTensor> tensors)
    : tensors_(std::move(tensors)), used_(tensors_.size(), false) {
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    check<CheckpointError>(index_.emplace(module_path(tensors_[i].name), i).second,
                           "checkpoint: tensor '", tensors_[i].name, "' appears twice");
}

const SourceTensor* TensorSource::try_find(const std::string& name) {
  auto found = index_.find(module_path(name));
  if (found == index_.end()) {
    const std::string alias = module_name(name);
    if (!alias.empty()) found = index_.find(alias);
  }
  if (found == index_.end()) return nullptr;
  used_[found->second] = true;
  return &tensors_[found->second];
}

const SourceTensor& TensorSource::find(const std::string& name) {
  const SourceTensor* tensor = try_find(name);
  if (tensor == nullptr) {
    const std::string alias = module_name(name);
    fail<CheckpointError>("checkpoint: tensor '", name, "' is missing",
                          alias.empty() ? "" : " (also looked for '" + alias + "')");
  }
  return *tensor;
}

const SourceTensor& TensorSource::find(const std::string& name,
                                       const std::vector<std::int64_t>& shape) {
  const SourceTensor& tensor = find(name);
  check<CheckpointError>(tensor.shape == shape, "checkpoint: tensor '", tensor.name,
                         "': expected shape ", shape_text(shape), " from config.json, found ",
                         shape_text(tensor.shape));
  return tensor;
}

void TensorSource::check_all_used() const {
  constexpr std::size_t kMaxListed = 8;
  std::string names;
  std::size_t count = 0;
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    if (used_[i] || tensors_[i].name.rfind("model.mtp.", 0) == 0) continue;
    if (++count <= kMaxListed) names += (count == 1 ? "'" : ", '") + tensors_[i].name + "'";
  }
  check<CheckpointError>(count == 0, "checkpoint: ", count,
                         count == 1 ? " tensor is" : " tensors are",
                         " not part of the model: ", names, count > kMaxListed ? ", ..." : "",
                         "; does config.json belong to these weights?");
}

}  // namespace duplex
