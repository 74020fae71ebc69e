// The threads that write quantized columns, for deployment and for training.
#pragma once

#include <cstdint>

#include "border_math.h"
#include "device.h"
#include "geometry.h"

namespace gpu_ops {

// One thread: one pixel's columns of `size` neighbouring channels of a group, all taps. In
// training, not-a-number and elements that `keep` drops stay unchanged.
template <typename In, typename Out, int size, bool training>
struct QuantizeColumns {
  GeometryOf<int32_t> g;
  Border border;
  const float *step, *zero;
  int64_t bits;
  const In* x;
  const uint8_t* keep;
  Out* columns;
  float shift;

  struct Pixel {
    int64_t image;        // where the image starts in x
    int32_t top, left, c;  // of the first tap, and the first channel
  };

  // Where the channels of a tap start in the image; negative in the padding.
  BORDER_INLINE int32_t At(const Pixel& p, int32_t i, int32_t j) const {
    const int32_t y = p.top + i * g.dilation[0], x = p.left + j * g.dilation[1];
    const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
    return inside ? (y * g.width + x) * g.channels + p.c : -1;
  }

  BORDER_INLINE Vector<float, size> Values(const Pixel& p, int32_t at) const {
    Vector<float, size> values{};
    if (at < 0) return values;
    const auto loaded = Vector<In, size>::Load(x + p.image + at);
    for (int k = 0; k < size; ++k) values.values[k] = ToFloat(loaded.values[k]);
    return values;
  }

  // Polynomials of one tap's channels.
  BORDER_INLINE Vector<float, size> Polynomials(const Pixel& p, int32_t tap,
                                                const Vector<float, size>& u) const {
    Vector<float, size> result;
    Vector<float, size> b[3] = {};
    const int32_t power = g.Column();
    for (int d = 0; d < 3; ++d)
      if (d <= border.degree)
        b[d] = Vector<float, size>::Load(border.coefficients + d * power + tap * g.channels + p.c);
    for (int k = 0; k < size; ++k) {
      const float own[3] = {b[0].values[k], b[1].values[k], b[2].values[k]};
      result.values[k] = Polynomial(border.degree, own, 1, u.values[k]);
    }
    return result;
  }

  BORDER_INLINE Vector<float, size> Units(const Grid& grid, Vector<float, size> values) const {
    for (float& value : values.values) value = ToUnits(value, grid.inv_step);
    return values;
  }

  // The border that the taps of a channel share (Eq. 9).
  BORDER_INLINE Vector<float, size> Shared(const Pixel& p, const Grid& grid) const {
    Vector<float, size> sum{};
    for (int32_t i = 0, tap = 0; i < g.kernel[0]; ++i)
      for (int32_t j = 0; j < g.kernel[1]; ++j, ++tap) {
        const auto added = Polynomials(p, tap, Units(grid, Values(p, At(p, i, j))));
        for (int k = 0; k < size; ++k)
          sum.values[k] = tap == 0 ? added.values[k] : Add(sum.values[k], added.values[k]);
      }
    const float share = Reciprocal(static_cast<float>(g.Taps()));
    for (float& b : sum.values) b = ApplyPhi(border.phi, Mul(b, share));
    return sum;
  }

  BORDER_INLINE void StoreTap(const Pixel& p, const Grid& grid, int32_t at, int32_t tap,
                              const Vector<float, size>& shared, Out* to) const {
    const bool own = border.degree < 0 || !border.shared_across_taps;
    const auto values = Values(p, at);
    const auto u = Units(grid, values);
    const auto borders = own ? Polynomials(p, tap, u) : shared;
    Vector<Out, size> result;
    for (int k = 0; k < size; ++k) {
      float b = borders.values[k];
      if (own && border.degree >= 0) b = ApplyPhi(border.phi, b);
      const float raw = RawCode(u.values[k], b, grid);
      const float code = training ? Clip(raw, 0.0f, grid.top) : Code(u.values[k], b, grid);
      Store(grid, shift, code, &result.values[k]);
      if constexpr (training)
        if (keep != nullptr && !keep[p.image + at + k]) result.values[k] = values.values[k];
    }
    result.Store(to);
  }

  BORDER_INLINE void operator()(int64_t image, int32_t index) const {
    const int32_t vectors = g.channels / size, width = g.Out(1), inner = g.Inner();
    const int32_t pixel = index / vectors, c = index % vectors * size;
    const Pixel p{image * g.Image(), pixel / width * g.stride[0] - g.low[0],
                  pixel % width * g.stride[1] - g.low[1], c};
    const Grid grid = DeviceGrid(step, zero, bits);
    Vector<float, size> shared{};
    if (border.degree >= 0 && border.shared_across_taps) shared = Shared(p, grid);
    const int32_t first = c % inner;
    Out* row = columns + (image * g.Pixels() + pixel) * g.Row() + c / inner * g.row;
    for (int32_t i = 0, tap = 0; i < g.kernel[0]; ++i)
      for (int32_t j = 0; j < g.kernel[1]; ++j, ++tap)
        StoreTap(p, grid, At(p, i, j), tap, shared, row + tap * inner + first);
    if (first == 0)
      for (int32_t k = g.Taps() * inner; k < g.row; ++k) row[k] = Out(0);
  }
};

// Launches it with vectors of `size` channels where they fit.
template <typename In, typename Out, bool training, int size, int... smaller>
ffi::Error LaunchColumns(Device& device, const QuantizeColumns<In, Out, 1, training>& k) {
  if (k.g.Inner() % size == 0 && k.g.row % size == 0)
    return device.Launch(k.g.images, static_cast<int64_t>(k.g.Pixels()) * (k.g.channels / size),
                         QuantizeColumns<In, Out, size, training>{
                             k.g, k.border, k.step, k.zero, k.bits, k.x, k.keep, k.columns,
                             k.shift});
  if constexpr (sizeof...(smaller) > 0)
    return LaunchColumns<In, Out, training, smaller...>(device, k);
  else
    return ffi::Error::Success();
}

}  // namespace gpu_ops
