// Backends in libraries of their own, which lie beside this one and are loaded on first use: the
// rest of the package neither needs nor links CUDA. Such a library exports duplex_create_backend.
#include <dlfcn.h>

#include <filesystem>

#include "backend/backend.h"
#include "core/error.h"

namespace duplex {
namespace {

using Create = Backend*(const BackendOptions&);

std::filesystem::path own_folder() {
  Dl_info info;
  check<BackendUnavailable>(::dladdr(reinterpret_cast<void*>(&own_folder), &info) != 0,
                            "backend: cannot tell where this library lies");
  return std::filesystem::canonical(info.dli_fname).parent_path();
}

// A library stays loaded until the process ends: its backends' code must.
std::unique_ptr<Backend> create_from(const char* library, const char* advice,
                                     const BackendOptions& options) {
  const std::filesystem::path path = own_folder() / library;
  check<BackendUnavailable>(std::filesystem::exists(path), advice);
  void* const handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  check<BackendUnavailable>(handle != nullptr, "backend: cannot load ", path, ": ", ::dlerror());
  auto* const create = reinterpret_cast<Create*>(::dlsym(handle, "duplex_create_backend"));
  check<BackendUnavailable>(create != nullptr, "backend: ", path, " is of another version");
  return std::unique_ptr<Backend>(create(options));
}

}  // namespace

std::unique_ptr<Backend> create_cuda_backend(const BackendOptions& options);
std::unique_ptr<Backend> create_cuda_host_backend(const BackendOptions& options);

std::unique_ptr<Backend> create_cuda_backend(const BackendOptions& options) {
  return create_from("libduplex_cuda.so",
                     "backend 'cuda': expected a build with CUDA, found one without; install it "
                     "where nvcc 13 is on the PATH, or use device=\"cpu\"",
                     options);
}

// The CUDA backend's own kernels, run thread by thread on the host: for tests (docs/GPU.md).
std::unique_ptr<Backend> create_cuda_host_backend(const BackendOptions& options) {
  return create_from("libduplex_cuda_host.so",
                     "backend 'cuda_host': only a build with tests has it; use device=\"cpu\"",
                     options);
}

}  // namespace duplex
