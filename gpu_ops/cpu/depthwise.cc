// A depthwise convolution over columns quantized with their borders, and its derivative, on CPU.
//
// No result needs two channels. So a few are taken at a time, and copied to where they are adjacent:
// what belongs to them stays in the second-level cache. No column is stored, as each of its elements
// is in one product only.
#include "depthwise.h"

#include <algorithm>
#include <type_traits>

#include "parallel.h"
#include "pixel.h"

namespace gpu_ops {
namespace {

constexpr int64_t kElements = 4096;  // of a pixel's column; some eight arrays have its size
constexpr int64_t kMultiple = 16;    // channels that fill a vector

int64_t MostChannels(const Geometry& g) {
  const int64_t fit = kElements / g.Taps() / kMultiple * kMultiple;
  return std::min(std::max(fit, kMultiple), g.channels);
}

// Copies, or adds, `rows` rows of `count` values; the rows' starts are `from_row` and `to_row` apart.
template <typename T>
void CopyRows(const T* from, int64_t from_row, int64_t rows, int64_t count, T* to,
              int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * from_row, count, to + r * to_row);
}

void AddRows(const std::vector<float>& from, int64_t count, float* to, int64_t to_row) {
  const int64_t rows = from.size() / count;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < count; ++c) to[r * to_row + c] += from[r * count + c];
}

// Channels [first, first + count) of the operands; the coefficients and weights of all taps, and the
// activations of one image. Without a mask, all of them are kept. `border` and `slope` are those that
// the taps of one pixel share.
struct Part {
  int64_t first, count, channels;
  Training t;
  std::vector<float> x, coefficients, weights, border, slope;
  std::vector<uint8_t> keep;
  std::vector<int64_t> taps;

  Part(const Training& all, const float* all_weights, int64_t first, int64_t count)
      : first(first),
        count(count),
        channels(all.geometry.channels),
        t(Narrow(all, count)),
        x(t.geometry.Image()),
        coefficients(t.Coefficients()),
        weights(t.geometry.Column()),
        border(count),
        slope(count),
        keep(t.geometry.Image(), 1) {
    CopyRows(all.border.coefficients + first, channels, coefficients.size() / count, count,
             coefficients.data(), count);
    CopyRows(all_weights + first, channels, t.geometry.Taps(), count, weights.data(), count);
    for (int64_t tap = 0; tap < t.geometry.Taps(); ++tap)
      taps.push_back(TapOffset(t.geometry, tap));
  }

  static Training Narrow(Training t, int64_t count) {
    t.geometry.channels = count;
    return t;
  }

  int64_t Places() const { return t.geometry.height * t.geometry.width; }

  void ReadImage(const Training& all, int64_t n) {
    const int64_t offset = n * all.geometry.Image() + first;
    CopyRows(all.x + offset, channels, Places(), count, x.data(), count);
    if (all.keep == nullptr) return;
    CopyRows(all.keep + offset, channels, Places(), count, keep.data(), count);
  }
};

// The derivative of a part: with respect to the activations of one image, and the sums over images.
// `border` and `direct` are of one pixel: with respect to its borders, and what passes beside them.
struct PartDerivative {
  std::vector<float> dx, border, direct;
  Sums sums;

  explicit PartDerivative(const Part& part)
      : dx(part.x.size()),
        border(part.weights.size()),
        direct(part.weights.size()),
        sums{std::vector<float>(part.coefficients.size()), std::vector<float>(part.weights.size()),
             std::vector<float>(part.weights.size())} {}

  // Adds the sums to those of all channels.
  void AddTo(Sums& all, const Part& part) const {
    AddRows(sums.coefficients, part.count, all.coefficients.data() + part.first, part.channels);
    AddRows(sums.step, part.count, all.step.data() + part.first, part.channels);
    AddRows(sums.weights, part.count, all.weights.data() + part.first, part.channels);
  }
};

// Calls `run(part)` for all channels, in order.
template <typename Run>
void EachPart(const Training& t, const float* weights, Run run) {
  const int64_t most = MostChannels(t.geometry);
  for (int64_t first = 0; first < t.geometry.channels; first += most) {
    Part part(t, weights, first, std::min(most, t.geometry.channels - first));
    run(part);
  }
}

// What the taps of one pixel read of the part; `at` is the first tap.
struct Tap {
  const float *x, *coefficients, *weights;
  const uint8_t* keep;

