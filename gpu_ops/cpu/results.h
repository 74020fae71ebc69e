// The results of a deployed convolution, from the values of some pixels.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_int8.h"

namespace gpu_ops {

// Where `size` outputs of some pixels lie, from `first` on: in a tensor, and in the floats of a task.
struct Place {
  int64_t pixel, local, count, outputs, first, size;

  int64_t At(int64_t i) const { return (pixel + i) * outputs + first; }
  int64_t LocalAt(int64_t i) const { return (local + i) * outputs + first; }
};

// Calls `run(first, size)` for every slice of the outputs. Of a rest that is no vector, the slice
// starts within the one before.
template <typename Run>
BORDER_INLINE void EachSlice(int64_t outputs, Run run) {
  for (int64_t first = 0; first < outputs; first += kSlice) {
    const int64_t start = std::min(first, std::max<int64_t>(outputs - kWide, 0));
    run(start, std::min(kSlice, outputs - start));
  }
}

// The borders of an output, or of `kWide` from `first` on.
template <typename Value>
struct Coefficients {
  Value b0, b1, b2;

  BORDER_INLINE Coefficients(const CodeGrid& tensor, int64_t first, int64_t outputs)
      : b0(Load<Value>(tensor.coefficients + first)),
        b1(Load<Value>(tensor.coefficients + outputs + first)),
        b2(Load<Value>(tensor.coefficients + 2 * outputs + first)) {}
};

// The code of a value; for `bounded` and `positive` see CodeGrid.
template <typename Value>
BORDER_INLINE Value CodeOf(const Value& y, const Grid& grid, Phi phi, bool bounded, bool positive,
                           const Coefficients<Value>& b) {
  Value u = Mul(y, grid.inv_step);
  if (!bounded) u = Clip(u, -kMaxUnits, kMaxUnits);
  const Value border = Add(Mul(Add(Mul(b.b2, u), b.b1), u), b.b0);
  Value code = Ceil(Sub(u, ApplyPhi(phi, border)));
  if (!positive) code = Most(Add(code, grid.zero), 0.0f);
  return Least(code, grid.top);
}

// The codes of the outputs from their values, `kSlice` apart for every pixel. Those of a whole slice
// become bytes at last, in a third of the instructions that vectors take one by one.
BORDER_INLINE void Requantize(const CodeGrid& tensor, const Place& to, const float* y,
                              int32_t* integers) {
  const Grid grid = tensor.grid;
  const Phi phi = tensor.phi;
  const bool bounded = tensor.bounded, positive = tensor.positive, whole = to.size == kSlice;
  const int64_t count = to.count, outputs = to.outputs;
  uint8_t* codes = tensor.codes + to.At(0);
  EachValue(to.size, [&](int64_t o, auto value) INLINED_LAMBDA {
    using Value = decltype(value);
    const Coefficients<Value> border(tensor, to.first + o, outputs);
    for (int64_t i = 0; i < count; ++i) {
      const Value code = CodeOf(Load<Value>(y + i * kSlice + o), grid, phi, bounded, positive, border);
      if (whole)
        StoreInteger(code, integers + i * kSlice + o);
      else
        Store(grid, 0.0f, code, codes + i * outputs + o);
    }
  });
  for (int64_t i = 0; whole && i < count; ++i)
    EACH(o, kSlice) codes[i * outputs + o] = static_cast<uint8_t>(integers[i * kSlice + o]);
}

// The results of the outputs, from their values, `kSlice` apart for every pixel.
BORDER_INLINE void Deliver(const Results& r, const Place& to, const float* y, int32_t* integers) {
  if (r.values != nullptr)
    for (int64_t i = 0; i < to.count; ++i)
      std::memcpy(r.values + to.At(i), y + i * kSlice, to.size * sizeof(float));
  for (const CodeGrid& tensor : r.codes) Requantize(tensor, to, y, integers);
}

// The sums of a slice of the outputs of some pixels become results; `first` is the slice's first
// constant, and `codes` are the sums of the pixels' codes.
void FinishSlice(const Int8Convolution& job, const PackedWeights& w, int64_t first, const Place& to,
                 const int32_t* slice, const int32_t* codes, TaskScratch& s);

}  // namespace gpu_ops
