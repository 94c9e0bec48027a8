// The exception classes of core/error.h as Python classes, each also a builtin error of its kind.
#include "bindings/bindings.h"
#include "core/error.h"

namespace duplex {
namespace {

py::object make_class(py::module_& m, const char* name, const py::tuple& bases, const char* doc) {
  const std::string qualified = std::string("duplex_engine._core.") + name;
  py::object type = py::reinterpret_steal<py::object>(
      PyErr_NewExceptionWithDoc(qualified.c_str(), doc, bases.ptr(), nullptr));
  m.attr(name) = type;
  return type;
}

template <class E>
void bind(py::module_& m, const py::object& base, const char* name, PyObject* builtin,
          const char* doc) {
  static py::object type;
  type = make_class(m, name, py::make_tuple(base, py::handle(builtin)), doc);
  type.inc_ref();  // the translator below may run while the module is being torn down
  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const E& e) {
      py::set_error(type, e.what());
    }
  });
}

}  // namespace

void bind_errors(py::module_& m) {
  const py::object base = make_class(m, "DuplexError", py::make_tuple(py::handle(PyExc_Exception)),
                                     "Base of everything that duplex_engine raises on purpose.");
  bind<InvalidArgument>(m, base, "InvalidArgument", PyExc_ValueError,
                        "An argument that cannot be used; the message says what was expected.");
  bind<CheckpointError>(m, base, "CheckpointError", PyExc_ValueError,
                        "A checkpoint that cannot be used; the message names file and tensor.");
  bind<CapacityError>(m, base, "CapacityError", PyExc_MemoryError,
                      "No room for a session, a row or a page; nothing was changed.");
  bind<BackendUnavailable>(m, base, "BackendUnavailable", PyExc_RuntimeError,
                           "The device or instruction set is not there.");
  bind<RankFailed>(m, base, "RankFailed", PyExc_RuntimeError,
                   "A rank of a tensor-parallel group is gone; restore its sessions on a new one.");
  bind<SessionClosed>(m, base, "SessionClosed", PyExc_RuntimeError,
                      "The session or its engine has been closed.");
  bind<SessionBusy>(m, base, "SessionBusy", PyExc_RuntimeError,
                    "Another thread is in a call on the same session.");
}

}  // namespace duplex
