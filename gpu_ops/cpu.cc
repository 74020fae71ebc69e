// Column elements of a convolution, quantized with their borders, and the derivative, on CPU.
//
// One image is one task, and one pixel of the result is what is worked on at a time: its column of
// K = taps * channels elements stays in the first-level cache, so nothing but the columns that the
// matmul reads is ever written k*k-fold. Sums over images are added in the order of the images,
// whatever the number of threads, so results do not depend on it.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "border_math.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace gpu_ops {
namespace {

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VECTORISED
#endif
// The loop over a column: no element depends on another one.
#define EACH(i, count) _Pragma("GCC ivdep") for (int64_t i = 0; i < (count); ++i)

// A padded input [images, height, width, channels] and the window over it.
struct Geometry {
  int64_t images, height, width, channels;
  int64_t kernel[2], stride[2], dilation[2];

  int64_t Out(int axis) const {
    int64_t size = axis == 0 ? height : width;
    return (size - (kernel[axis] - 1) * dilation[axis] - 1) / stride[axis] + 1;
  }
  int64_t Taps() const { return kernel[0] * kernel[1]; }
  int64_t Column() const { return Taps() * channels; }
  int64_t Pixels() const { return Out(0) * Out(1); }
  int64_t Image() const { return height * width * channels; }
  // Where a tap's row of channels starts, from that of its pixel's first tap.
  int64_t TapOffset(int64_t tap) const {
    return (tap / kernel[1] * dilation[0] * width + tap % kernel[1] * dilation[1]) * channels;
  }
  // Where the row of channels of a pixel's first tap starts in an image.
  int64_t PixelOffset(int64_t pixel, int64_t out_width) const {
    return (pixel / out_width * stride[0] * width + pixel % out_width * stride[1]) * channels;
  }
};

// A border function: coefficients b0, b1, ... as [degree + 1, taps, channels].
struct Border {
  const float* coefficients;
  int degree;
  bool fused;
  Phi phi;
};

// What one pixel's column is computed into, and where its taps lie.
struct Scratch {
  std::vector<float> u, border, slope, first, second;
  std::vector<uint8_t> keep;
  std::vector<int64_t> taps;
  explicit Scratch(const Geometry& g)
      : u(g.Column()),
        border(g.Column()),
        slope(g.Column()),
        first(g.Column()),
        second(g.Column()),
        keep(g.Column(), 1),
        taps(g.Taps()) {
    for (int64_t tap = 0; tap < g.Taps(); ++tap) taps[tap] = g.TapOffset(tap);
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
                           const float* pixel, Scratch& s) {
  const int64_t size = g.Column(), channels = g.channels, taps = g.Taps();
  float* u = s.u.data();
  float* border = s.border.data();
  float* slope = s.slope.data();
  const float* b0 = b.coefficients;
  Gather(s.taps, channels, pixel, u);
  EACH(i, size) u[i] = ToUnits(u[i], grid.inv_step);
  if (b.degree == 2) {
    EACH(i, size)
      border[i] = (b0[2 * size + i] * u[i] + b0[size + i]) * u[i] + b0[i];
  } else if (b.degree == 1) {
    EACH(i, size) border[i] = b0[size + i] * u[i] + b0[i];
  } else {
    EACH(i, size) border[i] = b0[i];
  }
  const int64_t own = b.fused ? channels : size;
  if (b.fused) {
    for (int64_t tap = 1; tap < taps; ++tap)
      EACH(c, channels) border[c] += border[tap * channels + c];
    const float share = 1.0f / static_cast<float>(taps);
    EACH(c, channels) border[c] *= share;
  }
  if (b.phi == Phi::kIdentity) {
    EACH(i, own) slope[i] = 1.0f;
  } else {
    EACH(i, own) {
      slope[i] = PhiSlope(b.phi, border[i]);
      border[i] = ApplyPhi(b.phi, border[i]);
    }
  }
  for (int64_t i = own; i < size; i += own)
    EACH(c, own) border[i + c] = border[c];
}

// The dequantized columns [pixels, taps, channels] of one image.
VECTORISED void ForwardImage(const Geometry& g, const Grid& grid, const Border& b,
                             const float* image, const uint8_t* keep, float* columns, Scratch& s) {
  const int64_t size = g.Column(), pixels = g.Pixels(), width = g.Out(1);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t at = g.PixelOffset(pixel, width);
    Borders(g, grid, b, image + at, s);
    const float* u = s.u.data();
    const float* border = s.border.data();
    float* out = columns + pixel * size;
    EACH(i, size) {
      float code = Clip(RawCode(u[i], border[i], grid), 0.0f, grid.top);
      out[i] = grid.step * (code - grid.zero);
    }
    if (keep == nullptr) continue;
    float* raw = s.first.data();
    uint8_t* kept = s.keep.data();
    Gather(s.taps, g.channels, image + at, raw);
    Gather(s.taps, g.channels, keep + at, kept);
    EACH(i, size) out[i] = kept[i] ? out[i] : raw[i];
  }
}

// The derivative of ForwardImage: dx [height, width, channels]; added to dcoefficients and, lane
// by lane, to dstep.
VECTORISED void BackwardImage(const Geometry& g, const Grid& grid, const Border& b,
                              const float* image, const uint8_t* keep, const float* dcolumns,
                              float* dx, float* dcoefficients, float* dstep, Scratch& s) {
  const int64_t size = g.Column(), channels = g.channels, pixels = g.Pixels(), width = g.Out(1);
  const int64_t own = b.fused ? channels : size;
  const float share = b.fused ? 1.0f / static_cast<float>(g.Taps()) : 1.0f;
  const float* b1 = b.coefficients + size;
  const float* b2 = b.coefficients + 2 * size;
  float* d0 = dcoefficients;
  float* d1 = dcoefficients + size;
  float* d2 = dcoefficients + 2 * size;
  float* lanes = dstep;
  std::fill_n(dx, g.Image(), 0.0f);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t at = g.PixelOffset(pixel, width);
    Borders(g, grid, b, image + at, s);
    if (keep != nullptr) Gather(s.taps, channels, keep + at, s.keep.data());
    const float* u = s.u.data();
    const float* border = s.border.data();
    const float* slope = s.slope.data();
    const uint8_t* kept = s.keep.data();
    const float* d = dcolumns + pixel * size;
    float* direct = s.first.data();
    float* dborder = s.second.data();
    EACH(i, size) {
      const float raw = RawCode(u[i], border[i], grid);
      const float k = kept[i] ? 1.0f : 0.0f;
      const float in = raw >= 0.0f && raw <= grid.top ? 1.0f : 0.0f;
      const float through = k * in * d[i];
      direct[i] = through + (1.0f - k) * d[i];
      dborder[i] = -grid.step * through;
      lanes[i] += k * d[i] * (Clip(raw, 0.0f, grid.top) - grid.zero) - through * u[i];
    }
    if (b.fused)
      for (int64_t i = own; i < size; i += own)
        EACH(c, own) dborder[c] += dborder[i + c];
    EACH(i, own) dborder[i] *= slope[i] * share;
    for (int64_t i = own; i < size; i += own)
      EACH(c, own) dborder[i + c] = dborder[c];
    EACH(i, size) d0[i] += dborder[i];
    if (b.degree > 0) {
      EACH(i, size) {
        float rate = b1[i];
        d1[i] += dborder[i] * u[i];
        if (b.degree > 1) {
          rate += 2.0f * b2[i] * u[i];
          d2[i] += dborder[i] * u[i] * u[i];
        }
        const float du = dborder[i] * rate * grid.inv_step;
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
}

// Runs task(0) ... task(count - 1) on the pool and on the calling thread. The caller takes tasks
// until none is left, so that a busy pool cannot block it.
template <typename Task>
void ParallelFor(ffi::ThreadPool pool, int64_t count, Task task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  auto work = [shared, count, &task] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      std::lock_guard<std::mutex> lock(shared->mutex);
      if (++shared->done == count) shared->finished.notify_all();
    }
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->done == count; });
}

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Span<const int64_t>;