  Tap(const Part& part, int64_t at, int64_t t)
      : x(part.x.data() + at + part.taps[t]),
        coefficients(part.coefficients.data() + t * part.count),
        weights(part.weights.data() + t * part.count),
        keep(part.keep.data() + at + part.taps[t]) {}
};

// The border that the taps of a channel share, and its slope.
template <int degree>
BORDER_INLINE void SharedBorder(Part& part, const Grid grid, int64_t at) {
  const int64_t count = part.count, taps = part.taps.size(), power = part.t.geometry.Column();
  const Phi phi = part.t.border.phi;
  float* border = part.border.data();
  float* slope = part.slope.data();
  for (int64_t t = 0; t < taps; ++t) {
    const Tap tap(part, at, t);
    const float* x = tap.x;
    const float* b = tap.coefficients;
    const auto own = [=](int64_t c) INLINED_LAMBDA {
      return Polynomial(degree, b + c, power, ToUnits(x[c], grid.inv_step));
    };
    if (t == 0)
      EACH(c, count) border[c] = own(c);
    else
      EACH(c, count) border[c] += own(c);
  }
  const float share = 1.0f / static_cast<float>(taps);
  EACH(c, count) {
    const float mean = border[c] * share;
    border[c] = ApplyPhi(phi, mean);
    slope[c] = PhiSlope(phi, mean) * share;
  }
}

// The results of one pixel.
template <int degree, bool shared>
BORDER_INLINE void ForwardPixel(Part& part, const Grid grid, int64_t at, float* results) {
  if (shared) SharedBorder<degree>(part, grid, at);
  const int64_t count = part.count, taps = part.taps.size(), power = part.t.geometry.Column();
  const Phi phi = part.t.border.phi;
  const float* border = part.border.data();
  for (int64_t t = 0; t < taps; ++t) {
    const Tap tap(part, at, t);
    const auto product = [=](int64_t c) INLINED_LAMBDA {
      const float u = ToUnits(tap.x[c], grid.inv_step);
      const float p = shared ? 0.0f : Polynomial(degree, tap.coefficients + c, power, u);
      const float b = shared ? border[c] : ApplyPhi(phi, p);
      const float value = Quantized(u, b, grid);
      return (tap.keep[c] ? value : tap.x[c]) * tap.weights[c];
    };
    if (t == 0)
      EACH(c, count) results[c] = product(c);
    else
      EACH(c, count) results[c] += product(c);
  }
}

// Adds the derivative for one pixel, from that of its results, `d`.
template <int degree, bool shared>
BORDER_INLINE void BackwardPixel(Part& part, const Grid grid, int64_t at, const float* d,
                                 PartDerivative& to) {
  if (shared) SharedBorder<degree>(part, grid, at);
  const int64_t count = part.count, taps = part.taps.size(), power = part.t.geometry.Column();
  const Phi phi = part.t.border.phi;
  const float* border = part.border.data();
  const float* slope = part.slope.data();
  for (int64_t t = 0; t < taps; ++t) {
    const Tap tap(part, at, t);
    float* dweights = to.sums.weights.data() + t * count;
    float* lanes = to.sums.step.data() + t * count;
    float* direct = to.direct.data() + t * count;
    float* dborder = to.border.data() + t * count;
    EACH(c, count) {
      const float u = ToUnits(tap.x[c], grid.inv_step);
      const float p = shared ? 0.0f : Polynomial(degree, tap.coefficients + c, power, u);
      const float b = shared ? border[c] : ApplyPhi(phi, p);
      const Derivative e = Differentiate(u, b, tap.keep[c], tap.weights[c] * d[c], grid);
      const float value = Quantized(u, b, grid);
      dweights[c] += (tap.keep[c] ? value : tap.x[c]) * d[c];
      lanes[c] += e.step;
      direct[c] = e.x;
      dborder[c] = shared ? e.border : e.border * PhiSlope(phi, p);
    }
  }
  float* sum = to.border.data();
  if (shared) {
    for (int64_t t = 1; t < taps; ++t)
      EACH(c, count) sum[c] += sum[t * count + c];
    EACH(c, count) sum[c] *= slope[c];
  }
  for (int64_t t = 0; t < taps; ++t) {
    const Tap tap(part, at, t);
    const float* b = tap.coefficients;
    const float* dborder = sum + (shared ? 0 : t * count);
    const float* direct = to.direct.data() + t * count;
    float* dx = to.dx.data() + at + part.taps[t];
    float* d0 = to.sums.coefficients.data() + t * count;
    float* d1 = d0 + power;
    float* d2 = d1 + power;
    float* lanes = to.sums.step.data() + t * count;
    EACH(c, count) {
      const float u = ToUnits(tap.x[c], grid.inv_step), db = dborder[c];
      const float du = db * PolynomialSlope(degree, b + c, power, u) * grid.inv_step;
      d0[c] += db;
      if (degree > 0) d1[c] += db * u;
      if (degree > 1) d2[c] += db * u * u;
      if (degree > 0) lanes[c] -= du * u;
      dx[c] += direct[c] + du;
    }
  }
}

