// Column elements of a convolution, quantized with their borders, and the derivative, on CUDA.
//
// The derivative is gathered, never scattered: a thread owns an element of dx, or a coefficient
// over a chunk of pixels. Sums are added in a fixed order, without atomics, so that two runs agree
// to the bit. But for the columns' cotangent nothing k*k-fold is read or written.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "columns.h"
#include "device.h"
#include "training.h"

namespace gpu_ops {
namespace {

constexpr int64_t kChunk = 64;       // pixels in a chunk, at least
constexpr int64_t kMostChunks = 1024;
constexpr int32_t kPartials = 256;

// The whole derivative at one column element.
struct ElementDerivative {
  float u;
  float x;     // with respect to x: what flows through the code, and through the border
  float step;  // with respect to the step size
  float p;     // with respect to the polynomial
};

// The operands of all threads of the derivative. Where the taps share a border, `borders` and
// `dpolynomials` hold that of every (image, pixel, channel) and the derivative of its polynomial.
struct Pullback {
  GeometryOf<int32_t> g;
  Border border;
  const float *step, *zero;
  int64_t bits;
  const float* x;
  const uint8_t* keep;
  const float* d;
  float *borders, *dpolynomials;

  BORDER_INLINE Grid MakeGrid() const { return DeviceGrid(step, zero, bits); }

  // Where a tap of a pixel lies in its image.
  BORDER_INLINE int32_t At(int32_t pixel, int32_t tap, int32_t c) const {
    const int32_t width = g.Out(1);
    const int32_t y = pixel / width * g.stride[0] + tap / g.kernel[1] * g.dilation[0];
    const int32_t x_at = pixel % width * g.stride[1] + tap % g.kernel[1] * g.dilation[1];
    return (y * g.width + x_at) * g.channels + c;
  }

  BORDER_INLINE float Units(int64_t image, int32_t at, const Grid& grid) const {
    return ToUnits(x[image * g.Image() + at], grid.inv_step);
  }

  BORDER_INLINE float PolynomialAt(int32_t tap, int32_t c, float u) const {
    const int32_t at = tap * g.channels + c;
    return Polynomial(border.degree, border.coefficients + at, g.Column(), u);
  }

  // The derivative at an element with border `b`, the border held fixed.
  BORDER_INLINE Derivative Fixed(int64_t image, int32_t at, float u, float b, float d_,
                                 const Grid& grid) const {
    const bool kept = keep == nullptr || keep[image * g.Image() + at];
    return Differentiate(u, b, kept, d_, grid);
  }

  BORDER_INLINE float Cotangent(int64_t image, int32_t pixel, int32_t tap, int32_t c) const {
    return d[(image * g.Pixels() + pixel) * g.Column() + tap * g.channels + c];
  }

  BORDER_INLINE ElementDerivative Element(int64_t image, int32_t pixel, int32_t tap, int32_t c,
                                          const Grid& grid) const {
    const int32_t at = At(pixel, tap, c), own = tap * g.channels + c;
    const float u = Units(image, at, grid), d_ = Cotangent(image, pixel, tap, c);
    const int64_t shared = (image * g.Pixels() + pixel) * g.channels + c;
    const bool shares = border.shared_across_taps;
    const float p = shares ? 0.0f : PolynomialAt(tap, c, u);
    const float b = shares ? borders[shared] : ApplyPhi(border.phi, p);
    const Derivative e = Fixed(image, at, u, b, d_, grid);
    const float dp = shares ? dpolynomials[shared] : e.border * PhiSlope(border.phi, p);
    const float* coefficients = border.coefficients + own;
    const float du =
        dp * PolynomialSlope(border.degree, coefficients, g.Column(), u) * grid.inv_step;
    return {u, e.x + du, e.step - du * u, dp};
  }
};

// One thread: the border that the taps of one pixel's channel share, and its derivative.
struct SharedBorders {
  Pullback pull;

