// A deployed convolution on CUDA, from values or codes to values and codes, without columns.
//
// An activation is quantized once, where it is not codes already. A thread block gathers slices of
// the columns of its pixels from the codes into shared memory, two slices ahead of the one that it
// multiplies, and makes results of the sums. Whatever is no element of an image has the code of the
// zero point and counts for nothing: the padding of the window and, with weights of zero, what fills
// up channels to words and columns to steps. Weights are packed at every call. Grouped convolutions
// have a thread an output, or four.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

#include "convolution.h"
#include "device.h"
#include "tiles.h"

namespace gpu_ops {
namespace {

constexpr int kWord = 4;             // codes
constexpr int64_t kMostTensors = 8;  // of codes that result
constexpr int32_t kByte = 128;       // weights of 8 bits are multiplied less this

int64_t DivideUp(int64_t count, int64_t size) { return (count + size - 1) / size; }
int64_t RoundUp(int64_t count, int64_t size) { return DivideUp(count, size) * size; }

BORDER_INLINE uint8_t ZeroCode(const float* zero) {
  return static_cast<uint8_t>(static_cast<int32_t>(*zero));
}

// An activation and how it is quantized; codes stay what they are.
struct Activation {
  Border border;
  const float *step, *zero;
  int64_t bits;
  const void* x;
  int32_t pixels, channels, words;  // of an image, of a pixel, and of its codes
  uint8_t* codes;
};

// One thread: the codes of four channels of a pixel. Channels that there are not have that of zero.
template <typename In>
struct QuantizeWord : Activation {
  explicit QuantizeWord(const Activation& a) : Activation(a) {}

  template <typename T>
  BORDER_INLINE Vector<T, kWord> Channels(const T* pixel, int32_t first) const {
    if (channels % kWord == 0) return Vector<T, kWord>::Load(pixel + first);
    Vector<T, kWord> some{};
    UNROLL for (int k = 0; k < kWord; ++k)
      if (first + k < channels) some.values[k] = pixel[first + k];
    return some;
  }

  BORDER_INLINE void operator()(int64_t image, int32_t index) const {
    const int64_t pixel = image * pixels + index / words;
    const int32_t first = index % words * kWord;
    const auto values = Channels(static_cast<const In*>(x) + pixel * channels, first);
    Vector<uint8_t, kWord> word;
    if constexpr (std::is_same_v<In, uint8_t>) {
      word = values;
    } else {
      const Grid grid = DeviceGrid(step, zero, bits);
      Vector<float, kWord> b[3] = {};
      UNROLL for (int power = 0; power < 3; ++power)
        if (power <= border.degree)
          b[power] = Channels(border.coefficients + power * channels, first);
      UNROLL for (int k = 0; k < kWord; ++k) {
        const float own[3] = {b[0].values[k], b[1].values[k], b[2].values[k]};
        const float u = ToUnits(ToFloat(values.values[k]), grid.inv_step);
        const float p = Polynomial(border.degree, own, 1, u);
        Store(grid, 0.0f, Code(u, border.degree < 0 ? p : ApplyPhi(border.phi, p), grid),
              &word.values[k]);
      }
    }
    UNROLL for (int k = 0; k < kWord; ++k)
      if (first + k >= channels) word.values[k] = ZeroCode(zero);
    word.Store(codes + (pixel * words + index % words) * kWord);
  }
};

// What becomes of the sums; absent operands are null.
struct SumResults {
  int32_t outputs, tensors;
  const float *scale, *bias, *residual, *residual_grid;
  const uint8_t* residual_codes;
  float low, high;
  float* values;
  CodeTensor codes[kMostTensors];

