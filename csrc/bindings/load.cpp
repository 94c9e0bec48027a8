// Loading: a checkpoint's tensors where they lie, or packed weights from a function of Python; an
// engine, or one rank of several.
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/torch_transport.h"
#include "core/error.h"
#include "ranks/leader.h"
#include "ranks/worker.h"

namespace duplex {
namespace {

using TensorTuple = std::tuple<std::string, std::string, std::vector<std::int64_t>, py::array>;

FileType file_type_from(const std::string& name, const std::string& tensor) {
  for (const FileType type : {FileType::kF32, FileType::kBF16, FileType::kF16, FileType::kE4M3,
                              FileType::kE8M0, FileType::kU8, FileType::kI64})
    if (name == file_type_name(type)) return type;
  fail<CheckpointError>("checkpoint: tensor '", tensor,
                        "': expected elements of F32, BF16, F16, F8_E4M3 or packed U8, found ",
                        name);
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

WeightSource weight_source(const std::vector<TensorTuple>& tensors,
                           const std::optional<PackedReader>& packed) {
  if (packed) return packed_arena(*packed);
  std::vector<SourceTensor> sources;
  for (const TensorTuple& tensor : tensors) sources.push_back(source_tensor(tensor));
  return sources;
}

LoadProgress load_progress(const py::object& progress) {
  if (progress.is_none()) return {};
  return [&progress](std::size_t done, std::size_t total) {
    const py::gil_scoped_acquire acquire;
    progress(done, total);
  };
}

std::shared_ptr<Engine> load(const PlainDict& config, const std::vector<TensorTuple>& tensors,
                             const PlainDict& options, const std::optional<PackedReader>& packed,
                             const py::object& progress,
                             const std::optional<std::shared_ptr<Engine>>& beside,
                             const std::optional<std::shared_ptr<RankLeader>>& ranks) {
  WeightSource source = weight_source(tensors, packed);
  const ModelConfig model = config_from_dict(config);
  const EngineOptions engine = options_from_dict(options);
  const LoadProgress report = load_progress(progress);
  const ReleaseGil release;
  return {new Engine(model, std::move(source), engine, report, beside.value_or(nullptr).get(),
                     ranks.value_or(nullptr)),
          OwnerDelete()};
}

template <class HasArena>
void write_packed(const HasArena& weights, const PackedWriter& write) {
  const ReleaseGil release;
  weights.write_arena([&write](const std::byte* from, std::size_t bytes) {
    const py::gil_scoped_acquire acquire;
    write(py::memoryview::from_memory(from, static_cast<py::ssize_t>(bytes)));
  });
}

void bind_leader(py::module_& m) {
  using Gil = py::call_guard<ReleaseGil>;
  m.def(
      "n_parts",
      [](const PlainDict& config, const PlainDict& options) {
        const EngineOptions of = options_from_dict(options);
        return make_shard(config_from_dict(config), of.weights, 0, of.n_ranks, of.reduction)
            .total_parts();
      },
      py::arg("config"), py::arg("options"),
      "Partial sums of all ranks together; raises where they do not fit.");
  py::class_<RankLeader, std::shared_ptr<RankLeader>>(m, "RankLeader", "A group, seen by rank 0.")
      .def(py::init([](const PlainDict& config, const PlainDict& options,
                       const std::optional<std::shared_ptr<TorchTransport>>& torch) {
             return std::make_shared<RankLeader>(
                 config_from_dict(config), options_from_dict(options), torch.value_or(nullptr));
           }),
           py::arg("config"), py::arg("options"), py::arg("torch") = py::none())
      .def_property_readonly("n_ranks", [](const RankLeader& r) { return r.group().n_ranks(); })
      .def_property_readonly(
          "fd", [](const RankLeader& r) { return r.group().fd(); },
          "Of the memory that the ranks share; a worker inherits it.")
      .def("worker_socket", &RankLeader::worker_socket, py::arg("rank"),
           "The end that the worker inherits of the socket between it and this process.")
      .def_property_readonly(
          "n_channels", [](const RankLeader& r) { return r.group().n_channels(); },
          "Lanes, and page memory.")
      .def("fail", &RankLeader::fail, py::arg("rank"), py::arg("reason"), Gil())
      .def("stop", &RankLeader::stop, Gil());
}

std::unique_ptr<RankWorker> load_worker(
    const PlainDict& config, const std::vector<TensorTuple>& tensors, const PlainDict& options,
    const std::optional<PackedReader>& packed, const py::object& progress, int rank, int fd,
    int socket, const std::optional<std::shared_ptr<TorchTransport>>& torch) {
  WeightSource source = weight_source(tensors, packed);
  const ModelConfig model = config_from_dict(config);
  const EngineOptions engine = options_from_dict(options);
  const LoadProgress report = load_progress(progress);
  const ReleaseGil release;
  Group group =
      torch ? Group::apart(group_options(model, engine), rank, *torch) : Group::join(fd, rank);
  return std::make_unique<RankWorker>(model, std::move(source), engine, std::move(group), report,
                                      socket);
}

void bind_worker(py::module_& m) {
  using Gil = py::call_guard<ReleaseGil>;
  py::class_<RankWorker>(m, "RankWorker", "A rank that is not rank 0, loaded.")
      .def(py::init(&load_worker), py::arg("config"), py::arg("tensors"), py::arg("options"),
           py::kw_only(), py::arg("packed") = py::none(), py::arg("progress") = py::none(),
           py::arg("rank"), py::arg("fd") = -1, py::arg("socket") = -1,
           py::arg("torch") = py::none(),
           "fd: of the memory that the ranks share; or torch, where they share none.")
      .def("serve", &RankWorker::serve, Gil(), "Does what rank 0 asks for until it says stop.")
      .def_property_readonly("description", &RankWorker::description)
      .def_property_readonly("arena_bytes", &RankWorker::arena_bytes)
      .def("write_arena", &write_packed<RankWorker>, py::arg("write"))
      .def("weights_hash", &RankWorker::weights_hash, Gil());
}

}  // namespace

void bind_loading(py::module_& m, EngineClass& engine) {
  m.attr("PACKING_VERSION") = kPackingVersion;
  bind_leader(m);
  bind_worker(m);
  engine
      .def(py::init(&load), py::arg("config"), py::arg("tensors"), py::arg("options"),
           py::kw_only(), py::arg("packed") = py::none(), py::arg("progress") = py::none(),
           py::arg("beside") = py::none(), py::arg("ranks") = py::none())
      .def_property_readonly("arena_bytes", &Engine::arena_bytes)
      .def("write_arena", &write_packed<Engine>, py::arg("write"),
           "Hands the packed weights to a function, piece by piece.");
}

}  // namespace duplex
