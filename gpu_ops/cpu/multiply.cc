// Compiled with contraction, unlike the borders: a fused multiply-add changes no code here.
#include "multiply.h"

#include "parallel.h"

namespace gpu_ops {
namespace {

typedef float Vector __attribute__((vector_size(32), aligned(4)));
constexpr int64_t kRows = 6;  // of a tile: 12 accumulators, two of the second operand, one value

// kCount rows and kLanes columns of the result.
template <int64_t kCount>
inline __attribute__((always_inline)) void Tile(const float* a, int64_t row, int64_t step,
                                                int64_t depth, const float* b, int64_t width,
                                                float* c, bool add) {
  Vector low[kCount], high[kCount];
  for (int64_t i = 0; i < kCount; ++i) {
    const Vector* from = reinterpret_cast<const Vector*>(c + i * width);
    low[i] = add ? from[0] : Vector{};
    high[i] = add ? from[1] : Vector{};
  }
  for (int64_t d = 0; d < depth; ++d) {
    const Vector* line = reinterpret_cast<const Vector*>(b + d * width);
    const Vector left = line[0], right = line[1];
    for (int64_t i = 0; i < kCount; ++i) {
      const float value = a[i * row + d * step];
      low[i] += value * left;
      high[i] += value * right;
    }
  }
  for (int64_t i = 0; i < kCount; ++i) {
    Vector* to = reinterpret_cast<Vector*>(c + i * width);
    to[0] = low[i];
    to[1] = high[i];
  }
}

}  // namespace

VECTORISED void Multiply(const float* a, int64_t row, int64_t step, int64_t rows, int64_t depth,
                         const float* b, int64_t width, float* c, bool add) {
  for (int64_t j = 0; j < width; j += kLanes) {
    int64_t i = 0;
    for (; i + kRows <= rows; i += kRows)
      Tile<kRows>(a + i * row, row, step, depth, b + j, width, c + i * width + j, add);
    for (; i < rows; ++i)
      Tile<1>(a + i * row, row, step, depth, b + j, width, c + i * width + j, add);
  }
}

}  // namespace gpu_ops
