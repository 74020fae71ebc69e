// The handler of a deployed convolution: its operands, checked, and its tasks; see conv_int8.h.
#include "conv_int8.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>

#include "convolution.h"

namespace gpu_ops {
namespace {

constexpr int64_t kTasksPerThread = 4;

// How the work is divided: images and rows of the result of a task, tasks of the rows of an image,
// and parts of the slices.
struct Division {
  int64_t images, rows, blocks, parts;

  Division(const Int8Convolution& job, int64_t slices, int64_t threads) {
    const Geometry& g = job.Window();
    const int64_t wanted = threads * kTasksPerThread;
    const int64_t share = (g.images * job.ResultRows() + wanted - 1) / wanted;
    const bool whole = job.Depthwise() || job.Pooled();
    const int64_t filling = whole ? 1 : (kSumPixels - 1) / std::max<int64_t>(g.Out(1), 1) + 1;
    rows = std::clamp<int64_t>(std::max(share, filling), 1, job.BlockRows());
    blocks = (job.ResultRows() + rows - 1) / rows;
    images = 1;
    if (!whole && job.NeedsPanel() && blocks == 1)
      images = std::min(TaskScratch::Pixels(job) / std::max<int64_t>(g.Pixels(), 1), g.images / threads);
    images = std::max<int64_t>(images, 1);
    const int64_t tasks = std::max<int64_t>((g.images + images - 1) / images * blocks, 1);
    parts = whole ? 1 : std::clamp<int64_t>(2 * threads / tasks, 1, slices);
  }
};

template <typename In>
void Convolve(ffi::ThreadPool pool, const Int8Convolution& job, const Division& division,
              const void* x) {
  const Geometry& g = job.Window();
  const auto end = job.instructions->end;
  PackedWeights weights(job);
  const int64_t rows = division.rows, blocks = division.blocks, parts = division.parts;
  const int64_t runs = (g.images + division.images - 1) / division.images;
  const bool shared = runs * blocks > 1;  // tasks read the same weights
  if (job.Depthwise())
    PackDepthwise(job, weights);
  else if (shared)
    ParallelFor(pool, g.groups * weights.slices, [&](int64_t i) {
      Pack(job, i / weights.slices, i % weights.slices, weights);
      end();
    });
  ParallelFor(pool, runs * blocks * parts, [&](int64_t i) {
    const int64_t part = i % parts, block = i / parts % blocks, run = i / parts / blocks;
    const int64_t slice = weights.slices * part / parts;
    const int64_t slices = weights.slices * (part + 1) / parts;
    if (!job.Depthwise() && !shared)
      for (int64_t own = 0; own < g.groups * (slices - slice); ++own)
        Pack(job, own % g.groups, slice + own / g.groups, weights);
    const RowRange result{block * rows, std::min(rows, job.ResultRows() - block * rows)};
    const auto [first, count] = job.SumRows(result);
    TaskScratch scratch(job, job.MostSumRows(rows));
    const int64_t images = std::min((run + 1) * division.images, g.images);
    for (int64_t n = run * division.images; n < images; ++n) {
      const Task task{n, first, count, slice, slices, n + 1 == images};
      const In* image = static_cast<const In*>(x) + n * g.Image();
      const uint8_t* columns = job.RowsAreColumns() ? scratch.codes.data() : nullptr;
      if (std::is_same_v<In, uint8_t> && columns != nullptr && job.columns.IsWhole())
        columns = static_cast<const uint8_t*>(x) + n * g.Image() + first * job.columns.Line();
      else
        FillRows(job, image, task, scratch);
      MultiplyRows(job, weights, columns, task, scratch);
      if (job.Pooled()) PoolRows(job, result, task, scratch);
    }
    end();
  });
}

// A pointwise convolution is one of as many rows as there are pixels.
Geometry Flattened(const Geometry& g) {
  const bool pointwise = g.Taps() == 1 && g.stride[0] == 1 && g.stride[1] == 1 &&
                         g.Padded(0) == g.height && g.Padded(1) == g.width;
  if (!pointwise || g.images == 0) return g;
  Geometry flat = g;
  flat.images = 1;
  flat.height = g.images * g.height * g.width;
  flat.width = 1;
  return flat;
}

// The largest of some values without their signs; infinite where one is not a number. Without signs,
// floats are ordered as their bits are, and those that are not numbers come last.
VECTORISED float Largest(const float* values, int64_t count) {
  const float infinite = kInfinity;
  int32_t largest = 0, most;
  std::memcpy(&most, &infinite, sizeof most);
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  largest = std::min(largest, most);
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// No clipped value is larger without its sign, with room for rounding; infinite where floats are
// added, which may be anything.
float MostValue(const Results& r, int64_t outputs, int64_t elements) {
  if (r.residual != nullptr) return kInfinity;
  const float code = 255.0f, sum = code * code * static_cast<float>(elements);
  float most = sum * Largest(r.scale, outputs);
  if (r.bias != nullptr) most += Largest(r.bias, outputs);
  if (r.residual_codes != nullptr) most += code * r.residual_grid.step;
  return std::max({2.0f * most, r.low, -r.high});
}

// Whether the borders are within the bounds that others are clamped to, as those of rounding to
// nearest are.
bool IsClamped(const CodeTensor& tensor, int64_t outputs) {
  const float* b0 = tensor.coefficients;
  return tensor.phi != Phi::kIdentity ||
         (Largest(b0 + outputs, 2 * outputs) == 0.0f &&
          std::all_of(b0, b0 + outputs, [](float b) { return b >= 0.0f && b <= kBelowOne; }));
}

// What becomes of the sums, by grids and zero points whose values are checked here.
ffi::Error MakeResults(const DeployedConvolution& c, const ConvolutionOperands& o,
                       const ConvolutionAttributes& a, Results& r) {
  for (int64_t i = 0; i < c.outputs; ++i)
    if (const float zero = o.weight_zero.typed_data()[i];
        !(zero >= 0.0f && zero <= 255.0f) || zero != std::floor(zero))
      return Bad("a weight zero point is " + std::to_string(zero) + ", not a code");
  r = {o.scale.typed_data(), c.bias, c.residual, c.residual_codes, {}, a.low, a.high, c.values, {}};
  if (c.residual_codes != nullptr) {
    const float* grid = o.residual_grid.typed_data();
    r.residual_grid = MakeGrid(grid[0], grid[1], 8);
  }
  const float most = MostValue(r, c.outputs, c.geometry.Taps() * c.geometry.Inner());
  r.finite = most < kInfinity;
  if (c.values != nullptr) WillWrite(c.values, c.Count() * sizeof(float));
  for (const CodeTensor& tensor : c.codes) {
    const float step = tensor.grid[0], zero = tensor.grid[1];
    if (ffi::Error error = CheckGrid(step, zero, tensor.bits); error.failure()) return error;
    CodeGrid codes{MakeGrid(step, zero, tensor.bits), tensor.phi, tensor.coefficients, tensor.codes};
    // A window of padding alone has no value.
    codes.bounded = !c.Pooled() && most * codes.grid.inv_step < kMaxUnits / 2;
    codes.positive = codes.bounded && r.low >= 0.0f && zero == 0.0f &&
                     IsClamped(tensor, c.outputs) &&
                     Largest(codes.coefficients, 3 * c.outputs) < kMaxUnits;
    r.codes.push_back(codes);
    WillWrite(tensor.codes, c.Count());
  }
  return ffi::Error::Success();
}

ffi::Error ConvInt8(ffi::ThreadPool pool, const ConvolutionOperands& o, ffi::RemainingRets results,
                    const ConvolutionAttributes& a) {
  auto read = ReadConvolution(o, results, a);
  if (read.has_error()) return read.error();
  const float size = *o.step.typed_data(), at = *o.zero.typed_data();
  if (ffi::Error error = CheckGrid(size, at, a.bits); error.failure()) return error;
  Grid grid = MakeGrid(size, at, a.bits);
  grid.step = 1.0f;  // values are left in units of it
  const Geometry& g = read->geometry;
  const ColumnJob columns{read->Pooled() ? g : Flattened(g), grid, read->border, 0.0f};
  Int8Convolution job{columns, read->pool, read->per_element, read->outputs,
                      a.weight_bits, o.weights.typed_data(), o.weight_zero.typed_data(), {},
                      ChooseInstructions()};
  if (ffi::Error error = MakeResults(*read, o, a, job.results); error.failure()) return error;
  if (job.instructions == nullptr)
    return Bad("GPU_OPS_INSTRUCTIONS is '" + std::string(std::getenv("GPU_OPS_INSTRUCTIONS")) +
               "', none of amx_int8, avx512_vnni, avx_vnni, avx2 and plain");
  const Division division(job, (job.Outer() + kSlice - 1) / kSlice,
                          std::max<int64_t>(pool.num_threads(), 1));
  if (ffi::Error error = CheckScratch(TaskScratch::Bytes(job, job.MostSumRows(division.rows)),
                                      o.x.size_bytes() + o.weights.size_bytes());
      error.failure())
    return error;
  const auto convolve = o.x.element_type() == ffi::F32    ? Convolve<float>
                        : o.x.element_type() == ffi::BF16 ? Convolve<uint16_t>
                                                          : Convolve<uint8_t>;
  convolve(pool, job, division, o.x.untyped_data());
  return ffi::Error::Success();
}

}  // namespace

GPU_OPS_HANDLER(ConvInt8Handler, (ConvolutionHandler<ffi::ThreadPool, ConvInt8>),
                ConvolutionBinding<ffi::ThreadPool>())

}  // namespace gpu_ops
