// Loading: a checkpoint's tensors where they lie, or packed weights from a function of Python.
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "core/error.h"

namespace duplex {
namespace {

using ConfigDict = py::typing::Dict<py::str, py::object>;
using TensorTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>, py::array>;

DType dtype_from(const std::string& name, const std::string& what) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  fail(what, ": expected dtype float32 or bfloat16, found ", name);
}

FileType file_type_from(const std::string& name, const std::string& tensor) {
  for (const FileType type : {FileType::kF32, FileType::kBF16, FileType::kF16, FileType::kE4M3,
                              FileType::kE8M0, FileType::kU8, FileType::kI64})
    if (name == file_type_name(type)) return type;
  fail<CheckpointError>("checkpoint: tensor '", tensor,
                        "': expected elements of F32, BF16, F16, F8_E4M3 or packed U8, found ",
                        name);
}

// A format of weights or of keys and values; "" is the dtype itself.
DType format_from(const std::string& name, DType dtype, const std::string& what) {
  if (name == "int8") return DType::kInt8;
  if (name == "int4") return DType::kInt4;
  if (name == "mxfp8") return DType::kMxfp8;
  return name.empty() ? dtype : dtype_from(name, what);
}

// Whether the array is a read-only view of a file, whose pages can be given back and read again.
bool is_file_mapping(const py::array& array) {
  const py::object memmap = py::module_::import("numpy").attr("memmap");
  return py::isinstance(array, memmap) && array.attr("mode").cast<std::string>() == "r";
}

SourceTensor source_tensor(const TensorTuple& tensor) {
  const auto& [name, dtype, shape, data] = tensor;
  SourceTensor source;
  source.name = name;
  source.type = file_type_from(dtype, name);
  source.shape = shape;
  source.data = static_cast<const std::byte*>(data.data());
  source.is_file_mapping = is_file_mapping(data);
  check<CheckpointError>(static_cast<std::size_t>(data.nbytes()) == source.bytes(),
                         "checkpoint: tensor '", name, "' of shape ", shape_text(shape), " needs ",
                         source.bytes(), " bytes, found ", data.nbytes());
  return source;
}

// A function of Python that fills what it is given, and the bytes it has in all.
using PackedReader = std::pair<std::size_t, py::typing::Callable<void(py::memoryview)>>;

using PackedWriter = py::typing::Callable<void(py::memoryview)>;

PackedArena packed_arena(const PackedReader& packed) {
  return {packed.first, [read = &packed.second](std::byte* to, std::size_t bytes) {
            const py::gil_scoped_acquire acquire;
            (*read)(py::memoryview::from_memory(to, static_cast<py::ssize_t>(bytes)));
          }};
}

std::shared_ptr<Engine> load(const ConfigDict& config, const std::vector<TensorTuple>& tensors,
                             const std::optional<PackedReader>& packed,
                             const EngineOptions& options, const py::object& progress,
                             const std::shared_ptr<Engine>& beside) {
  WeightSource source;
  if (packed) {
    source = packed_arena(*packed);
  } else {
    for (const TensorTuple& tensor : tensors)
      std::get<std::vector<SourceTensor>>(source).push_back(source_tensor(tensor));
  }
  const ModelConfig model = config_from_dict(config);
  LoadProgress report;
  if (!progress.is_none())
    report = [&progress](std::size_t done, std::size_t total) {
      const py::gil_scoped_acquire acquire;
      progress(done, total);
    };
  const py::gil_scoped_release release;
  return std::make_shared<Engine>(model, std::move(source), options, report, beside.get());
}

void write_packed(const Engine& engine, const PackedWriter& write) {
  engine.write_arena([&write](const std::byte* from, std::size_t bytes) {
    write(py::memoryview::from_memory(from, static_cast<py::ssize_t>(bytes)));
  });
}

}  // namespace

void bind_loading(py::module_& m, EngineClass& engine) {
  m.attr("PACKING_VERSION") = kPackingVersion;
  engine
      .def(py::init([](const ConfigDict& config, const std::vector<TensorTuple>& tensors,
                       const std::string& device, int n_threads, const std::string& isa,
                       const std::string& dtype, const std::string& weights,
                       const std::string& kv_dtype, std::int64_t memory_bytes,
                       std::int64_t page_bytes, std::int32_t max_batch_rows,
                       std::int64_t max_positions, std::int32_t rewind_rows,
                       const std::optional<PackedReader>& packed, const py::object& progress,
                       const std::optional<std::shared_ptr<Engine>>& beside) {
             EngineOptions options;
             options.device = device;
             options.backend = {n_threads, isa};
             options.dtype = dtype_from(dtype, "dtype");
             options.weights = format_from(weights, options.dtype, "weights");
             options.kv_dtype = format_from(kv_dtype, options.dtype, "kv_dtype");
             options.memory_bytes = memory_bytes;
             options.page_bytes = page_bytes;
             options.max_batch_rows = max_batch_rows;
             options.max_positions = max_positions;
             options.rewind_rows = rewind_rows;
             return load(config, tensors, packed, options, progress, beside.value_or(nullptr));
           }),
           py::arg("config"), py::arg("tensors"), py::kw_only(), py::arg("device") = "cpu",
           py::arg("n_threads") = 0, py::arg("isa") = "", py::arg("dtype") = "float32",
           py::arg("weights") = "", py::arg("kv_dtype") = "",
           py::arg("memory_bytes") = std::int64_t{1} << 30, py::arg("page_bytes") = 0,
           py::arg("max_batch_rows") = 256, py::arg("max_positions") = 32768,
           py::arg("rewind_rows") = 64, py::arg("packed") = py::none(),
           py::arg("progress") = py::none(), py::arg("beside") = py::none())
      .def_property_readonly("arena_bytes", &Engine::arena_bytes)
      .def("write_arena", &write_packed, py::arg("write"),
           "Hands the packed weights to a function, piece by piece.");
}

}  // namespace duplex
