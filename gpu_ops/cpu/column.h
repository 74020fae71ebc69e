// One pixel's column in deployment: its elements in units of the step size, and their codes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "border_math.h"
#include "geometry.h"
#include "operation.h"
#include "parallel.h"
#include "wide.h"

namespace gpu_ops {

constexpr int64_t kBlockBytes = 1 << 17;  // of the rows that a task reads
constexpr int64_t kSlack = 32;  // bytes behind elements that may be read, or written before others are

// Copies whole vectors, up to kSlack bytes more than `size` elements: calls of memcpy take longer
// than short runs of taps do.
template <typename T>
BORDER_INLINE void CopyRun(const T* from, int64_t size, T* to) {
  constexpr int64_t kStep = kSlack / sizeof(T);
  for (int64_t i = 0; i < size; i += kStep) std::memcpy(to + i, from + i, kSlack);
}

// Calls `run` with the degree of a border function as a constant.
template <typename Run>
BORDER_INLINE void WithDegree(int degree, Run run) {
  switch (degree) {
    case 0: return run(std::integral_constant<int, 0>{});
    case 1: return run(std::integral_constant<int, 1>{});
    case 2: return run(std::integral_constant<int, 2>{});
    default: return run(std::integral_constant<int, -1>{});
  }
}

// The columns of a convolution. Codes are stored less `shift`.
struct ColumnJob {
  Geometry g;
  Grid grid;
  Border border;
  float shift;

  bool IsWhole() const { return g.Padded(0) == g.height && g.Padded(1) == g.width; }
  // Elements of a row of the padded input.
  int64_t Line() const { return g.Padded(1) * g.channels; }
  // Rows of the result that read about kBlockBytes, of elements of `size` bytes.
  int64_t BlockRows(int64_t size) const {
    const int64_t line = std::max<int64_t>(Line() * g.stride[0] * size, 1);
    return std::clamp<int64_t>(kBlockBytes / line, 1, g.Out(0));
  }
  // Rows of the padded input that `rows` rows of the result read.
  int64_t InputRows(int64_t rows) const { return (rows - 1) * g.stride[0] + g.Span(0); }
  // Taps whose channels follow each other.
  int64_t TapRun() const { return g.dilation[1] == 1 ? g.kernel[1] : 1; }
  // Where a tap's channels start, from those of its pixel's first tap.
  int64_t TapOffset(int64_t i, int64_t j) const {
    return i * g.dilation[0] * Line() + j * g.dilation[1] * g.channels;
  }
};

// Memory for one pixel's borders and gathered column, and the offsets of its taps.
struct ColumnScratch {
  std::vector<float> border, gathered;
  std::vector<int64_t> taps;

  explicit ColumnScratch(const ColumnJob& columns)
      : border(columns.g.Column()), gathered(Gathered(columns.g)) {
    taps.reserve(columns.g.Taps());
    for (int64_t i = 0; i < columns.g.kernel[0]; ++i)
      for (int64_t j = 0; j < columns.g.kernel[1]; ++j) taps.push_back(columns.TapOffset(i, j));
  }

