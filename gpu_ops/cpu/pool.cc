// The maximum over windows of a deployed convolution's values; see conv_int8.h.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include <vector>

#include "results.h"

namespace gpu_ops {
namespace {

// One window: where its first tap lies in the floats of a task, which may be outside, and the taps
// that are inside, along either axis.
struct PoolWindow {
  int64_t at;
  RowRange taps[2];

  PoolWindow(const Geometry& g, int64_t row, int64_t col, int64_t first_row) {
    const int64_t low[] = {row * g.stride[0] - g.low[0], col * g.stride[1] - g.low[1]};
    at = ((low[0] - first_row) * g.width + low[1]) * g.channels;
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t step = g.dilation[axis];
      const auto taps_below = [&](int64_t size) {
        return std::clamp<int64_t>((size - low[axis] + step - 1) / step, 0, g.kernel[axis]);
      };
      const int64_t first = low[axis] < 0 ? taps_below(0) : 0;
      taps[axis] = {first, std::max<int64_t>(taps_below(g.Size(axis)) - first, 0)};
    }
  }
};

// The highest value of a channel in a window, or of `kWide`; not a number where one is, unless all
// are finite.
template <typename Value>
BORDER_INLINE Value Highest(const Geometry& g, const PoolWindow& window, const float* channel,
                            bool finite) {
  const int64_t row = g.dilation[0] * g.width * g.channels, col = g.dilation[1] * g.channels;
  const auto [top, rows] = window.taps[0];
  const auto [left, cols] = window.taps[1];
  const int64_t first = window.at + top * row + left * col;
  Value highest = -kInfinity;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j) {
      const Value value = Load<Value>(channel + (first + i * row + j * col));
      highest = finite ? Most(value, highest) : Higher(highest, value);
    }
  return highest;
}

}  // namespace

VECTORISED void PoolRows(const Int8Convolution& job, const RowRange& rows, const Task& task,
                         TaskScratch& s) {
  const Geometry& g = job.pool;
  const int64_t width = g.Out(1), pixels = rows.count * width;
  const int64_t start = (task.n * g.Out(0) + rows.first) * width;
  const bool finite = job.results.finite;
  std::vector<PoolWindow> windows;
  for (int64_t p = 0; p < pixels; p += kSumPixels) {
    const int64_t count = std::min(kSumPixels, pixels - p);
    windows.clear();
    for (int64_t i = p; i < p + count; ++i)
      windows.emplace_back(g, rows.first + i / width, i % width, task.first);
    EachSlice(job.outputs, [&](int64_t first, int64_t size) INLINED_LAMBDA {
      float* y = s.strip.values.data();
      EachValue(size, [&](int64_t o, auto value) INLINED_LAMBDA {
        for (int64_t i = 0; i < count; ++i) {
          value = Highest<decltype(value)>(g, windows[i], s.values.data() + first + o, finite);
          std::memcpy(y + i * kSlice + o, &value, sizeof value);
        }
      });
      const Place to{start + p, 0, count, job.outputs, first, size};
      Deliver(job.results, to, y, s.strip.codes.data());
    });
  }
}

}  // namespace gpu_ops
