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

namespace gpu_ops {

constexpr int64_t kBlockBytes = 1 << 17;  // of the rows that a task reads
constexpr int64_t kWide = 16;             // channels that fill a vector
constexpr int64_t kSlack = 32;  // bytes behind elements that may be read, or written before others are

// That many floats in registers, which a loop over an array would store after every operation.
struct Wide {
  typedef float Lanes __attribute__((vector_size(kWide * sizeof(float))));
  typedef int32_t Integers __attribute__((vector_size(kWide * sizeof(int32_t))));
  typedef int16_t Halves __attribute__((vector_size(kWide * sizeof(int16_t))));
  typedef uint8_t Bytes __attribute__((vector_size(kWide)));
  Lanes lanes;

  Wide() = default;
  BORDER_INLINE Wide(float each) {
#ifdef __clang__
    lanes = each - Lanes{};
#else  // that GCC 12 would fill lane by lane
    Lanes first{};
    first[0] = each;
    lanes = __builtin_shuffle(first, Integers{});
#endif
  }
  BORDER_INLINE explicit Wide(const Lanes& each) : lanes(each) {}
  BORDER_INLINE explicit Wide(const Integers& each) : lanes(__builtin_convertvector(each, Lanes)) {}

  friend BORDER_INLINE Wide Mul(const Wide& a, const Wide& b) { return Wide(a.lanes * b.lanes); }
  friend BORDER_INLINE Wide Add(const Wide& a, const Wide& b) { return Wide(a.lanes + b.lanes); }
  friend BORDER_INLINE Wide Sub(const Wide& a, const Wide& b) { return Wide(a.lanes - b.lanes); }
  friend BORDER_INLINE Wide Least(const Wide& a, const Wide& b) {
    return Wide(a.lanes < b.lanes ? a.lanes : b.lanes);
  }
  friend BORDER_INLINE Wide Most(const Wide& a, const Wide& b) {
    return Wide(a.lanes > b.lanes ? a.lanes : b.lanes);
  }
  friend BORDER_INLINE Wide Higher(const Wide& a, const Wide& b) {
    // All bits where `a` is above infinity: GCC 12 would compare `a` with itself lane by lane.
    const Integers none = (0x7f800000 - ((Integers)a.lanes & 0x7fffffff)) >> 31;
    return Wide((Lanes)((Integers)Most(a, b).lanes | none));
  }
  friend BORDER_INLINE Wide Ceil(Wide a) {
    for (int64_t i = 0; i < kWide; ++i) a.lanes[i] = ceilf(a.lanes[i]);
    return a;
  }
};

// The higher one, or the first of both that is not a number.
BORDER_INLINE float Higher(float a, float b) { return a > b || a != a ? a : b; }

// From memory to registers, and back. Bytes change their size step by step: at once, GCC 12 takes
// them one by one.
template <typename Value>
BORDER_INLINE Value Load(const float* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename Value>
BORDER_INLINE Value Load(const uint8_t* from) {
  if constexpr (std::is_same_v<Value, Wide>) {
    Wide::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const auto halves = __builtin_convertvector(bytes, Wide::Halves);
    return Wide(__builtin_convertvector(halves, Wide::Integers));
  } else {
    return static_cast<Value>(*from);
  }
}

template <typename Value>
BORDER_INLINE Value Load(const uint16_t* bfloat16) {
  if constexpr (std::is_same_v<Value, Wide>) {
    Wide::Halves halves;
    std::memcpy(&halves, bfloat16, sizeof halves);
    const Wide::Integers bits = __builtin_convertvector(halves, Wide::Integers) << 16;
    Wide value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return ToFloat(*bfloat16);
  }
}

template <typename Value>
BORDER_INLINE auto LoadIntegers(const int32_t* from) {
  std::conditional_t<std::is_same_v<Value, Wide>, Wide::Integers, int32_t> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

BORDER_INLINE Wide ToFloats(const Wide::Integers& value) { return Wide(value); }
BORDER_INLINE float ToFloats(int32_t value) { return static_cast<float>(value); }

template <typename Out>
BORDER_INLINE void Store(const Grid& grid, float shift, const Wide& code, Out* to) {
  if constexpr (std::is_same_v<Out, float>) {
    const Wide value = Dequantize(code, grid);
    std::memcpy(to, &value, sizeof value);
  } else {
    const auto whole = __builtin_convertvector(Sub(code, shift).lanes, Wide::Integers);
    const auto halves = __builtin_convertvector(whole, Wide::Halves);
    const auto bytes = __builtin_convertvector(halves, Wide::Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
  }
}

BORDER_INLINE void StoreInteger(const Wide& whole, int32_t* to) {
  const auto integers = __builtin_convertvector(whole.lanes, Wide::Integers);
  std::memcpy(to, &integers, sizeof integers);
}
BORDER_INLINE void StoreInteger(float whole, int32_t* to) { *to = static_cast<int32_t>(whole); }

// Calls `each(i, value)` for a run of `count` elements: with a Wide for `kWide` from i on, where the
// last may overlap the one before, or, where they are too few, with a float for each.
template <typename Each>
BORDER_INLINE void EachValue(int64_t count, Each each) {
  if (count < kWide)
    for (int64_t i = 0; i < count; ++i) each(i, 0.0f);
  else
    for (int64_t i = 0; i < count; i += kWide) each(std::min(i, count - kWide), Wide());
}

// Stores the codes of a run of elements: `code(i, value)` gives that of element i, or those of a Wide.
// Bytes are stored by four vectors, which takes a third of the instructions of one by one.
template <typename Out, typename CodeOf>
BORDER_INLINE void StoreRun(const Grid& grid, float shift, int64_t size, Out* out, CodeOf code) {
  constexpr int64_t kRun = 4 * kWide;
  int64_t i = 0;
  if constexpr (sizeof(Out) == 1) {
    for (; i + kRun <= size; i += kRun) {
      int32_t integers[kRun];
      for (int64_t j = 0; j < kRun; j += kWide)
        StoreInteger(Sub(code(i + j, Wide()), shift), integers + j);
      EACH(j, kRun) out[i + j] = static_cast<Out>(integers[j]);
    }
    if (i == size) return;
  }
  const int64_t start = std::min(i, std::max<int64_t>(size - kWide, 0));
  EachValue(size - start, [=](int64_t j, auto value) INLINED_LAMBDA {
    Store(grid, shift, code(start + j, value), out + start + j);
  });
}

// Copies whole vectors, up to kSlack bytes more than `size` elements: calls of memcpy take longer
// than short runs of taps do.
template <typename T>
BORDER_INLINE void CopyRun(const T* from, int64_t size, T* to) {
  constexpr int64_t kStep = kSlack / sizeof(T);
  for (int64_t i = 0; i < size; i += kStep) std::memcpy(to + i, from + i, kSlack);
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
