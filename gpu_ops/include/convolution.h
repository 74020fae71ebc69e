// Operands of a deployed convolution, checked, for the CPU and for the GPU.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operation.h"

namespace gpu_ops {

using Bytes = ffi::Buffer<ffi::U8>;

// Its attributes: those of its border, and more.
struct ConvolutionAttributes {
  Sizes kernel, stride, dilation, padding;
  int64_t groups, bits;
  bool shared_across_taps;
  int64_t phi, weight_bits;
  bool per_channel, values;
  float low, high;
  Sizes code_bits, code_phis;
  Sizes pool;  // kernel, stride, dilation and padding of a maximum over the result; empty for none

  BorderAttributes Rounding() const {
    return {kernel, stride, dilation, padding, groups, bits, shared_across_taps, phi};
  }
};

// Its operands, in their order.
struct ConvolutionOperands {
  ffi::AnyBuffer x;
  Floats step, zero, coefficients;
  Bytes weights;
  Floats weight_zero, scale, bias;
  ffi::AnyBuffer residual;
  Floats residual_grid, code_grids, code_coefficients;
};

// A tensor of codes that results: step size and zero point, and b0, b1, b2 of every channel.
struct CodeTensor {
  int64_t bits;
  Phi phi;
  const float *grid, *coefficients;
  uint8_t* codes;
};

// What they say; absent operands are null. All pointers are to where the device can read.
struct DeployedConvolution {
  Geometry geometry, pool;  // the latter of the windows of a maximum; without taps for none
  Border border;
  bool per_element;  // the borders are those of column elements
  int64_t outputs;   // of all groups
  const float *bias, *residual;
  const uint8_t* residual_codes;
  float* values;
  std::vector<CodeTensor> codes;

