#include "backend/registry.h"
#include "bindings/bindings.h"
#include "encoders/registry.h"

namespace duplex {

PYBIND11_MODULE(_core, m) {
  m.doc() = "The C++ core of duplex_engine.";
  bind_errors(m);
  bind_transport(m);
  bind_engine(m);
  bind_scheduler(m);
  bind_snapshot(m);
  m.def("backend_names", &backend_names, "Devices that this build knows.");
  m.def(
      "encoder_names", [] { return std::vector<std::string>(kEncoders.begin(), kEncoders.end()); },
      "Encoders that turn raw input into rows.");
}

}  // namespace duplex
