// Blocks of threads that share memory and multiply int8 matrices on tensor cores.
//
// A tile is a functor of phases: Start for each thread, then for each stage Fill, after which the
// block waits for all, and for each of its Steps a Load and the products of the warp, and Finish.
// Its State, one a thread, has the fragments `a`, `b` and the sums of `kDown` times `kAcross`
// products of 16x32 elements, of type `Code`, and 32x8 elements. With `kBuffers` of shared memory,
// BufferBytes each, that many stages less one are filled ahead, by CopyAsync: the copies of a stage
// end while the ones before are multiplied. tests/twin.cc runs the same phases in plain loops.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <type_traits>
#include <vector>

#include "device.h"

namespace gpu_ops {

// Before a loop whose index must be known when compiling, as registers have no addresses.
#ifdef __CUDA_ARCH__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#else
#define UNROLL
#define NO_UNROLL
#endif

constexpr int kWarp = 32;
constexpr int kStep = 32;  // elements of a product

// A thread's place in its warp, as the tensor cores count: of row `Row`, elements 4 * Part on.
BORDER_INLINE int Row(int thread) { return thread % kWarp / 4; }
BORDER_INLINE int Part(int thread) { return thread % 4; }

// Where element `byte` of row `row` lies: rows of 32 bytes, whose halves change places every four
// rows, so that no two threads of a warp read the same bank.
BORDER_INLINE int Swizzle(int row, int byte) { return row * kStep + (byte ^ (row / 4 % 2 * 16)); }

// The fragments of one thread of mma.sync.m16n8k32 (PTX ISA, "Matrix Fragments"): of A the
// rows Row and Row + 8, elements 4 * Part and 16 + 4 * Part on; of B the same of column Row; of the
// sums the rows Row and Row + 8, columns 2 * Part and the next.
using FragmentA = uint32_t[4];
using FragmentB = uint32_t[2];
using Sums = int32_t[4];

// The stages that are filled ahead of the one that is multiplied, and the newest of their groups of
// copies that need not have ended.
template <typename Tile>
constexpr int kAhead = Tile::kBuffers - 1;
template <typename Tile>
constexpr int kPending = kAhead<Tile> > 1 ? kAhead<Tile> - 1 : 0;

#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
#define MULTIPLY(type)                                                                          \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32." type                                    \
               ".s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                  \
               : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#else  // Turing multiplies 8x16 and 16x8 elements, whose fragments are parts of these
#define MULTIPLY(type)                                                                          \
  UNROLL for (int i = 0; i < 4; ++i)                                                            \
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32." type ".s8.s32 {%0,%1}, {%2}, {%3}, "   \
                 "{%0,%1};"                                                                     \
                 : "+r"(sums[i % 2 * 2]), "+r"(sums[i % 2 * 2 + 1]) /* of row Row, or Row + 8 */ \
                 : "r"(a[i]), "r"(b[i / 2]))
#endif

template <typename Code>
__device__ __forceinline__ void Multiply(const FragmentA& a, const FragmentB& b, Sums& sums) {
  if constexpr (std::is_signed_v<Code>)
    MULTIPLY("s8");
  else
    MULTIPLY("u8");
}
#undef MULTIPLY

// Copies to shared memory, which need registers and time only before Ampere; 4 or 16 aligned bytes.
template <int bytes>
BORDER_INLINE void CopyAsync(void* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(at), "l"(from), "n"(bytes)
                 : "memory");
#else
  Vector<uint8_t, bytes>::Load(static_cast<const uint8_t*>(from)).Store(static_cast<uint8_t*>(to));
#endif
}

// Ends the group of copies of a stage.
__device__ __forceinline__ void CommitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for this thread's copies but those of the `groups` newest groups.
template <int groups>
__device__ __forceinline__ void AwaitCopies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

