// The handlers of this library as capsules, for jax.ffi.register_ffi_target.
#include <pybind11/pybind11.h>

#include "xla/ffi/api/c_api.h"

namespace py = pybind11;

namespace gpu_ops {
extern "C" XLA_FFI_Error* BorderColumnsForward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* BorderColumnsBackward(XLA_FFI_CallFrame*);
}  // namespace gpu_ops

PYBIND11_MODULE(_cpu, module) {
  module.def("handlers", [] {
    py::dict found;
    auto add = [&](const char* name, auto* handler) {
      found[name] = py::capsule(reinterpret_cast<void*>(handler));
    };
    add("gpu_ops_border_columns", gpu_ops::BorderColumnsForward);
    add("gpu_ops_border_columns_vjp", gpu_ops::BorderColumnsBackward);
    return found;
  });
}
