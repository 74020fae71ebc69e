// im2col columns on CPU, quantized with their borders.
//
// A task is a block of rows of one image's result, so that a single image uses all threads. The
// rows of the input that a block reads are scaled to units of the step size once, with their zero
// padding, into a buffer that stays in the second-level cache; every pixel then reads its taps
// from there.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include "column.h"

namespace gpu_ops {
namespace {

// Memory of one task: the units of its rows, a pixel's, and a column before it is grouped.
struct BlockScratch {
  Scratch<float> units;
  ColumnScratch pixel;
  Scratch<char> column;

  BlockScratch(const ColumnJob& job, size_t element)
      : units(Units(job)), pixel(job), column(Grouped(job) * element) {}

  static int64_t Units(const ColumnJob& job) {
    return job.InputRows(job.BlockRows(sizeof(float))) * job.Line() + kSlack;
  }
  static int64_t Grouped(const ColumnJob& job) { return job.g.groups == 1 ? 0 : job.g.Column(); }
  static int64_t Bytes(const ColumnJob& job, size_t element) {
    return Units(job) * sizeof(float) + ColumnScratch::Bytes(job.g) + Grouped(job) * element;
  }
};

// From (tap, channel) to (group, tap, channel of the group), each group's row padded with zeros.
template <typename T>
BORDER_INLINE void ByGroup(const Geometry& g, const T* column, T* out) {
  const int64_t inner = g.Inner(), taps = g.Taps(), used = taps * inner;
  for (int64_t group = 0; group < g.groups; ++group, out += g.row) {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < inner; ++c)
        out[t * inner + c] = column[t * g.channels + group * inner + c];
    std::fill_n(out + used, g.row - used, T(0));
  }
}

// `rows` rows of one image's result, from the units that they read.
template <int degree, typename Out>
BORDER_INLINE void Block(const ColumnJob& job, int64_t rows, Out* out, BlockScratch& s) {
  const Geometry& g = job.g;
  const int64_t width = g.Out(1), used = g.Column(), size = g.Row();
  Out* column = g.groups == 1 ? nullptr : reinterpret_cast<Out*>(s.column.data());
  for (int64_t row = 0; row < rows; ++row) {
    const float* u = s.units.data() + row * g.stride[0] * job.Line();
    for (int64_t col = 0; col < width; ++col, out += size, u += g.stride[1] * g.channels) {
      ColumnCodes<degree>(job, u, s.pixel, g.groups == 1 ? out : column);
      if (g.groups == 1)
        std::fill_n(out + used, size - used, Out(0));
      else
        ByGroup(g, column, out);
    }
  }
}

template <typename Out>
BORDER_INLINE void AnyBlock(const ColumnJob& job, int64_t rows, Out* out, BlockScratch& s) {
  switch (job.border.degree) {
    case 0: return Block<0>(job, rows, out, s);
    case 1: return Block<1>(job, rows, out, s);
    case 2: return Block<2>(job, rows, out, s);
    default: return Block<-1>(job, rows, out, s);
  }
}

// target_clones takes no templates.
#define UNITS(In)                                                                 \
  VECTORISED void RowUnits(const ColumnJob& job, const In* image, int64_t first,  \
                           int64_t rows, float* units) {                          \
    FillUnits(job, image, first, rows, units);                                    \
  }
UNITS(float)
UNITS(uint16_t)
#undef UNITS
#define BLOCK(Out)                                                                          \
  VECTORISED void RunBlock(const ColumnJob& job, int64_t rows, Out* out, BlockScratch& s) { \
    AnyBlock(job, rows, out, s);                                                            \
  }
BLOCK(int8_t)
BLOCK(float)
#undef BLOCK

template <typename In, typename Out>
void Quantize(ffi::ThreadPool pool, const ColumnJob& job, const void* x, void* columns) {
  const Geometry& g = job.g;
  WillWrite(columns, g.images * g.Pixels() * g.Row() * sizeof(Out));
  const int64_t rows = job.BlockRows(sizeof(float)), blocks = (g.Out(0) + rows - 1) / rows;
  ParallelFor(pool, g.images * blocks, [&](int64_t task) {
    BlockScratch scratch(job, sizeof(Out));
    const int64_t n = task / blocks, first = task % blocks * rows;
    const int64_t count = std::min(rows, g.Out(0) - first);
    Out* out = static_cast<Out*>(columns) + (n * g.Out(0) + first) * g.Out(1) * g.Row();
    RowUnits(job, static_cast<const In*>(x) + n * g.Image(), first * g.stride[0],
             job.InputRows(count), scratch.units.data());
    RunBlock(job, count, out, scratch);
  });
}

ffi::Error Img2colBorder(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats step, Floats zero,
                         Floats coefficients, ffi::Result<ffi::AnyBuffer> columns,
                         BorderAttributes a) {
  auto geometry = ReadGeometry(x.dimensions(), columns->dimensions(), a.Window());
  if (geometry.has_error()) return geometry.error();
  auto border = ReadBorder(coefficients, geometry->Column(), a);
  if (border.has_error()) return border.error();
  if (ffi::Error error = CheckScalars(step, zero); error.failure()) return error;
  const float size = *step.typed_data(), at = *zero.typed_data();
  if (ffi::Error error = CheckGrid(size, at, a.bits); error.failure()) return error;
  const ColumnJob job{*geometry, MakeGrid(size, at, a.bits), *border, a.bits == 8 ? 128.0f : 0.0f};
  const ffi::DataType from = x.element_type(), to = columns->element_type();
  const bool single = from == ffi::F32, codes = to == ffi::S8;
  if ((!single && from != ffi::BF16) || (!codes && to != ffi::F32))
    return Bad("img2col_border takes float32 or bfloat16 and gives int8 or float32");
  if (ffi::Error error = CheckScratch(BlockScratch::Bytes(job, ffi::ByteWidth(to)),
                                      x.size_bytes() + columns->size_bytes());
      error.failure())
    return error;
  auto run = single ? (codes ? Quantize<float, int8_t> : Quantize<float, float>)
                    : (codes ? Quantize<uint16_t, int8_t> : Quantize<uint16_t, float>);
  run(pool, job, x.untyped_data(), columns->untyped_data());
  return ffi::Error::Success();
}

}  // namespace

GPU_OPS_HANDLER(Img2colBorderHandler, Img2colBorder, Img2colBorderBinding<ffi::ThreadPool>())

}  // namespace gpu_ops