// y [pixels, channels], of which the part's are written.
template <int degree, bool shared>
BORDER_INLINE void Forward(Part& part, const Grid grid, float* y) {
  const Geometry& g = part.t.geometry;
  const int64_t pixels = g.Pixels(), width = g.Out(1);
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    ForwardPixel<degree, shared>(part, grid, PixelOffset(g, pixel, width),
                                 y + pixel * part.channels);
}

template <int degree, bool shared>
BORDER_INLINE void Backward(Part& part, const Grid grid, const float* dy, PartDerivative& to) {
  const Geometry& g = part.t.geometry;
  const int64_t pixels = g.Pixels(), width = g.Out(1);
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    BackwardPixel<degree, shared>(part, grid, PixelOffset(g, pixel, width),
                                  dy + pixel * part.channels, to);
}

// Calls `run` with the degree of the border, and with whether taps share it, as constants.
template <typename Run>
BORDER_INLINE void WithBorder(const Border& b, Run run) {
  const auto with = [&](auto degree) INLINED_LAMBDA {
    if (b.shared_across_taps)
      run(degree, std::true_type());
    else
      run(degree, std::false_type());
  };
  if (b.degree == 2) return with(std::integral_constant<int, 2>());
  if (b.degree == 1) return with(std::integral_constant<int, 1>());
  with(std::integral_constant<int, 0>());
}

VECTORISED void ForwardImage(const Grid& grid, Part& part, float* y) {
  WithBorder(part.t.border, [&](auto degree, auto shared) INLINED_LAMBDA {
    Forward<degree.value, shared.value>(part, grid, y);
  });
}

VECTORISED void BackwardImage(const Grid& grid, Part& part, const float* dy, PartDerivative& to) {
  WithBorder(part.t.border, [&](auto degree, auto shared) INLINED_LAMBDA {
    Backward<degree.value, shared.value>(part, grid, dy, to);
  });
}

}  // namespace

int64_t DepthwiseBytes(const Geometry& g, int degree) {
  Geometry part = g;
  part.channels = MostChannels(g);
  // Coefficients and weights, the sums, and two columns.
  const int64_t columns = 2 * (degree + 1) + 5;
  return (2 * part.Image() + columns * part.Column() + 2 * part.channels) * sizeof(float) +
         part.Image() + part.Taps() * sizeof(int64_t);
}

void DepthwiseForward(const Training& t, const Grid& grid, const float* weights, Images images,
                      float* y) {
  const int64_t size = t.geometry.Pixels() * t.geometry.channels;
  EachPart(t, weights, [&](Part& part) {
    for (int64_t n = images.begin; n < images.end; ++n) {
      part.ReadImage(t, n);
      ForwardImage(grid, part, y + n * size + part.first);
    }
  });
}

void DepthwiseBackward(const Training& t, const Grid& grid, const float* weights, Images images,
                       const float* dy, float* dx, Sums& sums) {
  const int64_t size = t.geometry.Pixels() * t.geometry.channels;
  EachPart(t, weights, [&](Part& part) {
    PartDerivative own(part);
    for (int64_t n = images.begin; n < images.end; ++n) {
      part.ReadImage(t, n);
      std::fill(own.dx.begin(), own.dx.end(), 0.0f);
      BackwardImage(grid, part, dy + n * size + part.first, own);
      CopyRows(own.dx.data(), part.count, part.Places(), part.count,
               dx + n * t.geometry.Image() + part.first, part.channels);
    }
    own.AddTo(sums, part);
  });
}

}  // namespace gpu_ops
