// Launching threads. A kernel is a functor, called once for every (image, index within an image);
// here stands all that differs between nvcc and a C++ compiler, which runs the same threads in
// plain loops: tests/twin.cc, for machines without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "border_math.h"
#include "operation.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace gpu_ops {

// The most blocks of a launch in either direction; the test's twin makes it few.
#ifndef GPU_OPS_MOST_BLOCKS
#define GPU_OPS_MOST_BLOCKS 65535
#endif
constexpr int64_t kMostBlocks = GPU_OPS_MOST_BLOCKS;
constexpr int kThreads = 256;

// One thread's place in its launch: blocks along an image, and rows of blocks over the images.
struct Place {
  int64_t block, blocks, row, rows, thread;
};

// The work of one thread: as many blocks as were launched step over all that there is to do.
template <typename Body>
BORDER_INLINE void RunThread(const Body& body, const Place& p, int64_t images, int64_t count) {
  for (int64_t image = p.row; image < images; image += p.rows)
    for (int64_t i = p.block * kThreads + p.thread; i < count; i += p.blocks * kThreads)
      body(image, static_cast<int32_t>(i));
}

#ifdef __CUDACC__
template <typename Body>
__global__ void __launch_bounds__(kThreads) Kernel(Body body, int64_t images, int64_t count) {
  RunThread(body, {blockIdx.x, gridDim.x, blockIdx.y, gridDim.y, threadIdx.x}, images, count);
}
#endif

// A stream and memory that lives as long as the call.
class Device {
 public:
#ifdef __CUDACC__
  Device(cudaStream_t stream, ffi::ScratchAllocator scratch)
      : stream_(stream), scratch_(std::move(scratch)) {}
#endif

  // body(image, i) for every image and every i in [0, count), in any order.
  template <typename Body>
  ffi::Error Launch(int64_t images, int64_t count, const Body& body) {
    if (images == 0 || count == 0) return ffi::Error::Success();
    const int64_t blocks = std::min<int64_t>((count + kThreads - 1) / kThreads, kMostBlocks);
    const int64_t rows = std::min<int64_t>(images, kMostBlocks);
#ifdef __CUDACC__
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(rows));
    Kernel<<<grid, kThreads, 0, stream_>>>(body, images, count);
    const cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) return ffi::Error::Success();
    return ffi::Error::Internal(std::string("gpu_ops: ") + cudaGetErrorString(error));
#else
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t thread = 0; thread < kThreads; ++thread)
          RunThread(body, {block, blocks, row, rows, thread}, images, count);
    return ffi::Error::Success();
#endif
  }

  // How many blocks it takes to keep all of it busy.
  int Processors() const {
#ifdef __CUDACC__
    return Attribute(cudaDevAttrMultiProcessorCount, 1);
#else
    return GPU_OPS_PROCESSORS;  // of the test's twin
#endif
  }

  // The most bytes of shared memory that a block can have.
  int SharedBytes() const {
#ifdef __CUDACC__
    return Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 48 << 10);
#else
    return GPU_OPS_SHARED_BYTES;  // of the test's twin
#endif
  }

#ifdef __CUDACC__
  static int Attribute(cudaDeviceAttr attribute, int otherwise) {
    int device = 0, value = otherwise;
    if (cudaGetDevice(&device) == cudaSuccess)
      cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  }

  cudaStream_t stream() const { return stream_; }
#endif

  // Zeros; null where memory has run out.
  template <typename T>
  T* Zeros(int64_t count) {
    T* to = Allocate<T>(count);
    if (to == nullptr) return to;
#ifdef __CUDACC__
    return cudaMemsetAsync(to, 0, count * sizeof(T), stream_) == cudaSuccess ? to : nullptr;
#else
    std::fill_n(to, count, T{});
    return to;
#endif
  }

  // Uninitialised; null where memory has run out.
  template <typename T>
  T* Allocate(int64_t count) {
    const size_t bytes = std::max<int64_t>(count, 1) * sizeof(T);
#ifdef __CUDACC__
    return static_cast<T*>(scratch_.Allocate(bytes, alignof(std::max_align_t)).value_or(nullptr));
#else
    return reinterpret_cast<T*>(scratch_.emplace_back(bytes, '\x7f').data());
#endif
  }

 private:
