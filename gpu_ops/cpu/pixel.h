// One pixel of a convolution in training: its column, quantized with its borders, and the
// derivative. Its K = taps * channels elements stay in the first-level cache.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "border_math.h"
#include "parallel.h"
#include "training.h"

namespace gpu_ops {

// Where the row of channels of a tap starts, from that of its pixel's first tap.
inline int64_t TapOffset(const Geometry& g, int64_t tap) {
  const int64_t row = tap / g.kernel[1] * g.dilation[0], col = tap % g.kernel[1] * g.dilation[1];
  return (row * g.width + col) * g.channels;
}

// Where the row of channels of a pixel's first tap starts in an image.
inline int64_t PixelOffset(const Geometry& g, int64_t pixel, int64_t out_width) {
  const int64_t row = pixel / out_width * g.stride[0], col = pixel % out_width * g.stride[1];
  return (row * g.width + col) * g.channels;
}

// Memory for one pixel's column, and the offsets of its taps: `Bytes` of it.
struct PixelScratch {
  std::vector<float> u, border, slope, first, second;
  std::vector<uint8_t> keep;
  std::vector<int64_t> taps;
  explicit PixelScratch(const Geometry& g)
      : u(g.Column()),
        border(g.Column()),
        slope(g.Column()),
        first(g.Column()),
        second(g.Column()),
        keep(g.Column(), 1),
        taps(g.Taps()) {
    for (int64_t tap = 0; tap < g.Taps(); ++tap) taps[tap] = TapOffset(g, tap);
  }

  static int64_t Bytes(const Geometry& g) {
    return g.Column() * (5 * sizeof(float) + 1) + g.Taps() * sizeof(int64_t);
  }
};

template <typename T>
BORDER_INLINE void Gather(const std::vector<int64_t>& taps, int64_t channels, const T* pixel,
                          T* column) {
  for (int64_t offset : taps) {
    const T* row = pixel + offset;
    EACH(c, channels) column[c] = row[c];
    column += channels;
  }
}

// Fills u, border and slope (of phi) of one column.
BORDER_INLINE void Borders(const Geometry& g, const Grid& grid, const Border& b,
                           const float* pixel, PixelScratch& s) {
  const int64_t size = g.Column(), channels = g.channels, taps = g.Taps();
  float* u = s.u.data();
  float* border = s.border.data();
  float* slope = s.slope.data();
  const float* b0 = b.coefficients;
  Gather(s.taps, channels, pixel, u);
  EACH(i, size) u[i] = ToUnits(u[i], grid.inv_step);
  if (b.degree == 2) {
    EACH(i, size) border[i] = Polynomial(2, b0 + i, size, u[i]);
  } else if (b.degree == 1) {
    EACH(i, size) border[i] = Polynomial(1, b0 + i, size, u[i]);
  } else {
    EACH(i, size) border[i] = b0[i];
  }
  const int64_t own = b.shared_across_taps ? channels : size;
  if (b.shared_across_taps) {
    for (int64_t tap = 1; tap < taps; ++tap)
      EACH(c, channels) border[c] += border[tap * channels + c];
    const float share = 1.0f / static_cast<float>(taps);
    EACH(c, channels) border[c] *= share;
  }
  EACH(i, own) {
    slope[i] = PhiSlope(b.phi, border[i]);
    border[i] = ApplyPhi(b.phi, border[i]);
  }
  for (int64_t i = own; i < size; i += own)
    EACH(c, own) border[i + c] = border[c];
}

// The dequantized column [taps, channels] of one pixel, whose first tap is `at` in the image.
BORDER_INLINE void PixelColumn(const Geometry& g, const Grid& grid, const Border& b,
                               const float* image, const uint8_t* keep, int64_t at, float* out,
                               PixelScratch& s) {
  const int64_t size = g.Column();
  Borders(g, grid, b, image + at, s);
  const float* u = s.u.data();
  const float* border = s.border.data();
  EACH(i, size) out[i] = Quantized(u[i], border[i], grid);
  if (keep == nullptr) return;
  float* raw = s.first.data();
  uint8_t* kept = s.keep.data();
  Gather(s.taps, g.channels, image + at, raw);
  Gather(s.taps, g.channels, keep + at, kept);
  EACH(i, size) out[i] = kept[i] ? out[i] : raw[i];
}

// The derivative of PixelColumn, which ran last with this scratch, from that of its column `d`:
// added to dx [height, width, channels], to dcoefficients and, lane by lane, to dstep.
BORDER_INLINE void PixelDerivative(const Geometry& g, const Grid& grid, const Border& b,
                                   int64_t at, const float* d, float* dx,
                                   float* dcoefficients, float* dstep, PixelScratch& s) {
  const int64_t size = g.Column(), channels = g.channels;
  const int64_t own = b.shared_across_taps ? channels : size;
  const float share = b.shared_across_taps ? 1.0f / static_cast<float>(g.Taps()) : 1.0f;
  float* d0 = dcoefficients;
  float* d1 = dcoefficients + size;
  float* d2 = dcoefficients + 2 * size;
  float* lanes = dstep;
  const float* u = s.u.data();
  const float* border = s.border.data();
  const float* slope = s.slope.data();
  const uint8_t* kept = s.keep.data();
  float* direct = s.first.data();
  float* dborder = s.second.data();
  EACH(i, size) {
    const Derivative e = Differentiate(u[i], border[i], kept[i], d[i], grid);
    direct[i] = e.x;
    dborder[i] = e.border;
    lanes[i] += e.step;
  }
  if (b.shared_across_taps)
    for (int64_t i = own; i < size; i += own)
      EACH(c, own) dborder[c] += dborder[i + c];
  EACH(i, own) dborder[i] *= slope[i] * share;
  for (int64_t i = own; i < size; i += own)
    EACH(c, own) dborder[i + c] = dborder[c];
  EACH(i, size) d0[i] += dborder[i];
  if (b.degree > 0) {
    EACH(i, size) {
      const float rate = PolynomialSlope(b.degree, b.coefficients + i, size, u[i]);
      const float du = dborder[i] * rate * grid.inv_step;
      d1[i] += dborder[i] * u[i];
      if (b.degree > 1) d2[i] += dborder[i] * u[i] * u[i];
      direct[i] += du;
      lanes[i] -= du * u[i];
    }
  }
  for (int64_t offset : s.taps) {
    float* row = dx + at + offset;
    EACH(c, channels) row[c] += direct[c];
    direct += channels;
  }
}

// The grid of the tensor. Not-a-number passes, and makes everything so: the trainer's guard then
// names the block.
inline ffi::ErrorOr<Grid> ReadGrid(const Floats& step, const Floats& zero, int64_t bits) {
  const float size = *step.typed_data();
  if (size <= 0.0f) return ffi::Unexpected(Bad("the step size is " + std::to_string(size)));
  return MakeGrid(size, *zero.typed_data(), bits);
}

}  // namespace gpu_ops