  // The results of `size` outputs of a pixel, which `size` divides the number of; as on the CPU,
  // operation by operation.
  template <int size>
  BORDER_INLINE void Finish(int64_t pixel, int32_t first, const int32_t* sums) const {
    using Values = Vector<float, size>;
    const int64_t at = pixel * outputs + first;
    const Values scales = Values::Load(scale + first);
    Values y;
    UNROLL for (int k = 0; k < size; ++k) {
      const float product = Mul(static_cast<float>(sums[k]), scales.values[k]);
      constexpr float kLowest = std::numeric_limits<float>::lowest();
      y.values[k] = product < kLowest ? kLowest : product;
    }
    const auto add = [&](const Values& more) {
      UNROLL for (int k = 0; k < size; ++k) y.values[k] = Add(y.values[k], more.values[k]);
    };
    if (bias != nullptr) add(Values::Load(bias + first));
    if (residual != nullptr) add(Values::Load(residual + at));
    if (residual_codes != nullptr) {
      const Grid grid = DeviceGrid(residual_grid, residual_grid + 1, 8);
      const auto added = Vector<uint8_t, size>::Load(residual_codes + at);
      Values real;
      UNROLL for (int k = 0; k < size; ++k)
        real.values[k] = Dequantize(static_cast<float>(added.values[k]), grid);
      add(real);
    }
    UNROLL for (int k = 0; k < size; ++k) y.values[k] = Clip(y.values[k], low, high);
    if (values != nullptr) y.Store(values + at);
    for (int32_t t = 0; t < tensors; ++t) Requantize(codes[t], y, at, first);
  }

  template <int size>
  BORDER_INLINE void Requantize(const CodeTensor& tensor, const Vector<float, size>& y, int64_t at,
                                int32_t first) const {
    const Grid grid = DeviceGrid(tensor.grid, tensor.grid + 1, tensor.bits);
    Vector<float, size> b[3];
    UNROLL for (int power = 0; power < 3; ++power)
      b[power] = Vector<float, size>::Load(tensor.coefficients + power * outputs + first);
    Vector<uint8_t, size> result;
    UNROLL for (int k = 0; k < size; ++k) {
      const float own[3] = {b[0].values[k], b[1].values[k], b[2].values[k]};
      const float u = ToUnits(y.values[k], grid.inv_step);
      const float border = ApplyPhi(tensor.phi, Polynomial(2, own, 1, u));
      Store(grid, 0.0f, Code(u, border, grid), &result.values[k]);
    }
    result.Store(tensor.codes + at);
  }
};

// A convolution of codes. The channels of the geometry are those of the weights.
struct CodeConvolution {
  GeometryOf<int32_t> g;
  int32_t stride;  // from a pixel's codes to the next one's
  const uint8_t *codes, *weights;
  int64_t weight_bits;
  const float *zero, *weight_zero;
  SumResults results;

  BORDER_INLINE int64_t Pixels() const { return g.images * g.Pixels(); }
  BORDER_INLINE const uint8_t* Image(int64_t pixel) const {
    return codes + pixel / g.Pixels() * g.height * g.width * stride;
  }
  // Where the window of a pixel begins.
  BORDER_INLINE int32_t Top(int64_t pixel) const {
    return static_cast<int32_t>(pixel % g.Pixels()) / g.Out(1) * g.stride[0] - g.low[0];
  }
  BORDER_INLINE int32_t Left(int64_t pixel) const {
    return static_cast<int32_t>(pixel % g.Pixels()) % g.Out(1) * g.stride[1] - g.low[1];
  }
  // Which code of an image a tap reads first; negative where it is in the padding.
  BORDER_INLINE int64_t At(int32_t top, int32_t left, int32_t tap) const {
    const int32_t i = tap / g.kernel[1], j = tap - i * g.kernel[1];
    const int32_t row = top + i * g.dilation[0], column = left + j * g.dilation[1];
    const bool inside = row >= 0 && row < g.height && column >= 0 && column < g.width;
    return inside ? static_cast<int64_t>(row * g.width + column) * stride : -1;
  }
};

// Which output a packed row of weights has: those that one thread has sums of follow each other.
// `across` products make up the outputs of a warp.
BORDER_INLINE int32_t OutputOf(int32_t row, int across) {
  const int32_t own = row % (8 * across), column = own % 8;
  return row - own + column / 2 * (2 * across) + own / 8 * 2 + column % 2;
}

// One thread: the weights of a step and an output, as they are multiplied, and their sum.
struct PackWeights : CodeConvolution {
  int across;
  int8_t* packed;   // [steps, width, 32]
  int32_t width;    // outputs, filled up
  int32_t* totals;  // [width]

