// im2col columns on CPU, quantized with their borders.
//
// A task is a block of rows of one image's result, so that a single image uses all threads. The
// rows of the input that a block reads are scaled to units of the step size once, with their zero
// padding, into a buffer that stays in the second-level cache; every pixel then reads its taps
// from there.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "border_math.h"
#include "geometry.h"
#include "operation.h"
#include "parallel.h"

namespace gpu_ops {
namespace {

constexpr int64_t kBlockBytes = 1 << 17;
constexpr int64_t kWide = 16;  // channels that fill a vector

// That many floats in registers, which a loop over an array would store after every tap.
struct Wide {
  typedef float Lanes __attribute__((vector_size(kWide * sizeof(float))));
  Lanes lanes;

  friend BORDER_INLINE Wide Mul(const Wide& a, const Wide& b) { return {a.lanes * b.lanes}; }
  friend BORDER_INLINE Wide Add(const Wide& a, const Wide& b) { return {a.lanes + b.lanes}; }
};

BORDER_INLINE Wide Load(const float* from) {
  Wide value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The static part of one call; `shift` is subtracted from the codes.
struct Job {
  Geometry g;
  Grid grid;
  Border border;
  float shift;

  int64_t Line() const { return g.Padded(1) * g.channels; }
  // Rows of the result in one block.
  int64_t BlockRows() const {
    const int64_t line = std::max<int64_t>(Line() * g.stride[0] * sizeof(float), 1);
    return std::clamp<int64_t>(kBlockBytes / line, 1, g.Out(0));
  }
  // Rows of the padded input that `rows` rows of the result read.
  int64_t InputRows(int64_t rows) const { return (rows - 1) * g.stride[0] + g.Span(0); }

  // Elements of a task's units and, where they are needed, of a gathered and a grouped column.
  int64_t Units() const { return InputRows(BlockRows()) * Line(); }
  int64_t Gathered() const { return g.channels < kWide ? g.Column() : 0; }
  int64_t Grouped() const { return g.groups == 1 ? 0 : g.Column(); }
  int64_t ScratchBytes(size_t element) const {
    return (Units() + g.Column() + Gathered()) * sizeof(float) + Grouped() * element +
           g.Taps() * sizeof(int64_t);
  }
};

// Memory of one task: the units of its rows, its taps, and one pixel's borders and column.
struct BlockScratch {
  std::vector<float> units, border, gathered;
  std::vector<int64_t> taps;
  std::vector<char> column;
  BlockScratch(const Job& job, size_t element)
      : units(job.Units()),
        border(job.g.Column()),
        gathered(job.Gathered()),
        column(job.Grouped() * element) {
    taps.reserve(job.g.Taps());
    for (int64_t i = 0; i < job.g.kernel[0]; ++i)
      for (int64_t j = 0; j < job.g.kernel[1]; ++j)
        taps.push_back(i * job.g.dilation[0] * job.Line() + j * job.g.dilation[1] * job.g.channels);
  }
};

// Units of `rows` rows of the padded input, from row `first` on.
template <typename In>
BORDER_INLINE void FillUnits(const Job& job, const In* image, int64_t first, int64_t rows,
                             float* units) {
  const Geometry& g = job.g;
  const int64_t size = g.width * g.channels, before = g.low[1] * g.channels, line = job.Line();
  for (int64_t r = 0; r < rows; ++r, units += line) {
    const int64_t y = first + r - g.low[0];
    if (y < 0 || y >= g.height) {
      std::fill_n(units, line, 0.0f);
      continue;
    }
    const In* from = image + y * size;
    float* to = units + before;
    std::fill_n(units, before, 0.0f);
    EACH(i, size) to[i] = ToUnits(ToFloat(from[i]), job.grid.inv_step);
    std::fill(to + size, units + line, 0.0f);
  }
}

// The border that the taps of `kWide` channels share, from the first of them on.
template <int degree>
BORDER_INLINE void SharedBorder(const Job& job, const float* u, const BlockScratch& s,
                                int64_t channel, float* border) {
  const int64_t power = job.g.Column();
  const float* at = job.border.coefficients + channel;
  Wide sum{};
  for (size_t t = 0; t < s.taps.size(); ++t, at += job.g.channels) {
    const auto b = [=](int k) { return Load(at + k * power); };
    const Wide own = Horner(degree, b, Load(u + s.taps[t] + channel));
    sum = t == 0 ? own : Add(sum, own);
  }
  std::memcpy(border + channel, &sum, sizeof sum);
}

// Codes of a run of elements, with a border each.
template <typename Out>
BORDER_INLINE void Codes(const Job& job, const float* u, const float* border, int64_t size,
                         Out* out) {
  // Copies, as a store to int8 could change anything that is not.
  const Grid grid = job.grid;
  const float shift = job.shift;
  EACH(i, size) Store(grid, shift, Code(u[i], border[i], grid), out + i);
}

// Codes of a run of elements, each with its own border.
template <int degree, typename Out>
BORDER_INLINE void OwnCodes(const Job& job, const float* u, const float* at, int64_t size,
                            Out* out) {
  const int64_t power = job.g.Column();
  const Phi phi = degree < 0 ? Phi::kIdentity : job.border.phi;
  const Grid grid = job.grid;
  const float shift = job.shift;
  EACH(i, size) {
    const float border = ApplyPhi(phi, Polynomial(degree, at + i, power, u[i]));
    Store(grid, shift, Code(u[i], border, grid), out + i);
  }
}

// The mean over the taps, summed already, as a border.
BORDER_INLINE void Share(const Job& job, float* border) {
  const float share = 1.0f / static_cast<float>(job.g.Taps());
  EACH(c, job.g.channels) border[c] = ApplyPhi(job.border.phi, Mul(border[c], share));
}

// One pixel's column in the order (tap, channel); `u` is its first tap. Tap by tap.
template <int degree, typename Out>
BORDER_INLINE void WideColumn(const Job& job, const float* u, BlockScratch& s, Out* out) {
  const int64_t channels = job.g.channels, taps = job.g.Taps();
  const float* at = job.border.coefficients;
  float* border = s.border.data();
  const bool shared = degree >= 0 && job.border.shared_across_taps;
  if (shared) {
    // The last vector may overlap the one before.
    for (int64_t c = 0; c < channels; c += kWide)
      SharedBorder<degree>(job, u, s, std::min(c, channels - kWide), border);
    Share(job, border);
  }
  for (int64_t t = 0; t < taps; ++t, out += channels)
    if (shared)
      Codes(job, u + s.taps[t], border, channels, out);
    else
      OwnCodes<degree>(job, u + s.taps[t], at + t * channels, channels, out);
}

// The same where the channels are too few for a vector: all taps are gathered first.
template <int degree, typename Out>
BORDER_INLINE void NarrowColumn(const Job& job, const float* u, BlockScratch& s, Out* out) {
  const int64_t channels = job.g.channels, size = job.g.Column();
  const float* at = job.border.coefficients;
  float* column = s.gathered.data();
  for (size_t t = 0; t < s.taps.size(); ++t)
    for (int64_t c = 0; c < channels; ++c) column[t * channels + c] = u[s.taps[t] + c];
  if (degree < 0 || !job.border.shared_across_taps)
    return OwnCodes<degree>(job, column, at, size, out);
  float* border = s.border.data();
  EACH(i, size) border[i] = Polynomial(degree, at + i, size, column[i]);
  for (int64_t c = 0; c < channels; ++c) {
    float sum = border[c];
    for (int64_t i = c + channels; i < size; i += channels) sum = Add(sum, border[i]);
    border[c] = sum;
  }
  Share(job, border);
  for (int64_t c = 0; c < channels; ++c) {
    const float shared = border[c];
    for (int64_t i = c + channels; i < size; i += channels) border[i] = shared;
  }
  Codes(job, column, border, size, out);
}

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

// The rows [first, first + rows) of one image's result.
template <int degree, typename In, typename Out>
BORDER_INLINE void Block(const Job& job, const In* image, int64_t first, int64_t rows, Out* out,
                         BlockScratch& s) {
  const Geometry& g = job.g;
  FillUnits(job, image, first * g.stride[0], job.InputRows(rows), s.units.data());
  const int64_t width = g.Out(1), used = g.Column(), size = g.Row();
  Out* column = g.groups == 1 ? nullptr : reinterpret_cast<Out*>(s.column.data());
  for (int64_t row = 0; row < rows; ++row) {
    const float* u = s.units.data() + row * g.stride[0] * job.Line();
    for (int64_t col = 0; col < width; ++col, out += size, u += g.stride[1] * g.channels) {
      if (g.channels < kWide)
        NarrowColumn<degree>(job, u, s, g.groups == 1 ? out : column);
      else
        WideColumn<degree>(job, u, s, g.groups == 1 ? out : column);
      if (g.groups == 1)
        std::fill_n(out + used, size - used, Out(0));
      else
        ByGroup(g, column, out);
    }
  }
}

template <typename In, typename Out>
BORDER_INLINE void AnyBlock(const Job& job, const In* image, int64_t first, int64_t rows, Out* out,
                            BlockScratch& s) {
  switch (job.border.degree) {
    case 0: return Block<0>(job, image, first, rows, out, s);
    case 1: return Block<1>(job, image, first, rows, out, s);
    case 2: return Block<2>(job, image, first, rows, out, s);
    default: return Block<-1>(job, image, first, rows, out, s);
  }
}

// target_clones takes no templates.
#define BLOCK(In, Out)                                                                             \
  VECTORISED void RunBlock(const Job& job, const In* image, int64_t first, int64_t rows, Out* out, \
                           BlockScratch& s) {                                                      \
    AnyBlock(job, image, first, rows, out, s);                                                     \
  }
BLOCK(float, int8_t)
BLOCK(float, float)
BLOCK(uint16_t, int8_t)
BLOCK(uint16_t, float)
#undef BLOCK

template <typename In, typename Out>
void Quantize(ffi::ThreadPool pool, const Job& job, const void* x, void* columns) {
  const Geometry& g = job.g;
  WillWrite(columns, g.images * g.Pixels() * g.Row() * sizeof(Out));
  const int64_t rows = job.BlockRows(), blocks = (g.Out(0) + rows - 1) / rows;
  ParallelFor(pool, g.images * blocks, [&](int64_t task) {
    BlockScratch scratch(job, sizeof(Out));
    const int64_t n = task / blocks, first = task % blocks * rows;
    Out* out = static_cast<Out*>(columns) + (n * g.Out(0) + first) * g.Out(1) * g.Row();
    RunBlock(job, static_cast<const In*>(x) + n * g.Image(), first,
             std::min(rows, g.Out(0) - first), out, scratch);
  });
}

ffi::Error CheckGrid(float step, float zero, int64_t bits) {
  if (!(step > 0.0f) || std::isinf(step))
    return Bad("the step size is " + std::to_string(step) + ", not positive and finite");
  if (!(zero >= 0.0f && zero < static_cast<float>(1 << bits)) || zero != std::floor(zero))
    return Bad("the zero point is " + std::to_string(zero) + ", not a code of " +
               std::to_string(bits) + " bits");
  return ffi::Error::Success();
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
  const Job job{*geometry, MakeGrid(size, at, a.bits), *border, a.bits == 8 ? 128.0f : 0.0f};
  const ffi::DataType from = x.element_type(), to = columns->element_type();
  const bool single = from == ffi::F32, codes = to == ffi::S8;
  if ((!single && from != ffi::BF16) || (!codes && to != ffi::F32))
    return Bad("img2col_border takes float32 or bfloat16 and gives int8 or float32");
  if (ffi::Error error = CheckScratch(job.ScratchBytes(ffi::ByteWidth(to)),
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
