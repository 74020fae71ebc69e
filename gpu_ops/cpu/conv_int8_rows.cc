// The rows of the input of a deployed convolution, in the form in which they are multiplied; see
// conv_int8.h.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include <type_traits>

#include "conv_int8.h"

namespace gpu_ops {
namespace {

// The rows of the input, as codes with one border a channel. `T` is uint8_t, or float for codes less
// their zero point.
template <int degree, typename In, typename T>
BORDER_INLINE void FillCodes(const ColumnJob& job, const In* image, int64_t first, int64_t rows,
                             T padding, T* to) {
  const Geometry& g = job.g;
  // Of few channels, the coefficients of several pixels make a vector.
  const int64_t size = g.width * g.channels;
  const int64_t period = (g.channels < kWide ? 4 * kWide : 1) * g.channels;
  std::vector<float> repeated((degree + 1) * period);
  for (int64_t i = 0; i < static_cast<int64_t>(repeated.size()); ++i)
    repeated[i] = job.border.coefficients[i / period * g.channels + i % g.channels];
  const float* own = repeated.data();
  const Grid grid = job.grid;
  const Phi phi = job.border.phi;
  FillRows(job, image, first, rows, padding, to, [=](const In* from, T* out) INLINED_LAMBDA {
    for (int64_t left = size; left > 0; left -= period, from += period, out += period)
      StoreRun(grid, 0.0f, std::min(period, left), out, [=](int64_t i, auto value) INLINED_LAMBDA {
        const auto u = ToUnits(Load<decltype(value)>(from + i), grid.inv_step);
        return OwnCode<degree>(grid, phi, u, own + i, period);
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

}  // namespace gpu_ops
