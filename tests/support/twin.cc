// The CUDA sources as a C++ compiler sees them: every thread of a launch in a plain loop. For
// machines without a GPU: the index arithmetic and the sums are those that the device runs.
//
// XLA calls CPU handlers with flush-to-zero set, which is what --ftz=true gives on the device.
// Few blocks, so that a thread has more than one element to do.
#define GPU_OPS_MOST_BLOCKS 2
#define GPU_OPS_PROCESSORS 2
#define GPU_OPS_SHARED_BYTES (64 << 10)  // as Turing has
#include "../../gpu_ops/cuda/border_columns.cu"
#include "../../gpu_ops/cuda/conv_int8.cu"
#include "../../gpu_ops/cuda/conv_tuned.cu"
#include "../../gpu_ops/cuda/img2col.cu"
