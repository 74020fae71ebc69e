// Operands of the training operation and its derivative, checked, for the CPU and for the GPU.
#pragma once

#include <cstdint>
#include <string>

#include "operation.h"

namespace gpu_ops {

// The operands of both handlers: x [images, height, width, channels] is padded already, the columns
// are [images, out, out, taps, channels].
struct Training {
  Geometry geometry;
  Border border;
  const float* x;
  const uint8_t* keep;  // null: all elements are quantized

  int64_t Coefficients() const { return (border.degree + 1) * geometry.Column(); }
};

inline ffi::ErrorOr<Training> ReadTraining(const Floats& x, const Mask& keep, const Floats& step,
                                           const Floats& zero, const Floats& coefficients,
                                           const BorderAttributes& a) {
  Training t{};
  Geometry& g = t.geometry;
  if (ffi::Error error = ReadWindow(x.dimensions(), a.Window(), g); error.failure())
    return ffi::Unexpected(error);
  if (g.low[0] + g.high[0] + g.low[1] + g.high[1] != 0)
    return ffi::Unexpected(Bad("the training operation takes no padding"));
  g.row = g.Column();
  if (ffi::Error error = CheckColumns(g); error.failure()) return ffi::Unexpected(error);
  if (keep.element_count() != 0 && keep.element_count() != x.element_count())
    return ffi::Unexpected(Bad("the mask has " + std::to_string(keep.element_count()) +
                               " elements, x " + std::to_string(x.element_count())));
  if (ffi::Error error = CheckScalars(step, zero); error.failure()) return ffi::Unexpected(error);
  auto border = ReadBorder(coefficients, g.Column(), a);
  if (border.has_error()) return ffi::Unexpected(border.error());
  if (border->degree < 0 && g.Column() > 0)
    return ffi::Unexpected(Bad("the training operation needs coefficients"));
  t.border = border.value();
  t.x = x.typed_data();
  t.keep = keep.element_count() == 0 ? nullptr
                                     : reinterpret_cast<const uint8_t*>(keep.typed_data());
  return t;
}

// The same for columns that are written, or whose derivative is read.
inline ffi::ErrorOr<Training> ReadColumns(const Floats& x, const Mask& keep, const Floats& step,
                                          const Floats& zero, const Floats& coefficients,
                                          const Floats& columns, const BorderAttributes& a) {
  auto read = ReadTraining(x, keep, step, zero, coefficients, a);
  if (read.has_error()) return read;
  const Geometry& g = read->geometry;
  if (a.groups != 1) return ffi::Unexpected(Bad("columns for training have no groups"));
  if (static_cast<int64_t>(columns.element_count()) != g.images * g.Pixels() * g.row)
    return ffi::Unexpected(Bad("the columns have another size than the window gives"));
  return read;
}

inline ffi::Error CheckDerivatives(const Floats& x, const Floats& coefficients, const Floats& dx,
                                   const Floats& dstep, const Floats& dcoefficients) {
  if (dx.element_count() == x.element_count() && dstep.element_count() == 1 &&
      dcoefficients.element_count() == coefficients.element_count())
    return ffi::Error::Success();
  return Bad("the derivatives have other sizes than their operands");
}

// The first operands of all training handlers: x, mask, step size, zero point, coefficients.
template <typename Context>
auto TrainingOperands() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<Floats>()
      .template Arg<Mask>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>();
}

}  // namespace gpu_ops
