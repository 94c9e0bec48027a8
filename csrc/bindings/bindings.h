// The parts of the Python module. Bindings translate types and release the GIL, nothing else.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "core/config.h"
#include "engine/engine.h"

namespace duplex {

namespace py = pybind11;

void bind_errors(py::module_& m);
void bind_engine(py::module_& m);
void bind_snapshot(py::module_& m);
void bind_transport(py::module_& m);
void bind_scheduler(py::module_& m);
using EngineClass = py::class_<Engine, std::shared_ptr<Engine>>;
void bind_loading(py::module_& m, EngineClass& engine);

// While it lives, other threads may hold the GIL. note: py::gil_scoped_release ends the process
// where Python, as it ends, unwinds a thread that asks for the GIL; a daemon thread inside a call
// is one.
class ReleaseGil {
 public:
  ReleaseGil() : state_(PyEval_SaveThread()) {}
  ~ReleaseGil() noexcept(false) { PyEval_RestoreThread(state_); }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* state_;
};

// From dicts of plain values: `core_config.py` and `engine.py` write them.
using PlainDict = py::typing::Dict<py::str, py::object>;
ModelConfig config_from_dict(const PlainDict& values);
EngineOptions options_from_dict(const PlainDict& values);

}  // namespace duplex
