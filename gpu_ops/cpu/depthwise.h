// A depthwise convolution over columns quantized with their borders, and its derivative, on CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "border_math.h"
#include "training.h"

namespace gpu_ops {

// Derivatives that a task sums: of the coefficients, the step size (lane by lane) and the weights.
struct Sums {
  std::vector<float> coefficients, step, weights;
};

// Images [begin, end) of the batch.
struct Images {
  int64_t begin, end;
};

// Bytes of scratch of one task.
int64_t DepthwiseBytes(const Geometry& g, int degree);

// y [images, Out(0), Out(1), channels], with weights [taps * channels].
void DepthwiseForward(const Training& t, const Grid& grid, const float* weights, Images images,
                      float* y);

// Its derivative from dy: dx, and what is added to the sums.
void DepthwiseBackward(const Training& t, const Grid& grid, const float* weights, Images images,
                       const float* dy, float* dx, Sums& sums);

}  // namespace gpu_ops