  BORDER_INLINE void operator()(int64_t image, int32_t index) const {
    const GeometryOf<int32_t>& g = pull.g;
    const Grid grid = pull.MakeGrid();
    const int32_t pixel = index / g.channels, c = index % g.channels;
    float sum = 0.0f, db = 0.0f;
    for (int32_t tap = 0; tap < g.Taps(); ++tap) {
      const float u = pull.Units(image, pull.At(pixel, tap, c), grid);
      const float p = pull.PolynomialAt(tap, c, u);
      sum = tap == 0 ? p : Add(sum, p);
    }
    const float share = Reciprocal(static_cast<float>(g.Taps()));
    const float p = Mul(sum, share), b = ApplyPhi(pull.border.phi, p);
    for (int32_t tap = 0; tap < g.Taps(); ++tap) {
      const int32_t at = pull.At(pixel, tap, c);
      const float u = pull.Units(image, at, grid);
      db += pull.Fixed(image, at, u, b, pull.Cotangent(image, pixel, tap, c), grid).border;
    }
    const int64_t to = image * g.Pixels() * g.channels + index;
    pull.borders[to] = b;
    pull.dpolynomials[to] = db * PhiSlope(pull.border.phi, p) * share;
  }
};

// One thread: one element of dx, from all the pixels whose window holds it.
struct GatherInput {
  Pullback pull;
  float* dx;

  BORDER_INLINE void operator()(int64_t image, int32_t index) const {
    const GeometryOf<int32_t>& g = pull.g;
    const Grid grid = pull.MakeGrid();
    const int32_t c = index % g.channels, at = index / g.channels;
    const int32_t y = at / g.width, x = at % g.width;
    float sum = 0.0f;
    for (int32_t i = 0; i < g.kernel[0]; ++i) {
      const int32_t top = y - i * g.dilation[0], row = top / g.stride[0];
      if (top < 0 || top % g.stride[0] != 0 || row >= g.Out(0)) continue;
      for (int32_t j = 0; j < g.kernel[1]; ++j) {
        const int32_t left = x - j * g.dilation[1], col = left / g.stride[1];
        if (left < 0 || left % g.stride[1] != 0 || col >= g.Out(1)) continue;
        sum += pull.Element(image, row * g.Out(1) + col, i * g.kernel[1] + j, c, grid).x;
      }
    }
    dx[image * g.Image() + index] = sum;
  }
};

// One thread: one (tap, channel)'s coefficients and part of the step size, over a chunk of pixels.
struct SumChunk {
  Pullback pull;
  int64_t chunk;
  float* sums;  // [chunks, degree + 2, taps * channels], the step size last

  BORDER_INLINE void operator()(int64_t number, int32_t index) const {
    const GeometryOf<int32_t>& g = pull.g;
    const Grid grid = pull.MakeGrid();
    const int64_t pixels = g.Pixels(), all = g.images * pixels;
    const int64_t end = (number + 1) * chunk < all ? (number + 1) * chunk : all;
    float powers[3] = {}, step = 0.0f;
    for (int64_t at = number * chunk; at < end; ++at) {
      const int64_t image = at / pixels;
      const ElementDerivative e =
          pull.Element(image, static_cast<int32_t>(at - image * pixels), index / g.channels,
                       index % g.channels, grid);
      powers[0] += e.p;
      powers[1] += e.p * e.u;
      powers[2] += e.p * e.u * e.u;
      step += e.step;
    }
    const int32_t degree = pull.border.degree, column = g.Column();
    float* to = sums + number * (degree + 2) * column + index;
    for (int32_t power = 0; power <= degree; ++power) to[power * column] = powers[power];
    to[(degree + 1) * column] = step;
  }
};

// One thread: one coefficient, or one element's part of the step size, over all chunks.
struct SumChunks {
  const float* sums;
  int64_t chunks;
  int32_t count, width;  // coefficients, and these with the parts of the step size
  float* dcoefficients;
  double* steps;

  BORDER_INLINE void operator()(int64_t, int32_t index) const {
    double sum = 0.0;
    for (int64_t number = 0; number < chunks; ++number) sum += sums[number * width + index];
    if (index < count)
      dcoefficients[index] = static_cast<float>(sum);
    else
      steps[index - count] = sum;
  }
};

// One thread: the sum of every `stride`-th number from its index on.
template <typename Out>
struct SumStrided {
  const double* from;
  int32_t size, stride;
  Out* to;

