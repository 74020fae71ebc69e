// One task of a deployed convolution; see conv_int8.h.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include <limits>
#include <type_traits>

#include "conv_int8.h"

namespace gpu_ops {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// The results of one output of a pixel, or of `kWide` from it on, from their sums.
template <typename Value>
BORDER_INLINE void Finish(const Results& r, int64_t pixel, int64_t outputs, int64_t o,
                          const Value& sum) {
  const int64_t at = pixel * outputs + o;
  Value y = Most(kLowest, Mul(sum, Load<Value>(r.scale + o)));
  if (r.bias != nullptr) y = Add(y, Load<Value>(r.bias + o));
  if (r.residual != nullptr) y = Add(y, Load<Value>(r.residual + at));
  if (r.residual_codes != nullptr)
    y = Add(y, Dequantize(Load<Value>(r.residual_codes + at), r.residual_grid));
  y = Clip(y, r.low, r.high);
  if (r.values != nullptr) std::memcpy(r.values + at, &y, sizeof y);
  for (const CodeGrid& tensor : r.codes) {
    const float* b = tensor.coefficients + o;
    const auto coefficient = [=](int power) INLINED_LAMBDA {
      return Load<Value>(b + power * outputs);
    };
    const Value u = ToUnits(y, tensor.grid.inv_step);
    const Value border = ApplyPhi(tensor.phi, Horner(2, coefficient, u));
    Store(tensor.grid, 0.0f, Code(u, border, tensor.grid), tensor.codes + at);
  }
}

// All of a pixel's outputs.
VECTORISED void FinishPixel(const Results& r, int64_t pixel, int64_t outputs, const float* y) {
  EachValue(outputs, [&](int64_t o, auto value) INLINED_LAMBDA {
    Finish(r, pixel, outputs, o, Load<decltype(value)>(y + o));
  });
}

// The rows of the input, as codes with one border a channel. `T` is uint8_t, or float for codes less
// their zero point.
template <int degree, typename In, typename T>
BORDER_INLINE void FillCodes(const ColumnJob& job, const In* image, int64_t first, int64_t rows,
                             T padding, T* to) {
  const Geometry& g = job.g;
  // Of few channels, the coefficients of several pixels make a vector.
  const int64_t size = g.width * g.channels;
  const int64_t period = (g.channels < kWide ? kWide : 1) * g.channels;
  std::vector<float> repeated((degree + 1) * period);
  for (int64_t i = 0; i < static_cast<int64_t>(repeated.size()); ++i)
    repeated[i] = job.border.coefficients[i / period * g.channels + i % g.channels];
  const float* own = repeated.data();
  const Grid grid = job.grid;
  const Phi phi = job.border.phi;
  FillRows(job, image, first, rows, padding, to, [=](const In* from, T* out) INLINED_LAMBDA {
    for (int64_t left = size; left > 0; left -= period, from += period, out += period)
      EachValue(std::min(period, left), [=](int64_t i, auto value) INLINED_LAMBDA {
        const auto u = ToUnits(Load<decltype(value)>(from + i), grid.inv_step);
        Store(grid, 0.0f, OwnCode<degree>(grid, phi, u, own + i, period), out + i);
      });
  });
}

// The same from codes.
template <typename T>
BORDER_INLINE void CopyCodes(const ColumnJob& job, const uint8_t* image, int64_t first, int64_t rows,
                             T padding, T* to) {
  const int64_t size = job.g.width * job.g.channels;
  const T less = std::is_same_v<T, float> ? static_cast<T>(job.grid.zero) : T{0};
  FillRows(job, image, first, rows, padding, to, [=](const uint8_t* from, T* out) INLINED_LAMBDA {
    EACH(i, size) out[i] = static_cast<T>(from[i] - less);
  });
}

// One pixel's codes by group, each group's filled up to whole quads; `from` finds a run of taps whose
// channels follow each other.
template <typename From>
BORDER_INLINE void GroupCodes(const Int8Convolution& job, int64_t run, From from, uint8_t* panel) {
  const Geometry& g = job.Window();
  const int64_t size = run * g.Inner(), runs = g.Taps() / run, row = job.Quads() * kQuad;
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t r = 0; r < runs; ++r)
      CopyRun(from(r * run) + group * g.Inner(), size, panel + r * size);
    std::fill(panel + runs * size, panel + row, uint8_t{0});
    panel += row;
  }
}

