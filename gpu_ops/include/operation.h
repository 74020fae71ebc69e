// Attributes and shapes of the handlers, checked. Python checks them too, but a program that was
// exported or written by hand must get an error, never a crash.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "border_math.h"
#include "geometry.h"
#include "xla/ffi/api/ffi.h"

namespace gpu_ops {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Mask = ffi::Buffer<ffi::PRED>;
using Sizes = ffi::Span<const int64_t>;

// Attributes of a window; `padding` is low and high of the height, then of the width.
struct WindowAttributes {
  Sizes kernel, stride, dilation, padding;
  int64_t groups;
};

// The same and how elements are rounded.
struct BorderAttributes {
  Sizes kernel, stride, dilation, padding;
  int64_t groups, bits;
  bool shared_across_taps;
  int64_t phi;

  WindowAttributes Window() const { return {kernel, stride, dilation, padding, groups}; }
};

inline ffi::Error Bad(const std::string& what) {
  return ffi::Error::InvalidArgument("gpu_ops: " + what);
}

// No index within an image may leave an int32, which is what the GPU computes with.
inline ffi::Error CheckIndices(double elements) {
  if (elements <= std::numeric_limits<int32_t>::max()) return ffi::Error::Success();
  return Bad("an image of " + std::to_string(elements) +
             " elements is too large for 32-bit indices");
}

inline ffi::Error CheckColumns(const Geometry& g) {
  return CheckIndices(static_cast<double>(g.Out(0)) * g.Out(1) * g.groups * g.row);
}

// Sizes and windows that are legal may ask for scratch out of all proportion: a padded line of one
// pixel, a column of millions of taps.
inline ffi::Error CheckScratch(int64_t bytes, int64_t operands) {
  const int64_t limit = (int64_t{1} << 28) + 32 * operands;
  if (bytes <= limit) return ffi::Error::Success();
  return Bad("the window needs " + std::to_string(bytes) +
             " bytes of scratch, above the limit of " + std::to_string(limit) +
             " for operands of " + std::to_string(operands) + " bytes");
}

// Fills `g` but for the groups and the row; x is [images, height, width, channels].
inline ffi::Error ReadWindow(Sizes x, const WindowAttributes& a, Geometry& g) {
  const int64_t limit = std::numeric_limits<int32_t>::max();
  if (x.size() != 4) return Bad("x has " + std::to_string(x.size()) + " axes, not 4");
  if (a.kernel.size() != 2 || a.stride.size() != 2 || a.dilation.size() != 2 ||
      a.padding.size() != 4)
    return Bad("kernel, stride and dilation need two sizes each and padding four");
  g = {x[0], x[1], x[2], x[3], {}, {}, {}, {}, {}, 1, 0};
  for (int axis = 0; axis < 2; ++axis) {
    g.kernel[axis] = a.kernel[axis];
    g.stride[axis] = a.stride[axis];
    g.dilation[axis] = a.dilation[axis];
    g.low[axis] = a.padding[2 * axis];
    g.high[axis] = a.padding[2 * axis + 1];
    for (int64_t size : {g.kernel[axis], g.stride[axis], g.dilation[axis]})
      if (size < 1 || size > limit) return Bad("a window has " + std::to_string(size));
    for (int64_t size : {g.low[axis], g.high[axis]})
      if (size < 0 || size > limit) return Bad("the padding has " + std::to_string(size));
    if (g.Span(axis) > g.Padded(axis))
      return Bad("a window of " + std::to_string(g.Span(axis)) + " does not fit the padded size " +
                 std::to_string(g.Padded(axis)));
  }
  // Images without channels have pixels, too.
  return CheckIndices(static_cast<double>(g.Padded(0)) * g.Padded(1) *
                      std::max<int64_t>(g.channels, 1));
}

inline ffi::Error ReadGroups(int64_t groups, Geometry& g) {
  if (groups < 1 || g.channels % groups != 0)
    return Bad(std::to_string(groups) + " groups do not divide " + std::to_string(g.channels) +
               " channels");
  g.groups = groups;
  return ffi::Error::Success();
}

// The geometry of columns [images, out, out, groups, row].
inline ffi::ErrorOr<Geometry> ReadGeometry(Sizes x, Sizes columns, const WindowAttributes& a) {
  Geometry g{};
  if (ffi::Error error = ReadWindow(x, a, g); error.failure()) return ffi::Unexpected(error);
  if (ffi::Error error = ReadGroups(a.groups, g); error.failure()) return ffi::Unexpected(error);
  const bool fits = columns.size() == 5 && columns[0] == g.images && columns[1] == g.Out(0) &&
                    columns[2] == g.Out(1) && columns[3] == g.groups;
  if (!fits || static_cast<double>(columns[4]) < static_cast<double>(g.Taps()) * g.Inner())
    return ffi::Unexpected(Bad("the columns have a shape that does not fit the window"));
  g.row = columns[4];
  if (ffi::Error error = CheckColumns(g); error.failure()) return ffi::Unexpected(error);
  return g;
}

// The border function over columns of `column` elements.
inline ffi::ErrorOr<Border> ReadBorder(const Floats& coefficients, int64_t column,
                                       const BorderAttributes& a) {
  const int64_t count = coefficients.element_count();
  if (a.bits < 2 || a.bits > 8)
    return ffi::Unexpected(Bad("bits must be 2 to 8, not " + std::to_string(a.bits)));
  if (a.phi < 0 || a.phi > 2)
    return ffi::Unexpected(Bad("unknown phi " + std::to_string(a.phi)));
  if (column == 0 ? count != 0 : count % column != 0 || count / column > 3)
    return ffi::Unexpected(Bad(std::to_string(count) + " coefficients for columns of " +
                               std::to_string(column)));
  const int degree = column == 0 ? -1 : static_cast<int>(count / column) - 1;
  return Border{coefficients.typed_data(), degree, a.shared_across_taps, static_cast<Phi>(a.phi)};
}

// Both are single numbers; their values are where the device can read them.
inline ffi::Error CheckScalars(const Floats& step, const Floats& zero) {
  if (step.element_count() == 1 && zero.element_count() == 1) return ffi::Error::Success();
  return Bad("the step size and the zero point are one number each");
}

// Allocates nothing before XLA copies the message.
inline XLA_FFI_Error* OutOfMemory(const XLA_FFI_Api* api, const char* message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message,
                                 XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
  return api->XLA_FFI_Error_Create(&args);
}

// Defines the symbol of a handler. No exception leaves it: only missing memory throws, which XLA
// would report as an unknown error.
#define GPU_OPS_HANDLER(symbol, function, ...)                                              \
  extern "C" XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) {                              \
    try {                                                                                   \
      XLA_FFI_DEFINE_HANDLER(handler, function, __VA_ARGS__);                               \
      return handler(frame);                                                                \
    } catch (...) {                                                                         \
      return OutOfMemory(frame->api, "gpu_ops: out of memory for the scratch of " #symbol); \
    }                                                                                       \
  }

// Operands x, step size, zero point and coefficients, and the result, the columns.
template <typename Context>
auto Img2colBorderBinding() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Ret<ffi::AnyBuffer>()
      .template Attrs<BorderAttributes>();
}

}  // namespace gpu_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(::gpu_ops::WindowAttributes,
                                      StructMember<::gpu_ops::Sizes>("kernel"),
                                      StructMember<::gpu_ops::Sizes>("stride"),
                                      StructMember<::gpu_ops::Sizes>("dilation"),
                                      StructMember<::gpu_ops::Sizes>("padding"),
                                      StructMember<int64_t>("groups"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::gpu_ops::BorderAttributes, StructMember<::gpu_ops::Sizes>("kernel"),
    StructMember<::gpu_ops::Sizes>("stride"), StructMember<::gpu_ops::Sizes>("dilation"),
    StructMember<::gpu_ops::Sizes>("padding"), StructMember<int64_t>("groups"),
    StructMember<int64_t>("bits"), StructMember<bool>("shared_across_taps"),
    StructMember<int64_t>("phi"));
