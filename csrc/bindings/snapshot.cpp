// Snapshots: bytes of a session to and from functions of Python.
#include "engine/snapshot.h"

#include <memory>

#include "bindings/bindings.h"

namespace duplex {
namespace {

using Begin = py::typing::Callable<void(py::bytes, py::int_)>;
using Piece = py::typing::Callable<void(py::memoryview)>;

void write(Session& session, const Begin& begin, const Piece& write_piece) {
  const SnapshotWriter writer{
      [&](std::span<const std::byte> state, std::int64_t block_bytes) {
        const py::gil_scoped_acquire acquire;
        begin(py::bytes(reinterpret_cast<const char*>(state.data()), state.size()), block_bytes);
      },
      [&](std::span<const std::byte> piece) {
        const py::gil_scoped_acquire acquire;
        write_piece(py::memoryview::from_memory(piece.data(), std::ssize(piece)));
      }};
  const ReleaseGil release;
  write_snapshot(session, writer);
}

std::shared_ptr<Session> read(Engine& engine, const py::bytes& state, const Piece& read_piece,
                              std::int64_t max_positions) {
  const std::string_view view = state;
  const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(view.data()),
                                         view.size());
  const auto reader = [&](std::span<std::byte> piece) {
    const py::gil_scoped_acquire acquire;
    read_piece(py::memoryview::from_memory(piece.data(), std::ssize(piece)));
  };
  const ReleaseGil release;
  return read_snapshot(engine, bytes, reader, max_positions);
}

}  // namespace

void bind_snapshot(py::module_& m) {
  using Gil = py::call_guard<ReleaseGil>;
  m.def("write_snapshot", &write, py::arg("session"), py::arg("begin"), py::arg("write"),
        "Calls begin(state, bytes of blocks), then write with those bytes, piece by piece.");
  m.def("read_snapshot", &read, py::arg("engine"), py::arg("state"), py::arg("read"),
        py::arg("max_positions"),
        "A session from its state and a function that fills buffers with the blocks' bytes. "
        "max_positions: 0 for those of the state.");
  m.def("copy_session", &copy_session, py::arg("session"), py::arg("engine"), Gil(),
        "A session of `engine` that goes on where another engine's session is.");
  m.def("weights_hash", &Engine::weights_hash, py::arg("engine"), Gil());
}

}  // namespace duplex