template <typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) TileKernel(Tile tile) {
  extern __shared__ uint4 memory[];
  int8_t* shared = reinterpret_cast<int8_t*>(memory);
  typename Tile::State state;
  tile.Start(blockIdx.x, blockIdx.y, threadIdx.x, state);
  const int stages = tile.Stages();
  const auto buffer = [&](int stage) {
    return shared + stage % Tile::kBuffers * tile.BufferBytes();
  };
  const auto fill = [&](int stage) {
    if (stage < stages) tile.Fill(stage, threadIdx.x, state, buffer(stage));
    CommitCopies();
  };
  for (int stage = 0; stage < kAhead<Tile>; ++stage) fill(stage);
  for (int stage = 0; stage < stages; ++stage) {
    if constexpr (kAhead<Tile> == 0) {
      __syncthreads();
      fill(stage);
    }
    AwaitCopies<kPending<Tile>>();
    __syncthreads();  // the stage is filled, and none reads the one before
    if constexpr (kAhead<Tile> > 0) fill(stage + kAhead<Tile>);
    for (int step = 0; step < tile.Steps(stage); ++step) {
      tile.Load(step, threadIdx.x, state, buffer(stage));
      UNROLL for (int m = 0; m < Tile::kDown; ++m)
        UNROLL for (int n = 0; n < Tile::kAcross; ++n)
          Multiply<typename Tile::Code>(state.a[m], state.b[n], state.sums[m][n]);
    }
  }
  tile.Finish(blockIdx.x, blockIdx.y, threadIdx.x, state);
}
#else
// mma.sync.m8n8k16 of the `i`-th fragment of A: of either factor a thread has elements 4 * Part on of
// row, or column, Row; of the sums row Row, columns 2 * Part and the next.
template <typename Code, typename State>
void MultiplySmall(const State* warp, int m, int n, int i, Sums* sums) {
  Code a[8][16];
  int8_t b[8][16];
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
template <typename Code, typename State>
void Multiply(State* warp, int m, int n) {
  Code a[16][32];
  int8_t b[8][32];
  for (int t = 0; t < kWarp; ++t)
    for (int half = 0; half < 2; ++half) {
      const int at = half * 16 + 4 * Part(t);
      std::memcpy(&a[Row(t)][at], &warp[t].a[m][2 * half], 4);
      std::memcpy(&a[Row(t) + 8][at], &warp[t].a[m][2 * half + 1], 4);
      std::memcpy(&b[Row(t)][at], &warp[t].b[n][half], 4);
    }
  Sums added[kWarp] = {};
  for (int i = 0; i < 4; ++i) MultiplySmall<Code>(warp, m, n, i, added);
  for (int t = 0; t < kWarp; ++t)
    for (int i = 0; i < 4; ++i) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) sum += a[Row(t) + 8 * (i / 2)][k] * b[2 * Part(t) + i % 2][k];
      if (sum != added[t][i]) std::abort();
      warp[t].sums[m][n][i] += sum;
    }
}

// The copies of all threads of a block by group, the newest last; each is done when it is awaited.
struct Copies {
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::deque<std::vector<Copy>> groups{1};

  void Await(size_t newest) {
    for (; groups.size() > newest + 1; groups.pop_front())
      for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
};
inline thread_local Copies copies;

template <int bytes>
void CopyAsync(void* to, const void* from) {
  for (auto at : {reinterpret_cast<uintptr_t>(to), reinterpret_cast<uintptr_t>(from)})
    if (at % bytes != 0) std::abort();
  copies.groups.back().push_back({to, from, bytes});
}

// The phases of one block.
template <typename Tile>
void RunBlock(const Tile& tile, int64_t row, int64_t column, int8_t* shared,
              std::vector<typename Tile::State>& states) {
  const auto each = [](auto run) {
    for (int t = 0; t < Tile::kThreads; ++t) run(t);
  };
  const int stages = tile.Stages();
  const auto buffer = [&](int stage) {
    return shared + stage % Tile::kBuffers * tile.BufferBytes();
  };
  const auto fill = [&](int stage) {
    if (stage < stages) each([&](int t) { tile.Fill(stage, t, states[t], buffer(stage)); });
    copies.groups.emplace_back();
  };
  copies = {};
  each([&](int t) { tile.Start(row, column, t, states[t]); });
  for (int stage = 0; stage < kAhead<Tile>; ++stage) fill(stage);
  for (int stage = 0; stage < stages; ++stage) {
    if (kAhead<Tile> == 0) fill(stage);
    copies.Await(kPending<Tile>);
    if (kAhead<Tile> > 0) fill(stage + kAhead<Tile>);
    for (int step = 0; step < tile.Steps(stage); ++step) {
      each([&](int t) { tile.Load(step, t, states[t], buffer(stage)); });
      for (int t = 0; t < Tile::kThreads; t += kWarp)
        for (int m = 0; m < Tile::kDown; ++m)
          for (int n = 0; n < Tile::kAcross; ++n) Multiply<typename Tile::Code>(&states[t], m, n);
    }
  }
  each([&](int t) { tile.Finish(row, column, t, states[t]); });
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
      // Aligned as its words of 16 bytes.
      std::vector<WordOf<16>> memory(bytes / 16 + 1);
      std::memset(memory.data(), 0x7f, memory.size() * 16);
      RunBlock(tile, row, column, reinterpret_cast<int8_t*>(memory.data()), states);
    }
  return ffi::Error::Success();
#endif
}

}  // namespace gpu_ops