#ifdef __CUDACC__
  cudaStream_t stream_;
  ffi::ScratchAllocator scratch_;
#else
  std::vector<std::vector<char>> scratch_;
#endif
};

template <int bytes>
struct WordOf;
template <>
struct WordOf<1> { using Type = uint8_t; };
template <>
struct WordOf<2> { using Type = uint16_t; };
template <>
struct WordOf<4> { using Type = uint32_t; };
template <>
struct WordOf<8> { using Type = uint64_t; };
template <>
struct alignas(16) WordOf<16> {
  using Type = WordOf;
  uint32_t parts[4];
};

// `size` values between memory and registers, in words of up to 16 bytes, which `at` is aligned to;
// only what no thread writes may be read so, through the read-only cache.
template <typename T, int size>
struct Vector {
  static constexpr int kBytes = sizeof(T) * size, kWord = kBytes < 16 ? kBytes : 16;
  using Word = typename WordOf<kWord>::Type;
  alignas(16) T values[size];

  static BORDER_INLINE Vector Load(const T* at) {
    Vector v;
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int i = 0; i < kBytes / kWord; ++i) {
      if constexpr (kWord == 16)
        reinterpret_cast<uint4*>(v.values)[i] = __ldg(reinterpret_cast<const uint4*>(at) + i);
      else
        reinterpret_cast<Word*>(v.values)[i] = __ldg(reinterpret_cast<const Word*>(at) + i);
    }
#else
    if (reinterpret_cast<uintptr_t>(at) % kWord != 0) std::abort();
    std::memcpy(v.values, at, kBytes);
#endif
    return v;
  }

  BORDER_INLINE void Store(T* at) const {
#ifdef __CUDA_ARCH__
#pragma unroll
    for (int i = 0; i < kBytes / kWord; ++i) {
      if constexpr (kWord == 16)
        reinterpret_cast<uint4*>(at)[i] = reinterpret_cast<const uint4*>(values)[i];
      else
        reinterpret_cast<Word*>(at)[i] = reinterpret_cast<const Word*>(values)[i];
    }
#else
    if (reinterpret_cast<uintptr_t>(at) % kWord != 0) std::abort();
    std::memcpy(at, values, kBytes);
#endif
  }
};

// Adds where other threads do: whole numbers, whose sum does not depend on the order.
BORDER_INLINE void AddTo(int32_t* to, int32_t value) {
#ifdef __CUDA_ARCH__
  atomicAdd(to, value);
#else
  *to += value;
#endif
}

// The grid, where only the device knows the step size: one that is not positive and finite makes
// everything not-a-number.
BORDER_INLINE Grid DeviceGrid(const float* step, const float* zero, int64_t bits) {
  const bool good = *step > 0.0f && *step <= std::numeric_limits<float>::max();
  return MakeGrid(good ? *step : std::numeric_limits<float>::quiet_NaN(), *zero, bits);
}

}  // namespace gpu_ops

namespace xla::ffi {

template <>
struct CtxDecoding<gpu_ops::Device> {
  using Type = gpu_ops::Device;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
#ifdef __CUDACC__
    auto stream = CtxDecoding<PlatformStream<cudaStream_t>>::Decode(api, context, diagnostic);
    auto scratch = CtxDecoding<ScratchAllocator>::Decode(api, context, diagnostic);
    if (!stream || !scratch) return std::nullopt;
    return Type(*stream, std::move(*scratch));
#else
    static_cast<void>(api), static_cast<void>(context), static_cast<void>(diagnostic);
    return Type();
#endif
  }
};

}  // namespace xla::ffi
