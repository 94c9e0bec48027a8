// The driver's functions, looked up at run time: the library loads where there is no driver.
#pragma once

#include <cuda_runtime.h>

#include "core/error.h"
#include "device/cuda_check.h"

namespace duplex::cuda {

// `version` is the CUDA version whose form of the function `Function` is: 10020 is 10.2.
template <class Function>
void look_up(Function& function, const char* name, unsigned version = 10020) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult status;
  check_cuda<BackendUnavailable>(
      cudaGetDriverEntryPointByVersion(name, &address, version, cudaEnableDefault, &status), name);
  check<BackendUnavailable>(status == cudaDriverEntryPointSuccess && address != nullptr,
                            "backend 'cuda': the driver has no ", name, "; install a newer one");
  function = reinterpret_cast<Function>(address);
}

}  // namespace duplex::cuda