  BORDER_INLINE void operator()(int64_t step, int32_t row) const {
    const int32_t o = OutputOf(row, across);
    Vector<int8_t, kStep> result{};
    if (o < results.outputs) {
      const int32_t less = weight_bits == 8 ? kByte : static_cast<int32_t>(weight_zero[o]);
      int32_t total = 0;
      UNROLL for (int k = 0; k < kStep; ++k) {
        const int32_t element = static_cast<int32_t>(step) * kStep + k;
        const int32_t tap = element / stride, c = element % stride;
        if (tap >= g.Taps() || c >= g.channels) continue;
        const int64_t from = (static_cast<int64_t>(tap) * g.channels + c) * results.outputs + o;
        const int32_t weight = weights[from] - less;
        result.values[k] = static_cast<int8_t>(weight);
        total += weight;
      }
      AddTo(totals + o, total);
    }
    result.Store(packed + (step * width + row) * kStep);
  }
};

// The operands of a product without columns.
struct ImplicitProduct : CodeConvolution {
  int32_t steps, width;
  const int8_t* packed;
  const int32_t* totals;
};

// A block: `pixels` by `outputs`, two warps down and four across. With weights of 8 bits, one more
// product, with ones, sums the codes.
template <int pixels, int outputs, bool sums_codes>
struct ProductTile : ImplicitProduct {
  using Code = uint8_t;
  static constexpr int kThreads = 256, kBuffers = 3;
  static constexpr int kBlocks = pixels * outputs < 128 * 128 ? 2 : 1;  // by their registers
  static constexpr int kSlice = 2;  // steps
  static constexpr int kDown = pixels / 32, kWeights = outputs / 32;
  static constexpr int kAcross = kWeights + (sums_codes ? 1 : 0);
  static constexpr int kOwn = 2 * kWeights;  // outputs of a thread

  struct State {
    FragmentA a[kDown];
    FragmentB b[kAcross];
    Sums sums[kDown][kAcross];
    const uint8_t* image;  // of the pixel that the thread gathers; null for none
    int32_t top, left;
    int32_t first;     // output of the tile
    uint32_t padding;  // four codes
  };

  explicit ProductTile(const ImplicitProduct& p) : ImplicitProduct(p) {}

  BORDER_INLINE int Stages() const { return (steps + kSlice - 1) / kSlice; }
  BORDER_INLINE int Steps(int stage) const {
    const int left_over = steps - stage * kSlice;
    return left_over < kSlice ? left_over : kSlice;
  }
  static constexpr int kCodesBytes = kSlice * pixels * kStep;
  static constexpr int kBytes = kCodesBytes + kSlice * outputs * kStep;
  BORDER_INLINE int BufferBytes() const { return kBytes; }

  BORDER_INLINE void Start(int64_t row, int64_t column, int thread, State& s) const {
    s.first = static_cast<int32_t>(column) * outputs;
    s.padding = 0x01010101u * ZeroCode(zero);
    UNROLL for (auto& down : s.sums)
      UNROLL for (auto& sums : down)
        UNROLL for (int32_t& sum : sums) sum = 0;
    const int64_t pixel = row * pixels + thread / 2 % pixels;
    s.image = pixel < Pixels() ? Image(pixel) : nullptr;
    s.top = Top(pixel);
    s.left = Left(pixel);
  }

  // Elements of the pixel's column from `element` on, of one tap.
  template <int bytes>
  BORDER_INLINE void Gather(const State& s, int32_t element, int8_t* to) const {
    const int32_t tap = element / stride, channel = element - tap * stride;
    const int64_t at = s.image == nullptr || tap >= g.Taps() ? -1 : At(s.top, s.left, tap);
    if (at >= 0) return CopyAsync<bytes>(to, s.image + at + channel);
    Vector<uint32_t, bytes / kWord> padded;
    UNROLL for (uint32_t& word : padded.values) word = s.padding;
    padded.Store(reinterpret_cast<uint32_t*>(to));
  }

