// One task of a deployed convolution; see conv_int8.h.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include <limits>

#include "conv_int8.h"
#include "results.h"

namespace gpu_ops {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();

// What becomes of the sums of the outputs of some pixels; `sum` gives those of a pixel from output o
// on. A maximum is taken of `floats`, if they are not null. Residuals of a whole slice are decoded at
// first, see Requantize.
template <typename Sum>
BORDER_INLINE void Finish(const Results& r, const Place& to, float* floats, Strip& strip, Sum sum) {
  const bool biased = r.bias != nullptr, finite = r.finite, limited = r.high < kInfinity;
  const float *residual = r.residual == nullptr ? nullptr : r.residual + to.At(0);
  const float low = r.low, high = r.high;
  const uint8_t* codes = r.residual_codes == nullptr ? nullptr : r.residual_codes + to.At(0);
  const Grid grid = r.residual_grid;
  const int64_t count = to.count, outputs = to.outputs;
  int64_t apart = outputs;  // of residuals
  if (codes != nullptr && to.size == kSlice) {
    float* decoded = strip.residuals.data();
    for (int64_t i = 0; i < count; ++i)
      EACH(o, kSlice)
        decoded[i * kSlice + o] = Dequantize(static_cast<float>(codes[i * outputs + o]), grid);
    codes = nullptr;
    residual = decoded;
    apart = kSlice;
  }
  float* values = floats != nullptr   ? floats + to.LocalAt(0)
                  : r.codes.empty()   ? r.values + to.At(0)
                                      : strip.values.data();
  const int64_t row = values == strip.values.data() ? kSlice : outputs;
  EachValue(to.size, [&](int64_t o, auto value) INLINED_LAMBDA {
    using Value = decltype(value);
    const Value scale = Load<Value>(r.scale + to.first + o);
    const Value bias = biased ? Load<Value>(r.bias + to.first + o) : Value(0.0f);
    const auto next = sum(o, value);
    for (int64_t i = 0; i < count; ++i) {
      Value y = Mul(next(i), scale);
      if (!finite) y = Most(kLowest, y);
      if (biased) y = Add(y, bias);
      if (residual != nullptr) y = Add(y, Load<Value>(residual + i * apart + o));
      if (codes != nullptr) y = Add(y, Dequantize(Load<Value>(codes + i * outputs + o), grid));
      y = Most(low, y);
      if (limited) y = Least(high, y);
      std::memcpy(values + i * row + o, &y, sizeof y);
    }
  });
  if (values == strip.values.data()) Deliver(r, to, strip.values.data(), strip.codes.data());
}

// Adds the columns of `count` pixels, from pixel `first` of a block on, to the panel, each by group.
// The weights of what fills up the last quad of a group are zero.
template <int degree>
BORDER_INLINE void FillPanel(const Int8Convolution& job, int64_t first, int64_t count,
                             TaskScratch& s) {
  // Copies, as a store to a byte could change anything that is not.
  const Geometry& g = job.Window();
  const int64_t channels = g.channels, inner = g.Inner(), groups = g.groups, taps = g.Taps();
  const int64_t width = g.Out(1), step = g.stride[1] * channels;
  const int64_t next_row = g.stride[0] * job.columns.Line() - width * step;
  const int64_t size = TaskScratch::PanelRow(job), group_row = TaskScratch::GroupRow(job);
  const int64_t* offsets = s.pixel.taps.data();
  // The codes of a pixel, of `run` taps that follow each other; `from` finds the first.
  const auto by_group = [=](int64_t run, auto from, uint8_t* to) INLINED_LAMBDA {
    for (int64_t group = 0; group < groups; ++group, to += group_row)
      for (int64_t t = 0; t < taps; t += run)
        CopyRun(from(t) + group * inner, run * inner, to + t * inner);
  };
  const int64_t run = groups == 1 ? job.columns.TapRun() : 1;
  int64_t col = first % width, at = first / width * (width * step + next_row) + col * step;
  uint8_t* panel = s.panel.data() + s.filled * size;
  for (int64_t i = 0; i < count; ++i, panel += size) {
    if (!job.per_element) {
      const uint8_t* pixel = s.codes.data() + at;
      by_group(run, [=](int64_t t) INLINED_LAMBDA { return pixel + offsets[t]; }, panel);
    } else if (groups == 1) {
      ColumnCodes<degree>(job.columns, s.units.data() + at, s.pixel, panel);
    } else {
      ColumnCodes<degree>(job.columns, s.units.data() + at, s.pixel, s.column.data());
      const uint8_t* column = s.column.data();
      by_group(1, [=](int64_t t) INLINED_LAMBDA { return column + t * channels; }, panel);
    }
    at += step;
    if (++col < width) continue;
    col = 0;
    at += next_row;
  }
}

// Calls `run(first, count)` for every `kSumPixels` of a panel's pixels.
template <typename Run>
inline void EachSums(int64_t pixels, Run run) {
  for (int64_t p = 0; p < pixels; p += kSumPixels) run(p, std::min(kSumPixels, pixels - p));
}

// The sums of every pixel's codes in one group, for weights of 8 bits: a product with ones.
inline void SumCodes(const PackedWeights& w, DotFunction dot, const uint8_t* panel, int64_t row,
                     int64_t pixels, TaskScratch& s) {
  const int64_t quads = static_cast<int64_t>(w.ones.size()) / (kLane * kQuad);
  EachSums(pixels, [&](int64_t p, int64_t count) {
    dot(panel + p * row, row, count, w.ones.data(), quads, kLane, s.sums.data());
    for (int64_t i = 0; i < count; ++i) s.code_sums.data()[p + i] = s.sums.data()[i * kSlice];
  });
}

// The results of the pixels of a panel, from `start` on.
void MultiplyPanel(const Int8Convolution& job, const PackedWeights& w, const uint8_t* panel,
                   int64_t row, const Place& start, const Task& task, TaskScratch& s) {
  const DotFunction dot = job.instructions->dot;
  const int64_t quads = job.Quads();
  for (int64_t group = 0; group < job.Window().groups; ++group) {
    const uint8_t* codes = panel + group * TaskScratch::GroupRow(job);
    if (!w.ones.empty()) SumCodes(w, dot, codes, row, start.count, s);
    for (int64_t slice = task.slice; slice < task.slices; ++slice)
      EachSums(start.count, [&](int64_t p, int64_t count) {
        dot(codes + p * row, row, count, w.packed.data() + w.At(group, slice, quads), quads,
            w.Count(slice), s.sums.data());
        const int64_t size = std::min(w.Count(slice), job.Outer() - w.First(slice));
        const Place to{start.pixel + p, start.local + p, count, job.outputs,
                       group * job.Outer() + w.First(slice), size};
        FinishSlice(job, w, group * w.width + w.First(slice), to, s.sums.data(),
                    s.code_sums.data() + p, s);
      });
  }
}

template <int degree>
BORDER_INLINE void Multiply(const Int8Convolution& job, const PackedWeights& w,
                            const uint8_t* direct, const Task& task, TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), most = TaskScratch::Pixels(job), pixels = task.rows * width;
  const int64_t row = direct == nullptr ? TaskScratch::PanelRow(job) : g.channels;
  int64_t pixel = (task.n * g.Out(0) + task.first) * width;
  for (int64_t p = 0; p < pixels;) {
    const int64_t count = std::min(most - s.filled, pixels - p);
    if (direct == nullptr) FillPanel<degree>(job, p, count, s);
    const uint8_t* panel = direct == nullptr ? s.panel.data() : direct + p * row;
    p += count;
    pixel += count;
    s.filled += count;
    if (s.filled < most && !(task.last && p == pixels)) continue;
    const Place start{pixel - s.filled, p - s.filled, s.filled, job.outputs, 0, 0};
    MultiplyPanel(job, w, panel, row, start, task, s);
    s.filled = 0;
  }
}