  BORDER_INLINE void operator()(int64_t, int32_t index) const {
    double sum = 0.0;
    for (int32_t i = index; i < size; i += stride) sum += from[i];
    to[index] = static_cast<Out>(sum);
  }
};

ffi::Error Forward(Device device, Floats x, Mask keep, Floats step, Floats zero,
                   Floats coefficients, ffi::Result<Floats> columns, BorderAttributes a) {
  auto read = ReadColumns(x, keep, step, zero, coefficients, *columns, a);
  if (read.has_error()) return read.error();
  const QuantizeColumns<float, float, 1, true> one{
      read->geometry.As<int32_t>(), read->border, step.typed_data(), zero.typed_data(), a.bits,
      read->x, read->keep, columns->typed_data(), 0.0f};
  return LaunchColumns<float, float, true, 4, 1>(device, one);
}

ffi::Error OutOfScratch() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "gpu_ops: out of memory for the scratch of BorderColumnsBackward");
}

// The sums over all pixels: of the coefficients and of the step size.
ffi::Error Reduce(Device& device, const Pullback& pull, float* dcoefficients, float* dstep) {
  const int64_t column = pull.g.Column(), count = (pull.border.degree + 1) * column;
  const int64_t pixels = pull.g.images * pull.g.Pixels(), width = count + column;
  if (width > std::numeric_limits<int32_t>::max())
    return Bad(std::to_string(width) + " sums are too many for 32-bit indices");
  const int64_t chunk = std::max(kChunk, (pixels + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (pixels + chunk - 1) / chunk;
  float* sums = device.Allocate<float>(chunks * width);
  double* steps = device.Allocate<double>(column);
  double* partials = device.Allocate<double>(kPartials);
  if (!sums || !steps || !partials) return OutOfScratch();
  ffi::Error error = device.Launch(chunks, column, SumChunk{pull, chunk, sums});
  if (error.failure()) return error;
  error = device.Launch(1, width, SumChunks{sums, chunks, static_cast<int32_t>(count),
                                            static_cast<int32_t>(width), dcoefficients, steps});
  if (error.failure()) return error;
  error = device.Launch(
      1, kPartials,
      SumStrided<double>{steps, static_cast<int32_t>(column), kPartials, partials});
  if (error.failure()) return error;
  return device.Launch(1, 1, SumStrided<float>{partials, kPartials, 1, dstep});
}

ffi::Error Backward(Device device, Floats x, Mask keep, Floats step, Floats zero,
                    Floats coefficients, Floats dcolumns, ffi::Result<Floats> dx,
                    ffi::Result<Floats> dstep, ffi::Result<Floats> dcoefficients,
                    BorderAttributes a) {
  auto read = ReadColumns(x, keep, step, zero, coefficients, dcolumns, a);
  if (read.has_error()) return read.error();
  if (ffi::Error error = CheckDerivatives(x, coefficients, *dx, *dstep, *dcoefficients);
      error.failure())
    return error;
  const Geometry& g = read->geometry;
  Pullback pull{g.As<int32_t>(), read->border, step.typed_data(), zero.typed_data(), a.bits,
                read->x, read->keep, dcolumns.typed_data(), nullptr, nullptr};
  if (read->border.shared_across_taps) {
    const int64_t size = g.images * g.Pixels() * g.channels;
    pull.borders = device.Allocate<float>(size);
    pull.dpolynomials = device.Allocate<float>(size);
    if (!pull.borders || !pull.dpolynomials) return OutOfScratch();
    ffi::Error error = device.Launch(g.images, g.Pixels() * g.channels, SharedBorders{pull});
    if (error.failure()) return error;
  }
  ffi::Error error = device.Launch(g.images, g.Image(), GatherInput{pull, dx->typed_data()});
  if (error.failure()) return error;
  return Reduce(device, pull, dcoefficients->typed_data(), dstep->typed_data());
}

}  // namespace

GPU_OPS_HANDLER(BorderColumnsForward, Forward,
                TrainingOperands<Device>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

GPU_OPS_HANDLER(BorderColumnsBackward, Backward,
                TrainingOperands<Device>()
                    .Arg<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

}  // namespace gpu_ops
