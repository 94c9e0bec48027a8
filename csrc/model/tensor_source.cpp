#include "model/tensor_source.h"

#include <utility>

#include "backend/quantised.h"
#include "core/error.h"

namespace duplex {
namespace {

using Shape = std::vector<std::int64_t>;

constexpr std::int64_t kMxBlock = 32;
constexpr std::int64_t kFp8BlockSide = 128;

bool holds_codes(const SourceTensor& tensor) {
  return tensor.type == FileType::kE2M1 || tensor.type == FileType::kE4M3;
}
bool is_float(FileType type) {
  return type == FileType::kF32 || type == FileType::kBF16 || type == FileType::kF16;
}
bool is_exponent(FileType type) { return type == FileType::kU8 || type == FileType::kE8M0; }

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

// The shape of one value for each matrix of the tensor, and how many matrices that are.
Shape matrix_shape(const SourceTensor& tensor) {
  if (tensor.shape.size() < 3) return {};
  return {tensor.shape.begin(), tensor.shape.end() - 2};
}
std::int64_t matrices(const SourceTensor& tensor) {
  std::int64_t n = 1;
  for (const std::int64_t size : matrix_shape(tensor)) n *= size;
  return n;
}

// A scale for each run of `block` columns: NVFP4 and the MX formats.
void use_column_blocks(SourceTensor& tensor, const SourceTensor& scale, std::int64_t block) {
  Shape expected = tensor.shape;
  if (expected.empty()) expected.push_back(1);
  expected.back() = div_up(expected.back(), block);
  check<CheckpointError>(scale.shape == expected, "checkpoint: tensor '", scale.name,
                         "': expected shape ", shape_text(expected), ", a scale for each ", block,
                         " columns of '", tensor.name, "', found ", shape_text(scale.shape));
  tensor.scales.block_columns = block;
  tensor.scales.block_stride = tensor.n_rows() * expected.back();
}

// Float scales of E4M3 codes: one for all, one for a matrix, a row, or a block of 128 x 128.
void use_float_scales(SourceTensor& tensor, const SourceTensor& scale) {
  Scales& scales = tensor.scales;
  const std::int64_t rows = tensor.n_rows(), width = tensor.n_columns();
  const Shape per_matrix = matrix_shape(tensor);
  const auto with = [](Shape shape, std::initializer_list<std::int64_t> more) {
    shape.insert(shape.end(), more);
    return shape;
  };
  const Shape blocks =
      with(per_matrix, {div_up(rows, kFp8BlockSide), div_up(width, kFp8BlockSide)});
  scales.block_rows = rows;
  scales.block_columns = width;
  if (scale.elements() == 1) return;
  if (scale.shape == per_matrix || scale.shape == with(per_matrix, {1}) ||
      scale.shape == with(per_matrix, {1, 1})) {
    scales.block_stride = 1;
  } else if (scale.shape == with(per_matrix, {rows}) ||
             scale.shape == with(per_matrix, {rows, 1})) {
    scales.block_rows = 1;
    scales.block_stride = rows;
  } else {
    check<CheckpointError>(scale.shape == blocks, "checkpoint: tensor '", scale.name,
                           "': expected one scale, ", shape_text(with(per_matrix, {rows, 1})),
                           " (one a row) or ", shape_text(blocks), " (one for ", kFp8BlockSide,
                           " x ", kFp8BlockSide, ") for '", tensor.name, "' of shape ",
                           shape_text(tensor.shape), ", found ", shape_text(scale.shape));
    scales.block_rows = scales.block_columns = kFp8BlockSide;
    scales.block_stride = blocks[blocks.size() - 2] * blocks.back();
  }
}

}  // namespace

TensorSource::TensorSource(std::vector<SourceTensor> tensors)
    : tensors_(std::move(tensors)), used_(tensors_.size(), false) {
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    check<CheckpointError>(index_.emplace(module_path(tensors_[i].name), i).second,
                           "checkpoint: tensor '", tensors_[i].name, "' appears twice");
}

TensorSource TensorSource::of_shapes() {
  TensorSource source({SourceTensor{}});
  source.is_of_shapes_ = true;
  return source;
}

SourceTensor* TensorSource::lookup(const std::string& name) {
  const auto found = index_.find(name);
  if (found == index_.end()) return nullptr;
  used_[found->second] = true;
  return &tensors_[found->second];
}

SourceTensor* TensorSource::lookup_any(const std::vector<std::string>& names) {
  for (const std::string& name : names)
    if (SourceTensor* tensor = lookup(name)) return tensor;
  return nullptr;
}

const SourceTensor* TensorSource::try_find(const std::string& name) {
  if (is_of_shapes_) return tensors_.data();
  for (const std::string& spelling : {module_path(name), module_name(name)}) {
    if (spelling.empty()) continue;
    SourceTensor* tensor = lookup(spelling);
    if (tensor == nullptr) tensor = lookup_any(companion_names(spelling, Companion::kCodes));
    if (tensor == nullptr) continue;
    if (tensor->type == FileType::kU8 && !tensor->shape.empty()) {
      tensor->type = FileType::kE2M1;
      tensor->shape.back() *= 2;
    }
    check<CheckpointError>(is_float(tensor->type) || holds_codes(*tensor), "checkpoint: tensor '",
                           tensor->name,
                           "': expected elements of F32, BF16, F16, F8_E4M3 or packed U8, found ",
                           file_type_name(tensor->type));
    if (holds_codes(*tensor) && tensor->scales.block == nullptr) attach_scales(*tensor, spelling);
    return tensor;
  }
  return nullptr;
}

void TensorSource::attach_scales(SourceTensor& tensor, const std::string& name) {
  const std::vector<std::string> block_names = companion_names(name, Companion::kBlockScale);
  const SourceTensor* const block = lookup_any(block_names);
  check<CheckpointError>(block != nullptr, "checkpoint: tensor '", tensor.name, "' holds ",
                         file_type_name(tensor.type), " codes: expected their scales as one of ",
                         listed(block_names), ", found none");
  const bool is_nvfp4 = tensor.type == FileType::kE2M1 && block->type == FileType::kE4M3;
  if (is_nvfp4) {
    use_column_blocks(tensor, *block, kNvfp4Group);
  } else if (is_exponent(block->type)) {
    use_column_blocks(tensor, *block, kMxBlock);
  } else {
    check<CheckpointError>(
        tensor.type == FileType::kE4M3 && is_float(block->type), "checkpoint: tensor '",
        block->name, "': expected scales of ",
        tensor.type == FileType::kE2M1 ? "F8_E4M3 or F8_E8M0" : "F8_E8M0, F32, BF16 or F16",
        " for the ", file_type_name(tensor.type), " codes of '", tensor.name, "', found ",
        file_type_name(block->type));
    use_float_scales(tensor, *block);
  }
  tensor.scales.block = block;
  for (const std::string& unused : companion_names(name, Companion::kUnused)) lookup(unused);
  if (!is_nvfp4) return;
  std::vector<std::string> names = companion_names(name, Companion::kMultiplier);
  const SourceTensor* global = lookup_any(names);
  if (global == nullptr) {
    const std::vector<std::string> divisors = companion_names(name, Companion::kDivisor);
    global = lookup_any(divisors);
    tensor.scales.is_divisor = global != nullptr;
    names.insert(names.end(), divisors.begin(), divisors.end());
  }
  check<CheckpointError>(global != nullptr, "checkpoint: tensor '", tensor.name,
                         "' holds NVFP4 codes: expected their second scale as one of ",
                         listed(names), ", found none");
  const std::int64_t n = matrices(tensor);
  check<CheckpointError>(
      is_float(global->type) && (global->elements() == 1 || global->elements() == n),
      "checkpoint: tensor '", global->name, "': expected ", n,
      n == 1 ? " float" : " floats, one for each matrix", " of '", tensor.name, "', or one, found ",
      file_type_name(global->type), " ", shape_text(global->shape));
  tensor.scales.global = global;
  tensor.scales.global_stride = global->elements() == 1 ? 0 : 1;
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
  if (is_of_shapes_) tensors_.front().shape = shape;
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