// The sum over a pixel's taps of codes times weights, of a channel or of `kWide`; `u` is the first
// tap.
template <int degree, typename Value>
BORDER_INLINE Value DepthwiseSum(const Int8Convolution& job, const float* weights, const float* u,
                                 const ColumnScratch& s, int64_t channel) {
  const ColumnJob& columns = job.columns;
  const int64_t channels = columns.g.channels, power = columns.g.Column();
  const Border& border = columns.border;
  const bool shares = job.per_element && border.shared_across_taps;
  const Value shared =
      shares ? Shared(columns, TapSum<degree, Value>(columns, u, s, channel)) : Value(0.0f);
  Value sum = 0.0f;
  for (int64_t t = 0; t < columns.g.Taps(); ++t) {
    const int64_t at = t * channels + channel;
    Value x = Load<Value>(u + s.taps[t] + channel);
    if (job.per_element) {
      const float* b = border.coefficients + at;
      const Value code = shares ? Code(x, shared, columns.grid)
                                : OwnCode<degree>(columns.grid, border.phi, x, b, power);
      x = Sub(code, columns.grid.zero);
    }
    sum = Add(sum, Mul(x, Load<Value>(weights + at)));
  }
  return sum;
}

// Some pixels at a time, in float32.
template <int degree>
BORDER_INLINE void MultiplyDepthwise(const Int8Convolution& job, const PackedWeights& w,
                                     const Task& task, TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), line = job.columns.Line(), pixels = task.rows * width;
  for (int64_t p = 0; p < pixels; p += kSumPixels) {
    const int64_t count = std::min(kSumPixels, pixels - p);
    const float* u[kSumPixels];
    for (int64_t i = 0; i < count; ++i)
      u[i] = s.units.data() + (p + i) / width * g.stride[0] * line +
             (p + i) % width * g.stride[1] * g.channels;
    const int64_t pixel = (task.n * g.Out(0) + task.first) * width + p;
    EachSlice(g.channels, [&](int64_t first, int64_t size) INLINED_LAMBDA {
      const Place to{pixel, p, count, job.outputs, first, size};
      Finish(job.results, to, s.values.data(), s.strip, [&](int64_t o, auto value) INLINED_LAMBDA {
        return [&, c = first + o](int64_t i) INLINED_LAMBDA {
          return DepthwiseSum<degree, decltype(value)>(job, w.depthwise.data(), u[i], s.pixel, c);
        };
      });
    });
  }
}

}  // namespace

