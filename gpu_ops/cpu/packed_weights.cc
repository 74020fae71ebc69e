// The weights of a deployed convolution, laid out for its products; see conv_int8.h.
#include "conv_int8.h"

namespace gpu_ops {
namespace {

constexpr float kByte = 128.0f;  // weights of 8 bits are multiplied less this

// Four rows of weights, of `count` outputs, less a code each.
BORDER_INLINE void PackQuad(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d,
                            const uint8_t* less, int64_t count, int8_t* to) {
  EACH(o, count) {
    to[kQuad * o] = static_cast<int8_t>(a[o] - less[o]);
    to[kQuad * o + 1] = static_cast<int8_t>(b[o] - less[o]);
    to[kQuad * o + 2] = static_cast<int8_t>(c[o] - less[o]);
    to[kQuad * o + 3] = static_cast<int8_t>(d[o] - less[o]);
  }
}

}  // namespace

VECTORISED void Pack(const Int8Convolution& job, int64_t group, int64_t slice, PackedWeights& to) {
  const int64_t outer = job.Outer(), quads = job.Quads(), elements = job.Elements();
  const int64_t first = to.First(slice), count = to.Count(slice);
  const int64_t real = std::min(count, outer - first), at = group * outer + first;
  int8_t* packed = to.packed.data() + to.At(group, slice, quads);
  uint8_t less[kSlice] = {};
  for (int64_t o = 0; o < real; ++o)
    less[o] = static_cast<uint8_t>(job.weight_bits == 8 ? kByte : job.weight_zero[at + o]);
  if (real < count) std::fill_n(packed, quads * count * kQuad, int8_t{0});
  for (int64_t q = 0; q < quads; ++q) {
    // What fills up the last quad is zero.
    const auto row = [&](int64_t k) INLINED_LAMBDA {
      return k < elements ? job.weights + k * job.outputs + at : less;
    };
    const int64_t k = q * kQuad;
    PackQuad(row(k), row(k + 1), row(k + 2), row(k + 3), less, real, packed + k * count);
  }
  int32_t total[kSlice];
  const std::vector<uint8_t> ones(quads * kQuad, 1);
  job.instructions->dot(ones.data(), 0, 1, packed, quads, count, total);
  const int32_t zero = static_cast<int32_t>(job.columns.grid.zero);
  for (int64_t o = 0; o < real; ++o) {
    const int64_t index = group * to.width + first + o;
    const int32_t factor =
        job.weight_bits == 8
            ? static_cast<int32_t>(kByte) - static_cast<int32_t>(job.weight_zero[at + o])
            : 0;
    to.factor[index] = factor;
    to.constant[index] = -zero * (total[o] + factor * static_cast<int32_t>(elements));
  }
}

void PackDepthwise(const Int8Convolution& job, PackedWeights& to) {
  const int64_t channels = job.outputs;
  for (int64_t t = 0; t < job.Window().Taps(); ++t)
    EACH(c, channels)
      to.depthwise[t * channels + c] =
          static_cast<float>(job.weights[t * channels + c]) - job.weight_zero[c];
}

}  // namespace gpu_ops