// The columns of `count` pixels from pixel `first` of a block on.
template <int degree>
BORDER_INLINE void FillPanel(const Int8Convolution& job, int64_t first, int64_t count,
                             TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), line = job.columns.Line(), size = TaskScratch::PanelRow(job);
  const int64_t run = g.groups == 1 ? job.columns.TapRun() : 1;
  uint8_t* panel = s.panel.data();
  for (int64_t p = first; p < first + count; ++p, panel += size) {
    const int64_t at = p / width * g.stride[0] * line + p % width * g.stride[1] * g.channels;
    if (!job.per_element) {
      const uint8_t* pixel = s.codes.data() + at;
      const auto from = [&](int64_t t) INLINED_LAMBDA { return pixel + s.pixel.taps[t]; };
      GroupCodes(job, run, from, panel);
    } else if (g.groups == 1) {
      ColumnCodes<degree>(job.columns, s.units.data() + at, s.pixel, panel);
      std::fill(panel + g.Column(), panel + size, uint8_t{0});
    } else {
      ColumnCodes<degree>(job.columns, s.units.data() + at, s.pixel, s.column.data());
      const uint8_t* column = s.column.data();
      const auto from = [&](int64_t t) INLINED_LAMBDA { return column + t * g.channels; };
      GroupCodes(job, 1, from, panel);
    }
  }
}

// The sums of every pixel's codes in one group, for weights of 8 bits: a product with ones.
inline void SumCodes(const PackedWeights& w, DotFunction dot, const uint8_t* panel, int64_t row,
                     int64_t count, TaskScratch& s) {
  const int64_t quads = static_cast<int64_t>(w.ones.size()) / (kLane * kQuad);
  dot(panel, row, count, w.ones.data(), quads, kLane, s.sums.data());
  for (int64_t i = 0; i < count; ++i) s.code_sums[i] = s.sums[i * kSlice];
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

// A slice's sums of `count` pixels become results.
VECTORISED void FinishSlice(const Int8Convolution& job, const PackedWeights& w, int64_t group,
                            int64_t slice, int64_t pixel, int64_t count, TaskScratch& s) {
  const int64_t outer = job.Outer(), first = w.First(slice);
  const int64_t size = std::min(w.Count(slice), outer - first);
  const int32_t* constant = w.constant.data() + group * w.width + first;
  const int32_t* factor = w.factor.data() + group * w.width + first;
  const bool whole = w.ones.empty();
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* sums = s.sums.data() + i * kSlice;
    const int32_t codes = whole ? 0 : s.code_sums[i];
    EachValue(size, [&](int64_t o, auto value) INLINED_LAMBDA {
      using Value = decltype(value);
      auto sum = LoadIntegers<Value>(sums + o) + LoadIntegers<Value>(constant + o);
      if (!whole) sum += LoadIntegers<Value>(factor + o) * codes;
      Finish(job.results, pixel + i, job.outputs, group * outer + first + o, ToFloats(sum));
    });
  }
}

template <int degree>
BORDER_INLINE void Multiply(const Int8Convolution& job, const PackedWeights& w, DotFunction dot,
                            const uint8_t* direct, const Task& task, TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), quads = job.Quads(), row = TaskScratch::PanelRow(job);
  const int64_t most = TaskScratch::Pixels(job), pixels = task.rows * width;
  for (int64_t p = 0; p < pixels; p += most) {
    const int64_t count = std::min(most, pixels - p);
    const int64_t pixel = (task.n * g.Out(0) + task.first) * width + p;
    if (direct == nullptr) FillPanel<degree>(job, p, count, s);
    const uint8_t* panel = direct == nullptr ? s.panel.data() : direct + p * row;
    for (int64_t group = 0; group < g.groups; ++group) {
      const uint8_t* codes = panel + group * quads * kQuad;
      if (!w.ones.empty()) SumCodes(w, dot, codes, row, count, s);
      for (int64_t slice = task.slice; slice < task.slices; ++slice) {
        dot(codes, row, count, w.packed.data() + w.At(group, slice, quads), quads,
            w.Count(slice), s.sums.data());
        FinishSlice(job, w, group, slice, pixel, count, s);
      }
    }
  }
}

