// im2col columns on CPU, unquantized: the baseline for the cost of borders.
#include <cstdint>
#include <cstring>

#include "geometry.h"
#include "operation.h"
#include "parallel.h"

namespace gpu_ops {
namespace {

// One row of the plain result: runs of channels, copied or zero.
void CopyRow(const Geometry& g, size_t element, const char* image, int64_t row, char* out) {
  const int64_t inner = g.Inner(), pad = g.row - g.Taps() * inner;
  const size_t run = inner * element;
  for (int64_t col = 0; col < g.Out(1); ++col)
    for (int64_t group = 0; group < g.groups; ++group) {
      for (int64_t i = 0; i < g.kernel[0]; ++i) {
        const int64_t y = row * g.stride[0] + i * g.dilation[0] - g.low[0];
        for (int64_t j = 0; j < g.kernel[1]; ++j, out += run) {
          const int64_t x = col * g.stride[1] + j * g.dilation[1] - g.low[1];
          const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
          const int64_t at = (y * g.width + x) * g.channels + group * inner;
          if (inside)
            std::memcpy(out, image + at * element, run);
          else
            std::memset(out, 0, run);
        }
      }
      std::memset(out, 0, pad * element);
      out += pad * element;
    }
}

ffi::Error Img2col(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> columns,
                   WindowAttributes a) {
  auto read = ReadGeometry(x.dimensions(), columns->dimensions(), a);
  if (read.has_error()) return read.error();
  if (x.element_type() != columns->element_type()) return Bad("img2col changes no dtype");
  const Geometry& g = *read;
  const size_t element = ffi::ByteWidth(x.element_type());
  const int64_t height = g.Out(0), row = g.Out(1) * g.Row();
  WillWrite(columns->untyped_data(), columns->size_bytes());
  ParallelFor(pool, g.images * height, [&](int64_t task) {
    const char* image = static_cast<const char*>(x.untyped_data());
    CopyRow(g, element, image + task / height * g.Image() * element, task % height,
            static_cast<char*>(columns->untyped_data()) + task * row * element);
  });
  return ffi::Error::Success();
}

}  // namespace

GPU_OPS_HANDLER(Img2colHandler, Img2col,
                ffi::Ffi::Bind()
                    .Ctx<ffi::ThreadPool>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Attrs<WindowAttributes>())

}  // namespace gpu_ops
