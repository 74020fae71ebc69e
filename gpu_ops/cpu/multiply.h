// Small matrix products of the fused convolution.
#pragma once

#include <cstdint>

namespace gpu_ops {

// The second operand and the result have rows of a multiple of this many floats.
constexpr int64_t kLanes = 16;

inline int64_t RoundUp(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// c[i, j] (+)= sum_d a(i, d) b[d, j] for `rows` x `depth` x `width`, all in float.
//
// a(i, d) is a[i * row + d * step], so a transposed operand needs no copy; b and c are dense, of
// `width` columns, a multiple of kLanes.
void Multiply(const float* a, int64_t row, int64_t step, int64_t rows, int64_t depth,
              const float* b, int64_t width, float* c, bool add);

}  // namespace gpu_ops
