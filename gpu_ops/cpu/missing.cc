// Stand in for handlers that are not there: an error, not a crash.
#include "operation.h"

namespace gpu_ops {
namespace {

ffi::Error Unimplemented(const char* why) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, why);
}

ffi::Error NotBuilt(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return Unimplemented("gpu_ops was built without CUDA: install it again with GPU_OPS_CUDA=ON and "
                       "nvcc on the path (BUILD.md)");
}

ffi::Error OfTheCpu(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return Unimplemented("gpu_ops has this operation for the CPU alone: on a GPU use the columns, as "
                       "gpu_ops.backend() does");
}

ffi::Error OfTheGpu(ffi::RemainingArgs, ffi::RemainingRets, ffi::Dictionary) {
  return Unimplemented("gpu_ops has this operation for NVIDIA GPUs alone: on a CPU use "
                       "conv_border_int8");
}

auto AnyBinding() { return ffi::Ffi::Bind().RemainingArgs().RemainingRets().Attrs(); }

}  // namespace

GPU_OPS_HANDLER(Missing, NotBuilt, AnyBinding())
GPU_OPS_HANDLER(CpuOnly, OfTheCpu, AnyBinding())
GPU_OPS_HANDLER(GpuOnly, OfTheGpu, AnyBinding())

}  // namespace gpu_ops