  BORDER_INLINE void Fill(int stage, int thread, const State& s, int8_t* shared) const {
    constexpr int kHalf = kStep / 2;  // of a row of 32 bytes
    const int byte = thread % 2 * kHalf, pixel = thread / 2 % pixels;
    for (int step = thread / 2 / pixels; step < Steps(stage); step += kThreads / 2 / pixels) {
      int8_t* to = shared + step * pixels * kStep + Swizzle(pixel, byte);
      const int32_t element = (stage * kSlice + step) * kStep + byte;
      if (stride % kHalf == 0) {
        Gather<kHalf>(s, element, to);
      } else {
        UNROLL for (int k = 0; k < kHalf; k += kWord) Gather<kWord>(s, element + k, to + k);
      }
    }
    for (int i = thread / 2; i < Steps(stage) * outputs; i += kThreads / 2) {
      const int step = i / outputs, row = i % outputs;
      const int64_t from = static_cast<int64_t>(stage * kSlice + step) * width + s.first + row;
      CopyAsync<kHalf>(shared + kCodesBytes + step * outputs * kStep + Swizzle(row, byte),
                       packed + from * kStep + byte);
    }
  }

  // The rows of a warp's fragments.
  BORDER_INLINE int Pixel(int thread, int m) const {
    return thread / kWarp / 4 * (pixels / 2) + m * 16 + Row(thread);
  }
  BORDER_INLINE int WarpOutput(int thread) const { return thread / kWarp % 4 * (outputs / 4); }

  BORDER_INLINE void Load(int step, int thread, State& s, const int8_t* shared) const {
    const auto word = [&](int base, int row, int byte) {
      uint32_t value;
      std::memcpy(&value, shared + base + Swizzle(row, byte), sizeof value);
      return value;
    };
    const int byte = 4 * Part(thread), codes_at = step * pixels * kStep;
    const int weights_at = kCodesBytes + step * outputs * kStep;
    UNROLL for (int m = 0; m < kDown; ++m)
      UNROLL for (int i = 0; i < 4; ++i)
        s.a[m][i] = word(codes_at, Pixel(thread, m) + i % 2 * 8, byte + i / 2 * 16);
    UNROLL for (int n = 0; n < kWeights; ++n)
      UNROLL for (int i = 0; i < 2; ++i)
        s.b[n][i] = word(weights_at, WarpOutput(thread) + n * 8 + Row(thread), byte + i * 16);
    if constexpr (sums_codes)
      UNROLL for (uint32_t& ones : s.b[kWeights]) ones = 0x01010101u;
  }

  // sum (q - z) (w - z_w) is sum q w' + constant + factor * sum q, modulo 2^32.
  BORDER_INLINE void Finish(int64_t row, int64_t, int thread, const State& s) const {
    const int32_t first = s.first + WarpOutput(thread) + Part(thread) * kOwn;
    uint32_t constant[kOwn] = {}, factor[kOwn] = {};
    const uint32_t z = ZeroCode(zero), elements = steps * kStep;
    UNROLL for (int k = 0; k < kOwn; ++k)
      if (first + k < results.outputs) {
        if constexpr (sums_codes) factor[k] = kByte - static_cast<int32_t>(weight_zero[first + k]);
        constant[k] = -z * (static_cast<uint32_t>(totals[first + k]) + factor[k] * elements);
      }
    UNROLL for (int m = 0; m < kDown; ++m)
      UNROLL for (int half = 0; half < 2; ++half) {
        const int64_t pixel = row * pixels + Pixel(thread, m) + half * 8;
        if (pixel >= Pixels()) continue;
        int32_t sums[kOwn];
        UNROLL for (int k = 0; k < kOwn; ++k) {
          uint32_t sum = s.sums[m][k / 2][2 * half + k % 2] + constant[k];
          if constexpr (sums_codes)
            sum += factor[k] * static_cast<uint32_t>(s.sums[m][kWeights][2 * half]);
          sums[k] = static_cast<int32_t>(sum);
        }
        FinishOwn(pixel, first, sums);
      }
  }

