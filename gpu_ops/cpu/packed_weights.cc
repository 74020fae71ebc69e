// The weights of a deployed convolution, laid out for its products; see conv_int8.h.
#include "conv_int8.h"

namespace gpu_ops {
namespace {

constexpr float kByte = 128.0f;  // weights of 8 bits are multiplied less this

}  // namespace

VECTORISED void Pack(const Int8Convolution& job, DotFunction dot, int64_t group, int64_t slice,
                     PackedWeights& to) {
  const int64_t outer = job.Outer(), quads = job.Quads(), elements = job.Elements();
  const int64_t first = to.First(slice), count = to.Count(slice);
  const int64_t real = std::min(count, outer - first), at = group * outer + first;
  int8_t* packed = to.packed.data() + to.At(group, slice, quads);
  uint32_t less[kSlice] = {};
  for (int64_t o = 0; o < real; ++o)
    less[o] = static_cast<uint32_t>(job.weight_bits == 8 ? kByte : job.weight_zero[at + o]);
  for (int64_t q = 0; q < quads; ++q) {
    uint32_t words[kSlice] = {};
    for (int64_t k = 0; k < std::min(kQuad, elements - q * kQuad); ++k) {
      const uint8_t* from = job.weights + (q * kQuad + k) * job.outputs + at;
      EACH(o, real) words[o] |= ((from[o] - less[o]) & 0xff) << (8 * k);
    }
    std::memcpy(packed + q * count * kQuad, words, count * kQuad);
  }
  int32_t total[kSlice];
  const std::vector<uint8_t> ones(quads * kQuad, 1);
  dot(ones.data(), 0, 1, packed, quads, count, total);
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
