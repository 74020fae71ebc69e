// Where the elements of im2col columns lie, for the CPU (int64) and the GPU (int32 in an image).
#pragma once

#include <cstdint>

#include "border_math.h"

namespace gpu_ops {

// An input [images, height, width, channels], zero padding around it, and the window over that.
// The columns are [images, Out(0), Out(1), groups, row], where a row is (tap, channel of the
// group) in row-major order, then padding up to `row`.
template <typename Int>
struct GeometryOf {
  int64_t images;
  Int height, width, channels;
  Int kernel[2], stride[2], dilation[2], low[2], high[2];
  Int groups, row;

  BORDER_INLINE Int Size(int axis) const { return axis == 0 ? height : width; }
  BORDER_INLINE Int Padded(int axis) const { return low[axis] + Size(axis) + high[axis]; }
  BORDER_INLINE Int Span(int axis) const { return (kernel[axis] - 1) * dilation[axis] + 1; }
  BORDER_INLINE Int Out(int axis) const { return (Padded(axis) - Span(axis)) / stride[axis] + 1; }
  BORDER_INLINE Int Taps() const { return kernel[0] * kernel[1]; }
  BORDER_INLINE Int Inner() const { return channels / groups; }
  // Elements of all groups' columns of one pixel, without and with their padding.
  BORDER_INLINE Int Column() const { return Taps() * channels; }
  BORDER_INLINE Int Row() const { return groups * row; }
  BORDER_INLINE Int Pixels() const { return Out(0) * Out(1); }
  BORDER_INLINE Int Image() const { return height * width * channels; }

  template <typename Other>
  GeometryOf<Other> As() const {
    auto to = [](Int value) { return static_cast<Other>(value); };
    return {images, to(height), to(width), to(channels), {to(kernel[0]), to(kernel[1])},
            {to(stride[0]), to(stride[1])}, {to(dilation[0]), to(dilation[1])},
            {to(low[0]), to(low[1])}, {to(high[0]), to(high[1])}, to(groups), to(row)};
  }
};

using Geometry = GeometryOf<int64_t>;

}  // namespace gpu_ops
