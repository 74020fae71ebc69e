// The task of a deployed convolution whose codes AMX multiplies where they lie in the rows.
//
// Two runs of pixels are multiplied at a time, with 32 outputs, whose sums stay in four tiles. Vectors
// run beside products where there are few between two of them; many let the unit of AMX sleep. So the
// results of a slice are computed in small pieces between the products of the next one, where they
// are codes alone of bounded values; FinishSlice computes others at once.
#pragma GCC diagnostic ignored "-Wpsabi"  // all that takes or gives vectors is inlined
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of intrinsics, by GCC 12

#include "amx.h"
#include "conv_int8.h"
#include "results.h"

namespace gpu_ops {
#ifdef HAS_AMX
namespace {

constexpr int64_t kPiece = 2;  // pixels of a piece

// Codes of two runs of pixels where they lie: `first` is the first tap of the first pixel of each,
// `count` how many pixels it has, at most kTileRows, and `step` the distance of one to the next. A
// tap has `size` codes, a multiple of a tile's.
struct TapCodes {
  const uint8_t* first[2];
  int64_t count[2], step, size;
  const std::vector<int64_t>& taps;  // their distances from the first one

  int64_t Pixels() const { return count[0] + count[1]; }
};

// Codes as whole floats, and back.
AMX_INLINE Wide LoadCodes(const uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return Wide(Wide::Lanes(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))));
}
AMX_INLINE void StoreCodes(const Wide& codes, uint8_t* to) {
  const __m512i integers = _mm512_cvttps_epi32(__m512(codes.lanes));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(integers));
}

// Results that are all computed by FinishSlice.
struct AtOnce {
  AtOnce(const Int8Convolution&, const PackedWeights&) {}
  bool Take(const Place&, const int32_t*, const int32_t*) { return false; }
  void Next() {}
  void Finish() {}
};

// The results of a slice that are computed in pieces: codes of sums, without sums of codes if they are
// `kWhole`, and with codes of residuals.
template <bool kResidual, bool kWhole>
class InPieces {
 public:
  InPieces(const Int8Convolution& job, const PackedWeights& w) : r_(job.results), w_(w) {}

  // Takes the results of the slice at `to`, of at least kPiece pixels, unless they fill no vector.
  bool Take(const Place& to, const int32_t* sums, const int32_t* code_sums) {
    if (to.size < kWide) return false;
    to_ = to;
    sums_ = sums;
    code_sums_ = code_sums;
    output_ = pixel_ = 0;
    return true;
  }

  // Computes the next piece, a vector of outputs; the last may overlap the one before.
  AMX_INLINE void Next() {
    if (output_ >= to_.size) return;
    Compute(std::min(output_, to_.size - kWide), std::min(pixel_, to_.count - kPiece));
    pixel_ += kPiece;
    if (pixel_ < to_.count) return;
    pixel_ = 0;
    output_ += kWide;
  }

  AMX void Finish() {
    while (output_ < to_.size) Next();
  }

 private:
  AMX_INLINE void Compute(int64_t output, int64_t pixel) {
    const int64_t first = to_.first + output, outputs = to_.outputs, at = to_.At(pixel) + output;
    const int32_t *sums = sums_ + pixel * kSlice + output, *code_sums = code_sums_ + pixel;
    const auto constant = LoadIntegers<Wide>(w_.constant.data() + first);
    const auto factor = LoadIntegers<Wide>(w_.factor.data() + first);
    const Wide scale = Load<Wide>(r_.scale + first), bias = Load<Wide>(r_.bias + first);
    const uint8_t* residual = kResidual ? r_.residual_codes + at : nullptr;
    const Grid residual_grid = r_.residual_grid;
    Wide values[kPiece];
    for (int64_t i = 0; i < kPiece; ++i) {
      auto sum = LoadIntegers<Wide>(sums + i * kSlice) + constant;
      if (!kWhole) sum += factor * code_sums[i];
      Wide y = Add(Mul(Wide(sum), scale), bias);
      if (kResidual) y = Add(y, Dequantize(LoadCodes(residual + i * outputs), residual_grid));
      values[i] = Most(r_.low, y);
    }
    for (const CodeGrid& tensor : r_.codes) {
      const Grid grid = tensor.grid;
      const Phi phi = tensor.phi;
      const Coefficients<Wide> border(tensor, first, outputs);
      uint8_t* codes = tensor.codes + at;
      for (int64_t i = 0; i < kPiece; ++i)
        StoreCodes(CodeOf(values[i], grid, phi, true, true, border), codes + i * outputs);
    }
  }

  const Results& r_;
  const PackedWeights& w_;
  Place to_{};
  const int32_t *sums_ = nullptr, *code_sums_ = nullptr;
  int64_t output_ = 0, pixel_ = 0;
};

// Whether they are codes of values without other bounds than a lowest one, which is not negative.
bool AreCodes(const Int8Convolution& job) {
  const Results& r = job.results;
  for (const CodeGrid& tensor : r.codes)
    if (!tensor.positive) return false;
  return !job.Pooled() && r.bias != nullptr && r.residual == nullptr && r.values == nullptr &&
         r.high == kInfinity;
}

// Tiles 0 to 3 are the sums of both runs with 32 outputs, 4 and 5 codes, 6 and 7 weights.
AMX void ShapeRuns(const TapCodes& codes) {
  const int64_t first = -1 - codes.count[0], second = codes.count[1];  // of no other shapes
  if (first == shaped_for[0] && second == shaped_for[1]) return;
  TileShapes shapes;
  for (int run = 0; run < 2; ++run) {
    for (int lane = 0; lane < 2; ++lane) shapes.Shape(2 * run + lane, codes.count[run], kLane);
    shapes.Shape(4 + run, codes.count[run], kTileQuads);
    shapes.Shape(6 + run, kTileQuads, kLane);
  }
  LoadShapes(shapes, first, second);
}

