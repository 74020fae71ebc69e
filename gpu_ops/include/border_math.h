// The arithmetic of a rounding border, for one element: the only place that has it in C++.
//
// It is that of aquant_jax/arithmetic/uniform.py and border.py in float32, operation by operation,
// each rounded separately: a fused multiply-add changes codes at ties. Therefore the CPU build has
// -ffp-contract=off, and CUDA uses intrinsics that are never contracted. Subnormal numbers count as
// zero: XLA runs CPU handlers that way, and the CUDA build sets --ftz=true.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __CUDACC__
#define BORDER_INLINE __host__ __device__ __forceinline__
#elif !defined(BORDER_INLINE)  // a sanitizer's build defines it, as it need not be fast
#define BORDER_INLINE inline __attribute__((always_inline))
#endif

namespace gpu_ops {

constexpr float kMaxUnits = 8388608.0f;                 // 2^23
constexpr float kBelowOne = 1.0f - 1.0f / 16777216.0f;  // 1 - 2^-24
constexpr float kNearest = 0.5f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

BORDER_INLINE float Mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

BORDER_INLINE float Add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

BORDER_INLINE float Sub(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

BORDER_INLINE float Reciprocal(float a) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(a);
#else
  return 1.0f / a;
#endif
}

// The second where either is not a number, as the instructions of x86 have it.
BORDER_INLINE float Least(float a, float b) { return a < b ? a : b; }
BORDER_INLINE float Most(float a, float b) { return a > b ? a : b; }
BORDER_INLINE float Ceil(float a) { return ceilf(a); }

// How the polynomial becomes the border.
enum class Phi { kIdentity = 0, kClamp = 1, kClampStraightThrough = 2 };

// A border function: coefficients b0, b1, ... as [degree + 1, taps, channels]; of degree -1 it is
// the constant 1/2, without coefficients.
struct Border {
  const float* coefficients;
  int degree;
  bool shared_across_taps;
  Phi phi;
};

// Grid of the quantized tensor: step size, its inverse, zero point and largest code.
struct Grid {
  float step;
  float inv_step;
  float zero;
  float top;
};

BORDER_INLINE Grid MakeGrid(float step, float zero, int64_t bits) {
  return {step, Reciprocal(step), zero, static_cast<float>((1 << bits) - 1)};
}

// The arithmetic below is that of a `Value`, which is a float or a vector of them.

// Not-a-number stays not-a-number.
template <typename Value>
BORDER_INLINE Value Clip(const Value& v, float low, float high) {
  return Least(high, Most(low, v));
}

// u: the activation in units of the step size.
template <typename Value>
BORDER_INLINE Value ToUnits(const Value& x, float inv_step) {
  return Clip(Mul(x, inv_step), -kMaxUnits, kMaxUnits);
}

// The polynomial; `b` gives the coefficient of a power.
template <typename Value, typename Coefficient>
BORDER_INLINE Value Horner(int degree, Coefficient b, const Value& u) {
  if (degree == 2) return Add(Mul(Add(Mul(b(2), u), b(1)), u), b(0));
  if (degree == 1) return Add(Mul(b(1), u), b(0));
  return b(0);
}

// The polynomial of one element; `at` finds its b0 and `size` the next power's.
BORDER_INLINE float Polynomial(int degree, const float* at, int64_t size, float u) {
  if (degree < 0) return kNearest;
  return Horner(degree, [=](int power) { return at[power * size]; }, u);
}

// Derivative of Polynomial with respect to u.
BORDER_INLINE float PolynomialSlope(int degree, const float* at, int64_t size, float u) {
  if (degree < 1) return 0.0f;
  return at[size] + (degree > 1 ? 2.0f * at[2 * size] * u : 0.0f);
}

// Both functions of phi choose bounds, not values: a branch on values keeps a compiler from
// vectorising the loop over channels around it.
template <typename Value>
BORDER_INLINE Value ApplyPhi(Phi phi, const Value& p) {
  const bool clamps = phi != Phi::kIdentity;
  return Clip(p, clamps ? 0.0f : -kInfinity, clamps ? kBelowOne : kInfinity);
}

// Derivative of ApplyPhi; the straight-through clamp passes everything.
BORDER_INLINE float PhiSlope(Phi phi, float p) {
  const bool stops = phi == Phi::kClamp;
  const bool below = p < (stops ? 0.0f : -kInfinity), above = p > (stops ? kBelowOne : kInfinity);
  return below || above ? 0.0f : 1.0f;
}

// The code before it is clipped to [0, top].
template <typename Value>
BORDER_INLINE Value RawCode(const Value& u, const Value& border, const Grid& grid) {
  return Add(Ceil(Sub(u, border)), grid.zero);
}

// The code that is deployed; where u or the border is not a number it is 0.
template <typename Value>
BORDER_INLINE Value Code(const Value& u, const Value& border, const Grid& grid) {
  return Least(Most(RawCode(u, border, grid), 0.0f), grid.top);
}

template <typename Value>
BORDER_INLINE Value Dequantize(const Value& code, const Grid& grid) {
  return Mul(grid.step, Sub(code, grid.zero));
}

// The value of an element in training, where not-a-number stays so.
BORDER_INLINE float Quantized(float u, float border, const Grid& grid) {
  return Dequantize(Clip(RawCode(u, border, grid), 0.0f, grid.top), grid);
}

// The derivative at one element whose border is held fixed.
struct Derivative {
  float x;       // with respect to the activation
  float step;    // with respect to the step size
  float border;  // with respect to the border
};

// From the derivative `d` of the element's value, which is the activation itself where not `keep`.
BORDER_INLINE Derivative Differentiate(float u, float border, bool keep, float d,
                                       const Grid& grid) {
  const float raw = RawCode(u, border, grid);
  const float k = keep ? 1.0f : 0.0f;
  const float in = raw >= 0.0f && raw <= grid.top ? 1.0f : 0.0f;
  const float through = k * in * d;
  const float code = Clip(raw, 0.0f, grid.top) - grid.zero;
  return {through + (1.0f - k) * d, k * d * code - through * u, -grid.step * through};
}

// A stored activation; bfloat16 is the upper half of a float.
BORDER_INLINE float ToFloat(float value) { return value; }
BORDER_INLINE float ToFloat(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Stores a code, less `shift` or dequantized.
BORDER_INLINE void Store(const Grid&, float shift, float code, int8_t* to) {
  *to = static_cast<int8_t>(static_cast<int32_t>(code - shift));
}
BORDER_INLINE void Store(const Grid&, float shift, float code, uint8_t* to) {
  *to = static_cast<uint8_t>(static_cast<int32_t>(code - shift));
}
BORDER_INLINE void Store(const Grid& grid, float, float code, float* to) {
  *to = Dequantize(code, grid);
}

}  // namespace gpu_ops