// What both handlers are told, checked.
struct Operation {
  Geometry geometry;
  Grid grid;
  Border border;
  const uint8_t* keep;

  int64_t Coefficients() const { return (border.degree + 1) * geometry.Column(); }
  const uint8_t* Keep(int64_t image) const {
    return keep == nullptr ? nullptr : keep + image * geometry.Image();
  }
};

ffi::ErrorOr<Operation> Read(const Floats& x, const ffi::Buffer<ffi::PRED>& keep,
                             const Floats& step, const Floats& zero, const Floats& coefficients,
                             Integers kernel, Integers stride, Integers dilation, int64_t bits,
                             bool fused, int64_t phi) {
  auto bad = [](const std::string& what) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("border_columns: " + what));
  };
  auto shape = x.dimensions();
  if (shape.size() != 4) return bad("x has " + std::to_string(shape.size()) + " axes, not 4");
  if (kernel.size() != 2 || stride.size() != 2 || dilation.size() != 2)
    return bad("kernel, stride and dilation need two sizes each");
  Operation op{};
  op.geometry = {shape[0], shape[1], shape[2], shape[3], {}, {}, {}};
  for (int axis = 0; axis < 2; ++axis) {
    op.geometry.kernel[axis] = kernel[axis];
    op.geometry.stride[axis] = stride[axis];
    op.geometry.dilation[axis] = dilation[axis];
    const int64_t span = (kernel[axis] - 1) * dilation[axis] + 1;
    if (kernel[axis] < 1 || stride[axis] < 1 || dilation[axis] < 1 || span > shape[axis + 1])
      return bad("a window of " + std::to_string(span) + " does not fit the padded size " +
                 std::to_string(shape[axis + 1]));
  }
  if (bits < 2 || bits > 8) return bad("bits must be 2 to 8, not " + std::to_string(bits));
  if (phi < 0 || phi > 2) return bad("unknown phi " + std::to_string(phi));
  const int64_t column = op.geometry.Column();
  const int64_t count = coefficients.element_count();
  if (column > 0 && (count % column != 0 || count / column < 1 || count / column > 3))
    return bad(std::to_string(count) + " coefficients for columns of " + std::to_string(column));
  if (keep.element_count() != 0 && keep.element_count() != x.element_count())
    return bad("the mask has " + std::to_string(keep.element_count()) + " elements, x " +
               std::to_string(x.element_count()));
  const float size = *step.typed_data();
  // Not-a-number passes, and makes everything so: the trainer's guard then names the block.
  if (size <= 0.0f) return bad("the step size is " + std::to_string(size));
  op.grid = {size, 1.0f / size, *zero.typed_data(), static_cast<float>((1 << bits) - 1)};
  const int degree = column > 0 ? static_cast<int>(count / column) - 1 : 0;
  op.border = {coefficients.typed_data(), degree, fused, static_cast<Phi>(phi)};
  op.keep = keep.element_count() == 0 ? nullptr
                                      : reinterpret_cast<const uint8_t*>(keep.typed_data());
  return op;
}

