// im2col columns on CUDA: unquantized, or quantized with their borders.
#include <cstdint>

#include "columns.h"
#include "device.h"
#include "geometry.h"
#include "operation.h"

namespace gpu_ops {
namespace {

template <typename In, typename Out, int... sizes>
ffi::Error Quantize(Device& device, const Geometry& g, const Border& border, const Floats& step,
                    const Floats& zero, int64_t bits, const void* x, void* columns) {
  const float shift = bits == 8 ? 128.0f : 0.0f;
  const QuantizeColumns<In, Out, 1, false> one{
      g.As<int32_t>(), border, step.typed_data(), zero.typed_data(), bits,
      static_cast<const In*>(x), nullptr, static_cast<Out*>(columns), shift};
  return LaunchColumns<In, Out, false, sizes...>(device, one);
}

ffi::Error Img2colBorder(Device device, ffi::AnyBuffer x, Floats step, Floats zero,
                         Floats coefficients, ffi::Result<ffi::AnyBuffer> columns,
                         BorderAttributes a) {
  auto geometry = ReadGeometry(x.dimensions(), columns->dimensions(), a.Window());
  if (geometry.has_error()) return geometry.error();
  auto border = ReadBorder(coefficients, geometry->Column(), a);
  if (border.has_error()) return border.error();
  if (ffi::Error error = CheckScalars(step, zero); error.failure()) return error;
  const ffi::DataType from = x.element_type(), to = columns->element_type();
  const bool single = from == ffi::F32, codes = to == ffi::S8;
  if ((!single && from != ffi::BF16) || (!codes && to != ffi::F32))
    return Bad("img2col_border takes float32 or bfloat16 and gives int8 or float32");
  auto run = single ? (codes ? Quantize<float, int8_t, 16, 4, 1> : Quantize<float, float, 4, 1>)
                    : (codes ? Quantize<uint16_t, int8_t, 16, 4, 1>
                             : Quantize<uint16_t, float, 4, 1>);
  return run(device, *geometry, *border, step, zero, a.bits, x.untyped_data(),
             columns->untyped_data());
}

// One thread: one word of the plain columns; the geometry counts words, not elements.
template <typename Word>
struct CopyWord {
  GeometryOf<int32_t> g;
  const Word* x;
  Word* columns;

  BORDER_INLINE void operator()(int64_t image, int32_t index) const {
    const int32_t inner = g.Inner(), width = g.Out(1);
    const int32_t pixel = index / g.Row(), group = index % g.Row() / g.row, k = index % g.row;
    const int32_t tap = k / inner;
    const int32_t y = pixel / width * g.stride[0] + tap / g.kernel[1] * g.dilation[0] - g.low[0];
    const int32_t x_at = pixel % width * g.stride[1] + tap % g.kernel[1] * g.dilation[1] - g.low[1];
    const bool inside = y >= 0 && y < g.height && x_at >= 0 && x_at < g.width && tap < g.Taps();
    const int32_t from = (y * g.width + x_at) * g.channels + group * inner + k % inner;
    columns[image * g.Pixels() * g.Row() + index] = inside ? x[image * g.Image() + from] : Word{};
  }
};

template <int bytes>
ffi::Error Copy(Device& device, Geometry g, int64_t element, const void* x, void* columns) {
  using Word = typename WordOf<bytes>::Type;
  g.channels = g.channels * element / bytes;
  g.row = g.row * element / bytes;
  return device.Launch(g.images, g.Pixels() * g.Row(),
                       CopyWord<Word>{g.As<int32_t>(), static_cast<const Word*>(x),
                                      static_cast<Word*>(columns)});
}

ffi::Error Img2col(Device device, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> columns,
                   WindowAttributes a) {
  auto geometry = ReadGeometry(x.dimensions(), columns->dimensions(), a);
  if (geometry.has_error()) return geometry.error();
  if (x.element_type() != columns->element_type()) return Bad("img2col changes no dtype");
  const int64_t element = ffi::ByteWidth(x.element_type());
  const int64_t inner = geometry->Inner() * element, row = geometry->row * element;
  auto fits = [&](int64_t bytes) { return inner % bytes == 0 && row % bytes == 0; };
  auto copy = fits(16)  ? Copy<16>
              : fits(8) ? Copy<8>
              : fits(4) ? Copy<4>
              : fits(2) ? Copy<2>
                        : Copy<1>;
  return copy(device, *geometry, element, x.untyped_data(), columns->untyped_data());
}

}  // namespace

GPU_OPS_HANDLER(Img2colBorderHandler, Img2colBorder, Img2colBorderBinding<Device>())

GPU_OPS_HANDLER(Img2colHandler, Img2col,
                ffi::Ffi::Bind()
                    .Ctx<Device>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Attrs<WindowAttributes>())

}  // namespace gpu_ops
