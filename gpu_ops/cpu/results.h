// The results of a deployed convolution, from the values of some pixels.
#pragma once

#include <cstdint>
#include <cstring>

#include "conv_int8.h"

namespace gpu_ops {

// Where the outputs of some pixels lie, from `first` on: in a tensor, and in the floats of a task.
struct Place {
  int64_t pixel, local, count, outputs, first;

  int64_t At(int64_t i) const { return (pixel + i) * outputs + first; }
  int64_t LocalAt(int64_t i) const { return (local + i) * outputs + first; }
};

// The codes of one output of some pixels, or of `kWide`, from their values.
template <typename Value>
BORDER_INLINE void Requantize(const CodeGrid& tensor, const Place& to, const Value* y) {
  const float* at = tensor.coefficients + to.first;
  const Value b[] = {Load<Value>(at), Load<Value>(at + to.outputs), Load<Value>(at + 2 * to.outputs)};
  const Grid grid = tensor.grid;
  const Phi phi = tensor.phi;
  uint8_t* codes = tensor.codes;
  for (int64_t i = 0; i < to.count; ++i) {
    const Value u = ToUnits(y[i], grid.inv_step);
    const Value border = Horner(2, [&](int power) INLINED_LAMBDA { return b[power]; }, u);
    Store(grid, 0.0f, Code(u, ApplyPhi(phi, border), grid), codes + to.At(i));
  }
}

// The results of one output of some pixels, or of `kWide`, from their values.
template <typename Value>
BORDER_INLINE void Deliver(const Results& r, const Place& to, const Value* y) {
  float* values = r.values;
  if (values != nullptr)
    for (int64_t i = 0; i < to.count; ++i) std::memcpy(values + to.At(i), y + i, sizeof(Value));
  for (const CodeGrid& tensor : r.codes) Requantize(tensor, to, y);
}

}  // namespace gpu_ops