  bool Pooled() const { return pool.Taps() > 0; }
  // Elements before and after the maximum.
  int64_t SumCount() const { return geometry.images * geometry.Pixels() * outputs; }
  int64_t Count() const {
    return Pooled() ? geometry.images * pool.Pixels() * outputs : SumCount();
  }
};

inline ffi::Error CheckCount(const char* name, int64_t count, int64_t wanted) {
  if (count == wanted) return ffi::Error::Success();
  return Bad(std::string(name) + " has " + std::to_string(count) + " elements, not " +
             std::to_string(wanted));
}

inline ffi::ErrorOr<Geometry> ReadConvolutionGeometry(const ConvolutionOperands& o,
                                                      const ConvolutionAttributes& a) {
  Geometry g{};
  const BorderAttributes rounding = a.Rounding();
  if (ffi::Error error = ReadWindow(o.x.dimensions(), rounding.Window(), g); error.failure())
    return ffi::Unexpected(error);
  if (ffi::Error error = ReadGroups(a.groups, g); error.failure()) return ffi::Unexpected(error);
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

// The window of the maximum over the result.
inline ffi::Error ReadPool(const ConvolutionAttributes& a, DeployedConvolution& c) {
  if (a.pool.size() == 0) return ffi::Error::Success();
  if (a.pool.size() != 10) return Bad("pool has " + std::to_string(a.pool.size()) + " sizes, not 10");
  const Geometry& g = c.geometry;
  const int64_t shape[] = {g.images, g.Out(0), g.Out(1), c.outputs};
  const auto sizes = [&](int first, int count) { return Sizes(a.pool.begin() + first, count); };
  const WindowAttributes window{sizes(0, 2), sizes(2, 2), sizes(4, 2), sizes(6, 4), 1};
  return ReadWindow(Sizes(shape, 4), window, c.pool);
}

// Bias and residual of a result of `c.SumCount()` elements.
inline ffi::Error ReadAddends(const ConvolutionOperands& o, DeployedConvolution& c) {
  if (o.bias.element_count() != 0) {
    if (ffi::Error error = CheckCount("the bias", o.bias.element_count(), c.outputs);
        error.failure())
      return error;
    c.bias = o.bias.typed_data();
  }
  if (o.residual.element_count() == 0) return ffi::Error::Success();
  if (ffi::Error error = CheckCount("the residual", o.residual.element_count(), c.SumCount());
      error.failure())
    return error;
  const bool coded = o.residual.element_type() == ffi::U8;
  if (!coded && o.residual.element_type() != ffi::F32)
    return Bad("the residual is neither float32 nor uint8");
  if (coded)
    c.residual_codes = o.residual.typed_data<uint8_t>();
  else
    c.residual = o.residual.typed_data<float>();
  return CheckCount("the residual's grid", o.residual_grid.element_count(), coded ? 2 : 0);
}

// The results of `c.Count()` elements each.
inline ffi::Error ReadResults(const ConvolutionOperands& o, ffi::RemainingRets rets,
                              const ConvolutionAttributes& a, DeployedConvolution& c) {
  const int64_t tensors = static_cast<int64_t>(a.code_bits.size());
  const int64_t values = a.values ? 1 : 0;
  if (static_cast<int64_t>(rets.size()) != values + tensors ||
      static_cast<int64_t>(a.code_phis.size()) != tensors)
    return Bad("the call has another number of results than its attributes say");
  for (auto [name, size, wanted] :
       {std::tuple{"the weight zero point", o.weight_zero.element_count(), c.outputs},
        std::tuple{"the scale", o.scale.element_count(), c.outputs},
        std::tuple{"the codes' grids", o.code_grids.element_count(), 2 * tensors},
        std::tuple{"the codes' coefficients", o.code_coefficients.element_count(),
                   3 * tensors * c.outputs}})
    if (ffi::Error error = CheckCount(name, size, wanted); error.failure()) return error;
  if (a.values) {
    auto result = rets.get<Floats>(0);
    if (result.has_error()) return result.error();
    if (ffi::Error error = CheckCount("the result", (*result)->element_count(), c.Count());
        error.failure())
      return error;
    c.values = (*result)->typed_data();
  }
  for (int64_t t = 0; t < tensors; ++t) {
    auto result = rets.get<Bytes>(values + t);
    if (result.has_error()) return result.error();
    if (ffi::Error error = CheckCount("a result", (*result)->element_count(), c.Count());
        error.failure())
      return error;
    const int64_t bits = a.code_bits[t], phi = a.code_phis[t];
    if (bits < 2 || bits > 8 || phi < 0 || phi > 2)
      return Bad("a result has " + std::to_string(bits) + " bits and phi " + std::to_string(phi));
    c.codes.push_back({bits, static_cast<Phi>(phi), o.code_grids.typed_data() + 2 * t,
                       o.code_coefficients.typed_data() + 3 * t * c.outputs,
                       (*result)->typed_data()});
  }
  return ffi::Error::Success();
}

inline ffi::ErrorOr<DeployedConvolution> ReadConvolution(const ConvolutionOperands& o,
                                                 ffi::RemainingRets rets,
                                                 const ConvolutionAttributes& a) {
  if (ffi::Error error = CheckScalars(o.step, o.zero); error.failure())
    return ffi::Unexpected(error);
  const ffi::DataType from = o.x.element_type();
  if (from != ffi::F32 && from != ffi::BF16 && from != ffi::U8)
    return ffi::Unexpected(Bad("conv_int8 takes float32, bfloat16 or uint8"));
  auto geometry = ReadConvolutionGeometry(o, a);
  if (geometry.has_error()) return ffi::Unexpected(geometry.error());
  const Geometry& g = *geometry;
  const int64_t elements = a.per_channel ? g.channels : g.Column();
  auto border = ReadBorder(o.coefficients, elements, a.Rounding());
  if (border.has_error()) return ffi::Unexpected(border.error());
  const bool whole = g.Padded(0) == g.height && g.Padded(1) == g.width;
  const bool per_element = from != ffi::U8 && border->degree >= 0 && !a.per_channel &&
                           !(g.Taps() == 1 && whole);
  DeployedConvolution c{
      g, {}, *border, per_element, o.weights.dimensions()[3], {}, {}, {}, {}, {}};
  if (ffi::Error error = ReadPool(a, c); error.failure()) return ffi::Unexpected(error);
  if (ffi::Error error = ReadAddends(o, c); error.failure()) return ffi::Unexpected(error);
  if (ffi::Error error = ReadResults(o, rets, a, c); error.failure())
    return ffi::Unexpected(error);
  return c;
}

// A handler of it; `run` has the work.
template <typename Context, ffi::Error (*run)(Context, const ConvolutionOperands&,
                                              ffi::RemainingRets, const ConvolutionAttributes&)>
ffi::Error ConvolutionHandler(Context context, ffi::AnyBuffer x, Floats step, Floats zero,
                              Floats coefficients, Bytes weights, Floats weight_zero, Floats scale,
                              Floats bias, ffi::AnyBuffer residual, Floats residual_grid,
                              Floats code_grids, Floats code_coefficients,
                              ffi::RemainingRets results, ConvolutionAttributes attributes) {
  return run(std::move(context),
             {x, step, zero, coefficients, weights, weight_zero, scale, bias, residual,
              residual_grid, code_grids, code_coefficients},
             results, attributes);
}

template <typename Context>
auto ConvolutionBinding() {
  return ffi::Ffi::Bind()
      .Ctx<Context>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Bytes>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .template Arg<Floats>()
      .RemainingRets()
      .template Attrs<ConvolutionAttributes>();
}

}  // namespace gpu_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::gpu_ops::ConvolutionAttributes, StructMember<::gpu_ops::Sizes>("kernel"),
    StructMember<::gpu_ops::Sizes>("stride"), StructMember<::gpu_ops::Sizes>("dilation"),
    StructMember<::gpu_ops::Sizes>("padding"), StructMember<int64_t>("groups"),
    StructMember<int64_t>("bits"), StructMember<bool>("shared_across_taps"),
    StructMember<int64_t>("phi"), StructMember<int64_t>("weight_bits"),
    StructMember<bool>("per_channel"), StructMember<bool>("values"), StructMember<float>("low"),
    StructMember<float>("high"), StructMember<::gpu_ops::Sizes>("code_bits"),
    StructMember<::gpu_ops::Sizes>("code_phis"), StructMember<::gpu_ops::Sizes>("pool"));
