// The table of backends. It is written by CMake from DUPLEX_BACKENDS; nothing registers itself.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "backend/backend.h"

namespace duplex {

std::vector<std::string> backend_names();
// Throws InvalidArgument for an unknown name, BackendUnavailable where this build or machine lacks
// it.
std::unique_ptr<Backend> create_backend(const std::string& name, const BackendOptions& options);

}  // namespace duplex
