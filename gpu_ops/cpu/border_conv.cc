// A convolution over columns quantized with their borders, and its derivative, on CPU.
//
// The result is that of border_columns and a matrix product, in one pass: the columns of a few
// pixels are made, multiplied and forgotten, so that k*k-fold columns never reach memory. Each task
// has a fixed share of the images and separate sums, which are added in order. Results do not
// depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "depthwise.h"
#include "multiply.h"
#include "pixel.h"

namespace gpu_ops {
namespace {

constexpr int64_t kPixels = 24;  // of a block; a multiple of the rows of a tile of Multiply
constexpr int64_t kMostBytes = 1 << 26;  // of a block of several pixels
constexpr int64_t kTasks = 16;

// The sizes of a kernel [K, outputs], and of the blocks of pixels that are multiplied with it.
struct KernelShape {
  int64_t elements, outputs, width, deep;

  KernelShape(int64_t elements, int64_t outputs)
      : elements(elements),
        outputs(outputs),
        width(RoundUp(outputs)),
        deep(RoundUp(elements)) {}

  int64_t Dense() const { return elements * width; }
  int64_t Transposed() const { return outputs * deep; }
  int64_t PixelBytes(const Geometry& g) const {
    return (2 * deep + width) * sizeof(float) + PixelScratch::Bytes(g);
  }
  int64_t BlockPixels(const Geometry& g) const {
    const int64_t fit = kMostBytes / PixelBytes(g);
    return std::clamp<int64_t>(fit, 1, std::min(kPixels, g.Pixels()));
  }
};

// The weights [K, outputs], with rows filled up for Multiply, and transposed.
struct Kernel : KernelShape {
  std::vector<float> dense, transposed;

  Kernel(const float* weights, const KernelShape& shape, bool both)
      : KernelShape(shape), dense(Dense(), 0.0f), transposed(both ? Transposed() : 0, 0.0f) {
    for (int64_t k = 0; k < elements; ++k)
      std::copy_n(weights + k * outputs, outputs, dense.data() + k * width);
    if (!both) return;
    for (int64_t k = 0; k < elements; ++k)
      for (int64_t o = 0; o < outputs; ++o) transposed[o * deep + k] = weights[k * outputs + o];
  }
};

// Memory for a block of pixels.
struct PixelBlock {
  int64_t size;  // pixels
  std::vector<PixelScratch> pixels;
  std::vector<float> columns, derivative, results;
  PixelBlock(const Geometry& g, const Kernel& kernel)
      : size(kernel.BlockPixels(g)),
        pixels(size, PixelScratch(g)),
        columns(size * kernel.deep),
        derivative(size * kernel.deep),
        results(size * kernel.width) {}
};

VECTORISED void Columns(const Training& t, const Grid& grid, int64_t n, int64_t first,
                        int64_t count, int64_t deep, PixelBlock& block) {
  const Geometry& g = t.geometry;
  const int64_t offset = n * g.Image(), width = g.Out(1);
  const uint8_t* keep = t.keep == nullptr ? nullptr : t.keep + offset;
  for (int64_t p = 0; p < count; ++p)
    PixelColumn(g, grid, t.border, t.x + offset, keep, PixelOffset(g, first + p, width),
                block.columns.data() + p * deep, block.pixels[p]);
}

VECTORISED void Derivatives(const Training& t, const Grid& grid, int64_t n, int64_t first,
                            int64_t count, int64_t deep, PixelBlock& block, float* dx, Sums& sums) {
  const Geometry& g = t.geometry;
  const int64_t offset = n * g.Image(), width = g.Out(1);
  for (int64_t p = 0; p < count; ++p)
    PixelDerivative(g, grid, t.border, PixelOffset(g, first + p, width),
                    block.derivative.data() + p * deep, dx + offset, sums.coefficients.data(),
                    sums.step.data(), block.pixels[p]);
}

void Products(const Kernel& kernel, int64_t count, PixelBlock& block) {
  Multiply(block.columns.data(), kernel.deep, 1, count, kernel.elements, kernel.dense.data(),
           kernel.width, block.results.data(), false);
}

void Pullback(const Kernel& kernel, int64_t count, PixelBlock& block, Sums& sums) {
  Multiply(block.columns.data(), 1, kernel.deep, kernel.elements, count, block.results.data(),
           kernel.width, sums.weights.data(), true);
  Multiply(block.results.data(), kernel.width, 1, count, kernel.outputs, kernel.transposed.data(),
           kernel.deep, block.derivative.data(), false);
}

void ForwardImage(const Training& t, const Grid& grid, const Kernel& kernel, int64_t n, float* y,
                  PixelBlock& block) {
  const int64_t pixels = t.geometry.Pixels();
  for (int64_t first = 0; first < pixels; first += block.size) {
    const int64_t count = std::min(block.size, pixels - first);
    Columns(t, grid, n, first, count, kernel.deep, block);
    Products(kernel, count, block);
    for (int64_t p = 0; p < count; ++p)
      std::copy_n(block.results.data() + p * kernel.width, kernel.outputs,
                  y + (n * pixels + first + p) * kernel.outputs);
  }
}

void BackwardImage(const Training& t, const Grid& grid, const Kernel& kernel, int64_t n,
                   const float* dy, float* dx, Sums& sums, PixelBlock& block) {
  const int64_t pixels = t.geometry.Pixels();
  std::fill_n(dx + n * t.geometry.Image(), t.geometry.Image(), 0.0f);
  for (int64_t first = 0; first < pixels; first += block.size) {
    const int64_t count = std::min(block.size, pixels - first);
    for (int64_t p = 0; p < count; ++p)
      std::copy_n(dy + (n * pixels + first + p) * kernel.outputs, kernel.outputs,
                  block.results.data() + p * kernel.width);
    Columns(t, grid, n, first, count, kernel.deep, block);
    Pullback(kernel, count, block, sums);
    Derivatives(t, grid, n, first, count, kernel.deep, block, dx, sums);
  }
}

// Operands of both handlers, checked, and their size. The weights of a depthwise convolution are
// [K, 1]: an output has one channel's taps, and no product is one of matrices.
struct Convolution {
  Training training;
  Grid grid;
  KernelShape kernel;
  bool depthwise;
  int64_t bytes;