// The sums of both runs, or of the first alone, with one or two lanes of outputs.
template <bool kBoth, bool kPair, typename Pending>
AMX inline void MultiplyRuns(const TapCodes& codes, const int8_t* weights, int64_t line,
                             int32_t* sums, Pending& pending) {
  constexpr int64_t stride = kSlice * sizeof(int32_t), lane = kLane * kQuad;
  _tile_zero(0);
  if (kPair) _tile_zero(1);
  if (kBoth) _tile_zero(2);
  if (kBoth && kPair) _tile_zero(3);
  for (const int64_t tap : codes.taps)
    for (int64_t k = tap; k < tap + codes.size; k += kTileBytes, weights += kTileQuads * line) {
      _tile_loadd(6, weights, line);
      _tile_loadd(4, codes.first[0] + k, codes.step);
      _tile_dpbusd(0, 4, 6);
      pending.Next();
      if (kPair) {
        _tile_loadd(7, weights + lane, line);
        _tile_dpbusd(1, 4, 7);
        pending.Next();
      }
      if (kBoth) {
        _tile_loadd(5, codes.first[1] + k, codes.step);
        _tile_dpbusd(2, 5, 6);
        pending.Next();
      }
      if (kBoth && kPair) {
        _tile_dpbusd(3, 5, 7);
        pending.Next();
      }
    }
  _tile_stored(0, sums, stride);
  if (kPair) _tile_stored(1, sums + kLane, stride);
  int32_t* second = sums + codes.count[0] * kSlice;
  if (kBoth) _tile_stored(2, second, stride);
  if (kBoth && kPair) _tile_stored(3, second + kLane, stride);
}

template <bool kBoth, typename Pending>
AMX inline void EachPair(const TapCodes& codes, const int8_t* weights, int64_t outputs, int32_t* sums,
                         Pending& pending) {
  ShapeRuns(codes);
  const int64_t line = outputs * kQuad;
  for (int64_t o = 0; o < outputs; o += 2 * kLane)
    if (outputs - o > kLane)
      MultiplyRuns<kBoth, true>(codes, weights + o * kQuad, line, sums + o, pending);
    else
      MultiplyRuns<kBoth, false>(codes, weights + o * kQuad, line, sums + o, pending);
}

// The sums of both runs, one after the other, as those of rows that have all taps.
template <typename Pending>
AMX void Multiply(const TapCodes& codes, const int8_t* weights, int64_t outputs, int32_t* sums,
                  Pending& pending) {
  if (codes.count[1] > 0)
    EachPair<true>(codes, weights, outputs, sums, pending);
  else
    EachPair<false>(codes, weights, outputs, sums, pending);
}

template <typename Pending>
AMX void MultiplyStrips(const Int8Convolution& job, const PackedWeights& w, const Task& task,
                        TaskScratch& s) {
  const Geometry& g = job.Window();
  const int64_t width = g.Out(1), pixels = task.rows * width, step = g.stride[1] * g.channels;
  const int64_t row = g.stride[0] * job.columns.Line();
  // Runs of one length, as shaping tiles takes time.
  const int64_t runs = (width + kTileRows - 1) / kTileRows, length = (width + runs - 1) / runs;
  const int64_t pixel = (task.n * g.Out(0) + task.first) * width;
  TapCodes codes{{}, {}, step, g.channels, s.pixel.taps};
  Pending pending(job, w);
  // Those of a product, and of the one before.
  int32_t *sums = s.sums.data(), *other_sums = sums + kTilePixels * kSlice;
  int32_t *code_sums = s.code_sums.data(), *other_code_sums = code_sums + kTilePixels;
  for (int64_t p = 0, end = 0; p < pixels; p = end) {
    for (int64_t run = 0; run < 2; ++run) {
      codes.first[run] = s.codes.data() + end / width * row + end % width * step;
      codes.count[run] = std::min({length, width - end % width, pixels - end});
      end += codes.count[run];
    }
    std::swap(code_sums, other_code_sums);
    if (!w.ones.empty()) {
      Multiply(codes, w.ones.data(), kLane, sums, pending);
      for (int64_t i = 0; i < codes.Pixels(); ++i) code_sums[i] = sums[i * kSlice];
    }
    for (int64_t slice = task.slice; slice < task.slices; ++slice) {
      Multiply(codes, w.packed.data() + w.At(0, slice, job.Quads()), w.Count(slice), sums, pending);
      pending.Finish();
      const Place to{pixel + p, p, codes.Pixels(), job.outputs, w.First(slice),
                     std::min(w.Count(slice), job.Outer() - w.First(slice))};
      if (pending.Take(to, sums, code_sums))
        std::swap(sums, other_sums);
      else
        FinishSlice(job, w, w.First(slice), to, sums, code_sums, s);
    }
  }
  pending.Finish();
}

}  // namespace

void MultiplyTiles(const Int8Convolution& job, const PackedWeights& w, const Task& task,
                   TaskScratch& s) {
  const bool residual = job.results.residual_codes != nullptr, whole = w.ones.empty();
  const auto multiply = !AreCodes(job)      ? MultiplyStrips<AtOnce>
                        : residual && whole ? MultiplyStrips<InPieces<true, true>>
                        : residual          ? MultiplyStrips<InPieces<true, false>>
                        : whole             ? MultiplyStrips<InPieces<false, true>>
                                            : MultiplyStrips<InPieces<false, false>>;
  multiply(job, w, task, s);
}
#else
void MultiplyTiles(const Int8Convolution&, const PackedWeights&, const Task&, TaskScratch&) {}
#endif

}  // namespace gpu_ops
