// A quantized convolution that never writes its columns: it reads bfloat16 activations, evaluates
// borders and quantizes in registers, multiplies int8 on tensor cores and writes bfloat16.
//
// A tile is 64 pixels of the result times `kOutputs` of its channels. It walks over the column
// elements in steps of 32 channels of one tap; a stage is all taps of as many 32 channels as fit
// the shared memory, because the taps of a channel may share a border (Eq. 9).
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "device.h"
#include "operation.h"
#include "tiles.h"

namespace gpu_ops {

// As BorderAttributes; `degree` is that of the folded polynomial, 1 or 2.
struct TunedAttributes {
  Sizes kernel, stride, dilation, padding;
  int64_t bits, degree;
  bool shared_across_taps, relu;
};

namespace {

constexpr int kPixels = 64;   // of a tile
constexpr int kChannels = kStep;
constexpr int kVector = 8;     // channels that a thread quantizes at once
constexpr int64_t kSharedBytes = 96 << 10;  // of a block, at most: two share a processor

// The code of v, which is folded so that it lies between 0 and the largest code: rounded up by an
// addition, whose last bits then hold it. Not-a-number becomes 0.
BORDER_INLINE uint32_t CodeBits(float v, float top) {
  v = v > 0.0f ? v : 0.0f;
  v = v < top ? v : top;
#ifdef __CUDA_ARCH__
  return __float_as_uint(__fadd_ru(v, 8388608.0f));
#else
  return static_cast<uint32_t>(ceilf(v));
#endif
}

BORDER_INLINE float Fma(float a, float b, float c) { return fmaf(a, b, c); }

// The lowest bytes of four words.
BORDER_INLINE uint32_t Pack(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __CUDA_ARCH__
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
#else
  return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24;
#endif
}

BORDER_INLINE uint16_t ToBfloat16(float value) {
  uint32_t bits;
#ifdef __CUDA_ARCH__
  bits = __float_as_uint(value);
#else
  std::memcpy(&bits, &value, sizeof bits);
#endif
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The operands of a call; the shared memory holds `stage_chunks` groups of 32 channels.
struct TunedConvolution {
  GeometryOf<int32_t> g;
  int64_t pixels;  // of all images
  int32_t outer;   // channels of the result
  uint32_t shift;  // 0x80 in every byte with codes of 8 bits
  bool relu;
  float top_code;
  const uint16_t* x;
  const int8_t* weights;           // [chunks, taps, outer, 32]
  const float *inv_step, *folded;  // 1; [3, taps, channels]
  const float *scale, *offset;     // [outer]
  const uint16_t* residual;        // null for none
  uint16_t* y;
  int32_t stage_chunks;
};

template <int outputs, int degree, bool shared_border>
struct ConvTile : TunedConvolution {
  using Code = int8_t;
  static constexpr int kThreads = 256, kBlocks = 2, kBuffers = 1, kOutputs = outputs;
  static constexpr int kAcross = outputs / 32, kDown = 2;  // of a warp, four warps across

  struct State {
    FragmentA a[kDown];
    FragmentB b[kAcross];
    Sums sums[kDown][kAcross];
    const uint16_t* image;     // of the pixel that the thread quantizes; null for none
    int32_t top, left, first;  // of its first tap; the tile's first channel of the result
  };

  explicit ConvTile(const TunedConvolution& c) : TunedConvolution(c) {}

  BORDER_INLINE int Chunks() const { return g.channels / kChannels; }
  BORDER_INLINE int Stages() const { return (Chunks() + stage_chunks - 1) / stage_chunks; }
  BORDER_INLINE int Steps(int stage) const {
    const int left_over = Chunks() - stage * stage_chunks;
    return (left_over < stage_chunks ? left_over : stage_chunks) * g.Taps();
  }
  BORDER_INLINE int BufferBytes() const { return 0; }  // there is no second
  // The weights lie after the codes of all steps of a full stage.
  BORDER_INLINE int Codes(int step) const { return step * kPixels * kChannels; }
  BORDER_INLINE int Weights(int step) const {
    return Codes(stage_chunks * g.Taps()) + step * kOutputs * kChannels;
  }

  BORDER_INLINE void Start(int64_t row, int64_t column, int thread, State& s) const {
    s.first = static_cast<int32_t>(column) * kOutputs;
    UNROLL for (auto& down : s.sums)
      UNROLL for (auto& sums : down)
        UNROLL for (int32_t& sum : sums) sum = 0;
    const int64_t pixel = row * kPixels + thread / 4;
    const int32_t place = static_cast<int32_t>(pixel % g.Pixels());
    s.image = pixel < pixels ? x + pixel / g.Pixels() * g.Image() : nullptr;
    s.top = place / g.Out(1) * g.stride[0] - g.low[0];
    s.left = place % g.Out(1) * g.stride[1] - g.low[1];
  }

  using Values = Vector<float, kVector>;

  BORDER_INLINE Values Activations(const State& s, int32_t i, int32_t j, int32_t channel) const {
    Values values{};
    const int32_t row = s.top + i * g.dilation[0], column = s.left + j * g.dilation[1];
    if (row < 0 || row >= g.height || column < 0 || column >= g.width) return values;
    const int32_t at = (row * g.width + column) * g.channels + channel;
    const auto loaded = Vector<uint16_t, kVector>::Load(s.image + at);
    UNROLL for (int k = 0; k < kVector; ++k) values.values[k] = ToFloat(loaded.values[k]);
    return values;
  }

  BORDER_INLINE Values Folded(int power, int32_t tap, int32_t channel) const {
    return Values::Load(folded + (power * g.Taps() + tap) * g.channels + channel);
  }

  // (c2 v + c1) v + c0.
  BORDER_INLINE Values Polynomial(const Values& v, int32_t tap, int32_t channel,
                                  const Values& c0) const {
    Values slope = Folded(1, tap, channel), result;
    if constexpr (degree == 2) {
      const Values c2 = Folded(2, tap, channel);
      UNROLL for (int k = 0; k < kVector; ++k)
        slope.values[k] = Fma(c2.values[k], v.values[k], slope.values[k]);
    }
    UNROLL for (int k = 0; k < kVector; ++k)
      result.values[k] = Fma(slope.values[k], v.values[k], c0.values[k]);
    return result;
  }

  // The common part of the codes of a pixel's channels: the border that their taps share.
  BORDER_INLINE Values Common(const State& s, int32_t channel) const {
    Values sum = Folded(0, 0, channel);
    for (int32_t i = 0, tap = 0; i < g.kernel[0]; ++i)
      for (int32_t j = 0; j < g.kernel[1]; ++j, ++tap)
        sum = Polynomial(Activations(s, i, j, channel), tap, channel, sum);
    return sum;
  }

  // One tap's channels before they are rounded up.
  BORDER_INLINE Values Scaled(const State& s, int32_t i, int32_t j, int32_t tap, int32_t channel,
                              const Values& common) const {
    Values v = Activations(s, i, j, channel);
    if constexpr (shared_border) {
      const float inverse = *inv_step;
      UNROLL for (int k = 0; k < kVector; ++k)
        v.values[k] = Fma(inverse, v.values[k], common.values[k]);
      return v;
    } else {
      return Polynomial(v, tap, channel, Folded(0, tap, channel));
    }
  }

  BORDER_INLINE void FillCodes(int stage, int thread, const State& s, int8_t* shared) const {
    const int pixel = thread / 4, byte = thread % 4 * kVector, taps = g.Taps();
    for (int chunk = 0; chunk * taps < Steps(stage); ++chunk) {
      const int32_t channel = (stage * stage_chunks + chunk) * kChannels + byte;
      Values common{};
      if (shared_border && s.image != nullptr) common = Common(s, channel);
      for (int32_t i = 0, tap = 0; i < g.kernel[0]; ++i)
        for (int32_t j = 0; j < g.kernel[1]; ++j, ++tap) {
          Vector<uint32_t, 2> codes{};
          if (s.image != nullptr) {
            const Values v = Scaled(s, i, j, tap, channel, common);
            UNROLL for (int half = 0; half < 2; ++half) {
              uint32_t bits[4];
              UNROLL for (int k = 0; k < 4; ++k)
                bits[k] = CodeBits(v.values[half * 4 + k], top_code);
              codes.values[half] = Pack(bits[0], bits[1], bits[2], bits[3]) ^ shift;
            }
          }
          int8_t* to = shared + Codes(chunk * taps + tap) + Swizzle(pixel, byte);
          codes.Store(reinterpret_cast<uint32_t*>(to));
        }
    }
  }

  BORDER_INLINE void Fill(int stage, int thread, const State& s, int8_t* shared) const {
    FillCodes(stage, thread, s, shared);
    constexpr int kHalf = kChannels / 2, kVectors = kOutputs * 2;  // of a step, 16 bytes each
    const int64_t first = static_cast<int64_t>(stage) * stage_chunks * g.Taps();
    for (int i = thread; i < Steps(stage) * kVectors; i += kThreads) {
      const int step = i / kVectors, row = i % kVectors / 2, byte = i % 2 * kHalf;
      const int8_t* from = weights + ((first + step) * outer + s.first + row) * kChannels + byte;
      Vector<int8_t, kHalf>::Load(from).Store(shared + Weights(step) + Swizzle(row, byte));
    }
  }

  // The rows of a warp's fragments: two warps of 32 pixels down, four across.
  BORDER_INLINE int Pixel(int thread, int m) const {
    return thread / kWarp / 4 * 32 + m * 16 + Row(thread);
  }
  BORDER_INLINE int Output(int thread, int n) const {
    return thread / kWarp % 4 * (kOutputs / 4) + n * 8;
  }

  BORDER_INLINE void Load(int step, int thread, State& s, const int8_t* shared) const {
    const auto word = [&](int base, int row, int byte) {
      uint32_t value;
      std::memcpy(&value, shared + base + Swizzle(row, byte), sizeof value);
      return value;
    };
    const int byte = 4 * Part(thread);
    UNROLL for (int m = 0; m < kDown; ++m)
      UNROLL for (int i = 0; i < 4; ++i)
        s.a[m][i] = word(Codes(step), Pixel(thread, m) + i % 2 * 8, byte + i / 2 * 16);
    UNROLL for (int n = 0; n < kAcross; ++n)
      UNROLL for (int i = 0; i < 2; ++i)
        s.b[n][i] = word(Weights(step), Output(thread, n) + Row(thread), byte + i * 16);
  }

  // A sum becomes scale * sum + offset, and with the residual and the ReLU the result.
  BORDER_INLINE float Result(int32_t sum, int64_t at, int32_t channel) const {
    float value = Fma(scale[channel], static_cast<float>(sum), offset[channel]);
    if (residual != nullptr) value = Add(value, ToFloat(residual[at]));
    return relu && value < 0.0f ? 0.0f : value;
  }

  BORDER_INLINE void Finish(int64_t row, int64_t, int thread, const State& s) const {
    UNROLL for (int m = 0; m < kDown; ++m)
      UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t pixel = row * kPixels + Pixel(thread, m) + half * 8;
        if (pixel >= pixels) continue;
        UNROLL for (int n = 0; n < kAcross; ++n) {
          const int32_t channel = s.first + Output(thread, n) + 2 * Part(thread);
          const int64_t at = pixel * outer + channel;
          Vector<uint16_t, 2> pair;
          UNROLL for (int k = 0; k < 2; ++k)
            pair.values[k] = ToBfloat16(Result(s.sums[m][n][2 * half + k], at + k, channel + k));
          pair.Store(y + at);
        }
      }
  }
};

int64_t StageBytes(int64_t steps, int64_t outputs) {
  return steps * (kPixels + outputs) * kChannels;
}

// As many groups of 32 channels a stage as fit; 0 where not even one does.
int64_t StageChunks(const Device& device, const TunedConvolution& c, int64_t outputs) {
  const int64_t bytes = std::min<int64_t>(device.SharedBytes(), kSharedBytes);
  const int64_t fit = bytes / StageBytes(c.g.Taps(), outputs);
  return std::min<int64_t>(fit, c.g.channels / kChannels);
}

template <int outputs>
ffi::Error Run(Device& device, const TunedConvolution& c, int64_t degree, bool shared_border) {
  const auto run = [&](const auto& tile) {
    return LaunchTiles(device, (c.pixels + kPixels - 1) / kPixels, c.outer / outputs,
                       StageBytes(c.g.Taps() * c.stage_chunks, outputs), tile);
  };
  if (shared_border)
    return degree == 1 ? run(ConvTile<outputs, 1, true>(c)) : run(ConvTile<outputs, 2, true>(c));
  return degree == 1 ? run(ConvTile<outputs, 1, false>(c)) : run(ConvTile<outputs, 2, false>(c));
}

// Wide tiles quantize an activation less often, narrow ones fill the GPU.
ffi::Error Choose(Device& device, TunedConvolution c, int64_t degree, bool shared_border) {
  const int64_t down = (c.pixels + kPixels - 1) / kPixels, wanted = device.Processors();
  for (int64_t outputs : {256, 128, 64}) {
    c.stage_chunks = static_cast<int32_t>(StageChunks(device, c, outputs));
    const bool enough = outputs == 64 || down * (c.outer / outputs) >= wanted;
    if (c.outer % outputs != 0 || c.stage_chunks == 0 || !enough) continue;
    return outputs == 256   ? Run<256>(device, c, degree, shared_border)
           : outputs == 128 ? Run<128>(device, c, degree, shared_border)
                            : Run<64>(device, c, degree, shared_border);
  }
  return Bad("a window of " + std::to_string(c.g.Taps()) + " taps is too large for the tuned path");
}

bool Is(const ffi::AnyBuffer& buffer, ffi::DataType type, int64_t count) {
  return buffer.element_type() == type && static_cast<int64_t>(buffer.element_count()) == count;
}

ffi::Error ConvTuned(Device device, ffi::AnyBuffer x, ffi::AnyBuffer weights, Floats inv_step,
                     Floats folded, Floats scale, Floats offset, ffi::AnyBuffer residual,
                     ffi::Result<ffi::AnyBuffer> y, TunedAttributes a) {
  Geometry g{};
  const WindowAttributes window{a.kernel, a.stride, a.dilation, a.padding, 1};
  if (ffi::Error error = ReadWindow(x.dimensions(), window, g); error.failure()) return error;
  g.row = g.Column();
  if (ffi::Error error = CheckColumns(g); error.failure()) return error;
  const int64_t outer = scale.element_count(), count = g.images * g.Pixels() * outer;
  if (g.channels % kChannels != 0 || outer % 64 != 0 || outer == 0 || g.channels == 0)
    return Bad("the tuned path takes multiples of 32 channels to multiples of 64, not " +
               std::to_string(g.channels) + " to " + std::to_string(outer));
  if (a.bits < 2 || a.bits > 8 || a.degree < 1 || a.degree > 2)
    return Bad("bits or degree is out of range");
  const int64_t images = g.images * g.Image(), coefficients = 3 * g.Column();
  const bool fits = Is(x, ffi::BF16, images) && Is(weights, ffi::S8, g.Column() * outer) &&
                    inv_step.element_count() == 1 &&
                    static_cast<int64_t>(folded.element_count()) == coefficients &&
                    static_cast<int64_t>(offset.element_count()) == outer &&
                    Is(*y, ffi::BF16, count);
  const bool added = residual.element_count() != 0;
  if (!fits || (added && !Is(residual, ffi::BF16, count)))
    return Bad("an operand of the tuned path has another dtype or size than the window gives");
  const TunedConvolution c{
      g.As<int32_t>(), g.images * g.Pixels(), static_cast<int32_t>(outer),
      a.bits == 8 ? 0x80808080u : 0u, a.relu, static_cast<float>((1 << a.bits) - 1),
      static_cast<const uint16_t*>(x.untyped_data()),
      static_cast<const int8_t*>(weights.untyped_data()), inv_step.typed_data(),
      folded.typed_data(), scale.typed_data(), offset.typed_data(),
      added ? static_cast<const uint16_t*>(residual.untyped_data()) : nullptr,
      static_cast<uint16_t*>(y->untyped_data()), 0};
  return Choose(device, c, a.degree, a.shared_across_taps);
}

}  // namespace
}  // namespace gpu_ops

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    ::gpu_ops::TunedAttributes, StructMember<::gpu_ops::Sizes>("kernel"),
    StructMember<::gpu_ops::Sizes>("stride"), StructMember<::gpu_ops::Sizes>("dilation"),
    StructMember<::gpu_ops::Sizes>("padding"), StructMember<int64_t>("bits"),
    StructMember<int64_t>("degree"), StructMember<bool>("shared_across_taps"),
    StructMember<bool>("relu"));

namespace gpu_ops {

GPU_OPS_HANDLER(ConvTunedHandler, ConvTuned,
                ffi::Ffi::Bind()
                    .Ctx<Device>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<ffi::AnyBuffer>()
                    .Arg<Floats>()
                    .Arg<Floats>()
                    .Arg<Floats>()
                    .Arg<Floats>()
                    .Arg<ffi::AnyBuffer>()
                    .Ret<ffi::AnyBuffer>()
                    .Attrs<TunedAttributes>())

}  // namespace gpu_ops