// The border that a pixel's taps share, of every channel; `u` is the first tap.
template <int degree>
BORDER_INLINE void SharedBorders(const ColumnJob& job, const float* u, ColumnScratch& s) {
  const int64_t channels = job.g.channels, power = job.g.Column();
  float* border = s.border.data();
  for (int64_t t = 0; t < job.g.Taps(); ++t) {
    const float *at = job.border.coefficients + t * channels, *from = u + s.taps[t];
    EACH(c, channels) {
      const float own = Polynomial(degree, at + c, power, from[c]);
      border[c] = t == 0 ? own : Add(border[c], own);
    }
  }
  Share(job, border);
}

// One tap of a pixel times its weights, added to `y`.
template <int degree>
BORDER_INLINE void AddTap(const Int8Convolution& job, int64_t tap, const float* from,
                          const float* weight, const float* shared, float* y) {
  const int64_t channels = job.Window().channels, power = job.Window().Column();
  const Grid grid = job.columns.grid;
  const Phi phi = job.columns.border.phi;
  const float* b = job.columns.border.coefficients + tap * channels;
  if (!job.per_element)
    EACH(c, channels) y[c] += from[c] * weight[c];
  else if (shared != nullptr)
    EACH(c, channels) y[c] += (Code(from[c], shared[c], grid) - grid.zero) * weight[c];
  else
    EACH(c, channels) {
      const float border = ApplyPhi(phi, Polynomial(degree, b + c, power, from[c]));
      y[c] += (Code(from[c], border, grid) - grid.zero) * weight[c];
    }
}

// Tap by tap, in float32.
template <int degree>
BORDER_INLINE void MultiplyDepthwise(const Int8Convolution& job, const PackedWeights& w,
                                     const Task& task, TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), line = job.columns.Line(), channels = g.channels;
  const bool shares = job.per_element && job.columns.border.shared_across_taps;
  const float* shared = shares ? s.pixel.border.data() : nullptr;
  float* y = s.line.data();
  for (int64_t p = 0; p < task.rows * width; ++p) {
    const float* u =
        s.units.data() + p / width * g.stride[0] * line + p % width * g.stride[1] * channels;
    if (shares) SharedBorders<degree>(job.columns, u, s.pixel);
    std::fill_n(y, channels, 0.0f);
    for (int64_t t = 0; t < g.Taps(); ++t)
      AddTap<degree>(job, t, u + s.pixel.taps[t], w.depthwise.data() + t * channels, shared, y);
    FinishPixel(job.results, (task.n * g.Out(0) + task.first) * width + p, channels, y);
  }
}

// The rows that a task reads, in the form in which they are multiplied.
template <typename In>
BORDER_INLINE void AnyRows(const Int8Convolution& job, const In* image, const Task& task,
                           TaskScratch& s) {
  const ColumnJob& columns = job.columns;
  const int64_t top = task.first * columns.g.stride[0], rows = columns.InputRows(task.rows);
  const uint8_t zero = static_cast<uint8_t>(columns.grid.zero);
  float* units = s.units.data();
  uint8_t* codes = s.codes.data();
  if constexpr (std::is_same_v<In, uint8_t>) {
    if (job.Depthwise())
      CopyCodes(columns, image, top, rows, 0.0f, units);
    else
      CopyCodes(columns, image, top, rows, zero, codes);
  } else if (job.per_element) {
    FillUnits(columns, image, top, rows, units);
  } else {
    const auto fill = [&](auto degree) INLINED_LAMBDA {
      if (job.Depthwise())
        FillCodes<degree.value>(columns, image, top, rows, 0.0f, units);
      else
        FillCodes<degree.value>(columns, image, top, rows, zero, codes);
    };
    WithDegree(columns.border.degree, fill);
  }
}

}  // namespace

// target_clones takes no templates.
#define ROWS(In)                                                                          \
  VECTORISED void FillRows(const Int8Convolution& job, const In* image, const Task& task, \
                           TaskScratch& s) {                                              \
    AnyRows(job, image, task, s);                                                         \
  }
ROWS(float)
ROWS(uint16_t)
ROWS(uint8_t)
#undef ROWS

VECTORISED void MultiplyRows(const Int8Convolution& job, const PackedWeights& w, DotFunction dot,
                             const uint8_t* direct, const Task& task, TaskScratch& s) {
  WithDegree(job.per_element ? job.columns.border.degree : -1, [&](auto degree) INLINED_LAMBDA {
    if (job.Depthwise())
      MultiplyDepthwise<degree.value>(job, w, task, s);
    else
      Multiply<degree.value>(job, w, dot, direct, task, s);
  });
}

}  // namespace gpu_ops