  int64_t Tasks() const { return std::clamp<int64_t>(training.geometry.images, 1, kTasks); }
  Images Share(int64_t task) const {
    const int64_t images = training.geometry.images, tasks = Tasks();
    return {task * images / tasks, (task + 1) * images / tasks};
  }
  // The sums of one task.
  int64_t Weights() const { return depthwise ? kernel.elements : kernel.Dense(); }
  Sums NoSums() const {
    return {std::vector<float>(training.Coefficients()), std::vector<float>(kernel.elements),
            std::vector<float>(Weights())};
  }

  ffi::Error CheckMemory(bool derivative) const {
    const Geometry& g = training.geometry;
    const int64_t sums = training.Coefficients() + kernel.elements + Weights();
    int64_t floats = derivative ? Tasks() * sums : 0;
    if (!depthwise) floats += kernel.Dense() + (derivative ? kernel.Transposed() : 0);
    const int64_t block = depthwise ? DepthwiseBytes(g, training.border.degree)
                                    : kernel.BlockPixels(g) * kernel.PixelBytes(g);
    return CheckScratch(floats * sizeof(float) + block, bytes);
  }
};

ffi::ErrorOr<Convolution> Read(const Floats& x, const Mask& keep, const Floats& step,
                               const Floats& zero, const Floats& coefficients,
                               const Floats& kernel, const Floats& y, const BorderAttributes& a) {
  auto read = ReadTraining(x, keep, step, zero, coefficients, a);
  if (read.has_error()) return ffi::Unexpected(read.error());
  auto grid = ReadGrid(step, zero, a.bits);
  if (grid.has_error()) return ffi::Unexpected(grid.error());
  const Geometry& g = read->geometry;
  auto shape = kernel.dimensions();
  const bool depthwise = a.groups != 1;
  if (depthwise && a.groups != g.channels)
    return ffi::Unexpected(Bad(std::to_string(a.groups) + " groups are neither 1 nor the " +
                               std::to_string(g.channels) + " channels"));
  if (shape.size() != 2 || shape[0] != g.Column() || (depthwise && shape[1] != 1))
    return ffi::Unexpected(Bad("the kernel is not [" + std::to_string(g.Column()) +
                               (depthwise ? ", 1]" : ", outputs]")));
  const int64_t outputs = depthwise ? g.channels : shape[1];
  if (static_cast<int64_t>(y.element_count()) != g.images * g.Pixels() * outputs)
    return ffi::Unexpected(Bad("the result has another size than the window gives"));
  const int64_t bytes = x.size_bytes() + coefficients.size_bytes() + kernel.size_bytes() +
                        y.size_bytes();
  return Convolution{read.value(), grid.value(), {g.Column(), outputs}, depthwise, bytes};
}

ffi::Error Convolve(ffi::ThreadPool pool, Floats x, Mask keep, Floats step, Floats zero,
                    Floats coefficients, Floats weights, ffi::Result<Floats> y,
                    BorderAttributes a) {
  auto read = Read(x, keep, step, zero, coefficients, weights, *y, a);
  if (read.has_error()) return read.error();
  if (ffi::Error error = read->CheckMemory(false); error.failure()) return error;
  const Training& t = read->training;
  if (read->depthwise) {
    ParallelFor(pool, read->Tasks(), [&](int64_t task) {
      DepthwiseForward(t, read->grid, weights.typed_data(), read->Share(task), y->typed_data());
    });
    return ffi::Error::Success();
  }
  const Kernel kernel(weights.typed_data(), read->kernel, false);
  ParallelFor(pool, t.geometry.images, [&](int64_t n) {
    PixelBlock block(t.geometry, kernel);
    ForwardImage(t, read->grid, kernel, n, y->typed_data(), block);
  });
  return ffi::Error::Success();
}

// Adds the tasks' sums up, in order, in double.
std::vector<double> Total(const std::vector<Sums>& sums, std::vector<float> Sums::*part) {
  std::vector<double> total((sums.front().*part).size(), 0.0);
  for (const Sums& own : sums)
    for (size_t i = 0; i < total.size(); ++i) total[i] += (own.*part)[i];
  return total;
}

void DenseBackward(ffi::ThreadPool pool, const Convolution& c, const float* weights,
                   const float* dy, float* dx, std::vector<Sums>& sums) {
  const Kernel kernel(weights, c.kernel, true);
  ParallelFor(pool, c.Tasks(), [&](int64_t task) {
    PixelBlock block(c.training.geometry, kernel);
    const Images share = c.Share(task);
    for (int64_t n = share.begin; n < share.end; ++n)
      BackwardImage(c.training, c.grid, kernel, n, dy, dx, sums[task], block);
  });
}

ffi::Error ConvolvePullback(ffi::ThreadPool pool, Floats x, Mask keep, Floats step, Floats zero,
                            Floats coefficients, Floats weights, Floats dy,
                            ffi::Result<Floats> dx, ffi::Result<Floats> dstep,
                            ffi::Result<Floats> dcoefficients, ffi::Result<Floats> dweights,
                            BorderAttributes a) {
  auto read = Read(x, keep, step, zero, coefficients, weights, dy, a);
  if (read.has_error()) return read.error();
  if (ffi::Error error = CheckDerivatives(x, coefficients, *dx, *dstep, *dcoefficients);
      error.failure())
    return error;
  if (dweights->element_count() != weights.element_count())
    return Bad("the derivative of the kernel has another size");
  if (ffi::Error error = read->CheckMemory(true); error.failure()) return error;
  std::vector<Sums> sums(read->Tasks(), read->NoSums());
  if (read->depthwise)
    ParallelFor(pool, read->Tasks(), [&](int64_t task) {
      DepthwiseBackward(read->training, read->grid, weights.typed_data(), read->Share(task),
                        dy.typed_data(), dx->typed_data(), sums[task]);
    });
  else
    DenseBackward(pool, *read, weights.typed_data(), dy.typed_data(), dx->typed_data(), sums);
  const std::vector<double> borders = Total(sums, &Sums::coefficients);
  std::copy(borders.begin(), borders.end(), dcoefficients->typed_data());
  const std::vector<double> lanes = Total(sums, &Sums::step);
  *dstep->typed_data() = static_cast<float>(std::accumulate(lanes.begin(), lanes.end(), 0.0));
  const std::vector<double> products = Total(sums, &Sums::weights);
  const int64_t used = read->depthwise ? 1 : read->kernel.outputs;
  const int64_t row = read->depthwise ? 1 : read->kernel.width;
  for (int64_t k = 0; k < read->kernel.elements; ++k)
    std::copy_n(products.begin() + k * row, used, dweights->typed_data() + k * used);
  return ffi::Error::Success();
}

}  // namespace

GPU_OPS_HANDLER(BorderConvForward, Convolve,
                TrainingOperands<ffi::ThreadPool>()
                    .Arg<Floats>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

GPU_OPS_HANDLER(BorderConvBackward, ConvolvePullback,
                TrainingOperands<ffi::ThreadPool>()
                    .Arg<Floats>()
                    .Arg<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

}  // namespace gpu_ops
