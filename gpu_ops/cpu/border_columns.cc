// Column elements of a convolution, quantized with their borders, and the derivative, on CPU.
//
// One image is one task. A task works on one pixel of the result at a time: its column of
// K = taps * channels elements stays in the first-level cache, and only the columns that the matmul
// reads are written k*k-fold. Sums over images are added in the order of the images, so results do
// not depend on the number of threads.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "pixel.h"

namespace gpu_ops {
namespace {

// The dequantized columns [pixels, taps, channels] of one image.
VECTORISED void ForwardImage(const Geometry& g, const Grid& grid, const Border& b,
                             const float* image, const uint8_t* keep, float* columns,
                             PixelScratch& s) {
  const int64_t size = g.Column(), pixels = g.Pixels(), width = g.Out(1);
  for (int64_t pixel = 0; pixel < pixels; ++pixel)
    PixelColumn(g, grid, b, image, keep, PixelOffset(g, pixel, width), columns + pixel * size, s);
}

// The derivative of ForwardImage: dx [height, width, channels]; added to dcoefficients and, lane
// by lane, to dstep.
VECTORISED void BackwardImage(const Geometry& g, const Grid& grid, const Border& b,
                              const float* image, const uint8_t* keep, const float* dcolumns,
                              float* dx, float* dcoefficients, float* dstep, PixelScratch& s) {
  const int64_t size = g.Column(), pixels = g.Pixels(), width = g.Out(1);
  std::fill_n(dx, g.Image(), 0.0f);
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const int64_t at = PixelOffset(g, pixel, width);
    Borders(g, grid, b, image + at, s);
    if (keep != nullptr) Gather(s.taps, g.channels, keep + at, s.keep.data());
    PixelDerivative(g, grid, b, at, dcolumns + pixel * size, dx, dcoefficients, dstep, s);
  }
}

ffi::Error Columns(ffi::ThreadPool pool, Floats x, Mask keep, Floats step, Floats zero,
                   Floats coefficients, ffi::Result<Floats> columns, BorderAttributes a) {
  auto read = ReadColumns(x, keep, step, zero, coefficients, *columns, a);
  if (read.has_error()) return read.error();
  auto grid = ReadGrid(step, zero, a.bits);
  if (grid.has_error()) return grid.error();
  const Training& t = read.value();
  if (ffi::Error error = CheckScratch(PixelScratch::Bytes(t.geometry),
                                      x.size_bytes() + columns->size_bytes());
      error.failure())
    return error;
  const int64_t size = t.geometry.Pixels() * t.geometry.Column(), image = t.geometry.Image();
  WillWrite(columns->typed_data(), columns->size_bytes());
  ParallelFor(pool, t.geometry.images, [&](int64_t n) {
    PixelScratch scratch(t.geometry);
    const uint8_t* kept = t.keep == nullptr ? nullptr : t.keep + n * image;
    ForwardImage(t.geometry, *grid, t.border, t.x + n * image, kept,
                 columns->typed_data() + n * size, scratch);
  });
  return ffi::Error::Success();
}

ffi::Error ColumnsPullback(ffi::ThreadPool pool, Floats x, Mask keep, Floats step, Floats zero,
                           Floats coefficients, Floats dcolumns, ffi::Result<Floats> dx,
                           ffi::Result<Floats> dstep, ffi::Result<Floats> dcoefficients,
                           BorderAttributes a) {
  auto read = ReadColumns(x, keep, step, zero, coefficients, dcolumns, a);
  if (read.has_error()) return read.error();
  auto grid = ReadGrid(step, zero, a.bits);
  if (grid.has_error()) return grid.error();
  const Training& t = read.value();
  if (ffi::Error error = CheckDerivatives(x, coefficients, *dx, *dstep, *dcoefficients);
      error.failure())
    return error;
  const int64_t column = t.geometry.Column(), size = t.geometry.Pixels() * column;
  const int64_t count = t.Coefficients(), width = count + column, image = t.geometry.Image();
  const int64_t all = t.geometry.images * width;
  if (ffi::Error error = CheckScratch(all * sizeof(float) + PixelScratch::Bytes(t.geometry),
                                      x.size_bytes() + dcolumns.size_bytes());
      error.failure())
    return error;
  std::vector<float> sums(all, 0.0f);
  ParallelFor(pool, t.geometry.images, [&](int64_t n) {
    PixelScratch scratch(t.geometry);
    const uint8_t* kept = t.keep == nullptr ? nullptr : t.keep + n * image;
    BackwardImage(t.geometry, *grid, t.border, t.x + n * image, kept,
                  dcolumns.typed_data() + n * size, dx->typed_data() + n * image,
                  sums.data() + n * width, sums.data() + n * width + count, scratch);
  });
  std::vector<double> totals(width, 0.0);
  for (int64_t n = 0; n < t.geometry.images; ++n)
    for (int64_t i = 0; i < width; ++i) totals[i] += sums[n * width + i];
  std::copy_n(totals.begin(), count, dcoefficients->typed_data());
  *dstep->typed_data() =
      static_cast<float>(std::accumulate(totals.begin() + count, totals.end(), 0.0));
  return ffi::Error::Success();
}

}  // namespace

GPU_OPS_HANDLER(BorderColumnsForward, Columns,
                TrainingOperands<ffi::ThreadPool>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

GPU_OPS_HANDLER(BorderColumnsBackward, ColumnsPullback,
                TrainingOperands<ffi::ThreadPool>()
                    .Arg<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Ret<Floats>()
                    .Attrs<BorderAttributes>())

}  // namespace gpu_ops