  BORDER_INLINE void FinishOwn(int64_t pixel, int32_t first, const int32_t (&sums)[kOwn]) const {
    if (results.outputs % kOwn == 0) {
      if (first < results.outputs) results.template Finish<kOwn>(pixel, first, sums);
    } else {  // one by one; selected, as registers have no addresses, in code that is short
      NO_UNROLL for (int k = 0; k < kOwn && first + k < results.outputs; ++k) {
        int32_t sum = sums[0];
        UNROLL for (int i = 1; i < kOwn; ++i) sum = i == k ? sums[i] : sum;
        results.template Finish<1>(pixel, first + k, &sum);
      }
    }
  }
};

// One thread: `size` outputs of a pixel, one by one but for depthwise convolutions.
template <int size>
struct GroupedOutputs : CodeConvolution {
  explicit GroupedOutputs(const CodeConvolution& c) : CodeConvolution(c) {}

  BORDER_INLINE void operator()(int64_t image_number, int32_t index) const {
    const int32_t outputs = results.outputs, inner = g.Inner();
    const int64_t pixel = image_number * g.Pixels() + index / (outputs / size);
    const int32_t first = index % (outputs / size) * size;
    const int32_t channel = first / (outputs / g.groups) * inner;
    const int32_t top = Top(pixel), left = Left(pixel), z = ZeroCode(zero);
    int32_t zeros[size], sums[size] = {};
    UNROLL for (int k = 0; k < size; ++k) zeros[k] = static_cast<int32_t>(weight_zero[first + k]);
    const uint8_t* image = Image(pixel);
    for (int32_t tap = 0; tap < g.Taps(); ++tap) {
      const int64_t at = At(top, left, tap);
      if (at < 0) continue;
      for (int32_t c = 0; c < inner; ++c) {
        const int64_t from = (static_cast<int64_t>(tap) * inner + c) * outputs + first;
        const auto q = Vector<uint8_t, size>::Load(image + at + channel + c);
        const auto w = Vector<uint8_t, size>::Load(weights + from);
        UNROLL for (int k = 0; k < size; ++k)
          sums[k] += (q.values[k] - z) * (w.values[k] - zeros[k]);
      }
    }
    results.template Finish<size>(pixel, first, sums);
  }
};

ffi::Error OutOfCodeScratch() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "gpu_ops: out of memory for the scratch of ConvInt8Handler");
}

// Packs the weights for tiles of `pixels` times `outputs`, and multiplies.
template <int pixels, int outputs>
ffi::Error MultiplyTiles(Device& device, const CodeConvolution& c) {
  const int64_t steps = DivideUp(static_cast<int64_t>(c.g.Taps()) * c.stride, kStep);
  const int64_t width = RoundUp(c.results.outputs, outputs);
  int8_t* packed = device.Allocate<int8_t>(steps * width * kStep);
  int32_t* totals = device.Zeros<int32_t>(width);
  if (!packed || !totals) return OutOfCodeScratch();
  const PackWeights pack{c, outputs / 32, packed, static_cast<int32_t>(width), totals};
  if (ffi::Error error = device.Launch(steps, width, pack); error.failure()) return error;
  const ImplicitProduct product{c, static_cast<int32_t>(steps), static_cast<int32_t>(width),
                                packed, totals};
  const auto run = [&](const auto& tile) {
    return LaunchTiles(device, DivideUp(c.Pixels(), pixels), width / outputs,
                       tile.kBuffers * tile.kBytes, tile);
  };
  if (c.weight_bits == 8) return run(ProductTile<pixels, outputs, true>(product));
  return run(ProductTile<pixels, outputs, false>(product));
}

// Large tiles read codes and weights less often, small ones fill the GPU.
ffi::Error MultiplyCodes(Device& device, const CodeConvolution& c) {
  const int64_t outputs = c.results.outputs, wanted = device.Processors();
  const auto fill = [&](int64_t down, int64_t across) {
    return outputs > across / 2 &&
           DivideUp(c.Pixels(), down) * DivideUp(outputs, across) >= wanted;
  };
  if (fill(128, 128)) return MultiplyTiles<128, 128>(device, c);
  if (fill(128, 64)) return MultiplyTiles<128, 64>(device, c);
  if (fill(64, 64)) return MultiplyTiles<64, 64>(device, c);
  return MultiplyTiles<64, 32>(device, c);
}

