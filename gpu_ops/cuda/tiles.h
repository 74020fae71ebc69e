// Blocks of threads that share memory and multiply int8 matrices on tensor cores.
//
// A tile is a functor of phases: Start for each thread, then for each stage Fill, after which the
// block waits for all, and for each of its Steps a Load and the products of the warp, and Finish.
// Its State, one a thread, has the fragments `a`, `b` and the sums of `kDown` times `kAcross`
// products of 16x32 and 32x8 elements. tests/twin.cc runs the same phases in plain loops.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device.h"

namespace gpu_ops {

// Before a loop whose index must be known when compiling, as registers have no addresses.
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

constexpr int kWarp = 32;

// A thread's place in its warp, as the tensor cores count: of row `Row`, elements 4 * Part on.
BORDER_INLINE int Row(int thread) { return thread % kWarp / 4; }
BORDER_INLINE int Part(int thread) { return thread % 4; }

// The fragments of one thread of mma.sync.m16n8k32 (PTX ISA, "Matrix Fragments"): of A the
// rows Row and Row + 8, elements 4 * Part and 16 + 4 * Part on; of B the same of column Row; of the
// sums the rows Row and Row + 8, columns 2 * Part and the next.
using FragmentA = uint32_t[4];
using FragmentB = uint32_t[2];
using Sums = int32_t[4];

#ifdef __CUDACC__
__device__ __forceinline__ void Multiply(const FragmentA& a, const FragmentB& b, Sums& sums) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else  // Turing multiplies 8x16 and 16x8 elements, whose fragments are parts of these
  UNROLL for (int i = 0; i < 4; ++i) {
    int32_t* half = sums + i % 2 * 2;  // the rows Row, or Row + 8
    asm volatile(
        "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+r"(half[0]), "+r"(half[1])
        : "r"(a[i]), "r"(b[i / 2]));
  }
#endif
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) TileKernel(Tile tile) {
  extern __shared__ uint4 memory[];
  int8_t* shared = reinterpret_cast<int8_t*>(memory);
  typename Tile::State state;
  tile.Start(blockIdx.x, blockIdx.y, threadIdx.x, state);
  for (int stage = 0; stage < tile.Stages(); ++stage) {
    tile.Fill(stage, threadIdx.x, state, shared);
    __syncthreads();
    for (int step = 0; step < tile.Steps(stage); ++step) {
      tile.Load(step, threadIdx.x, state, shared);
      UNROLL for (int m = 0; m < Tile::kDown; ++m)
        UNROLL for (int n = 0; n < Tile::kAcross; ++n)
          Multiply(state.a[m], state.b[n], state.sums[m][n]);
    }
    __syncthreads();
  }
  tile.Finish(blockIdx.x, blockIdx.y, threadIdx.x, state);
}
#else
// mma.sync.m8n8k16 of the `i`-th fragment of A: of either factor a thread has elements 4 * Part on of
// row, or column, Row; of the sums row Row, columns 2 * Part and the next.
template <typename State>
void MultiplySmall(const State* warp, int m, int n, int i, Sums* sums) {
  int8_t a[8][16], b[8][16];
  for (int t = 0; t < kWarp; ++t) {
    std::memcpy(&a[Row(t)][4 * Part(t)], &warp[t].a[m][i], 4);
    std::memcpy(&b[Row(t)][4 * Part(t)], &warp[t].b[n][i / 2], 4);
  }
  for (int t = 0; t < kWarp; ++t)
    for (int column = 0; column < 2; ++column)
      for (int k = 0; k < 16; ++k)
        sums[t][i % 2 * 2 + column] += a[Row(t)][k] * b[2 * Part(t) + column][k];
}

// The same product, of the 32 threads of a warp; and as Turing's four, which must agree.
template <typename State>
void Multiply(State* warp, int m, int n) {
  int8_t a[16][32], b[8][32];
  for (int t = 0; t < kWarp; ++t)
    for (int half = 0; half < 2; ++half) {
      const int at = half * 16 + 4 * Part(t);
      std::memcpy(&a[Row(t)][at], &warp[t].a[m][2 * half], 4);
      std::memcpy(&a[Row(t) + 8][at], &warp[t].a[m][2 * half + 1], 4);
      std::memcpy(&b[Row(t)][at], &warp[t].b[n][half], 4);
    }
  Sums added[kWarp] = {};
  for (int i = 0; i < 4; ++i) MultiplySmall(warp, m, n, i, added);
  for (int t = 0; t < kWarp; ++t)
    for (int i = 0; i < 4; ++i) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[Row(t) + 8 * (i / 2)][k] * b[2 * Part(t) + i % 2][k];
      if (sum != added[t][i]) std::abort();
      warp[t].sums[m][n][i] += sum;
    }
}
#endif

// Runs `down` times `across` blocks, with `bytes` of shared memory each.
template <typename Tile>
ffi::Error LaunchTiles(Device& device, int64_t down, int64_t across, int64_t bytes,
                       const Tile& tile) {
  if (down == 0 || across == 0) return ffi::Error::Success();
#ifdef __CUDACC__
  cudaError_t error = cudaFuncSetAttribute(
      TileKernel<Tile>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) {
    const dim3 grid(static_cast<unsigned>(down), static_cast<unsigned>(across));
    TileKernel<Tile><<<grid, Tile::kThreads, bytes, device.stream()>>>(tile);
    error = cudaGetLastError();
  }
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("gpu_ops: ") + cudaGetErrorString(error));
#else
  static_cast<void>(device);
  std::vector<typename Tile::State> states(Tile::kThreads);
  for (int64_t row = 0; row < down; ++row)
    for (int64_t column = 0; column < across; ++column) {
      std::vector<uint64_t> memory(bytes / sizeof(uint64_t) + 1, 0x7f7f7f7f7f7f7f7f);
      int8_t* shared = reinterpret_cast<int8_t*>(memory.data());
      for (int t = 0; t < Tile::kThreads; ++t) tile.Start(row, column, t, states[t]);
      for (int stage = 0; stage < tile.Stages(); ++stage) {
        for (int t = 0; t < Tile::kThreads; ++t) tile.Fill(stage, t, states[t], shared);
        for (int step = 0; step < tile.Steps(stage); ++step) {
          for (int t = 0; t < Tile::kThreads; ++t) tile.Load(step, t, states[t], shared);
          for (int t = 0; t < Tile::kThreads; t += kWarp)
            for (int m = 0; m < Tile::kDown; ++m)
              for (int n = 0; n < Tile::kAcross; ++n) Multiply(&states[t], m, n);
        }
      }
      for (int t = 0; t < Tile::kThreads; ++t) tile.Finish(row, column, t, states[t]);
    }
  return ffi::Error::Success();
#endif
}

}  // namespace gpu_ops