  static int64_t Gathered(const Geometry& g) {
    return g.channels < kWide ? g.Column() + kSlack / int64_t{sizeof(float)} : 0;
  }
  static int64_t Bytes(const Geometry& g) {
    return (g.Column() + Gathered(g)) * sizeof(float) + g.Taps() * sizeof(int64_t);
  }
};

// `rows` rows of the padded input, from row `first` on: `fill(from, to)` makes the elements of one
// row of the image, all others are `padding`; `first` is where a window starts.
template <typename In, typename Element, typename Fill>
BORDER_INLINE void FillRows(const ColumnJob& job, const In* image, int64_t first, int64_t rows,
                            Element padding, Element* to, Fill fill) {
  const Geometry& g = job.g;
  const int64_t size = g.width * g.channels, before = g.low[1] * g.channels, line = job.Line();
  for (int64_t r = 0; r < rows; ++r, to += line) {
    if (r % g.stride[0] >= g.Span(0)) continue;  // no window reads it
    const int64_t y = first + r - g.low[0];
    if (y < 0 || y >= g.height) {
      std::fill_n(to, line, padding);
      continue;
    }
    std::fill_n(to, before, padding);
    fill(image + y * size, to + before);
    std::fill(to + before + size, to + line, padding);
  }
}

// Units of these rows.
template <typename In>
BORDER_INLINE void FillUnits(const ColumnJob& job, const In* image, int64_t first, int64_t rows,
                             float* units) {
  const int64_t size = job.g.width * job.g.channels;
  const float inv_step = job.grid.inv_step;
  FillRows(job, image, first, rows, 0.0f, units, [=](const In* from, float* to) INLINED_LAMBDA {
    EACH(i, size) to[i] = ToUnits(ToFloat(from[i]), inv_step);
  });
}

// The sum over the taps of the border polynomials of a channel, or of `kWide` from it on; `u` is the
// first tap.
template <int degree, typename Value>
BORDER_INLINE Value TapSum(const ColumnJob& job, const float* u, const ColumnScratch& s,
                           int64_t channel) {
  const int64_t power = job.g.Column();
  const float* at = job.border.coefficients + channel;
  Value sum = 0.0f;
  for (size_t t = 0; t < s.taps.size(); ++t, at += job.g.channels) {
    const auto b = [=](int k) INLINED_LAMBDA { return Load<Value>(at + k * power); };
    const Value own = Horner(degree, b, Load<Value>(u + s.taps[t] + channel));
    sum = t == 0 ? own : Add(sum, own);
  }
  return sum;
}

// Codes of a run of elements, with a border each.
template <typename Out>
BORDER_INLINE void Codes(const ColumnJob& job, const float* u, const float* border, int64_t size,
                         Out* out) {
  // Copies, as a store to int8 could change anything that is not.
  StoreRun(job.grid, job.shift, size, out, [=, grid = job.grid](int64_t i, auto value) INLINED_LAMBDA {
    using Value = decltype(value);
    return Code(Load<Value>(u + i), Load<Value>(border + i), grid);
  });
}

// The code of an element, or of `kWide`, with its own border, whose coefficients start at `at`.
template <int degree, typename Value>
BORDER_INLINE Value OwnCode(const Grid& grid, Phi phi, const Value& u, const float* at,
                            int64_t power) {
  if (degree < 0) return Code(u, Value(kNearest), grid);
  const auto b = [=](int k) INLINED_LAMBDA { return Load<Value>(at + k * power); };
  return Code(u, ApplyPhi(phi, Horner(degree, b, u)), grid);
}

// Codes of a run of elements, each with its own border; `power` is the distance of a coefficient to
// the next power's.
template <int degree, typename Out>
BORDER_INLINE void OwnCodes(const ColumnJob& job, const float* u, const float* at, int64_t power,
                            int64_t size, Out* out) {
  const Phi phi = job.border.phi;
  StoreRun(job.grid, job.shift, size, out, [=, grid = job.grid](int64_t i, auto value) INLINED_LAMBDA {
    return OwnCode<degree>(grid, phi, Load<decltype(value)>(u + i), at + i, power);
  });
}

// The mean over the taps, summed already, as a border.
template <typename Value>
BORDER_INLINE Value Shared(const ColumnJob& job, const Value& sum) {
  return ApplyPhi(job.border.phi, Mul(sum, 1.0f / static_cast<float>(job.g.Taps())));
}

// One pixel's column in the order (tap, channel); `u` is its first tap. Tap by tap.
template <int degree, typename Out>
BORDER_INLINE void WideColumn(const ColumnJob& job, const float* u, ColumnScratch& s, Out* out) {
  const int64_t channels = job.g.channels, taps = job.g.Taps(), power = job.g.Column();
  const float* at = job.border.coefficients;
  float* border = s.border.data();
  const bool shared = degree >= 0 && job.border.shared_across_taps;
  if (shared) {
    EachValue(channels, [&](int64_t c, auto value) INLINED_LAMBDA {
      value = Shared(job, TapSum<degree, decltype(value)>(job, u, s, c));
      std::memcpy(border + c, &value, sizeof value);
    });
  }
  for (int64_t t = 0; t < taps; ++t, out += channels)
    if (shared)
      Codes(job, u + s.taps[t], border, channels, out);
    else
      OwnCodes<degree>(job, u + s.taps[t], at + t * channels, power, channels, out);
}

// The same where the channels are too few for a vector: all taps are gathered first. Up to kSlack
// bytes behind the units are read.
template <int degree, typename Out>
BORDER_INLINE void NarrowColumn(const ColumnJob& job, const float* u, ColumnScratch& s, Out* out) {
  const int64_t channels = job.g.channels, size = job.g.Column();
  const float* at = job.border.coefficients;
  float* column = s.gathered.data();
  const int64_t run = job.TapRun();
  for (int64_t t = 0; t < job.g.Taps(); t += run)
    CopyRun(u + s.taps[t], run * channels, column + t * channels);
  if (degree < 0 || !job.border.shared_across_taps)
    return OwnCodes<degree>(job, column, at, size, size, out);
  float* border = s.border.data();
  EACH(i, size) border[i] = Polynomial(degree, at + i, size, column[i]);
  for (int64_t c = 0; c < channels; ++c) {
    float sum = border[c];
    for (int64_t i = c + channels; i < size; i += channels) sum = Add(sum, border[i]);
    const float shared = Shared(job, sum);
    for (int64_t i = c; i < size; i += channels) border[i] = shared;
  }
  Codes(job, column, border, size, out);
}

template <int degree, typename Out>
BORDER_INLINE void ColumnCodes(const ColumnJob& job, const float* u, ColumnScratch& s, Out* out) {
  if (job.g.channels < kWide)
    NarrowColumn<degree>(job, u, s, out);
  else
    WideColumn<degree>(job, u, s, out);
}

inline ffi::Error CheckGrid(float step, float zero, int64_t bits) {
  if (!(step > 0.0f) || std::isinf(step))
    return Bad("the step size is " + std::to_string(step) + ", not positive and finite");
  if (!(zero >= 0.0f && zero < static_cast<float>(1 << bits)) || zero != std::floor(zero))
    return Bad("the zero point is " + std::to_string(zero) + ", not a code of " +
               std::to_string(bits) + " bits");
  return ffi::Error::Success();
}

}  // namespace gpu_ops