VECTORISED void FinishSlice(const Int8Convolution& job, const PackedWeights& w, int64_t first,
                            const Place& to, const int32_t* slice, const int32_t* codes,
                            TaskScratch& s) {
  const bool whole = w.ones.empty();
  Finish(job.results, to, s.values.data(), s.strip, [&](int64_t o, auto value) INLINED_LAMBDA {
    using Value = decltype(value);
    const int32_t* sums = slice + o;
    const auto constant = LoadIntegers<Value>(w.constant.data() + first + o);
    const auto factor = LoadIntegers<Value>(w.factor.data() + first + o);
    return [=](int64_t i) INLINED_LAMBDA {
      const auto sum = LoadIntegers<Value>(sums + i * kSlice) + constant;
      return ToFloats(whole ? sum : sum + factor * codes[i]);
    };
  });
}

VECTORISED void MultiplyRows(const Int8Convolution& job, const PackedWeights& w,
                             const uint8_t* direct, const Task& task, TaskScratch& s) {
  if (job.RowsAreTiles()) return MultiplyTiles(job, w, task, s);
  WithDegree(job.per_element ? job.columns.border.degree : -1, [&](auto degree) INLINED_LAMBDA {
    if (job.Depthwise())
      MultiplyDepthwise<degree.value>(job, w, task, s);
    else
      Multiply<degree.value>(job, w, direct, task, s);
  });
}

}  // namespace gpu_ops
