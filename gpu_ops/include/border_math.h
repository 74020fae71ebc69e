// The arithmetic of a rounding border, for one element: the only place that has it in C++.
//
// It is that of aquant_jax.numerics and aquant_jax.border in float32, operation by operation:
// compile with -ffp-contract=off, or a fused multiply-add changes codes at ties. NaN stays NaN.
#pragma once

#ifdef __CUDACC__
#define BORDER_INLINE __host__ __device__ __forceinline__
#else
#include <cmath>
#define BORDER_INLINE inline __attribute__((always_inline))
#endif

namespace gpu_ops {

constexpr float kMaxUnits = 8388608.0f;                 // 2^23
constexpr float kBelowOne = 1.0f - 1.0f / 16777216.0f;  // 1 - 2^-24

// How the polynomial becomes the border.
enum class Phi { kIdentity = 0, kClamp = 1, kClampStraightThrough = 2 };

// Grid of the quantized tensor: step size, its inverse, zero point and largest code.
struct Grid {
  float step;
  float inv_step;
  float zero;
  float top;
};

BORDER_INLINE float Clip(float v, float low, float high) {
  return v < low ? low : (v > high ? high : v);
}

// u: the activation in units of the step size.
BORDER_INLINE float ToUnits(float x, float inv_step) {
  return Clip(x * inv_step, -kMaxUnits, kMaxUnits);
}

BORDER_INLINE float ApplyPhi(Phi phi, float p) {
  return phi == Phi::kIdentity ? p : Clip(p, 0.0f, kBelowOne);
}

// Derivative of ApplyPhi; the straight-through clamp passes everything.
BORDER_INLINE float PhiSlope(Phi phi, float p) {
  return phi != Phi::kClamp || (p >= 0.0f && p <= kBelowOne) ? 1.0f : 0.0f;
}

// The code before it is clipped to [0, top].
BORDER_INLINE float RawCode(float u, float border, const Grid& grid) {
  return ceilf(u - border) + grid.zero;
}

}  // namespace gpu_ops
