// The handlers of this library as capsules, for jax.ffi.register_ffi_target. Compiled once for the
// CPU and once for CUDA.
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"
#ifdef GPU_OPS_MISSING
#include "cpu/dot.h"
#endif

namespace py = pybind11;

namespace gpu_ops {
extern "C" XLA_FFI_Error* BorderColumnsForward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* BorderColumnsBackward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* ConvInt8Handler(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* Img2colHandler(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* Img2colBorderHandler(XLA_FFI_CallFrame*);
#ifdef GPU_OPS_MISSING
extern "C" XLA_FFI_Error* BorderConvForward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* BorderConvBackward(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* Missing(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* CpuOnly(XLA_FFI_CallFrame*);
extern "C" XLA_FFI_Error* GpuOnly(XLA_FFI_CallFrame*);
#else
extern "C" XLA_FFI_Error* ConvTunedHandler(XLA_FFI_CallFrame*);
#endif
}  // namespace gpu_ops

namespace {

using namespace gpu_ops;
using Handlers = std::vector<std::pair<const char*, XLA_FFI_Handler*>>;

Handlers OnEveryPlatform() {
  return {{"gpu_ops_border_columns", BorderColumnsForward},
          {"gpu_ops_border_columns_vjp", BorderColumnsBackward},
          {"gpu_ops_conv_int8", ConvInt8Handler},
          {"gpu_ops_img2col", Img2colHandler},
          {"gpu_ops_img2col_border", Img2colBorderHandler}};
}

void Name(py::dict& named, const char* name, XLA_FFI_Handler* handler) {
  named[name] = py::capsule(reinterpret_cast<void*>(handler));
}

py::dict All() {
  py::dict named;
  for (auto [name, handler] : OnEveryPlatform()) Name(named, name, handler);
#ifdef GPU_OPS_MISSING
  // The GPU multiplies columns by its own library, the CPU has no tensor cores.
  Name(named, "gpu_ops_border_conv", BorderConvForward);
  Name(named, "gpu_ops_border_conv_vjp", BorderConvBackward);
  Name(named, "gpu_ops_conv_tuned", GpuOnly);
#else
  Name(named, "gpu_ops_conv_tuned", ConvTunedHandler);
#endif
  return named;
}

#ifdef GPU_OPS_MISSING
py::dict Absent() {
  py::dict named;
  for (auto [name, handler] : OnEveryPlatform()) Name(named, name, Missing);
  Name(named, "gpu_ops_conv_tuned", Missing);
  Name(named, "gpu_ops_border_conv", CpuOnly);
  Name(named, "gpu_ops_border_conv_vjp", CpuOnly);
  return named;
}
#endif

}  // namespace

PYBIND11_MODULE(GPU_OPS_MODULE, module) {
  module.def("handlers", &All);
#ifdef GPU_OPS_MISSING
  module.def("missing", &Absent);
  module.def("instructions", [] {
    const gpu_ops::InstructionSet* set = gpu_ops::ChooseInstructions();
    return set == nullptr ? nullptr : set->name;
  });
#endif
}
