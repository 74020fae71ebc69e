// Vectors of floats, and runs of elements that are computed and stored in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "border_math.h"
#include "parallel.h"

namespace gpu_ops {

constexpr int64_t kWide = 16;             // channels that fill a vector

// That many floats in registers, which a loop over an array would store after every operation.
struct Wide {
  typedef float Lanes __attribute__((vector_size(kWide * sizeof(float))));
  typedef int32_t Integers __attribute__((vector_size(kWide * sizeof(int32_t))));
  typedef int16_t Halves __attribute__((vector_size(kWide * sizeof(int16_t))));
  typedef uint8_t Bytes __attribute__((vector_size(kWide)));
  Lanes lanes;

  Wide() = default;
  BORDER_INLINE Wide(float each) {
#ifdef __clang__
    lanes = each - Lanes{};
#else  // that GCC 12 would fill lane by lane
    Lanes first{};
    first[0] = each;
    lanes = __builtin_shuffle(first, Integers{});
#endif
  }
  BORDER_INLINE explicit Wide(const Lanes& each) : lanes(each) {}
  BORDER_INLINE explicit Wide(const Integers& each) : lanes(__builtin_convertvector(each, Lanes)) {}

  friend BORDER_INLINE Wide Mul(const Wide& a, const Wide& b) { return Wide(a.lanes * b.lanes); }
  friend BORDER_INLINE Wide Add(const Wide& a, const Wide& b) { return Wide(a.lanes + b.lanes); }
  friend BORDER_INLINE Wide Sub(const Wide& a, const Wide& b) { return Wide(a.lanes - b.lanes); }
  friend BORDER_INLINE Wide Least(const Wide& a, const Wide& b) {
    return Wide(a.lanes < b.lanes ? a.lanes : b.lanes);
  }
  friend BORDER_INLINE Wide Most(const Wide& a, const Wide& b) {
    return Wide(a.lanes > b.lanes ? a.lanes : b.lanes);
  }
  friend BORDER_INLINE Wide Higher(const Wide& a, const Wide& b) {
    // All bits where `a` is above infinity: GCC 12 would compare `a` with itself lane by lane.
    const Integers none = (0x7f800000 - ((Integers)a.lanes & 0x7fffffff)) >> 31;
    return Wide((Lanes)((Integers)Most(a, b).lanes | none));
  }
  friend BORDER_INLINE Wide Ceil(Wide a) {
    for (int64_t i = 0; i < kWide; ++i) a.lanes[i] = ceilf(a.lanes[i]);
    return a;
  }
};

// The higher one, or the first of both that is not a number.
BORDER_INLINE float Higher(float a, float b) { return a > b || a != a ? a : b; }

// From memory to registers, and back. Bytes change their size step by step: at once, GCC 12 takes
// them one by one.
template <typename Value>
BORDER_INLINE Value Load(const float* from) {
  Value value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <typename Value>
BORDER_INLINE Value Load(const uint8_t* from) {
  if constexpr (std::is_same_v<Value, Wide>) {
    Wide::Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    const auto halves = __builtin_convertvector(bytes, Wide::Halves);
    return Wide(__builtin_convertvector(halves, Wide::Integers));
  } else {
    return static_cast<Value>(*from);
  }
}

template <typename Value>
BORDER_INLINE Value Load(const uint16_t* bfloat16) {
  if constexpr (std::is_same_v<Value, Wide>) {
    Wide::Halves halves;
    std::memcpy(&halves, bfloat16, sizeof halves);
    const Wide::Integers bits = __builtin_convertvector(halves, Wide::Integers) << 16;
    Wide value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    return ToFloat(*bfloat16);
  }
}

template <typename Value>
BORDER_INLINE auto LoadIntegers(const int32_t* from) {
  std::conditional_t<std::is_same_v<Value, Wide>, Wide::Integers, int32_t> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

BORDER_INLINE Wide ToFloats(const Wide::Integers& value) { return Wide(value); }
BORDER_INLINE float ToFloats(int32_t value) { return static_cast<float>(value); }

template <typename Out>
BORDER_INLINE void Store(const Grid& grid, float shift, const Wide& code, Out* to) {
  if constexpr (std::is_same_v<Out, float>) {
    const Wide value = Dequantize(code, grid);
    std::memcpy(to, &value, sizeof value);
  } else {
    const auto whole = __builtin_convertvector(Sub(code, shift).lanes, Wide::Integers);
    const auto halves = __builtin_convertvector(whole, Wide::Halves);
    const auto bytes = __builtin_convertvector(halves, Wide::Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
  }
}

BORDER_INLINE void StoreInteger(const Wide& whole, int32_t* to) {
  const auto integers = __builtin_convertvector(whole.lanes, Wide::Integers);
  std::memcpy(to, &integers, sizeof integers);
}
BORDER_INLINE void StoreInteger(float whole, int32_t* to) { *to = static_cast<int32_t>(whole); }

// Calls `each(i, value)` for a run of `count` elements: with a Wide for `kWide` from i on, where the
// last may overlap the one before, or, where they are too few, with a float for each.
template <typename Each>
BORDER_INLINE void EachValue(int64_t count, Each each) {
  if (count < kWide)
    for (int64_t i = 0; i < count; ++i) each(i, 0.0f);
  else
    for (int64_t i = 0; i < count; i += kWide) each(std::min(i, count - kWide), Wide());
}

// Stores the codes of a run of elements: `code(i, value)` gives that of element i, or those of a Wide.
// Bytes are stored by four vectors, which takes a third of the instructions of one by one.
template <typename Out, typename CodeOf>
BORDER_INLINE void StoreRun(const Grid& grid, float shift, int64_t size, Out* out, CodeOf code) {
  constexpr int64_t kRun = 4 * kWide;
  int64_t i = 0;
  if constexpr (sizeof(Out) == 1) {
    for (; i + kRun <= size; i += kRun) {
      int32_t integers[kRun];
      for (int64_t j = 0; j < kRun; j += kWide)
        StoreInteger(Sub(code(i + j, Wide()), shift), integers + j);
      EACH(j, kRun) out[i + j] = static_cast<Out>(integers[j]);
    }
    if (i == size) return;
  }
  const int64_t start = std::min(i, std::max<int64_t>(size - kWide, 0));
  EachValue(size - start, [=](int64_t j, auto value) INLINED_LAMBDA {
    Store(grid, shift, code(start + j, value), out + start + j);
  });
}

}  // namespace gpu_ops
