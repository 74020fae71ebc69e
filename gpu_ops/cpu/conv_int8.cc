// The handler of a deployed convolution: its operands, checked, and its tasks; see conv_int8.h.
#include "conv_int8.h"

#include <limits>
#include <type_traits>
#include <utility>

namespace gpu_ops {
namespace {

constexpr int64_t kTasksPerThread = 4;

using Bytes = ffi::Buffer<ffi::U8>;

// How the work is divided: rows of a task, tasks of an image, and parts of the slices.
struct Division {
  int64_t rows, blocks, parts;

  Division(const Int8Convolution& job, int64_t slices, int64_t threads) {
    const Geometry& g = job.Window();
    const int64_t wanted = std::max<int64_t>(threads, 1) * kTasksPerThread;
    const int64_t share = (g.images * g.Out(0) + wanted - 1) / wanted;
    rows = std::clamp<int64_t>(share, 1, job.columns.BlockRows(job.RowElement()));
    blocks = (g.Out(0) + rows - 1) / rows;
    const int64_t tasks = std::max<int64_t>(g.images * blocks, 1);
    parts = job.Depthwise() ? 1 : std::clamp<int64_t>(2 * threads / tasks, 1, slices);
  }
};

template <typename In>
void Convolve(ffi::ThreadPool pool, const Int8Convolution& job, const Division& division,
              DotFunction dot, const void* x) {
  const Geometry& g = job.Window();
  PackedWeights weights(job);
  if (job.Depthwise())
    PackDepthwise(job, weights);
  else
    ParallelFor(pool, g.groups * weights.slices, [&](int64_t i) {
      Pack(job, dot, i / weights.slices, i % weights.slices, weights);
    });
  const auto [rows, blocks, parts] = division;
  ParallelFor(pool, g.images * blocks * parts, [&, rows = rows, blocks = blocks,
                                                parts = parts](int64_t i) {
    const int64_t part = i % parts, block = i / parts % blocks, n = i / parts / blocks;
    const int64_t first = block * rows;
    TaskScratch scratch(job, rows);
    const Task task{n, first, std::min(rows, g.Out(0) - first), weights.slices * part / parts,
                    weights.slices * (part + 1) / parts};
    const In* image = static_cast<const In*>(x) + n * g.Image();
    const uint8_t* columns = job.RowsAreColumns() ? scratch.codes.data() : nullptr;
    if (std::is_same_v<In, uint8_t> && columns != nullptr && job.columns.IsWhole())
      columns = static_cast<const uint8_t*>(x) + n * g.Image() + first * job.columns.Line();
    else
      FillRows(job, image, task, scratch);
    MultiplyRows(job, weights, dot, columns, task, scratch);
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

ffi::Error CheckCount(const char* name, int64_t count, int64_t wanted) {
  if (count == wanted) return ffi::Error::Success();
  return Bad(std::string(name) + " has " + std::to_string(count) + " elements, not " +
             std::to_string(wanted));
}

// The attributes of a deployed convolution beside those of its border.
struct ConvolutionAttributes {
  Sizes kernel, stride, dilation, padding;
  int64_t groups, bits;
  bool shared_across_taps;
  int64_t phi, weight_bits;
  bool per_channel, values;
  float low, high;
  Sizes code_bits, code_phis;

  BorderAttributes Rounding() const {
    return {kernel, stride, dilation, padding, groups, bits, shared_across_taps, phi};
  }
};

// The operands, in their order.
struct Operands {
  ffi::AnyBuffer x;
  Floats step, zero, coefficients;
  Bytes weights;
  Floats weight_zero, scale, bias;
  ffi::AnyBuffer residual;
  Floats residual_grid, code_grids, code_coefficients;
};

ffi::ErrorOr<Geometry> ReadConvolution(const Operands& o, const ConvolutionAttributes& a) {
  Geometry g{};
  const BorderAttributes rounding = a.Rounding();
  if (ffi::Error error = ReadWindow(o.x.dimensions(), rounding.Window(), g); error.failure())
    return ffi::Unexpected(error);
  if (a.groups < 1 || g.channels % a.groups != 0)
    return ffi::Unexpected(Bad(std::to_string(a.groups) + " groups do not divide " +
                               std::to_string(g.channels) + " channels"));
  g.groups = a.groups;
  g.row = g.Taps() * g.Inner();
  if (ffi::Error error = CheckColumns(g); error.failure()) return ffi::Unexpected(error);
  const auto w = o.weights.dimensions();
  if (w.size() != 4 || w[0] != g.kernel[0] || w[1] != g.kernel[1] || w[2] != g.Inner() ||
      w[3] < 1 || w[3] % g.groups != 0)
    return ffi::Unexpected(Bad("the weights have a shape that does not fit the window"));
  for (auto [name, bits] : {std::pair{"bits", a.bits}, std::pair{"weight_bits", a.weight_bits}})
    if (bits < 2 || bits > 8)
      return ffi::Unexpected(Bad(name + (" must be 2 to 8, not " + std::to_string(bits))));
  const double codes = static_cast<double>((1 << a.bits) - 1) * ((1 << a.weight_bits) - 1);
  if (codes * static_cast<double>(g.row) > std::numeric_limits<int32_t>::max())
    return ffi::Unexpected(Bad("a sum of " + std::to_string(g.row) +
                               " products may leave 32 bits"));
  return g;
}

ffi::Error ReadResults(const Operands& o, ffi::RemainingRets rets, const ConvolutionAttributes& a,
                       int64_t outputs, int64_t count, Results& r) {
  for (auto [name, size] : {std::pair{"the weight zero point", o.weight_zero.element_count()},
                            std::pair{"the scale", o.scale.element_count()}})
    if (ffi::Error error = CheckCount(name, size, outputs); error.failure()) return error;
  for (int64_t i = 0; i < outputs; ++i)
    if (const float zero = o.weight_zero.typed_data()[i];
        !(zero >= 0.0f && zero <= 255.0f) || zero != std::floor(zero))
      return Bad("a weight zero point is " + std::to_string(zero) + ", not a code");
  r.scale = o.scale.typed_data();
  r.low = a.low;
  r.high = a.high;
  if (o.bias.element_count() != 0) {
    if (ffi::Error error = CheckCount("the bias", o.bias.element_count(), outputs);
        error.failure())
      return error;
    r.bias = o.bias.typed_data();
  }
  if (o.residual.element_count() != 0) {
    if (ffi::Error error = CheckCount("the residual", o.residual.element_count(), count);
        error.failure())
      return error;
    const bool coded = o.residual.element_type() == ffi::U8;
    if (!coded && o.residual.element_type() != ffi::F32)
      return Bad("the residual is neither float32 nor uint8");
    if (ffi::Error error =
            CheckCount("the residual's grid", o.residual_grid.element_count(), coded ? 2 : 0);
        error.failure())
      return error;
    if (coded) {
      const float* grid = o.residual_grid.typed_data();
      r.residual_grid = MakeGrid(grid[0], grid[1], 8);
      r.residual_codes = o.residual.typed_data<uint8_t>();
    } else {
      r.residual = o.residual.typed_data<float>();
    }
  }
  const int64_t tensors = static_cast<int64_t>(a.code_bits.size());
  const int64_t values = a.values ? 1 : 0;
  if (static_cast<int64_t>(rets.size()) != values + tensors ||
      static_cast<int64_t>(a.code_phis.size()) != tensors)
    return Bad("the call has another number of results than its attributes say");
  for (auto [name, size, wanted] :
       {std::tuple{"the codes' grids", o.code_grids.element_count(), 2 * tensors},
        std::tuple{"the codes' coefficients", o.code_coefficients.element_count(),
                   3 * tensors * outputs}})
    if (ffi::Error error = CheckCount(name, size, wanted); error.failure()) return error;
  if (a.values) {
    auto result = rets.get<Floats>(0);
    if (result.has_error()) return result.error();
    if (ffi::Error error = CheckCount("the result", (*result)->element_count(), count);
        error.failure())
      return error;
    r.values = (*result)->typed_data();
    WillWrite(r.values, count * sizeof(float));
  }
  for (int64_t t = 0; t < tensors; ++t) {
    auto result = rets.get<Bytes>(values + t);
    if (result.has_error()) return result.error();
    if (ffi::Error error = CheckCount("a result", (*result)->element_count(), count);
        error.failure())
      return error;
    const float step = o.code_grids.typed_data()[2 * t], zero = o.code_grids.typed_data()[2 * t + 1];
    const int64_t bits = a.code_bits[t], phi = a.code_phis[t];
    if (bits < 2 || bits > 8 || phi < 0 || phi > 2)
      return Bad("a result has " + std::to_string(bits) + " bits and phi " + std::to_string(phi));
    if (ffi::Error error = CheckGrid(step, zero, bits); error.failure()) return error;
    r.codes.push_back({MakeGrid(step, zero, bits), static_cast<Phi>(phi),
                       o.code_coefficients.typed_data() + 3 * t * outputs,
                       (*result)->typed_data()});
    WillWrite(r.codes.back().codes, count);
  }
  return ffi::Error::Success();
}

ffi::Error ConvInt8(ffi::ThreadPool pool, ffi::AnyBuffer x, Floats step, Floats zero,
                    Floats coefficients, Bytes weights, Floats weight_zero, Floats scale,
                    Floats bias, ffi::AnyBuffer residual, Floats residual_grid, Floats code_grids,
                    Floats code_coefficients, ffi::RemainingRets results,
                    ConvolutionAttributes a) {
  const Operands o{x, step, zero, coefficients, weights, weight_zero, scale, bias, residual,
                   residual_grid, code_grids, code_coefficients};
  if (ffi::Error error = CheckScalars(step, zero); error.failure()) return error;
  auto window = ReadConvolution(o, a);
  if (window.has_error()) return window.error();
  const int64_t elements = a.per_channel ? window->channels : window->Column();
  auto border = ReadBorder(coefficients, elements, a.Rounding());
  if (border.has_error()) return border.error();
  const float size = *step.typed_data(), at = *zero.typed_data();
  if (ffi::Error error = CheckGrid(size, at, a.bits); error.failure()) return error;
  Grid grid = MakeGrid(size, at, a.bits);
  grid.step = 1.0f;  // values are left in units of it
  const Geometry g = Flattened(*window);
  const int64_t outputs = weights.dimensions()[3];
  const bool coded = x.element_type() == ffi::U8;
  const ColumnJob columns{g, grid, *border, 0.0f};
  const bool own = border->degree >= 0 && !a.per_channel && !(g.Taps() == 1 && columns.IsWhole());
  Int8Convolution job{columns, !coded && own,
                  outputs, a.weight_bits, weights.typed_data(), weight_zero.typed_data(), {}};
  if (ffi::Error error =
          ReadResults(o, results, a, outputs, g.images * g.Pixels() * outputs, job.results);
      error.failure())
    return error;
  const DotFunction dot = ChooseDot();
  if (dot == nullptr)
    return Bad("GPU_OPS_INSTRUCTIONS is none of avx512_vnni, avx_vnni, avx2 and plain");
  const Division division(job, (job.Outer() + kSlice - 1) / kSlice, pool.num_threads());
  if (ffi::Error error = CheckScratch(TaskScratch::Bytes(job, division.rows),
                                      x.size_bytes() + weights.size_bytes());
      error.failure())
    return error;
  switch (x.element_type()) {
    case ffi::F32: Convolve<float>(pool, job, division, dot, x.untyped_data()); break;
    case ffi::BF16: Convolve<uint16_t>(pool, job, division, dot, x.untyped_data()); break;
    case ffi::U8: Convolve<uint8_t>(pool, job, division, dot, x.untyped_data()); break;
    default: return Bad("conv_int8 takes float32, bfloat16 or uint8");
  }
  return ffi::Error::Success();
}

auto ConvInt8Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Bytes>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .RemainingRets()
      .Attrs<ConvolutionAttributes>();
}

}  // namespace
}  // namespace gpu_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::gpu_ops::ConvolutionAttributes, StructMember<::gpu_ops::Sizes>("kernel"),
    StructMember<::gpu_ops::Sizes>("stride"), StructMember<::gpu_ops::Sizes>("dilation"),
    StructMember<::gpu_ops::Sizes>("padding"), StructMember<int64_t>("groups"),
    StructMember<int64_t>("bits"), StructMember<bool>("shared_across_taps"),
    StructMember<int64_t>("phi"), StructMember<int64_t>("weight_bits"),
    StructMember<bool>("per_channel"), StructMember<bool>("values"), StructMember<float>("low"),
    StructMember<float>("high"), StructMember<::gpu_ops::Sizes>("code_bits"),
    StructMember<::gpu_ops::Sizes>("code_phis"));

namespace gpu_ops {

GPU_OPS_HANDLER(ConvInt8Handler, ConvInt8, ConvInt8Binding())

}  // namespace gpu_ops