ffi::Error MultiplyGroups(Device& device, const CodeConvolution& c) {
  const auto run = [&](const auto& body, int64_t size) {
    const int64_t vectors = c.results.outputs / size;
    if (ffi::Error error = CheckIndices(static_cast<double>(vectors) * c.g.Pixels());
        error.failure())
      return error;
    return device.Launch(c.g.images, vectors * c.g.Pixels(), body);
  };
  const bool depthwise = c.g.Inner() == 1 && c.g.groups == c.results.outputs;
  if (depthwise && c.results.outputs % kWord == 0 && c.stride % kWord == 0)
    return run(GroupedOutputs<kWord>(c), kWord);
  return run(GroupedOutputs<1>(c), 1);
}

// Makes codes of an activation, of `words` words a pixel.
ffi::Error QuantizeImages(Device& device, const Geometry& g, ffi::DataType from,
                          const Activation& a) {
  const auto run = [&](const auto& body) {
    return device.Launch(g.images, g.height * g.width * a.words, body);
  };
  if (from == ffi::F32) return run(QuantizeWord<float>(a));
  if (from == ffi::BF16) return run(QuantizeWord<uint16_t>(a));
  return run(QuantizeWord<uint8_t>(a));
}

ffi::Error ConvInt8(Device device, const ConvolutionOperands& o, ffi::RemainingRets rets,
                    const ConvolutionAttributes& a) {
  auto read = ReadConvolution(o, rets, a);
  if (read.has_error()) return read.error();
  const int64_t tensors = static_cast<int64_t>(read->codes.size());
  if (read->per_element || read->Pooled() || tensors > kMostTensors)
    return Bad("on a GPU, conv_int8 has no borders of column elements, no maximum and at most " +
               std::to_string(kMostTensors) + " results of codes");
  const Geometry& g = read->geometry;
  if (ffi::Error error = CheckIndices(static_cast<double>(RoundUp(read->outputs, 128)));
      error.failure())
    return error;
  SumResults results{static_cast<int32_t>(read->outputs), static_cast<int32_t>(tensors),
                     o.scale.typed_data(), read->bias, read->residual,
                     o.residual_grid.typed_data(), read->residual_codes, a.low, a.high,
                     read->values, {}};
  std::copy(read->codes.begin(), read->codes.end(), results.codes);
  const bool coded = o.x.element_type() == ffi::U8;
  const int64_t words = DivideUp(g.channels, kWord);
  CodeConvolution c{g.As<int32_t>(), static_cast<int32_t>(g.channels),
                    static_cast<const uint8_t*>(o.x.untyped_data()), o.weights.typed_data(),
                    a.weight_bits, o.zero.typed_data(), o.weight_zero.typed_data(), results};
  if (!coded || (g.groups == 1 && g.channels % kWord != 0)) {
    uint8_t* codes = device.Allocate<uint8_t>(g.images * g.height * g.width * words * kWord);
    if (codes == nullptr) return OutOfCodeScratch();
    const Activation activation{read->border, o.step.typed_data(), o.zero.typed_data(), a.bits,
                                o.x.untyped_data(), static_cast<int32_t>(g.height * g.width),
                                c.stride, static_cast<int32_t>(words), codes};
    if (ffi::Error error = QuantizeImages(device, g, o.x.element_type(), activation);
        error.failure())
      return error;
    c.codes = codes;
    c.stride = static_cast<int32_t>(words * kWord);
  }
  return g.groups == 1 ? MultiplyCodes(device, c) : MultiplyGroups(device, c);
}

}  // namespace

GPU_OPS_HANDLER(ConvInt8Handler, (ConvolutionHandler<Device, ConvInt8>),
                ConvolutionBinding<Device>())

}  // namespace gpu_ops