ffi::Error Forward(ffi::ThreadPool pool, Floats x, ffi::Buffer<ffi::PRED> keep, Floats step,
                   Floats zero, Floats coefficients, ffi::Result<Floats> columns, Integers kernel,
                   Integers stride, Integers dilation, int64_t bits, bool fused, int64_t phi) {
  auto read = Read(x, keep, step, zero, coefficients, kernel, stride, dilation, bits, fused, phi);
  if (read.has_error()) return read.error();
  const Operation& op = read.value();
  const int64_t size = op.geometry.Pixels() * op.geometry.Column();
  if (static_cast<int64_t>(columns->element_count()) != op.geometry.images * size)
    return ffi::Error::InvalidArgument("border_columns: the result has another size");
  ParallelFor(pool, op.geometry.images, [&](int64_t n) {
    Scratch scratch(op.geometry);
    ForwardImage(op.geometry, op.grid, op.border, x.typed_data() + n * op.geometry.Image(),
                 op.Keep(n), columns->typed_data() + n * size, scratch);
  });
  return ffi::Error::Success();
}

ffi::Error Backward(ffi::ThreadPool pool, Floats x, ffi::Buffer<ffi::PRED> keep, Floats step,
                    Floats zero, Floats coefficients, Floats dcolumns, ffi::Result<Floats> dx,
                    ffi::Result<Floats> dstep, ffi::Result<Floats> dcoefficients, Integers kernel,
                    Integers stride, Integers dilation, int64_t bits, bool fused, int64_t phi) {
  auto read = Read(x, keep, step, zero, coefficients, kernel, stride, dilation, bits, fused, phi);
  if (read.has_error()) return read.error();
  const Operation& op = read.value();
  const int64_t column = op.geometry.Column(), size = op.geometry.Pixels() * column;
  if (static_cast<int64_t>(dcolumns.element_count()) != op.geometry.images * size)
    return ffi::Error::InvalidArgument("border_columns: the cotangent has another size");
  const int64_t count = op.Coefficients(), width = count + column;
  std::vector<float> sums(op.geometry.images * width, 0.0f);
  ParallelFor(pool, op.geometry.images, [&](int64_t n) {
    Scratch scratch(op.geometry);
    const int64_t image = n * op.geometry.Image();
    BackwardImage(op.geometry, op.grid, op.border, x.typed_data() + image, op.Keep(n),
                  dcolumns.typed_data() + n * size, dx->typed_data() + image, &sums[n * width],
                  &sums[n * width + count], scratch);
  });
  std::vector<double> totals(width, 0.0);
  for (int64_t n = 0; n < op.geometry.images; ++n)
    for (int64_t i = 0; i < width; ++i) totals[i] += sums[n * width + i];
  std::copy_n(totals.begin(), count, dcoefficients->typed_data());
  *dstep->typed_data() =
      static_cast<float>(std::accumulate(totals.begin() + count, totals.end(), 0.0));
  return ffi::Error::Success();
}

}  // namespace

#define GEOMETRY_ATTRIBUTES                          \
  Attr<Integers>("kernel")                           \
      .Attr<Integers>("stride")                      \
      .Attr<Integers>("dilation")                    \
      .Attr<int64_t>("bits")                         \
      .Attr<bool>("fused")                           \
      .Attr<int64_t>("phi")

#define OPERANDS                   \
  Ctx<ffi::ThreadPool>()           \
      .Arg<Floats>()               \
      .Arg<ffi::Buffer<ffi::PRED>>() \
      .Arg<Floats>()               \
      .Arg<Floats>()               \
      .Arg<Floats>()

XLA_FFI_DEFINE_HANDLER_SYMBOL(BorderColumnsForward, Forward,
                              ffi::Ffi::Bind().OPERANDS.Ret<Floats>().GEOMETRY_ATTRIBUTES);

XLA_FFI_DEFINE_HANDLER_SYMBOL(BorderColumnsBackward, Backward,
                              ffi::Ffi::Bind()
                                  .OPERANDS.Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .GEOMETRY_ATTRIBUTES);

}  // namespace gpu_ops
